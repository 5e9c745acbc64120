"""Selection strategies replayed on a table: every row once, nothing seen before its time, and locality pays."""
from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from poise_hpc.agent.recipe import make
from poise_hpc.config import Acquisition
from poise_hpc.selection import acquisition
from poise_hpc.types import PoiseError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import search_replay  # noqa: E402
import search_table  # noqa: E402


def row(i, parts, value, parents=("c0000",), knobs={}):
    recipe = make(parts, knobs)
    return {"id": f"c{i:04d}", "name": f"A{i}", "proposer": "offline", "parents": list(parents), "cause": "" if value is not None else "nan",
            "mechanisms": list(recipe.chosen), "recipe": recipe.to_json(), "run_seconds": 1.0, "final": value, "behaviour": {},
            "by_seed": {} if value is None else {"0": value - 1.0, "1": value + 1.0}, "benchmarks": {} if value is None else {"easy": value}}


@pytest.fixture(scope="module")
def table():
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
    return search_replay.Table(rows)


def test_distance_counts_slots_and_moved_knobs():
    grpo = make(())
    assert search_table.distance(grpo, grpo) == 0
    assert search_table.distance(grpo, make(["no-std"])) == 1
    assert search_table.distance(make(["no-std"]), make(["token-mean"])) == 2
    ours, theirs = make(["clip-higher"], {"clip_high": 0.28}), make(["clip-higher"], {"clip_high": 0.4})
    assert ours.values != theirs.values and search_table.distance(ours, theirs) == 1


def test_the_best_two_percent_are_at_least_one_and_never_the_baseline(table):
    everything = np.arange(len(table.rows))
    assert table.targets(everything) == {31}  # all five good parts
    assert table.targets(np.array([0, 32, 33])) == {32}  # equal scores: the older
    assert np.isneginf(table.truth[-1])


@pytest.mark.parametrize("strategy", ["poise", "greedy", "random", "islands", None])
def test_a_search_evaluates_every_row_once_and_repeats_itself(table, strategy):
    everything = np.arange(len(table.rows))
    runs = [list(search_replay.search(table, everything, strategy, Acquisition(), np.random.default_rng(3))) for _ in range(2)]
    assert runs[0] == runs[1]
    assert sorted(runs[0]) == list(range(1, len(table.rows)))


def test_a_strategy_sees_what_a_campaign_would_show_it(table, monkeypatch):
    seen = []

    def spy(entries, pending, *rest):
        seen.append(([e.id for e in entries], [id for id, _ in pending]))
        return acquisition.choose_parent(entries, pending, *rest)

    monkeypatch.setattr(search_replay, "choose_parent", spy)
    list(search_replay.search(table, np.arange(10), "greedy", Acquisition(), np.random.default_rng(0)))
    assert [len(visible) for visible, _ in seen] == [max(1, k - search_replay.WINDOW + 1) for k in range(1, 10, search_replay.PER_PARENT)]
    for visible, pending in seen:
        assert not set(visible) & set(pending)
        assert [*visible, *pending] == [f"c{i:04d}" for i in range(len(visible) + len(pending))]


def test_where_near_rows_have_near_scores_the_best_parent_finds_the_target_sooner(table):
    everything = np.arange(len(table.rows))
    greedy, even = (search_replay.mean_evaluations(table, everything, s, Acquisition(), 100, [1]) for s in ("greedy", None))
    assert greedy < 0.85 * even


def test_reliability_separates_the_rows_from_their_seeds(table):
    found = search_replay.reliability(table)
    assert found["failed"] == 1
    assert found["seed_error"] == pytest.approx(1.0)  # seeds +-1: variance 2, of a mean of two 1
    assert found["correlation_by_distance"][1] > found["correlation_by_distance"][4]


def test_tuning_and_reporting_halves_share_the_baseline_only(table):
    a, b = table.half(np.random.default_rng(0))
    assert set(a) & set(b) == {0}
    assert set(a) | set(b) == set(range(len(table.rows)))


