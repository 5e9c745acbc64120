"""Screening: what a rung says, and that it changes no number of those that pass, whatever is killed or ends first."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers_archive import screened as ended
from helpers_campaign import campaign, noop_work
from helpers_drive import Mortal, ShuffledCluster, archive_of, drive, failing, no_power_cut, write_package

from poise_hpc import config as configuration
from poise_hpc import derived, files, jobspec, orders, screening, views
from poise_hpc.agent import evidence, llm_reflect
from poise_hpc.agent.base import Facts
from poise_hpc.campaign import Attempt, Campaign, Candidate
from poise_hpc.cluster.inline import InlineCluster
from poise_hpc.config import Rung
from poise_hpc.report import page as report
from poise_hpc.types import Outcome, Proposal, Stage, UsageError

# All six see the baseline only, so that what is proposed does not depend on who is screened out.
SEARCH = {"candidates": 6, "window": 8, "train_seeds": [0, 1, 2]}
EVALUATE = {"at": [0.25, 0.5, 1.0]}
RUNGS = [{"at": 0.25, "rule": "below_start", "margin": 10.0}, {"at": 0.5, "seeds": 2, "rule": "behind", "confidence": 0.5}]
NEW = {"config", "screenings"}  # of an entry: what screening adds to it


def screened(root, rungs=RUNGS, **more):
    return campaign(root, search=SEARCH, evaluate=EVALUATE, screen={"rungs": rungs}, **more).root


def numbers(entry):
    return {k: v for k, v in entry.items() if k not in NEW}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same campaign without screening."""
    root = screened(tmp_path_factory.mktemp("whole") / "c", rungs=[])
    drive(root)
    return archive_of(root)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    root = screened(tmp_path_factory.mktemp("undisturbed") / "c")
    drive(root)
    return archive_of(root)


# --- what a rung says

@pytest.mark.parametrize(("rung", "ours", "passed"), [
    # Against the untrained policy, 12 points, by the mean: 11 is below it, and not below 12 - 2.
    (Rung(at=0.25), {"0": 11.0}, False), (Rung(at=0.25, margin=2.0), {"0": 11.0}, True), (Rung(at=0.25), {"0": 12.0}, True),
    # Against the baseline, 20 and 22: differences -4 and -6, mean -5.
    (Rung(at=0.5, seeds=2, rule="behind", confidence=0.5, margin=4.0), {"0": 16.0, "1": 16.0}, False),
    (Rung(at=0.5, seeds=2, rule="behind", confidence=0.5, margin=6.0), {"0": 16.0, "1": 16.0}, True),
    # Their standard error is 1 (sd 1.41 / root 2), t of one degree of freedom is 3.08 at 90 %: the bound is -1.9.
    (Rung(at=0.5, seeds=2, rule="behind", confidence=0.9), {"0": 16.0, "1": 16.0}, False),
    (Rung(at=0.5, seeds=2, rule="behind", confidence=0.9, margin=2.0), {"0": 16.0, "1": 16.0}, True),
])
def test_rules(rung, ours, passed):
    baseline = {s: {"0": 20.0, "1": 22.0}[s] for s in ours}
    found = screening.judge(rung, ours, baseline, start=12.0)
    assert found.passed is passed and found.delta == sum(ours[s] - baseline[s] for s in ours) / len(ours)
    assert f"at {100 * rung.at:g} % of the training" in screening.text(found)


@pytest.mark.parametrize(("rungs", "message"), [
    ([{"at": 0.3}], "0.3 is no point of evaluate.at before the last"), ([{"at": 1.0}], "1 is no point"),
    ([{"at": 0.25, "seeds": 4}], "4 seeds, but search.train_seeds has 3"), ([{"at": 0.5}, {"at": 0.25}], "may fall"),
    ([{"at": 0.25, "rule": "behind"}], "one seed gives no interval"), ([{"at": 0.25, "marginn": 1.0}], "did you mean 'screen.rungs.0.margin'")])
def test_rungs_that_cannot_be_are_refused_by_name(rungs, message):
    with pytest.raises(UsageError, match=message):
        configuration.parse({"search": {"train_seeds": [0, 1, 2]}, "screen": {"rungs": rungs}})


