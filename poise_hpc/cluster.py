"""Where jobs run. The only home of submitit, which renders and submits; truth is taken from our own files.

An attempt's job is submitted in two phases: `intent.json` (a unique job name) before, `submitted.json` (the id) after.
A controller killed in between finds the job again by that name. A job that was submitted twice all the same is
harmless: the second one cannot claim the attempt and exits.

Executors: `LocalCluster` (submitit's LocalExecutor, processes on this host) and `SlurmCluster` (a place kept for it).
"""
from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from . import files, jobs


@dataclass(frozen=True)
class Submitted:
    """A job as the controller remembers it (intent.json and submitted.json of its attempt)."""

    attempt: Path
    name: str               # unique: campaign, candidate, stage, unit, number
    index: int | None       # its place in the job, if that is an array
    job_id: str | None      # None: the controller died between intent and submission
    start: int | None = None  # local executor: start time of process `job_id`


class Cluster(Protocol):
    slots: int  # jobs in flight at most

    def batches(self, wanted: list[Any]) -> list[list[Any]]:
        """How (candidate, unit) pairs are cut into submissions; a batch of several becomes one job array."""

    def submit(self, attempts: Sequence[Path], name: str, stage: str, ranks: int) -> list[dict[str, Any]]:
        """Submit `jobs.run_attempt` for each; returns what each submitted.json holds ("job_id" at least)."""

    def find(self, job: Submitted) -> dict[str, Any] | None:
        """A job submitted under that name whose id was never written down; None if there is none."""

    def alive(self, submitted: Sequence[Submitted]) -> Mapping[Path, bool | None]:
        """Per attempt: still queued or running? None is no news, never a failure."""

    def cancel(self, submitted: Sequence[Submitted]) -> None: ...


class LocalCluster:
    """Jobs as processes of this host. A job outlives the controller that submitted it."""

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

    def alive(self, submitted: Sequence[Submitted]) -> Mapping[Path, bool | None]:
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


class InlineCluster:
    """Runs a job at once, in this process, with the given function: for benchmarks and tests of the controller."""

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

    def alive(self, submitted: Sequence[Submitted]) -> Mapping[Path, bool | None]:
        return {job.attempt: False for job in submitted}

    def cancel(self, submitted: Sequence[Submitted]) -> None:
        pass


def _folder(attempt: Path) -> Path:
    return attempt / "submitit"


class _without_secrets:
    """submitit passes the controller's whole environment on; a key must not reach a job, whatever executor it is."""

    def __enter__(self) -> None:
        from .isolation import SECRET

        self.hidden = {k: os.environ.pop(k) for k in list(os.environ) if any(word in k.upper() for word in SECRET)}

    def __exit__(self, *error: object) -> None:
        os.environ.update(self.hidden)
