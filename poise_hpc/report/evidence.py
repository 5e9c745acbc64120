"""What the search learned besides scores: how candidates ended without one, and how candidates with a mechanism did."""
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import stats
from ..types import BASELINE_ID, EntrySummary, Outcome
from . import svg
from .board import window
from .gather import Findings
from .markup import Html, cell, cut, h, table
from .words import count, note, points, refs, section, shade, tip

CAUSES = 40       # rows, those of the most candidates
MECHANISMS = 40   # rows, those of the most candidates
DOTS = 60         # in a row's strip with a title each


def outcomes(f: Findings) -> Html:
    """Archived candidates by how they ended; a failure is evidence, never a score."""
    candidates = [e for e in f.entries.values() if e.id != BASELINE_ID]
    if not candidates:
        return section("outcomes", "Outcomes", h("p", "No candidate is archived yet."))
    failed, screened = ([e for e in f.unscored if e.id != BASELINE_ID and bool(e.screened) is early] for early in (False, True))
    causes = Counter(e.cause for e in failed)
    verdicts = Counter(e.verdict for e in candidates if e.score is not None)
    scored = len(candidates) - len(failed) - len(screened)
    said = ", ".join(f"{n:,} {verdict}" for verdict, n in verdicts.most_common() if verdict)
    rows = [[cut(cause or "unknown", 60), f"{n:,}", f"{100 * n / len(candidates):.0f} %", refs(f, [e.id for e in failed if e.cause == cause]),
             _message(f, cause)] for cause, n in causes.most_common(CAUSES)]
    verdicts_of = f"; verdicts: {said}" if said else ""
    ended = [h("p", f"{count(len(screened), 'candidate')} screened out before the training was whole: ", refs(f, [e.id for e in screened]), ".")] if screened else []
    return section(
        "outcomes", "Outcomes", h("p", f"{scored:,} of {count(len(candidates), 'candidate')} got a score{verdicts_of}."), *ended,
        table(["Cause of failure", "#Candidates", "#Share", "Which", "For example"], rows, "Failures by cause") if rows else
        h("p", "None failed through a fault of its own."),
        note("Faults of the infrastructure are not here: such attempts are repeated, and cost time only.",
             f" {len(causes) - CAUSES:,} rarer causes are left out." if len(causes) > CAUSES else ""))


def _message(f: Findings, cause: str) -> Html:
    """The newest one's that was read."""
    found = [e for e in f.records.values() if e.outcome is Outcome.CANDIDATE_ERROR and e.cause == cause]
    return h("span", cut(found[-1].message, 220), class_="message") if found else h("span", "–")


# --- mechanisms

@dataclass(frozen=True)
class Mechanism:
    """Differences in points; a median, which one collapse does not move, is None of nothing. Added: children that have it, of parents that do not, paired by seed."""

    name: str
    having: list[EntrySummary]        # scored
    unscored: int                     # failed or screened out
    with_it: float | None             # median difference to the baseline
    without_it: float | None
    added: list[float]                # child less parent

    @property
    def contrast(self) -> float | None:
        return None if self.with_it is None or self.without_it is None else self.with_it - self.without_it


def tally(f: Findings) -> list[Mechanism]:
    """Of every mechanism that a candidate declares, those of the most candidates first; without the baseline's own, which children have
    without declaring them."""
    candidates = [e for e in f.entries.values() if e.id != BASELINE_ID]
    use = Counter(name for e in candidates for name in set(e.mechanisms) - _own(f))
    scored = [e for e in f.scored if e.score and e.score.delta is not None]
    deltas = np.array([_delta(e) for e in scored])
    having: dict[str, list[int]] = {name: [] for name in use}
    unscored, added = Counter[str](), dict[str, list[float]]()
    for i, e in enumerate(scored):
        for name in set(e.mechanisms) - _own(f):
            having[name].append(i)
    for e in candidates:
        unscored.update(set(e.mechanisms) if e.score is None else ())
        for name, gain in _gains(f, e):
            added.setdefault(name, []).append(gain)
    out = []
    for name, _ in sorted(use.items(), key=lambda item: (-item[1], item[0])):
        own = having[name]
        out.append(Mechanism(name, [scored[i] for i in own], unscored[name], _median(deltas[own]), _median(np.delete(deltas, own)), added.get(name, [])))
    return out


