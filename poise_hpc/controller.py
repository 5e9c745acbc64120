"""The loop. `step` reads what is on disk, asks the scheduler once, moves every candidate at most one stage, writes,
returns. `run` is `step` in a loop; cron can call `step` as well. There is no resume path because there is no other.

Whatever this process forgets when it is killed stands in the campaign folder: candidates are created whole (a
renamed folder), attempts are announced before they are submitted, results are written by the jobs, and a stage
advances only by what those files say.
"""
from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from . import duplicates, files, jobspec, orders, packages, recording, reviewing, screening
from .agent.base import Author, Proposer
from .archive import ArchiveView
from .campaign import Attempt, Campaign, Candidate
from .cluster.base import Cluster
from .jobs import STOP
from .lifecycle import AFTER_REVIEW, RESTING, THINKING, next_stage
from .proposing import Proposing
from .scheduler import Gone, Submitted
from .stored import read_result, read_submitted
from .thinking import Thinking
from .types import BASELINE_ID, Outcome, Stage

VANISHED = {"payload": {}, "run_seconds": 0.0}


class Controller:
    def __init__(self, campaign: Campaign, cluster: Cluster, proposer: Proposer, clock: Callable[[], float] = time.time,
                 say: Callable[[str], None] = lambda line: None, threads: bool = False):
        self.campaign, self.cluster, self.proposer, self.clock, self.say = campaign, cluster, proposer, clock, say
        self.archive = ArchiveView.load(campaign.root)
        for id, problem in list(self.archive.problems.items()):
            self.restore(id, problem)
        archived = campaign.archived_ids()
        self.active: dict[str, Candidate] = {id: campaign.load(id) for id in campaign.ids() if id not in archived}
        for id in [c.id for c in self.active.values() if c.stage == Stage.ARCHIVED]:
            self.active[id] = self.restore(id, "its record is missing")
        self.count = len(archived) + len(self.active)
        self.home = jobspec.home(campaign)
        self.recorder = recording.Recorder(campaign, self.archive)
        self.thinking = Thinking(threads, campaign.config.agent.backoff_max_s, time.monotonic, self.event)
        self.proposing = Proposing(campaign, proposer, self.archive, self.thinking, cluster.slots)
        self.stop_proposing = ""      # why no further candidate is wanted; "" while some are
        self._asked_scheduler = 0.0
        self._ended: dict[Path, float] = {}  # attempts whose end this process saw, and when

    def restore(self, id: str, problem: str) -> Candidate | None:
        """A damaged record is set aside and written again from the candidate's own folder, which still holds it all."""
        if not (self.campaign.candidates / id / "status.json").exists():
            self.event(id, "record damaged", problem)
            return None
        record = self.campaign.records / f"{id}.h5"
        if record.exists():
            record.rename(record.with_suffix(f".h5.damaged-{int(self.clock())}"))
        candidate = self.campaign.load(id)
        if candidate.outcome is not None:  # else its status is lost too, and its attempts' results lead it here again
            candidate.stage = Stage.REFLECT
        candidate.save()
        self.event(id, "record restored", f"from its folder; {problem}")
        return candidate

    # --- the loop

    def step(self) -> bool:
        """One pass. True if anything moved."""
        moved = orders.obey(self)
        moved |= self.collect()
        if self.home.stage != Stage.ARCHIVED:
            moved |= self.advance_home()
        else:
            for candidate in list(self.active.values()):
                moved |= self.advance(candidate)
            moved |= self.propose()
        return self.submit() or moved

    @property
    def finished(self) -> bool:
        """Nothing will move without a person or a new budget."""
        if self.home.stage == Stage.HELD:
            return True
        blocked, baseline = self.thinking.blocked, self.active.get(BASELINE_ID)
        stuck = baseline is not None and baseline.stage == Stage.HELD
        if self.in_flight():
            return False
        return self.home.stage == Stage.ARCHIVED and bool(self.stop_proposing or self.proposing.waiting or blocked) and all(
            c.stage in RESTING or (blocked and c.stage in THINKING) or (stuck and c.stage == Stage.REFLECT) for c in self.active.values())

    @property
    def held(self) -> list[Candidate]:
        return [c for c in [self.home, *self.active.values()] if c.stage == Stage.HELD]

    # --- results

    def in_flight(self) -> list[tuple[Candidate, Attempt]]:
        return [(c, a) for c in [self.home, *self.active.values()] for a in c.attempts if a.result is None]

    def collect(self) -> bool:
        """Read results that have appeared; notice jobs that ended without one."""
        moved, missing = False, []
        for candidate, attempt in self.in_flight():
            attempt.result = read_result(attempt.folder)
            if attempt.result is None:
                missing.append((candidate, attempt))
            else:
                self.note_end(candidate, attempt)
                moved = True
        now = self.clock()
        if missing and not 0 <= now - self._asked_scheduler < self.cluster.poll_s:  # below 0: the clock was set back
            self._asked_scheduler = now
            moved |= self.notice_lost(missing)
        return moved

    def notice_lost(self, missing: list[tuple[Candidate, Attempt]]) -> bool:
        """Adopt jobs whose submission was cut short; end attempts whose job is gone."""
        moved = False
        for candidate, attempt in missing:
            if attempt.submitted is None:
                attempt.submitted = read_submitted(attempt.folder) or self.adopt(candidate, attempt)
        alive = self.cluster.alive([self.submitted(a) for _, a in missing])
        for candidate, attempt in missing:
            news = alive[attempt.folder]
            if news is False and attempt.submitted is None and not any(attempt.folder.glob("claim-*.json")):
                self.forget(candidate, attempt)
                moved = True
            elif news is False or isinstance(news, Gone):
                gone = news or _gone(attempt)
                files.create_exclusive(attempt.folder / "result.json", VANISHED | {
                    "outcome": gone.outcome, "cause": gone.cause, "message": gone.message})
                # The job's own result, if it came between our two looks, stands: creation is exclusive.
                attempt.result = read_result(attempt.folder)
                self.note_end(candidate, attempt)
                moved = True
        return moved

    def forget(self, candidate: Candidate, attempt: Attempt) -> None:
        """What was announced and never reached the scheduler is no attempt: one that takes no jobs for days must not fill the disk."""
        grave = attempt.folder.with_name(f".{attempt.name}.tmp")
        shutil.rmtree(grave, ignore_errors=True)
        attempt.folder.rename(grave)
        shutil.rmtree(grave, ignore_errors=True)
        candidate.attempts.remove(attempt)
        self.event(candidate.id, f"{attempt.stage} never submitted", attempt.name)

    def adopt(self, candidate: Candidate, attempt: Attempt) -> dict[str, Any] | None:
        found = self.cluster.find(self.submitted(attempt))
        if found is not None:
            files.write_json(attempt.folder / "submitted.json", found)
            self.event(candidate.id, f"{attempt.stage} adopted", f"{attempt.name}  job {found['job_id']}")
        return found

    def submitted(self, attempt: Attempt) -> Submitted:
        data = attempt.submitted or {}
        return Submitted(attempt.folder, attempt.intent["name"], attempt.intent["index"], data.get("job_id"), data.get("start"))

    def note_end(self, candidate: Candidate, attempt: Attempt) -> None:
        result = attempt.result
        assert result is not None
        self._ended[attempt.folder] = self.clock()
        seconds = result.get("run_seconds", 0.0)
        cause = f"  {result['cause']}" if result["cause"] else ""
        self.event(candidate.id, f"{attempt.stage} {result['outcome']}", f"{attempt.name}  {seconds:.1f} s{cause}")

    # --- stages

    def advance_home(self) -> bool:
        """The campaign's own job: warm-started model and data, before anything else."""
        outcome = self.stage_outcome(self.home, [""])
        if outcome is None:
            return False
        attempt = self.home.of(Stage.PREPARE, "")[-1]
        if outcome == Outcome.SUCCEEDED:
            self.home.stage = Stage.ARCHIVED
        else:  # a task that cannot be prepared needs a person, whoever is to blame
            self.hold(self.home, attempt)
        self.home.save()
        return True

    def advance(self, candidate: Candidate) -> bool:
        """At most one stage forward."""
        match candidate.stage:
            case Stage.CHECK | Stage.TRAIN | Stage.EVALUATE:
                outcome = self.stage_outcome(candidate, self.units(candidate))
                if outcome is None:
                    return False
                return self.end_repeated(candidate, outcome) or self.move(candidate, self.screened(candidate, outcome))
            case Stage.REVIEW:
                return self.review(candidate)
            case Stage.REFLECT:
                if candidate.id != BASELINE_ID and BASELINE_ID in self.active:
                    return False  # an added candidate may be faster than what it is compared with
                return self.reflect(candidate) and self.archive_it(candidate)
        return False

    def units(self, candidate: Candidate) -> list[str]:
        config = self.campaign.config
        return jobspec.units(config, candidate.stage, screening.rung(config, candidate), start=candidate.id == BASELINE_ID)

    def screened(self, candidate: Candidate, outcome: Outcome) -> Outcome:
        """A stage's outcome; of an evaluation at a rung, what the rung says."""
        rung = screening.rung(self.campaign.config, candidate)
        if rung is None or candidate.stage is not Stage.EVALUATE or outcome is not Outcome.SUCCEEDED:
            return outcome
        found = self.recorder.screening(candidate, rung)
        self.event(candidate.id, "promoted" if found.passed else "screened out", f"{found.rule}: {screening.text(found)}")
        if found.passed:
            return outcome
        candidate.cause, candidate.message = found.rule.replace("_", "-"), screening.text(found)
        return Outcome.SCREENED_OUT

    def stage_outcome(self, candidate: Candidate, units: list[str]) -> Outcome | None:
        """The stage's outcome once every unit (training seed) has one; None before. The lowest failed seed is the cause."""
        outcomes, found = [], candidate.by_unit(candidate.stage)
        for unit in units:
            attempts = found.get(unit)
            if not attempts or attempts[-1].outcome in (None, Outcome.PREEMPTED):
                return None
            outcome = attempts[-1].outcome
            if outcome == Outcome.INFRA_ERROR and self.infra_errors(candidate, unit) <= self.campaign.config.jobs.infra_retries:
                return None
            outcomes.append(outcome)
        for bad in (Outcome.CANDIDATE_ERROR, Outcome.INFRA_ERROR):
            if bad in outcomes:
                return bad
        return Outcome.SUCCEEDED

    def infra_errors(self, candidate: Candidate, unit: str) -> int:
        """Failures in a row that led nowhere: one after which the run had got further does not count."""
        count, furthest = 0, -1
        for attempt in candidate.of(candidate.stage, unit):
            if attempt.outcome is Outcome.INFRA_ERROR and attempt.name not in candidate.forgiven:
                step = jobspec.checkpointed_step(attempt.folder)
                count = 1 if step > furthest else count + 1
                furthest = max(furthest, step)
        return count

    def move(self, candidate: Candidate, outcome: Outcome) -> bool:
        limit = self.campaign.config.jobs.infra_retries
        rung, found = screening.rung(self.campaign.config, candidate) is not None, candidate.by_unit(candidate.stage)
        stage = next_stage(candidate.stage, outcome, infra_errors=limit, limit=limit, author=self.author(candidate), rung=rung)
        failed = [a for unit in self.units(candidate) for a in found.get(unit, ()) if a.outcome == outcome]
        if stage == Stage.HELD:
            self.hold(candidate, failed[0])
        else:
            if stage == Stage.REFLECT:
                candidate.outcome = outcome
                if outcome == Outcome.CANDIDATE_ERROR:
                    candidate.cause, candidate.message = failed[0].result["cause"], failed[0].result["message"]
            if candidate.stage is Stage.EVALUATE and stage is Stage.TRAIN:
                candidate.rung += 1
            candidate.stage = stage
        candidate.save()
        return True

    def end_repeated(self, candidate: Candidate, outcome: Outcome) -> bool:
        """Ends a candidate that passed its check and computes what a visible one did; one that has an author is revised."""
        if candidate.stage is not Stage.CHECK or outcome is not Outcome.SUCCEEDED or self.author(candidate):
            return False
        result = candidate.of(Stage.CHECK, "")[-1].result
        check = duplicates.judged(candidate, result, self.archive.entries)
        if check["outcome"] == Outcome.SUCCEEDED:
            if known := duplicates.repeated(candidate, result, self.archive.entries):  # a person's
                self.event(candidate.id, "check repeats", f"it computes the same as {known.id} ({known.name}), and is trained all the same: a person added it")
            return False
        candidate.outcome, candidate.cause, candidate.message = check["outcome"], check["cause"], check["message"]
        candidate.stage = Stage.REFLECT
        candidate.save()
        self.event(candidate.id, "check repeats", candidate.message)
        return True

    def author(self, candidate: Candidate) -> bool:
        """Is there somebody who can be shown what its check found?"""
        return isinstance(self.proposer, Author) and candidate.proposal().proposer.startswith("llm:")

    def hold(self, candidate: Candidate, attempt: Attempt) -> None:
        assert attempt.result is not None
        candidate.held_from, candidate.stage = candidate.stage, Stage.HELD
        candidate.cause, candidate.message = attempt.result["cause"], attempt.result["message"]
        root = self.campaign.word
        self.event(candidate.id, "held", f"{attempt.stage} died {self.campaign.config.jobs.infra_retries + 1} times outside the "
                   f"candidate's code ({candidate.cause}). `poise-hpc logs {root} {candidate.id}` shows it; "
                   f"`poise-hpc retry {root} {candidate.id}` goes on")

    def review(self, candidate: Candidate) -> bool:
        """Its author sees what the check found: train it, check another version, or give it up."""
        check = max((a for a in candidate.attempts if a.stage == Stage.CHECK), key=lambda a: a.number)
        assert isinstance(self.proposer, Author) and check.result is not None
        thought = self.thinking.ask(candidate.id, "review", lambda: partial(
            reviewing.review, self.proposer, candidate.id, packages.read(candidate.folder, check.version),
            duplicates.judged(candidate, check.result, self.archive.entries)))
        if thought is None:
            return False
        ending = thought.result()
        if ending.draft is not None:
            packages.revise(candidate, check.version, ending.draft)
        if ending.review == "rejected":
            candidate.outcome, candidate.cause, candidate.message = Outcome.CANDIDATE_ERROR, ending.cause, ending.message
        candidate.stage = AFTER_REVIEW[ending.review]
        candidate.save()
        self.event(candidate.id, f"check {ending.review}", f"version {candidate.version}  {ending.cause}")
        return True

    def reflect(self, candidate: Candidate) -> bool:
        """Is reflection.json there? Written once."""
        path = candidate.folder / "reflection.json"
        if not path.exists():
            thought = self.thinking.ask(candidate.id, "reflect", lambda: partial(self.proposer.reflect, self.recorder.facts(candidate)))
            if thought is None:
                return False
            files.write_json(path, thought.result().to_json() | {"written": self.clock()})  # the file's own time is lost in a copy
        return True

    def archive_it(self, candidate: Candidate) -> bool:
        summary = self.recorder.record(candidate)
        candidate.stage = Stage.ARCHIVED
        candidate.save()
        del self.active[candidate.id]
        self.event(candidate.id, "archived", recording.headline(summary))
        return True

    # --- new candidates

    def propose(self) -> bool:
        self.stop_proposing = self.proposing.exhausted(self.count, self.active, self.clock())
        if self.stop_proposing:
            return False
        made = self.proposing.next(self.count, self.active)
        if made is None:
            return False
        candidate, proposal = made
        self.active[candidate.id] = candidate
        self.count += 1
        parents = f"  from {', '.join(proposal.parents)}" if proposal.parents else ""
        self.event(candidate.id, "proposed", f"{proposal.name}{parents}")
        return True

    # --- submission

    def submit(self) -> bool:
        """Fill free slots: the campaign's own job, then what is nearest to its end, then the oldest."""
        free = max(self.cluster.slots - len(self.in_flight()), 0)
        batches = self.cluster.batches(self.wanted()[:free])
        for batch in batches:
            if not self.submit_batch(batch):
                break
        return bool(batches)

    def wanted(self) -> list[tuple[Candidate, str]]:
        """(candidate, unit) pairs that need a job now, most urgent first."""
        out = []
        for candidate in sorted([self.home, *self.active.values()], key=_urgency):
            if candidate.stage in (Stage.PREPARE, Stage.CHECK, Stage.TRAIN, Stage.EVALUATE):
                if candidate is not self.home and self.home.stage != Stage.ARCHIVED:
                    break
                found = candidate.by_unit(candidate.stage)
                out += [(candidate, unit) for unit in self.units(candidate) if self.due(candidate, unit, found.get(unit))]
        return out

    def due(self, candidate: Candidate, unit: str, attempts: list[Attempt] | None) -> bool:
        if not attempts or attempts[-1].outcome is Outcome.PREEMPTED:
            return True
        if attempts[-1].outcome is not Outcome.INFRA_ERROR:
            return False
        failed, jobs = self.infra_errors(candidate, unit), self.campaign.config.jobs
        # The first repeat is at once. What fails again needs time: a node that is down, a file system that is away.
        patience_s = jobs.retry_wait_s * 2 ** (failed - 2) if failed > 1 else 0.0
        return failed <= jobs.infra_retries and not 0 <= self.clock() - self._ended.get(attempts[-1].folder, 0.0) < patience_s

    def submit_batch(self, batch: list[tuple[Candidate, str]]) -> bool:
        """False: the scheduler takes no jobs now."""
        attempts = jobspec.announce(self.campaign, self.home, batch)
        for (candidate, _), attempt in zip(batch, attempts, strict=True):
            candidate.attempts.append(attempt)
        name = attempts[0].intent["name"]
        answers = self.cluster.submit([a.folder for a in attempts], name, attempts[0].stage,
                                      jobspec.ranks(self.campaign.config, attempts[0].stage))
        if answers is None:  # announced, perhaps even submitted: `notice_lost` finds out
            self.event(batch[0][0].id, "not submitted", f"{name}  the scheduler does not take jobs now")
            return False
        for (candidate, _), attempt, answer in zip(batch, attempts, answers, strict=True):
            attempt.submitted = answer
            files.write_json(attempt.folder / "submitted.json", answer, sync=False)
            without = f"  not on {', '.join(answer['avoided'])}" if answer.get("avoided") else ""
            self.event(candidate.id, f"{attempt.stage} submitted", f"{attempt.name}  job {answer['job_id']}{without}")
        return True

    def event(self, id: str, what: str, text: str) -> None:
        self.say(self.campaign.log(id, what, text))


