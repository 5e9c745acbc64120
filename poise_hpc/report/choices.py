"""Why each parent was chosen, and what persons said on the way."""
from __future__ import annotations

from typing import Any

from ..entry import Entry
from ..selection.acquisition import TERMS
from ..types import candidate_id
from . import svg
from .gather import Findings
from .markup import Html, cut, h, join, table
from .words import count, named, note, ref, section

ROWS = 200


def choices(f: Findings) -> Html:
    """The picks of the candidates that were read, oldest first; candidates that share one stand in one row."""
    search = f.campaign.config.search
    picks = sorted((e for e in f.records.values() if e.pick.get("parent")), key=lambda e: e.id.zfill(9))
    groups: dict[str, list[Entry]] = {}
    for e in picks:
        again = e.pick["explanation"].startswith("same parent as ")
        first = next((id for id in reversed(groups) if again and f.records[id].pick["parent"] == e.pick["parent"]), e.id)
        groups.setdefault(first, []).append(e)
    rows = [_row(f, g) for g in list(groups.values())[:ROWS]]
    weights = ", ".join(f"{name} {getattr(search.acquisition, name):g}" for name in TERMS)
    left = len(f.entries) - len(f.records)
    return section(
        "choices", "Why these parents", h("p", f"Strategy {search.strategy}; up to {count(search.per_parent, 'candidate')} a choice" + (
            f"; weights: {weights}" if search.strategy == "poise" else "") + "."),
        table(["For", "Parent", "Pareto, performance, diversity, descendants", "#Total", "#Rank", "In words"], rows, "Choices of parents") if rows else
        h("p", "No parent has been chosen yet."),
        note("Bars: the four terms, each 0 to 1. Rank: the parent's place by Overall among the candidates that the choice's table lists.",
             f" Those behind {left:,} candidates without a section here are left out; `poise-hpc show CAMPAIGN CANDIDATE` has each." if left > 0 else "")
        if rows else None, _said(f))


def _row(f: Findings, group: list[Entry]) -> list[Any]:
    pick = group[0].pick
    terms = pick.get("terms") or []
    mine = next((t for t in terms if t["id"] == pick["parent"]), None)
    rank = 1 + sum(t["overall"] > mine["overall"] for t in terms) if mine else None
    return [h("span", join([ref(f, e.id) for e in group], ", "), class_="whole"),
            named(f, pick["parent"], 40) if pick["parent"] in f.entries else h("span", pick["parent"], class_="id"),
            _bars(mine) if mine else "–", f"{mine['total']:.2f}" if mine else "–", f"{rank} of {len(terms)}" if mine else "–",
            h("details", h("summary", "read"), h("p", cut(pick["explanation"], 1200))) if mine else cut(pick["explanation"], 400)]


def _bars(terms: dict[str, Any]) -> Html:
    """Four small bars; pixels of 40 are 1."""
    bars = [h("rect", h("title", f"{name} {terms[name]:.2f}"), x=i * 46, y=3, width=svg.px(max(40 * terms[name], 0.5)), height=10, class_="term")
            for i, name in enumerate(TERMS)]
    frames = [h("path", d=f"M{i * 46} 14.5h40", class_="grid") for i in range(4)]
    words = ", ".join(f"{name} {terms[name]:.2f}" for name in TERMS)
    return h("svg", h("title", words), frames, bars, viewBox="0 0 180 16", width=180, height=16, role="img", aria_label=words, class_="inline")


def _said(f: Findings) -> Html | None:
    """Directives, ideas, pins and vetoes: a search that was guided says so."""
    config = [["directive", "c0001", f.campaign.config.search.directive]] if f.campaign.config.search.directive else []
    said = [[line["kind"] + (" taken back" if line["off"] else ""), candidate_id(line["from"]), cut(line["text"] or "none", 600)] for line in f.said]
    if not config and not said:
        return note("No person guided this search.")
    return h("div", h("h3", "What persons said to the search"), table(["Kind", "From candidate", "Words"], config + said, "Guidance"))
