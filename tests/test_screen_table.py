"""Screening replayed on a table of learning curves, by hand; and the table made from a campaign's records."""
from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers_campaign import campaign
from helpers_drive import archive_of, drive

from poise_hpc.config import Config

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "screen_table.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("screen_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["screen_table"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def row(*curves):
    """One curve a seed: Overall at 25, 50 and 100 %."""
    return {"id": "", "name": "", "run_seconds": 1.0, "points": {at: {str(s): c[i] for s, c in enumerate(curves)} for i, at in enumerate(("0.25", "0.5", "1"))}}


@pytest.fixture(scope="module")
def table(script):
    return script.Table(Config(), 10.0, [
        row((12, 20, 30), (12, 20, 30)),    # the baseline: 20.7
        row((13, 24, 40), (13, 22, 40)),    # the best: 25.3
        row((8, 16, 35), (13, 24, 35)),     # slow with one seed
        row((6, 6, 6), (6, 6, 6))])         # broken


def test_what_a_rung_drops_and_saves(script, table):
    # Below the start policy at 25 % with the first seed: the broken row in both orders, the slow one in one of two.
    passed, spent = table.judged((script.below(0.25),))
    assert passed.tolist() == [[True, False, False], [True, True, False]]
    assert spent.tolist() == [[1, 0.125, 0.125], [1, 1, 0.125]]  # a quarter of one of two seeds
    found = script.figures(passed, spent, table.truth, table.score(table.rows[0]))
    assert found["dropped"] == pytest.approx(50) and found["saved"] == pytest.approx(100 * 3 * 0.875 / 6)
    assert found["better_lost"] == pytest.approx(25) and found["points_lost"] == 0  # the slow row is better than the baseline: 21.8


def test_two_rungs_add_up(script, table):
    # The slow row passes the first rung with seed 1, and the second: (-4 + 4) / 2 is not below 0. With seed 0 it does not.
    passed, spent = table.judged((script.below(0.25), script.behind(0.5, 2, 0.5)))
    assert passed[:, 1].tolist() == [False, True] and spent[1, 2] == 0.125
    passed, spent = table.judged((script.behind(0.5, 1, 0.5), script.behind(0.5, 2, 0.5, 2.0)))
    assert passed.tolist() == [[True, False, False], [True, True, False]] and spent[0, 1] == 0.25


def test_a_promotion_costs_a_start(script, table):
    # Start-up 0.5 of a training: without rungs 2 x 1.5 = 3. One rung for one seed: dropped 0.5 + 0.25, promoted 3 + 0.5.
    slow = script.Table(table.config, table.start, table.rows, startup=0.5)
    assert slow.judged((script.below(0.25),))[1][0] == pytest.approx([3.5 / 3, 0.75 / 3, 0.75 / 3])
    # A second rung at the same point asks one seed more, which starts; the first is there already.
    assert slow.judged((script.behind(0.5, 1, 0.5), script.behind(0.5, 2, 0.5)))[1][0, 0] == pytest.approx(4 / 3)


def test_a_lost_best_is_counted(script, table):
    # The best row is dropped in one of two orders: 25.3 - 21.8 are lost there.
    lost = script.figures(np.array([[True, True, False], [False, True, False]]), np.ones((2, 3)), table.truth, 20.7)
    assert lost["points_lost"] == pytest.approx((table.truth[0] - table.truth[1]) / 2) and lost["better_lost"] == pytest.approx(25)


def test_the_table_has_what_the_records_have(script, tmp_path):
    opened = campaign(tmp_path / "c", search={"candidates": 2, "train_seeds": [0, 1]})
    drive(opened.root)
    data, found = script.export(opened), archive_of(opened.root)
    assert data["start"] == pytest.approx(found["c0000"]["score"]["curve"]["0"], abs=1e-4)
    for r in data["rows"]:
        assert {at: np.mean(list(v.values())) for at, v in r["points"].items()} == pytest.approx(
            {at: v for at, v in found[r["id"]]["score"]["curve"].items() if at != "0"}, abs=1e-4)


def test_a_table_is_made_of_recipes_the_best_and_the_worst_among_them(script, tmp_path):
    from poise_hpc import packages, proposing

    data = SCRIPT.parents[1] / "docs" / "data" / "search_stress.json"
    opened = script.make(tmp_path / "c", data, SCRIPT.parents[1] / "configs" / "tiny_screen.yaml", 3, 2, tmp_path / "cache")
    assert opened.config.search.train_seeds == (0, 1) and not opened.config.screen.rungs
    ids = [folder.name.rpartition("-")[2] for folder in proposing.inbox(opened)]
    assert len(ids) == 3 and {"c0123", "c0139"} < set(ids)  # 33.5 and 0.0 points
    assert "Algorithm" in packages.read_package(proposing.inbox(opened)[0]).files["algorithm.py"]
