"""What a score is worth: the best of many is partly luck, so it is drawn towards what its kin make likely.

    m_i = mean + sum over kin j of (y_j - mean) / (n_i + KIN)        parents and children of i, n_i of them
    t^2 = (START s^2 + sum_i (y_i - m_i)^2 - e_i^2) / (START + N)    how far true scores lie from m, from the scores themselves
    value_i = m_i + t^2 / (t^2 + e_i^2) (y_i - m_i)                  posterior mean of i's true Overall

e_i is the standard error over seeds, s the pooled standard deviation of one seed. An empirical Bayes estimate (Efron & Morris 1973,
James-Stein) whose prior mean differs from entry to entry: with equal seeds, drawing all to one mean would not change any order.

Without two seeds of anything no noise is known, and nothing is drawn anywhere. Not used: mechanisms (a Gaussian process over them
predicted a held-out seed hardly better, docs/SEARCH.md), training curves (they share the seed's luck).
"""
from __future__ import annotations

import numpy as np

from .columns import Columns

KIN = 2.0    # relatives' worth of the overall mean in m: scores one change apart correlate by about 1/3 (docs/SEARCH.md), (1 - r) / r
START = 4.0  # entries' worth of the assumption that true scores vary as much as one seed does


def shrunk(read: Columns, rows: np.ndarray, error: np.ndarray, noise: float) -> np.ndarray:
    """(N,) `value` of the scored `rows` of the archive; `error` (N,), `noise` s, points."""
    y = read.overall[rows]
    if not rows.size or not error.any():
        return y
    m = _expected(read, rows, y)
    t2 = (START * noise**2 + ((y - m) ** 2 - error**2).sum()) / (START + len(y))
    t2 = max(t2, (noise / 10) ** 2)  # the order among equals stays
    return m + t2 / (t2 + error**2) * (y - m)


def _expected(read: Columns, rows: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(N,) m."""
    place = np.full(len(read.number), -1)  # archive row -> place in `rows`
    place[rows] = np.arange(len(rows))
    order = np.argsort(read.number, kind="stable")
    found = np.searchsorted(read.number, read.parent, sorter=order)
    known = found < len(order)
    parent = np.where(known, order[np.minimum(found, len(order) - 1)], 0)
    known &= read.number[parent] == read.parent
    up, down = np.where(known, place[parent], -1), place[read.child]
    both = (up >= 0) & (down >= 0)
    one, other = np.concatenate([up[both], down[both]]), np.concatenate([down[both], up[both]])
    count, total = np.bincount(one, minlength=len(y)), np.bincount(one, (y - y.mean())[other], minlength=len(y))
    return y.mean() + total / (count + KIN)
