"""The regression target of the GP term: an entry's discounted top-K descendant gain."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..types import EntrySummary

GENERATIONS = 12  # further descendants are not looked at; at discount 0.7 the 12th weighs 0.02


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
    place = {e.id: i for i, e in enumerate(entries)}
    edges = [(place[p], i) for i, e in enumerate(entries) for p in e.parents if p in place]
    parent, child = (np.array(edges, int) if edges else np.zeros((0, 2), int)).T
    depth = np.zeros(count, int)
    for p, c in edges:  # parents stand first, so theirs is final
        depth[c] = max(depth[c], depth[p] + 1)

    # (ancestor, descendant) pairs, one generation after the other: each pair's ancestor is replaced by its parents.
    starts = np.searchsorted(child, np.arange(count + 1))
    up, down, seen, kept = parent, child, np.zeros(0, int), []
    for generation in range(GENERATIONS):
        code, first = np.unique(up * count + down, return_index=True)
        new = first[~np.isin(code, seen, assume_unique=True)]
        up, down = up[new], down[new]
        if not up.size:
            break
        seen = np.concatenate([seen, up * count + down])
        kept.append((up, discount**generation * (lower[down] - overall[up])))
        fan = starts[up + 1] - starts[up]
        slot = np.arange(fan.sum()) - np.repeat(np.cumsum(fan) - fan, fan) + np.repeat(starts[up], fan)
        up, down = parent[slot], np.repeat(down, fan)
    children = np.bincount(parent, minlength=count)
    failed = np.bincount(parent[np.isnan(overall[child])], minlength=count)
    return Lineage(_top_mean(kept, count, top_k), depth, children, failed)


def _top_mean(kept: list[tuple[np.ndarray, np.ndarray]], count: int, top_k: int) -> np.ndarray:
    """(count,) mean of each ancestor's `top_k` largest gains; NaN without any."""
    out = np.full(count, np.nan)
    if not kept:
        return out
    who, gain = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    who, gain = who[np.isfinite(gain)], gain[np.isfinite(gain)]
    order = np.lexsort((-gain, who))
    who, gain = who[order], gain[order]
    rank = np.arange(len(who)) - np.searchsorted(who, who)
    who, gain = who[rank < top_k], gain[rank < top_k]
    number = np.bincount(who, minlength=count)
    out[number > 0] = (np.bincount(who, gain, count)[number > 0] / number[number > 0])
    return out
