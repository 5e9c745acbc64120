"""Jobs through Slurm: when they are submitted, and what is taken out of the queue again."""
from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import files, scheduler
from ..jobs import STOP
from ..scheduler import Gone, News, Queue, SchedulerSilent, Seen, Submitted
from ..site import Site
from ..types import PoiseError
from . import submission

# sbatch's words for "not now": the same submission may succeed later. Everything else is a wrong request.
NOT_NOW = re.compile(r"unable to contact slurm controller|timed? ?-?out|temporar|try again|submitjob|transport endpoint|connection refused|"
                     r"zero bytes|slurm_persist|partition not available|(currently|presently) disabled|job limit|standby mode|authenticat|munge|"
                     r"communication|message (send|receive)|unexpected message|i/o error", re.IGNORECASE)
# scancel's words for a job that needs no cancelling.
ENDED = re.compile(r"already comp|invalid job id|job/step already|is pending", re.IGNORECASE)

LINGER_S = 120.0  # an ended attempt's job that still runs: srun and submitit need seconds
PATIENCE_MOST_S = 600.0  # after "not now"
GIVE_UP_S = 600.0  # a queue that does not empty, or a scheduler that does not answer, when the campaign is over


class SchedulerAway(PoiseError):
    """It does not answer now."""


class Refused(PoiseError):
    """sbatch will not take such a job, today or tomorrow."""


