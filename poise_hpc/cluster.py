"""Where jobs run. The only home of submitit, which renders and submits; truth is taken from our own files.

An attempt's job is submitted in two phases: `intent.json` (a unique job name) before, `submitted.json` (the id) after.
A controller killed in between finds the job again by that name. A job that was submitted twice all the same is
harmless: the second one cannot claim the attempt and exits.

Executors: `LocalCluster` (submitit's LocalExecutor, processes on this host), `SlurmCluster` (its SlurmExecutor),
`InlineCluster` (no processes, for benchmarks and tests of the controller).
"""
from __future__ import annotations

import getpass
import os
import re
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from . import files, jobs
from . import site as sites
from .site import Site
from .types import Outcome, PoiseError


@dataclass(frozen=True)
class Submitted:
    """A job as the controller remembers it (intent.json and submitted.json of its attempt)."""

    attempt: Path
    name: str               # unique: campaign, candidate, stage, unit, number
    index: int | None       # its place in the job, if that is an array
    job_id: str | None      # None: the controller died between intent and submission
    start: int | None = None  # local executor: start time of process `job_id`


@dataclass(frozen=True)
class Gone:
    """Why a job ended without a result of its own, as the scheduler says."""

    outcome: Outcome
    cause: str
    message: str


News = bool | Gone | None  # queued or running (True), gone (False, or with its cause); None is no news, never a failure


class Cluster(Protocol):
    slots: int      # jobs in flight at most
    poll_s: float   # between two calls of `alive`
    idle_s: float   # between two looks at the attempts' folders, when nothing moved

    def batches(self, wanted: list[Any]) -> list[list[Any]]:
        """How (candidate, unit) pairs are cut into submissions; a batch of several becomes one job array."""

    def submit(self, attempts: Sequence[Path], name: str, stage: str, ranks: int) -> list[dict[str, Any]] | None:
        """Submit `jobs.run_attempt` for each; returns what each submitted.json holds ("job_id" at least). None: the
        scheduler does not take jobs now, and may or may not have taken these."""

    def find(self, job: Submitted) -> dict[str, Any] | None:
        """A job submitted under that name whose id was never written down; None if there is none."""

    def alive(self, submitted: Sequence[Submitted]) -> Mapping[Path, News]:
        """What has become of each job."""

    def cancel(self, submitted: Sequence[Submitted]) -> None: ...


