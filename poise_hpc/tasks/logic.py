r"""Knights and knaves, made on the fly: a second family in natural language, with an exact verifier and no data to fetch.

    ... You meet Ann, Bob and Cid. Ann says: "Bob is a knave." ...   ->   \boxed{KNK}

Every puzzle has exactly one solution (all 2^n are tried). A guess is right with probability 2^-n, so sizes make the
splits. Disjoint purposes: a puzzle's text says by its hash whether it is for training, selection or confirmation.
"""
from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from itertools import product
from typing import Annotated, Any

from pydantic import AfterValidator

from ..section import Tuple
from ..types import UsageError
from .base import PURPOSES, Grade, Problem, check_known, parse_options
from .chain import purpose_of
from .grading_rules import boxed
from .text import TextOptions, TextTask, text_hash

NAMES = ("Ann", "Bob", "Cid", "Dora", "Eve", "Finn", "Gus", "Hana")
KIND = {True: "knight", False: "knave"}
LETTER = {True: "K", False: "N"}

Roles = tuple[bool, ...]             # True: a knight
Statement = tuple[Any, ...]          # ("is", j, role) | ("same", j, k, equal) | ("either", j, role, k, role) | ("count", n)


def _size(value: tuple[int, int]) -> tuple[int, int]:
    if not 2 <= value[0] <= value[1] <= len(NAMES):
        raise ValueError(f"[fewest, most] people within 2..{len(NAMES)}")
    return value


Size = Annotated[tuple[int, int], Tuple, AfterValidator(_size)]


class Options(TextOptions):
    """The config's `task.options`."""

    max_new_tokens: int = 1024
    train: Size = (2, 5)
    splits: dict[str, Size] = {"small": (3, 3), "medium": (4, 4), "large": (5, 6)}


class Logic(TextTask):
    """See `tasks.base.Task`."""

    name = "logic"

    def __init__(self, options: dict[str, Any] | None = None, model: dict[str, Any] | None = None):
        self.options = parse_options(Options, options or {}, "task.options")
        super().__init__(self.options, model)
        self.splits = tuple(self.options.splits)

    def train_problem(self, seed: int, index: int) -> Problem:
        return self._problem(*draw(random.Random(f"logic train {seed} {index}"), self.options.train, "train"), "train")

    def problems(self, split: str, purpose: str, count: int) -> list[Problem]:
        check_known(self, split, purpose)
        found: dict[str, str] = {}
        for i in range(20 * count):
            if len(found) == count:
                break
            text, answer = draw(random.Random(f"logic {split} {purpose} {i}"), self.options.splits[split], purpose)
            found.setdefault(text, answer)
        if len(found) < count:
            raise UsageError(f"split {split!r} has no {count} distinct {purpose} puzzles (found {len(found)}): ask for fewer, or larger ones")
        return [self._problem(text, answer, split) for text, answer in found.items()]

    def _problem(self, text: str, answer: str, split: str) -> Problem:
        return self.problem(hashlib.sha256(text.encode()).hexdigest()[:16], text, answer, split)

    def grade(self, problems: Sequence[Problem], completions: Sequence[Sequence[int]], truncated: Sequence[bool]) -> list[Grade]:
        grades = []
        for problem, completion, text, cut in zip(problems, completions, self.written(completions), truncated, strict=True):
            answer = re.sub(r"[\s,]", "", boxed(text) or "")
            valid = re.fullmatch("[KN]{%d}" % len(problem.answer), answer) is not None
            grades.append(self.mark(answer == problem.answer, valid, cut, len(completion)))
        return grades

    def data_sha256(self) -> str:
        # Every list is prefix-stable and drawn by the same code: 16 puzzles of each stand for the rest.
        lists = {f"{split} {purpose}": [draw(random.Random(f"logic {split} {purpose} {i}"), size, purpose) for i in range(16)]
                 for split, size in self.options.splits.items() for purpose in PURPOSES}
        lists["train"] = [draw(random.Random(f"logic train 0 {i}"), self.options.train, "train") for i in range(16)]
        return text_hash({"lists": lists, **self.prompt_hashes()})


TASK = Logic


def draw(rng: random.Random, size: tuple[int, int], purpose: str) -> tuple[str, str]:
    """(text, answer) of a random puzzle with one solution, among those that belong to `purpose`."""
    while True:
        roles: Roles = tuple(rng.random() < 0.5 for _ in range(rng.randint(*size)))
        statements = [say(rng, roles, speaker) for speaker in range(len(roles))]
        if len(solutions(statements)) == 1 and purpose_of(text := write(statements)) == purpose:
            return text, "".join(LETTER[role] for role in roles)


def say(rng: random.Random, roles: Roles, speaker: int) -> Statement:
    """A statement that this speaker can make: true of a knight, false of a knave."""
    others = [i for i in range(len(roles)) if i != speaker]
    while True:
        j, k = rng.choice(others), rng.choice(others)
        statement: Statement = rng.choice((
            ("is", j, rng.random() < 0.5), ("same", speaker, j, rng.random() < 0.5), ("count", rng.randint(0, len(roles))),
            ("either", j, rng.random() < 0.5, k, rng.random() < 0.5) if j != k else ("same", speaker, j, True)))
        if true(statement, roles) == roles[speaker]:
            return statement


def true(statement: Statement, roles: Roles) -> bool:
    match statement:
        case "is", j, role:
            return roles[j] == role
        case "same", j, k, equal:
            return (roles[j] == roles[k]) == equal
        case "either", j, role, k, other:
            return roles[j] == role or roles[k] == other
        case "count", n:
            return sum(roles) == n
    raise AssertionError(statement)


def solutions(statements: Sequence[Statement]) -> list[Roles]:
    """All roles under which knights, and only knights, speak the truth."""
    return [roles for roles in product((True, False), repeat=len(statements))
            if all(true(s, roles) == role for s, role in zip(statements, roles, strict=True))]


def write(statements: Sequence[Statement]) -> str:
    names = NAMES[:len(statements)]
    said = " ".join(f'{name} says: "{sentence(s)}"' for name, s in zip(names, statements, strict=True))
    return (f"On an island every inhabitant is a knight, who always tells the truth, or a knave, who always lies. You meet "
            f"{', '.join(names[:-1])} and {names[-1]}. {said} Who is what? Give one letter per person, in the order above: K for a "
            f"knight, N for a knave.")


def sentence(statement: Statement) -> str:
    match statement:
        case "is", j, role:
            return f"{NAMES[j]} is a {KIND[role]}."
        case "same", _, k, equal:
            return f"{NAMES[k]} and I are of {'the same kind' if equal else 'different kinds'}."
        case "either", j, role, k, other:
            return f"{NAMES[j]} is a {KIND[role]}, or {NAMES[k]} is a {KIND[other]}."
        case "count", 0:
            return "None of us is a knight."
        case "count", 1:
            return "Exactly one of us is a knight."
        case "count", n:
            return f"Exactly {n} of us are knights."
    raise AssertionError(statement)
