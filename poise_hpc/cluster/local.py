"""Jobs on this host."""
from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import files, jobs
from ..scheduler import Gone, News, Submitted
from ..types import Outcome
from . import submission

SILENT_S = 60.0  # at least, before a job of another host counts as lost


class LocalCluster:
    """Jobs as processes of this host. A job outlives the controller that submitted it.

    One that a controller started on another host (a login node that was drained or renamed since) is judged by its
    heartbeat: hosts' clocks must agree to well within SILENT_S. It cannot be cancelled from here.
    """

    poll_s, idle_s, on_this_host = 1.0, 0.1, True

    def __init__(self, slots: int, clock: Callable[[], float] = time.time, tell: Callable[[Submitted, str], None] = lambda job, reason: None):
        self.slots, self.clock, self.tell = slots, clock, tell
        self._children: list[Any] = []  # kept only to be reaped: a zombie would look alive to others
        self._told: set[Path] = set()

    def batches(self, wanted: list[Any]) -> list[list[Any]]:
        return [[one] for one in wanted]

    def submit(self, attempts: Sequence[Path], name: str, stage: str, ranks: int) -> list[dict[str, Any]]:
        (attempt,) = attempts
        process = submission.start(attempt, ranks)
        self._children.append(process)
        return [{"job_id": str(process.pid), "start": files.process_start(process.pid), "executor": "local"}]

    def find(self, job: Submitted) -> dict[str, Any] | None:
        wanted = os.fsencode(str(submission.folder(job.attempt)))
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                try:
                    arguments = Path(entry.path, "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue  # it ended meanwhile, or is not ours
                if wanted in arguments and b"submitit.local._local" in arguments:
                    submission.complete(job, entry.name)
                    return {"job_id": entry.name, "start": files.process_start(int(entry.name)), "executor": "local"}
        return None

    def alive(self, submitted: Sequence[Submitted]) -> Mapping[Path, News]:
        self._children = [child for child in self._children if child.poll() is None]
        return {job.attempt: self._alive(job) for job in submitted}

    def _alive(self, job: Submitted) -> News:
        claim = jobs.latest_claim(job.attempt)
        if claim is not None:
            here = files.same_host_alive(claim)  # the supervisor itself: submitit's launcher may be gone before it
            return here if here is not None else self._alive_elsewhere(job, claim)
        return job.job_id is not None and files.process_start(int(job.job_id)) == job.start is not None

    def _alive_elsewhere(self, job: Submitted, claim: Mapping[str, Any]) -> News:
        beat = next(path for path in (job.attempt / "heartbeat.json", job.attempt / f"claim-{claim['restart']}.json") if path.exists())
        silent_s, every_s = self.clock() - beat.stat().st_mtime, files.read_json(job.attempt / "job.json")["limits"]["heartbeat_s"]
        if silent_s > max(SILENT_S, 20 * every_s):
            return Gone(Outcome.INFRA_ERROR, "vanished", f"it ran on {claim['host']} and has been silent for {silent_s:.0f} s")
        if job.attempt not in self._told:
            self._told.add(job.attempt)
            self.tell(job, f"it runs on {claim['host']}: it counts as lost when its heartbeat stops, and only there can it be stopped")
        return True

    def cancel(self, submitted: Sequence[Submitted]) -> int:
        """Ask each job to save and stop (SIGTERM to its supervisor, which passes it on)."""
        asked = 0
        for job in submitted:
            claim = jobs.latest_claim(job.attempt)
            pid = claim["pid"] if claim is not None and files.same_host_alive(claim) else None
            if pid is None and job.job_id is not None and files.process_start(int(job.job_id)) == job.start is not None:
                pid = int(job.job_id)
            if pid is not None:
                try:
                    os.kill(pid, signal.SIGTERM)
                    asked += 1
                except ProcessLookupError:
                    pass
        return asked

    def clear(self) -> bool:
        return True