def test_a_rung_at_the_last_step_is_none():
    with pytest.raises(UsageError, match="0.75 of 2 training steps is all of them"):
        configuration.parse({"train": {"steps": 2}, "evaluate": {"at": [0.75, 1.0]}, "screen": {"rungs": [{"at": 0.75}]}})


# --- a campaign

def test_who_passes_has_the_numbers_of_a_run_without_screening(whole, undisturbed):
    ended = {id: e for id, e in undisturbed.items() if e["outcome"] == Outcome.SCREENED_OUT}
    assert {e["cause"] for e in ended.values()} == {"below-start", "behind"} and len(ended) < 6  # both rules, and survivors
    for id in undisturbed.keys() - ended.keys():
        assert numbers(undisturbed[id]) == numbers(whole[id])
        assert [s["passed"] for s in undisturbed[id]["screenings"]] == ([] if id == "c0000" else [True, True])
    for id, e in ended.items():
        assert e["score"] is None and e["reflection"]["verdict"] == "screened" and not e["screenings"][-1]["passed"]
        reached = e["screenings"][-1]
        assert e["seeds"] == tuple(range(1 if reached["at"] == "0.25" else 2)) and e["message"] in e["reflection"]["text"]
        assert {n: e[n] for n in ("name", "parents", "proposal", "code")} == {n: whole[id][n] for n in ("name", "parents", "proposal", "code")}


def test_a_lone_candidate_is_read_again_after_its_rung(whole, tmp_path):
    root = campaign(tmp_path / "c", search=SEARCH | {"candidates": 1}, evaluate=EVALUATE, screen={"rungs": [{"at": 0.25, "margin": 100.0}]}).root
    drive(root)
    assert {id: numbers(e) for id, e in archive_of(root).items()} == {id: numbers(whole[id]) for id in ("c0000", "c0001")}


@pytest.mark.parametrize(("evaluate_by", "seed"), [("train", 0), ("train", 1), ("seed", 0), ("seed", 1), ("element", 0), ("element", 1), ("chunk", 0)])
def test_neither_the_order_nor_who_evaluates_changes_anything(undisturbed, tmp_path, evaluate_by, seed):
    root = screened(tmp_path / "c", jobs={"evaluate_by": evaluate_by})
    drive(root, ShuffledCluster(seed, slots=3))
    assert {id: numbers(e) for id, e in archive_of(root).items()} == {id: numbers(e) for id, e in undisturbed.items()}


def test_jobs_of_the_stages(undisturbed, tmp_path):
    """Rung 1 trains seed 0, rung 2 seed 0 and 1, then all three train to the end: each from its predecessors."""
    root = screened(tmp_path / "c")
    drive(root)
    passed = next(id for id, e in undisturbed.items() if [s["passed"] for s in e["screenings"]] == [True, True])
    attempts = root / "candidates" / passed / "attempts"
    assert sorted(p.name for p in attempts.glob("train-*")) == [
        "train-s0-1", "train-s0@0.25-1", "train-s0@0.5-1", "train-s1-1", "train-s1@0.5-1", "train-s2-1"]
    jobs = {p.name: files.read_json(p / "job.json") for p in attempts.glob("train-*")}
    assert {n: [p.rpartition("/")[2] for p in j["resume"]] for n, j in jobs.items()} == {
        "train-s0@0.25-1": [], "train-s0@0.5-1": ["train-s0@0.25-1"], "train-s0-1": ["train-s0@0.25-1", "train-s0@0.5-1"],
        "train-s1@0.5-1": [], "train-s1-1": ["train-s1@0.5-1"], "train-s2-1": []}
    assert {n: j.get("until") for n, j in jobs.items()}["train-s0@0.5-1"] == "0.5" and "until" not in jobs["train-s0-1"]


def test_the_baseline_and_persons_packages_are_not_screened(tmp_path):
    # Nobody could pass this rung.
    created = campaign(tmp_path / "c", search=SEARCH | {"candidates": 1}, evaluate=EVALUATE,
                       screen={"rungs": [{"at": 0.25, "rule": "behind", "seeds": 2, "confidence": 0.99}, {"at": 0.25, "seeds": 2, "rule": "behind", "confidence": 0.5}]})
    orders.package(created, write_package(tmp_path / "own"), None)
    drive(created.root)
    found = archive_of(created.root)
    assert found["c0000"]["score"] and found["c0001"]["proposer"] == "person" and found["c0001"]["score"]
    assert found["c0000"]["screenings"] == found["c0001"]["screenings"] == [] != found["c0002"]["screenings"]


