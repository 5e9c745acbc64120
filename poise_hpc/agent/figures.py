"""Figures in free text, checked against what its author was shown.

A figure stands if it was shown, to the digits that are written, as a share or in percent; or if it is the difference, the ratio or the
percentage of two such figures that stand beside it. Not looked at: code, ids and names, steps, and counts up to TEN.

Not seen: a right figure in a wrong place. Whose it is, citations say.
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations

TEN = 10
BESIDE = 160  # characters
MARK = " [not in the record]"
FIGURE = re.compile(r"(?<![\w.@/#:])(?<![A-Za-z]-)(?P<number>\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)(?P<unit>\s?%|x\b|×)?(?![\w@])")
STEPS = r"\bsteps?\s+\d+(?:\s*(?:-|–|to|and|or|,)\s*\d+)*|\b\d+(?:[-–]\d+)?[-\s]steps?\b"
PASSED_OVER = re.compile(rf"```.*?```|`[^`\n]*`|arXiv:\S+|https?://\S+|{STEPS}", re.S | re.I)


@dataclass(frozen=True)
class Figure:
    start: int
    end: int
    value: float      # without its sign
    half: float       # half a unit of its last digit
    percent: bool
    text: str


def found(text: str) -> list[Figure]:
    """The figures of a text that have to stand somewhere, in order."""
    bare = PASSED_OVER.sub(lambda m: " " * len(m[0]), text)
    out = [_figure(m) for m in FIGURE.finditer(bare)]
    return [f for f in out if not (f.value in (*range(TEN + 1), 100) and f.half == 0.5 and not f.percent)]


def _figure(m: re.Match[str]) -> Figure:
    mantissa, _, exponent = m["number"].lower().partition("e")
    digits = len(mantissa.partition(".")[2])
    return Figure(m.start(), m.end(), float(m["number"]), 0.5 * 10.0 ** (int(exponent or 0) - digits), "%" in (m["unit"] or ""), m[0].strip())


def unknown(text: str, shown: str) -> list[Figure]:
    """Figures of `text` that do not stand in `shown`."""
    values = [_figure(m) for m in FIGURE.finditer(shown)]
    figures = found(text)
    known = [f for f in figures if _shown(f, values)]
    return [f for f in figures if f not in known and not _derived(f, [k for k in known if abs(k.start - f.start) <= BESIDE])]


def marked(text: str, shown: str) -> str:
    """`text` with MARK behind each figure that does not stand in `shown`."""
    for figure in reversed(unknown(text, shown)):
        text = text[:figure.end] + MARK + text[figure.end:]
    return text


def _shown(f: Figure, values: Iterable[Figure]) -> bool:
    return any(abs(scale * v.value - f.value) <= f.half + 1e-9 * max(1.0, f.value)
               for v in values for scale in ((1.0, 100.0) if f.percent else (1.0, 0.01) if v.percent else (1.0,)))


def _derived(f: Figure, known: Sequence[Figure]) -> bool:
    """Within what the rounding of both leaves open."""
    for a, b in permutations(known, 2):
        if abs(abs(a.value - b.value) - f.value) <= a.half + b.half + f.half:
            return True
        if b.value > 10 * b.half:  # two digits at least: the ratio of less is anything
            low, high = (a.value - a.half) / (b.value + b.half), (a.value + a.half) / (b.value - b.half)
            ratios = [(low, high)] if not f.percent else [(100 * low, 100 * high), (100 * (low - 1), 100 * (high - 1)), (100 * (1 - high), 100 * (1 - low))]
            if any(lowest - f.half <= f.value <= highest + f.half for lowest, highest in ratios):
                return True
    return False
