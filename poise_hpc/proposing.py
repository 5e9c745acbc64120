"""Which candidate comes next, and from which parent: the search, without the scheduling.

Candidate k is proposed when candidates 1 .. k - window are archived (or held) and sees exactly the archived ones among
them; those after it count as pending children. What is proposed then depends on the seed alone, not on which job
finished first or what was killed. A wider window keeps more slots busy, on older evidence.
"""
from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from . import files
from .agent.base import Context, Draft, Proposer
from .archive import ArchiveView
from .campaign import Campaign, Candidate
from .lifecycle import RESTING
from .types import (BASELINE_ID, CandidateError, EntrySummary, PoiseError, Proposal, Reflection, Stage, UsageError, candidate_id,
                    candidate_number)

T = TypeVar("T")
DRAIN = "drain"  # a file of this name in the campaign: nothing new is proposed


class Proposing:
    def __init__(self, campaign: Campaign, proposer: Proposer, archive: ArchiveView):
        self.campaign, self.proposer, self.archive = campaign, proposer, archive

    def exhausted(self, count: int, active: Mapping[str, Candidate], now: float) -> str:
        """Why no further candidate is wanted; "" while some are."""
        search, budget = self.campaign.config.search, self.campaign.config.budget
        if count == 0 or self.inbox():
            return ""
        if (self.campaign.root / DRAIN).exists():
            return f"draining; `poise-hpc drain --off {self.campaign.root}` ends it"
        if budget.wall_clock_min is not None and now - self.campaign.meta["created"] > 60 * budget.wall_clock_min:
            return f"the campaign is older than its budget of {budget.wall_clock_min:g} minutes"
        hours = self.run_hours(active)
        if budget.run_hours is not None and hours >= budget.run_hours:
            return f"{hours:.2f} of {budget.run_hours:g} run hours are used"
        if count - 1 - self.added(active) >= search.candidates:
            return f"all {search.candidates} candidates are proposed"
        return ""

    def run_hours(self, active: Mapping[str, Candidate]) -> float:
        """Run time x ranks of every job so far, queue wait not counted."""
        running = sum(a.result.get("run_seconds", 0.0) * a.result.get("ranks", 1)
                      for c in active.values() for a in c.attempts if a.result)
        return (running + sum(e.run_seconds for e in self.archive.entries)) / 3600

    def added(self, active: Mapping[str, Candidate]) -> int:
        """Candidates that a person put in: they do not use up the proposer's number."""
        return (sum(e.proposer == "person" for e in self.archive.entries)
                + sum(c.proposal().proposer == "person" for c in active.values()))

    def inbox(self) -> list[Path]:
        return sorted(Path(e.path) for e in os.scandir(self.campaign.root / "inbox") if e.is_dir() and not e.name.startswith("."))

    def next(self, count: int, active: Mapping[str, Candidate]) -> tuple[Candidate, Proposal] | None:
        """The next candidate, its folder made whole; None while what it must see is not there yet."""
        id = candidate_id(count)
        if count == 0:
            draft, pick = baseline(self.campaign.config.search.baseline), None
        elif waiting := self.inbox():
            draft, pick = self.from_inbox(waiting[0], count), None
            if draft is None:
                return self.next(count, active)
        else:
            horizon = max(0, count - self.campaign.config.search.window)
            if any(candidate_number(c) <= horizon and a.stage not in RESTING for c, a in active.items()):
                return None
            context, pick = self.context(id, horizon)
            if context is None:
                return None
            draft = self.proposer.propose(context)
        candidate = create_candidate(self.campaign, id, draft, pick)
        if count and pick is None:
            shutil.rmtree(waiting[0])
        return candidate, draft.proposal

    def from_inbox(self, folder: Path, count: int) -> Draft | None:
        """A person's package; None if the last candidate was made of it and we were killed before the folder was gone."""
        if self.campaign.proposal(candidate_id(count - 1)).details.get("inbox") == folder.name:
            shutil.rmtree(folder)
            return None
        draft = read_package(folder)
        return replace(draft, proposal=replace(draft.proposal, details=draft.proposal.details | {"inbox": folder.name}))

    def context(self, id: str, horizon: int) -> tuple[Context | None, dict[str, Any]]:
        """What the proposer may see, and the account of the parent's choice (pick.json)."""
        import numpy

        from .selection.acquisition import choose_parent
        from .selection.references import choose_references

        campaign, search, number = self.campaign, self.campaign.config.search, candidate_number(id)
        entries = tuple(e for e in self.archive.entries if candidate_number(e.id) <= horizon)
        base = next((e for e in entries if e.id == BASELINE_ID), None)
        if base is None:
            return None, {}
        if base.score is None:
            raise PoiseError(f"the baseline {BASELINE_ID} failed ({base.cause}), so there is nothing to compare with; "
                             f"`poise-hpc show {campaign.root} {BASELINE_ID}` says why. Start another campaign")
        pending = {candidate_id(k): campaign.proposal(candidate_id(k)) for k in range(max(1, horizon + 1), number)}
        rng = numpy.random.default_rng([search.seed, number])
        previous = files.read_json(campaign.candidates / candidate_id(number - 1) / "pick.json") if (number - 1) % search.per_parent else None
        if previous is not None:
            pick = previous | {"explanation": f"same parent as {candidate_id(number - 1)}: {search.per_parent} candidates a parent"}
        else:
            chosen = choose_parent(entries, [(c, p.parents) for c, p in pending.items()], search.acquisition, rng)
            pick = {"parent": chosen.parent, "explanation": chosen.explanation, "terms": chosen.terms}
        pick |= {"visible": len(entries), "visible_to": candidate_id(horizon), "pending": sorted(pending)}
        by_id = {e.id: e for e in entries}
        parent = by_id[pick["parent"]]
        return Context(
            id=id, seed=search.seed, parent=parent, parent_code=campaign.code(parent.id), parent_proposal=campaign.proposal(parent.id),
            references=tuple(choose_references(entries, parent.id, 4, rng)), entries=entries, pending=tuple(pending.items()),
            proposals=Lazy(by_id, campaign.proposal), code=campaign.code, reflections=Lazy(by_id, lambda c: reflection(campaign, c)),
            directive=search.directive), pick


