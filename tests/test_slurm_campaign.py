"""Campaigns on the virtual cluster. Scheduler, supervisors, claims and signals are real; where numbers do not matter the
jobs' work is tests/noop/steps.py, elsewhere (slow) it is the tiny config's training over two nodes with two ranks each."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers_campaign import campaign as small_campaign
from helpers_slurm import REPO, VirtualCluster, needs_slurm, until, virtual_cluster

from poise_hpc import config as configuration
from poise_hpc import files, orders
from poise_hpc.agent.offline import OfflineProposer
from poise_hpc.campaign import Campaign
from poise_hpc.cluster import SlurmCluster, for_campaign
from poise_hpc.controller import Controller
from poise_hpc.types import Outcome, Stage

pytestmark = needs_slurm
SITE = REPO / "configs" / "sites" / "virtual.yaml"
NOOP = f"{REPO / 'tests' / 'noop'}:{REPO / 'tests'}"


@pytest.fixture(scope="module")
def cluster() -> Iterator[VirtualCluster]:
    with virtual_cluster(nodes=4) as running:
        yield running


@pytest.fixture
def here(cluster, monkeypatch) -> VirtualCluster:
    """This process talks to the cluster, and its jobs' work is a no-op. Nothing of an earlier test is in the queue."""
    for name in [n for n in os.environ if n.startswith(("SLURM_", "SBATCH_"))]:
        monkeypatch.delenv(name)
    for name, value in {"SLURM_CONF": str(cluster.conf), "PYTHONPATH": NOOP, "OMP_NUM_THREADS": "1", "OMP_NOOP_STEP_S": "0"}.items():
        monkeypatch.setenv(name, value)
    cluster.run("scancel", "--user=" + str(os.getuid()))
    until(lambda: not cluster.run("squeue", "--noheader"), "the queue does not empty")
    return cluster


def noop(folder: Path, **change) -> Campaign:
    made = small_campaign(folder, **configuration.overlay({"search": {"candidates": 1}, "jobs": {"heartbeat_s": 0.5}}, change))
    made.set_site(SITE)
    return made


def controller(campaign: Campaign) -> Controller:
    return Controller(campaign, for_campaign(campaign), OfflineProposer())


def drive(driven: Controller, end: Callable[[], bool] | None = None, limit_s: float = 200.0) -> None:
    begun = time.monotonic()
    while not (end() if end else driven.finished):
        assert time.monotonic() - begun < limit_s, (driven.campaign.root / "events.log").read_text()
        if not driven.step():
            time.sleep(0.2)


def attempts(driven: Controller, stage: Stage, id: str = "c0000") -> list:
    return [a for a in driven.campaign.load(id).attempts if a.stage == stage]


def running(attempt) -> bool:
    return (attempt.folder / "claim-0.json").exists()


def ranks(attempt, rank: int) -> list[int]:
    """Process ids of submitit in this attempt's job with that rank."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                arguments = (entry / "cmdline").read_bytes().split(b"\0")
                if f"SLURM_PROCID={rank}".encode() in (entry / "environ").read_bytes().split(b"\0") and b"submitit.core._submit" in arguments \
                        and str(attempt.folder / "submitit").encode() in arguments:
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def kill_rank(attempt, rank: int) -> None:
    for pid in ranks(attempt, rank):
        os.kill(pid, signal.SIGKILL)


def events(campaign: Campaign) -> str:
    return (campaign.root / "events.log").read_text()


# --- arrays


def test_training_and_evaluation_are_arrays_and_only_missing_elements_are_repeated(here, tmp_path):
    crowded = tmp_path / "crowded.yaml"  # one element at a time: the fourth still waits
    crowded.write_text(f"base: {SITE}\nmax_parallel: 1\n")
    made = noop(tmp_path / "my campaign", jobs={"evaluate_by": "element"}, search={"candidates": 0})
    made.set_site(crowded)
    driven = controller(made)
    drive(driven, lambda: len(driven.active) == 1 and bool(attempts(driven, Stage.EVALUATE)))
    first = attempts(driven, Stage.EVALUATE)
    assert len(first) == 8 and {a.intent["index"] for a in first} == set(range(8))  # 2 seeds x 2 points x 2 benchmarks
    assert len({a.submitted["job_id"].partition("_")[0] for a in first}) == 1
    victim = first[3].submitted["job_id"]
    here.run("scancel", victim)
    until(lambda: victim not in here.run("squeue", "--noheader", "--array", "--format=%i").split(), "it stays")
    drive(driven)
    ends = {(a.unit, a.number): (a.outcome, a.result["cause"]) for a in attempts(driven, Stage.EVALUATE)}
    # An element cancelled while it waits leaves no line in squeue; only accounting, which this cluster has not, tells why.
    assert ends.pop((first[3].unit, 1)) == (Outcome.INFRA_ERROR, "vanished")
    assert ends == {(a.unit, 2 if a is first[3] else 1): (Outcome.SUCCEEDED, "") for a in first}
    assert driven.archive.entries[0].score is not None
    trained = attempts(driven, Stage.TRAIN)
    assert [a.submitted["job_id"].partition("_")[2] for a in trained] == ["0", "1"]


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


# --- a scheduler that is away, a controller that dies


def test_slurmctld_is_down_while_jobs_are_to_be_submitted(here, tmp_path, monkeypatch):
    """sbatch says so, nothing is lost; back again, every unit is done once."""
    driven = controller(noop(tmp_path / "c", search={"candidates": 0}))
    drive(driven, lambda: driven.home.stage == Stage.ARCHIVED)
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
    ends = [a.result["cause"] for a in attempts(driven, Stage.CHECK)]
    assert ends == ["never-submitted", ""]


@pytest.mark.parametrize("pickled", [True, False])
def test_a_controller_killed_between_sbatch_and_its_note_adopts_the_job(here, tmp_path, monkeypatch, pickled):
    """`pickled`: submitit has, or has not, completed the job's folder when the controller dies."""
    import submitit

    first = controller(noop(tmp_path / "c", search={"candidates": 0, "train_seeds": [0]}, train={"steps": 4}))
    monkeypatch.setenv("OMP_NOOP_STEP_S", "1")
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
    for name, value in {"SLURM_CONF": str(here.conf), "PYTHONPATH": NOOP, "OMP_NUM_THREADS": "1", "OMP_NOOP_STEP_S": "1"}.items():
        monkeypatch.setenv(name, value)
    second = controller(Campaign.open(first.campaign.root))
    drive(second)
    assert "train adopted" in events(second.campaign)
    assert [a.result["cause"] for a in attempts(second, Stage.TRAIN)] == [""]  # submitit would have waited a minute for what did not come
    assert [e.outcome for e in second.archive.entries] == [Outcome.SUCCEEDED]


