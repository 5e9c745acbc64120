"""The embedded lab: chains of carry-less two-digit arithmetic, small enough to train for real on a laptop.

    prompt    <bos>+08*13-91......47=       steps, dots up to five steps, start value: 19 tokens
    response  45;45;54;<a>54</a><eos>       running values (optional), the answer: at most 24 tokens

A step works on each digit modulo 10, without carry: 47 + 08 = 45, 45 * 13 = 45, 45 - 91 = 54. What must be known is
therefore 240 digit facts (operator, digit, digit) and the discipline to chain them. The start model (`chain_model`)
has learned part of the facts wrong and is careless, so that reinforcement has something to discover.

No tokenizer: a token is a symbol of `SYMBOLS`. Not covered: prompts of other lengths, more than five steps.
"""
from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from .. import files
from ..section import Section, Tuple
from ..types import UsageError
from .base import PURPOSES, Grade, Problem, Progress, check_known, parse_options

SYMBOLS = (*"0123456789+-*.=;", "<a>", "</a>", "<bos>", "<eos>", "<pad>")
ID = {symbol: i for i, symbol in enumerate(SYMBOLS)}
# Right operands. Factors are the units modulo 10: every step is a permutation of the digits, so each of the 100 answers
# is equally likely and a guess is worth 1 %. (With all ten factors "00" is right for 7 % of the hard problems.)
OPERANDS = {"+": tuple(range(10)), "-": tuple(range(10)), "*": (1, 3, 7, 9)}
FACTS = tuple((operator, x, y) for operator, ys in OPERANDS.items() for x in range(10) for y in ys)
MAX_STEPS = 5
PROMPT_TOKENS = 1 + 3 * MAX_STEPS + 2 + 1
MAX_NEW_TOKENS = 24
RESPONSE = re.compile(r"[0-9;]*<a>([0-9]{2})</a><eos>")

Value = tuple[int, int]      # tens, ones
Fact = Callable[[str, int, int], int]
Step = tuple[str, int, int]  # operator, tens, ones: ("*", 1, 3)
Share = Annotated[float, Field(ge=0, le=1)]


class Mix(Section):
    """What a split's problems are made of."""

    steps: Annotated[tuple[int, int], Tuple]  # fewest, most
    times: Share             # share of `*` among the operators; `+` and `-` share the rest

    @model_validator(mode="after")
    def _range(self) -> Mix:
        low, high = self.steps
        if not 1 <= low <= high <= MAX_STEPS:
            raise ValueError(f"'steps' must be [fewest, most] within 1..{MAX_STEPS}")
        return self


class Options(Section):
    """The config's `task.options`."""

    train: Mix = Mix(steps=(1, 5), times=1 / 3)
    splits: dict[str, Mix] = {
        "easy": Mix(steps=(1, 2), times=0.25),
        "medium": Mix(steps=(3, 3), times=0.25),
        "hard": Mix(steps=(5, 5), times=0.4),
    }
    correct_reward: float = 1.0
    format_reward: float = 0.0  # for a valid response, right or wrong


