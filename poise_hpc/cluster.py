"""Where jobs run. The only home of submitit, which renders and submits; truth is taken from our own files.

An attempt's job is submitted in two phases: `intent.json` (a unique job name) before, `submitted.json` (the id) after.
A controller killed in between finds the job again by that name. A job that was submitted twice all the same is
harmless: the second one cannot claim the attempt and exits.

Executors: `LocalCluster` (submitit's LocalExecutor, processes on this host), `SlurmCluster` (its SlurmExecutor),
`InlineCluster` (no processes, for benchmarks and tests of the controller).
"""
from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from . import files, jobs, scheduler
from . import site as sites
from .scheduler import Gone, News, Queue, SchedulerSilent, Seen, Submitted
from .site import Site
from .types import Outcome, PoiseError


class Cluster(Protocol):
    slots: int      # jobs in flight at most
    poll_s: float   # between two calls of `alive`
    idle_s: float   # between two looks at the attempts' folders, when nothing moved
    on_this_host: bool  # jobs share this machine with the controller, and stop when it is told to

    def batches(self, wanted: list[Any]) -> list[list[Any]]:
        """How (candidate, unit) pairs are cut into submissions; a batch of several becomes one job array."""

    def submit(self, attempts: Sequence[Path], name: str, stage: str, ranks: int) -> list[dict[str, Any]] | None:
        """Submit `jobs.run_attempt` for each; returns what each submitted.json holds ("job_id" at least). None: the
        scheduler does not take jobs now, and may or may not have taken these."""

    def find(self, job: Submitted) -> dict[str, Any] | None:
        """A job submitted under that name whose id was never written down; None if there is none."""

    def alive(self, submitted: Sequence[Submitted]) -> Mapping[Path, News]:
        """What has become of each job."""

    def cancel(self, submitted: Sequence[Submitted]) -> int | None:
        """Ask jobs to save and stop. Returns how many were asked, where that is known."""

    def clear(self) -> bool:
        """Asked when all attempts have ended, until it is true: nothing of the campaign is left in the queue."""


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
                    _complete(job, entry.name)
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


def for_campaign(campaign: Any) -> Cluster:
    """The cluster of the campaign's site file; this host without one."""
    from .jobspec import ended_attempt, job_prefix

    path = campaign.root / "site.yaml"
    site = sites.load(path) if path.exists() else Site(scheduler="local")
    if site.scheduler == "local":
        return LocalCluster(campaign.config.jobs.max_parallel, tell=lambda job, reason: campaign.log(
            job.attempt.parent.parent.name, "elsewhere", f"{job.attempt.name}  {reason}"))
    return SlurmCluster(site, job_prefix(campaign), tell=lambda job, reason: campaign.log(job.attempt.parent.parent.name, "waits", f"{job.attempt.name}  {reason}"),
                        needless=lambda seen: ended_attempt(campaign, seen.name, seen.index, seen.id) is not None)


class InlineCluster:
    """Runs a job at once, in this process, with the given function: for benchmarks and tests of the controller."""

    poll_s, idle_s, on_this_host = 0.0, 0.0, True

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

    def clear(self) -> bool:
        return True


# sbatch's words for "not now": the same submission may succeed later. Everything else is a wrong request.
NOT_NOW = re.compile(r"unable to contact slurm controller|timed? ?-?out|temporar|try again|submitjob|transport endpoint|connection refused|"
                     r"zero bytes|slurm_persist|partition not available|(currently|presently) disabled|job limit|standby mode|authenticat|munge|"
                     r"communication|message (send|receive)|unexpected message|i/o error", re.IGNORECASE)


LINGER_S = 120.0  # an ended attempt's job that still runs: srun and submitit need seconds
SBATCH_S = 120  # a scheduler that hangs: the job may exist all the same, and is found by its name then
GIVE_UP_S = 600.0  # a queue that does not empty, or a scheduler that does not answer, when the campaign is over


class SchedulerAway(PoiseError):
    """It does not answer now."""


class Refused(PoiseError):
    """sbatch will not take such a job, today or tomorrow."""