def test_a_chain_of_steps_drives_a_campaign_with_no_login_process(here, tmp_path):
    made = noop(tmp_path / "my campaign", search={"candidates": 1})
    env = here.env | {"PYTHONPATH": NOOP, "POISE_STEP_MIN": "0", "POISE_HOST_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(REPO / "slurm" / "submit.sh"), str(SITE), "controller-step.sbatch", str(made.root)], env=env, cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    until(lambda: not here.run("squeue", "--noheader", "--format=%i"), "the chain does not end", seconds=240)
    assert sorted(path.name for path in made.records.iterdir()) == ["c0000.h5", "c0001.h5"], next(tmp_path.glob("*.out")).read_text()


# --- real training over two nodes


TINY = {"train": {"steps": 12, "checkpoint_every": 2}, "search": {"candidates": 0, "train_seeds": [0]}, "jobs": {"ranks": 4}}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def tiny(folder: Path, cache: Path) -> Controller:
    config = configuration.parse(configuration.overlay(configuration.read(REPO / "configs" / "tiny.yaml"), TINY))
    made = Campaign.create(folder, config, cache_dir=str(cache))
    made.set_site(SITE)
    return controller(made)


@pytest.fixture
def real(here, monkeypatch) -> VirtualCluster:
    monkeypatch.delenv("PYTHONPATH")
    return here


@pytest.fixture(scope="module")
def undisturbed(cluster, cache, tmp_path_factory) -> str:
    """Hash of the weights of a run that nothing happened to."""
    patch = pytest.MonkeyPatch()
    patch.setenv("SLURM_CONF", str(cluster.conf))
    patch.setenv("OMP_NUM_THREADS", "1")
    driven = tiny(tmp_path_factory.mktemp("u") / "undisturbed", cache)
    drive(driven, limit_s=280)
    patch.undo()
    (attempt,) = attempts(driven, Stage.TRAIN)
    assert attempt.result["ranks"] == 4
    return attempt.result["payload"]["weights_sha256"]


def until_step(driven: Controller, step: int):
    """The running training attempt, once it has saved that many steps."""
    def reached() -> bool:
        found = attempts(driven, Stage.TRAIN) if driven.active else []
        return bool(found) and any(int(p.name[5:]) >= step for p in (found[-1].folder / "checkpoints").glob("step-*"))

    drive(driven, reached)
    return attempts(driven, Stage.TRAIN)[-1]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_requeued_run_ends_with_the_undisturbed_weights(real, tmp_path, cache, undisturbed):
    """scontrol requeue kills without asking: the same attempt starts again and goes on from its own checkpoint."""
    driven = tiny(tmp_path / "c", cache)
    attempt = until_step(driven, 2)
    real.run("scontrol", "requeue", attempt.submitted["job_id"])
    drive(driven, limit_s=280)
    trained = attempts(driven, Stage.TRAIN)
    assert trained[-1].result["payload"]["weights_sha256"] == undisturbed
    if len(trained) == 1:  # it had no time to save and end within KillWait
        assert trained[0].result["restart"] == 1 and (trained[0].folder / "claim-1.json").exists()
    assert "resumed from" in (trained[-1].folder / "log.out").read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_warned_run_is_resubmitted_and_goes_on_over_another_number_of_nodes(real, tmp_path, cache, undisturbed):
    driven = tiny(tmp_path / "c", cache)
    attempt = until_step(driven, 2)
    real.run("scancel", "--signal=USR2", attempt.submitted["job_id"])  # what Slurm sends before the walltime and at preemption
    wide = tmp_path / "wide.yaml"
    wide.write_text(f"base: {SITE}\nnodes: 4\nranks_per_node: 1\n")
    driven.campaign.set_site(wide)
    driven.cluster = for_campaign(driven.campaign)
    drive(driven, limit_s=280)
    first, second = attempts(driven, Stage.TRAIN)
    assert (first.outcome, first.result["cause"]) == (Outcome.PREEMPTED, "stopped")
    assert second.result["payload"]["weights_sha256"] == undisturbed
    assert "resumed from" in (second.folder / "log.out").read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_dead_rank_ends_the_job(real, tmp_path, cache, undisturbed):
    """Its supervisor and worker are gone at once, as with a lost node: the others must not wait for the time-out of a collective."""
    driven = tiny(tmp_path / "c", cache)
    attempt = until_step(driven, 2)
    kill_rank(attempt, 3)
    until(lambda: real.state(attempt.submitted["job_id"]) not in ("RUNNING", "COMPLETING"), "the job goes on without a rank", seconds=60)
    drive(driven, limit_s=280)
    trained = attempts(driven, Stage.TRAIN)
    assert len(trained) == 2 and trained[0].outcome is not Outcome.SUCCEEDED
    assert trained[1].result["payload"]["weights_sha256"] == undisturbed


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_stand_alone_training_and_evaluation(real, tmp_path, cache):
    config = tmp_path / "tiny.yaml"
    config.write_text(f"base: {REPO / 'configs' / 'tiny.yaml'}\ntrain: {{steps: 30, checkpoint_every: 100}}\n")
    out = tmp_path / "out put"

    def submit(wrapper: str, *arguments: str) -> str:
        env = real.env | {"POISE_HOST_PYTHON": sys.executable, "POISE_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([str(REPO / "slurm" / "submit.sh"), str(SITE), wrapper, *arguments, "--config", str(config)], env=env, cwd=tmp_path,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[-1]

    job = submit("train.sbatch", "grpo", "--out", str(out), "--seed", "5")
    until(lambda: any(len(p.read_bytes().splitlines()) > 2 for p in out.glob("attempts/train-*/curves.jsonl")), "it does not train", seconds=120)
    real.run("scancel", "--signal=USR1", "--batch", job)
    until((out / "train.json").exists, "it does not go on", seconds=200)
    real.wait_for(job, "COMPLETED")
    first, second = sorted(out.glob("attempts/train-s5-*"))
    assert files.read_json(first / "result.json")["outcome"] == "preempted"
    assert "resumed from" in (second / "log.out").read_text() and len((second / "curves.jsonl").read_text().splitlines()) == 30
    weights = json.loads((out / "train.json").read_text())["weights"]["1"]
    job = submit("evaluate.sbatch", weights, "--out", str(tmp_path / "scores"))
    real.wait_for(job, "COMPLETED")
    assert set(json.loads((tmp_path / "scores" / "scores.json").read_text())["benchmarks"]) == {"easy/acc@1", "hard/acc@1", "hard/pass@4"}


# --- everything at once


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(600)
def test_chaos(tmp_path):
    done = subprocess.run([sys.executable, str(REPO / "scripts" / "slurm_chaos.py"), "--candidates", "4", "--instants", "6", "--seed", "3", "--limit-s", "400",
                           "--json", "--keep", str(tmp_path)], capture_output=True, text=True)
    verdict = json.loads(done.stdout)
    assert {key: verdict[key] for key in ("lost", "doubled", "orphaned", "different")} == dict.fromkeys(("lost", "doubled", "orphaned", "different"), []), done.stderr
    assert sum(verdict["disturbances"].values()) >= 6


@pytest.mark.slow
def test_the_doctor_looks_from_two_nodes(real, tmp_path):
    done = subprocess.run([sys.executable, "-m", "poise_hpc.cli", "doctor", "--site", str(SITE), "--config", str(REPO / "configs" / "tiny.yaml"),
                           "--folder", str(tmp_path), "--json"], env=real.env, capture_output=True, text=True)
    said = {f["name"]: f for f in json.loads(done.stdout)["findings"]}
    assert done.returncode == 0 and {"all-reduce", "exclusive creation", "hdf5", "versions"} <= {n for n, f in said.items() if f["level"] == "ok"}, said
    assert not list(tmp_path.iterdir())  # nothing left
    bad = tmp_path / "bad.yaml"
    bad.write_text("partitions: [nowhere]\n")
    done = subprocess.run([sys.executable, "-m", "poise_hpc.cli", "doctor", "--site", str(bad), "--folder", str(tmp_path)], env=real.env, capture_output=True, text=True)
    assert done.returncode == 1 and "there is no nowhere; there are high, low, main" in done.stdout
