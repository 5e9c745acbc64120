"""The seam between the controller and whatever invents algorithms: `propose` before a candidate, `reflect` after it.

Two implementations: `offline.OfflineProposer` (recombines published mechanisms, no network) and the LLM agent.
Proposers run on the login node: they never import or execute candidate code, and need no torch.

    Context -> propose -> Draft   (proposal + files; the controller writes them and submits the check job)
    Facts   -> reflect -> Reflection

Randomness is a pure function of (seed, id); with the same visible archive the draft is the same, byte for byte.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ..types import CandidateError, EntrySummary, Outcome, Proposal, Reflection, Score, Screening

if TYPE_CHECKING:
    from ..selection.references import Reference


@dataclass(frozen=True)
class Context:
    """What a proposal may see: the visible archive, seen from the parent that selection chose."""

    id: str                                # id that the new candidate will have
    seed: int                              # campaign seed
    parent: EntrySummary
    parent_code: Mapping[str, str]         # file name -> text, of the parent's package
    parent_proposal: Proposal
    references: tuple[Reference, ...] = ()               # tiered: Pareto, complementary, exploratory; without the parent
    entries: tuple[EntrySummary, ...] = ()               # every visible archived candidate, failed ones too, by id
    pending: tuple[tuple[str, Proposal], ...] = ()       # (id, proposal) of candidates proposed but not yet visible
    proposals: Mapping[str, Proposal] = field(default_factory=dict)      # id -> proposal, of `entries`
    reflections: Mapping[str, Reflection] = field(default_factory=dict)  # id -> reflection, of `entries`
    code: Callable[[str], Mapping[str, str]] = lambda id: {}             # id of a visible or pending candidate -> its package
    curves: Callable[[str], Mapping[str, list[dict[str, Any]]]] = lambda id: {}  # id of a visible candidate -> training seed -> rows
    directive: str | None = None           # a researcher's sentence
    ideas: tuple[str, ...] = ()            # a researcher's suggestions for this candidate
    vetoed: frozenset[str] = frozenset()   # mechanisms that no further candidate may have


@dataclass(frozen=True)
class Draft:
    """A candidate before any check: what it tests, and the package that does it."""

    proposal: Proposal
    files: Mapping[str, str]               # file name -> text; "algorithm.py" at least


class DraftRejected(CandidateError):
    """No draft that is worth a job: evidence. `draft` is what there is of it; its files may be missing."""

    def __init__(self, cause: str, message: str, draft: Draft):
        super().__init__(cause, message)
        self.draft = draft


@dataclass(frozen=True)
class Facts:
    """A finished candidate, as its diagnosis sees it. Scores are in points (0..100), curves in one row a step."""

    id: str
    proposal: Proposal
    outcome: Outcome
    cause: str = ""                        # slug of a failure; "" when it succeeded
    message: str = ""                      # what went wrong, for people
    score: Score | None = None             # None when it failed or was screened out
    parent_score: Score | None = None
    baseline_score: Score | None = None
    curves: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)           # training seed -> rows
    baseline_curves: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)  # the same of GRPO, same seeds
    parent_curves: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)    # of a parent that is not GRPO
    behaviour: Mapping[str, float] = field(default_factory=dict)                       # evaluation.metrics.behaviour
    screenings: tuple[Screening, ...] = ()  # of the rungs that it was judged at
    files: Mapping[str, str] = field(default_factory=dict)  # its package, as it was trained


class Proposer(Protocol):
    def propose(self, context: Context) -> Draft: ...

    def reflect(self, facts: Facts) -> Reflection: ...


@runtime_checkable
class Author(Protocol):
    """A proposer that can be shown what the checks say about its draft."""

    def confirm(self, id: str, draft: Draft, response: Mapping[str, float]) -> list[str]:
        """After the checks passed: what the measured response speaks against; [] lets the draft train."""

    def repair(self, id: str, draft: Draft, messages: Sequence[str]) -> Draft:
        """The draft corrected; DraftRejected after a bounded number of rounds."""
