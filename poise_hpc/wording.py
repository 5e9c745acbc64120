"""What is said alike wherever it is printed: in the log, by the commands, in a report, in a derived campaign's last line."""
from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from .types import BASELINE_ID


def count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def short(text: str, most: int = 160) -> str:
    """On one line, cut."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]} ..."


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def verdict(id: str, delta: float | None, ci: Sequence[float] | None, reflection: str) -> str:
    """Of a scored candidate: its reflection's word, and what that does not look at. "" of the baseline: it is compared with nothing."""
    if id == BASELINE_ID:
        return ""
    return f"the same as {BASELINE_ID} on every seed" if same(delta, ci) else reflection


def told_apart(ci: Sequence[float] | None, than: str) -> str:
    """What the interval of a paired difference says."""
    if ci is None:
        return "one seed: no interval"
    if same(0.0, ci):
        return f"the same as {than} on every seed"
    return f"better than {than}" if ci[0] > 0 else f"worse than {than}" if ci[1] < 0 else f"not told apart from {than}"


def same(delta: float | None, ci: Sequence[float] | None) -> bool:
    """Is a paired difference 0 on every seed?"""
    return delta == 0 and ci is not None and tuple(ci) == (0, 0)


def without_verdict(reflection: dict[str, Any]) -> str:
    """Its text: the word at the head, of the rules' verdict, is said elsewhere, and of the baseline not at all."""
    return reflection["text"].removeprefix(f"**{reflection['verdict'].capitalize()}.** ")


def plain(markdown: str) -> str:
    """For a terminal: without the marks of emphasis and of code."""
    return re.sub(r"\*\*(\S(?:[^*]*\S)?)\*\*|`([^`\n]+)`", lambda m: m[1] or m[2], markdown)
