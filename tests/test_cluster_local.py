"""Jobs as processes of this host: found again by a restarted controller, noticed when dead, several ranks, odd paths."""
from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import helpers_jobs as h
import pytest
from helpers_kill import by_kind, processes_of
from test_jobs import NASTY, until

from poise_hpc import config as configuration
from poise_hpc import files, jobs, orders
from poise_hpc.agent.offline import OfflineProposer
from poise_hpc.campaign import Campaign
from poise_hpc.cluster.local import LocalCluster
from poise_hpc.controller import Controller
from poise_hpc.scheduler import Submitted
from poise_hpc.types import Outcome, Stage


@pytest.fixture(autouse=True)
def conduct_is_importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (h.HERE, os.environ.get("PYTHONPATH")))))
    monkeypatch.setattr(sys, "path", [h.HERE, *sys.path])


def new(root: Path, do: str, *arguments, **jobs) -> Campaign:
    (root.parent / "cache").mkdir(parents=True, exist_ok=True)
    return Campaign.create(root, configuration.parse(h.config(do, *arguments, **jobs)), cache_dir=str(root.parent / "cache"))


def controller(root: Path) -> Controller:
    return Controller(Campaign.open(root), LocalCluster(2), OfflineProposer())


def steps(driven: Controller, true) -> None:
    """Step until `true`; the limit is for a hang."""
    end = time.monotonic() + 90
    while not true():
        assert time.monotonic() < end, (driven.campaign.root / "events.log").read_text()
        driven.step()
        time.sleep(0.05)


def prepare(driven: Controller, number: int) -> Path:
    return driven.campaign.root / "prepare" / "attempts" / f"prepare-{number}"


def stop(driven: Controller, attempt: Path) -> None:
    supervisor(attempt)
    assert driven.cluster.cancel([driven.submitted(a) for _, a in driven.in_flight()]) == 1
    until(lambda: files.read_json(attempt / "result.json"), "no result after cancel")


def supervisor(attempt: Path) -> int:
    until(lambda: jobs.latest_claim(attempt), "no claim")
    return jobs.latest_claim(attempt)["pid"]


def test_a_restarted_controller_finds_its_running_job(tmp_path):
    """In a folder with a hostile name. Both ways: by the id that was written down, and by the name that was not."""
    root = new(tmp_path / NASTY / "c", "works_until_stopped").root
    first = controller(root)
    first.step()
    attempt = prepare(first, 1)
    pid = supervisor(attempt)
    (attempt / "submitted.json").unlink()  # as if the first had died before writing it
    second = controller(root)
    steps(second, (attempt / "submitted.json").exists)
    assert [a.name for a in second.home.attempts] == ["prepare-1"] and files.process_start(pid)
    third = controller(root)
    third._asked_scheduler = 0.0
    third.step()
    assert len(third.home.attempts) == 1
    stop(third, attempt)
    assert files.read_json(attempt / "result.json")["outcome"] == Outcome.PREEMPTED
    del first


