"""The supervisor: the trusted half of a job. Light (no torch), it outlives whatever the worker does.

It claims the attempt exclusively (a twin exits), starts the worker isolated, keeps the heartbeat, passes stop
signals on, enforces the time limit and the watchdog, and writes `result.json`, which is the truth about the attempt.

One supervisor per rank; rank 0's claims and speaks. The rendezvous address comes from Slurm's variables, or, on one
host, from a port that rank 0 picked and wrote down.
"""
from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import files, inside, isolation
from .types import Outcome

POLL_S = 0.2
LAST_WORDS_S = 20.0  # that the other ranks have for their outcomes when one has failed: their supervisors end them after 10
GRACE_S = 60.0     # between a stop signal and the kill, without a site: one training step and a checkpoint must fit
SAVE = ("prepare", "train", "evaluate")  # kinds of jobs that go on from what they had done
GPUS = "POISE_JOB_GPUS"  # environment of a job on this host: CUDA_VISIBLE_DEVICES of who submitted it, or "all"
STOP = "stop.json"  # in an attempt's folder: a person wants its job to save and end
FILE_GB = 64.0
BEAT, STALE_CACHE_S = ".poise-beat", 24 * 3600.0  # a job's caches on a node, and how long they may go without its heartbeat
FATAL = tuple(-number for number in (signal.SIGSEGV, signal.SIGFPE, signal.SIGABRT, signal.SIGBUS, signal.SIGILL))  # as exit codes


