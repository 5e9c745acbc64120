"""A recipe: one part a slot and a value for each hyperparameter. GRPO is the empty recipe.

    {"parts": {"clipping": "clip-higher"}, "knobs": {"clip_low": 0.2, "clip_high": 0.28, "std_floor": 1e-06}}
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..files import dumps
from ..types import Proposal
from .catalogue import SLOTS, Knob, Part, default, parts

# Seeds as recipes: the nearest thing in the catalogue, for children of a package that was not written by this proposer.
SEEDS: dict[str, tuple[str, ...]] = {
    "GRPO": (),
    "DR-GRPO": ("no-std", "sequence-sum-norm"),
    "RLOO": ("leave-one-out", "no-std", "sequence-sum"),
    "REINFORCE-PP": ("batch-std", "token-mean"),
    "DAPO": ("clip-higher", "token-mean", "dynamic-sampling", "overlong-penalty"),
    "GSPO": ("sequence-ratio",),
    "GMPO": ("geometric-mean",),
    "SAPO": ("soft-gate",),
    "CISPO": ("detached-weight", "token-mean"),
    "ASPO": ("inverted-ratio", "token-mean"),
    "TOPR": ("tapered",),
    "GPG": ("no-ratio", "no-std", "token-mean"),
    "MAXRL": ("maxrl", "no-std"),
    "ANALYTIC-VARIANCE": ("analytic-variance",),
    "VALIDITY-MASKING": ("validity-masking",),
    "CONDITIONAL-NORMALIZATION": ("conditional-normalization",),
    "LENGTH-SHAPING": ("gated-length",),
}


@dataclass(frozen=True)
class Recipe:
    chosen: tuple[str, ...]               # names of the parts that differ from GRPO, in slot order
    knobs: tuple[tuple[str, float], ...]  # value of every hyperparameter in use, by name

    def to_json(self) -> dict[str, Any]:
        return {"parts": {parts()[name].slot: name for name in self.chosen}, "knobs": dict(self.knobs)}

    @property
    def key(self) -> str:
        return dumps(self.to_json())

    @cached_property
    def values(self) -> dict[str, float]:
        return dict(self.knobs)

    @cached_property
    def by_slot(self) -> dict[str, Part]:
        """The part that stands in each slot, GRPO's where nothing else does."""
        own = {parts()[name].slot: parts()[name] for name in self.chosen}
        return {slot: part for slot in SLOTS if (part := own.get(slot) or default(slot)) is not None}


def make(names: Iterable[str], knobs: Mapping[str, float] = {}) -> Recipe:
    """A recipe of these parts: what they imply is added, values that are not given are the published ones, idle ones go.
    Of two parts for one slot the later wins."""
    chosen = {parts()[name].slot: name for name in names}
    for name in list(chosen.values()):
        chosen |= parts()[name].implies
    ordered = tuple(chosen[slot] for slot in SLOTS if chosen.get(slot, SLOTS[slot][1]) != SLOTS[slot][1])
    recipe = Recipe(ordered, ())
    values = {}
    for knob in knobs_of(recipe):
        value = knobs.get(knob.name)
        values[knob.name] = value if value in choices(knob, recipe) else standard(knob, recipe)
    return Recipe(ordered, tuple(sorted(values.items())))


def knobs_of(recipe: Recipe) -> list[Knob]:
    """Hyperparameters of the parts in use, in slot order."""
    return list({knob.name: knob for part in recipe.by_slot.values() for knob in part.knobs}.values())


def spare_knobs(recipe: Recipe) -> list[Knob]:
    """Those of GRPO's parts that take over when a part is switched off, and of nothing in use."""
    used = {knob.name for knob in knobs_of(recipe)}
    return [knob for part in recipe.by_slot.values() if part.flag and (grpo := default(part.slot)) is not None
            for knob in grpo.knobs if knob.name not in used]


def standard(knob: Knob, recipe: Recipe) -> float:
    """The published value, or the widest that the other parts leave."""
    allowed = choices(knob, recipe)
    return knob.default if knob.default in allowed else allowed[-1]


def choices(knob: Knob, recipe: Recipe) -> tuple[float, ...]:
    """Values to draw from: the knob's own, unless another part in use changes its range."""
    for part in recipe.by_slot.values():
        if knob.name in part.retune:
            return part.retune[knob.name]
    return knob.values


def sound(recipe: Recipe) -> bool:
    """Nothing conflicts, what is implied stands, nothing is without effect."""
    here = recipe.by_slot
    names = {part.name for part in here.values()}
    return (bool(recipe.chosen)
            and not any(part.conflicts & names for part in here.values())
            and all(here[slot].name == name for part in here.values() for slot, name in part.implies.items())
            and ("reward" in here or not any(part.wants_shaping for part in here.values()))
            and ("clip_high" not in recipe.values or recipe.values["clip_high"] > recipe.values["clip_low"]))


def declared(recipe: Recipe) -> list[Part]:
    """The parts that make the recipe, without those that only come along because another implies them."""
    here = recipe.by_slot
    implied = {name for part in here.values() for name in part.implies.values()}
    return [part for part in here.values() if part.name in recipe.chosen and part.name not in implied]


def company(part: Part) -> list[Part]:
    """What comes along because the part implies it. Named wherever the part is explained, since it may be most of the change: leave-one-out
    alone multiplies by G / (G - 1), the std that goes with it is what differs between prompts. No mechanism of its own: off is off together."""
    return [parts()[name] for name in part.implies.values()]


def brought(along: Iterable[Part]) -> str:
    names = ", ".join(part.name for part in along)
    return f" (which comes with {names})" if names else ""


def off_values(part: Part, recipe: Recipe) -> dict[str, Any]:
    """Field values of the rendered package that switch the part off, with what it implies and what cannot stand without it."""
    here, values = recipe.by_slot, recipe.values
    fallback = default(part.slot)
    along = [here[slot] for slot in part.implies]
    along += [p for p in here.values() if fallback is not None and fallback.name in p.conflicts]
    out: dict[str, Any] = {}
    for gone in (part, *along):
        out |= {k: values[v[1:]] if isinstance(v, str) else v for k, v in gone.off.items()} or {gone.flag: False}
        out |= {knob.name: knob.default for knob in (*knobs_of(recipe), *spare_knobs(recipe)) if knob.name in gone.retune}
    return out


def of_proposal(proposal: Proposal) -> Recipe:
    """The proposal's own recipe; for a foreign package the seed of that name or the parts that it names; else GRPO."""
    if (stated := proposal.details.get("recipe")) is not None:
        return make([n for n in stated["parts"].values() if n in parts()], stated["knobs"])
    if (seed := proposal.name.upper().replace("_", "-")) in SEEDS:  # added by a person, it has its file's name
        return make(SEEDS[seed])
    return make([name for name in proposal.mechanisms if name in parts()])