@pytest.mark.parametrize("shown", [None, "", "2,3"])
def test_a_job_of_this_host_sees_the_gpus_of_its_submitter(tmp_path, monkeypatch, shown):
    """Who may sit in an interactive job of Slurm."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in ({} if shown is None else {"CUDA_VISIBLE_DEVICES": shown, "SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_NTASKS": "1",
                                                  "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "gpu7"}).items():
        monkeypatch.setenv(name, value)
    driven = controller(new(tmp_path / "c", "environment").root)
    driven.step()
    attempt = prepare(driven, 1)
    until((attempt / "result.json").exists, "no result")
    (model,) = (tmp_path / "cache" / "models").glob("*/model.safetensors")
    seen = json.loads(model.read_text())
    assert seen.get("CUDA_VISIBLE_DEVICES") == shown and seen["MASTER_ADDR"] == "127.0.0.1" and "SLURM_JOB_ID" not in seen
    assert files.read_json(attempt / "result.json")["job_id"] == files.read_json(attempt / "submitted.json")["job_id"]


@pytest.mark.parametrize("victim", ["supervisor", "launcher and supervisor"])
def test_a_killed_job_is_noticed_and_repeated(tmp_path, victim):
    driven = controller(new(tmp_path / "c", "works_until_stopped").root)
    driven.step()
    attempt = prepare(driven, 1)
    pid, launcher = supervisor(attempt), int(files.read_json(attempt / "submitted.json")["job_id"])
    until((attempt / "progress.json").exists, "no progress")
    assert {kind: len(pids) for kind, pids in by_kind(processes_of(attempt)).items()} == {"launcher": 1, "supervisor": 1, "worker": 1}
    assert by_kind([pid]) == {"supervisor": [pid]} and by_kind([launcher]) == {"launcher": [launcher]}
    if victim != "supervisor":
        os.kill(launcher, signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    steps(driven, lambda: prepare(driven, 2).exists())
    result = files.read_json(attempt / "result.json")
    assert (result["outcome"], result["cause"]) == (Outcome.INFRA_ERROR, "vanished")
    until(lambda: not processes_of(attempt), "it lives on")
    stop(driven, prepare(driven, 2))


def test_ctrl_c_in_the_terminal_is_the_controllers_alone(tmp_path):
    """The terminal sends it to the launcher, too, which would kill the job within a second."""
    driven = controller(new(tmp_path / "c", "works_until_stopped").root)
    driven.step()
    attempt = prepare(driven, 1)
    until((attempt / "progress.json").exists, "no progress")
    (launcher,) = driven.cluster._children
    launcher.send_signal(signal.SIGINT)
    assert orders.tell(driven, [attempt for _, attempt in driven.in_flight()]) == 1
    until(lambda: files.read_json(attempt / "result.json"), "no result")
    result = files.read_json(attempt / "result.json")
    assert (result["outcome"], result["cause"], launcher.wait(60)) == (Outcome.PREEMPTED, "stopped", 0)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_job_that_fails_every_time_is_held(tmp_path):
    driven = controller(new(tmp_path / "c", "breaks", infra_retries=1).root)
    steps(driven, lambda: driven.finished)
    assert [(c.id, c.stage, c.cause, c.message) for c in driven.held] == [("prepare", Stage.HELD, "RuntimeError", "no such luck")]
    assert len(driven.home.attempts) == 2


def test_a_reused_pid_is_not_our_job(tmp_path):
    """The id of a dead job now belongs to somebody else (here: to this test)."""
    cluster, me = LocalCluster(1), os.getpid()
    attempt = tmp_path / "a"
    attempt.mkdir()

    def alive(start):
        return cluster.alive([Submitted(attempt, "n", None, str(me), start)])[attempt]

    assert alive(files.process_start(me)) and not alive(files.process_start(me) - 1) and not alive(None)


def test_a_job_of_another_host_is_judged_by_its_heartbeat(tmp_path):
    """login1 was drained, or renamed; heartbeats are due every 5 s. With a slower one, longer silence is no news."""
    now, told = [1e9], []
    cluster = LocalCluster(1, clock=lambda: now[0], tell=lambda job, reason: told.append(reason))
    job = Submitted(tmp_path, "n", None, "17", 1)
    files.write_json(tmp_path / "job.json", {"limits": {"heartbeat_s": 5.0}})
    files.write_json(tmp_path / "claim-0.json", {"host": "login1", "pid": 17, "start": 1, "restart": 0})
    os.utime(tmp_path / "claim-0.json", (1e9, 1e9))
    for now[0], alive in ((1e9 + 90, True), (1e9 + 110, False)):  # it may have died before its first beat: 20 x 5 s
        assert (cluster.alive([job])[tmp_path] is True) == alive
    files.write_json(tmp_path / "heartbeat.json", {"time": 0.0, "restart": 0})
    os.utime(tmp_path / "heartbeat.json", (1e9 + 50, 1e9 + 50))
    assert cluster.alive([job])[tmp_path] is True
    now[0] = 1e9 + 160
    gone = cluster.alive([job])[tmp_path]
    assert (gone.outcome, gone.cause, gone.message) == (Outcome.INFRA_ERROR, "vanished", "it ran on login1 and has been silent for 110 s")
    files.write_json(tmp_path / "job.json", {"limits": {"heartbeat_s": 0.2}})
    for now[0], alive in ((1e9 + 109, True), (1e9 + 111, False)):  # 60 s at least
        assert (cluster.alive([job])[tmp_path] is True) == alive
    assert len(told) == 1 and "it runs on login1" in told[0]
    assert cluster.cancel([job]) == 0


def test_no_key_reaches_a_job_process(tmp_path, monkeypatch):
    """Not even the launcher's environment, which any process of this user may read."""
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret")
    driven = controller(new(tmp_path / "c", "works_until_stopped").root)
    driven.step()
    attempt = prepare(driven, 1)
    pids = [supervisor(attempt), int(files.read_json(attempt / "submitted.json")["job_id"])]
    assert os.environ["OPENAI_API_KEY"] == "s3cret"
    assert all(b"s3cret" not in Path(f"/proc/{pid}/environ").read_bytes() for pid in pids)
    stop(driven, attempt)
