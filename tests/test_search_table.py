"""Selection strategies replayed on a table: every row once, nothing seen before its time, and locality pays."""
from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from poise_hpc.agent.recipe import make
from poise_hpc.config import Acquisition
from poise_hpc.selection import acquisition

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "search_table.py"


@pytest.fixture(scope="module")
def script():
    import sys

    spec = importlib.util.spec_from_file_location("search_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["search_table"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def row(i, parts, value, parents=("c0000",), knobs={}):
    recipe = make(parts, knobs)
    return {"id": f"c{i:04d}", "name": f"A{i}", "proposer": "offline", "parents": list(parents), "cause": "" if value is not None else "nan",
            "mechanisms": list(recipe.chosen), "recipe": recipe.to_json(), "run_seconds": 1.0, "final": value, "behaviour": {},
            "by_seed": {} if value is None else {"0": value - 1.0, "1": value + 1.0}, "benchmarks": {} if value is None else {"easy": value}}


@pytest.fixture(scope="module")
def table(script):
    """40 recipes of up to five parts; the score is the number of good parts, so near rows have near scores."""
    good = ["clip-higher", "no-std", "token-mean", "kl-k3", "entropy-bonus"]
    rows = [row(0, (), 10.0)]
    for subset in range(1, 32):
        parts = [p for i, p in enumerate(good) if subset >> i & 1]
        rows.append(row(len(rows), parts, 10.0 + 5 * len(parts)))
    for other in ("leave-one-out", "batch-std", "soft-gate", "tapered", "sequence-sum", "maxrl", "geometric-mean"):
        rows.append(row(len(rows), [other], 2.0))
    rows.append(row(len(rows), ["sequence-ratio"], None))
    rows[0]["proposer"] = "seed"
    return script.Table(rows)


def test_distance_counts_slots_and_moved_knobs(script):
    grpo = make(())
    assert script.distance(grpo, grpo) == 0
    assert script.distance(grpo, make(["no-std"])) == 1
    assert script.distance(make(["no-std"]), make(["token-mean"])) == 2
    ours, theirs = make(["clip-higher"], {"clip_high": 0.28}), make(["clip-higher"], {"clip_high": 0.4})
    assert ours.values != theirs.values and script.distance(ours, theirs) == 1


def test_the_best_two_percent_are_at_least_one_and_never_the_baseline(script, table):
    everything = np.arange(len(table.rows))
    assert table.targets(everything) == {31}  # all five good parts
    assert table.targets(np.array([0, 32, 33])) == {32}  # equal scores: the older
    assert np.isneginf(table.truth[-1])


@pytest.mark.parametrize("strategy", ["poise", "greedy", "random", "islands", None])
def test_a_search_evaluates_every_row_once_and_repeats_itself(script, table, strategy):
    everything = np.arange(len(table.rows))
    runs = [list(script.search(table, everything, strategy, Acquisition(), np.random.default_rng(3))) for _ in range(2)]
    assert runs[0] == runs[1]
    assert sorted(runs[0]) == list(range(1, len(table.rows)))


def test_a_strategy_sees_what_a_campaign_would_show_it(script, table, monkeypatch):
    seen = []

    def spy(entries, pending, *rest):
        seen.append(([e.id for e in entries], [id for id, _ in pending]))
        return acquisition.choose_parent(entries, pending, *rest)

    monkeypatch.setattr(script, "choose_parent", spy)
    list(script.search(table, np.arange(10), "greedy", Acquisition(), np.random.default_rng(0)))
    assert [len(visible) for visible, _ in seen] == [max(1, k - script.WINDOW + 1) for k in range(1, 10, script.PER_PARENT)]
    for visible, pending in seen:
        assert not set(visible) & set(pending)
        assert [*visible, *pending] == [f"c{i:04d}" for i in range(len(visible) + len(pending))]


def test_where_near_rows_have_near_scores_the_best_parent_finds_the_target_sooner(script, table):
    everything = np.arange(len(table.rows))
    greedy, even = (script.mean_evaluations(table, everything, s, Acquisition(), 100, [1]) for s in ("greedy", None))
    assert greedy < 0.85 * even


def test_reliability_separates_the_rows_from_their_seeds(script, table):
    found = script.reliability(table)
    assert found["failed"] == 1
    assert found["seed_error"] == pytest.approx(1.0)  # seeds +-1: variance 2, of a mean of two 1
    assert found["correlation_by_distance"][1] > found["correlation_by_distance"][4]


def test_tuning_and_reporting_halves_share_the_baseline_only(script, table):
    a, b = table.half(np.random.default_rng(0))
    assert set(a) & set(b) == {0}
    assert set(a) | set(b) == set(range(len(table.rows)))


def test_the_report_names_every_strategy(script, table):
    result = script.replay(table, splits=2, replays=2, tuning=1, progress=False)
    text = script.markdown(result)
    assert all(name in text for name in (*script.STRATEGIES, "poise, tuned"))
    assert [r["against_random"] for r in result["whole"] if r["strategy"] == "random parents"] == [0.0]
