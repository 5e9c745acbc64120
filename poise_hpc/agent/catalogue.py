"""Published mechanisms of policy optimization, as parts that can be combined: one part a slot, GRPO where nothing is said.

A part holds a piece of code that reads and writes the variables of its place in the rendered algorithm
(`render.py` shows the two functions whole):

    advantages   R (N,) reward, g (N,) group, live (N,) bool, A (N,) or (N, T), keep (N,) bool or None
    token_loss   d (B, T) log-ratio, w (B, T) ratio, A (B, T), loss (B, T)

Only mechanisms that the Algorithm interface can express: no critics, no extra forward passes, no changes to sampling.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

# slot -> (kind of the declared mechanism, the part that GRPO has there; "" is nothing)
SLOTS: dict[str, tuple[str, str]] = {
    "selection": ("selection", ""),
    "reward": ("length", ""),
    "statistics": ("masking", ""),
    "baseline": ("advantage", "group-mean"),
    "normalization": ("normalization", "group-std"),
    "shaping": ("length", ""),
    "weighting": ("advantage", ""),
    "keep": ("masking", ""),
    "ratio": ("ratio", "token-ratio"),
    "clipping": ("clipping", "symmetric-clip"),
    "trust": ("masking", ""),
    "kl": ("kl", ""),
    "entropy": ("entropy", ""),
    "reduction": ("reduction", "sequence-mean"),
}
IN_ADVANTAGES = ("reward", "statistics", "baseline", "normalization", "shaping", "weighting", "keep")
IN_TOKEN_LOSS = ("ratio", "clipping", "trust", "kl", "entropy")


@dataclass(frozen=True)
class Knob:
    """A hyperparameter: the published (or GRPO's) value first in spirit, `values` to draw from, what it means."""

    name: str
    default: float
    values: tuple[float, ...]
    meaning: str


@dataclass(frozen=True)
class Part:
    name: str                         # slug, as proposals and packages declare it
    slot: str
    tag: str                          # in algorithm names
    source: str                       # "DAPO, Yu et al. 2025, arXiv:2503.14476"
    formula: str
    effect: str                       # completes "... because it ..."
    code: str = ""                    # lines of its place in the algorithm; `{live}` and `{std}` are filled in by `render`
    knobs: tuple[Knob, ...] = ()
    off: dict[str, Any] = field(default_factory=dict)  # knob values without it; "=x" copies knob x; empty: a bool field
    helps: tuple[str, ...] = ()       # symptoms (reflect.SYMPTOMS) that it is a remedy for
    conflicts: frozenset[str] = frozenset()            # parts it cannot stand with
    implies: dict[str, str] = field(default_factory=dict)  # slot -> the part that must stand there
    wants_shaping: bool = False       # without effect unless a reward part makes rewards composite
    needs: str = ""                   # of algorithms.base.NEEDS
    state: dict[str, float] = field(default_factory=dict)  # initial state
    after: str = ""                   # code at the end of `advantages` (state updates)
    zero_safe: bool = True            # loss and gradient are 0 where A == 0
    retune: dict[str, tuple[float, ...]] = field(default_factory=dict)  # knobs of other parts whose range it changes

    @property
    def flag(self) -> str:
        """The bool field that switches it off; "" where a hyperparameter does."""
        return "" if self.off else self.name.replace("-", "_")


@cache
def parts() -> dict[str, Part]:
    """name -> part, GRPO's own included."""
    from .parts_advantage import PARTS as advantage
    from .parts_loss import PARTS as loss

    found = {part.name: part for part in (*advantage, *loss)}
    assert len(found) == len(advantage) + len(loss), "part names must be unique"
    return found


def default(slot: str) -> Part | None:
    return parts().get(SLOTS[slot][1])


def choices(slot: str) -> list[Part]:
    """What can stand in a slot instead of GRPO's part."""
    return [part for part in parts().values() if part.slot == slot and part.name != SLOTS[slot][1]]
