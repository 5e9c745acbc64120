"""The lab's start model: a tiny stock GPT-2 that writes well-formed chains, knows part of the digit facts wrong, and is careless.

Supervised, seeded, about half a minute on one thread. Two phases over fresh training problems, loss on the response only:
1. scratch-pad traces and some direct answers; the facts in `wrong_facts` are always wrong;
2. a mixture of styles (`STYLES`), some of them bad; a wrong fact stays wrong with probability `stays_wrong`.

Facts that are wrong most of the time must be discovered one by one: that is what makes a learning curve gradual.
Noisy or broken traces alone are repaired by reinforcement within five steps.
"""
from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ..config import Positive, Section
from .base import Progress
from .chain import FACTS, ID, MAX_NEW_TOKENS, PROMPT_TOKENS, SYMBOLS, Mix, Share, Step, Value, chain, encode, fact, purpose_of, write_prompt


class ModelOptions(Section):
    """The config's `model.options`: size and warm start."""

    d: Positive = 64                # width
    layers: Positive = 2
    heads: Positive = 4
    seed: int = 0
    steps: Positive = 660           # optimizer steps, both phases
    batch: Positive = 64            # traces a step
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    first_phase: Share = 0.62       # of the steps
    wrong_facts: Share = 0.3        # of the digit facts
    stays_wrong: Share = 0.85       # probability, in phase 2


Fact = Callable[[str, int, int], int]


def wrong_table(rng: random.Random, share: float) -> dict[tuple[str, int, int], int]:
    """The wrong value of each fact that is to be learned wrong."""
    chosen = rng.sample(FACTS, round(share * len(FACTS)))
    return {f: rng.choice([v for v in range(10) if v != fact(*f)]) for f in chosen}


def values_with(facts: Fact, start: Value, steps: Sequence[Step]) -> list[Value]:
    values, (x, y) = [], start
    for operator, a, b in steps:
        x, y = facts(operator, x, a), facts(operator, y, b)
        values.append((x, y))
    return values


# --- styles of a response, as text; `values` are the running values


def scratch(rng: random.Random, values: list[Value]) -> str:
    return "".join("%d%d;" % v for v in values) + direct(rng, values)


def direct(rng: random.Random, values: list[Value]) -> str:
    return "<a>%d%d</a>" % values[-1]


def buggy(rng: random.Random, values: list[Value]) -> str:
    """A scratch-pad that leaves a value out, or answers with something else than its last value."""
    if len(values) > 1 and rng.random() < 0.5:
        skipped = rng.randrange(len(values))
        return scratch(rng, values[:skipped] + values[skipped + 1:])
    wrong = (rng.randrange(10), rng.randrange(10))
    return scratch(rng, values)[:-len("00</a>")] + "%d%d</a>" % wrong


def broken(rng: random.Random, values: list[Value]) -> str:
    """A right answer that nobody can read: five kinds."""
    text, answer = scratch(rng, values), "%d%d" % values[-1]
    return rng.choice([
        text.replace("<a>", ""),             # never opened
        text.replace("</a>", ""),            # never closed
        text.replace(answer + "</a>", answer[0] + "</a>"),  # one digit
        text.replace("<a>", "="),            # a foreign symbol
        "<a>%s</a>" % answer * 2,            # two answers
    ])


STYLES = {  # style -> (weight in phase 1, in phase 2)
    scratch: (0.75, 0.3),
    direct: (0.25, 0.3),
    buggy: (0.0, 0.2),
    broken: (0.0, 0.2),
}
SLIP = 0.05  # phase 2: probability that a value's digit is random
