"""The regression target of the GP term: an entry's discounted top-K descendant gain."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .columns import Columns

GENERATIONS = 8  # further descendants are not looked at; at discount 0.7 the 8th weighs 0.08


@dataclass(frozen=True)
class Lineage:
    """Of all entries, failed ones too. E entries, in the order given."""

    gain: np.ndarray      # (E,) points; NaN without a scored descendant
    depth: np.ndarray     # (E,) generations from an entry without (known) parents
    children: np.ndarray  # (E,)
    failed: np.ndarray    # (E,) children that failed


def lineage(read: Columns, lower: np.ndarray, own: np.ndarray, discount: float, top_k: int) -> Lineage:
    """Gains of entries, which stand in an order where parents come before children.

        g(d) = mean of the top K over descendants e of d, k generations away, of discount^(k-1) (lower(e) - own(d))

    `lower` (E,) of descendants and `own` (E,) of the entry itself, NaN for failed entries. The same bound for both: of a
    descendant's `lower` less an entry's raw score, luck and all, the mean would be negative where nothing is gained or lost. What
    was screened out has no `own`, and in `lower` it is as far below the baseline as it was at its rung. By several ways down, the
    shortest counts.
    """
    found, count = genealogy(read), len(read.number)
    weight = np.array([discount**k for k in range(GENERATIONS)])
    gains = weight[found.generation - 1] * (lower[found.down] - own[found.up])
    child = found.generation == 1
    return Lineage(_top_mean(found.up, gains, count, top_k), found.depth, np.bincount(found.up[child], minlength=count),
                   np.bincount(found.up[child & np.isnan(lower[found.down])], minlength=count))


@dataclass(frozen=True)
class Pairs:
    """P pairs of ancestor and descendant, sorted by them, at most GENERATIONS apart. E entries."""

    up: np.ndarray          # (P,) row of the ancestor
    down: np.ndarray        # (P,) row of the descendant
    generation: np.ndarray  # (P,) length of the shortest way down
    depth: np.ndarray       # (E,) length of the longest way up


class Genealogy:
    """Pairs of an archive; of one that begins with the last one, only what was added is looked up."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        none = np.zeros(0, int)
        self._number, self._child, self._parent = none, none, none     # of the last columns
        self._row: dict[int, int] = {}                                 # candidate number -> row
        self._above: list[dict[int, int]] = []                         # row -> its ancestors' rows, with generations
        self._pairs = Pairs(none, none, none, none)

    def __call__(self, read: Columns) -> Pairs:
        seen, links = len(self._number), len(self._child)
        if not (np.array_equal(read.number[:seen], self._number) and np.array_equal(read.parent[:links], self._parent)
                and np.array_equal(read.child[:links], self._child)):
            self._begin()
            seen = links = 0
        if len(read.number) > seen:
            self._add(read, seen, links)
            self._number, self._child, self._parent = read.number, read.child, read.parent
        return self._pairs

    def _add(self, read: Columns, seen: int, links: int) -> None:
        parents: dict[int, list[int]] = {}
        for row, number in zip(read.child[links:].tolist(), read.parent[links:].tolist(), strict=True):
            parents.setdefault(row, []).append(number)
        depth = self._pairs.depth.tolist()
        pairs: list[tuple[int, int, int]] = []
        for row, number in enumerate(read.number[seen:].tolist(), seen):
            self._row[number] = row
            known = [self._row[p] for p in parents.get(row, ()) if p in self._row]
            above: dict[int, int] = {}
            for way in [(p, 1) for p in known] + [(up, k + 1) for p in known for up, k in self._above[p].items() if k < GENERATIONS]:
                above[way[0]] = min(way[1], above.get(way[0], GENERATIONS))
            self._above.append(above)
            depth.append(max((depth[p] + 1 for p in known), default=0))
            pairs += [(up, row, k) for up, k in above.items()]
        up, down, generation = (np.concatenate(both) for both in zip(
            (self._pairs.up, self._pairs.down, self._pairs.generation), np.array(pairs, int).reshape(-1, 3).T, strict=True))
        order = np.argsort(up, kind="stable")  # what is added comes from below: down stays sorted
        self._pairs = Pairs(up[order], down[order], generation[order], np.array(depth, int))


genealogy = Genealogy()


def _top_mean(who: np.ndarray, gain: np.ndarray, count: int, top_k: int) -> np.ndarray:
    """(count,) mean of each ancestor's `top_k` largest gains; NaN without any. `who` is sorted."""
    finite = np.isfinite(gain)
    who, gain = who[finite], gain[finite]
    number, total = np.zeros(count, int), np.zeros(count)
    first = np.flatnonzero(np.diff(who, prepend=-1))  # of each ancestor's gains
    ancestor, group = who[first], np.repeat(np.arange(len(first)), np.diff(first, append=len(who)))
    for _ in range(top_k if len(who) else 0):  # the largest of each, then the next: a sort of them all costs several times that
        best = np.maximum.reduceat(gain, first)
        left = np.isfinite(best)
        number[ancestor[left]] += 1
        total[ancestor[left]] += best[left]
        equal = np.flatnonzero(gain == best[group])
        gain[equal[np.diff(group[equal], prepend=-1) > 0]] = -np.inf
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)
