"""The supervisor with real worker processes: every way a job can end has a result with its cause, and the walls hold."""
from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import helpers_jobs as h
import pytest

from poise_hpc import files, isolation, jobs, worker
from poise_hpc.types import Outcome

NASTY = "it's a \"job\" in\n$HOME %j-ünï-ço∂é"
landlocked = pytest.mark.skipif(isolation.landlock_abi() < 1, reason="this kernel has no Landlock")
namespaces = pytest.mark.skipif(not isolation.network_prefix(1), reason="no user namespaces here")


def start(attempt: Path, **env: str) -> subprocess.Popen:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SUBMITIT_"))}
    path = os.pathsep.join(filter(None, (h.HERE, os.environ.get("PYTHONPATH"))))
    # Under nohup the tests inherit an ignored SIGHUP, which would outlive exec.
    return subprocess.Popen([sys.executable, str(Path(h.HERE) / "helpers_jobs.py"), str(attempt)], stdout=subprocess.PIPE, text=True,
                            env=clean | {"PYTHONPATH": path} | env, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))


def ended(process: subprocess.Popen, attempt: Path) -> dict:
    process.communicate(timeout=120)
    return files.read_json(attempt / "result.json")


def until(true, what: str, seconds: float = 60.0):
    """Wait for a condition of another process; the limit is for a hang, not a measurement."""
    end = time.monotonic() + seconds
    while not (found := true()):
        if time.monotonic() > end:
            pytest.fail(f"after {seconds:g} s: {what}")
        time.sleep(0.05)
    return found


def run(tmp_path: Path, do: str, *arguments, **limits) -> dict:
    attempt = h.write_job(tmp_path / "a", do, *arguments, **limits)
    return ended(start(attempt), attempt)


# --- how a job can end

def test_a_job_in_a_folder_with_a_nasty_name(tmp_path):
    result = run(tmp_path / NASTY, "nothing")
    assert (result["outcome"], result["cause"]) == (Outcome.SUCCEEDED, ""), result
    assert result["payload"]["data_sha256"] == "d" * 64 and result["run_seconds"] > 0
    assert h.said(tmp_path / NASTY / "a") == "fine"
    assert not (tmp_path / NASTY / "a" / "tmp").exists()


@pytest.mark.parametrize(("do", "arguments", "cause", "message"), [
    ("breaks", [], "RuntimeError", "no such luck"),
    ("exits", [7], "worker-died", "exit code 7"),
    ("segfaults", [], "worker-died", "signal 11"),
    ("eats", [5.0], "MemoryError", ""),
])
def test_what_is_not_the_candidates_fault_is_the_infrastructures(tmp_path, do, arguments, cause, message):
    result = run(tmp_path, do, *arguments)
    assert (result["outcome"], result["cause"]) == (Outcome.INFRA_ERROR, cause)
    assert message in result["message"]


def test_memory_below_the_limit_can_be_had(tmp_path):
    assert run(tmp_path, "eats", 0.5)["outcome"] == Outcome.SUCCEEDED


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_file_server_with_another_clock_does_not_look_like_silence(tmp_path, hours):
    """That the file changed counts, by this node's clock; not what the file server dates it."""
    attempt = h.write_job(tmp_path / "a", "nothing")
    supervisor = jobs.Supervisor(files.read_json(attempt / "job.json"), attempt, jobs.place())
    seen = [supervisor._last_progress()]
    for step in (0, 1, 1):
        files.write_json(attempt / "progress.json", {"step": step})
        date = 1e9 + 3600 * hours + step
        os.utime(attempt / "progress.json", (date, date))
        seen.append(supervisor._last_progress())
    assert seen[0] == supervisor.started < seen[1] < seen[2] == seen[3] <= time.monotonic()


def test_the_watchdog_ends_a_silent_job(tmp_path):
    result = run(tmp_path, "hangs", silent_s=1.5)
    assert (result["outcome"], result["cause"]) == (Outcome.INFRA_ERROR, "silent")


def test_the_time_limit_ends_a_busy_job(tmp_path):
    result = run(tmp_path, "ignores_the_stop", seconds=1.5)
    assert (result["outcome"], result["cause"]) == (Outcome.CANDIDATE_ERROR, "time-limit")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stop_signal_lets_the_worker_save(tmp_path, number):
    attempt = h.write_job(tmp_path / "a", "works_until_stopped")
    process = start(attempt)
    until((attempt / "progress.json").exists, "no progress")
    process.send_signal(number)
    result = ended(process, attempt)
    assert (result["outcome"], result["cause"]) == (Outcome.PREEMPTED, "stopped") and "after tick" in result["message"]


