"""The reflective analysis operator A: a mechanism-level diagnosis whose figures are checked against the record.

The rules (`agent.reflect`) speak first: their verdict comes from the paired interval, and stands. The model explains, and judges
the hypothesis, which also says something about the training: that verdict is kept apart, and never becomes the scores'.
A figure that does not stand in the record goes back once, a cited one and one of the free text alike. What is still wrong is left out of the
citations, and marked in the text.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ..config import Config
from ..replay import EmptyReply, LLM, Refused, TooLong
from ..transcript import BudgetExceeded
from ..types import BASELINE_ID, Outcome, Reflection, Score
from . import evidence, figures
from .base import Facts
from .conversation import Conversation, Malformed, json_schema, reads_json
from .implement import proposal_text
from .package_text import show_package
from .prompts import render
from .propose import SLUG
from .reflect import message_line

TOLERANCE = 0.02  # relative, of a cited figure; prompts show four digits


class Citation(BaseModel):
    model_config = ConfigDict(extra="ignore")
    of: Literal["candidate", "grpo", "parent"] = Field(description="whose figure it is")
    quantity: str = Field(description="a curve's column, a benchmark like hard/pass@32, overall, final, delta, overall@0.5, delta.low")
    step: int | None = Field(description="of a curve; null for a score")
    value: float


class Diagnosis(BaseModel):
    model_config = ConfigDict(extra="ignore")
    verdict: Literal["supported", "refuted", "undecided"] = Field(description="of the hypothesis")
    diagnosis: str = Field(description="Markdown: which mechanism caused which change in training and scores, and how")
    citations: list[Citation] = Field(description="the figures that the diagnosis rests on, as shown")
    symptoms: list[str] = Field(description="slugs like entropy-collapse, kl-spike")
    next_step: str = Field(description="what a child of this candidate should change, and what would show it")


def reflect(llm: LLM, facts: Facts, rules: Reflection, config: Config) -> Reflection:
    """The model's reflection, or the rules' own where the model has none to give or the budget is spent."""
    talk, seen = Conversation(llm, "reflect", facts.id), shown(facts, rules, config)
    schema, read = json_schema(Diagnosis), reads_json(Diagnosis, lambda found: _problems(found, facts))
    try:
        found = talk.ask(render("reflect", **seen), read, schema)
        if wrong := [*false_citations(facts, found), *strangers(found, seen)]:
            found = talk.ask(render("citations", wrong="\n".join(f"- {w}" for w in wrong)), read, schema)
    except (Malformed, Refused, EmptyReply, TooLong, BudgetExceeded) as error:
        return Reflection(rules.verdict, f"{rules.text}\n\n(No reflection by the language model: {error})", rules.symptoms, rules.author)
    return Reflection(rules.verdict, compose(facts, found, seen), tuple(dict.fromkeys([*rules.symptoms, *found.symptoms])), f"llm:{talk.model}",
                      found.verdict)


def shown(facts: Facts, rules: Reflection, config: Config) -> dict[str, str]:
    """Everything that the model can have a figure from."""
    curves = evidence.curves_of(facts)
    last = evidence.last_step(*curves.values())
    baseline = "This candidate is GRPO." if facts.id == BASELINE_ID else evidence.curves_text(facts.baseline_curves, last)
    parent = evidence.curves_text(facts.parent_curves, last) if facts.parent_curves else "The parent is GRPO, or has none."
    return {"recipe": evidence.recipe(config), "legend": evidence.legend(), "baseline_curves": baseline, "proposal": proposal_text(facts.proposal),
            "package": show_package(facts.files) or "There is none.", "outcome": outcome_text(facts),
            "parent_curves": parent, "curves": evidence.curves_text(facts.curves, last),
            "rules": f"{rules.verdict}; symptoms: {', '.join(rules.symptoms) or 'none'}\n{rules.text}"}


def strangers(found: Diagnosis, seen: Mapping[str, str]) -> list[str]:
    """Figures of the free text that were not shown."""
    return [f"{f.text} in the diagnosis: it was not shown, and is no difference, ratio or percentage of two that were and stand beside it"
            for f in figures.unknown(found.diagnosis, "\n".join(seen.values()))]


def false_citations(facts: Facts, found: Diagnosis) -> list[str]:
    out = []
    for c in found.citations:
        true = evidence.find_figure(facts, c.of, c.quantity, c.step)
        if true is None:
            out.append(f"{_show(c)}: no such figure was shown")
        elif not abs(c.value - true) <= TOLERANCE * abs(true) + 1e-3:
            out.append(f"{_show(c)}: it is {evidence.number(true)}")
    return out


def _show(c: Citation) -> str:
    owner = {"candidate": "", "grpo": "GRPO's ", "parent": "the parent's "}[c.of]
    return f"{owner}{c.quantity}" + (f" at step {c.step}" if c.step is not None else "") + f" = {c.value:g}"


def compose(facts: Facts, found: Diagnosis, seen: Mapping[str, str]) -> str:
    wrong = false_citations(facts, found)
    right = [c for c in found.citations if not false_citations(facts, found.model_copy(update={"citations": [c]}))]
    text, cited = figures.marked(found.diagnosis.strip(), "\n".join(seen.values())), "; ".join(map(_show, right))
    if facts.outcome is Outcome.CANDIDATE_ERROR and facts.message.strip():
        text = f"{message_line(facts)}\n\n{text}"
    note = f"\n\n({len(wrong)} cited figures do not stand in the record and were left out of this list.)" if wrong else ""
    return f"{text}\n\nFigures: {cited or 'none'}.{note}\n\nNext: {found.next_step.strip()}"


def outcome_text(facts: Facts) -> str:
    if facts.outcome is Outcome.SCREENED_OUT:
        return "\n".join([f"{facts.cause}: {evidence.screening_text(facts.screenings[-1])}",
                          "- training: " + ", ".join(f"{k} {evidence.number(v)}" for k, v in sorted(facts.behaviour.items()))])
    if facts.outcome is not Outcome.SUCCEEDED:
        return f"failed: {facts.cause}\n\n{facts.message}"
    lines = [f"- this candidate: {evidence.score_text(facts.score)}{_by_seed(facts.score)}"]
    if paired := evidence.parent_difference(facts):
        lines += [f"- against its parent: {evidence.interval(*paired)}", f"- its parent: {evidence.score_text(facts.parent_score)}"]
    if facts.baseline_score and facts.proposal.parents[:1] != (BASELINE_ID,):
        lines.append(f"- GRPO: {evidence.score_text(facts.baseline_score)}")
    return "\n".join([*lines, "- training: " + ", ".join(f"{k} {evidence.number(v)}" for k, v in sorted(facts.behaviour.items()))])


def _by_seed(score: Score | None) -> str:
    return "; by training seed " + ", ".join(f"{seed}: {evidence.number(v)}" for seed, v in sorted(score.by_seed.items())) if score else ""


def _problems(found: Diagnosis, facts: Facts) -> list[str]:
    missing = [] if found.citations or not (facts.curves or facts.score) else ["citations: at least one figure was wanted"]
    return missing + [f"symptom {s!r} is no slug like entropy-collapse" for s in found.symptoms if not SLUG.fullmatch(s)]
