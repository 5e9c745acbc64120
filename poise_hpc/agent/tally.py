"""What every offline proposal needs to know of the whole archive, carried on as it grows: 10,000 entries are not walked again
for one more. Same entries, same figures: it is a memo, and another archive than the last one starts it anew."""
from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, islice
from operator import is_
from statistics import median

from ..types import BASELINE_ID, EntrySummary, Outcome
from . import novelty
from .catalogue import parts


class Tally:
    def __init__(self, entries: Sequence[EntrySummary] = ()):
        self._clear(None)
        self.see(entries)

    def _clear(self, reference: float | None) -> None:
        self.entries: Sequence[EntrySummary] = ()
        self.names: dict[str, int] = {}                    # name without its number -> the highest number
        self._reference = reference                        # Overall points
        self._gains: dict[str, tuple[float, int]] = {}     # part -> sum of (Overall - reference), number of entries
        self._pairs: dict[bool, set[tuple[str, str]]] = {True: set(), False: set()}  # of mechanisms, by success
        self._signed: dict[str, list[int]] = {}            # digest of a novelty signature -> places in `entries`
        self._unsigned: list[int] = []

    def see(self, entries: Sequence[EntrySummary]) -> Tally:
        reference = _reference(entries)
        if reference != self._reference or len(entries) < len(self.entries) or not all(map(is_, self.entries, entries)):
            self._clear(reference)
        for place, entry in enumerate(islice(entries, len(self.entries), None), len(self.entries)):
            self._add(place, entry)
        self.entries = entries
        return self

    def _add(self, place: int, entry: EntrySummary) -> None:
        assert self._reference is not None
        if entry.cause != "duplicate":  # not its parts' failure
            gain = entry.score.overall - self._reference if entry.score else entry.screened.delta if entry.screened else -5.0
            for name in set(entry.mechanisms) & parts().keys():
                total, number = self._gains.get(name, (0.0, 0))
                self._gains[name] = total + gain, number + 1
            self._pairs[entry.outcome != Outcome.CANDIDATE_ERROR].update(combinations(sorted(entry.mechanisms), 2))
        count_name(self.names, entry.name)
        python, *signs = entry.signature.split() or [""]
        if python != novelty.PYTHON:
            self._unsigned.append(place)
        for sign in signs:
            self._signed.setdefault(sign, []).append(place)

    @property
    def track_record(self) -> dict[str, float]:
        """Part -> Overall over the baseline, summed over the entries that have it and divided by their number + 2 (shrinkage:
        one lucky run is not a fact). A failure counts as 5 points lost, once; who was screened out, with the difference at the rung."""
        return {name: total / (number + 2) for name, (total, number) in self._gains.items()}

    @property
    def failed_pairs(self) -> set[tuple[str, str]]:
        """Pairs of mechanisms seen in failed candidates and in none that ran."""
        return self._pairs[False] - self._pairs[True]

    def knows(self, sign: str) -> bool:
        return sign in self._signed

    def alike(self, signature: str) -> tuple[EntrySummary, ...]:
        """Entries that the novelty gate has to look at for a draft of this signature, in order."""
        places = set(self._unsigned).union(*(self._signed.get(sign, ()) for sign in signature.split()[1:]))
        return tuple(self.entries[place] for place in sorted(places))


def count_name(names: dict[str, int], name: str) -> None:
    """Add "X", which is X's number 1, or "X-3"."""
    base, _, number = name.rpartition("-")
    base, number = (base, int(number)) if base and number.isdecimal() else (name, 1)
    names[base] = max(number, names.get(base, 0))


def _reference(entries: Sequence[EntrySummary]) -> float:
    """The baseline's Overall; without one the median of all."""
    base = next((e.score.overall for e in entries if e.id == BASELINE_ID and e.score), None)
    if base is not None:
        return base
    scores = [e.score.overall for e in entries if e.score]
    return median(scores) if scores else 0.0
