"""What the search cost: run time by stage and by candidate, lost attempts, phases of training, the language model."""
from __future__ import annotations

from collections import Counter
from typing import Any

from ..types import Outcome, candidate_number
from . import svg
from .gather import Findings
from .markup import Html, h, table
from .words import count, duration, note, section, shade, tip

BARS = 400                                                  # candidates that get one each
NO_SECONDS = ("tokens", "wall")                             # of Entry.timings: not a phase


def costs(f: Findings) -> Html:
    title = "Cost"
    seconds = sum(e.run_seconds for e in f.entries.values())
    if not f.entries:
        return section("cost", title, h("p", "Nothing is archived yet."))
    whole = len(f.records) >= len(f.entries)
    of = "all archived candidates" if whole else f"the {count(len(f.records), 'candidate')} read for this report"
    budget = f.status["budget"] if f.status else {}
    limit = f" of {budget['run_hours_limit']:g} h allowed" if budget.get("run_hours_limit") else ""
    best = f" The candidates up to the best one, {f.winner.id}, took {duration(_until(f, f.winner.id))} of it." if f.winner else ""
    return section(
        "cost", title, h("p", f"{duration(seconds)}{limit} of run time in {count(len(f.entries), 'archived candidate')}: job time times ranks, all "
                         f"attempts, without queue wait.{best}"),
        _by_candidate(f), h("div", _by_stage(f, of), _phases(f, of), class_="columns"), _language_model(f))


def _until(f: Findings, id: str) -> float:
    """Seconds of the candidates up to this one."""
    return sum(e.run_seconds for e in f.entries.values() if candidate_number(e.id) <= candidate_number(id))


def _by_candidate(f: Findings) -> Html | None:
    entries = list(f.entries.values())
    if not any(e.run_seconds for e in entries):
        return None
    last = max(candidate_number(e.id) for e in entries)
    unit, words = (3600.0, "hours") if max(e.run_seconds for e in entries) >= 3600 else (60.0, "minutes")
    x = svg.Scale(-0.5, last + 0.5, 60, 948)
    y = svg.Scale(0, max(e.run_seconds for e in entries) / unit * 1.08, 150, 14)
    wide = max((x.end - x.start) / (last + 1) * 0.72, 0.6)
    tops = [(x(candidate_number(e.id)), y(e.run_seconds / unit), e) for e in entries]
    bars = [svg.cloud([(at, top) for at, top, _ in tops], "even")] if len(entries) > BARS else [
        h("rect", h("title", f"{tip(e)}: {e.run_seconds / unit:.2f} {words}"), x=svg.px(at - wide / 2), y=svg.px(top), width=svg.px(wide),
          height=svg.px(150 - top), class_=f"dot {shade(f, e)}") for at, top, e in tops]
    return svg.figure(196, f"Run time of each candidate, {words}", svg.axis_y(y, 60, 948, 4),
                      svg.axis_x(x, 150, 150, "candidate, in the order of proposal"),
                      svg.label(14, 82, f"run time, {words}", "axis", "middle", transform="rotate(-90 14 82)"), bars, name="cost")


def _by_stage(f: Findings, of: str) -> Html:
    """Attempts by stage: how many, how long, and what of it was lost to other ends than success."""
    jobs, spent, lost = Counter[str](), Counter[str](), Counter[str]()
    for e in f.records.values():
        for a in e.attempts:
            seconds = (a.get("run_seconds") or 0.0) * a.get("ranks", 1)
            jobs[a["stage"]] += 1
            spent[a["stage"]] += seconds
            lost[a["stage"]] += seconds if a["outcome"] in (Outcome.PREEMPTED, Outcome.INFRA_ERROR) else 0.0
    rows = [[stage, f"{jobs[stage]:,}", duration(spent[stage]), duration(lost[stage])] for stage in sorted(spent, key=lambda s: -spent[s])]
    return h("div", table(["Stage", "#Jobs", "#Run time", "#Of it preempted or lost"], rows, "By stage"), note(f"Of {of}."))


def _phases(f: Findings, of: str) -> Html | None:
    phases = Counter[str]()
    for e in f.records.values():
        phases.update({k: v for k, v in e.timings.items() if k not in NO_SECONDS})
    total = phases.total()
    rows = [[phase, duration(seconds), f"{100 * seconds / total:.1f} %"] for phase, seconds in phases.most_common(10)] if total else []
    return h("div", table(["Phase of training", "#Time", "#Share"], rows, "Where training time went"), note(f"Of {of}.")) if rows else None


def _language_model(f: Findings) -> Html:
    llm: dict[str, Any] | None = f.status.get("llm") if f.status else None
    if not llm:
        return note("No language model was asked.")
    rows = [[name, f"{o['calls']:,}", f"{o['tokens']:,}", o["cost"]] for name, o in llm["operators"].items()]
    rows.append(["all", f"{llm['calls']:,}", f"{llm['tokens']:,}", llm["cost"]])
    return h("div", h("h3", "Language model"), table(["Operator", "#Calls", "#Tokens", "#Cost"], rows, "Language model"),
             note("Cost in the currency of the configured prices; calls of unknown end count with their worst case."))