def test_the_start_policy_is_a_control(undisturbed, tmp_path):
    # One problem of 8 and one of 6 solved: 0.5 x 12.5 + (0.3 + 0.2) x 16.7 points.
    curve = undisturbed["c0000"]["score"]["curve"]
    assert curve["0"] == pytest.approx(0.5 * 100 / 8 + 0.5 * 100 / 6) and undisturbed["c0000"]["score"]["overall"] == pytest.approx(
        sum(v for at, v in curve.items() if at != "0") / 3)
    assert all(s["start"] == curve["0"] for e in undisturbed.values() for s in e["screenings"])


# --- kills, failures, limits

TINY = {"search": {"candidates": 2, "train_seeds": [0, 1]}, "evaluate": {"at": [0.5, 1.0], "benchmarks": {
    "easy": {"split": "easy", "problems": 8, "samples": 2, "metrics": {"acc@1": 1.0}}}},
    "screen": {"rungs": [{"at": 0.5, "rule": "behind", "confidence": 0.5, "margin": 2.0}]}}


def test_killed_at_every_write(tmp_path, monkeypatch):
    """As in test_controller.py, with one candidate that passes and one that does not."""
    no_power_cut(monkeypatch)
    drive(root := campaign(tmp_path / "undisturbed" / "c", **TINY).root)
    wanted = archive_of(root)
    assert {e["outcome"] for id, e in wanted.items() if id != "c0000"} == {Outcome.SUCCEEDED, Outcome.SCREENED_OUT}
    n = 0
    while True:
        root = campaign(tmp_path / f"n{n}" / "c", **TINY).root
        with Mortal(n) as mortal:
            drive(root)
        again = drive(root)
        assert archive_of(root) == wanted and not again.held, f"killed before change {n}"
        if mortal.calls <= n:
            break
        n += 1
    assert n > 100


def test_lost_status_files_are_derived_again(undisturbed, tmp_path):
    root = screened(tmp_path / "c")
    drive(root)
    for path in root.glob("candidates/*/status.json"):
        path.write_bytes(b"")
    for path in root.glob("records/*.h5"):
        path.unlink()
    drive(root)
    assert archive_of(root) == undisturbed


def test_each_rung_has_its_own_retries(undisturbed, tmp_path):
    """Three failures of the rung's job and three of the rest's, at a limit of three: not held."""
    passed = next(id for id, e in undisturbed.items() if [s["passed"] for s in e["screenings"]] == [True, True])
    left = dict.fromkeys([("0.25", 0), ("0.5", 1), (None, 0)], 3)

    def work(attempt, job):
        key = job.get("until"), job["seed"]
        if (job["kind"], job["candidate"]) == ("train", passed) and left.get(key, 0) > 0:
            left[key] -= 1
            return {"outcome": Outcome.INFRA_ERROR, "cause": "node-fail", "message": "", "payload": {}}
        return noop_work(attempt, job)

    root = screened(tmp_path / "c")
    assert not drive(root, InlineCluster(work)).held and not any(left.values())
    assert archive_of(root) == undisturbed


def test_an_error_at_a_rung_is_the_candidates(undisturbed, tmp_path):
    root = screened(tmp_path / "c")
    drive(root, InlineCluster(failing("train", "c0002", Outcome.CANDIDATE_ERROR, "nonfinite-loss")))
    entry = archive_of(root)["c0002"]
    assert (entry["outcome"], entry["cause"], entry["screenings"]) == (Outcome.CANDIDATE_ERROR, "nonfinite-loss", [])


