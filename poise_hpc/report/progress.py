"""The search over time: every candidate with its noise, the best so far, and what luck alone would have given by then."""
from __future__ import annotations

from .. import stats
from ..types import EntrySummary, candidate_number
from . import svg
from .board import window
from .gather import Findings
from .markup import Html, cut, h
from .words import diamond, section, shade, shades_key, shades_note, tip

INTERVALS = 150   # candidates, at most, that get one each
LEFT, RIGHT, TOP, BOTTOM = 60, 760, 40, 330


def progress(f: Findings) -> Html:
    title = "Progress of the search"
    if not f.scored:
        return section("progress", title, h("p", "No candidate has a score yet."))
    last = max(candidate_number(id) for id in f.entries)
    x = svg.Scale(0, max(last, 1), LEFT, RIGHT)
    y = svg.Scale(*_range(f), BOTTOM, TOP)
    lines, labels = _lines(f, x, y, last)
    strip = BOTTOM + 18
    lost = [(x(candidate_number(e.id)), strip, e) for e in f.unscored]
    few = len(f.entries) <= 4 * INTERVALS
    crosses = [svg.cross(px, py, "failed", tip(e)) for px, py, e in lost] if few else [svg.cloud([(px, py) for px, py, _ in lost], "failed")]
    height = strip + (30 if lost else 0) + 34
    return section("progress", title, svg.figure(
        height, f"Overall of {len(f.scored)} candidates by number, with the best so far", svg.legend(LEFT, 18, shades_key(f)),
        svg.axis_y(y, LEFT, RIGHT), svg.axis_x(x, TOP, strip + 8 if lost else BOTTOM, "candidate, in the order of proposal"),
        svg.label(14, (TOP + BOTTOM) / 2, "Overall, points", "axis", "middle", transform=f"rotate(-90 14 {(TOP + BOTTOM) / 2:.0f})"),
        svg.label(RIGHT + 14, strip + 4, f"no score ({len(lost):,})", "key") if lost else None,
        *([lines, crosses, _marks(f, x, y, few)] if few else [crosses, _marks(f, x, y, few), lines]), labels,  # clouds would hide the lines
        name="progress", caption=[_intervals(f), _luck_words(f), " ", shades_note(f)]))


def _range(f: Findings) -> tuple[float, float]:
    base = f.baseline.score if f.baseline else None
    if base is None:
        return svg.padded([e.score.overall for e in f.scored if e.score])
    low, high = window(f, [e.score.overall - base.overall for e in f.scored if e.score])
    return base.overall + low, base.overall + high


def _marks(f: Findings, x: svg.Scale, y: svg.Scale, few: bool) -> list[Html]:
    """Thousands are clouds, one for each shade; of a few each has its title and, up to INTERVALS, two standard errors."""
    if not few:
        return svg.clouds((shade(f, e), (x(candidate_number(e.id)), y.clip(_overall(e)))) for e in reversed(f.scored))
    out = []
    if len(f.scored) <= INTERVALS and f.noise is not None:
        errors = stats.standard_errors([e.score for e in f.scored if e.score], stats.pooled_sd([e.score for e in f.scored if e.score]))
        for e, error in zip(f.scored, errors.tolist(), strict=True):
            at, mean = x(candidate_number(e.id)), _overall(e)
            if mean + 2 * error >= y.low:
                out.append(svg.segment(at, y.clip(mean - 2 * error), at, y.clip(mean + 2 * error), "line interval"))
    for e in f.scored:
        at, value = x(candidate_number(e.id)), _overall(e)
        out.append(svg.mark(at, y(value), f"dot {shade(f, e)}", tip(e)) if value >= y.low else
                   h("path", h("title", tip(e)), d=f"M{at - 5:.1f} {BOTTOM - 9}h10l-5 8z", class_=f"dot {shade(f, e)}"))
    if f.baseline and f.baseline.score:
        out.append(diamond(x(0), y.clip(f.baseline.score.overall), tip(f.baseline)))
    return out


def _overall(e: EntrySummary) -> float:
    assert e.score is not None
    return e.score.overall


def _lines(f: Findings, x: svg.Scale, y: svg.Scale, last: int) -> tuple[list[Html], list[Html]]:
    """Baseline, best so far and luck, and their names at the right end, apart from each other."""
    base = f.baseline.score.overall if f.baseline and f.baseline.score else None
    best = [(float(n), v) for n, v in best_so_far(f)]
    drawn = [("best so far", "best", [*best, (float(last), best[-1][1])], True)]
    if base is not None:
        drawn.append((cut(f.label, 22), "reference", [(0.0, base), (float(last), base)], False))
        if f.noise is not None:
            drawn.append(("best of equals, by luck", "luck", [(float(n), base + f.noise * lead) for n, lead in lucky(f, last)], False))
    lines = [svg.polyline([(x(a), y.clip(b)) for a, b in points], name, stepped) for _, name, points, stepped in drawn]
    wanted = [y.clip(points[-1][1]) for _, _, points, _ in drawn]
    labels = [svg.label(RIGHT + 14, at + 4, words, f"key {name}") for (words, name, _, _), at in zip(drawn, svg.spread(wanted, 16), strict=True)]
    return lines, labels


def best_so_far(f: Findings) -> list[tuple[int, float]]:
    """(candidate number, Overall) of each candidate that was better than all before it."""
    out: list[tuple[int, float]] = []
    for e in sorted(f.scored, key=lambda e: candidate_number(e.id)):
        if not out or _overall(e) > out[-1][1]:
            out.append((candidate_number(e.id), _overall(e)))
    return out


def lucky(f: Findings, last: int) -> list[tuple[int, float]]:
    """(candidate number, expected lead of the best scored candidate up to it) in standard errors, if all equalled the baseline."""
    numbers = sorted(candidate_number(e.id) for e in f.scored)
    places = sorted({round((len(numbers) - 1) * (k / 40) ** 2) for k in range(41)})
    return [(numbers[i], stats.expected_best(i + 1)) for i in places] + [(last, stats.expected_best(len(numbers)))]


def _intervals(f: Findings) -> str:
    if f.noise is None:
        return "One training seed, or a single score: nobody knows the noise of these points, so no interval is drawn. "
    return "Vertical bars: 2 standard errors, the seeds' variance shrunk to that of all entries. " if len(f.scored) <= INTERVALS else ""


def _luck_words(f: Findings) -> str:
    if f.noise is None or not (f.baseline and f.baseline.score):
        return "A triangle at the lower edge lies below the plot."
    n = len(f.scored)
    return (f"Dashed: the best of n candidates that are all exactly as good as {f.label} would stand there on average, by lucky seeds alone; "
            f"with {n:,}, {f.noise * stats.expected_best(n):.1f} points above it (standard error of a candidate {f.noise:.2f} points). "
            "A triangle at the lower edge lies below the plot.")
