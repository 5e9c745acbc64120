"""A section for each of the best candidates: what was proposed, what changed in the code, what came out, how it was read."""
from __future__ import annotations

import difflib
from collections.abc import Iterable

from .. import stats, wording
from ..entry import Entry
from ..types import BASELINE_ID
from . import curves
from .gather import Findings, benchmarks
from .markup import Html, cut, h, join, linked, prose, table
from .words import count, duration, named, note, points, refs, section, unscored, verdict

DIFF_LINES = 400


def details(f: Findings) -> Html:
    left = len(f.entries) - len(f.detailed)
    rows = {r["id"]: r for r in f.rows}
    return section(
        "details", "Candidates in detail", h("p", f"{count(len(f.detailed), 'candidate')}, in the leaderboard's order." + (
            f" {left:,} others are left out: the best, the winner's line and what was tested again are here. `poise-hpc report CAMPAIGN "
            "--candidates N` takes in more of them, `poise-hpc show CAMPAIGN CANDIDATE` has one." if left else "")) if f.entries else
        h("p", "Nothing is archived yet."),
        [detail(f, f.records[id], verdict(rows[id])) for id in f.detailed])


def detail(f: Findings, e: Entry, said: str) -> Html:
    s, p = f.entries[e.id].score, e.proposal
    heading = [h("span", e.id, class_="id"), " ", h("span", cut(e.name, 80), class_="name"),
               h("span", points(s.overall, s.ci) if s else "", class_="figure"),
               h("span", points(s.delta, s.delta_ci, sign=True) if s and s.delta is not None else "", class_="figure"),
               h("span", cut(said, 60), class_="said")]
    facts = [("Parents", refs(f, e.parents)), ("Proposed by", cut(e.proposer, 80)),
             ("Mechanisms", ", ".join(cut(m, 60) for m in p.get("mechanisms", ())) or "none declared"),
             ("Hypothesis", linked(cut(p.get("hypothesis") or "none stated", 2000))),
             ("Expected", linked(cut(p.get("expected_effect") or "none stated", 2000))),
             ("Sources", join([linked(cut(source, 200)) for source in p.get("sources", ())], "; ") or "none"), ("Archived", e.created)]
    return h("details", h("summary", *heading), h("dl", [[h("dt", name), h("dd", value)] for name, value in facts], class_="facts"),
             h("div", h("div", h("h4", "What is changed"), prose(p.get("description") or "none stated")),
               h("div", h("h4", f"Reflection, by {cut(e.reflection.get('author', 'nobody'), 60)}"), prose(wording.without_verdict(e.reflection) if e.reflection.get("text") else "none"),
                 note("Symptoms: ", ", ".join(e.reflection.get("symptoms", ()))) if e.reflection.get("symptoms") else None), class_="columns"),
             h("div", h("h4", unscored(f.entries[e.id]).capitalize()), prose(e.message)) if s is None else None, scores(f, e),
             curves.figure(f, e, f.records.get(BASELINE_ID), seeds_of_base=False), change(f, e), attempts(e), id=e.id, class_="candidate")


def scores(f: Findings, e: Entry) -> Html | None:
    """By benchmark and seed at the last point, and Overall; differences to the baseline with their intervals."""
    s = f.entries[e.id].score
    if s is None:
        return None
    base = f.records.get(BASELINE_ID) if e.id != BASELINE_ID else None
    theirs = benchmarks(base, f.campaign) if base else {}
    seeds = sorted(s.by_seed, key=int)
    rows = []
    for name, mine in benchmarks(e, f.campaign).items():
        rows.append([name, *(points(mine.get(seed)) for seed in seeds), points(*stats.mean_interval(list(mine.values()))),
                     _against(mine, theirs.get(name))])
    against = points(s.delta, s.delta_ci, sign=True) if s.delta is not None else "–"
    rows.append([h("strong", f"Overall ({f.campaign.config.evaluate.score})"), *(points(s.by_seed[seed]) for seed in seeds), points(s.overall, s.ci),
                 h("strong", against)])
    head = ["Benchmark", *(f"#Seed {seed}" for seed in seeds), "#Mean [95 %]", f"#Against {cut(f.label, 20)}"]
    return table(head, rows, f"Scores of {e.id}, points")


def _against(mine: dict[str, float], theirs: dict[str, float] | None) -> str:
    found = stats.paired_difference(mine, theirs) if theirs else None
    return points(*found, sign=True) if found else "–"


def change(f: Findings, e: Entry) -> Html:
    """The package against its first parent's; whole where there is none to compare with."""
    parent = f.records.get(e.parents[0]) if e.parents else None
    if parent is None:
        lines: list[str] = [line for name, code in e.code.items() for line in [f"+++ {name}", *(f" {x}" for x in code.splitlines())]]
        title: Html | str = "Code" + (f" (the record of its parent {e.parents[0]} is not at hand)" if e.parents else "")
    else:
        lines = list(difference(parent.code, e.code))
        title = join(["Code against its parent ", named(f, parent.id)])
    rest = f"… {len(lines) - DIFF_LINES:,} more lines; candidates/{e.id} and its record have them all" if len(lines) > DIFF_LINES else None
    shown = [h("span", line + "\n", class_=_class(line)) for line in lines[:DIFF_LINES]]
    return h("details", h("summary", title), h("pre", h("code", shown, rest)) if lines else h("p", "No line differs."), class_="more")


def difference(old: dict[str, str], new: dict[str, str]) -> Iterable[str]:
    """Unified, file by file."""
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name, "").splitlines(), new.get(name, "").splitlines()
        yield from difflib.unified_diff(before, after, f"parent/{name}", f"this/{name}", lineterm="", n=3)


def _class(line: str) -> str | None:
    kinds = {"+++": "file", "---": "file", "@@": "hunk", "+": "added", "-": "removed"}
    return next((name for start, name in kinds.items() if line.startswith(start)), None)


def attempts(e: Entry) -> Html:
    rows = [[a["stage"], "–" if a.get("seed") is None else a["seed"], a["number"], a["outcome"] or "–", cut(a.get("cause") or "–", 80),
             duration((a.get("run_seconds") or 0.0) * a.get("ranks", 1))] for a in e.attempts]
    walls = sorted({f"{k}: {v}" for a in e.attempts for k, v in (a.get("walls") or {}).items()})
    failed = [c for c in e.checks if not c["passed"]]
    return h("details", h("summary", f"Attempts ({len(e.attempts)}) and checks ({len(e.checks) - len(failed)} of {len(e.checks)} passed)"),
             table(["Stage", "#Seed", "#Number", "Outcome", "Cause", "#Run time"], rows, f"Attempts of {e.id}") if rows else None,
             table(["Check", "What it found"], [[c["name"], cut(c["message"], 400)] for c in failed], f"Failed checks of {e.id}") if failed else None,
             note("Isolation: " + "; ".join(walls)) if walls else None,
             note("SHA-256: ", join([h("span", f"{k} {str(v)[:16]}") for k, v in sorted(e.hashes.items())], "; ")) if e.hashes else None, class_="more")