def test_the_report_names_every_strategy(table):
    result = search_replay.replay(table, splits=2, replays=2, tuning=1, progress=False)
    text = search_replay.markdown(result)
    assert all(name in text for name in (*search_replay.STRATEGIES, "poise, tuned"))
    assert [r["against_random"] for r in result["whole"] if r["strategy"] == "random parents"] == [0.0]
    assert [r["against_poise"] for r in result["halves"] if r["strategy"] == "poise"] == [0.0]
    assert {r["strategy"] for r in result["held_out"]} == set(search_replay.STRATEGIES)


def test_twins_are_one_row_and_their_children_its_children(tmp_path):
    rows = [row(0, (), 10.0), row(1, ["no-std"], 11.0), row(2, ["no-std"], 12.0), row(3, ["no-std", "token-mean"], 13.0, ("c0002",))]
    search_table.write(tmp_path / "t.json", {"config": {}, "rows": [r | {"digest": d} for r, d in zip(rows, "abbc", strict=True)]})
    found = search_replay.Table.read(tmp_path / "t.json").rows
    assert [r["id"] for r in found] == ["c0000", "c0001", "c0003"] and found[2]["parents"] == ["c0001"]


def test_the_held_out_seed_is_the_one_that_the_search_did_not_see():
    """Row 1 leads by seed 0, row 2 by seed 1: held out, each has the other seed's low score. Both are evaluated by then."""
    rows = [row(i, parts, 10.0) for i, parts in enumerate([(), ["no-std"], ["token-mean"], ["clip-higher"]])]
    rows[0]["proposer"], rows[1]["by_seed"], rows[2]["by_seed"] = "seed", {"0": 30.0, "1": 5.0}, {"0": 7.0, "1": 20.0}
    points = search_replay.held_out(search_replay.Table(rows), "greedy", Acquisition(), replays=2)
    assert points.shape == (2, 2, 3)
    np.testing.assert_allclose(points[0], 7.0)  # seed 0 held out: row 2 leads with 20
    np.testing.assert_allclose(points[1], 5.0)


def test_half_tables_overlap_so_more_of_them_do_not_narrow_their_interval():
    mean, (low, high) = search_replay.over_tables([1.0, 3.0] * 50)
    assert (mean, high - low) == (2.0, pytest.approx(2 * 1.96, rel=0.01))  # sd 1
    assert search_replay.over_searches([1.0, 3.0] * 50)[1][1] < 2.25


def test_rows_of_another_machine_are_refused(tmp_path):
    file = tmp_path / "t.json"
    search_table.write(file, {"config": {}, "rows": [row(0, (), 10.0) | {"digest": "a"}, row(1, ["no-std"], 11.0) | {"digest": "b"}]})
    new = row(1, ["token-mean"], 12.0, ("c0001",)) | {"digest": "c"}
    with pytest.raises(PoiseError, match="c0000 in the table, and has other numbers"):
        search_table.append([row(0, (), 10.5) | {"digest": "a"}, new], file)
    with pytest.raises(PoiseError, match="none of the rows is in the table"):
        search_table.append([new], file)
    assert search_table.append([row(0, (), 10.0) | {"digest": "a"}, new], file) == (1, 1)
    assert search_replay.Table.read(file).rows[2] == new | {"id": "c0002"}


def test_a_further_row_computes_what_no_row_does():
    rows = [r | {"digest": search_table.digest(search_table.code(r))} for r in (row(0, (), 10.0) | {"name": "GRPO"}, row(1, ["no-std"], 11.0))]
    found = list(search_table.children(search_replay.Table(rows), 2, seed=0))
    digests = [search_table.digest(text) for _, _, text in found]
    assert len({*digests, *(r["digest"] for r in rows)}) == 4 and all(parent["id"] in ("c0000", "c0001") for parent, _, _ in found)


def test_the_table_in_docs_holds_150_different_offline_candidates():
    rows = json.loads((Path(__file__).resolve().parents[1] / "docs" / "data" / "search_stress.json").read_text())["rows"]
    offline = [r for r in rows if r["proposer"] == "offline"]
    assert len({r["digest"] for r in offline}) == len(offline) == 150 and all(len(r["by_seed"]) == 3 for r in rows)
    for r in (rows[0], rows[5], rows[100]):
        assert search_table.digest(search_table.code(r)) == r["digest"]
