"""Benchmarks against each other: who is best at what, and the front that no candidate beats on all of them."""
from __future__ import annotations

from itertools import combinations

import numpy as np

from ..selection.features import pareto_front
from ..types import BASELINE_ID
from . import svg
from .gather import Findings
from .markup import Html, cell, cut, h, table
from .words import diamond, named, points, section, shade, shades_note, tip

MEASURES = 4      # in the plots, those of the greatest weight
FRONT = 24        # rows of the table
DOTS = 400        # candidates, at most, that are marks of their own
W, H = 320, 262   # of a panel


def pareto(f: Findings) -> Html:
    title = "Trade-offs between benchmarks"
    names, values = measures(f)
    if len(f.scored) < 2 or len(names) < 2:
        return section("pareto", title, h("p", "It takes two scored candidates and two benchmarks to compare them."))
    front = [f.scored[i].id for i in pareto_front(values, limit=10**6)]
    pairs = list(combinations(names[:MEASURES], 2))
    panels = [_panel(f, names, values, a, b, set(front), W * (i % 3), 34 + H * (i // 3)) for i, (a, b) in enumerate(pairs)]
    return section(
        "pareto", title, h("p", f"{len(front)} of {len(f.scored):,} scored candidates are on the front of all {len(names)} benchmarks: no other is at "
                           "least as good on each and better on one. That counts means as they are; one standard error can carry a candidate on or off "
                           "it.", _baseline(f, names, values)),
        svg.figure(34 + H * ((len(pairs) + 2) // 3), f"Benchmark scores pair by pair: {', '.join(names[:MEASURES])}", svg.legend(8, 16, [
            ("on the front of all benchmarks", svg.mark(0, 0, "ring", r=5)), ("front of this pair", svg.segment(-8, 0, 8, 0, "line front")),
            (cut(f.label, 24), diamond(0, 0))]), panels, name="pareto",
            caption=["Points, mean over seeds at the last evaluation point; up and to the right is better; what lies far below stands at the edge. ",
                     shades_note(f)]),
        table(["Candidate", *(f"#{n}" for n in names), "#Overall", "Best at"], _rows(f, names, values, front[:FRONT]),
              "The front of all benchmarks" + (f", the best {FRONT} of {len(front)} by sum" if len(front) > FRONT else ""), sortable=True))


def _baseline(f: Findings, names: list[str], values: np.ndarray) -> str:
    if not (f.baseline and f.baseline.score):
        return ""
    own = np.array([f.baseline.score.benchmarks[n] for n in names])
    beaten = bool(((values >= own).all(axis=1) & (values > own).any(axis=1)).any())
    return f" {cut(f.label, 40)} itself would {'not ' if beaten else ''}be on it."


def measures(f: Findings) -> tuple[list[str], np.ndarray]:
    """(benchmark metrics by falling weight, (N, D) points of `f.scored`), of those that every scored candidate has."""
    weight = {f"{name}/{kind}": w for name, b in f.campaign.config.evaluate.benchmarks.items() for kind, w in b.metrics.items()}
    names = sorted((n for n in weight if all(e.score and n in e.score.benchmarks for e in f.scored)), key=lambda n: -weight[n])
    return names, np.array([[e.score.benchmarks[n] for n in names] for e in f.scored if e.score]).reshape(len(f.scored), len(names))


def _panel(f: Findings, names: list[str], values: np.ndarray, a: str, b: str, front: set[str], left: float, top: float) -> Html:
    xs, ys = values[:, names.index(a)], values[:, names.index(b)]
    base = f.baseline.score.benchmarks if f.baseline and f.baseline.score else {}
    x = svg.Scale(*_range(xs, base.get(a)), left + 48, left + W - 14)
    y = svg.Scale(*_range(ys, base.get(b)), top + H - 52, top + 14)
    places = [(x.clip(u), y.clip(v)) for u, v in zip(xs.tolist(), ys.tolist(), strict=True)]
    pair = sorted(pareto_front(np.stack([xs, ys], axis=1), limit=10**6).tolist(), key=lambda i: xs[i])
    if len(places) > DOTS:
        marks = svg.clouds((shade(f, e), p) for p, e in reversed(list(zip(places, f.scored, strict=True))))
    else:
        marks = [svg.mark(px, py, f"dot {shade(f, e)}", f"{tip(e)}; {a} {points(u)}, {b} {points(v)}", 3.6)
                 for (px, py), e, u, v in reversed(list(zip(places, f.scored, xs, ys, strict=True)))]
    rings = [svg.mark(px, py, "ring", r=5.4) for (px, py), e in zip(places, f.scored, strict=True) if e.id in front][:DOTS]
    corners = [(places[i][0], places[j][1]) for i, j in zip(pair, pair[1:], strict=False)]
    line = svg.polyline([point for i, corner in zip(pair, [*corners, places[pair[-1]]], strict=True) for point in (places[i], corner)], "front")
    return h("g", svg.axis_y(y, x.start, x.end, 4), svg.axis_x(x, y.end, y.start, a, 4), svg.label(x.start, top + 6, b, "axis"), line, marks, rings,
             diamond(x.clip(base[a]), y.clip(base[b]), tip(f.baseline)) if f.baseline and a in base and b in base else None)


def _range(values: np.ndarray, base: float | None) -> tuple[float, float]:
    """From the best down to four times the upper half's spread: what collapsed does not push the others together."""
    best, middle = float(values.max()), float(np.median(values))
    low = max(float(values.min()), best - 4 * max(best - middle, 1.0))
    return svg.padded([low, best, best if base is None else max(base, low)], floor=1.0)


def _rows(f: Findings, names: list[str], values: np.ndarray, front: list[str]) -> list[list[object]]:
    best, place = values.max(axis=0), {e.id: i for i, e in enumerate(f.scored)}
    out: list[list[object]] = []
    for id in [*front, *([BASELINE_ID] if f.baseline and f.baseline.score else [])]:
        score = f.entries[id].score
        assert score is not None
        top = [n for n, b in zip(names, best, strict=True) if id in place and score.benchmarks[n] == b]
        figures = [(score.benchmarks.get(n), n in top) for n in names]
        out.append([cell(named(f, id), order=id), *(cell(h("strong", points(v)) if first else points(v), number=True, order=v) for v, first in figures),
                    cell(points(score.overall), number=True, order=score.overall), "baseline" if id == BASELINE_ID else ", ".join(top) or "–"])
    return out
