"""Entries as arrays, and the three terms of the acquisition that need no regression. N entries, D benchmarks, M mechanisms."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..stats import seed_noise
from ..types import EntrySummary
from .columns import Columns
from .shrinkage import shrunk

OBJECTIVES = {  # less is better; None: not known
    "length": lambda e: e.behaviour.get("length_ratio"),  # of completions, end of training against its start
    "cost": lambda e: e.run_seconds}
NEIGHBOURS = 5  # an entry is as different as it is from its nearest few


@dataclass(frozen=True)
class Table:
    """Scored entries, in the order given, with what every term needs."""

    archive: Sequence[EntrySummary]
    columns: Columns         # of `archive`
    rows: np.ndarray         # (N,) of `archive`: these entries
    overall: np.ndarray      # (N,) points
    value: np.ndarray        # (N,) points: `overall`, drawn to what its kin make likely (`shrinkage`)
    error: np.ndarray        # (N,) standard error of `overall`, points
    noise: float             # points: pooled sd of one training seed; 1.0 where it is not known

    @classmethod
    def of(cls, entries: Sequence[EntrySummary], read: Columns | None = None) -> Table:
        """Those of `entries` with a score. `read`: the columns of `entries`, where they are known."""
        read = read or Columns.of(entries)
        rows = np.flatnonzero(read.scored)
        error, pooled = seed_noise(read.seeds[rows], read.squares[rows])
        return cls(entries, read, rows, read.overall[rows], shrunk(read, rows, error, pooled or 1.0), error, pooled or 1.0)

    def entry(self, i: int) -> EntrySummary:
        return self.archive[self.rows[i]]

    @property
    def entries(self) -> list[EntrySummary]:
        return [self.archive[row] for row in self.rows.tolist()]

    @property
    def lower(self) -> np.ndarray:
        """One standard error below what the score is worth: neither a lucky seed nor the luckiest of many gets far."""
        return self.value - self.error

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, some: np.ndarray) -> Table:
        return Table(self.archive, self.columns, self.rows[some], self.overall[some], self.value[some], self.error[some], self.noise)

    def benchmarks(self) -> np.ndarray:
        """(N, D) lower confidence per benchmark, over those that all entries have; (N, 1) `lower` if there is none.

        A benchmark's own seed spread is not in the summary; what Overall loses, to which it adds up, stands in for it.
        """
        values = self.columns.benchmarks.values[self.rows]
        common = values[:, ~np.isnan(values).any(axis=0)]
        return common - (self.overall - self.lower)[:, None] if common.shape[1] else self.lower[:, None]

    def objectives(self, names: Sequence[str]) -> np.ndarray:
        """(N, K) the OBJECTIVES of these names, turned so that more is better; -inf where an entry lacks one."""
        rows = [[OBJECTIVES[name](e) for name in names] for e in self.entries]
        return np.array([[-np.inf if v is None else -v for v in row] for row in rows]).reshape(len(self), len(names))

    def mechanisms(self) -> np.ndarray:
        """(N, M) 1 where the entry has the mechanism, of those that any of them has."""
        values = self.columns.mechanisms.values[self.rows]
        return values[:, values.any(axis=0)].astype(float)

    def behaviour(self) -> np.ndarray:
        """(N, F) training-curve features, standardized; what an entry lacks is 0, the mean."""
        values = self.columns.behaviour.values[self.rows]
        return standardized(values[:, ~np.isnan(values).all(axis=0)])


def standardized(x: np.ndarray) -> np.ndarray:
    """Columns to mean 0 and sd 1, NaN to 0; a constant column becomes 0."""
    known = np.isfinite(x)
    count = np.maximum(known.sum(axis=0), 1)
    centred = np.where(known, x - np.where(known, x, 0.0).sum(axis=0) / count, 0.0)
    sd = np.sqrt((centred**2).sum(axis=0) / count)
    return centred / np.where(sd > 1e-12, sd, 1.0)


def pareto_strength(values: np.ndarray) -> np.ndarray:
    """(N,) U_pareto = 1 - (entries that dominate it) / (N - 1); 1 on the front. `values` (N, D), more is better."""
    n = len(values)
    at_least, better = np.ones((n, n), bool), np.zeros((n, n), bool)
    for column in values.T:
        at_least &= column[:, None] >= column
        better |= column[:, None] > column
    return 1.0 - (at_least & better).sum(axis=0) / max(n - 1, 1)


def pareto_front(values: np.ndarray, limit: int) -> np.ndarray:
    """Rows of the first front of `values` (N, D), at most `limit`, best sum first."""
    alive, front = np.argsort(-values.sum(axis=1), kind="stable"), []
    while alive.size and len(front) < limit:
        first = alive[0]  # the largest sum among those left: nothing left dominates it
        front.append(first)
        alive = alive[1:][(values[alive[1:]] > values[first]).any(axis=1)]
    return np.array(front, int)


def normalized(values: np.ndarray, floor: float) -> np.ndarray:
    """To [0, 1] between the lower quartile and the best; a spread below `floor` (the noise) is not blown up."""
    low, high = np.quantile(values, 0.25), values.max()
    return np.clip((values - low) / max(high - low, floor), 0.0, 1.0)


def jaccard(mechanisms: np.ndarray) -> np.ndarray:
    """(N, N) 1 - |A and B| / |A or B| of mechanism sets; two empty sets are equal."""
    both = mechanisms @ mechanisms.T
    size = mechanisms.sum(axis=1)
    either = size[:, None] + size - both
    return 1.0 - np.where(either > 0, both / np.maximum(either, 1.0), 1.0)


def distances(x: np.ndarray) -> np.ndarray:
    """(N, N) root mean square difference of rows."""
    squared = (x**2).sum(axis=1)
    return np.sqrt(np.maximum(squared[:, None] + squared - 2 * x @ x.T, 0.0) / max(x.shape[1], 1))


def diversity(table: Table) -> np.ndarray:
    """(N,) U_div in [0, 1]: distance to the nearest entries, half mechanism sets, half training behaviour."""
    if len(table) < 2:
        return np.ones(len(table))
    apart = distances(table.behaviour())
    pair = 0.5 * jaccard(table.mechanisms()) + 0.5 * apart / (1.0 + apart)
    np.fill_diagonal(pair, np.inf)
    nearest = min(NEIGHBOURS, len(table) - 1)
    return np.sort(np.partition(pair, nearest - 1, axis=1)[:, :nearest], axis=1).mean(axis=1)