class LocalCluster:
    """Jobs as processes of this host. A job outlives the controller that submitted it."""

    poll_s, idle_s = 1.0, 0.1

    def __init__(self, slots: int):
        self.slots = slots
        self._children: list[Any] = []  # kept only to be reaped: a zombie would look alive to others

    def batches(self, wanted: list[Any]) -> list[list[Any]]:
        return [[one] for one in wanted]

    def submit(self, attempts: Sequence[Path], name: str, stage: str, ranks: int) -> list[dict[str, Any]]:
        import submitit

        (attempt,) = attempts
        executor = submitit.LocalExecutor(folder=_folder(attempt))
        # Limits are ours (jobs.Supervisor): submitit's would end a run without asking whether it is resumable.
        executor.update_parameters(timeout_min=60 * 24 * 30, tasks_per_node=ranks, stderr_to_stdout=True)
        with _without_secrets():
            job = executor.submit(jobs.run_attempt, str(attempt))
        self._children.append(job._process)
        pid = int(job.job_id)
        return [{"job_id": job.job_id, "start": files.process_start(pid), "executor": "local"}]

    def find(self, job: Submitted) -> dict[str, Any] | None:
        wanted = os.fsencode(str(_folder(job.attempt)))
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                try:
                    arguments = Path(entry.path, "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue  # it ended meanwhile, or is not ours
                if wanted in arguments and b"submitit.local._local" in arguments:
                    pid = int(entry.name)
                    return {"job_id": entry.name, "start": files.process_start(pid), "executor": "local"}
        return None

    def alive(self, submitted: Sequence[Submitted]) -> Mapping[Path, News]:
        self._children = [child for child in self._children if child.poll() is None]
        return {job.attempt: self._alive(job) for job in submitted}

    def _alive(self, job: Submitted) -> bool | None:
        claim = jobs.latest_claim(job.attempt)
        if claim is not None:
            return files.same_host_alive(claim)  # the supervisor itself: submitit's launcher may be gone before it
        return job.job_id is not None and files.process_start(int(job.job_id)) == job.start is not None

    def cancel(self, submitted: Sequence[Submitted]) -> None:
        """Ask each job to save and stop (SIGTERM to its supervisor, which passes it on)."""
        for job in submitted:
            claim = jobs.latest_claim(job.attempt)
            pid = claim["pid"] if claim is not None and files.same_host_alive(claim) else None
            if pid is None and job.job_id is not None and files.process_start(int(job.job_id)) == job.start is not None:
                pid = int(job.job_id)
            if pid is not None:
                try:
                    os.kill(pid, signal.SIGTERM)
                except ProcessLookupError:
                    pass


def for_campaign(campaign: Any) -> Cluster:
    """The cluster of the campaign's site file; this host without one."""
    from .jobspec import job_prefix

    path = campaign.root / "site.yaml"
    site = sites.load(path) if path.exists() else Site(scheduler="local")
    if site.scheduler == "local":
        return LocalCluster(campaign.config.jobs.max_parallel)
    return SlurmCluster(site, job_prefix(campaign))


class InlineCluster:
    """Runs a job at once, in this process, with the given function: for benchmarks and tests of the controller."""

    poll_s, idle_s = 0.0, 0.0

    def __init__(self, work: Callable[[Path, dict[str, Any]], dict[str, Any]], slots: int = 8):
        self.slots, self.work = slots, work

    def batches(self, wanted: list[Any]) -> list[list[Any]]:
        return [[one] for one in wanted]

    def submit(self, attempts: Sequence[Path], name: str, stage: str, ranks: int) -> list[dict[str, Any]]:
        (attempt,) = attempts
        result = self.work(attempt, files.read_json(attempt / "job.json"))
        files.create_exclusive(attempt / "result.json", {"run_seconds": 0.0, "ranks": ranks, "host": "inline", **result})
        return [{"job_id": f"inline-{time.monotonic_ns()}", "executor": "inline"}]

    def find(self, job: Submitted) -> dict[str, Any] | None:
        return None

    def alive(self, submitted: Sequence[Submitted]) -> Mapping[Path, News]:
        return {job.attempt: False for job in submitted}

    def cancel(self, submitted: Sequence[Submitted]) -> None:
        pass


# sbatch's words for "not now": the same submission may succeed later. Everything else is a wrong request.
NOT_NOW = re.compile(r"unable to contact slurm controller|socket timed out|temporar|try again|submitjob|MaxSubmit|QOSMax|"
                     r"transport endpoint|connection refused|slurm_persist|timed out", re.IGNORECASE)
# Final states -> (outcome, cause). What is resumed and had got further than before does not count as a failure.
FINAL = {
    "PREEMPTED": (Outcome.PREEMPTED, "preempted"), "TIMEOUT": (Outcome.INFRA_ERROR, "walltime"), "DEADLINE": (Outcome.INFRA_ERROR, "walltime"),
    "NODE_FAIL": (Outcome.INFRA_ERROR, "node-fail"), "BOOT_FAIL": (Outcome.INFRA_ERROR, "node-fail"),
    "OUT_OF_MEMORY": (Outcome.INFRA_ERROR, "out-of-memory"), "CANCELLED": (Outcome.INFRA_ERROR, "cancelled"),
    "FAILED": (Outcome.INFRA_ERROR, "failed"), "COMPLETED": (Outcome.INFRA_ERROR, "no-result"), "REVOKED": (Outcome.INFRA_ERROR, "cancelled")}


class SlurmCluster:
    """Jobs through submitit's SlurmExecutor. It only renders and submits: its own status queries are per job, unbounded,
    and latch transient states as final.

    At most 60 / `site.poll_s` scheduler queries a minute, whatever the number of jobs: one `squeue` for all, and `sacct`
    in its place when jobs have left the queue without a result. A job is gone when it has been missing, or final, for
    `site.result_lag_s`: its result may be on the way through NFS.
    """

    def __init__(self, site: Site, prefix: str, call: Callable[[list[str]], str] | None = None, clock: Callable[[], float] = time.time):
        self.site, self.prefix, self.clock = site, prefix, clock
        self.call = call or scheduler
        self.slots, self.poll_s, self.idle_s = site.max_submit, 1.0, 1.0
        self._calls: deque[float] = deque()                  # times of the last minute's queries
        self._queue: dict[tuple[str, int | None], tuple[str, str, str]] = {}  # (name, index) -> job id, state, reason
        self._queue_time = 0.0                               # of the last good answer; 0: none yet
        self._missing: dict[Path, float] = {}                # attempt -> since when its job is not queued or running
        self._accounted: dict[str, str] = {}                 # job id -> final state, from sacct
        self._not_before, self._patience_s = 0.0, 15.0       # after a refused submission

    # --- submission

    def batches(self, wanted: list[Any]) -> list[list[Any]]:
        """One array per candidate and stage, cut to the site's array size. Nothing while sbatch says "not now"."""
        if self.clock() < self._not_before:
            return []
        groups: dict[tuple[str, str], list[Any]] = {}
        for candidate, unit in wanted:
            groups.setdefault((candidate.id, candidate.stage), []).append((candidate, unit))
        size = self.site.max_array
        return [group[i:i + size] for group in groups.values() for i in range(0, len(group), size)]

    def submit(self, attempts: Sequence[Path], name: str, stage: str, ranks: int) -> list[dict[str, Any]] | None:
        """None: not now. The attempts stay announced; `find` tells whether sbatch created the job all the same."""
        import submitit

        executor = self._executor(attempts[0], name, stage, ranks)
        try:
            with _clean_environment():
                if len(attempts) == 1:
                    submitted = [executor.submit(jobs.run_attempt, str(attempts[0]))]
                else:
                    submitted = executor.map_array(jobs.run_attempt, [str(a) for a in attempts])
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError, OSError) as error:
            text = " ".join(str(error).split())
            if isinstance(error, FileNotFoundError):
                raise PoiseError("sbatch is not on PATH: submit from a login node, or load the site's Slurm module") from None
            if not NOT_NOW.search(text):
                raise PoiseError(f"sbatch refused {name}: {text[-600:]}. Correct the site file; `poise-hpc run --site FILE` takes the new one") from None
            self._not_before = self.clock() + self._patience_s
            self._patience_s = min(2 * self._patience_s, 600.0)
            return None
        self._patience_s = 15.0
        return [{"job_id": job.job_id, "executor": "slurm", "time": self.clock()} for job in submitted]

    def script(self, attempt: Path, name: str, stage: str, ranks: int) -> str:
        """The sbatch text that `submit` would hand over."""
        executor = self._executor(attempt, name, stage, ranks)
        return executor._make_submission_file_text(executor._submitit_command_str, "dry-run")

    def _executor(self, attempt: Path, name: str, stage: str, ranks: int) -> Any:
        import submitit

        try:
            executor = submitit.SlurmExecutor(folder=_folder(attempt), python=sites.python_command(self.site))
        except RuntimeError as error:
            raise PoiseError(f"{error} Slurm's commands are not on PATH: work on a login node, or use a site file with scheduler: local") from None
        executor.update_parameters(job_name=name, **sites.sbatch_parameters(self.site, str(stage), ranks))
        return executor

    # --- what has become of them

    def find(self, job: Submitted) -> dict[str, Any] | None:
        found = self._queue.get((job.name, job.index))
        return {"job_id": found[0], "executor": "slurm", "time": self.clock()} if found else None

    def alive(self, submitted: Sequence[Submitted]) -> Mapping[Path, News]:
        now = self.clock()
        self._ask(submitted, now)
        return {job.attempt: self._news(job, now) for job in submitted}

    def _news(self, job: Submitted, now: float) -> News:
        found = self._queue.get((job.name, job.index))
        # A job id that now carries another name belongs to somebody else: the scheduler was reset.
        if found is not None and found[1] not in FINAL:
            self._missing.pop(job.attempt, None)
            return True
        if not self._queue_time or job.attempt not in self._missing:
            return None
        if now - self._missing[job.attempt] < self.site.result_lag_s:
            return None
        if job.job_id is None and found is None:
            return False
        state = found[1] if found is not None else self._accounted.get(job.job_id or "")
        if state is None:
            return False if self._accounted.get("", "") == "no accounting" else None
        outcome, cause = FINAL.get(state, (Outcome.INFRA_ERROR, state.lower()))
        return Gone(outcome, cause, f"Slurm: job {job.job_id} ended as {state} and left no result")

    def _ask(self, submitted: Sequence[Submitted], now: float) -> None:
        while self._calls and now - self._calls[0] >= 60.0:
            self._calls.popleft()
        if len(self._calls) >= max(1, 60 // self.site.poll_s) or (self._calls and now - self._calls[-1] < self.site.poll_s):
            return
        self._calls.append(now)
        unknown = [job for job in submitted if job.job_id and job.attempt in self._missing and (job.name, job.index) not in self._queue
                   and now - self._missing[job.attempt] >= self.site.result_lag_s and job.job_id not in self._accounted]
        if unknown and "" not in self._accounted:
            self._ask_accounting(unknown)
            return
        try:
            text = self.call(["squeue", "--noheader", "--array", "--states=all", f"--user={getpass.getuser()}", "--format=%i|%T|%r|%j"])
        except SchedulerSilent:
            return  # the scheduler is down or busy: no news
        self._queue_time = now
        self._queue = {}
        for line in text.splitlines():
            id, state, reason, name = line.split("|", 3)
            if name.startswith(self.prefix):
                index = int(id.rpartition("_")[2]) if "_" in id else None
                self._queue[name, index] = (id, state, reason)
        for job in submitted:
            found = self._queue.get((job.name, job.index))
            if found is None or found[1] in FINAL:
                self._missing.setdefault(job.attempt, now)

    def _ask_accounting(self, unknown: Sequence[Submitted]) -> None:
        ids = ",".join(job.job_id or "" for job in unknown)
        try:
            text = self.call(["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,JobName,State", f"--jobs={ids}"])
        except SchedulerSilent as silent:
            if "accounting storage is disabled" in str(silent) or "No such file" in str(silent):
                self._accounted[""] = "no accounting"
            return
        names = {job.job_id: job.name for job in unknown}
        for line in text.splitlines():
            id, name, state = line.split("|", 2)
            if names.get(id) == name and state.split()[0] in FINAL:
                self._accounted[id] = state.split()[0]  # "CANCELLED by 1000"
        for job in unknown:  # not even accounting knows it: purged, or never really there
            self._accounted.setdefault(job.job_id or "", "UNKNOWN")

    def stuck(self, submitted: Sequence[Submitted]) -> dict[Path, str]:
        """Jobs that wait for something that will not come by itself, with Slurm's reason."""
        never = re.compile(r"held|NeverSatisfied|BadConstraints|PartitionTimeLimit|PartitionNodeLimit|InvalidAccount|InvalidQOS", re.IGNORECASE)
        out = {}
        for job in submitted:
            found = self._queue.get((job.name, job.index))
            if found is not None and found[1] == "PENDING" and never.search(found[2]):
                out[job.attempt] = found[2]
        return out

    def cancel(self, submitted: Sequence[Submitted]) -> None:
        """`scancel` of these jobs: SIGTERM, on which a run saves and ends. By id, and only where the name is ours."""
        ids = []
        for job in submitted:
            found = self._queue.get((job.name, job.index))
            if id := (found[0] if found is not None else job.job_id if not self._queue_time else None):
                ids.append(id)
        for i in range(0, len(ids), 500):
            try:
                self.call(["scancel", *ids[i:i + 500]])
            except SchedulerSilent as silent:
                raise PoiseError(f"scancel failed: {silent}. Ask again; nothing else was changed") from None


class SchedulerSilent(Exception):
    """A scheduler command failed or did not answer: no news."""


def scheduler(arguments: list[str], timeout_s: float = 60.0) -> str:
    """Run a Slurm client command."""
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise SchedulerSilent(f"{arguments[0]} did not answer within {timeout_s:g} s") from None
    except FileNotFoundError as error:
        raise SchedulerSilent(str(error)) from None
    if done.returncode:
        raise SchedulerSilent(" ".join(done.stderr.split()) or f"{arguments[0]} ended with exit code {done.returncode}")
    return done.stdout


def _folder(attempt: Path) -> Path:
    return attempt / "submitit"


class _without_secrets:
    """submitit passes the controller's whole environment on; a key must not reach a job, whatever executor it is."""

    def __enter__(self) -> None:
        from .isolation import SECRET

        self.hidden = {k: os.environ.pop(k) for k in list(os.environ) if self.hides(k, SECRET)}

    def hides(self, name: str, secret: tuple[str, ...]) -> bool:
        return any(word in name.upper() for word in secret)

    def __exit__(self, *error: object) -> None:
        os.environ.update(self.hidden)


class _clean_environment(_without_secrets):
    """A controller that is itself a job must not hand its own allocation on: sbatch would mix it into the new job's."""

    def hides(self, name: str, secret: tuple[str, ...]) -> bool:
        inherited = name.startswith(("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_")) and name != "SLURM_CONF"
        return inherited or super().hides(name, secret)