def test_a_word_in_the_folder_stops_a_job_without_the_scheduler(tmp_path):
    attempt = h.write_job(tmp_path / "a", "works_until_stopped")
    process = start(attempt)
    until((attempt / "progress.json").exists, "no progress")
    files.create_exclusive(attempt / jobs.STOP, {})
    result = ended(process, attempt)
    assert (result["outcome"], result["cause"]) == (Outcome.PREEMPTED, "stopped")


def test_a_job_that_was_stopped_before_it_began_does_nothing(tmp_path):
    attempt = h.write_job(tmp_path / "a", "nothing")
    files.create_exclusive(attempt / jobs.STOP, {})
    result = ended(start(attempt), attempt)
    assert (result["outcome"], result["cause"], result["run_seconds"]) == (Outcome.PREEMPTED, "cancelled", 0.0)
    assert not (attempt / "log.out").exists()


def test_who_does_not_stop_within_the_sites_warning_is_killed_and_resumable(tmp_path):
    attempt = h.write_job(tmp_path / "a", "ignores_the_stop")
    process = start(attempt, POISE_JOB_GRACE_S="1")
    until((attempt / "progress.json").exists, "no progress")
    process.send_signal(signal.SIGTERM)
    result = ended(process, attempt)
    assert (result["outcome"], result["cause"]) == (Outcome.PREEMPTED, "killed-at-stop")


def test_a_check_that_hangs_ends_as_soon_as_it_is_told_to(tmp_path):
    """It has nothing to save: no warning time, and no verdict on the package."""
    from poise_hpc.algorithms.load import write_seed_package

    package, attempt = tmp_path / "package", h.write_job(tmp_path / "a", "nothing")
    write_seed_package("grpo", package)
    code = (package / "algorithm.py").read_text()
    (package / "algorithm.py").write_text(code.replace("        R, g =", "        while True:\n            pass\n        R, g =", 1))
    assert "while True" in (package / "algorithm.py").read_text()
    files.write_json(attempt / "job.json", files.read_json(attempt / "job.json") | {"kind": "check", "package": str(package)})
    process = start(attempt, POISE_JOB_GRACE_S="1000")
    until(lambda: (attempt / "stack-0.txt").exists(), "no worker")
    process.send_signal(signal.SIGTERM)
    result = ended(process, attempt)
    assert (result["outcome"], result["cause"]) == (Outcome.PREEMPTED, "killed-at-stop")


# --- kills

def test_a_killed_worker_is_an_infrastructure_error(tmp_path):
    attempt = h.write_job(tmp_path / "a", "tells_its_pid", str(tmp_path / "a" / "pid"))
    process = start(attempt)
    os.kill(int(until(lambda: _read(attempt / "pid"), "no pid")), signal.SIGKILL)
    result = ended(process, attempt)
    assert (result["outcome"], result["cause"]) == (Outcome.INFRA_ERROR, "worker-died") and "killed from outside" in result["message"]


def test_the_worker_dies_with_its_supervisor(tmp_path):
    attempt = h.write_job(tmp_path / "a", "tells_its_pid", str(tmp_path / "a" / "pid"))
    process = start(attempt)
    pid = int(until(lambda: _read(attempt / "pid"), "no pid"))
    process.kill()
    process.communicate()
    until(lambda: files.process_start(pid) is None, "the worker lives on")
    assert not (attempt / "result.json").exists()  # the controller will notice


def test_a_job_given_up_for_lost_is_fenced_off(tmp_path):
    """The controller wrote a result in its place: it ends, and its own word does not come into it."""
    attempt = h.write_job(tmp_path / "a", "tells_its_pid", str(tmp_path / "a" / "pid"))
    process = start(attempt)
    pid = int(until(lambda: _read(attempt / "pid"), "no pid"))
    assert files.create_exclusive(attempt / "result.json", {"outcome": "infra_error", "cause": "vanished"})
    assert process.communicate(timeout=60)[0].strip() == "fenced off"
    assert files.process_start(pid) is None
    assert files.read_json(attempt / "result.json")["cause"] == "vanished"


