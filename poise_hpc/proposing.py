"""Which candidate comes next, and from which parent: the search, without the scheduling.

`search.window` candidates are in flight at most. What candidate k sees is fixed when its proposal is begun, and kept: all older
candidates but those in pick.json's "pending", which count as pending children.

    in order      (default) when 1 .. k - window are archived (or held), exactly these. Proposals then depend on the seed alone, not
                  on which job finished first or what was killed; slots may wait for the slowest of a window
    asynchronous  as soon as fewer than `window` are in flight, all that are archived then. Slots do not wait; the same order of
                  completions gives the same proposals
"""
from __future__ import annotations

import bisect
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from . import files, guidance, packages, recording
from .agent.base import Context, Draft, DraftRejected, Proposer
from .archive import ArchiveView, find
from .campaign import Campaign, Candidate
from .lifecycle import RESTING
from .thinking import Thinking
from .transcript import BudgetExceeded
from .types import BASELINE_ID, EntrySummary, PoiseError, Proposal, Reflection, candidate_id, candidate_number

T = TypeVar("T")
# Names in the campaign's folder:
DRAIN = "drain"           # a file: nothing new is proposed
BEGUN = "proposing.json"  # the candidate that the proposer was last asked for, and what it does not see
ENDED = "ended.json"      # how the last controller ended: {"spent", "blocked"}; not there while one is at work
PLANNED = "planned"       # of a replay: packages of persons and parents, by candidate


