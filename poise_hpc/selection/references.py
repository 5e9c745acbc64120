"""The tiered reference set: which other entries a proposer sees besides the parent (POISE, arXiv:2603.23951).

    Pareto         best on some benchmark split: what works
    complementary  better than the parent where the parent is weak, with other mechanisms: what could be joined
    exploratory    mechanisms furthest from the parent's, failed entries too: what else there is, and what does not work

The paper names the tiers; their definitions here are ours.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..types import EntrySummary, candidate_number
from . import features
from .columns import Columns, in_order
from .features import Table


SHORT = 64   # entries; four times as many are compared at most


@dataclass(frozen=True)
class Reference:
    id: str
    tier: Literal["pareto", "complementary", "exploratory"]
    why: str


def choose_references(entries: Sequence[EntrySummary], parent: str, count: int, rng: np.random.Generator) -> list[Reference]:
    """At most `count` entries other than `parent`, the tiers in turn. The order of `entries` does not matter."""
    ordered = _shortlist(*in_order(entries), parent, rng)
    table = Table.of(ordered)
    tiers = [_pareto(table), _complementary(table, parent), _exploratory(ordered, parent, rng)]
    chosen: dict[str, Reference] = {}
    while len(chosen) < count and any(tiers):
        for tier in tiers:
            while tier:
                reference = tier.pop(0)
                if reference.id != parent and reference.id not in chosen:
                    chosen[reference.id] = reference
                    break
            if len(chosen) == count:
                break
    return list(chosen.values())


def _shortlist(ordered: Sequence[EntrySummary], read: Columns, parent: str, rng: np.random.Generator) -> Sequence[EntrySummary]:
    """All, or the parent and a few hundred of a large archive: the best, the newest, and some drawn at random."""
    if len(ordered) <= 4 * SHORT:
        return ordered
    overall = np.where(read.scored, read.overall, -np.inf)
    rows = np.unique(np.concatenate([
        np.argsort(-overall, kind="stable")[: 2 * SHORT], np.arange(len(ordered) - SHORT, len(ordered)),
        rng.choice(len(ordered), SHORT, replace=False), np.flatnonzero(read.number == candidate_number(parent))]).astype(int))
    return [ordered[i] for i in rows.tolist()]


def _pareto(table: Table) -> list[Reference]:
    if not len(table):
        return []
    front = features.pareto_front(table.benchmarks(), limit=32)
    return [Reference(table.entries[i].id, "pareto", f"on the Pareto front of the benchmarks; overall {table.overall[i]:.1f}")
            for i in front]


def _complementary(table: Table, parent: str) -> list[Reference]:
    """By the largest lead over the parent on one benchmark, lower bound against the parent's value."""
    mine = next((e for e in table.entries if e.id == parent), None)
    if mine is None or not mine.score.benchmarks:
        return []
    leads = []
    for e, error in zip(table.entries, table.error, strict=True):
        common = sorted(e.score.benchmarks.keys() & mine.score.benchmarks.keys())
        other = sorted(set(e.mechanisms) - set(mine.mechanisms))
        if e.id == parent or not common or not other:
            continue
        lead, split = max((e.score.benchmarks[b] - error - mine.score.benchmarks[b], b) for b in common)
        if lead > 0:
            leads.append((-lead, candidate_number(e.id), Reference(
                e.id, "complementary", f"{lead:+.1f} points on {split} (lower bound) with {', '.join(other)}")))
    return [reference for *_, reference in sorted(leads, key=lambda x: x[:2])]


def _exploratory(ordered: Sequence[EntrySummary], parent: str, rng: np.random.Generator) -> list[Reference]:
    """By Jaccard distance of the mechanism set from the parent's; among equals a seeded draw."""
    mine = next((set(e.mechanisms) for e in ordered if e.id == parent), set())
    draw = rng.permutation(len(ordered))
    ranked = sorted(range(len(ordered)), key=lambda i: (-_distance(mine, set(ordered[i].mechanisms)), draw[i]))
    return [Reference(e.id, "exploratory", f"shares {len(mine & set(e.mechanisms))} of {len(e.mechanisms)} mechanisms with the parent"
                      + (f"; failed: {e.cause}" if e.score is None else "")) for e in (ordered[i] for i in ranked)]


def _distance(a: set[str], b: set[str]) -> float:
    return 1.0 - len(a & b) / len(a | b) if a | b else 0.0
