"""What Slurm says about a campaign's jobs: one `squeue` for all of them, `sacct` for those that have left the queue
without a result. At most 60 / `poll_s` queries a minute (and two in the first round of a new process), however many
jobs there are. Slurm's words for states stop here.

No answer is no news. What two rounds must agree on is kept in the attempt's folder (`missing.json`), so that a
controller that lives for one step only, from cron, comes to the same conclusions as one that stays.
"""
from __future__ import annotations

import os
import re
import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import files
from .types import Outcome


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


@dataclass(frozen=True)
class Seen:
    """A line of squeue. `id` is "123", or "123_4" for an array's element."""

    id: str
    state: str
    reason: str
    name: str

    @property
    def index(self) -> int | None:
        return int(self.id.rpartition("_")[2]) if "_" in self.id else None

    @property
    def launch_failed(self) -> bool:
        """Requeued and held after a node could not start it: Slurm never tries again by itself."""
        return self.state == "LAUNCH_FAILED" or self.waits and LAUNCH_FAILED.search(self.reason) is not None

    @property
    def waits(self) -> bool:
        """In the queue without a node, perhaps held there."""
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")

    @property
    def over(self) -> bool:
        return self.state in FINAL or self.launch_failed


class SchedulerSilent(Exception):
    """A scheduler command failed or did not answer: no news."""


# Final states -> (outcome, cause). What is resumed and had got further than before does not count as a failure.
FINAL = {
    "PREEMPTED": (Outcome.PREEMPTED, "preempted"), "TIMEOUT": (Outcome.INFRA_ERROR, "walltime"), "DEADLINE": (Outcome.INFRA_ERROR, "walltime"),
    "NODE_FAIL": (Outcome.INFRA_ERROR, "node-fail"), "BOOT_FAIL": (Outcome.INFRA_ERROR, "node-fail"),
    "OUT_OF_MEMORY": (Outcome.INFRA_ERROR, "out-of-memory"), "CANCELLED": (Outcome.INFRA_ERROR, "cancelled"),
    "FAILED": (Outcome.INFRA_ERROR, "failed"), "COMPLETED": (Outcome.INFRA_ERROR, "no-result"), "REVOKED": (Outcome.INFRA_ERROR, "cancelled")}
LAUNCH_FAILED = re.compile(r"launch.failed.requeued.held", re.IGNORECASE)
# Reasons for which a job waits until somebody does something about it.
STUCK = re.compile(r"held|NeverSatisfied|BadConstraints|PartitionTimeLimit|PartitionNodeLimit|PartitionDown|PartitionInactive|"
                   r"InvalidAccount|InvalidQOS|AccountNotAllowed|QOSNotAllowed", re.IGNORECASE)
NO_ACCOUNTING = re.compile(r"accounting storage is disabled|No such file", re.IGNORECASE)
ACCOUNTING_PATIENCE_S = 600.0  # sacct only explains: squeue has said already that the job is gone