class SlurmCluster:
    """Jobs through submitit's SlurmExecutor. It only renders and submits: its own status queries are per job, unbounded,
    and latch transient states as final. `scheduler.Queue` asks instead."""

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
        if self.clock() < self._not_before:
            return []
        groups: dict[tuple[str, str], list[Any]] = {}
        for candidate, unit in wanted:
            groups.setdefault((candidate.id, candidate.stage), []).append((candidate, unit))
        size = self._array
        return [group[i:i + size] for group in groups.values() for i in range(0, len(group), size)]

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
        import submitit

        if self.clock() < self._not_before:  # the scheduler went away between two batches of one step
            return None
        executor = self._executor(attempts[0], name, stage, ranks, len(attempts), avoid)
        _folder(attempts[0]).mkdir(exist_ok=True)
        try:
            with clean_environment():
                job = executor._submit_command(executor._submitit_command_str)
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
            text = " ".join(str(error).split())
            if text and not NOT_NOW.search(text):  # without a word: it hung until it was killed
                raise Refused(f"sbatch refused {name}: {text[-600:]}. Correct the site file; `poise-hpc run --site FILE` takes the new one") from None
            self._array = max(1, len(attempts) // 2)
            self._not_before = self.clock() + self._patience_s
            self._patience_s = min(2 * self._patience_s, 600.0)
            return None
        self._patience_s, self._array = 15.0, min(2 * self._array, self.site.max_array)
        ids = [job.job_id] if len(attempts) == 1 else [f"{job.job_id}_{i}" for i in range(len(attempts))]
        for attempt, id in zip(attempts, ids, strict=True):
            _put_pickle(attempts[0], attempt, id)
        avoided = {"avoided": avoid} if avoid else {}
        return [{"job_id": id, "executor": "slurm", "time": self.clock(), **avoided} for id in ids]

    def script(self, attempt: Path, name: str, stage: str, ranks: int, count: int = 1) -> str:
        """The sbatch text that `submit` would hand over, for `count` attempts of which this is the first."""
        executor = self._executor(attempt, name, stage, ranks, count)
        return executor._make_submission_file_text(executor._submitit_command_str, "dry-run")

    def _executor(self, attempt: Path, name: str, stage: str, ranks: int, count: int, avoid: Sequence[str] = ()) -> Any:
        """submitit's, for an array of `count` (its own map_array makes another executor, without our time limit)."""
        import submitit

        for command in ("sbatch", "srun"):
            if shutil.which(command) is None:
                raise PoiseError(f"{command} is not on PATH: work on a login node, load the site's Slurm module, or use a site file "
                                 "with scheduler: local")
        executor = submitit.SlurmExecutor(folder=_folder(attempt), python=sites.python_command(self.site))
        executor.update_parameters(job_name=name, **sites.sbatch_parameters(self.site, str(stage), ranks, avoid))
        if count > 1:
            executor.parameters["map_count"] = count
        executor._make_submission_command = lambda path: ["timeout", "--kill-after=5", str(SBATCH_S), "sbatch", str(path)]
        return executor

    # --- what has become of them

    def find(self, job: Submitted) -> dict[str, Any] | None:
        seen = self.queue.find(job)
        if seen is None:
            return None
        _complete(job, seen.id)
        return {"job_id": seen.id, "executor": "slurm", "time": self.clock(), "adopted": True}

    def alive(self, submitted: Sequence[Submitted]) -> Mapping[Path, News]:
        self._over_since = None
        if self.queue.ask(submitted):
            self._tidy(submitted)
        return {job.attempt: self._withdrawn(job, self.queue.news(job)) for job in submitted}

    def _tidy(self, submitted: Sequence[Submitted]) -> list[Seen]:
        """Cancel jobs whose attempt has ended: a scheduler that was killed, or a requeue, brings them back, and one that is
        held would stay for ever. What runs gets LINGER_S to end by itself. Returns what is left of the campaign in the queue."""
        now, left = self.clock(), self.queue.beside(submitted)
        needless = {seen.id: seen for seen in left if self.needless(seen)}
        self._lingering = {id: self._lingering.get(id, now) for id in needless}
        ids = [id for id, seen in needless.items() if seen.waits or now - self._lingering[id] >= LINGER_S]
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


# scancel's words for a job that needs no cancelling.
ENDED = re.compile(r"already comp|invalid job id|job/step already|is pending", re.IGNORECASE)


def _folder(attempt: Path) -> Path:
    return attempt / "submitit"


def _complete(job: Submitted, id: str) -> None:
    """Of a job whose submitter was killed after sbatch: it waits a minute for its pickle, then fails."""
    intents = {path.parent: files.read_json(path) for path in job.attempt.parent.glob("*/intent.json")} if job.index else {}
    first = next((a for a, intent in intents.items() if (intent["name"], intent["index"]) == (job.name, 0)), job.attempt)
    _put_pickle(first, job.attempt, id)


def _put_pickle(first: Path, attempt: Path, id: str) -> None:
    """What job `id` is to run. An array's lie with its first attempt."""
    import submitit

    paths = submitit.core.utils.JobPaths(_folder(first), id)
    if not paths.submitted_pickle.exists():
        delayed = submitit.core.utils.DelayedSubmission(jobs.run_attempt, str(attempt))
        delayed.set_timeout(60 * 24 * 30, 1)  # our supervisor answers the signals, not submitit's handler
        temporary = paths.submitted_pickle.with_suffix(".tmp")
        delayed.dump(temporary)
        os.replace(temporary, paths.submitted_pickle)


class _without_secrets:
    """submitit passes the controller's whole environment on; a key must not reach a job, whatever executor it is."""

    def __enter__(self) -> None:
        from .isolation import SECRET

        self.hidden = {k: os.environ.pop(k) for k in list(os.environ) if self.hides(k, SECRET)}

    def hides(self, name: str, secret: tuple[str, ...]) -> bool:
        return any(word in name.upper() for word in secret)

    def __exit__(self, *error: object) -> None:
        os.environ.update(self.hidden)


class clean_environment(_without_secrets):
    """A controller that is itself a job must not hand its own allocation on: sbatch would mix it into the new job's."""

    def hides(self, name: str, secret: tuple[str, ...]) -> bool:
        inherited = name.startswith(("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_")) and name != "SLURM_CONF"
        return inherited or super().hides(name, secret)