@pytest.mark.parametrize("at_work", [True, False])
def test_a_job_whose_attempt_was_given_up_says_nothing_in_its_successors_name(tmp_path, at_work):
    """The scheduler had forgotten it: the controller has removed the folder, and another job has claimed the one of the same name.
    `at_work`: it notices with a heartbeat; or it ends before the next one."""
    attempt = h.write_job(tmp_path / "a", "works_until_stopped", heartbeat_s=0.05 if at_work else 600.0)
    process = start(attempt)
    until((attempt / "claim-0.json").exists, "no claim")
    until((attempt / "heartbeat.json").exists, "no heartbeat")
    attempt.rename(tmp_path / "given up")
    attempt.mkdir()
    jobs.claim(attempt, place("another"))
    if not at_work:
        process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=60)[0].strip() == "fenced off"
    assert {path.name for path in attempt.iterdir()} <= {"claim-0.json", "heartbeat.json", "progress.json", "outcome-0.json"}


# --- claims

def test_a_twin_cannot_claim(tmp_path):
    attempt = h.write_job(tmp_path / "a", "works_until_stopped")
    first = start(attempt)
    until((attempt / "claim-0.json").exists, "no claim")
    twin = start(attempt)
    assert twin.communicate(timeout=60)[0].strip() == "another job has claimed this attempt"
    first.send_signal(signal.SIGTERM)
    assert ended(first, attempt)["outcome"] == Outcome.PREEMPTED


def test_a_job_that_starts_after_the_end_does_nothing(tmp_path):
    attempt = h.write_job(tmp_path / "a", "nothing")
    files.create_exclusive(attempt / "result.json", {"outcome": "infra_error", "cause": "vanished"})
    assert start(attempt).communicate(timeout=60)[0].strip() == "this attempt has ended already"


def place(job_id: str, restart: int = 0, rank: int = 0) -> jobs.Place:
    return jobs.Place(rank, 2, rank, job_id, restart)


def test_claims_go_by_job_and_restart(tmp_path):
    assert jobs.claim(tmp_path, place("1"))
    assert not jobs.claim(tmp_path, place("1"))             # the same start twice
    assert not jobs.claim(tmp_path, place("2"))             # a twin
    assert jobs.claim(tmp_path, place("1", restart=1))      # requeued
    assert not jobs.claim(tmp_path, place("2", restart=2))  # a requeued twin
    assert jobs.latest_claim(tmp_path)["restart"] == 1


def test_a_job_whose_first_start_never_claimed_still_owns_the_attempt(tmp_path):
    assert jobs.claim(tmp_path, place("1", restart=2))
    assert not jobs.claim(tmp_path, place("2"))
    assert jobs.latest_claim(tmp_path)["restart"] == 2


def test_ranks_of_a_twin_job_do_not_start(tmp_path):
    jobs.claim(tmp_path, place("1"))
    assert jobs.claimed_by_my_job(tmp_path, place("1", rank=1))
    assert not jobs.claimed_by_my_job(tmp_path, place("2", rank=1))
    assert not jobs.claimed_by_my_job(tmp_path, place("1", restart=1, rank=1), patience_s=0.3)  # its rank 0 is not there


# --- nodes

@pytest.mark.parametrize(("nodelist", "expected"), [
    ("n1", ["n1"]), ("gpu[03-05,9],x", ["gpu03", "gpu04", "gpu05", "gpu9", "x"]), ("127.0.1.[1-2]", ["127.0.1.1", "127.0.1.2"]),
    ("r[1-2]n[08-09]-ib,login", ["r1n08-ib", "r1n09-ib", "r2n08-ib", "r2n09-ib", "login"])])
def test_slurms_node_lists(nodelist, expected):
    assert list(jobs.hosts(nodelist)) == expected


@pytest.mark.parametrize(("nodes", "failed", "expected"), [
    (("a", "b"), [0, 1], ["b"]),              # the ranks of b say nothing
    (("a", "b"), [2, 0, 1, 3], ["b"]),        # all have spoken: rank 2 first
    (("a", "b", "c", "d"), [0, 2], ["b", "d"]),
    (("a", "b"), [0, 2, 3], ["a"]),           # a rank beside this one
    (("a",), [0, 1, 2, 3], ["a"])])