class Lazy(Mapping[str, T]):
    """A mapping over the visible entries that reads a file when it is asked."""

    def __init__(self, keys: Mapping[str, EntrySummary], read: Callable[[str], T]):
        self._keys, self._read = keys, read

    def __getitem__(self, key: str) -> T:
        if key not in self._keys:
            raise KeyError(key)
        return self._read(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def reflection(campaign: Campaign, id: str) -> Reflection:
    return Reflection.from_json(files.read_json(campaign.candidates / id / "reflection.json"))


def baseline(which: str) -> Draft:
    """A seed algorithm by name, or a package folder, as candidate c0000."""
    folder = Path(which)
    if folder.is_dir():
        return read_package(folder)
    from .algorithms import seeds

    text = seeds.source(which)
    proposal = Proposal(name=which.upper().replace("_", "-"), parents=(), hypothesis="The baseline that every candidate is paired with.",
                        mechanisms=(), description=text.split('"""')[1].strip(), expected_effect="none: the reference", proposer="seed")
    return Draft(proposal, {"algorithm.py": text})


def read_package(folder: Path) -> Draft:
    """A person's package (`add`): *.py files, and proposal.json if there is one. UsageError for what is not one."""
    from .algorithms import load

    try:
        code = load.read_package(folder)
        data = files.read_json(folder / "proposal.json") or {}
    except (CandidateError, files.CorruptFile) as error:
        raise UsageError(f"{folder} is no algorithm package: {getattr(error, 'message', error)}") from None
    return Draft(read_proposal(data, folder), code)


def read_proposal(data: Any, folder: Path) -> Proposal:
    """A person's proposal.json, which may leave fields out; UsageError naming what does not fit."""
    import pydantic

    path, known = folder / "proposal.json", [f.name for f in fields(Proposal)]
    if not isinstance(data, dict) or (unknown := data.keys() - known):
        raise UsageError(f"{path}: " + (f"unknown keys {sorted(unknown)}" if isinstance(data, dict) else "a mapping was wanted")
                         + f"; known: {', '.join(known)}")
    empty = {"name": folder.name, "parents": [], "hypothesis": "", "mechanisms": [], "description": "", "expected_effect": ""}
    try:
        return pydantic.TypeAdapter(Proposal).validate_python(empty | data | {"proposer": "person"})
    except pydantic.ValidationError as error:
        raise UsageError("\n".join(f"{path}: {'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors())) from None


def create_candidate(campaign: Campaign, id: str, draft: Draft, pick: dict[str, Any] | None) -> Candidate:
    """The candidate's folder, whole or not at all."""
    folder = campaign.candidates / id
    temporary = campaign.candidates / f".{id}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for name, text in draft.files.items():
        files.write_atomic(temporary / name, text)
    files.write_json(temporary / "manifest.json", {n: hashlib.sha256(text.encode()).hexdigest() for n, text in draft.files.items()}, sync=False)
    files.write_json(temporary / "proposal.json", draft.proposal.to_json())
    files.write_atomic(temporary / "proposal.md", markdown(id, draft.proposal), sync=False)
    if pick is not None:
        files.write_json(temporary / "pick.json", pick, sync=False)
    candidate = Candidate(id, temporary, Stage.CHECK)
    candidate.save()
    os.rename(temporary, folder)
    candidate.folder = folder
    return candidate


def markdown(id: str, proposal: Proposal) -> str:
    sources = "\n".join(f"- {s}" for s in proposal.sources) or "- none"
    return (f"# {id} {proposal.name}\n\nParents: {', '.join(proposal.parents) or 'none'}. Proposer: {proposal.proposer}. "
            f"Mechanisms: {', '.join(proposal.mechanisms) or 'none declared'}.\n\n## Hypothesis\n{proposal.hypothesis}\n\n"
            f"## Change\n{proposal.description}\n\n## Expected effect\n{proposal.expected_effect}\n\n## Sources\n{sources}\n")


__all__ = ["Proposing", "create_candidate", "read_package", "baseline", "BASELINE_ID"]