def test_a_seed_has_one_time_limit_over_all_rungs(tmp_path):
    """60 s for the training; the rung took 20 and was preempted once after 15: the rest has 25. Another seed's time is its own."""
    opened = campaign(tmp_path / "c", search=SEARCH, evaluate=EVALUATE, screen={"rungs": RUNGS}, jobs={"train_min": 1.0})
    attempts = [Attempt(tmp_path / f"{n}", Stage.TRAIN, unit, number, {}, None, {"outcome": outcome, "run_seconds": seconds, "payload": {}})
                for n, (unit, number, outcome, seconds) in enumerate([
                    ("s0@0.25", 1, Outcome.PREEMPTED, 15.0), ("s0@0.25", 2, Outcome.SUCCEEDED, 20.0), ("s0@0.5", 1, Outcome.INFRA_ERROR, 50.0),
                    ("s1@0.5", 1, Outcome.SUCCEEDED, 40.0)])]
    candidate = Candidate("c0001", tmp_path, Stage.TRAIN, attempts=attempts)
    earlier = jobspec.before(candidate, Stage.TRAIN, "s0")
    assert [a.name for a in earlier] == ["0", "1", "2"] and jobspec.limits(opened.config, Stage.TRAIN, earlier)["seconds"] == 25.0
    assert [a.name for a in jobspec.before(candidate, Stage.TRAIN, "s0@0.25")] == ["0", "1"]


# --- what persons see

def test_views_say_what_was_screened_out(undisturbed, tmp_path):
    root = screened(tmp_path / "c")
    drive(root)
    opened = Campaign.open(root)
    ended = [id for id, e in undisturbed.items() if e["outcome"] == Outcome.SCREENED_OUT]
    status, board = views.status(opened), views.leaderboard(opened)
    assert status["budget"]["screened_out"] == len(ended) and status["done"]
    assert f"{len(ended)} screened out" in views.status_text(status)
    rows = {r["id"]: r for r in board["rows"]}
    assert [rows[id]["overall"] for id in ended] == [None] * len(ended) and rows[ended[0]]["screened"]["at"] in ("0.25", "0.5")
    assert board["start"] == undisturbed["c0000"]["score"]["curve"]["0"] and f"untrained policy {board['start']:.1f}" in views.leaderboard_text(board)
    assert "screened out at" in views.leaderboard_text(board) and json.dumps(board)
    shown = views.show(opened, ended[0])
    assert undisturbed[ended[0]]["message"] in views.show_text(shown)
    page = Path(report.write(opened, tmp_path / "report.html")["file"]).read_text()
    assert f"failed: 0; screened out: {len(ended)}." in page and "None failed through a fault of its own." in page
    causes = {e["cause"] for e in undisturbed.values() if e["cause"]}
    assert page.count("Screened out at ") >= len(ended) and not any(f"ailed: {cause}" in page for cause in causes)
    shutil.rmtree(opened.candidates / ended[0])  # from its record alone: the same attempts
    assert views.show(opened, ended[0])["attempts"] == shown["attempts"]


def test_a_rerun_trains_to_the_end(undisturbed, tmp_path):
    root = screened(tmp_path / "c")
    drive(root)
    id = next(id for id, e in undisturbed.items() if e["outcome"] == Outcome.SCREENED_OUT)
    again = derived.create("rerun", Campaign.open(root), id, None, None)
    drive(again.root)
    found = archive_of(again.root)["c0000"]
    assert not again.config.screen.rungs and found["seeds"] == (0, 1, 2) and found["score"]
    assert f"rerun of {id}: it had no score; trained to the end it has overall" in derived.report_text(derived.report("rerun", again))


def test_what_a_language_model_is_told():
    found = ended("c0002", -3.0, ("c0000",), ("maxrl",))
    assert "screened out at training fraction 0.5, on 1 of the seeds: Overall 37 there, -3 against GRPO" in evidence.entry_text(found, None, None)
    assert evidence.line(found, None) == "- c0002 c0002-GRPO (from c0000): maxrl; -3 against GRPO at fraction 0.5, screened out; screened"
    facts = Facts("c0002", Proposal("X", (), "", (), "", ""), Outcome.SCREENED_OUT, "behind", screenings=(found.screened,))
    assert evidence.find_figure(facts, "candidate", "delta", None) == -3.0 and evidence.find_figure(facts, "candidate", "final", None) is None
    assert llm_reflect.outcome_text(facts).startswith("behind: screened out at training fraction 0.5")
    told = evidence.recipe(configuration.parse({"screen": {"rungs": [{"at": 0.25, "margin": 2.0}]}}))
    assert "at 0.25 of the training a candidate goes no further if its Overall, over 1 seed(s), is below the untrained policy's - 2" in told