@dataclass(frozen=True)
class Place:
    """This process's place in the job."""

    rank: int
    ranks: int
    local_rank: int
    job_id: str
    restart: int            # how often the scheduler requeued this job
    nodes: tuple[str, ...] = ()  # in the order of ranks, as many on each; empty on the local executor

    def node_of(self, rank: int) -> str:
        return self.nodes[rank * len(self.nodes) // self.ranks]


def place() -> Place:
    """From Slurm's variables (srun, one task per rank), else submitit's local ones, else a single process."""
    env = os.environ
    if "SLURM_PROCID" in env and "SLURM_JOB_ID" in env:
        return Place(int(env["SLURM_PROCID"]), int(env.get("SLURM_NTASKS", "1")), int(env.get("SLURM_LOCALID", "0")),
                     _slurm_id(env), int(env.get("SLURM_RESTART_COUNT", "0")), hosts(env["SLURM_JOB_NODELIST"]))
    return Place(int(env.get("SUBMITIT_LOCAL_GLOBALID", "0")), int(env.get("SUBMITIT_LOCAL_NTASKS", "1")),
                 int(env.get("SUBMITIT_LOCAL_LOCALID", "0")), env.get("SUBMITIT_LOCAL_JOB_ID", f"pid-{os.getpid()}"), 0)


def _slurm_id(env: Any) -> str:
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env["SLURM_JOB_ID"]


def hosts(nodelist: str) -> tuple[str, ...]:
    """Slurm's compressed list, written out: 'gpu[03-05,9]n[1-2],x' -> gpu03n1, gpu03n2, ..., gpu9n2, x."""
    found: list[str] = []
    for word in re.findall(r"(?:[^,\[]|\[[^]]*\])+", nodelist):
        names = [""]
        for plain, numbers in re.findall(r"([^\[]+)|\[([^]]*)\]", word):
            names = [name + part for name in names for part in ([plain] if plain else _numbers(numbers))]
        found += names
    return tuple(found)


def _numbers(ranges: str) -> list[str]:
    """'03-05,9' -> 03, 04, 05, 9."""
    parts = [part.partition("-") for part in ranges.split(",")]
    return [f"{i:0{len(first)}d}" for first, _, last in parts for i in range(int(first), int(last or first) + 1)]


def run_attempt(attempt_dir: str, me: Place | None = None) -> str:
    """Entry point of every job. Returns the outcome (for the log; the truth is result.json)."""
    attempt, me = Path(attempt_dir), me or place()
    job = files.read_json(attempt / "job.json")
    if not (claim(attempt, me) if me.rank == 0 else claimed_by_my_job(attempt, me)):
        return "another job has claimed this attempt"
    if (attempt / "result.json").exists():
        return "this attempt has ended already"
    if (attempt / STOP).exists():
        if me.rank == 0:
            files.create_exclusive(attempt / "result.json", _end(Outcome.PREEMPTED, "cancelled", "a person stopped it before it began")
                                   | {"run_seconds": 0.0, "ranks": me.ranks, "job_id": me.job_id, "restart": me.restart})
        return "a person has stopped this attempt"
    try:
        return Supervisor(job, attempt, me).run()
    except (OSError, subprocess.SubprocessError) as error:  # the machine's: a full disk, an unwritable cache, no such program
        if me.rank == 0:
            files.create_exclusive(attempt / "result.json", _end(Outcome.INFRA_ERROR, "supervisor", str(error)) | {
                "job_id": me.job_id, "restart": me.restart, "host": socket.gethostname(), "ended": time.time()})
        raise


def claim(attempt: Path, me: Place) -> bool:
    """Exclusive per (attempt, restart). A restart of the same job takes over; its predecessor sees that and stops.

    claim-0 says which job the attempt belongs to, also when that job's first start ended before it could claim.
    """
    mine = {**files.process_identity(), "job_id": me.job_id, "restart": me.restart, "time": time.time()}
    if files.create_exclusive(attempt / "claim-0.json", mine) and me.restart == 0:
        return True
    owner = files.read_json(attempt / "claim-0.json")
    return owner["job_id"] == me.job_id and files.create_exclusive(attempt / f"claim-{me.restart}.json", mine)


def claimed_by_my_job(attempt: Path, me: Place, patience_s: float = 120.0) -> bool:
    """Ranks above 0 wait for rank 0's claim (another node may see it late). False: a twin has the attempt."""
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        latest = latest_claim(attempt)
        if latest is not None and (latest["job_id"] != me.job_id or latest["restart"] >= me.restart):
            return latest["job_id"] == me.job_id and latest["restart"] == me.restart
        time.sleep(0.2)
    return False


def latest_claim(attempt: Path) -> dict[str, Any] | None:
    claims = [int(p.stem.rpartition("-")[2]) for p in attempt.glob("claim-*.json")]
    return files.read_json(attempt / f"claim-{max(claims)}.json") if claims else None


class Supervisor:
    def __init__(self, job: dict[str, Any], attempt: Path, me: Place):
        self.job, self.attempt, self.me = job, attempt, me
        self.limits = job["limits"]
        self.started = time.monotonic()  # durations by this node's own count: clocks are set, and differ between nodes and file server
        self.progress_seen, self.progress_at = 0, self.started  # modification time of progress.json, and when it last changed
        self.stop_signal_at: float | None = None
        # The site's warning time, less what Slurm needs. A check has nothing to save, and may hang in candidate code.
        self.grace_s = float(os.environ.get("POISE_JOB_GRACE_S", GRACE_S)) if job.get("kind") in SAVE else 0.0
        self.fenced = False
        # The node's caches of this job; its first rank there looks after them.
        self.cache = os.environ.get("POISE_JOB_CACHE", "") if me.local_rank == 0 else ""
        self.inside = inside.byte()

    def run(self) -> str:
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._on_stop)
        scratch = self.attempt / "tmp"
        scratch.mkdir(exist_ok=True)
        auto = self.limits["isolation"] == "auto"
        prefix = isolation.network_prefix(self.me.ranks) if auto else []
        landlock = auto and isolation.landlock_abi() >= 1
        walls = {"environment": "allow-list", "network": "namespace" if prefix else "open",
                 "files": "landlock" if landlock else "open"}
        writable = [self.attempt, *(Path(p) for p in self.job.get("writable", ())),
                    *(Path(os.environ[name]) for name in ("POISE_JOB_CACHE",) if name in os.environ)]
        for folder in writable:  # Landlock opens what it is to allow
            folder.mkdir(parents=True, exist_ok=True)
        supervisor = os.getpid()

        def before_exec() -> None:
            isolation.die_with_parent(supervisor)
            isolation.limit_resources(self.limits["memory_gb"], FILE_GB)
            if landlock:
                isolation.restrict_writes(writable)

        if self.cache:
            remove_stale_caches(self.cache, time.time())

        env = isolation.environment(with_gpus(os.environ), self.attempt, self._rendezvous() | {
            "OMP_NUM_THREADS": str(self.job["threads"]), "POISE_JOB_NETWORK": walls["network"],
            "POISE_JOB_RESTART": str(self.me.restart), inside.VARIABLE: str(self.inside), **self.job.get("environment", {})})
        with open(self.attempt / (f"log-{self.me.rank}.out" if self.me.rank else "log.out"), "ab") as log:
            worker = subprocess.Popen(
                [*prefix, sys.executable, "-X", "faulthandler", "-m", "poise_hpc.worker", str(self.attempt)], env=env,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, preexec_fn=before_exec, start_new_session=True,
                pass_fds=(self.inside,))
            ended = self._watch(worker)
        if self.cache:
            remove_caches(self.cache)
        if self.me.rank != 0:
            if self._outcome(self.me.rank) is None:
                files.write_json(self.attempt / f"outcome-{self.me.rank}.json",
                                 self._classify_alone(worker.returncode) | {"restart": self.me.restart})
            return "rank ended"
        shutil.rmtree(scratch, ignore_errors=True)
        if not self.fenced and self._mine():
            result = self._classify(worker.returncode, ended) | {
                "run_seconds": round(time.monotonic() - self.started, 3), "ranks": self.me.ranks, "walls": walls,
                "job_id": self.me.job_id, "restart": self.me.restart, "host": socket.gethostname(), "ended": time.time()}
            if result["outcome"] == Outcome.INFRA_ERROR and self.me.nodes:
                result["suspects"] = self._suspects()
            files.create_exclusive(self.attempt / "result.json", result)
            return result["outcome"]
        return "fenced off"

    def _suspects(self) -> list[str]:
        """Nodes that the next attempt had better avoid: those whose ranks say nothing; if all have spoken, that of the first one
        to fail, since the others fail with it in a collective."""
        me, until = self.me, time.monotonic() + LAST_WORDS_S
        while silent := [rank for rank in range(me.ranks) if self._outcome(rank) is None]:
            if time.monotonic() >= until or self.stop_signal_at is not None:  # Slurm is about to kill this one, too
                return sorted({me.node_of(rank) for rank in silent} - {me.nodes[0]}) or [me.nodes[0]]  # this one lives
            time.sleep(POLL_S)
        return [me.node_of(min(range(me.ranks), key=lambda rank: (self.attempt / f"outcome-{rank}.json").stat().st_mtime_ns))]

    def _on_stop(self, number: int, frame: Any) -> None:
        if self.stop_signal_at is None:
            self.stop_signal_at = time.monotonic()

    def _rendezvous(self) -> dict[str, str]:
        me = self.me
        if me.ranks == 1:
            address, port = "127.0.0.1", 0
        elif me.nodes:
            address, port = me.nodes[0], port_of(me)
        else:
            address, port = "127.0.0.1", self._local_port()
        # A lone rank picks its own port inside the worker (0): its network may be a namespace of its own.
        return {"RANK": str(me.rank), "WORLD_SIZE": str(me.ranks), "LOCAL_RANK": str(me.local_rank),
                "MASTER_ADDR": address, "MASTER_PORT": str(port)}

    def _local_port(self) -> int:
        path = self.attempt / f"rendezvous-{self.me.job_id}.json"
        if self.me.rank == 0:
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                files.write_json(path, {"port": s.getsockname()[1]})
        while (data := files.read_json(path)) is None:
            if time.monotonic() - self.started > 120:
                raise TimeoutError(f"rank {self.me.rank} waited 120 s for rank 0 to write {path.name}")
            time.sleep(0.05)
        return data["port"]

    def _watch(self, worker: subprocess.Popen[bytes]) -> str:
        """Wait for the worker's end; says why it was ended from here ("" if it was not)."""
        ended, kill_at, next_beat, passed_on = "", None, 0.0, False
        while worker.poll() is None:
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + self.limits["heartbeat_s"]
                with suppress(OSError):  # a shared disk that is away or full for a moment must not cost the run: the worker reports what it needs
                    if kill_at is None and self._other_rank_failed():
                        kill_at = now + 10.0    # a collective without it never ends; time to write an own outcome
                    self._beat(worker)
                if not ended and now - self.started > self.limits["seconds"]:
                    ended = "time-limit"
                elif not ended and now - self._last_progress() > self.limits["silent_s"]:
                    ended = "silent"
                if ended and kill_at is None:
                    worker.send_signal(signal.SIGUSR2)  # faulthandler: whose code is it in?
                    kill_at = now + 2.0
            if self.stop_signal_at is not None and not passed_on:
                worker.send_signal(signal.SIGUSR1)
                passed_on, kill_at = True, kill_at or now + self.grace_s
            if kill_at is not None and now >= kill_at:
                _kill(worker)
            time.sleep(POLL_S)
        return ended

    def _beat(self, worker: subprocess.Popen[bytes]) -> None:
        """A sign of life; and is somebody else's word in the folder?"""
        if (self.attempt / "result.json").exists() or not self._mine():
            # Rank 0 has ended the job, the controller gave it up for lost, or the scheduler started it elsewhere.
            self.fenced = True
            _kill(worker)
        if (self.attempt / STOP).exists():
            self._on_stop(0, None)
        if self.cache:
            with suppress(OSError):  # the node's own disk
                Path(self.cache, BEAT).touch()
        if self.me.rank == 0 and not self.fenced:
            files.write_json(self.attempt / "heartbeat.json", {"time": time.time(), "restart": self.me.restart}, sync=False)

    def _mine(self) -> bool:
        """Is the attempt still this start's of this job? Its folder may have been given up, and made anew for another one."""
        latest = latest_claim(self.attempt)
        return latest is not None and latest["job_id"] == self.me.job_id and latest["restart"] <= self.me.restart

    def _last_progress(self) -> float:
        """When progress.json last changed, by this node's count. Its own time is the file server's."""
        with suppress(OSError):
            seen = (self.attempt / "progress.json").stat().st_mtime_ns
            if seen != self.progress_seen:
                self.progress_seen, self.progress_at = seen, time.monotonic()
        return self.progress_at

    def _outcome(self, rank: int) -> dict[str, Any] | None:
        outcome = files.read_json(self.attempt / f"outcome-{rank}.json")
        return outcome if outcome is not None and outcome["restart"] == self.me.restart else None

    def _outcomes(self) -> list[dict[str, Any]]:
        return [outcome for rank in range(self.me.ranks) if (outcome := self._outcome(rank)) is not None]

    def _other_rank_failed(self) -> bool:
        return self.me.ranks > 1 and any(
            o["outcome"] in (Outcome.CANDIDATE_ERROR, Outcome.INFRA_ERROR) for o in self._outcomes())

    def _classify(self, code: int, ended: str) -> dict[str, Any]:
        """The job's end. The candidate's error on any rank comes first; then rank 0's word; then any other's."""
        outcomes, own = self._outcomes(), self._outcome(0)
        for outcome in outcomes:
            if outcome["outcome"] == Outcome.CANDIDATE_ERROR:
                return outcome
        if own is not None and own["outcome"] != Outcome.INFRA_ERROR:
            return own
        if outcomes and not ended:
            return outcomes[0]
        if ended:
            where = self._candidate_place()
            seconds = self.limits["seconds" if ended == "time-limit" else "silent_s"]
            if where:
                return _end(Outcome.CANDIDATE_ERROR, "hang", f"no end after {seconds:g} s; it was in\n{where}")
            if ended == "time-limit":
                return _end(Outcome.CANDIDATE_ERROR, "time-limit", f"ran longer than its limit of {seconds:g} s")
            return _end(Outcome.INFRA_ERROR, "silent", f"no progress for {seconds:g} s, outside candidate code")
        if self.stop_signal_at is not None:
            return _end(Outcome.PREEMPTED, "killed-at-stop", "ended by the stop signal before it could save")
        return self._classify_alone(code)

    def _classify_alone(self, code: int) -> dict[str, Any]:
        """A worker that ended without saying why. A fatal signal, or an exit, inside candidate code is the candidate's."""
        cause = f"signal {-code}" if code < 0 else f"exit code {code}"
        if (code in FATAL or code >= 0) and (where := self._candidate_place()):
            return _end(Outcome.CANDIDATE_ERROR, "crashed" if code < 0 else "exited", f"the process ended with {cause}; it was in\n{where}")
        return _end(Outcome.INFRA_ERROR, "worker-died", f"the worker ended with {cause} and left no outcome; "
                    + ("out of memory or killed from outside" if code == -9 else "see log.out"))

    def _candidate_place(self) -> str:
        """Where in candidate code the worker was, as far as can be said; "" if it was not."""
        if frames := self._candidate_frames():
            return frames
        return "a call into it, in code that is not Python's: there is no stack" if inside.was(self.inside) else ""

    def _candidate_frames(self) -> str:
        """Stack frames inside the candidate's package, of the dump that SIGUSR2, a fatal signal or `os._exit` made."""
        if not self.job.get("package"):
            return ""
        package, frames = _as_dumped(os.path.realpath(self.job["package"])), []
        for dump in sorted(self.attempt.glob("stack-*.txt")):
            frames += [line.strip() for line in dump.read_text(errors="replace").splitlines() if package + os.sep in line]
        return "\n".join(frames[:5])


