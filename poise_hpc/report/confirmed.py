"""What the search selected against what fresh seeds, unseen prompts, ablations and other settings say of it."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .. import wording
from ..types import BASELINE_ID, EntrySummary
from . import svg
from .gather import Derived, Findings
from .markup import Html, cell, cut, h, table
from .words import count, named, note, points, ref, section

ROW = 26


def confirmed(f: Findings) -> Html:
    parts = [_pairs(f), _ablations(f), _controls(f), _transfers(f), _reruns(f)]
    name = f.winner.id if f.winner else "CANDIDATE"
    return section(
        "confirmed", "Selected against confirmed", *(parts if f.derived else [h("p", (
            "Nothing was tested again yet. The figures above come from the seeds and prompts that selection saw. ",
            h("code", f"poise-hpc confirm CAMPAIGN {name}"), " trains the candidate and the baseline on fresh seeds and evaluates on prompts that "
            "selection never saw; ",
            h("code", f"poise-hpc ablate CAMPAIGN {name}"), " switches its mechanisms off one by one; ",
            h("code", f"poise-hpc control CAMPAIGN {name}"), " trains it on random rewards."))]))


def itself(d: Derived) -> EntrySummary | None:
    """The tested candidate in a derived campaign, which has the baseline first; None until it is archived."""
    return next((e for e in d.entries if e.id == "c0001"), None)


def progress_of(d: Derived) -> str:
    return "" if len(d.entries) >= d.expected else f"In progress: {len(d.entries)} of {d.expected} archived."


def _pairs(f: Findings) -> Html | None:
    """Each confirmation beside what the search had said."""
    made = f.of("confirm")
    if not made:
        return None
    rows: list[Bar] = []
    table_rows = []
    for d in made:
        then, now = f.entries.get(d.candidate), itself(d)
        if then and then.score and then.score.delta is not None:
            words = f"{cut(then.name, 20)}  selected, {count(len(then.score.by_seed), 'seed')}"
            rows.append(Bar(d.candidate, words, then.score.delta, then.score.delta_ci, "even"))
        if now and now.score and now.score.delta is not None:
            words = f"{cut(now.name, 20)}  confirmed, {count(len(now.score.by_seed), 'seed')}"
            rows.append(Bar(d.candidate, words, now.score.delta, now.score.delta_ci, "confirmed", bold=True))
        table_rows.append(_confirmation(f, d, then, now))
    tried = len({d.candidate for d in made})
    several = f" {tried} candidates were confirmed; the intervals are not corrected for that." if tried > 1 else ""
    axis = f"points over {f.label}, paired by training seed"
    return h("div", _forest(rows, "Differences to the baseline, as selected and as confirmed", axis, "confirmed"),
             table(["Candidate", "#Selected", "#Seeds", "#Confirmed", "#Seeds", f"#{cut(f.label, 20)}, confirmed", "What it says", "Campaign"], table_rows,
                   "Confirmations"),
             note(f"Paired differences to {f.label}, points, with 95 % intervals. Selected: the search's own seeds and prompts, the best of "
                  f"{count(len(f.scored), 'scored candidate')}. Confirmed: seeds and prompts that it never saw.", several))


def _confirmation(f: Findings, d: Derived, then: EntrySummary | None, now: EntrySummary | None) -> list[Any]:
    old, new = then.score if then else None, now.score if now else None
    base = next((e.score.overall for e in d.entries if e.id == BASELINE_ID and e.score), None)
    return [named(f, d.candidate) if then else ref(f, d.candidate),
            cell(points(old.delta, old.delta_ci, sign=True) if old else "–", number=True), len(old.by_seed) if old else "–",
            cell(h("strong", points(new.delta, new.delta_ci, sign=True)) if new else "–", number=True), len(d.seeds), points(base),
            _words(now) or progress_of(d), h("span", d.name, class_="whole")]


def _words(now: EntrySummary | None) -> str:
    if now is None:
        return ""
    if now.score is None:
        return f"failed: {now.cause}"
    return wording.told_apart(now.score.delta_ci, "the baseline")


@dataclass(frozen=True)
class Bar:
    """A line of a forest plot."""

    id: str
    words: str
    value: float
    ci: Sequence[float] | None
    look: str            # class of its dot
    bold: bool = False


def _forest(bars: list[Bar], title: str, axis: str, name: str) -> Html | None:
    """Points with intervals about 0. Intervals of bold bars set the scale, others may go on beyond it."""
    if not bars:
        return None
    low, high = svg.padded([0.0, *(b.value for b in bars), *(v for b in bars if b.bold for v in b.ci or ())], 0.12, floor=1.0)
    x, bottom = svg.Scale(low, high, 360, 730), 34 + ROW * len(bars)
    out = [*svg.axis_x(x, 26, bottom, axis, sign=True), svg.segment(x(0), 26, x(0), bottom, "zero")]
    for i, b in enumerate(bars):
        y = 34 + ROW * i + ROW / 2 - 4
        out += [svg.label(8, y + 4, [h("tspan", b.id, class_="id"), "  " if b.id else "", cut(b.words, 44)], "bold" if b.bold else ""),
                *(svg.span(x, b.ci[0], b.ci[1], y, "interval") if b.ci else []),
                svg.mark(x(b.value), y, f"dot {b.look}", f"{b.id} {b.words}: {points(b.value, b.ci, sign=True)}", 5),
                svg.label(svg.WIDTH - 8, y + 4, points(b.value, b.ci, sign=True), "figure", "end")]
    return svg.figure(bottom + 40, title, out, name=name)


def _ablations(f: Findings) -> Html | None:
    out = []
    for d in f.of("ablate"):
        rows = [[e["mechanism"] or "–", cell(points(e["effect"], e["ci"], sign=True) if not e["cause"] else f"failed: {e['cause']}", number=True),
                 _needed(e)] for e in d.report["effects"]]
        bars = [Bar("", e["mechanism"], e["effect"], e["ci"], "confirmed", bold=True) for e in d.report["effects"] if e["effect"] is not None]
        out.append(h("div", h("h3", "Ablation of ", named(f, d.candidate) if d.candidate in f.entries else d.candidate),
                     _forest(bars, f"Effect of each mechanism of {d.candidate}", f"points that {d.candidate} has over itself without it", d.name),
                     table(["Mechanism", "#Effect, points", "What it says"], rows, f"Ablation of {d.candidate}") if rows else h("p", "No entry yet."),
                     note(f"Effect: Overall of {d.candidate} less that of the same code with the mechanism switched off, 95 % interval, paired over "
                          f"{count(len(d.seeds), 'seed')}; {d.purpose} prompts. ", progress_of(d))))
    return h("div", out) if out else None


def _needed(effect: dict[str, Any]) -> str:
    if effect["ci"] is None:
        return "–" if effect["effect"] is None else "one seed: no interval"
    if wording.same(effect["effect"], effect["ci"]):
        return "the same on every seed"
    return "it helps" if effect["ci"][0] > 0 else "it harms" if effect["ci"][1] < 0 else "not told apart from none"


def _controls(f: Findings) -> Html | None:
    """What comes of training on random rewards."""
    rows = [[named(f, e["id"]) if e["id"] in f.entries else e["id"], d.name, cell(points(e["random"], e["random_ci"]), number=True),
             cell(points(e["task"]), number=True), cell(points(e["untrained"]), number=True)] for d in f.of("control") for e in d.report["control"]]
    head = ["Candidate", "Campaign", "#Random rewards", "#The task's", "#Untrained"]
    return h("div", h("h3", "Control: random rewards"), table(head, rows, "Random rewards"), note(
        "Overall of the same training with a coin in place of each reward. What it has over the untrained policy is no learning of the task.")) if rows else None


def _transfers(f: Findings) -> Html | None:
    rows = []
    for d in f.of("transfer"):
        now = itself(d)
        rows.append([named(f, d.candidate) if d.candidate in f.entries else d.candidate, d.name,
                     cell(points(now.score.delta, now.score.delta_ci, sign=True) if now and now.score else "–", number=True), len(d.seeds),
                     _words(now) or progress_of(d)])
    head = ["Candidate", "Campaign", "#Difference", "#Seeds", "What it says"]
    return h("div", h("h3", "In other settings"), table(head, rows, "Transfer")) if rows else None


def _reruns(f: Findings) -> Html | None:
    rows = []
    for d in f.of("rerun"):
        c = d.report.get("comparison")
        same = c and all(v for k, v in c.items() if k.startswith("identical")) and not c["hashes_changed"]
        rows.append([named(f, d.candidate) if d.candidate in f.entries else d.candidate, d.name,
                     "not finished" if not c else "every curve, completion, score and weight came again, bit for bit" if same else
                     f"numbers differ: Overall {points(c['overall'][0])}, then {points(c['overall'][1])}"])
    return h("div", h("h3", "Run again from their records"), table(["Candidate", "Campaign", "Outcome"], rows, "Reruns")) if rows else None
