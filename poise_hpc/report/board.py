"""The leaderboard: a forest plot of the best, and the table that `poise-hpc leaderboard` prints."""
from __future__ import annotations

from ..types import BASELINE_ID, EntrySummary
from . import svg
from .gather import Findings
from .markup import Html, cell, cut, h, table
from .words import named, note, points, refs, section, shade, shades_note, step, tip, verdict

FOREST = 24   # candidates in the plot
TABLE = 200   # rows
TALL = 40     # from here on they scroll by themselves
ROW = 23      # pixels


def leaderboard(f: Findings) -> Html:
    if not f.rows:
        return section("leaderboard", "Leaderboard", h("p", "Nothing is archived yet."))
    return section("leaderboard", "Leaderboard", forest(f), board(f))


def window(f: Findings, deltas: list[float]) -> tuple[float, float]:
    """Differences that a plot shows. What is far below everything of interest, and intervals of two seeds, do not set the scale."""
    unit = 4 * (step(f) or 0.25)
    best, worst = max(deltas, default=0.0), min(deltas, default=0.0)
    reach = max(abs(best), unit)
    return max(min(worst, 0.0) - unit / 2, -2.5 * reach), max(best, 0.0) + reach * 0.6


def forest(f: Findings) -> Html | None:
    """Paired differences to the baseline, best first: mean, 95 % interval, and each seed's own difference."""
    shown = [e for e in f.scored[:FOREST] if e.score and e.score.delta is not None]
    if not shown:
        return None
    low, high = window(f, [e.score.delta for e in shown if e.score and e.score.delta is not None])
    x = svg.Scale(low, high, 290, 740)
    bottom = 36 + ROW * len(shown)
    rows = [_row(f, e, x, 36 + ROW * i + ROW / 2) for i, e in enumerate(shown)]
    head = [svg.label(8, 20, "candidate", "key"), svg.label(svg.WIDTH - 8, 20, "difference [95 % interval]", "key", "end"),
            *svg.axis_x(x, 28, bottom + 4, f"points over {f.label}, paired by training seed", sign=True),
            svg.segment(x(0), 28, x(0), bottom + 4, "zero")]
    left = len(f.scored) - len(shown)
    return svg.figure(
        bottom + 42, f"Forest plot: paired differences of {len(shown)} candidates to {f.label}", head, rows, name="forest", caption=[
            "Filled dot: mean over training seeds. Bar: its 95 % Student t interval; an arrow head says that it goes on, a triangle that all of "
            "it lies beyond. Small dots: the single seeds. Nothing here is corrected for having picked the best. ", shades_note(f),
            f" {left:,} more candidates are in the table." if left else ""])


def _row(f: Findings, e: EntrySummary, x: svg.Scale, y: float) -> Html:
    s = e.score
    assert s is not None and s.delta is not None
    seeds = [(seed, d) for seed, d in sorted(f.differences(e).items()) if x.low <= d <= x.high]
    if s.delta < x.low:
        drawn = [h("path", h("title", tip(e)), d=f"M{svg.px(x(x.low))} {svg.px(y)}l8 -5v10z", class_=f"dot {shade(f, e)}")]
    else:
        drawn = [*(svg.span(x, *s.delta_ci, y, "interval") if s.delta_ci else []),
                 *(svg.mark(x(d), y, "seed", f"seed {seed}: {points(d, sign=True)}", 2.2) for seed, d in seeds),
                 svg.mark(x(s.delta), y, f"dot {shade(f, e)}", tip(e), 4.6)]
    name = svg.label(8, y + 4, [h("tspan", e.id, class_="id"), "  ", cut(e.name, 30)])
    return h("g", h("a", name, href=f"#{e.id}") if e.id in f.detailed else name, drawn,
             svg.label(svg.WIDTH - 8, y + 4, points(s.delta, s.delta_ci, sign=True), "figure", "end"))


def board(f: Findings) -> Html:
    best = f.rows[:TABLE]
    shown = best + [r for r in f.rows[TABLE:] if r["id"] == BASELINE_ID]
    measures = sorted({name for r in shown for name in r["benchmarks"]})[:8]
    rows = []
    for r in shown:
        e = f.entries[r["id"]]
        rows.append([
            cell(r["rank"], number=True), cell(named(f, e.id), order=e.id), refs(f, e.parents),
            cell(points(r["overall"], r["ci"]), number=True, order=r["overall"]),
            cell("–" if e.id == BASELINE_ID else points(r["delta"], r["delta_ci"], sign=True), number=True, order=r["delta"]),
            r["seeds"] or "–", cut(verdict(r), 40),
            *(cell(points(r["benchmarks"].get(m)), number=True, order=r["benchmarks"].get(m)) for m in measures)])
    use = f.campaign.config.evaluate.score
    left = len(f.rows) - len(shown)
    heads = ["#" + m.replace("/", "/\u200b") for m in measures]  # they may break there
    return h("div", table(["#Rank", "Candidate", "Parents", f"#Overall ({use})", "#Difference", "#Seeds", "Verdict", *heads],
                          rows, "Leaderboard", sortable=True, class_="filter", tall=len(rows) > TALL),
             note(meaning(f), " Benchmarks: mean over seeds at the last evaluation point. Verdict: on the scores, by the 95 % interval of the "
                  "paired difference to the parent, or to the baseline where the parent has no score.",
                  f" {left:,} rows are left out; `poise-hpc leaderboard CAMPAIGN` has them all." if left else ""))


def meaning(f: Findings) -> str:
    used = "mean over the evaluation points" if f.campaign.config.evaluate.score == "curve" else "last evaluation point"
    return (f"All figures are points, 0 to 100. Overall is the {used}, weighted over benchmarks as the configuration says; [a, b] are 95 % intervals "
            f"over training seeds; the difference is to {f.label}, seed by seed.")


