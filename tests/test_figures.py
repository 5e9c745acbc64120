"""Figures in free text: which stand, which do not, and which are none."""
from __future__ import annotations

import pytest

from poise_hpc.agent.figures import MARK, marked, unknown

SHOWN = "Overall 28.77 [20.66, 36.88]; against GRPO 1.396; entropy 0.3663, 0.1893; acc 0.4766; kl_old 0.001139; clip_high = 0.28; 62 % of the groups"


@pytest.mark.parametrize("text", [
    "Overall 28.77", "Overall 28.8", "29 points", "+1.4 against GRPO", "-1.4", "entropy 0.37", "0.1893 nats", "acc 47.66 %", "acc 48%", "0.62 of the groups",
    "KL 1.1e-3", "KL 0.0011",                                  # to the digits that are written, as a share or in percent
    "0.37 against 0.19, 0.18 less", "0.3663 and 0.1893, a ratio of 1.94", "from 0.3663 to 0.1893, 48 % lower, 1.9x", "0.1893 is 52 % of 0.3663"])
def test_what_was_shown_and_what_follows_from_it_stands(text):
    assert unknown(text, SHOWN) == []


@pytest.mark.parametrize(("text", "found"), [
    ("Overall 28.78", ["28.78"]), ("entropy 0.36", ["0.36"]), ("30 points", ["30"]), ("acc 50 %", ["50 %"]), ("KL 2e-3", ["2e-3"]),
    ("0.18 less", ["0.18"]),                                   # a difference of figures that stand elsewhere
    ("0.37 against 0.19, 0.25 less", ["0.25"]), ("0.7 and 0.25, 0.45 less", ["0.7", "0.25", "0.45"]), ("0.28, 3.1x more than before", ["3.1x"]),
    (f"0.37 against 0.19. {'And so on. ' * 20}0.18 less", ["0.18"])])
def test_what_comes_from_nowhere_is_found(text, found):
    assert [f.text for f in unknown(text, SHOWN)] == found


@pytest.mark.parametrize("text", [
    "pass@32 of c0017 and GRPO-2", "arXiv:2402.03300", "after step 31", "steps 12 to 33, 14 and 15", "a 48-step run, 48 steps", "in 2 of 3 seeds, 10 groups",
    "`clip = 0.35`", "```\nx = 0.77\n```", "all 100 groups", "L2 norm, k3, Qwen2.5"])
def test_ids_steps_counts_and_code_are_no_figures(text):
    assert unknown(text, SHOWN) == []


def test_the_mark_stands_behind_the_figure():
    assert marked("Fell 12.5 % to 28.77, then 0.9.", SHOWN) == f"Fell 12.5 %{MARK} to 28.77, then 0.9{MARK}."
