"""Real training on the virtual cluster, over two nodes with two ranks each: whatever happens to a run, its record is the
undisturbed one's, which is also the local executor's. Bit-identical weights, curves and results problem by problem."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from helpers_kill import by_kind, processes_of
from helpers_slurm import REPO, VirtualCluster, needs_slurm, until, virtual_cluster
from helpers_slurm_campaign import SITE, attempts, controller, drive, kill_rank, point_at

from poise_hpc import archive, files
from poise_hpc import config as configuration
from poise_hpc.agent.offline import OfflineProposer
from poise_hpc.campaign import Campaign
from poise_hpc.cluster.base import for_campaign
from poise_hpc.cluster.local import LocalCluster
from poise_hpc.controller import Controller
from poise_hpc.settings import overlay, read
from poise_hpc.types import Outcome, Stage

pytestmark = [*needs_slurm, pytest.mark.timeout(1200)]
BENCHMARKS = {"hard": {"split": "hard", "problems": 4, "samples": 8, "metrics": {"acc@1": 0.5, "pass@4": 0.5}}}
TINY = {"train": {"steps": 12, "checkpoint_every": 2}, "evaluate": {"chunk_completions": 16, "benchmarks": BENCHMARKS},
        "search": {"candidates": 0, "train_seeds": [0]}, "jobs": {"ranks": 4}}


@pytest.fixture(scope="module")
def cluster() -> Iterator[VirtualCluster]:
    with virtual_cluster(nodes=4) as running:
        yield running


@pytest.fixture
def real(cluster, monkeypatch) -> Iterator[VirtualCluster]:
    point_at(cluster, monkeypatch)
    yield cluster
    assert cluster.script("start").returncode == 0  # what a test took away
    for node in range(1, 5):  # refused for a node that needs none
        subprocess.run(["scontrol", "update", f"nodename=127.0.1.{node}", "state=resume"], env=cluster.env, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def tiny(folder: Path, cache: Path, **change: Any) -> Campaign:
    config = overlay(overlay(read(REPO / "configs" / "tiny.yaml"), TINY), change)
    made = Campaign.create(folder, configuration.parse(config), cache_dir=str(cache))
    made.set_site(SITE)
    return made


def facts(driven: Controller) -> dict[str, Any]:
    """What must not depend on how the baseline's run went."""
    entry = archive.read(driven.campaign.records / "c0000.h5")
    return {"hashes": entry.hashes, "curves": entry.curve_values.tolist(), "score": entry.score, "seeds": entry.seeds, "outcome": entry.outcome,
            "evaluations": sorted(row.tobytes() for row in entry.evaluations[["seed", "at", "benchmark", "problem", "n", "correct", "valid", "truncated"]]),
            "completions": entry.completion_tokens.tobytes(), "ends": entry.completion_offsets.tobytes()}


@pytest.fixture(scope="module")
def undisturbed(cluster, cache, tmp_path_factory) -> dict[str, Any]:
    """Facts of a run that nothing happened to; its snapshots are evaluated by an array of jobs."""
    with pytest.MonkeyPatch.context() as patch:
        point_at(cluster, patch)
        driven = controller(tiny(tmp_path_factory.mktemp("u") / "undisturbed", cache, jobs={"evaluate_by": "chunk"}))
        drive(driven, limit_s=500)
    (trained,), evaluated = attempts(driven, Stage.TRAIN), attempts(driven, Stage.EVALUATE)
    assert trained.result["ranks"] == 4
    assert sorted(a.submitted["job_id"].partition("_")[2] for a in evaluated) == [str(i) for i in range(6)]  # the untrained policy and 2 points, 2 chunks each
    return facts(driven)


def until_step(driven: Controller, step: int) -> Any:
    """The running training attempt, once it has saved that many steps."""
    def reached() -> bool:
        found = attempts(driven, Stage.TRAIN) if driven.active else []
        return bool(found) and any(int(p.name[5:]) >= step for p in (found[-1].folder / "checkpoints").glob("step-*"))

    drive(driven, reached, limit_s=500)
    return attempts(driven, Stage.TRAIN)[-1]


@contextmanager
def frozen(attempt: Any) -> Iterator[None]:
    """Its ranks do not move until they are asked to stop, or killed: what happens meanwhile comes in the middle of the training, however
    fast this machine is."""
    workers = by_kind(processes_of(attempt.folder))["worker"]
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    yield
    until(lambda: all(disturbed(pid) for pid in workers), "nobody asks the ranks to stop")
    for pid in workers:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def disturbed(pid: int) -> bool:
    """Is USR1 pending, or has it been woken up, or ended?"""
    try:
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except (FileNotFoundError, ProcessLookupError):
        return True
    return not status["State"].startswith("T") or bool(int(status["ShdPnd"], 16) >> signal.SIGUSR1 - 1 & 1)


def nodes_of(cluster: VirtualCluster, job: str) -> list[str]:
    return cluster.run("scontrol", "show", "hostnames", cluster.run("squeue", "--noheader", f"--jobs={job}", "--format=%N")).split()


