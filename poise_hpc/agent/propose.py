"""The proposal operator P: several diverse ideas in one call, those that repeat the archive sent back with the reason.

POISE (Xia et al. 2026, arXiv:2603.23951) proposes N candidates from a parent. One idea becomes this candidate; the others travel in its
proposal (`details["alternatives"]`) and become its siblings', as long as it is pending: the evidence is the same then.
"""
from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from ..config import Config
from ..replay import LLM, models_for
from ..types import BASELINE_ID, Proposal, candidate_id, candidate_number
from . import catalogue, evidence
from .base import Context, Draft
from .conversation import Conversation, json_schema, reads_json
from .novelty import check_novelty, fields, stated_values
from .package_text import show_package
from .priors import Card, choose_cards
from .prompts import render

Input = Literal["reward", "components", "valid", "truncated", "group", "length", "logp_old", "logp_rollout", "logp_ref",
                "entropy", "progress", "step"]
PARENT_CHARS = 6000  # of the parent's change and reflection: whole, unless they are out of all proportion
NAME = re.compile(r"[A-Z0-9][A-Z0-9+.-]{1,39}")
SLUG = re.compile(r"[a-z0-9][a-z0-9-]{1,39}")


class Hyperparameter(BaseModel):
    model_config = ConfigDict(extra="ignore")
    name: str
    value: float
    meaning: str


class Idea(BaseModel):
    """One proposal, as the model writes it."""

    model_config = ConfigDict(extra="ignore")
    name: str = Field(description="short, upper case, e.g. VM-AV-GRPO")
    hypothesis: str = Field(description="one falsifiable sentence about training behaviour and scores")
    mechanisms: list[str] = Field(description="lower-case slugs of all mechanisms of the algorithm, inherited ones too")
    description: str = Field(description="what changes against the parent, with the full formula")
    expected_effect: str = Field(description="which figures move, in which direction, and why")
    responds_to: list[Input] = Field(description="what advantages and loss depend on, besides the log-probability itself")
    hyperparameters: list[Hyperparameter]
    second_parent: str | None = Field(default=None, description="id of an archived entry whose mechanism it takes over, else null")
    sources: list[str] = Field(description="ids of entries and papers it builds on")


class Ideas(BaseModel):
    model_config = ConfigDict(extra="ignore")
    proposals: list[Idea] = Field(description="the most promising first")


def propose(llm: LLM, context: Context, config: Config, notes: str, cards: Sequence[Card]) -> list[Proposal]:
    """Novel ideas, the best first; the duplicates of the last round, with `details["duplicate"]`, if none is novel."""
    if not context.ideas and (waiting := siblings(context)):
        return waiting
    talk = Conversation(llm, "propose", context.id)
    text = prompt(context, config, notes, cards)
    shorter = (prompt(context, config, notes, cards, detail) for detail in evidence.SHORTER)
    for _ in range(config.agent.duplicate_rounds + 1):
        ideas = talk.ask(text, reads_json(Ideas, lambda found: _problems(found, context)), json_schema(Ideas), shorter).proposals
        proposals = [as_proposal(idea, context, talk.model) for idea in ideas]
        fresh, known = sift(proposals, context)
        if fresh:
            return fresh
        text, shorter = render("duplicates", duplicates="\n".join(f"- {p.name}: {reason}" for p, reason in known)), iter(())
    return [with_details(p, duplicate=reason) for p, reason in known]


def prompt(context: Context, config: Config, notes: str, cards: Sequence[Card], detail: evidence.Detail = evidence.FULL) -> str:
    parent, count = context.parent, wanted(context, config)
    curves, baseline = context.curves(parent.id), context.curves(BASELINE_ID)
    last = evidence.last_step(curves, baseline)
    return render(
        "propose", count=f"{count} algorithm{'s' if count > 1 else ''}", parent_id=parent.id, inputs=", ".join(get_args(Input)), legend=evidence.legend(),
        parent=evidence.entry_text(parent, context.parent_proposal, context.reflections.get(parent.id), PARENT_CHARS),
        curves=evidence.curves_text(curves, last),
        baseline_curves="The parent is GRPO." if parent.id == BASELINE_ID else evidence.curves_text(baseline, last),
        lineage=evidence.lineage_text(context), children=evidence.children_text(context, detail), known=", ".join(sorted(catalogue.parts())),
        parent_code=show_package(context.parent_code), references=evidence.references_text(context, detail),
        history=evidence.history_text(context, detail), notes=notes or "None yet.",
        cards=choose_cards(cards, context, detail.cards) or "None.",
        recipe=evidence.recipe(config), noise=evidence.noise_text(context.entries), directive=wishes(context))


def wanted(context: Context, config: Config) -> int:
    """Ideas worth paying for: no more than there will be siblings that can take them up while this candidate is pending, and one
    for each idea of the researcher."""
    search = config.search
    return max(min(config.agent.proposals, search.per_parent, search.window or search.per_parent), len(context.ideas))


def wishes(context: Context) -> str:
    """What the researcher asks for: the directive, ideas for this very call, mechanisms ruled out."""
    parts = [context.directive or "None: raise Overall against GRPO under the same recipe."]
    if context.ideas:
        parts.append("Work these ideas of the researcher out first, one proposal each:\n" + "\n".join(f"- {i}" for i in context.ideas))
    if context.vetoed:
        parts.append(f"Ruled out by the researcher, in no proposal: {', '.join(sorted(context.vetoed))}.")
    return "\n\n".join(parts)


