"""Campaigns on the virtual cluster. Scheduler, supervisors, claims and signals are real; the jobs' work is tests/noop/steps.py.
Real training: test_slurm_training.py."""
from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from helpers_campaign import campaign as small_campaign
from helpers_campaign import noop_work
from helpers_slurm import REPO, VirtualCluster, needs_slurm, until, virtual_cluster
from helpers_slurm_campaign import NOOP, SITE, attempts, controller, drive, events, noop, point_at, running

from poise_hpc import archive, orders
from poise_hpc.agent.offline import OfflineProposer
from poise_hpc.campaign import Campaign
from poise_hpc.cluster.inline import InlineCluster
from poise_hpc.cluster.slurm import SlurmCluster
from poise_hpc.controller import Controller
from poise_hpc.types import Outcome, Stage

pytestmark = needs_slurm


@pytest.fixture(scope="module")
def cluster() -> Iterator[VirtualCluster]:
    with virtual_cluster(nodes=4) as running:
        yield running


@pytest.fixture
def here(cluster, monkeypatch) -> VirtualCluster:
    """The jobs' work is a no-op."""
    point_at(cluster, monkeypatch, PYTHONPATH=NOOP, OMP_NOOP_STEP_S="0")
    return cluster


# --- arrays


@pytest.fixture
def closed(here) -> Iterator[Callable[[], None]]:
    """Closes the partition of the jobs: what runs goes on, what waits stays."""
    yield lambda: here.run("scontrol", "update", "partitionname=low", "state=down")
    here.run("scontrol", "update", "partitionname=low", "state=up")


def test_training_and_evaluation_are_arrays_and_only_missing_elements_are_repeated(here, closed, tmp_path):
    driven = controller(noop(tmp_path / "my campaign", jobs={"evaluate_by": "element"}, search={"candidates": 0}, evaluate={"at": [1.0]}))
    drive(driven, lambda: len(driven.active) == 1 and len(attempts(driven, Stage.TRAIN)) == 2)
    trained = attempts(driven, Stage.TRAIN)
    assert [a.submitted["job_id"].partition("_")[2] for a in trained] == ["0", "1"]
    until(lambda: all(running(a) for a in trained), "they do not train")
    closed()
    drive(driven, lambda: bool(attempts(driven, Stage.EVALUATE)))
    first = attempts(driven, Stage.EVALUATE)
    assert {a.intent["index"] for a in first} == set(range(len(first))) == set(range(6))  # 2 seeds, and the untrained policy, x 2 benchmarks
    assert len({a.submitted["job_id"].partition("_")[0] for a in first}) == 1
    victim = first[3].submitted["job_id"]
    here.run("scancel", victim)
    until(lambda: victim not in here.run("squeue", "--noheader", "--array", "--format=%i").split(), "it stays")
    here.run("scontrol", "update", "partitionname=low", "state=up")
    drive(driven)
    ends = {(a.unit, a.number): (a.outcome, a.result["cause"]) for a in attempts(driven, Stage.EVALUATE)}
    # An element cancelled while it waits leaves no line in squeue; only accounting, which this cluster has not, tells why.
    assert ends.pop((first[3].unit, 1)) == (Outcome.INFRA_ERROR, "vanished")
    assert ends == {(a.unit, 2 if a is first[3] else 1): (Outcome.SUCCEEDED, "") for a in first}
    assert driven.archive.entries[0].score is not None