class SlurmCluster:
    """Submits through submission.py; what has become of jobs is `scheduler.Queue`'s to say."""

    poll_s, idle_s, on_this_host = 1.0, 1.0, False

    def __init__(self, site: Site, prefix: str, call: Callable[[list[str]], str] = scheduler.run, clock: Callable[[], float] = time.time,
                 tell: Callable[[Submitted, str], None] = lambda job, reason: None, needless: Callable[[Seen], bool] = lambda seen: False):
        self.site, self.call, self.clock, self.needless = site, call, clock, needless
        self.slots = site.max_submit
        self.queue = Queue(prefix, site.poll_s, site.result_lag_s, call, clock, tell)
        self._not_before, self._patience_s = 0.0, 15.0  # after "not now"
        self._array = site.max_array                    # elements of one array now: fewer where a submit limit is near
        self._over_since: float | None = None           # all attempts have ended
        self._lingering: dict[str, float] = {}          # job id -> since when it is known to run for an attempt that has ended

    # --- submission

    def batches(self, wanted: list[Any]) -> list[list[Any]]:
        """One array per candidate and stage, cut to the site's array size. Nothing while sbatch says "not now"."""
        if self._pausing:
            return []
        groups: dict[tuple[str, str], list[Any]] = {}
        for candidate, unit in wanted:
            groups.setdefault((candidate.id, candidate.stage), []).append((candidate, unit))
        size = self._array
        return [group[i:i + size] for group in groups.values() for i in range(0, len(group), size)]

    @property
    def _pausing(self) -> bool:
        return 0 < self._not_before - self.clock() <= PATIENCE_MOST_S  # further away: the clock was set back

    def submit(self, attempts: Sequence[Path], name: str, stage: str, ranks: int) -> list[dict[str, Any]] | None:
        """None: not now. The attempts stay announced; `find` tells whether sbatch created the job all the same."""
        avoid = sorted({node for attempt in attempts for node in (files.read_json(attempt / "job.json") or {}).get("avoid", ())})
        try:
            return self._submit(attempts, name, stage, ranks, avoid)
        except Refused as refused:
            if avoid:  # there may be no others: better one of these than none
                return self._submit(attempts, name, stage, ranks, [])
            raise refused

    def _submit(self, attempts: Sequence[Path], name: str, stage: str, ranks: int, avoid: list[str]) -> list[dict[str, Any]] | None:
        if self._pausing:  # the scheduler went away between two batches of one step
            return None
        executor = submission.executor(self.site, attempts[0], name, stage, ranks, len(attempts), avoid)
        try:
            job_id = submission.hand_over(executor)
        except submission.NotTaken as error:
            text = str(error)
            if text and not NOT_NOW.search(text):  # without a word: it hung until it was killed
                raise Refused(f"sbatch refused {name}: {text[-600:]}. Correct the site file; `poise-hpc run --site FILE` takes the new one") from None
            self._array = max(1, len(attempts) // 2)
            self._not_before = self.clock() + self._patience_s
            self._patience_s = min(2 * self._patience_s, PATIENCE_MOST_S)
            return None
        self._patience_s, self._array = 15.0, min(2 * self._array, self.site.max_array)
        ids = [job_id] if len(attempts) == 1 else [f"{job_id}_{i}" for i in range(len(attempts))]
        for attempt, id in zip(attempts, ids, strict=True):
            submission.put_pickle(attempts[0], attempt, id)
        avoided = {"avoided": avoid} if avoid else {}
        return [{"job_id": id, "executor": "slurm", "time": self.clock(), **avoided} for id in ids]

    def script(self, attempt: Path, name: str, stage: str, ranks: int, count: int = 1) -> str:
        """The sbatch text that `submit` would hand over, for `count` attempts of which this is the first."""
        return submission.script(submission.executor(self.site, attempt, name, stage, ranks, count))

    # --- what has become of them

    def find(self, job: Submitted) -> dict[str, Any] | None:
        seen = self.queue.find(job)
        if seen is None:
            return None
        submission.complete(job, seen.id)
        return {"job_id": seen.id, "executor": "slurm", "time": self.clock(), "adopted": True}

    def alive(self, submitted: Sequence[Submitted]) -> Mapping[Path, News]:
        self._over_since = None
        if self.queue.ask(submitted):
            self._tidy(submitted)
        return {job.attempt: self._withdrawn(job, self.queue.news(job)) for job in submitted}

    def _tidy(self, submitted: Sequence[Submitted]) -> list[Seen]:
        """Cancel jobs whose attempt has ended: a scheduler that was killed, or a requeue, brings them back, and one that is
        held would stay for ever. What runs gets LINGER_S to end by itself. Returns what is left of the campaign in the queue.
        Jobs that wait and that a person stopped while the scheduler was away leave the queue, too."""
        now, left = self.clock(), self.queue.beside(submitted)
        needless = {seen.id: seen for seen in left if self.needless(seen)}
        self._lingering = {id: self._lingering.get(id, now) for id in needless}
        ids = [id for id, seen in needless.items() if seen.waits or now - self._lingering[id] >= LINGER_S]
        ids += [seen.id for job in submitted if (job.attempt / STOP).exists() and (seen := self.queue.find(job)) and seen.waits]
        for i in range(0, len(ids), 500):
            try:
                self.call(["scancel", *ids[i:i + 500]])
            except SchedulerSilent:
                break  # the next look finds them again
        return list(needless.values())

    def clear(self) -> bool:
        """Also true when GIVE_UP_S are over: what is left would find its attempt ended, and end."""
        if first := self._over_since is None:
            self._over_since = self.clock()
        if self.queue.ask([], soon=first):
            return not self._tidy([])
        return self.clock() - self._over_since >= GIVE_UP_S or "No such file" in self.queue.silence  # a machine without Slurm

    def _withdrawn(self, job: Submitted, news: News) -> News:
        """A job that Slurm holds for good is taken out of the queue before it counts as gone: nobody else would."""
        if isinstance(news, Gone) and (seen := self.queue.find(job)) and seen.launch_failed:
            try:
                self.call(["scancel", seen.id])
            except SchedulerSilent:
                return None
        return news

    def cancel(self, submitted: Sequence[Submitted]) -> None:
        """Take what waits out of the queue; ask what runs to save and end (its supervisors kill what does not within a minute:
        plain scancel would kill after KillWait, often 30 s). By id, and only jobs that carry their attempt's name."""
        if not submitted:
            return
        if not self.queue.look(submitted):
            raise SchedulerAway("squeue does not answer: what waits stays in the queue for now")
        ids = [seen.id for job in submitted if (seen := self.queue.find(job)) and seen.state not in scheduler.FINAL]
        for i in range(0, len(ids), 500):
            for how in ("--state=PENDING", "--signal=USR1"):  # in this order: what starts in between is asked to end
                try:
                    self.call(["scancel", how, *ids[i:i + 500]])
                except SchedulerSilent as silent:
                    if not ENDED.search(str(silent)):
                        raise SchedulerAway(f"scancel failed: {silent}") from None
