"""Which sequences attention takes together: few rectangles, little padding.

A sequence is a prompt of p tokens that is computed elsewhere, and c tokens after it: a completion, or a prompt itself with p = 0.
Attention takes n of them at once, padded to the longest of each (P, C; S of p + c), in one of two ways:

    after the prompt   queries: the c tokens. Keys: prompt, padding, the c tokens, padding; with a mask. n C (P + C) cells
    whole              queries and keys: prompt and c tokens without a gap, then padding. Causal without a mask, so that kernels leave out
                       what nobody may look at; the prompt's queries are computed again and dropped. n S (S + tile) / 2 cells

Short completions of long prompts are cheaper the first way, those longer than their prompt the second. `split` sorts by c and cuts
the order into buckets such that cells + price x buckets is least: a dynamic programme, the same buckets for the same lengths. Rounding
is all that depends on them.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
TILE = 256     # a causal kernel takes whole tiles of queries; of this size PyTorch's on the CPU, where they are longest
SHARE = 0.015  # price of a bucket, as a share of the cells without any padding ...
FLOOR = 8192   # ... and at least: what a call costs beside its arithmetic, in cells of a small model
GRID = 64      # cuts are at multiples of 1/64 of the longest c


@dataclass(frozen=True)
class Bucket:
    """n sequences in one rectangle."""

    members: Numbers  # (n,) ascending
    prompt: int       # P
    whole: bool
    queries: int      # of a row: S, or C, then the last ones of its keys
    keys: int         # S, or P + C

    @property
    def cells(self) -> int:
        return len(self.members) * int(triangle(self.keys) if self.whole else self.queries * self.keys)


def bucket(members: Numbers, p: Numbers, c: Numbers) -> Bucket:
    """Of these members, which have these p and c (n,)."""
    P, C, S = int(p.max()), int(c.max()), int((p + c).max())
    causal = whole(P, C, S)
    return Bucket(members, P, causal, S if causal else C, S if causal else P + C)


def whole(P: int, C: int, S: int) -> bool:
    """Is this way the cheaper one?"""
    return bool(triangle(S) <= C * (P + C))


def triangle(S: Any) -> Any:
    return S * (S + np.minimum(S, TILE)) // 2


def cells(n: Any, P: Any, C: Any, S: Any) -> Any:
    return n * np.minimum(triangle(S), C * (P + C))


def of_microbatch(size: Numbers, rest: Numbers, group: Numbers) -> tuple[list[Bucket], list[Bucket]]:
    """Of prompts of `size` (G,), and of completions of `rest` (B,) tokens after the prompts `group` (B,)."""
    none, p = 0 * size, size[group]
    price = max(FLOOR, int(SHARE * (needed(none, size) + needed(p, rest))))
    return split(none, size, price), split(p, rest, price)


def split(p: Numbers, c: Numbers, price: int) -> list[Bucket]:
    """Buckets of all sequences with c > 0, the shortest first, at this price of each, in cells."""
    members = np.flatnonzero(c)
    if not len(members):
        return []
    one = bucket(members, p[members], c[members])
    if one.cells - needed(p, c) <= price:
        return [one]
    members = members[np.argsort(c[members], kind="stable")]
    edges = cuts(p[members], c[members], price)
    parts = [np.sort(members[a:b]) for a, b in zip(edges, edges[1:])]
    return [bucket(part, p[part], c[part]) for part in parts]


def needed(p: Numbers, c: Numbers) -> int:
    """Cells without any padding."""
    return int(cells(1, p, c, p + c).sum())


def cuts(p: Numbers, c: Numbers, price: int) -> list[int]:
    """Edges, from 0 to the number of sequences, which are in the order of c."""
    steps = -(-c * GRID // c[-1])
    at = np.concatenate([[0], np.flatnonzero(steps[1:] > steps[:-1]) + 1, [len(c)]])  # where a bucket may begin or end
    U = len(at) - 1
    later = np.arange(U) >= np.arange(U)[:, None]

    def most(x: Numbers) -> NDArray[np.int64]:  # [i, j]: of the sequences from edge i to edge j + 1
        return np.maximum.accumulate(np.where(later, np.maximum.reduceat(x, at[:-1]), 0), 1)

    costs = cells(at[1:] - at[:-1, None], most(p), most(c), most(p + c)) + price
    least, last = np.zeros(U + 1, np.int64), np.zeros(U + 1, np.int64)  # of all before edge j: their price, and where the last bucket begins
    for j in range(1, U + 1):
        sums = least[:j] + costs[:j, j - 1]
        last[j] = sums.argmin()
        least[j] = sums[last[j]]
    edges = [U]
    while edges[-1]:
        edges.append(int(last[edges[-1]]))
    return at[edges[::-1]].tolist()
