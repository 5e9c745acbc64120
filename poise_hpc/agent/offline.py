"""The offline proposer: recombines the catalogue of published mechanisms, steered by the archive. No network, no model.

It is the honest baseline for the question whether a language model is needed. A child is its parent's recipe with one or
two changes (add, replace, remove, tune), or takes parts over from a reference entry. What is drawn is weighted by

    w(part) = track record  x  3 if it is a remedy for a symptom of the parent  x  1.5 if no entry has it yet

and the track record of a part is exp(shrunk mean of Overall - baseline over the visible entries that have it, in units
of 3 points). Pairs of parts that only failed are avoided, repetitions are refused. Same seed, id and visible archive:
same draft.
"""
from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import combinations
from math import exp

from ..types import PoiseError, Proposal, Reflection
from . import reflect as rules
from .base import Context, Draft, Facts
from .catalogue import SLOTS, Part, choices as parts_for, parts
from .novelty import check_novelty, recipe_sign, signature
from .recipe import Recipe, brought, choices, company, declared, knobs_of, make, of_proposal, sound
from .render import literal, render
from .tally import Tally, count_name

MOST_PARTS = 5       # declared mechanisms: more cannot be told apart by one run
TRIES = 400
POINTS = 3.0         # Overall points that raise a part's weight by e
# words of a researcher's directive -> the symptom whose remedies they ask for
DIRECTIVES = {"short": "length-explosion", "concise": "length-explosion", "brief": "length-explosion", "length": "length-explosion",
              "token": "length-explosion", "explor": "entropy-collapse", "divers": "entropy-collapse", "entropy": "entropy-collapse",
              "pass@": "entropy-collapse", "stab": "late-collapse", "collapse": "late-collapse", "format": "validity-loss",
              "valid": "validity-loss", "sparse": "no-learning", "hard": "no-learning", "zero": "zero-variance"}


class OfflineProposer:
    def __init__(self) -> None:
        self._tally = Tally()

    def propose(self, context: Context) -> Draft:
        """A sound recipe that nobody has tried, rendered."""
        tally = self._tally.see(context.entries)
        for recipe in candidates(context, tally):
            if tally.knows(recipe_sign([part.name for part in declared(recipe)], recipe.to_json())):
                continue  # the gate would refuse it; rendering costs more than looking
            draft = write(recipe, context, tally)
            suspects = tally.alike(signature(draft.proposal, draft.files))
            if check_novelty(draft, replace(context, entries=suspects)) is None:
                return draft
        raise PoiseError(f"{context.id}: {TRIES} recipes around {context.parent.id} are all in the archive; "
                         "end the campaign, or add parts to agent/catalogue")

    def reflect(self, facts: Facts) -> Reflection:
        return rules.reflect(facts)


def candidates(context: Context, tally: Tally | None = None) -> Iterator[Recipe]:
    """Sound recipes around the parent, ever further away; those with a pair of parts that only failed come last."""
    tally = tally or Tally(context.entries)
    rng = random.Random(f"{context.seed}:{context.id}")
    parent, weights, bad = of_proposal(context.parent_proposal), part_weights(context, tally), tally.failed_pairs
    mates = [recipe for r in context.references if (recipe := of_proposal(context.proposals[r.id])).chosen]
    later = []
    for i in range(TRIES):
        recipe = crossover(parent, rng.choice(mates), rng) if mates and rng.random() < 0.25 else parent
        changes = rng.choice((1, 1, 2)) + i // 50  # further out where the neighbourhood is used up
        for _ in range(changes if recipe == parent else changes - 1):
            recipe = mutate(recipe, weights, rng)
        if recipe == parent or not sound(recipe) or len(declared(recipe)) > MOST_PARTS:
            continue
        if bad & set(combinations(sorted(recipe.chosen), 2)):
            later.append(recipe)
        else:
            yield recipe
    yield from later


def mutate(recipe: Recipe, weights: dict[str, float], rng: random.Random) -> Recipe:
    """One change: mostly a part put into a slot, sometimes one taken out, or a hyperparameter moved."""
    parts_now = len(declared(recipe))  # the more there are, the likelier one goes: long recipes explain nothing
    kind = rng.choices(("put", "remove", "tune"), (6, 0.75 * parts_now, 2 if parts_now else 0))[0]
    if kind == "remove":
        gone = rng.choice(recipe.chosen)
        return make([name for name in recipe.chosen if name != gone], recipe.values)
    if kind == "tune":
        knobs = [(knob, others) for knob in knobs_of(recipe)
                 if (others := [v for v in choices(knob, recipe) if v != recipe.values[knob.name]])]
        if not knobs:
            return recipe
        knob, others = rng.choice(knobs)
        return make(recipe.chosen, recipe.values | {knob.name: rng.choice(others)})
    options = [part for slot in SLOTS for part in parts_for(slot) if part.name not in recipe.chosen]
    part = rng.choices(options, [weights[option.name] for option in options])[0]
    return fit(recipe, part)


