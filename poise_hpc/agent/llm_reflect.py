"""The reflective analysis operator A: a mechanism-level diagnosis whose figures are checked against the record.

The rules (`agent.reflect`) speak first: their verdict comes from the paired interval. The model explains, and judges
the hypothesis; it may not call supported what the interval refutes, nor the reverse: that gives "undecided".
A cited figure that does not stand in the record goes back once; what is still wrong is left out, and said so.
"""
from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ..replay import EmptyReply, LLM, Refused
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
    quantity: str = Field(description="a curve's column, a benchmark like hard/pass@32, overall, final or delta")
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
    schema = json_schema(Diagnosis)
    try:
        found = talk.ask(text, reads_json(Diagnosis, _slugs), schema)
        if wrong := false_citations(facts, found):
            found = talk.ask(render("citations", wrong="\n".join(f"- {w}" for w in wrong)), reads_json(Diagnosis, _slugs), schema)
    except (Malformed, Refused, EmptyReply, BudgetExceeded) as error:
        return Reflection(rules.verdict, f"{rules.text}\n\n(No reflection by the language model: {error})", rules.symptoms, rules.author)
    return Reflection(settle(rules.verdict, found.verdict, facts.outcome), compose(facts, found),
                      tuple(dict.fromkeys([*rules.symptoms, *found.symptoms])), f"llm:{talk.model}")


def settle(rules: str, model: str, outcome: Outcome) -> str:
    """The verdict of both: a failure stays one, and words do not turn an interval round."""
    if outcome is not Outcome.SUCCEEDED:
        return rules
    return "undecided" if {rules, model} == {"supported", "refuted"} else model


def false_citations(facts: Facts, found: Diagnosis) -> list[str]:
    out = []
    for c in found.citations:
        true = evidence.find_figure(facts, c.quantity, c.step)
        where = f"{c.quantity}" + (f" at step {c.step}" if c.step is not None else "")
        if true is None:
            out.append(f"{where} = {c.value:g}: no such figure was shown")
        elif not abs(c.value - true) <= TOLERANCE * abs(true) + 1e-3:
            out.append(f"{where} = {c.value:g}: it is {evidence.number(true)}")
    return out


def compose(facts: Facts, found: Diagnosis) -> str:
    wrong = false_citations(facts, found)
    right = [c for c in found.citations if not false_citations(facts, found.model_copy(update={"citations": [c]}))]
    figures = "; ".join(f"{c.quantity}" + (f" at step {c.step}" if c.step is not None else "") + f" {c.value:g}" for c in right)
    note = f"\n\n({len(wrong)} cited figures do not stand in the record and were left out of this list.)" if wrong else ""
    return f"{found.diagnosis.strip()}\n\nFigures: {figures or 'none'}.{note}\n\nNext: {found.next_step.strip()}"


def outcome_text(facts: Facts) -> str:
    if facts.outcome is Outcome.SCREENED_OUT:
        return "\n".join([f"{facts.cause}: {evidence.screening_text(facts.screenings[-1])}",
                          "- training: " + ", ".join(f"{k} {evidence.number(v)}" for k, v in sorted(facts.behaviour.items()))])
    if facts.outcome is not Outcome.SUCCEEDED:
        return f"failed: {facts.cause}\n\n{facts.message}"
    return "\n".join([f"- this candidate: {evidence.score_text(facts.score)}", f"- its parent: {evidence.score_text(facts.parent_score)}",
                      f"- GRPO: {evidence.score_text(facts.baseline_score)}",
                      "- training: " + ", ".join(f"{k} {evidence.number(v)}" for k, v in sorted(facts.behaviour.items()))])


def _slugs(found: Diagnosis) -> list[str]:
    return [f"symptom {s!r} is no slug like entropy-collapse" for s in found.symptoms if not SLUG.fullmatch(s)]
