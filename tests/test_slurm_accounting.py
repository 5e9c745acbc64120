"""What accounting says and what the archive says are the same story. Needs slurmdbd and MariaDB."""
from __future__ import annotations

import os
import pwd
import shutil
import signal
import time
from collections.abc import Iterator
from datetime import datetime
from typing import NamedTuple

import pytest
from helpers_slurm import DAEMON_PATH, VirtualCluster, needs_slurm, until, virtual_cluster
from helpers_slurm_campaign import NOOP, SITE, attempts, controller, drive, events, noop, point_at, running

from poise_hpc import archive
from poise_hpc.types import Outcome, PoiseError, Stage

missing = [name for name in ("slurmdbd", "mariadbd", "sacct") if shutil.which(name, path=DAEMON_PATH) is None]
pytestmark = [*needs_slurm, pytest.mark.skipif(bool(missing), reason=f"no accounting here: {', '.join(missing)} not installed")]


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
    gate = tmp_path / "gate"  # what is requeued and what is cancelled trains for sure
    point_at(cluster, monkeypatch, PYTHONPATH=NOOP, OMP_NOOP_GATE=str(gate))
    driven = controller(noop(tmp_path / "c", search={"candidates": 1, "train_seeds": [0, 1]}, jobs={"evaluate_by": "seed"}))
    drive(driven, lambda: bool(driven.active) and len([a for a in attempts(driven, Stage.TRAIN) if running(a)]) == 2)
    requeued, cancelled = (a.submitted["job_id"] for a in attempts(driven, Stage.TRAIN))
    cluster.run("scontrol", "requeue", requeued)
    cluster.run("scancel", cancelled)
    # Not before they have ended, killed or by their own: else they might train to the end first.
    until(lambda: not {"RUNNING", "COMPLETING"} & {cluster.state(job) for job in (requeued, cancelled)}, "they stay")
    gone = time.time()
    gate.touch()
    drive(driven)

    rows = {row["job_id"]: row for id in ("c0000", "c0001") for row in archive.read(driven.campaign.records / f"{id}.h5").attempts}
    results = {a.submitted["job_id"]: a.result for id in ("c0000", "c0001") for a in driven.campaign.load(id).attempts}
    prepare = {a.submitted["job_id"] for a in driven.home.attempts}
    prefix = driven.cluster.queue.prefix
    starts = len(rows) + len(prepare) + 1  # one job started twice
    assert rows.keys() == results.keys()

    def told() -> bool:  # slurmctld tells the database now and then
        lines = accounts(cluster, prefix)
        return {"RUNNING", "PENDING"}.isdisjoint(a.state for a in lines) and len(lines) >= starts and {a.id for a in lines} >= rows.keys() | prepare

    until(lambda: not cluster.run("squeue", "--noheader"), "a job stays")  # the requeued one starts a second time, perhaps after all is done
    until(told, "accounting does not hear of the end")
    found = accounts(cluster, prefix)
    assert {a.id for a in found} == rows.keys() | prepare
    last = {a.id: a for a in found if a.id in rows}  # the last start of each job
    assert [a.id for a in found if a.state == "REQUEUED"] == [requeued] and len(found) == starts
    assert rows[cancelled]["outcome"] != Outcome.SUCCEEDED and last[cancelled].state == "CANCELLED"
    assert {last[id].state for id, row in rows.items() if row["outcome"] == Outcome.SUCCEEDED} == {"COMPLETED"}
    assert {row["outcome"] for id, row in rows.items() if id != cancelled} <= {Outcome.SUCCEEDED, Outcome.PREEMPTED}
    for id, result in results.items():
        if "ended" in result:  # the job's own word; Slurm's clock counts whole seconds
            begun = result["ended"] - rows[id]["run_seconds"]
            # A job that is told to stop has an end in accounting from then on, and may take until it is killed.
            assert any(a.start - 1 <= begun and result["ended"] <= (a.end + 1 if a.state == "COMPLETED" else gone)
                       for a in found if a.id == id), (id, result, found)


@pytest.fixture(scope="module")
def limits(cluster) -> None:
    """From here on the cluster takes jobs of account `lab` only, and of QOS `small` one at a time, two in the queue."""
    user = pwd.getpwuid(os.getuid()).pw_name
    for words in ("add account lab", "add qos small MaxJobsPerUser=1 MaxSubmitJobsPerUser=2", f"add user {user} account=lab",
                  f"modify user {user} set qos+=small"):
        cluster.run("sacctmgr", "-i", *words.split())
    with cluster.conf.open("a") as conf:
        conf.write("AccountingStorageEnforce=associations,limits,qos\n")
    cluster.kill("slurmctld", signal.SIGTERM)
    assert cluster.script("start", "--accounting").returncode == 0


@pytest.fixture
def enforced(cluster, limits, monkeypatch) -> VirtualCluster:
    point_at(cluster, monkeypatch, PYTHONPATH=NOOP)
    return cluster


def test_limits_of_a_qos_are_waited_out(enforced, tmp_path):
    """Two jobs in the queue at most, and a campaign that wants more: sbatch says no, again and again, and nothing is lost or doubled."""
    made = noop(tmp_path / "c", search={"candidates": 1, "train_seeds": [0, 1, 2]})
    site = tmp_path / "site.yaml"
    site.write_text(f"base: {SITE}\naccount: lab\nqos: small\n")
    made.set_site(site)
    driven = controller(made)
    driven.cluster.clock = faster = lambda: 10 * time.time()  # patience after "not now" is 15 s and more
    driven.cluster.queue.clock = faster
    drive(driven)
    told = events(made)
    assert "the scheduler does not take jobs now" in told
    records = [archive.read(path) for path in sorted(made.records.glob("*.h5"))]
    assert [r.outcome for r in records] == [Outcome.SUCCEEDED] * 2
    assert all(len([a for a in r.attempts if a["stage"] == Stage.TRAIN and a["outcome"] == Outcome.SUCCEEDED]) == 3 for r in records)


@pytest.mark.parametrize(("wrong", "word"), [("account: nobodys", "account"), ("account: lab\nqos: nonesuch", "qos")])
def test_an_account_that_is_not_ours_is_refused_and_corrected(enforced, tmp_path, wrong, word):
    made = noop(tmp_path / "c", search={"candidates": 0})
    for text, error in ((wrong, True), ("account: lab", False)):
        site = tmp_path / "site.yaml"
        site.write_text(f"base: {SITE}\n{text}\n")
        made.set_site(site)
        driven = controller(made)
        if error:
            with pytest.raises(PoiseError, match=f"(?i)sbatch refused.*{word}.*Correct the site file"):
                drive(driven)
        else:
            drive(driven)
    assert archive.read(made.records / "c0000.h5").outcome == Outcome.SUCCEEDED