def test_which_nodes_are_to_be_avoided(tmp_path, monkeypatch, nodes, failed, expected):
    """Four ranks, two or one or four to a node; those of `failed` have left an outcome, in this order."""
    monkeypatch.setattr(jobs, "LAST_WORDS_S", 0.0)
    for age, rank in enumerate(failed):
        files.write_json(tmp_path / f"outcome-{rank}.json", {"outcome": "infra_error", "restart": 0})
        os.utime(tmp_path / f"outcome-{rank}.json", (1000 + age, 1000 + age))
    assert jobs.Supervisor({"limits": {}}, tmp_path, jobs.Place(0, 4, 0, "1", 0, nodes))._suspects() == expected


# --- walls

def test_no_secret_of_the_environment_reaches_the_worker(tmp_path):
    attempt = h.write_job(tmp_path / "a", "environment")
    secrets = {"OPENAI_API_KEY": "s3cret", "HF_TOKEN": "s3cret", "AWS_SECRET_ACCESS_KEY": "s3cret", "TORCH_PASSWORD": "s3cret",
               "https_proxy": "http://u:s3cret@proxy", "FAVOURITE": "s3cret", "SITE_KEY": "s3cret"}
    secrets |= {"POISE_JOB_VARIABLES": "LIBRARY_PATH SITE_KEY", "LIBRARY_PATH": "/site/lib"}  # what a site file sets
    assert ended(start(attempt, OMP_NUM_THREADS="7", **secrets), attempt)["outcome"] == Outcome.SUCCEEDED
    env = h.said(attempt)
    assert "s3cret" not in str(env)
    assert env["LIBRARY_PATH"] == "/site/lib"
    assert env["OMP_NUM_THREADS"] == "1" and env["HOME"] == env["TMPDIR"] == str(attempt / "tmp") and env["HF_HUB_OFFLINE"] == "1"


