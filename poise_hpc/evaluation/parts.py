"""How an element's completions are cut into chunks, and how the parts that jobs made of single chunks become the element again.
Pure functions, standard library only.

A *chunk* is what is computed together: all samples of some problems, or some samples of one problem. A *part* is one chunk as the
work of a job of its own (`jobs.evaluate_by: chunk`), in a result file of its own. Whoever computes a chunk computes the same batch
with the same random numbers: an element put together from parts is, to the bit, the one that a single job would have made.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

COUNTS = ("correct", "valid", "truncated", "length")  # per problem, summed over its samples; length in tokens
CUT = "@"  # in a part's name, "0.5-hard@3": no benchmark's name has one


@dataclass(frozen=True)
class Chunk:
    problems: tuple[int, ...]  # their places in the benchmark's list
    first: int                 # samples first .. first + n - 1 of each
    n: int

    def rows(self, samples: int) -> list[int]:
        """Where its completions belong: row i * samples + j of the element is sample j of problem i."""
        return [i * samples + j for i in self.problems for j in range(self.first, self.first + self.n)]


def cut(lengths: Sequence[int], samples: int, most: int) -> list[Chunk]:
    """Chunks of at most `most` completions. `lengths`: of the problems' prompts; similar ones go together, so that what is padded,
    or waited for, is little."""
    if samples > most:
        return [Chunk((i,), first, min(most, samples - first)) for i in range(len(lengths)) for first in range(0, samples, most)]
    order, per = sorted(range(len(lengths)), key=lambda i: lengths[i]), most // samples  # stable: equal lengths stay in their order
    return [Chunk(tuple(order[i:i + per]), 0, samples) for i in range(0, len(order), per)]


def count(problems: int, samples: int, most: int) -> int:
    """How many chunks `cut` makes: known without the problems."""
    return problems * -(-samples // most) if samples > most else -(-problems // (most // samples))


def figures(counts: Mapping[str, Any], n: int) -> dict[str, Any]:
    """What a whole element says, of counts over its n samples a problem. A component's mean is rounded once: it is the same however
    the samples were cut."""
    rows = n * len(counts["correct"])
    return {"correct": counts["correct"], "valid": counts["valid"], "truncated": counts["truncated"],
            "mean_length": [length / n for length in counts["length"]],
            "components": {name: float(Fraction(*total) / rows) for name, total in counts["components"].items()}}


def total(values: Iterable[float]) -> list[int]:
    """Their exact sum, as numerator and denominator."""
    return list(sum(map(Fraction, values), Fraction(0)).as_integer_ratio())


def merge(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The element that these make up, in whatever order they come; None while one is missing. A whole element is all there is of it."""
    any_one = parts[0]
    if "of" not in any_one:
        return dict(any_one)
    if len(parts) < any_one["of"]:
        return None
    ids = {place: id for part in parts for place, id in zip(part["places"], part["problem_ids"], strict=True)}
    counts: dict[str, Any] = {name: [0] * len(ids) for name in COUNTS}
    for part in parts:
        for name in COUNTS:
            for place, value in zip(part["places"], part[name], strict=True):
                counts[name][place] += value
    counts["components"] = {name: total(Fraction(*part["components"][name]) for part in parts) for name in any_one["components"]}
    own = {"of", "places", "first", "samples", "npz_sha256", *counts}
    return {key: value for key, value in any_one.items() if key not in own} | {
        "problem_ids": [ids[place] for place in range(len(ids))], "seconds": math.fsum(part["seconds"] for part in parts),
        **figures(counts, any_one["n"])}


def rows(found: Mapping[str, Any]) -> Sequence[int]:
    """Where the completions of a part, or of a whole element, belong in the element."""
    if "of" not in found:
        return range(found["n"] * len(found["problem_ids"]))
    return Chunk(tuple(found["places"]), found["first"], found["samples"]).rows(found["n"])
