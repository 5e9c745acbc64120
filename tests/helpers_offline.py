"""A fake archive for the offline proposer: contexts over it, and packages as modules."""
from __future__ import annotations

import random
import sys
import types

from poise_hpc.agent.base import Context, Draft
from poise_hpc.types import BASELINE_ID, EntrySummary, Outcome, Proposal, Reflection, Score, candidate_id

GRPO = Proposal("GRPO", (), "The baseline.", (), "GRPO", "none", proposer="seed")


def score(overall: float, by_seed: dict[str, float] | None = None) -> Score:
    return Score(overall, None, by_seed or {}, overall, {"1.0": overall}, {})


def entry(id: str, proposal: Proposal, overall: float | None) -> EntrySummary:
    ok = overall is not None
    return EntrySummary(id, proposal.name, proposal.parents, Outcome.SUCCEEDED if ok else Outcome.CANDIDATE_ERROR, "" if ok else "nonfinite-loss",
                        proposal.proposer, proposal.mechanisms, score(overall) if ok else None, {}, "undecided" if ok else "failed", 60.0, "2026-01-01")


class FakeArchive:
    def __init__(self) -> None:
        self.entries = [entry(BASELINE_ID, GRPO, 30.0)]
        self.proposals: dict[str, Proposal] = {BASELINE_ID: GRPO}
        self.code: dict[str, dict[str, str]] = {BASELINE_ID: {"algorithm.py": "ALGORITHM = None\n"}}
        self.reflections: dict[str, Reflection] = {}

    def context(self, id: str, parent: str = BASELINE_ID, seed: int = 0, directive: str | None = None,
                pending: tuple[tuple[str, Proposal], ...] = (), references: tuple = ()) -> Context:
        by_id = {e.id: e for e in self.entries}
        return Context(id=id, seed=seed, parent=by_id[parent], parent_code=self.code[parent], parent_proposal=self.proposals[parent],
                       references=references, entries=tuple(self.entries), pending=pending, proposals=self.proposals,
                       reflections=self.reflections, code=self.code.__getitem__, directive=directive)

    def add(self, id: str, draft: Draft, overall: float | None) -> None:
        self.proposals[id], self.code[id] = draft.proposal, dict(draft.files)
        self.entries.append(entry(id, draft.proposal, overall))


def grow(propose, count: int, seed: int = 0) -> tuple[FakeArchive, list[Draft]]:
    """`count` proposals, each archived with a random score; one in ten fails."""
    archive, rng, drafts = FakeArchive(), random.Random(seed), []
    for k in range(1, count + 1):
        parents = [e.id for e in archive.entries if e.score]
        drafts.append(propose(archive.context(candidate_id(k), rng.choice(parents), seed)))
        archive.add(candidate_id(k), drafts[-1], None if rng.random() < 0.1 else rng.gauss(30, 3))
    return archive, drafts


def load(text: str):
    """The `ALGORITHM` of a package's text."""
    module = types.ModuleType(f"rendered_{abs(hash(text))}")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(text, "algorithm.py", "exec"), module.__dict__)
    return module.ALGORITHM