class Chain:
    """See `tasks.base.Task`."""

    name = "chain"
    eos_id, pad_id = ID["<eos>"], ID["<pad>"]
    max_new_tokens = MAX_NEW_TOKENS

    def __init__(self, options: dict[str, Any] | None = None, model: dict[str, Any] | None = None):
        from .chain_model import ModelOptions

        self.options = parse_options(Options, options or {}, "task.options")
        self.model_options = parse_options(ModelOptions, model or {}, "model.options")
        self.splits = tuple(self.options.splits)

    @classmethod
    def summary(cls, options: dict[str, Any], model: dict[str, Any]) -> str:
        from .chain_model import ModelOptions

        o, m = parse_options(Options, options, "task.options"), parse_options(ModelOptions, model, "model.options")
        return (f"reward = {o.correct_reward:g} correct + {o.format_reward:g} format (components: correct, format; each 0 or 1); completions of at "
                f"most {MAX_NEW_TOKENS} tokens, {len(SYMBOLS)} different tokens; the start model has {m.layers} layers of width {m.d} and knows "
                "part of the facts wrong")

    def train_problem(self, seed: int, index: int) -> Problem:
        rng = random.Random(f"chain train {seed} {index}")
        return draw(rng, self.options.train, "train", "train")

    def problems(self, split: str, purpose: str, count: int) -> list[Problem]:
        check_known(self, split, purpose)
        found: dict[str, Problem] = {}
        for i in range(100 * count):
            if len(found) == count:
                break
            problem = draw(random.Random(f"chain {split} {purpose} {i}"), self.options.splits[split], purpose, split)
            found.setdefault(problem.id, problem)
        if len(found) < count:
            raise UsageError(f"split {split!r} has no {count} distinct {purpose} problems (found {len(found)}): ask for fewer")
        return list(found.values())

    def grade(self, problems: Sequence[Problem], completions: Sequence[Sequence[int]], truncated: Sequence[bool]) -> list[Grade]:
        return [self._grade(*one) for one in zip(problems, completions, truncated, strict=True)]

    def _grade(self, problem: Problem, completion: Sequence[int], truncated: bool) -> Grade:
        # Valid: digits and semicolons, then exactly one <a>dd</a>, then the end. Nothing else.
        match = None if truncated else RESPONSE.fullmatch(self.show(completion))
        valid, correct = match is not None, match is not None and match[1] == problem.answer
        reward = self.options.correct_reward * correct + self.options.format_reward * valid
        return Grade(reward, {"correct": float(correct), "format": float(valid)}, valid, correct)

    def show(self, tokens: Sequence[int]) -> str:
        return "".join(SYMBOLS[t] if 0 <= t < len(SYMBOLS) else "?" for t in tokens)

    def vocabulary(self) -> dict[str, Any]:
        """How to read a record's completions: token t is `symbols[t]`."""
        return {"symbols": list(SYMBOLS)}

    def model_recipe(self) -> dict[str, Any]:
        sources = {name: hashlib.sha256((Path(__file__).parent / name).read_bytes()).hexdigest()
                   for name in ("chain.py", "chain_model.py")}
        return {"model": self.model_options.model_dump(mode="json"), "train": self.options.train.model_dump(mode="json"),
                "sources": sources}

    def make_model(self, folder: Path, progress: Progress) -> None:
        from .chain_model import warm_start

        warm_start(self.options.train, self.model_options, folder, progress)

    def data_sha256(self) -> str:
        return self._data_sha256

    @cached_property
    def _data_sha256(self) -> str:
        # Every list is prefix-stable and drawn by the same code: 64 problems of each stand for the rest.
        lists = {f"{split} {purpose}": self.problems(split, purpose, 64) for split in self.splits for purpose in PURPOSES}
        lists["train"] = [self.train_problem(0, i) for i in range(64)]
        texts = {name: [(p.id, p.answer) for p in problems] for name, problems in lists.items()}
        return hashlib.sha256(files.dumps(texts | {"options": self.options.model_dump(mode="json")}).encode()).hexdigest()


TASK = Chain


def draw(rng: random.Random, mix: Mix, purpose: str, split: str) -> Problem:
    """A random problem among those that belong to `purpose`."""
    while True:
        start, steps = chain(rng, mix)
        text = write_prompt(start, steps)
        if purpose_of(text) == purpose:
            return Problem(text, encode(text), "%d%d" % running_values(start, steps)[-1], split)


def purpose_of(prompt: str) -> str:
    """Which set a prompt belongs to, by its own hash: disjoint whatever is drawn. 80 % train, 10 % each for the others."""
    bucket = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big") % 10
    return {0: "selection", 1: "confirmation"}.get(bucket, "train")


def chain(rng: random.Random, mix: Mix) -> tuple[Value, list[Step]]:
    def step() -> Step:
        operator = "*" if rng.random() < mix.times else rng.choice("+-")
        return operator, rng.choice(OPERANDS[operator]), rng.choice(OPERANDS[operator])

    steps = [step() for _ in range(rng.randint(*mix.steps))]
    return (rng.randrange(10), rng.randrange(10)), steps


def write_prompt(start: Value, steps: Sequence[Step]) -> str:
    """Without <bos>: "+08*13-91......47="."""
    return "".join("%s%d%d" % step for step in steps).ljust(3 * MAX_STEPS, ".") + "%d%d=" % start


def encode(prompt: str) -> tuple[int, ...]:
    return (ID["<bos>"], *(ID[c] for c in prompt))


def fact(operator: str, x: int, y: int) -> int:
    """x operator y, modulo 10."""
    return {"+": x + y, "-": x - y, "*": x * y}[operator] % 10


def running_values(start: Value, steps: Sequence[Step], fact: Fact = fact) -> list[Value]:
    """The value after each step, as `fact` has it; digits do not influence each other."""
    values, (x, y) = [], start
    for operator, a, b in steps:
        x, y = fact(operator, x, a), fact(operator, y, b)
        values.append((x, y))
    return values
