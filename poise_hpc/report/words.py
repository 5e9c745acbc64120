"""What several sections say or colour alike: figures as `views` prints them, links to candidates, shades of a score."""
from __future__ import annotations

from collections.abc import Iterable
from math import sqrt
from typing import Any

from .. import screening, views, wording
from ..types import BASELINE_ID, EntrySummary
from ..wording import count as count
from ..wording import duration as duration
from .gather import Findings
from .markup import Html, cut, h, join
from .svg import mark

SHADES = ("far-worse", "worse", "even", "better", "far-better")
SHOWN = 12    # links in one cell


def minus(words: str) -> str:
    """With minus signs where a hyphen stands before a digit."""
    return "".join("−" if c == "-" and words[i + 1:i + 2].isdigit() else c for i, c in enumerate(words))


def points(value: float | None, ci: Any = None, sign: bool = False) -> str:
    """As `views.interval`: 27.5 [18.1, 36.8]."""
    return minus(views.interval(value, ci, sign)) if value is not None else "–"


def step(f: Findings) -> float | None:
    """Standard error of a difference to the baseline; without replicates, a sixth of the range of scores."""
    if f.noise is not None:
        return f.noise * sqrt(2)
    values = [e.score.overall for e in f.entries.values() if e.score]
    return (max(values) - min(values)) / 6 if len(values) > 1 and max(values) > min(values) else None


def shade(f: Findings, entry: EntrySummary) -> str:
    """Class of its colour: by one and by three standard errors of a difference from the baseline."""
    if entry.id == BASELINE_ID:
        return "base"
    if entry.score is None:
        return "failed"
    delta, unit = entry.score.delta, step(f)
    if delta is None or not unit:
        return "even"
    far = (abs(delta) >= unit) + (abs(delta) >= 3 * unit)
    return SHADES[2 + (far if delta > 0 else -far)]


def shades_key(f: Findings) -> list[tuple[str, Html]]:
    """For `svg.legend`."""
    unit = step(f)
    words = ("much worse", "worse", "about equal", "better", "much better") if unit else ("scored",)
    shown = SHADES if unit else ("even",)
    return [*((w, mark(0, 0, f"dot {s}")) for w, s in zip(words, shown, strict=True)), (cut(f.label, 24), diamond(0, 0))]


def shades_note(f: Findings) -> str:
    unit = step(f)
    if not unit:
        return ""
    what = "standard errors of a paired difference" if f.noise is not None else "sixths of the range, for want of replicates"
    return f"Colour: better or worse than {f.label} by more than 1 and more than 3 {what} ({unit:.1f} points)."


def diamond(x: float, y: float, title: str = "", r: float = 5.0) -> Html:
    return h("path", h("title", title) if title else None, d=f"M{x:.1f} {y - r:.1f}l{r} {r}l-{r} {r}l-{r} -{r}z", class_="dot base")


def ref(f: Findings, id: str) -> Html:
    """A candidate's id, a link where it has a section."""
    return h("a", id, href=f"#{id}", class_="id") if id in f.detailed else h("span", id, class_="id")


def refs(f: Findings, ids: Iterable[str]) -> Html:
    ids = list(ids)
    more = f" and {len(ids) - SHOWN:,} more" if len(ids) > SHOWN else ""
    return join([join([ref(f, id) for id in ids[:SHOWN]], ", "), more]) if ids else join("–")


def named(f: Findings, id: str, most: int = 44) -> Html:
    """Id and name."""
    return h("span", ref(f, id), " ", h("span", cut(f.entries[id].name, most), class_="name"), class_="named")


def tip(entry: EntrySummary) -> str:
    """What a mark says when the pointer rests on it."""
    s = entry.score
    if s is None:
        return f"{entry.id} {cut(entry.name, 60)}: {unscored(entry)}"
    against = f", {points(s.delta, s.delta_ci, sign=True)} against {BASELINE_ID}" if s.delta is not None else ""
    return f"{entry.id} {cut(entry.name, 60)}: {points(s.overall, s.ci)}{against}"


def verdict(row: dict[str, Any]) -> str:
    if row["id"] == BASELINE_ID:
        return "baseline"
    if row["screened"]:
        return _screened(row["screened"]["at"])
    if row["overall"] is None:
        return f"failed: {row['cause']}"
    return wording.verdict(row["id"], row["delta"], row["delta_ci"], row["verdict"]) or "–"


def unscored(entry: EntrySummary) -> str:
    """Why it has no score."""
    return _screened(entry.screened.at) if entry.screened else f"failed: {entry.cause}"


def _screened(at: str) -> str:
    return f"screened out at {screening.percent(at)}"


def section(name: str, title: str, *content: Any) -> Html:
    return h("section", h("h2", title), *content, id=name)


def note(*content: Any) -> Html:
    return h("p", *content, class_="note")