class Proposing:
    def __init__(self, campaign: Campaign, proposer: Proposer, archive: ArchiveView, thinking: Thinking, slots: int):
        self.campaign, self.proposer, self.archive, self.thinking, self.slots = campaign, proposer, archive, thinking, slots
        self.waiting = False  # the next candidate cannot be proposed before others are archived
        self.spent = ""       # why the proposer cannot be paid for another proposal
        self._pending: dict[str, Draft] = {}  # what the last proposal saw of those that are not archived

    def exhausted(self, count: int, active: Mapping[str, Candidate], now: float) -> str:
        """Why no further candidate is wanted; "" while some are."""
        return exhausted(self.campaign, self.archive, active, count, now) or self.spent

    def next(self, count: int, active: Mapping[str, Candidate]) -> tuple[Candidate, Proposal] | None:
        """The next candidate, its folder made whole; None while what it must see, or its proposal, is not there yet."""
        id, self.waiting, taken = candidate_id(count), False, None
        planned = self.campaign.root / PLANNED / id
        if count == 0:
            made = Made(packages.baseline(self.campaign.config.search.baseline))
        elif (planned / "proposal.json").exists():
            made = Made(packages.read_package(planned))
        elif (waiting := inbox(self.campaign)) and not self.proposal_goes_on(id):
            taken = waiting[0]
            draft = self.from_inbox(taken, count)
            if draft is None:
                return self.next(count, active)
            made = Made(draft)
        else:
            hidden = self.hidden(count, active)
            if hidden is None:
                self.waiting = True
                return None
            proposed = self.propose(id, hidden)
            if proposed is None:
                return None
            made = proposed
        candidate = packages.create_candidate(self.campaign, id, made.draft, made.pick, made.rejected)
        if taken is not None:
            shutil.rmtree(taken)
        return candidate, made.draft.proposal

    def hidden(self, count: int, active: Mapping[str, Candidate]) -> list[str] | None:
        """The older candidates that candidate `count` does not see, in order; None while it must wait for others."""
        fixed = self.fixed(candidate_id(count))
        if fixed is not None:
            return fixed if len(self.visible(count, fixed)) == count - len(fixed) else None
        search = self.campaign.config.search
        window, moving = search.width(self.slots), [id for id, c in active.items() if c.stage not in RESTING and id != BASELINE_ID]
        horizon = count - 1 if search.asynchronous else max(0, count - window)
        if len(moving) >= window if search.asynchronous else any(candidate_number(id) <= horizon for id in moving):
            return None
        seen = {e.id for e in self.visible(horizon + 1, ())} | {BASELINE_ID}
        return [id for id in map(candidate_id, range(count)) if id not in seen]

    def fixed(self, id: str) -> list[str] | None:
        """What it does not see, of a proposal that was begun before a kill, or that a replay makes again."""
        begun = files.read_json(self.campaign.root / BEGUN)
        if begun and begun["id"] == id and "pending" in begun:
            return begun["pending"]
        return (files.read_json(self.campaign.root / PLANNED / id / "pick.json") or {}).get("pending")

    def visible(self, count: int, hidden: Sequence[str]) -> tuple[EntrySummary, ...]:
        """Archived candidates before number `count`, but for `hidden`."""
        older, unseen = bisect.bisect_left(self.archive.entries, count, key=lambda e: candidate_number(e.id)), set(hidden)
        return tuple(e for e in self.archive.entries[:older] if e.id not in unseen)

    def propose(self, id: str, hidden: list[str]) -> Made | None:
        """Ask the proposer; None while it thinks, while the baseline is missing, or when its money is spent."""
        if find(self.archive.entries, BASELINE_ID) is None:
            self.waiting = True
            return None

        def gather() -> Callable[[], Made]:
            context, pick = self.context(id, hidden)
            if self.thinking.threads:
                files.write_json(self.campaign.root / BEGUN, {"id": id, "pending": hidden})
            return partial(draft_from, self.proposer, context, pick)

        thought = self.thinking.ask(id, "propose", gather)
        try:
            return thought.result() if thought else None
        except BudgetExceeded as error:
            if not self.thinking.after_others(id, "propose"):  # what they reserved may come back
                self.spent = str(error)
            return None

    def begun(self, id: str) -> bool:
        """Was the proposer asked for this candidate, here or before a kill? What it was shown must not change then."""
        return (files.read_json(self.campaign.root / BEGUN) or {}).get("id") == id

    def unseen(self, count: int) -> int:
        """The first candidate whose proposal has seen nothing yet: from it on, a person's word holds."""
        return count + self.begun(candidate_id(count))

    def proposal_goes_on(self, id: str) -> bool:
        """Does a person's package have to wait for a proposal that was begun? Not for one that waits itself."""
        return self.begun(id) and not (self.spent or self.thinking.blocked or self.thinking.paused(id, "propose"))

    def from_inbox(self, folder: Path, count: int) -> Draft | None:
        """A person's package; None if the last candidate was made of it and we were killed before the folder was gone."""
        if self.campaign.proposal(candidate_id(count - 1)).details.get("inbox") == folder.name:
            shutil.rmtree(folder)
            return None
        draft = packages.read_package(folder)
        return replace(draft, proposal=replace(draft.proposal, details=draft.proposal.details | {"inbox": folder.name}))

    def context(self, id: str, hidden: Sequence[str]) -> tuple[Context, dict[str, Any]]:
        """What the proposer may see, and the account of the parent's choice (pick.json). `hidden`: older, and not seen."""
        import numpy

        from .selection.references import choose_references

        campaign, search, number = self.campaign, self.campaign.config.search, candidate_number(id)
        entries = self.visible(number, hidden)
        since = number
        while since > 1 and campaign.proposal(candidate_id(since - 1)).proposer == "person":
            since -= 1
        said = guidance.at(campaign.root, number, search.directive, since)
        # Read now, and in their first version: what this candidate sees must not depend on how fast others are repaired.
        pending = self._pending = {c: self._pending.get(c) or packages.read(campaign.candidates / c, 1) for c in hidden}
        rng = numpy.random.default_rng([search.seed, number])
        pick = self.pick(number, entries, {c: d.proposal.parents for c, d in pending.items()}, said, rng)
        pick |= {"visible": len(entries), "pending": list(hidden)}
        parent = find(entries, pick["parent"])
        assert parent is not None
        return Context(
            id=id, seed=search.seed, parent=parent, parent_code=campaign.code(parent.id), parent_proposal=campaign.proposal(parent.id),
            references=tuple(choose_references(entries, parent.id, search.references, rng)), entries=entries,
            pending=tuple((c, d.proposal) for c, d in pending.items()), proposals=Lazy(entries, campaign.proposal),
            code=lambda c: pending[c].files if c in pending else campaign.code(c), reflections=Lazy(entries, lambda c: reflection(campaign, c)),
            curves=lambda c: recording.curves(campaign.load(c)), directive=said.directive, ideas=said.ideas, vetoed=said.vetoed_mechanisms), pick

    def pick(self, number: int, entries: Sequence[EntrySummary], pending: Mapping[str, tuple[str, ...]], said: guidance.Guidance,
             rng: Any) -> dict[str, Any]:
        """The parent and why: replayed, pinned, the previous candidate's, or chosen from the archive."""
        from .selection.acquisition import choose_parent

        campaign, search = self.campaign, self.campaign.config.search
        planned = files.read_json(campaign.root / PLANNED / candidate_id(number) / "pick.json")
        if planned is not None:
            return planned
        base = find(entries, BASELINE_ID)
        assert base is not None
        if base.score is None:
            raise PoiseError(f"the baseline {BASELINE_ID} failed ({base.cause}), so there is nothing to compare with; "
                             f"`poise-hpc show {campaign.word} {BASELINE_ID}` says why. Start another campaign")
        if said.pinned and (pinned := find(entries, said.pinned)) and pinned.score:
            return {"parent": said.pinned, "explanation": "pinned by a person", "terms": []}
        barred = guidance.barred(said, entries)
        previous = files.read_json(campaign.candidates / candidate_id(number - 1) / "pick.json") if (number - 1) % search.per_parent else None
        if previous is not None and previous["parent"] not in barred:
            return previous | {"explanation": f"same parent as {candidate_id(number - 1)}: {search.per_parent} candidates a parent"}
        chosen = choose_parent(entries, list(pending.items()), search.acquisition, rng, search.strategy, barred=barred,
                               objectives=guidance.objectives(said.directive))
        return {"parent": chosen.parent, "explanation": chosen.explanation, "terms": chosen.terms}