def test_a_benchmark_is_spread_over_an_array_and_a_missing_chunk_is_repeated_alone(here, tmp_path):
    """12 chunks of 4 completions: of the untrained policy and of the trained one, of "easy" 8 problems x 1, of "hard" 2 problems x 8."""
    benchmarks = {"easy": {"split": "easy", "problems": 8, "samples": 1, "metrics": {"acc@1": 0.5}},
                  "hard": {"split": "hard", "problems": 2, "samples": 8, "metrics": {"pass@8": 0.5}}}
    one = {"search": {"candidates": 0, "train_seeds": [0]}, "train": {"steps": 2}, "evaluate": {"at": [1.0], "benchmarks": benchmarks, "chunk_completions": 4}}
    few = tmp_path / "few.yaml"  # elements at a time: the last ones wait
    few.write_text(f"base: {SITE}\nmax_parallel: 4\n")
    made = noop(tmp_path / "c", **one, jobs={"evaluate_by": "chunk"})
    made.set_site(few)
    driven = controller(made)
    drive(driven, lambda: len(driven.active) == 1 and bool(attempts(driven, Stage.EVALUATE)))
    first = attempts(driven, Stage.EVALUATE)
    array = first[0].submitted["job_id"].partition("_")[0]
    assert {a.submitted["job_id"] for a in first} == {f"{array}_{i}" for i in range(12)}
    missing = next(a for a in first if a.unit == "s0@1@hard@2")
    here.run("scancel", missing.submitted["job_id"])
    drive(driven)
    ends = {(a.unit, a.number): a.outcome for a in attempts(driven, Stage.EVALUATE)}
    assert ends.pop((missing.unit, 1)) is Outcome.INFRA_ERROR
    assert ends == {(a.unit, 2 if a is missing else 1): Outcome.SUCCEEDED for a in first}
    whole = small_campaign(tmp_path / "whole", **one)
    drive(Controller(whole, InlineCluster(noop_work), OfflineProposer()))
    assert evaluation(driven.campaign) == evaluation(whole)
    left = {path.name for path in missing.folder.with_name("evaluate-s0@1@hard@2-2").iterdir()}  # of an archived candidate's attempt: few
    assert left == {"job.json", "intent.json", "submitted.json", "claim-0.json", "result.json", "log.out", "elements"}


def evaluation(campaign: Campaign) -> dict:
    """What the baseline's record says of its evaluation."""
    entry = archive.read(campaign.records / "c0000.h5")
    return {"score": entry.score, "rows": entry.evaluations.tobytes(), "tokens": entry.completion_tokens.tolist(), "ends": entry.completion_offsets.tolist()}


# --- cancel and drain


