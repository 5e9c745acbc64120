"""What surrounds a campaign goes wrong, on the virtual cluster: the scheduler is reset, the shared disk is full or read-only,
files show late, a request is refused. Jobs' work is tests/noop/steps.py. At the end every unit is done, once."""
from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_slurm import VirtualCluster, needs_slurm, processes, until, virtual_cluster
from helpers_slurm_campaign import NOOP, SITE, attempts, controller, drive, events, noop, point_at, running

from poise_hpc import controller as loop
from poise_hpc.campaign import Campaign
from poise_hpc.controller import Controller
from poise_hpc.types import Outcome, PoiseError, Stage

pytestmark = needs_slurm
ALONE = {"search": {"candidates": 0, "train_seeds": [0]}}  # the baseline: three jobs


@pytest.fixture
def here(monkeypatch) -> Iterator[VirtualCluster]:
    with virtual_cluster(nodes=1) as cluster:
        point_at(cluster, monkeypatch, PYTHONPATH=NOOP)
        yield cluster


@pytest.fixture
def gate(here, tmp_path, monkeypatch) -> Path:
    """Training waits until this file is there."""
    monkeypatch.setenv("OMP_NOOP_GATE", str(tmp_path / "gate"))
    return tmp_path / "gate"


def training(driven: Controller) -> str:
    """Drive until it trains; the job."""
    drive(driven, lambda: bool(driven.active) and any(running(a) for a in attempts(driven, Stage.TRAIN)))
    return attempts(driven, Stage.TRAIN)[0].submitted["job_id"]


def done_once(driven: Controller) -> None:
    assert [e.outcome for e in driven.archive.entries] == [Outcome.SUCCEEDED]
    succeeded = Counter((a.stage, a.unit) for a in [*driven.home.attempts, *driven.campaign.load("c0000").attempts] if a.outcome is Outcome.SUCCEEDED)
    assert set(succeeded.values()) == {1} and len(succeeded) == 3, events(driven.campaign)


def test_a_scheduler_that_is_reset_gives_a_jobs_id_to_somebody_else(here, gate, tmp_path):
    driven = controller(noop(tmp_path / "c", **ALONE))
    id = training(driven)
    here.kill("slurmctld", signal.SIGKILL)
    shutil.rmtree(here.folder / "state")
    lines = [f"FirstJobId={id}" if line.startswith("FirstJobId=") else line for line in here.conf.read_text().splitlines()]
    here.conf.write_text("\n".join([*lines, ""]))
    assert here.script("start").returncode == 0
    # slurmd refuses a job while a step of the same id is left.
    until(lambda: not any("slurmstepd" in line for line in processes(here.conf)), "the node goes on with a job that nobody knows")
    assert here.sbatch("--partition=main", "--job-name=somebody", "--wrap=sleep 600") == id
    here.wait_for(id, "RUNNING")
    gate.touch()
    drive(driven)
    done_once(driven)
    assert len(attempts(driven, Stage.TRAIN)) == 2  # the reset killed the first
    assert here.state(id) == "RUNNING"


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    disk = tmp_path / "shared disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root and the permission to mount")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_the_shared_disk_takes_nothing_for_a_while(here, gate, small_disk, trouble):
    """Full while a job trains, which fails or ends without a word; read-only when it has written its last (a disk with a file open for
    writing cannot be made so). The controller, started again and again, stops with the system's word."""
    driven = controller(noop(small_disk / "c", **ALONE))
    job = training(driven)
    if trouble == "full":
        with pytest.raises(OSError, match="No space"), open(small_disk / "ballast", "wb", buffering=0) as ballast:
            while True:
                ballast.write(bytes(4096))
    gate.touch()
    if trouble == "read-only":
        until(lambda: subprocess.run(["mount", "-o", "remount,ro", small_disk], capture_output=True).returncode == 0, "a file stays open for writing")
    until(lambda: here.state(job) not in ("RUNNING", "COMPLETING"), "the job goes on")
    words = set()
    for _ in range(3):  # a person, or cron, starts it again and again
        try:
            drive(driven, limit_s=60)
        except OSError as error:
            words.add(error.strerror)
    assert words == {"No space left on device" if trouble == "full" else "Read-only file system"}
    if trouble == "full":
        (small_disk / "ballast").unlink()
    else:
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    driven = controller(Campaign.open(small_disk / "c"))
    drive(driven)
    done_once(driven)


def test_results_that_show_late_are_waited_for(here, tmp_path, monkeypatch):
    """NFS: a file that a node wrote is seen here only after a while, when Slurm has long said that the job is over."""
    late = tmp_path / "late.yaml"
    late.write_text(f"base: {SITE}\nresult_lag_s: 60\npoll_s: 1\n")
    made = noop(tmp_path / "c", **ALONE)
    made.set_site(late)
    driven, see = controller(made), loop.files.read_json

    def stale(path: Path):
        """A result is not there until its job has been missed for three seconds."""
        missed = see(path.with_name("missing.json")) if path.name == "result.json" else {"since": 0}
        return see(path) if missed and time.time() - missed["since"] > 3 else None

    monkeypatch.setattr(loop.files, "read_json", stale)
    drive(driven)
    done_once(driven)
    assert [a.number for a in driven.campaign.load("c0000").attempts] == [1, 1]


def test_a_refused_request_is_said_and_repeated_when_corrected(here, tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(f"base: {SITE}\npartitions: [nowhere]\nstages: {{check: {{time_min: 10}}}}\n")
    made = noop(tmp_path / "c", **ALONE)
    made.set_site(wrong)
    with pytest.raises(PoiseError, match="(?s)sbatch refused poise-c-.*-prepare-prepare-1:.*[Pp]artition.*Correct the site file"):
        drive(controller(made))
    assert here.run("squeue", "--noheader", "--states=all") == ""
    made.set_site(SITE)
    driven = controller(Campaign.open(made.root))
    drive(driven)
    done_once(driven)
    assert [a.result["cause"] for a in driven.home.attempts] == [""] and "prepare never submitted" in events(driven.campaign)
