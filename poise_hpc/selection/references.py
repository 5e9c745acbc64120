"""The tiered reference set: which other entries a proposer sees besides the parent (POISE, arXiv:2603.23951).

    Pareto         best on some benchmark split: what works
    complementary  better than the parent where the parent is weak, with other mechanisms: what could be joined
    exploratory    mechanisms furthest from the parent's, failed entries too: what else there is, and what does not work

The paper names the tiers; their definitions here are ours.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..config import References
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


def choose_references(entries: Sequence[EntrySummary], parent: str, wanted: References, rng: np.random.Generator) -> list[Reference]:
    """Entries other than `parent`, the tiers in turn, each up to its number; then, where one has run dry, the others up to the
    whole number. The order of `entries` does not matter."""
    ordered, read = in_order(entries)
    rows, mine = _shortlist(read, parent, rng), read.number == candidate_number(parent)
    table = Table.of(ordered, read)
    table = table.take(np.flatnonzero(np.isin(table.rows, rows)))
    tiers = [("pareto", _pareto(table)), ("complementary", _complementary(table, mine)), ("exploratory", _exploratory(ordered, read, rows, mine, rng))]
    left = wanted.model_dump()
    tiers = [(name, found) for name, found in tiers if left[name]]
    count, chosen = sum(left.values()), dict[str, Reference]()
    while tiers and len(chosen) < count:
        name, found = tiers.pop(next((i for i, (name, _) in enumerate(tiers) if left[name] > 0), 0))
        reference = next((r for r in found if r.id != parent and r.id not in chosen), None)
        if reference is not None:
            chosen[reference.id] = reference
            left[name] -= 1
            tiers.append((name, found))
    return list(chosen.values())


def _shortlist(read: Columns, parent: str, rng: np.random.Generator) -> np.ndarray:
    """Rows to look at: all, or the parent and a few hundred of a large archive: the best, the newest, some drawn at random."""
    count = len(read.number)
    if count <= 4 * SHORT:
        return np.arange(count)
    overall = np.where(read.scored, read.overall, -np.inf)
    return np.unique(np.concatenate([
        np.argsort(-overall, kind="stable")[: 2 * SHORT], np.arange(count - SHORT, count),
        rng.choice(count, SHORT, replace=False), np.flatnonzero(read.number == candidate_number(parent))]).astype(int))


def _pareto(table: Table) -> Iterator[Reference]:
    if len(table):
        for i in features.pareto_front(table.benchmarks(), limit=32):
            yield Reference(table.entry(i).id, "pareto", f"on the Pareto front of the benchmarks; overall {table.overall[i]:.1f}")


def _complementary(table: Table, mine: np.ndarray) -> Iterator[Reference]:
    """By the largest lead over the parent on one benchmark, lower bound against the parent's value, of entries that have a
    mechanism which the parent lacks. `mine`: the parent among the archive's rows."""
    parent, has = np.flatnonzero(mine), table.columns.mechanisms
    if not np.isin(parent, table.rows).any():
        return
    benchmarks = table.columns.benchmarks
    ahead = benchmarks.values[table.rows] - table.error[:, None] - benchmarks.values[parent]
    ahead[np.isnan(ahead)] = -np.inf
    other = has.values[table.rows] & ~has.values[parent]
    lead = np.where(other.any(axis=1), ahead.max(axis=1, initial=-np.inf), -np.inf)
    for i in np.argsort(-lead, kind="stable")[: np.count_nonzero(lead > 0)]:
        names = [has.names[m] for m in np.flatnonzero(other[i])]
        yield Reference(table.entry(i).id, "complementary", f"{lead[i]:+.1f} points on {benchmarks.names[int(np.argmax(ahead[i]))]} "
                        f"(lower bound) with {', '.join(names)}")


def _exploratory(ordered: Sequence[EntrySummary], read: Columns, rows: np.ndarray, mine: np.ndarray, rng: np.random.Generator) -> Iterator[Reference]:
    """By Jaccard distance of the mechanism set from the parent's; among equals a seeded draw."""
    has = read.mechanisms.values[rows]
    parent = read.mechanisms.values[mine].any(axis=0)
    shared, either = (has & parent).sum(axis=1), (has | parent).sum(axis=1)
    for i in np.lexsort((rng.permutation(len(rows)), shared / np.maximum(either, 1) + (either == 0))):
        e = ordered[rows[i]]
        yield Reference(e.id, "exploratory", f"shares {shared[i]} of {len(e.mechanisms)} mechanisms with the parent"
                        + (f"; screened out: {e.cause}" if e.screened else f"; failed: {e.cause}" if e.score is None else ""))
