"""Genealogy: an indented tree, one row a candidate, children under their first parent. A second parent is named beside it.

Of a large archive: the winner's line, the best candidates and whatever connects them.
"""
from __future__ import annotations

from collections.abc import Sequence

from ..types import BASELINE_ID, EntrySummary, candidate_number
from . import svg
from .gather import Findings, ancestors
from .markup import Html, cut, h, join
from .words import diamond, points, section, shade, shades_key, shades_note, tip, unscored

ROWS = 150
ROW, TOP, LEFT, INDENT, ROOM = 21, 58, 16, 22, 360


def genealogy(f: Findings) -> Html:
    title = "Genealogy"
    if len(f.entries) < 2:
        return section("genealogy", title, h("p", "No candidate is archived yet." if not f.entries else "Only the first entry is archived."))
    shown = chosen(f)
    ordered = depth_first(shown)
    place = {e.id: i for i, (e, _) in enumerate(ordered)}
    deepest = max(depth for _, depth in ordered)
    indent = min(INDENT, ROOM / max(deepest, 1))
    at = {e.id: (LEFT + indent * depth, TOP + ROW * place[e.id] + ROW / 2) for e, depth in ordered}
    names = LEFT + indent * deepest + 18
    links = sorted(((e, p) for e, _ in ordered if (p := _under(e, place)) is not None), key=lambda pair: pair[0].id in f.line)
    left = len(f.entries) - len(shown)
    return section("genealogy", title, svg.figure(
        TOP + ROW * len(ordered) + 8, f"Tree of {len(ordered)} candidates by parent",
        svg.legend(8, 18, [*shades_key(f), ("no score", svg.cross(0, 0, "failed"))]),
        svg.label(names, 44, "candidate", "key"), svg.label(770, 44, "Overall", "key", "end"),
        svg.label(svg.WIDTH - 8, 44, f"against {cut(f.label, 14)}", "key", "end"),
        [_link(at[p], at[e.id], e.id in f.line) for e, p in links], [_row(f, e, at[e.id], names) for e, _ in ordered], name="genealogy", caption=[
            "A child stands under its first parent, to the right of it; + names further parents. " if any(len(e.parents) > 1 for e in shown) else
            "A child stands under its parent, to the right of it. ",
            f"Bold: the line of {f.winner.id}, the best candidate. " if f.winner else "", shades_note(f),
            f" {left:,} candidates are left out: shown are the best, their ancestors, and those without a score nearest to them." if left else ""]))


def chosen(f: Findings) -> list[EntrySummary]:
    """All, or ROWS: the winner's line, then the best with their ancestors, then children of those without a score."""
    if len(f.entries) <= ROWS:
        return list(f.entries.values())
    keep = dict.fromkeys(f.line[:ROWS // 2])
    for e in f.scored:
        more = [id for id in ancestors(f.entries, e.id) if id not in keep]
        if len(keep) + len(more) > ROWS * 4 // 5:
            break
        keep |= dict.fromkeys(more)
    if BASELINE_ID in f.entries:
        keep[BASELINE_ID] = None
    children = [e.id for e in f.unscored if e.id not in keep and e.parents and e.parents[0] in keep]
    return [f.entries[id] for id in [*keep, *children[:max(ROWS - len(keep), 0)]]]


def depth_first(entries: Sequence[EntrySummary]) -> list[tuple[EntrySummary, int]]:
    """(entry, depth), each under the first of its parents that is there; siblings by number."""
    known = {e.id: e for e in entries}
    children: dict[str | None, list[EntrySummary]] = {}
    for e in sorted(entries, key=lambda e: candidate_number(e.id)):
        children.setdefault(_under(e, known), []).append(e)
    out: list[tuple[EntrySummary, int]] = []
    waiting = [(e, 0) for e in reversed(children.get(None, []))]
    while waiting:
        e, depth = waiting.pop()
        out.append((e, depth))
        waiting += [(child, depth + 1) for child in reversed(children.get(e.id, []))]
    return out


def _under(e: EntrySummary, known: dict[str, object] | dict[str, int] | dict[str, EntrySummary]) -> str | None:
    """Parents are older than their children: what claims otherwise cannot lead in a circle."""
    return next((p for p in e.parents if p in known and candidate_number(p) < candidate_number(e.id)), None)


def _link(parent: svg.Point, child: svg.Point, bold: bool) -> Html:
    (px, py), (cx, cy) = parent, child
    return h("path", d=f"M{svg.px(px)} {svg.px(py + 6)}V{svg.px(cy - 6)}q0 6 6 6H{svg.px(cx - 6)}" if cx - px > 12 else
             f"M{svg.px(px)} {svg.px(py + 6)}V{svg.px(cy)}H{svg.px(cx - 5)}", class_="line link bold" if bold else "line link")


def _row(f: Findings, e: EntrySummary, at: svg.Point, names: float) -> Html:
    x, y = at
    node = svg.cross(x, y, "failed", tip(e)) if e.score is None else diamond(x, y, tip(e)) if e.id == BASELINE_ID else \
        svg.mark(x, y, f"dot {shade(f, e)}", tip(e), 4.6)
    others = f"  + {', '.join(p for p in e.parents if p != _under(e, f.entries))}" if len(e.parents) > 1 else ""
    name = [h("tspan", e.id, class_="id"), "  ", cut(e.name, max(14, int((680 - names) / 6.8) - 8 - len(others))), h("tspan", others, class_="tick")]
    words = svg.label(names, y + 4, join(name), "bold" if f.winner and e.id == f.winner.id else "")
    score = [svg.label(svg.WIDTH - 8, y + 4, cut(unscored(e), 34), "tick", "end")] if e.score is None else [
        svg.label(770, y + 4, points(e.score.overall), "figure", "end"),
        svg.label(svg.WIDTH - 8, y + 4, "baseline" if e.id == BASELINE_ID else points(e.score.delta, e.score.delta_ci, sign=True), "figure", "end")]
    return h("g", svg.segment(x + 8, y, names - 6, y, "leader"), node, h("a", words, href=f"#{e.id}") if e.id in f.detailed else words, score)