def lose(cluster: VirtualCluster, node: str) -> None:
    """What a power cut does: the node's daemon, its steps and everything in them are gone, and nobody has been told."""
    cluster.kill(f"slurmd.{node}", signal.SIGKILL)
    tasks, steps = [], set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                env = (entry / "environ").read_bytes().split(b"\0")
                if f"SLURM_CONF={cluster.conf}".encode() in env and f"SLURMD_NODENAME={node}".encode() in env:
                    tasks.append(int(entry.name))
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    if Path(f"/proc/{parent}/comm").read_text().startswith("slurmstepd"):
                        steps.add(parent)
            except OSError:
                continue
    for pid in [*steps, *tasks]:  # the steps first: they would report
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def test_the_local_executor_leads_to_the_same_record(undisturbed, tmp_path, cache):
    """Same seed and world size: equal problem by problem, though here the training job evaluates its own snapshots."""
    made = tiny(tmp_path / "c", cache)
    driven = Controller(made, LocalCluster(2), OfflineProposer())
    drive(driven, limit_s=500)
    assert facts(driven) == undisturbed


def test_a_requeued_and_then_preempted_run_leads_to_the_same_record(real, tmp_path, cache, undisturbed):
    """scontrol requeue kills without asking: the same attempt starts again and goes on from its own checkpoint. Then a job of higher
    priority takes its nodes: it is warned, saves and ends within the grace time, and goes on over another number of nodes."""
    driven = controller(tiny(tmp_path / "c", cache))
    first = until_step(driven, 2)
    with frozen(first):
        real.run("scontrol", "requeue", first.submitted["job_id"])
    preempted = until_step(driven, 8)
    if preempted.name == first.name:  # it had no time to save and end within KillWait
        assert (first.folder / "claim-1.json").exists()
    assert "resumed from" in (preempted.folder / "log.out").read_text()
    with frozen(preempted):
        nodes = nodes_of(real, preempted.submitted["job_id"])
        real.sbatch("--partition=high", f"--nodelist={','.join(nodes)}", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=8", "--output=/dev/null",
                    "--wrap=true")
    wide = tmp_path / "wide.yaml"
    wide.write_text(f"base: {SITE}\nnodes: 4\nranks_per_node: 1\n")
    driven.campaign.set_site(wide)
    driven.cluster = for_campaign(driven.campaign)
    drive(driven, limit_s=500)
    assert facts(driven) == undisturbed
    *_, before, last = attempts(driven, Stage.TRAIN)
    assert before.name == preempted.name and (before.outcome, before.result["cause"]) == (Outcome.PREEMPTED, "stopped")
    assert before.result["restart"] == (preempted.name == first.name)
    assert "resumed from" in (last.folder / "log.out").read_text()


@pytest.mark.slow
def test_one_dead_rank_ends_the_job(real, tmp_path, cache, undisturbed):
    """Its supervisor and worker are gone at once: the others must not wait for the time-out of a collective."""
    driven = controller(tiny(tmp_path / "c", cache))
    attempt = until_step(driven, 2)
    kill_rank(attempt, 3)
    until(lambda: real.state(attempt.submitted["job_id"]) not in ("RUNNING", "COMPLETING"), "the job goes on without a rank", seconds=60)
    drive(driven, limit_s=500)
    assert facts(driven) == undisturbed
    trained = attempts(driven, Stage.TRAIN)
    assert len(trained) == 2 and trained[0].outcome is not Outcome.SUCCEEDED


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_lost_node_leads_to_the_same_record(real, tmp_path, cache, undisturbed, which):
    """The first node holds rank 0, srun and the batch script; the second only ranks. Slurm notices after SlurmdTimeout."""
    driven = controller(tiny(tmp_path / "c", cache))
    attempt = until_step(driven, 2)
    node = nodes_of(real, attempt.submitted["job_id"])[which]
    lose(real, node)
    drive(driven, limit_s=500)
    assert facts(driven) == undisturbed
    trained = attempts(driven, Stage.TRAIN)
    assert len(trained) > 1 or trained[0].result["restart"] == 1  # more than two: srun tried the lost node before Slurm knew
    assert "resumed from" in (trained[-1].folder / "log.out").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("back", [True, False])
def test_a_killed_slurmd_leads_to_the_same_record(real, tmp_path, cache, undisturbed, back):
    """The daemon alone: its steps go on. If it is back in time nothing has happened; if not, Slurm starts the job a second time
    while the first copy still runs, and one of the two must yield."""
    driven = controller(tiny(tmp_path / "c", cache))
    attempt = until_step(driven, 2)
    node = nodes_of(real, attempt.submitted["job_id"])[0]
    real.kill(f"slurmd.{node}", signal.SIGKILL)
    if back:
        assert real.script("start").returncode == 0
    drive(driven, limit_s=500)
    assert facts(driven) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_restarted_slurmctld_leads_to_the_same_record(real, tmp_path, cache, undisturbed, how):
    driven = controller(tiny(tmp_path / "c", cache))
    until_step(driven, 2)
    real.kill("slurmctld", how)
    assert real.script("start").returncode == 0
    drive(driven, limit_s=500)
    assert facts(driven) == undisturbed


@pytest.mark.slow
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