def with_gpus(env: Mapping[str, str]) -> dict[str, str]:
    """On this host a job sees the GPUs that its submitter saw; in Slurm, those that Slurm gives it."""
    shown = env.get(GPUS) if "SLURM_PROCID" not in env else None
    if shown is None:
        return dict(env)
    return {k: v for k, v in env.items() if k != "CUDA_VISIBLE_DEVICES"} | ({} if shown == "all" else {"CUDA_VISIBLE_DEVICES": shown})


def _as_dumped(path: str) -> str:
    """A path as faulthandler writes it: printable ASCII, the rest escaped."""
    def escape(c: int) -> str:
        return chr(c) if 0x20 <= c < 0x7F else f"\\x{c:02x}" if c < 0x100 else f"\\u{c:04x}" if c < 0x10000 else f"\\U{c:08x}"

    return "".join(escape(ord(c)) for c in path)


def _end(outcome: Outcome, cause: str, message: str) -> dict[str, Any]:
    return {"outcome": outcome, "cause": cause, "message": message, "payload": {}}


def _kill(worker: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(worker.pid, signal.SIGKILL)  # its own session: helpers it started go too
    except ProcessLookupError:
        pass


def remove_caches(folder: str) -> None:
    """The job's caches on this node's disk; the folder itself unless it holds something else."""
    if folder:
        for name in isolation.CACHES.values():
            shutil.rmtree(Path(folder, name), ignore_errors=True)
        try:
            Path(folder, BEAT).unlink(missing_ok=True)
            os.rmdir(folder)
        except OSError:
            pass


def remove_stale_caches(folder: str, now: float) -> None:
    """What killed jobs of this user left on this node: folders beside `folder` with a heartbeat that stopped long ago.

    A folder without one is not ours to judge: it may belong to a server of slurm/, or to somebody's own work.
    """
    for beside in os.scandir(Path(folder).parent):
        with suppress(OSError):  # no heartbeat in it, or another job was quicker
            mine = beside.is_dir(follow_symlinks=False) and beside.stat(follow_symlinks=False).st_uid == os.getuid()
            if mine and beside.name != Path(folder).name and now - os.lstat(Path(beside, BEAT)).st_mtime > STALE_CACHE_S:
                remove_caches(beside.path)


def port_of(me: Place) -> int:
    """Where the ranks of a Slurm job meet: the same on all of them, another one after a requeue.

    Below 32768, where Linux takes the ports of outgoing connections from: a busy node's may have any of those.
    """
    return 20000 + hash_text(f"{me.job_id}/{me.restart}") % 12000


def hash_text(text: str) -> int:
    """A stable hash (Python's own differs from process to process)."""
    import hashlib

    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