def _own(f: Findings) -> set[str]:
    return set(f.baseline.mechanisms) if f.baseline else set()


def _median(values: Any) -> float | None:
    return float(np.median(values)) if len(values) else None


def _gains(f: Findings, e: EntrySummary) -> list[tuple[str, float]]:
    parent = f.entries.get(e.parents[0]) if e.parents else None
    if not (e.score and parent and parent.score):
        return []
    gain = stats.paired_difference(e.score.by_seed, parent.score.by_seed)
    return [(name, gain[0]) for name in set(e.mechanisms) - set(parent.mechanisms)] if gain else []


def _delta(e: EntrySummary) -> float:
    assert e.score is not None and e.score.delta is not None
    return e.score.delta


def mechanisms(f: Findings) -> Html:
    title = "Mechanisms"
    found = tally(f)
    if not any(m.having for m in found):
        return section("mechanisms", title, h("p", "No scored candidate declares a mechanism yet."))
    shown = found[:MECHANISMS]
    deltas = [_delta(e) for e in f.scored if e.score and e.score.delta is not None]
    low, high = window(f, deltas)
    x = svg.Scale(low, high, 8, 252)
    rows = [[cell(cut(m.name, 60), order=m.name), cell(len(m.having), number=True), cell(m.unscored or "–", number=True, order=m.unscored),
             cell(points(m.with_it, sign=True), number=True, order=m.with_it), cell(points(m.without_it, sign=True), number=True, order=m.without_it),
             cell(points(m.contrast, sign=True), number=True, order=m.contrast),
             cell(_added(m), number=True, order=_median(m.added)), _strip(f, m, x)] for m in shown]
    ablated = sorted({d.candidate for d in f.of("ablate")})
    return section(
        "mechanisms", title, h("p", h("strong", "Observational, not causal. "), "The search chose which mechanisms met which parents, and what did "
                               "well was tried more often and in better company. Only an ablation switches one mechanism off with all else equal",
                               (": see what was ", h("a", "confirmed and ablated", href="#confirmed"), ".") if ablated else
                               ": `poise-hpc ablate CAMPAIGN CANDIDATE`."),
        table(["Mechanism", "#With it", "#No score", "#Median with", "#Median without", "#Contrast", "#Added to a parent", "Each candidate with it"], rows,
              "Mechanisms of scored candidates", sortable=True),
        note(f"Medians over candidates of their paired differences to {f.label}, points: one that collapsed moves them little. Contrast: with less without. "
             f"Added to a parent: median paired difference of children that have it to first parents that do not, and their number. "
             f"Mechanisms that {f.label} declares are left out: children have them without saying so. Strip: every such candidate, from {points(low, sign=True)} to "
             f"{points(high, sign=True)} points; the line is {f.label}, the bar the median; what lies beyond stands at the end.",
             f" {len(found) - len(shown)} rarer mechanisms are left out." if len(found) > len(shown) else ""))


def _added(m: Mechanism) -> str:
    return f"{points(_median(m.added), sign=True)} ({len(m.added)})" if m.added else "–"


def _strip(f: Findings, m: Mechanism, x: svg.Scale) -> Html:
    if len(m.having) <= DOTS:
        dots = [svg.mark(x.clip(_delta(e)), 9, f"dot {shade(f, e)}", tip(e), 3) for e in m.having]
    else:
        dots = svg.clouds((shade(f, e), (x.clip(_delta(e)), 9)) for e in m.having)
    middle = svg.segment(x.clip(m.with_it), 1, x.clip(m.with_it), 17, "line middle") if m.with_it is not None else None
    words = f"{count(len(m.having), 'candidate')} with {cut(m.name, 60)}"
    return h("svg", h("title", words), svg.segment(x.start, 9, x.end, 9, "grid"), svg.segment(x(0), 1, x(0), 17, "zero"), middle, dots,
             viewBox="0 0 260 18", width=260, height=18, role="img", aria_label=words, class_="inline")