def fit(recipe: Recipe, part: Part) -> Recipe:
    """The recipe with this part: what conflicts with it, or implies something else in its place, goes."""
    def stays(name: str) -> bool:
        other = parts()[name]
        return (other.slot != part.slot and name not in part.conflicts and part.name not in other.conflicts
                and other.implies.get(part.slot, part.name) == part.name)

    return make([*filter(stays, recipe.chosen), part.name], recipe.values)


def crossover(recipe: Recipe, mate: Recipe, rng: random.Random) -> Recipe:
    """The recipe with one or two parts of another, and their hyperparameters."""
    for name in rng.sample(mate.chosen, k=min(len(mate.chosen), rng.choice((1, 2)))):
        recipe = fit(recipe, parts()[name])
    return make(recipe.chosen, recipe.values | {k: v for k, v in mate.knobs if k in recipe.values})


def part_weights(context: Context, tally: Tally | None = None) -> dict[str, float]:
    """Part -> weight of being drawn. Slots count equally: a slot with many parts does not crowd out the others."""
    gains, wanted = (tally or Tally(context.entries)).track_record, symptoms(context)
    out = {}
    for slot in SLOTS:
        options = parts_for(slot)
        for part in options:
            record = exp(max(-1.5, min(1.5, gains[part.name] / POINTS))) if part.name in gains else 1.5
            out[part.name] = record * (3.0 if wanted & set(part.helps) else 1.0) / len(options) ** 0.5
    return out


def symptoms(context: Context) -> set[str]:
    """Of the parent's training curves, and what the directive asks for."""
    found = context.reflections.get(context.parent.id)
    text = (context.directive or "").lower()
    return set(found.symptoms if found else ()) | {symptom for word, symptom in DIRECTIVES.items() if word in text}


def write(recipe: Recipe, context: Context, tally: Tally | None = None) -> Draft:
    """Proposal and package of a recipe."""
    parent = of_proposal(context.parent_proposal)
    name = unique_name(recipe, (tally or Tally(context.entries)).names, [p.name for _, p in context.pending])
    new = [part for part in declared(recipe) if part.name not in parent.chosen]
    along = {part.name: [p for p in company(part) if p.name not in parent.chosen] for part in new}
    gone = [name for name in parent.chosen if name not in recipe.chosen]
    moved = [f"{k} {literal(parent.values[k])} -> {literal(v)}" for k, v in recipe.knobs if k in parent.values and parent.values[k] != v]
    change = "; ".join(filter(None, (
        "with " + ", ".join(part.name + brought(along[part.name]) for part in new) if new else "", "without " + ", ".join(gone) if gone else "",
        "tuned: " + ", ".join(moved) if moved else "")))
    because = [f"{part.name} {part.effect}" for one in new for part in (one, *along[one.name])]
    because += [f"{', '.join(gone)} costs more here than it gives"] if gone and not new else []
    because += ["published values need not fit this task's scale"] if moved and not (new or gone) else []
    remedies = sorted(symptoms(context) & {s for part in new for s in part.helps})
    description = [f"{context.parent.name} ({context.parent.id}) {change}.", "", "Formulas:"]
    for part in declared(recipe):
        description += [f"- {part.name}: {part.formula}", *(f"  comes with {p.name}: {p.formula}" for p in company(part))]
    description += ["", "Hyperparameters: " + (", ".join(f"{k} = {literal(v)}" for k, v in recipe.knobs) or "none") + ".",
                    "Everything else is GRPO. The mechanisms were chosen by rules and chance, not by a model."]
    proposal = Proposal(
        name=name, parents=tuple(dict.fromkeys((context.parent.id, *_mates(recipe, parent, context)))),
        hypothesis=f"{context.parent.name} {change}: a higher Overall than {context.parent.name} itself, because {'; '.join(because)}.",
        mechanisms=tuple(part.name for part in declared(recipe)), description="\n".join(description),
        expected_effect="Overall above the parent's" + (f"; fewer signs of {', '.join(remedies)}" if remedies else "") + ".",
        sources=tuple(dict.fromkeys(part.source for one in declared(recipe) for part in (one, *company(one)))), proposer="offline",
        details={"recipe": recipe.to_json()})
    return Draft(proposal, {"algorithm.py": render(recipe, name)})


def _mates(recipe: Recipe, parent: Recipe, context: Context) -> list[str]:
    """Reference entries that hold every new part, at most one: the second parent of a crossover."""
    new = {part.name for part in declared(recipe) if part.name not in parent.chosen}
    return [r.id for r in context.references if new and new <= set(of_proposal(context.proposals[r.id]).chosen)][:1]


def unique_name(recipe: Recipe, archived: Mapping[str, int], pending: Iterable[str]) -> str:
    """Tags of the mechanisms; with a number where another candidate has that name. `archived`: name -> highest number (`tally`)."""
    name = "-".join([part.tag for part in declared(recipe)] + ["GRPO"])
    taken = {name: archived[name]} if name in archived else {}
    for other in pending:
        count_name(taken, other)
    return f"{name}-{taken[name] + 1}" if name in taken else name
