"""The archive as arrays. Reading 10,000 entries object by object costs more than all arithmetic on them, so the arrays are
carried on while the archive grows. Same entries, same arrays: it is a memo."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from operator import is_
from typing import Any

import numpy as np

from ..stats import spread
from ..types import EntrySummary, candidate_number


@dataclass(frozen=True)
class Named:
    """What entries hold by name: K names, sorted."""

    names: tuple[str, ...]
    values: np.ndarray  # (N, K) float, NaN where an entry lacks the name; or bool, False there

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], kind: type) -> Named:
        names = tuple(sorted({name for row in rows for name in row}))
        column, values = {name: k for k, name in enumerate(names)}, np.full((len(rows), len(names)), np.nan if kind is float else False, kind)
        for i, row in enumerate(rows):
            for name, value in row.items():
                values[i, column[name]] = value
        return cls(names, values)

    def __add__(self, more: Named) -> Named:
        names = self.names if more.names == self.names else tuple(sorted({*self.names, *more.names}))
        return Named(names, np.concatenate([self._spread(names), more._spread(names)]))

    def _spread(self, names: tuple[str, ...]) -> np.ndarray:
        """The values under more names."""
        if names == self.names:
            return self.values
        out = np.full((len(self.values), len(names)), np.nan if self.values.dtype == float else False, self.values.dtype)
        out[:, [names.index(name) for name in self.names]] = self.values
        return out


@dataclass(frozen=True)
class Columns:
    """N entries in the order given, L links to parents in the order of their children."""

    number: np.ndarray   # (N,) candidate number
    overall: np.ndarray  # (N,) points; NaN without a score
    scored: np.ndarray   # (N,) bool
    behind: np.ndarray   # (N,) points against the baseline, of those screened out, at their rung; NaN for all others
    seeds: np.ndarray    # (N,) training seeds; 0 without a score
    squares: np.ndarray  # (N,) sum of squared deviations over the seeds
    child: np.ndarray    # (L,) row
    parent: np.ndarray   # (L,) candidate number
    benchmarks: Named    # points
    behaviour: Named     # training-curve features
    mechanisms: Named    # bool

    @classmethod
    def of(cls, entries: Sequence[EntrySummary], first: int = 0) -> Columns:
        """`first`: the row of the first entry."""
        scored = np.array([e.score is not None for e in entries], bool)
        overall, seeds, squares = np.full(len(entries), np.nan), np.zeros(len(entries), int), np.zeros(len(entries))
        if scored.any():
            scores = [e.score for e in entries if e.score is not None]
            overall[scored] = [s.overall for s in scores]
            seeds[scored], squares[scored] = spread(scores)
        links = [(row, candidate_number(p)) for row, e in enumerate(entries, first) for p in e.parents]
        child, parent = (np.array(links, int) if links else np.zeros((0, 2), int)).T
        return cls(
            np.array([candidate_number(e.id) for e in entries], int), overall, scored,
            np.array([e.screened.delta if e.screened else np.nan for e in entries], float), seeds, squares, child, parent,
            Named.of([e.score.benchmarks if e.score else {} for e in entries], float), Named.of([e.behaviour for e in entries], float),
            Named.of([dict.fromkeys(e.mechanisms, True) for e in entries], bool))

    def __add__(self, more: Columns) -> Columns:
        both = [(getattr(self, f.name), getattr(more, f.name)) for f in fields(self)]
        return Columns(*(a + b if isinstance(a, Named) else np.concatenate([a, b]) for a, b in both))


class Reader:
    """Columns of a sequence of entries; of one that begins with the last one, only what was added is read."""

    def __init__(self) -> None:
        self._last: tuple[Sequence[EntrySummary], Columns] = ((), Columns.of(()))

    def __call__(self, entries: Sequence[EntrySummary]) -> Columns:
        known, columns = self._last
        if entries is known and isinstance(entries, tuple):  # a list may have changed
            return columns
        if len(entries) < len(known) or not all(map(is_, known, entries)):
            known, columns = (), Columns.of(())
        if len(entries) > len(known):
            columns = columns + Columns.of(list(islice(entries, len(known), None)), len(known))
        self._last = tuple(entries), columns
        return columns


columns = Reader()


def in_order(entries: Sequence[EntrySummary]) -> tuple[Sequence[EntrySummary], Columns]:
    """By candidate number, with their columns."""
    read = columns(entries)
    if (np.diff(read.number) > 0).all():
        return entries, read
    ordered = tuple(entries[i] for i in np.argsort(read.number, kind="stable").tolist())
    return ordered, columns(ordered)