def sift(proposals: list[Proposal], context: Context) -> tuple[list[Proposal], list[tuple[Proposal, str]]]:
    """Novel ones, and duplicates with the reason: of the archive, of what is pending, of one another."""
    fresh: list[Proposal] = []
    known: list[tuple[Proposal, str]] = []
    for proposal in proposals:
        twin = next((p.name for p in fresh if set(p.mechanisms) == set(proposal.mechanisms)), None)
        reason = f"it has the same mechanisms as {twin} in your own reply" if twin else novelty(Draft(proposal, {}), context)
        if reason:
            known.append((proposal, reason))
        else:
            fresh.append(proposal)
    return fresh, known


def novelty(draft: Draft, context: Context) -> str | None:
    """Why the draft repeats something visible or pending; None if it is new. Before there is code, its stated hyperparameters are
    compared with stated ones, and with the fields of packages that state none (seeds, persons'): a proposal may leave some out."""
    mechanisms, stated = set(draft.proposal.mechanisms), stated_values(draft.proposal)
    alike = [(e.id, context.proposals[e.id]) for e in context.entries if set(e.mechanisms) == mechanisms]
    alike += [(id, p) for id, p in context.pending if set(p.mechanisms) == mechanisms]
    for id, other in alike if stated is not None else ():
        theirs = stated_values(other)
        if stated == theirs or (stated and theirs is None and stated.items() <= fields(context.code(id)).items()):
            return f"it has the mechanisms and the hyperparameters of {id} ({other.name})"
    return check_novelty(draft, context)


def siblings(context: Context) -> list[Proposal]:
    """Ideas left over from pending candidates of the same parent, made under the same directive, still novel."""
    left = [Proposal.from_json(data) for _, pending in context.pending if pending.parents[:1] == (context.parent.id,)
            for data in pending.details.get("alternatives", ()) if data["details"].get("directive") == context.directive]
    return sift(left, context)[0]


def ahead(context: Context, proposal: Proposal, config: Config) -> list[tuple[str, Proposal]]:
    """(id, idea) of the siblings that will follow, if no person, veto or directive comes in between."""
    search, number = config.search, candidate_number(context.id)
    left = min(search.per_parent - 1 - (number - 1) % search.per_parent, (search.window or search.per_parent) - 1, search.candidates - number)
    ideas = map(Proposal.from_json, proposal.details.get("alternatives", ()))
    return [(candidate_id(number + n), idea) for n, idea in zip(range(1, left + 1), ideas)]


def choose(proposals: list[Proposal]) -> Proposal:
    """The first; the others go along as alternatives."""
    first, *others = proposals
    return with_details(first, alternatives=[_without(p, "alternatives").to_json() for p in others])


def as_proposal(idea: Idea, context: Context, model: str) -> Proposal:
    taken = {e.name for e in context.entries} | {p.name for _, p in context.pending}
    name = f"{idea.name}-{context.id}" if idea.name in taken else idea.name
    return Proposal(
        name=name, parents=(context.parent.id, *([idea.second_parent] if idea.second_parent else [])), hypothesis=idea.hypothesis,
        mechanisms=tuple(dict.fromkeys(idea.mechanisms)), description=idea.description, expected_effect=idea.expected_effect, sources=tuple(idea.sources),
        proposer=f"llm:{model}", details={"directive": context.directive, "responds_to": sorted(set(idea.responds_to)),
                                          "hyperparameters": {h.name: h.value for h in idea.hyperparameters},
                                          "meanings": {h.name: h.meaning for h in idea.hyperparameters}})


def unproposed(context: Context, config: Config) -> Proposal:
    """What stands in the archive where the model made no proposal."""
    return Proposal(name=f"UNPROPOSED-{context.id}", parents=(context.parent.id,), hypothesis="none was made", mechanisms=(),
                    description="", expected_effect="", proposer=f"llm:{models_for(config.agent, 'propose')[0]}")


def with_details(proposal: Proposal, **details: Any) -> Proposal:
    return Proposal.from_json(proposal.to_json() | {"details": proposal.details | details})


def _problems(ideas: Ideas, context: Context) -> list[str]:
    known = {e.id for e in context.entries} - {context.parent.id}
    out = [] if ideas.proposals else ["proposals: at least one was wanted"]
    for idea in ideas.proposals:
        if not NAME.fullmatch(idea.name):
            out.append(f"name {idea.name!r}: 2 to 40 of A-Z, 0-9, +, ., - were wanted")
        if not idea.mechanisms or not all(SLUG.fullmatch(m) for m in idea.mechanisms):
            out.append(f"{idea.name}: mechanisms must be lower-case slugs like clip-higher, at least one, got {idea.mechanisms}")
        if idea.second_parent and idea.second_parent not in known:
            out.append(f"{idea.name}: second_parent {idea.second_parent!r} is no archived entry beside the parent; null if there is none")
    return out


def _without(proposal: Proposal, key: str) -> Proposal:
    return Proposal.from_json(proposal.to_json() | {"details": {k: v for k, v in proposal.details.items() if k != key}})