@dataclass(frozen=True)
class Made:
    """A draft on its way to become a candidate; `rejected` where it is evidence only."""

    draft: Draft
    pick: dict[str, Any] | None = None
    rejected: DraftRejected | None = None


def draft_from(proposer: Proposer, context: Context, pick: dict[str, Any]) -> Made:
    try:
        return Made(proposer.propose(context), pick)
    except DraftRejected as error:
        return Made(error.draft, pick, error)


def exhausted(campaign: Campaign, archive: ArchiveView, active: Mapping[str, Candidate], count: int, now: float) -> str:
    """Why no further candidate is wanted, as the files say; "" while some are. `count`: candidates so far, the baseline too."""
    search, budget = campaign.config.search, campaign.config.budget
    if count == 0 or inbox(campaign) or (campaign.root / PLANNED / candidate_id(count) / "proposal.json").exists():
        return ""
    if (campaign.root / DRAIN).exists():
        left = search.candidates - (count - 1 - added(archive, active))
        rest = f"; {left} of {search.candidates} candidates are not proposed" if left > 0 else ""
        return f"draining: `poise-hpc drain --off {campaign.word}` ends it{rest}"
    if budget.wall_clock_min is not None and now - campaign.meta["created"] > 60 * budget.wall_clock_min:
        return f"the campaign is older than its budget of {budget.wall_clock_min:g} minutes"
    if budget.run_hours is not None and (hours := run_hours(archive, active)) >= budget.run_hours:
        return f"{hours:.2f} of {budget.run_hours:g} run hours are used"
    if count > search.candidates and count - 1 - added(archive, active) >= search.candidates:  # the count first: it is cheap
        return f"all {search.candidates} candidates are proposed; `poise-hpc run {campaign.word} --max-candidates N` raises it"
    return ""


def inbox(campaign: Campaign) -> list[Path]:
    """Packages that wait to become candidates, oldest first."""
    folder = campaign.root / "inbox"
    return sorted(Path(e.path) for e in os.scandir(folder) if e.is_dir() and not e.name.startswith(".")) if folder.is_dir() else []


def run_hours(archive: ArchiveView, active: Mapping[str, Candidate]) -> float:
    """Run time x ranks of all candidates' jobs so far, queue wait not counted."""
    running = sum(a.result.get("run_seconds", 0.0) * a.result.get("ranks", 1) for c in active.values() for a in c.attempts if a.result)
    return (running + sum(e.run_seconds for e in archive.entries)) / 3600


def added(archive: ArchiveView, active: Mapping[str, Candidate]) -> int:
    """Candidates that a person put in beside the baseline: they do not use up the proposer's number."""
    return (sum(e.proposer == "person" for e in archive.entries if e.id != BASELINE_ID)
            + sum(c.proposal().proposer == "person" for id, c in active.items() if id != BASELINE_ID))


class Lazy(Mapping[str, T]):
    """A mapping over the visible entries that reads a file when it is asked, once."""

    def __init__(self, entries: Sequence[EntrySummary], read: Callable[[str], T]):
        self._entries, self._read = entries, read
        self._known: dict[str, T] = {}

    def __getitem__(self, key: str) -> T:
        if key not in self._known:
            if find(self._entries, key) is None:
                raise KeyError(key)
            self._known[key] = self._read(key)
        return self._known[key]

    def __iter__(self) -> Iterator[str]:
        return (e.id for e in self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def reflection(campaign: Campaign, id: str) -> Reflection:
    return Reflection.from_json(files.read_json(campaign.candidates / id / "reflection.json"))
