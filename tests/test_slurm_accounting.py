"""What accounting says and what the archive says are the same story. Needs slurmdbd and MariaDB."""
from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from datetime import datetime
from typing import NamedTuple

import pytest
from helpers_slurm import DAEMON_PATH, VirtualCluster, needs_slurm, until, virtual_cluster
from helpers_slurm_campaign import NOOP, attempts, controller, drive, noop, point_at, running

from poise_hpc import archive
from poise_hpc.types import Outcome, Stage

missing = [name for name in ("slurmdbd", "mariadbd", "sacct") if shutil.which(name, path=DAEMON_PATH) is None]
pytestmark = [*needs_slurm, pytest.mark.skipif(bool(missing), reason=f"no accounting here: {', '.join(missing)} not installed")]

KILL_WAIT = 5  # seconds between SIGTERM and SIGKILL: KillWait of the virtual cluster is 3


class Account(NamedTuple):
    """A line of sacct: one start of one job."""

    id: str
    name: str
    state: str
    start: float
    end: float


@pytest.fixture(scope="module")
def cluster() -> Iterator[VirtualCluster]:
    with virtual_cluster(2, "cluster", "--accounting") as running:
        yield running


def accounts(cluster: VirtualCluster, prefix: str) -> list[Account]:
    """Every start of this campaign's jobs, requeued ones included."""
    def seconds(stamp: str) -> float:
        return datetime.fromisoformat(stamp).timestamp() if stamp[0].isdigit() else float("nan")

    text = cluster.run("sacct", "--allocations", "--duplicates", "--noheader", "--parsable2", f"--user={os.getuid()}", "--format=JobID,JobName,State,Start,End")
    lines = [line.split("|") for line in text.splitlines()]
    return [Account(id, name, state.split()[0], seconds(start), seconds(end)) for id, name, state, start, end in lines if name.startswith(prefix)]


def test_accounting_and_the_archive_agree(cluster, tmp_path, monkeypatch):
    """A campaign with a requeue and a cancelled job: each line of sacct belongs to one attempt of the archive and the other way
    round, states fit outcomes, and a job's run time lies between its start and its end."""
    point_at(cluster, monkeypatch, PYTHONPATH=NOOP, OMP_NOOP_STEP_S="0.5")
    driven = controller(noop(tmp_path / "c", search={"candidates": 1, "train_seeds": [0, 1]}, train={"steps": 6}, jobs={"evaluate_by": "seed"}))
    drive(driven, lambda: bool(driven.active) and len([a for a in attempts(driven, Stage.TRAIN) if running(a)]) == 2)
    requeued, cancelled = (a.submitted["job_id"] for a in attempts(driven, Stage.TRAIN))
    cluster.run("scontrol", "requeue", requeued)
    cluster.run("scancel", cancelled)
    drive(driven)

    rows = {row["job_id"]: row for id in ("c0000", "c0001") for row in archive.read(driven.campaign.records / f"{id}.h5").attempts}
    results = {a.submitted["job_id"]: a.result for id in ("c0000", "c0001") for a in driven.campaign.load(id).attempts}
    prepare = {a.submitted["job_id"] for a in driven.home.attempts}
    prefix = driven.cluster.queue.prefix
    assert rows.keys() == results.keys()

    def told() -> bool:  # slurmctld tells the database now and then
        lines = accounts(cluster, prefix)
        return {"RUNNING", "PENDING"}.isdisjoint(a.state for a in lines) and {a.id for a in lines} >= rows.keys() | prepare

    until(told, "accounting does not hear of the end")
    found = accounts(cluster, prefix)
    assert {a.id for a in found} == rows.keys() | prepare
    last = {a.id: a for a in found if a.id in rows}  # the last start of each job
    assert [a.id for a in found if a.state == "REQUEUED"] == [requeued] and len(found) == len(rows) + len(prepare) + 1
    assert rows[cancelled]["outcome"] != Outcome.SUCCEEDED and last[cancelled].state == "CANCELLED"
    assert {last[id].state for id, row in rows.items() if row["outcome"] == Outcome.SUCCEEDED} == {"COMPLETED"}
    assert {row["outcome"] for id, row in rows.items() if id != cancelled} <= {Outcome.SUCCEEDED, Outcome.PREEMPTED}
    for id, result in results.items():
        if "ended" in result:  # the job's own word; Slurm's clock counts whole seconds
            begun = result["ended"] - rows[id]["run_seconds"]
            # A job that is told to stop has an end in accounting from then on, and may take until it is killed.
            assert any(a.start - 1 <= begun and result["ended"] <= a.end + (1 if a.state == "COMPLETED" else KILL_WAIT)
                       for a in found if a.id == id), (id, result, found)
