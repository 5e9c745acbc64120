"""What a reader sees first: what was searched, what came out, and how much of it may be luck."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .. import stats
from ..types import BASELINE_ID, EntrySummary
from .confirmed import itself
from .gather import Findings
from .markup import Html, cut, h, join, table
from .words import count, duration, named, note, points, ref

PROBLEMS = 20   # lines
ACTIVE = 40     # rows


def opening(f: Findings) -> Html:
    return h("div", header(f), _problems(f), result(f), facts(f), running(f), id="top")


def header(f: Findings) -> Html:
    return h("header", h("p", "Search for policy-optimization algorithms", class_="kicker"), h("h1", cut(f.campaign.root.name, 80)),
             h("p", state(f), class_="state"))


def state(f: Findings) -> str:
    if f.status is None:
        return "Its state could not be read."
    b = f.status["budget"]
    screened = f"; screened out: {b['screened_out']:,}" if b["screened_out"] else ""
    if f.status["done"]:
        words = "Finished." if b["proposed"] >= b["candidates"] else "Ended early."
    elif f.status["held"]:
        words = f"Held, waiting for a person: {', '.join(f.status['held'])}."
    elif not f.entries and not f.active:
        words = "Just created."
    else:
        words = "In progress." if f.status["driver"] else "Not finished, and nobody drives it now."
    return (f"{words} {b['proposed']:,} of {b['candidates']:,} candidates proposed; archived, with the baseline: {len(f.entries):,}; "
            f"failed: {len(f.failed):,}{screened}.")


def _problems(f: Findings) -> Html | None:
    if not f.problems:
        return None
    some = [(id, cut(text.replace(f"{f.campaign.root}/", ""), 400)) for id, text in list(f.problems.items())[:PROBLEMS]]
    left = len(f.problems) - len(some)
    return h("div", h("p", h("strong", f"{count(len(f.problems), 'problem')}: "), "this report goes on without what could not be read."),
             h("ul", [h("li", h("span", id, class_="id"), ": ", text) for id, text in some]),
             note(f"and {left:,} more; `poise-hpc archive verify CAMPAIGN` names them all") if left else None, class_="problems", role="note")


def result(f: Findings) -> Html:
    best = f.winner
    if best is None:
        return h("div", h("p", _nothing_yet(f), class_="lead"), class_="result")
    s = best.score
    assert s is not None
    main = h("div", h("p", "Best candidate, as selected", class_="kicker"), h("p", named(f, best.id), class_="lead"),
             h("p", points(s.delta, sign=True) if s.delta is not None else points(s.overall), class_="big"),
             h("p", _scale(f, best), class_="under"))
    found = [(d, now) for d in f.of("confirm", best.id) if (now := itself(d)) and now.score and now.score.delta is not None]
    second = h("div", h("p", "The same, confirmed", class_="kicker"), *(_confirmed(f, d, now) for d, now in found)) if found else None
    return h("div", h("div", main, second, class_="pair"), h("p", luck(f, best)), h("p", _standing(best, bool(found))), class_="result")


def _scale(f: Findings, best: EntrySummary) -> str:
    s = best.score
    assert s is not None
    if s.delta is None:
        return f"points Overall; how it stands to {f.label} is not known"
    interval = f"95 % interval {points(s.delta, s.delta_ci, sign=True).partition(' ')[2]}" if s.delta_ci else "one training seed: no interval"
    base = f.baseline.score.overall if f.baseline and f.baseline.score else None
    return f"points over {f.label}, {interval}; Overall {points(s.overall)} against {points(base)}, {count(len(s.by_seed), 'paired seed')}"


def _confirmed(f: Findings, d: Any, now: EntrySummary) -> Html:
    s = now.score
    assert s is not None
    interval = f"95 % interval {points(s.delta, s.delta_ci, sign=True).partition(' ')[2]}" if s.delta_ci else "one training seed: no interval"
    return join([h("p", h("a", d.name, href="#confirmed"), class_="lead"), h("p", points(s.delta, sign=True), class_="big"),
                 h("p", f"points over {f.label}, {interval}; {count(len(d.seeds), 'fresh seed')}, prompts that selection never saw", class_="under")])


def _nothing_yet(f: Findings) -> str:
    if not f.entries:
        return "Nothing is archived yet: there is no result."
    if f.baseline and f.baseline.score is None:
        return f"The baseline failed ({cut(f.baseline.cause, 60)}): there is nothing to compare candidates with."
    if not f.unscored:
        return "Only the baseline is archived: there is no result yet."
    screened = len(f.unscored) - len(f.failed)
    return f"No candidate got a score: {len(f.failed)} failed" + (f", {screened} were screened out" if screened else "") + ". See how under Outcomes."


def luck(f: Findings, best: EntrySummary) -> str:
    """The honest sentence: what picking the best of so many is worth by itself."""
    s, n = best.score, len(f.scored)
    assert s is not None
    seen = (f"It is the best of {count(n, 'scored candidate')}, picked on the same seeds and prompts that it is shown with, so its lead is too large on "
            "average. ") if n > 1 else "It is the only scored candidate. "
    if s.delta is None:
        return seen
    if f.noise is None:
        return seen + "How much too large cannot be said without replicates: give search.train_seeds at least two."
    if s.delta <= 0:
        return seen + f"Even so it is not above {f.label}."
    lead = f.noise * stats.expected_best(n)
    if n == 1:
        return seen + f"One standard error of a candidate is {f.noise:.2f} points."
    return (seen + f"If all {n:,} were exactly as good as {f.label}, the best would still seem {lead:.1f} points better on average (one standard error of "
            f"a candidate is {f.noise:.2f} points); it seems {s.delta:.1f} better. " +
            ("Luck of that size explains it." if s.delta <= lead else "Luck of that size explains only a part, if the noise is as it was estimated."))


def _standing(best: EntrySummary, done: bool) -> Html:
    if done:
        return join(["What counts is the confirmation: ", h("a", "selected against confirmed", href="#confirmed"), "."])
    return join(["It was not confirmed: ", h("code", f"poise-hpc confirm CAMPAIGN {best.id}"), " trains it and the baseline on fresh seeds, and "
                 "evaluates on prompts that selection never saw. Until then it is a hypothesis."])


def facts(f: Findings) -> Html:
    c, r, t = f.campaign.config, f.campaign.config.rollout, f.campaign.config.train
    measures = "; ".join(f"{name}/{kind} × {w:g} ({b.problems} problems × {b.samples})" for name, b in c.evaluate.benchmarks.items()
                         for kind, w in b.metrics.items())
    model = f"{c.model.path}" if c.model.path else f"the task's own{_options(c.model.options)}"
    proposer = f"a language model ({', '.join(c.agent.models['default'])})" if c.search.proposer == "llm" else "offline, by rules and chance"
    spent = f"{duration(sum(e.run_seconds for e in f.entries.values()))} of run time archived"
    if f.status and not f.status["done"]:
        b = f.status["budget"]
        spent += f", {duration(3600 * b['run_hours'])} with what is not, {duration(60 * b['wall_clock_min'])} since it was created"
    llm = f.status.get("llm") if f.status else None
    rows: list[tuple[str, Any]] = [
        ("Task", f"{c.task.name}{_options(c.task.options)}"), ("Model", f"{model}, {c.model.dtype}"),
        ("Baseline", join([ref(f, BASELINE_ID), f" {cut(f.label, 60)}: every candidate is compared with it, seed by seed"])),
        ("Training", f"{t.steps} steps of {r.prompts} prompts × {r.group_size} completions, {t.epochs * t.minibatches} optimizer steps each, "
         f"learning rate {t.learning_rate:g}"),
        ("Evaluation", f"{measures}; at {', '.join(f'{100 * a:g} %' for a in c.evaluate.at)} of training, "
         f"{'their mean counts' if c.evaluate.score == 'curve' else 'the last counts'}; {c.evaluate.purpose} prompts"),
        ("Seeds", f"{', '.join(map(str, c.search.train_seeds))} (the same for all)"),
        ("Search", f"{c.search.candidates:,} candidates; proposer: {proposer}; parents: {c.search.strategy}"),
        ("Used", spent + (f"; language model {llm['calls']:,} calls, {llm['tokens']:,} tokens, cost {llm['cost']}" if llm else ""))]
    return h("dl", [[h("dt", name), h("dd", value)] for name, value in rows], class_="facts wide")


def _options(options: dict[str, Any]) -> str:
    return f" ({cut(', '.join(f'{k} {v}' for k, v in _flat(options)), 160)})" if options else ""


def _flat(options: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Nested ones as train.steps."""
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield above + name, ", ".join(map(str, value)) if isinstance(value, list | tuple) else value


def running(f: Findings) -> Html | None:
    """Candidates on their way."""
    if not f.active:
        return None
    jobs = {r["candidate"]: f"{r['state']}: {r['stage']} {r['step']}/{r['total']}" for r in (f.status or {}).get("running", [])}
    rows = [[c["id"], cut(c["name"], 60), ", ".join(c["parents"]) or "–", c["stage"], cut(c["cause"] or "–", 60), cut(jobs.get(c["id"], "–"), 60)]
            for c in f.active[:ACTIVE]]
    left = len(f.active) - len(rows)
    return h("section", h("h2", "On their way"), table(["Candidate", "Name", "Parents", "Stage", "Cause", "Job"], rows, "Not archived yet"),
             note(f"and {left:,} more; `poise-hpc status CAMPAIGN` has them") if left > 0 else None, id="running")
