"""The reflective analysis operator A: a mechanism-level diagnosis whose figures are checked against the record.

The rules (`agent.reflect`) speak first: their verdict comes from the paired interval, and stands. The model explains, and judges
the hypothesis, which also says something about the training: that verdict is kept apart, and never becomes the scores'.
A cited figure that does not stand in the record goes back once; what is still wrong is left out, and said so. Figures in the
free text are not looked up.
"""
from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ..replay import EmptyReply, LLM, Refused, TooLong
from ..transcript import BudgetExceeded
from ..types import Outcome, Reflection
from . import evidence
from .base import Facts
from .conversation import Conversation, Malformed, json_schema, reads_json
from .implement import proposal_text
from .prompts import render
from .propose import SLUG

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


def reflect(llm: LLM, facts: Facts, rules: Reflection) -> Reflection:
    """The model's reflection, or the rules' own where the model has none to give or the budget is spent."""
    talk = Conversation(llm, "reflect", facts.id)
    text = render("reflect", proposal=proposal_text(facts.proposal), outcome=outcome_text(facts),
                  curves=evidence.curves_text(facts.curves), baseline_curves=evidence.curves_text(facts.baseline_curves),
                  rules=f"{rules.verdict}; symptoms: {', '.join(rules.symptoms) or 'none'}\n{rules.text}")
    schema, read = json_schema(Diagnosis), reads_json(Diagnosis, lambda found: _problems(found, facts))
    try:
        found = talk.ask(text, read, schema)
        if wrong := false_citations(facts, found):
            found = talk.ask(render("citations", wrong="\n".join(f"- {w}" for w in wrong)), read, schema)
    except (Malformed, Refused, EmptyReply, TooLong, BudgetExceeded) as error:
        return Reflection(rules.verdict, f"{rules.text}\n\n(No reflection by the language model: {error})", rules.symptoms, rules.author)
    return Reflection(rules.verdict, compose(facts, found), tuple(dict.fromkeys([*rules.symptoms, *found.symptoms])), f"llm:{talk.model}",
                      found.verdict)


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


def compose(facts: Facts, found: Diagnosis) -> str:
    wrong = false_citations(facts, found)
    right = [c for c in found.citations if not false_citations(facts, found.model_copy(update={"citations": [c]}))]
    figures = "; ".join(map(_show, right))
    note = f"\n\n({len(wrong)} cited figures do not stand in the record and were left out of this list.)" if wrong else ""
    return f"{found.diagnosis.strip()}\n\nFigures: {figures or 'none'}.{note}\n\nNext: {found.next_step.strip()}"


def outcome_text(facts: Facts) -> str:
    if facts.outcome is not Outcome.SUCCEEDED:
        return f"failed: {facts.cause}\n\n{facts.message}"
    return "\n".join([f"- this candidate: {evidence.score_text(facts.score)}", f"- its parent: {evidence.score_text(facts.parent_score)}",
                      f"- GRPO: {evidence.score_text(facts.baseline_score)}",
                      "- training: " + ", ".join(f"{k} {evidence.number(v)}" for k, v in sorted(facts.behaviour.items()))])


def _problems(found: Diagnosis, facts: Facts) -> list[str]:
    missing = [] if found.citations or not (facts.curves or facts.score) else ["citations: at least one figure was wanted"]
    return missing + [f"symptom {s!r} is no slug like entropy-collapse" for s in found.symptoms if not SLUG.fullmatch(s)]