@landlocked
def test_the_worker_writes_into_its_own_folders_only(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    result = run(tmp_path, "writes", str(outside), str(tmp_path / "new"), str(tmp_path / "a" / "inside"), "/tmp/poise-must-not-be")
    assert result["walls"]["files"] == "landlock"
    denied = ["PermissionError"] * 3
    missing = ["PermissionError", "FileNotFoundError", "FileNotFoundError"]
    assert h.said(tmp_path / "a") == [*denied, *missing, "done", "done", "done", *missing]
    assert outside.read_text() == "precious"


@namespaces
def test_the_worker_has_no_network(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        result = run(tmp_path, "connects", server.getsockname()[1])
    assert result["walls"]["network"] == "namespace"
    assert h.said(tmp_path / "a") == "ConnectionRefusedError"


@namespaces
@landlocked
def test_the_worker_cannot_read_the_environment_of_others(tmp_path):
    run(tmp_path, "spies", os.getpid())
    assert h.said(tmp_path / "a") == "PermissionError"


def test_walls_can_be_left_out_and_the_record_says_so(tmp_path):
    result = run(tmp_path, "writes", str(tmp_path / "new"), isolation="none")
    assert result["walls"] == {"environment": "allow-list", "network": "open", "files": "open"}
    assert h.said(tmp_path / "a") == ["done"] * 3


# --- the machine refuses

def test_a_missing_cache_folder_is_made_again(tmp_path):
    attempt = h.write_job(tmp_path / "a", "nothing")
    (tmp_path / "cache").rmdir()
    assert ended(start(attempt), attempt)["outcome"] == Outcome.SUCCEEDED


def test_a_cache_that_cannot_be_is_named(tmp_path):
    attempt = h.write_job(tmp_path / "a", "nothing")
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_text("a file in its place")
    result = ended(start(attempt), attempt)
    assert (result["outcome"], result["cause"]) == (Outcome.INFRA_ERROR, "supervisor") and str(tmp_path / "cache") in result["message"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_an_infrastructure_error(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("mount is not permitted here")
    try:
        attempt = h.write_job(disk / "a", "fills", str(disk / "a" / "big"))
        result = ended(start(attempt), attempt)
        assert result is None or (result["outcome"] == Outcome.INFRA_ERROR and "No space left" in result["message"])
        assert result is None or result["cause"] in ("disk-full", "supervisor")  # whoever needs the room first
        assert (attempt / "result.json").exists() or not list(attempt.glob("result*"))  # whole or not at all
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # its worker may be about to die


def test_what_a_library_of_another_language_calls_a_full_disk(tmp_path, monkeypatch):
    class SafetensorError(Exception):  # no OSError, as the real one
        pass

    def saves(job, attempt):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(worker, "work_of_a_test", saves, raising=False)
    monkeypatch.setitem(worker.WORK, "train", "poise_hpc.worker:work_of_a_test")
    result = worker.run({"kind": "train"}, tmp_path)
    assert (result["outcome"], result["cause"]) == (Outcome.INFRA_ERROR, "disk-full") and "os error 28" in result["message"]


def test_a_rendezvous_without_a_network_is_quiet():
    """Its store cannot look up the name of the loopback address in there: no warning in the log of a run that is fine."""
    prefix = isolation.network_prefix(1)
    if not prefix:
        pytest.skip("no network namespaces here")
    code = "from poise_hpc import worker; worker.prepare_network(); import torch.distributed as d; d.init_process_group('gloo'); print('joined')"
    env = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "POISE_JOB_NETWORK": "namespace"}
    done = subprocess.run([*prefix, sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("joined\n", "")


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


# --- caches on a node

def test_caches_that_killed_jobs_left_on_the_node_go_with_the_next_job(tmp_path):
    """Only folders with a heartbeat that stopped a day ago; a running job's, a server's, and what else lies there stay."""
    day, node = time.time() - jobs.STALE_CACHE_S, tmp_path / "node"
    for name, beat in {"dead": day - 100, "alive": day + 1000, "server": None, "dead but used": day - 100}.items():
        (node / name / "triton").mkdir(parents=True)
        (node / name / "triton" / "kernel").write_text("x")
        if beat is not None:
            (node / name / jobs.BEAT).touch()
            os.utime(node / name / jobs.BEAT, (beat, beat))
    (node / "dead but used" / "notes.txt").write_text("a person's")
    (node / "link").symlink_to(node / "dead")
    (node / "a file").touch()
    attempt = h.write_job(tmp_path / "a", "nothing")
    assert ended(start(attempt, POISE_JOB_CACHE=str(node / "mine")), attempt)["outcome"] == Outcome.SUCCEEDED
    assert sorted(p.name for p in node.iterdir()) == ["a file", "alive", "dead but used", "link", "server"]
    assert [p.name for p in (node / "dead but used").iterdir()] == ["notes.txt"]
    assert (node / "alive" / "triton" / "kernel").exists()


def test_a_heartbeat_that_cannot_be_written_does_not_end_the_run(tmp_path):
    """A folder in its place stands for a file server that refuses for a while."""
    attempt = h.write_job(tmp_path / "a", "nothing", heartbeat_s=0.05)
    (attempt / "heartbeat.json" / "x").mkdir(parents=True)
    assert ended(start(attempt), attempt)["outcome"] == Outcome.SUCCEEDED
    assert not list(attempt.glob(".heartbeat.json.*"))


def test_a_running_jobs_cache_has_a_heartbeat_and_a_killed_ones_keeps_it(tmp_path):
    attempt, cache = h.write_job(tmp_path / "a", "hangs"), tmp_path / "node" / "mine"
    process = start(attempt, POISE_JOB_CACHE=str(cache))
    first = until((cache / jobs.BEAT).exists, "no heartbeat") and (cache / jobs.BEAT).stat().st_mtime_ns
    until(lambda: (cache / jobs.BEAT).stat().st_mtime_ns > first, "it beats once only")
    process.kill()
    process.communicate(timeout=60)
    assert (cache / jobs.BEAT).exists()


def test_a_requeued_jobs_own_stale_cache_stays(tmp_path):
    (cache := tmp_path / "node" / "mine").mkdir(parents=True)
    (cache / jobs.BEAT).touch()
    jobs.remove_stale_caches(str(cache), time.time() + 2 * jobs.STALE_CACHE_S)
    assert (cache / jobs.BEAT).exists()


def test_ranks_meet_at_one_port_that_no_outgoing_connection_takes():
    ports = {(id, restart): {jobs.port_of(jobs.Place(rank, 4, rank % 2, str(id), restart, ("n1", "n2"))) for rank in range(4)} for id in range(500) for restart in (0, 1)}
    assert all(len(found) == 1 and 20000 <= min(found) < 32000 for found in ports.values())
    assert sum(ports[id, 0] != ports[id, 1] for id in range(500)) >= 499