def _gone(attempt: Attempt) -> Gone:
    """A job that was told to stop before it could listen is nobody's failure."""
    if (attempt.folder / STOP).exists():
        return Gone(Outcome.PREEMPTED, "cancelled", "it was told to stop, and ended without a result")
    if attempt.submitted is None:  # its submitter died, and then its job
        return Gone(Outcome.INFRA_ERROR, "vanished", "its job is gone and left no result")
    return Gone(Outcome.INFRA_ERROR, "vanished", f"job {attempt.submitted['job_id']} is gone and left no result")


def _urgency(candidate: Candidate) -> tuple[int, int]:
    order = (Stage.PREPARE, Stage.EVALUATE, Stage.TRAIN, Stage.CHECK)
    # An own algorithm before the baseline is done would have nothing to be compared with: c0000 sorts first anyway.
    number = int(candidate.id[1:]) if candidate.id != "prepare" else -1
    return (order.index(candidate.stage) if candidate.stage in order else len(order), number)


def drive(controller: Controller, sleep: Callable[[float], None], lock: Any, watch: Callable[[], None] = lambda: None) -> None:
    """`step` until nothing is left to do."""
    while True:
        moved = controller.step()
        lock.touch()
        if controller.finished and controller.cluster.clear():
            return
        watch()
        if not moved:
            sleep(controller.cluster.idle_s)