class Queue:
    def __init__(self, prefix: str, poll_s: float, lag_s: float, call: Callable[[list[str]], str], clock: Callable[[], float],
                 tell: Callable[[Submitted, str], None] = lambda job, reason: None):
        self.prefix, self.poll_s, self.lag_s, self.call, self.clock, self.tell = prefix, poll_s, lag_s, call, clock, tell
        self._calls: deque[float] = deque()         # times of the last minute's queries
        self._jobs: dict[str, Seen] = {}            # id -> this campaign's jobs, at the last answer
        self._missing: dict[Path, float] = {}       # attempt -> since when its job is not queued or running
        self._states: dict[str, str] = {}           # job id -> final state, from sacct; "": it knows none
        self._explained_last = False                # the last query was an `sacct`
        self.silence = ""                           # why the last squeue gave no answer
        self._told: set[tuple[Path, str]] = set()

    def find(self, job: Submitted) -> Seen | None:
        """Its line at the last answer. A known id that carries another name is somebody else's job: ids were reset."""
        if job.job_id is not None:
            seen = self._jobs.get(job.job_id)
            return seen if seen is not None and seen.name == job.name else None
        return next((s for s in self._jobs.values() if (s.name, s.index) == (job.name, job.index)), None)

    def news(self, job: Submitted) -> News:
        seen, now = self.find(job), self.clock()
        if seen is not None and not seen.over:
            return True
        since = self._missing.get(job.attempt)
        if since is None or now - since < self.lag_s:
            return None  # its result may be on the way through NFS; a node failure is followed by a requeue
        if seen is not None and seen.launch_failed:
            return Gone(Outcome.INFRA_ERROR, "launch-failed", f"Slurm: job {seen.id} could not be launched: {seen.reason}")
        if seen is not None:
            return ended(job, seen.id, seen.state)
        if job.job_id is None:
            del self._missing[job.attempt]  # its folder's name is free again
            return False
        state = self._states.get(job.job_id)
        if state:
            return ended(job, job.job_id, state)
        return False if state == "" or now - since >= self.lag_s + ACCOUNTING_PATIENCE_S else None

    def ask(self, jobs: Sequence[Submitted], soon: bool = False) -> bool:
        """Ask, if it is time to; `soon`: unless a minute's questions are used up. True: squeue has answered now."""
        now = self.clock()
        while self._calls and not 0 <= now - self._calls[0] < 60.0:  # below 0: the clock was set back
            self._calls.popleft()
        if self._calls and ((now - self._calls[-1] < self.poll_s and not soon) or len(self._calls) >= self._limit):
            return False
        if self._jobs_to_explain(jobs) and not self._explained_last and self._calls:
            self._explain(jobs)
            return False
        first = not self._calls
        answered = self.look(jobs)
        if first and self._jobs_to_explain(jobs):
            self._explain(jobs)
        return answered

    def beside(self, jobs: Sequence[Submitted]) -> list[Seen]:
        """This campaign's jobs at the last answer that have not ended and are none of `jobs`."""
        ours = {seen.id for job in jobs if (seen := self.find(job))}
        return [seen for seen in self._jobs.values() if seen.state not in FINAL and seen.id not in ours]

    @property
    def _limit(self) -> int:
        return max(1, int(60 // self.poll_s))

    def look(self, jobs: Sequence[Submitted]) -> bool:
        """One `squeue`. False: no answer."""
        self._calls.append(self.clock())
        self._explained_last = False
        try:
            text = self.call(["squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", "--format=%i|%T|%r|%j"])
        except SchedulerSilent as silent:
            self.silence = str(silent)
            return False
        self.silence = ""
        lines = [Seen(*line.split("|", 3)) for line in text.splitlines() if line.count("|") >= 3]
        self._jobs = {seen.id: seen for seen in lines if seen.name.startswith(self.prefix)}
        for job in jobs:
            seen = self.find(job)
            if seen is None or seen.over:
                self._miss(job.attempt)
            else:
                self._found(job, seen)
        return True

    def _miss(self, attempt: Path) -> None:
        if attempt not in self._missing:
            path = attempt / "missing.json"
            files.create_exclusive(path, {"since": self.clock()})
            self._missing[attempt] = files.read_json(path)["since"]

    def _found(self, job: Submitted, seen: Seen) -> None:
        if self._missing.pop(job.attempt, None) is not None or (job.attempt / "missing.json").exists():
            (job.attempt / "missing.json").unlink(missing_ok=True)
        if seen.waits and STUCK.search(seen.reason) and (job.attempt, seen.reason) not in self._told:
            self._told.add((job.attempt, seen.reason))
            self.tell(job, f"job {seen.id} waits and will not start by itself: {seen.reason}. `scontrol show job {seen.id}` says more")

    # --- accounting

    def _jobs_to_explain(self, jobs: Sequence[Submitted]) -> list[Submitted]:
        """Out of the queue for long enough, and `sacct` has not been asked about them."""
        now = self.clock()
        return [job for job in jobs if job.job_id is not None and job.job_id not in self._states and job.attempt in self._missing
                and now - self._missing[job.attempt] >= self.lag_s and self.find(job) is None]

    def _explain(self, jobs: Sequence[Submitted]) -> None:
        """One `sacct`. It only says why: while it cannot answer, the jobs get ACCOUNTING_PATIENCE_S more."""
        names = {job.job_id: job.name for job in self._jobs_to_explain(jobs) if job.job_id is not None}
        self._calls.append(self.clock())
        self._explained_last = True
        try:
            text = self.call(["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State,JobName", f"--jobs={','.join(names)}"])
        except SchedulerSilent as silent:
            if not NO_ACCOUNTING.search(str(silent)):
                return
            text = ""
        for line in text.splitlines():
            ids, state, name = line.split("|", 2)
            word = state.split()[0]  # "CANCELLED by 1000"
            self._states |= {id: word for id in elements(ids) if names.get(id) == name and word in FINAL}
        for id in names:  # not even accounting knows: purged, or the scheduler was reset
            self._states.setdefault(id, "")


def ended(job: Submitted, id: str, state: str) -> Gone:
    """What a final state means for an attempt without a result."""
    outcome, cause = FINAL[state]
    adopted = (files.read_json(job.attempt / "submitted.json") or {}).get("adopted", False)
    if adopted and state in ("FAILED", "COMPLETED") and not list(job.attempt.glob("claim-*.json")):
        # submitit completes a job's folder after sbatch: when the controller is killed between the two, the job finds nothing to run.
        return Gone(Outcome.PREEMPTED, "never-started", f"Slurm: job {id} ended as {state}; its submission had been cut short")
    return Gone(outcome, cause, f"Slurm: job {id} ended as {state} and left no result" + last_words(job.attempt))


def last_words(attempt: Path) -> str:
    """The end of what submitit and srun wrote, where our own part of the job never began."""
    if list(attempt.glob("claim-*.json")):
        return ""
    logs = sorted((attempt / "submitit").glob("*log.out"), key=lambda path: path.stat().st_mtime)
    lines = [line.strip() for path in logs for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return f"; its log ends: {' | '.join(lines[-3:])[-500:]}" if lines else ""


def elements(ids: str) -> list[str]:
    """Accounting's job ids one by one: "7_[1-2,5%4]" -> 7_1, 7_2, 7_5. Elements that never started share one line."""
    job, bracket, rest = ids.partition("_[")
    if not bracket:
        return [ids]
    parts = [part.partition("-") for part in rest.rstrip("]").partition("%")[0].split(",")]
    return [f"{job}_{i}" for first, _, last in parts for i in range(int(first), int(last or first) + 1)]


def run(arguments: list[str], timeout_s: float = 60.0) -> str:
    """Run a Slurm client command, without what a person has set for his own: with SQUEUE_PARTITION, say, most jobs would look gone."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SQUEUE_", "SACCT_", "SCANCEL_"))}
    try:
        done = subprocess.run(arguments, env=env, capture_output=True, text=True, errors="replace", timeout=timeout_s, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise SchedulerSilent(f"{arguments[0]} did not answer within {timeout_s:g} s") from None
    except OSError as error:
        raise SchedulerSilent(str(error)) from None
    if done.returncode:
        raise SchedulerSilent(" ".join(done.stderr.split()) or f"{arguments[0]} ended with exit code {done.returncode}")
    return done.stdout
