"""What a person reads: intervals, verdicts."""
from __future__ import annotations

from dataclasses import replace

import pytest
from helpers_archive import row, score

from poise_hpc import recording, views, wording
from poise_hpc.report import words
from poise_hpc.types import Outcome


@pytest.mark.parametrize(("value", "ci", "sign", "text"), [
    (None, None, False, "-"), (27.44, None, False, "27.4"), (27.4, (20.0, 34.8), False, "27.4 [20.0, 34.8]"),
    (2.0, (-3.1, 7.1), False, "2.0 [0.0, 7.1]"), (99.0, (97.0, 101.0), False, "99.0 [97.0, 100.0]"),  # a score lies within 0..100
    (2.0, (-3.1, 7.1), True, "+2.0 [-3.1, 7.1]")])  # a difference does not
def test_intervals(value, ci, sign, text):
    assert views.interval(value, ci, sign) == text


def compared(delta, ci, **more):
    return replace(row("c0001", 50.0), score=replace(score(50.0), delta=delta, delta_ci=ci), **more)


@pytest.mark.parametrize(("entry", "said", "logged"), [
    (row("c0000", 50.0), "-", "(4 seeds)"),
    (compared(0.0, (0.0, 0.0)), *["the same as c0000 on every seed"] * 2),
    (compared(0.0, (-1.0, 1.0)), "undecided", "undecided"), (compared(0.0, None), "undecided", "undecided"),
    (row("c0001", None), "failed: nonfinite-loss", "failed: nonfinite-loss")])
def test_verdicts(entry, said, logged):
    assert views.verdict(views.archived_row(entry)) == said
    assert recording.headline(entry).endswith(logged)
    assert words.verdict(views.archived_row(entry)) == {"-": "baseline"}.get(said, said)  # the report's


def test_the_leaderboard_of_entries_that_failed_has_no_verdict_of_its_own():
    rows = [{"rank": 1, **views.archived_row(row("c0000", None))}, {"rank": 2, **views.archived_row(compared(1.0, (0.5, 1.5), outcome=Outcome.SUCCEEDED))}]
    text = views.leaderboard_text({"rows": rows, "score": "curve", "campaign": "c", "records": "c/records", "start": None, "problems": []})
    assert text.splitlines()[1].split()[-1] == "-" and "+1.0 [0.5, 1.5]" in text and "cut to 0..100" in text


def test_a_baseline_has_no_verdict_in_any_listing_and_keeps_its_failure():
    base = row("c0000", 50.0)
    assert base.verdict == "undecided" and views.archived_row(base)["verdict"] == "baseline"
    assert views.archived_row(replace(row("c0000", None), verdict="failed"))["verdict"] == "failed"
    assert views.archived_row(compared(1.0, (-1.0, 3.0)))["verdict"] == "undecided"


def test_an_empty_log_is_said_to_be_empty():
    attempt = {"attempt": "check-1", "outcome": "succeeded", "cause": "", "message": ""}
    said = [views.logs_text({"candidate": "c0001", "attempts": [attempt | {"logs": logs}]}).splitlines()[1]
            for logs in ({"log.out": []}, {}, {"log.out": ["Traceback"]})]
    assert said == ["the log is empty", "there is no log", "Traceback"]


def test_one_seed_is_one_seed():
    entry = compared(1.0, None)
    assert "(1 seed)" in recording.headline(replace(entry, score=replace(entry.score, by_seed={"0": 50.0})))


@pytest.mark.parametrize(("ci", "said"), [
    (None, "one seed: no interval"), ((0.0, 0.0), "the same as GRPO on every seed"), ((0.1, 2.0), "better than GRPO"),
    ((-2.0, -0.1), "worse than GRPO"), ((-1.0, 1.0), "not told apart from GRPO")])
def test_what_an_interval_says(ci, said):
    assert wording.told_apart(ci, "GRPO") == said


def test_a_terminal_gets_no_markdown():
    assert wording.plain("**Undecided.** 2 * 3 ** 4, `kl-spike`: **a** and `b`") == "Undecided. 2 * 3 ** 4, kl-spike: a and b"
