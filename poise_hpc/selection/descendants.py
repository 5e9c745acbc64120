"""The regression target of the GP term: an entry's discounted top-K descendant gain."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..types import EntrySummary
from .columns import Columns, columns

GENERATIONS = 8  # further descendants are not looked at; at discount 0.7 the 8th weighs 0.08


@dataclass(frozen=True)
class Lineage:
    """Of all entries, failed ones too. E entries, in the order given."""

    gain: np.ndarray      # (E,) points; NaN without a scored descendant
    depth: np.ndarray     # (E,) generations from an entry without (known) parents
    children: np.ndarray  # (E,)
    failed: np.ndarray    # (E,) children without a score


def lineage(entries: Sequence[EntrySummary], lower: np.ndarray, overall: np.ndarray, discount: float, top_k: int) -> Lineage:
    """Gains of `entries`, which stand in an order where parents come before children.

        g(d) = mean of the top K over descendants e of d, k generations away, of discount^(k-1) (lower(e) - overall(d))

    `overall` (E,) and `lower` (E,) confidence bound, NaN for failed entries. A descendant counts with its lower bound:
    the best of many children is the one most likely to have been lucky. By several ways down, the shortest counts.
    """
    count = len(entries)
    parent, child = _links(columns(entries))
    depths = [0] * count
    for p, c in zip(parent.tolist(), child.tolist(), strict=True):  # parents stand first, so theirs is final
        depths[c] = max(depths[c], depths[p] + 1)
    depth = np.array(depths, int)

    # (ancestor, descendant) pairs, one generation after the other: each pair's ancestor is replaced by its parents.
    starts = np.searchsorted(child, np.arange(count + 1))
    pairs, gains = [np.zeros(0, int)], [np.zeros(0)]
    up, down = parent, child
    for generation in range(GENERATIONS):
        pair = np.sort(up * count + down)
        pair = pair[np.diff(pair, prepend=-1) > 0]  # several ways of one length
        if not pair.size:
            break
        up, down = np.divmod(pair, count)
        pairs.append(pair)
        gains.append(discount**generation * (lower[down] - overall[up]))
        fan = starts[up + 1] - starts[up]
        slot = np.arange(fan.sum()) + np.repeat(starts[up] - (np.cumsum(fan) - fan), fan)
        up, down = parent[slot], np.repeat(down, fan)
    pair, first = np.unique(np.concatenate(pairs), return_index=True)  # several lengths: the first is the shortest
    children = np.bincount(parent, minlength=count)
    failed = np.bincount(parent[np.isnan(overall[child])], minlength=count)
    return Lineage(_top_mean(pair // count, np.concatenate(gains)[first], count, top_k), depth, children, failed)


def _links(read: Columns) -> tuple[np.ndarray, np.ndarray]:
    """(parent, child) as rows, of parents that are entries."""
    order = np.argsort(read.number, kind="stable")
    place = order[np.searchsorted(read.number, read.parent, sorter=order).clip(max=max(len(order) - 1, 0))]
    known = read.number[place] == read.parent
    return place[known], read.child[known]


def _top_mean(who: np.ndarray, gain: np.ndarray, count: int, top_k: int) -> np.ndarray:
    """(count,) mean of each ancestor's `top_k` largest gains; NaN without any."""
    who, gain = who[np.isfinite(gain)], gain[np.isfinite(gain)]
    order = np.lexsort((-gain, who))
    who, gain = who[order], gain[order]
    top = np.arange(len(who)) - np.searchsorted(who, who) < top_k
    number = np.bincount(who[top], minlength=count)
    total = np.bincount(who[top], gain[top], count)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)