def test_cancel_takes_this_campaigns_jobs_and_no_others(here, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NOOP_STEP_S", "1")
    mine, other = (controller(noop(tmp_path / name / "same name", train={"steps": 500})) for name in ("a", "b"))
    for driven in (mine, other):
        drive(driven, lambda driven=driven: bool(driven.active) and len([a for a in attempts(driven, Stage.TRAIN) if running(a)]) == 2)
    twin = here.sbatch("--partition=main", f"--job-name={attempts(mine, Stage.TRAIN)[0].intent['name']}", "--wrap=sleep 600")
    here.wait_for(twin, "RUNNING")
    orders.give(mine.campaign, "cancel")
    mine.step()
    until(lambda: len(here.run("squeue", "--noheader", "--array", "--format=%i").split()) == 3, "the cancelled jobs stay")
    left = here.run("squeue", "--noheader", "--array", "--format=%i").split()
    assert set(left) == {twin, *(a.submitted["job_id"] for a in attempts(other, Stage.TRAIN))}
    drive(mine)
    assert [(a.outcome, a.result["cause"]) for a in attempts(mine, Stage.TRAIN)] == [(Outcome.PREEMPTED, "stopped")] * 2
    assert [c.stage for c in mine.held] == [Stage.HELD]


def test_drain_finishes_what_runs(here, tmp_path):
    driven = controller(noop(tmp_path / "c", search={"candidates": 5}))
    drive(driven, lambda: len(driven.active) == 1)
    orders.give(driven.campaign, "drain")
    drive(driven)
    assert [e.id for e in driven.archive.entries] == ["c0000"]


@pytest.mark.slow
def test_a_run_longer_than_the_walltime_saves_at_the_warning_and_goes_on(here, tmp_path, monkeypatch):
    """Slurm's own clock: warned 60 s before 3 minutes are over, or up to a minute earlier; never killed."""
    monkeypatch.setenv("OMP_NOOP_STEP_S", "5")
    made = noop(tmp_path / "c", search={"candidates": 0, "train_seeds": [0]}, train={"steps": 30})
    site = tmp_path / "short.yaml"
    site.write_text(f"base: {SITE}\nsignal_lead_s: 60\nstages: {{train: {{time_min: 3}}}}\n")
    made.set_site(site)
    driven = controller(made)
    drive(driven, limit_s=290)
    first, last = attempts(driven, Stage.TRAIN)
    assert (first.outcome, first.result["cause"]) == (Outcome.PREEMPTED, "stopped") and 50 < first.result["run_seconds"] < 130
    assert last.outcome is Outcome.SUCCEEDED and first.result["run_seconds"] + last.result["run_seconds"] > 150  # nothing done twice
    assert last.result["run_seconds"] < 110


# --- a scheduler that is away, a controller that dies


def test_slurmctld_is_down_while_jobs_are_to_be_submitted(here, tmp_path, monkeypatch):
    """sbatch says so, nothing is lost; back again, every unit is done once."""
    driven = controller(noop(tmp_path / "c", search={"candidates": 0}))
    drive(driven, lambda: driven.home.stage == Stage.ARCHIVED)
    # A step that ends while slurmctld is away reports again only after a minute: the queue would not empty before.
    until(lambda: not here.run("squeue", "--noheader"), "the first job does not leave")
    here.run("scontrol", "shutdown", "slurmctld")
    until(lambda: not (here.folder / "run" / "slurmctld.pid").exists(), "slurmctld stays")
    try:
        drive(driven, lambda: "not submitted" in events(driven.campaign))
        assert driven.cluster._not_before > time.time() and driven.submit() is False
    finally:
        assert here.script("start").returncode == 0
    driven.cluster._not_before = 0.0  # patience is tested with a clock moved by hand
    drive(driven)
    assert [e.outcome for e in driven.archive.entries] == [Outcome.SUCCEEDED]
    assert [(a.number, a.outcome) for a in attempts(driven, Stage.CHECK)] == [(1, Outcome.SUCCEEDED)] and "check never submitted" in events(driven.campaign)


@pytest.mark.parametrize("pickled", [True, False])
def test_a_controller_killed_between_sbatch_and_its_note_adopts_the_job(here, tmp_path, monkeypatch, pickled):
    """`pickled`: submitit has, or has not, completed the job's folder when the controller dies."""
    import submitit

    first, gate = controller(noop(tmp_path / "c", search={"candidates": 0, "train_seeds": [0]})), tmp_path / "gate"
    monkeypatch.setenv("OMP_NOOP_GATE", str(gate))
    whole = SlurmCluster.submit

    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    def submit(self, folders, name, stage, ranks):
        if stage == Stage.TRAIN and not pickled:
            monkeypatch.setattr(submitit.core.utils.JobPaths, "move_temporary_file", killed)
        answer = whole(self, folders, name, stage, ranks)
        return killed() if stage == Stage.TRAIN else answer

    monkeypatch.setattr(SlurmCluster, "submit", submit)
    with pytest.raises(Killed):
        drive(first, lambda: False)
    monkeypatch.undo()
    for name, value in {"SLURM_CONF": str(here.conf), "PYTHONPATH": NOOP, "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    second = controller(Campaign.open(first.campaign.root))
    drive(second, lambda: "train adopted" in events(second.campaign))
    gate.touch()
    drive(second)
    assert [a.result["cause"] for a in attempts(second, Stage.TRAIN)] == [""]  # submitit would have waited a minute for what did not come
    assert [e.outcome for e in second.archive.entries] == [Outcome.SUCCEEDED]


def test_a_chain_of_steps_drives_a_campaign_with_no_login_process(here, tmp_path):
    """It creates the campaign, too."""
    (tmp_path / "my config.yaml").write_bytes((noop(tmp_path / "another", search={"candidates": 1, "train_seeds": [0]}).root / "config.yaml").read_bytes())
    env = here.env | {"PYTHONPATH": NOOP, "POISE_STEP_MIN": "0", "POISE_HOST_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "POISE_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([str(REPO / "slurm" / "submit.sh"), str(SITE), "controller-step.sbatch", "my campaign", "--config", "my config.yaml"], env=env,
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    until(lambda: not here.run("squeue", "--noheader", "--format=%i"), "the chain does not end", seconds=240)
    assert sorted(path.name for path in (tmp_path / "my campaign" / "records").iterdir()) == ["c0000.h5", "c0001.h5"], next(tmp_path.glob("*.out")).read_text()


# --- everything at once


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_chaos(tmp_path):
    done = subprocess.run([sys.executable, str(REPO / "scripts" / "slurm_chaos.py"), "--candidates", "4", "--instants", "6", "--seed", "3", "--limit-s", "400",
                           "--json", "--keep", str(tmp_path)], capture_output=True, text=True)
    verdict = json.loads(done.stdout)
    assert {key: verdict[key] for key in ("lost", "doubled", "orphaned", "different")} == dict.fromkeys(("lost", "doubled", "orphaned", "different"), []), done.stderr
    assert sum(verdict["disturbances"].values()) >= 6
