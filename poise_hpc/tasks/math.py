r"""Mathematics with final answers in \boxed{}: the paper's setting. See docs/MATH.md.

Training problems: a seeded permutation of the training set per epoch. Evaluation: the benchmarks as published are
*selection*, as the paper uses them; *confirmation* is another set, or the other half of the same one where the options
say so. No text is in two of training, selection and confirmation: selection keeps its problems, confirmation leaves out
those of selection, training leaves out both.
"""
from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from .. import data
from ..data import Row
from ..section import Positive, Section, Tuple
from ..types import UsageError
from .base import PURPOSES, Grade, Problem, check_known, parse_options
from .grading import FAILED, Grader, Verdict
from .grading_rules import boxed
from .text import TextOptions, TextTask, text_hash


class Train(Section):
    set: str = "math-train"
    levels: Annotated[tuple[int, ...] | None, Tuple] = (3, 4, 5)  # None: all
    problems: Positive | None = 5000  # a fixed choice among them; None: all


class Split(Section):
    """Names of problem sets. The same set for both: each gets the half that its problems' hashes say."""

    selection: str
    confirmation: str | None = None


class Options(TextOptions):
    """The config's `task.options`."""

    data: str                         # folder that `poise-hpc data` filled; absolute
    train: Train = Train()
    splits: dict[str, Split] = {
        "aime24": Split(selection="aime24"), "aime25": Split(selection="aime25"), "amc": Split(selection="amc"),
        "math500": Split(selection="math500", confirmation="math-test"), "minerva": Split(selection="minerva"),
        "olympiadbench": Split(selection="olympiadbench")}
    verifier: Literal["auto", "math-verify", "rules"] = "auto"  # auto: math-verify where it is installed
    verifier_workers: Positive = 2    # processes per rank
    verifier_seconds: Annotated[float, Field(gt=0)] = 5.0       # CPU time of one answer; then it is killed and counted


class Math(TextTask):
    """See `tasks.base.Task`."""

    name = "math"

    def __init__(self, options: dict[str, Any] | None = None, model: dict[str, Any] | None = None):
        self.options = parse_options(Options, options or {}, "task.options")
        super().__init__(self.options, model)
        self.data = Path(self.options.data)
        if not self.data.is_absolute():
            raise UsageError(f"task.options.data: jobs start elsewhere, an absolute path was wanted, got {self.options.data!r}")
        self.splits = tuple(self.options.splits)
        self.pins = {name: data.pinned(self.data, name)["sha256"] for name in self._sets()}
        self.grader = Grader(self.options.verifier, self.options.verifier_workers, self.options.verifier_seconds)
        self._permutation = lru_cache(maxsize=4)(self._permute)

    def _sets(self) -> list[str]:
        evaluated = {name for split in self.options.splits.values() for name in (split.selection, split.confirmation) if name}
        return sorted(evaluated | {self.options.train.set})

    @cached_property
    def _rows(self) -> dict[str, list[Row]]:
        return {name: data.read(self.data, name) for name in self._sets()}

    # --- problems

    def train_problem(self, seed: int, index: int) -> Problem:
        rows = self.train_rows
        epoch, i = divmod(index, len(rows))
        row = rows[self._permutation(seed, epoch)[i]]
        return self.problem(f"{self.options.train.set}/{row.id}", row.problem, row.answer, "train")

    def _permute(self, seed: int, epoch: int) -> list[int]:
        order = list(range(len(self.train_rows)))
        random.Random(f"math train {seed} {epoch}").shuffle(order)
        return order

    @cached_property
    def train_rows(self) -> list[Row]:
        """The training problems, sorted by hash (so that `problems: 5000` is a fixed, arbitrary choice)."""
        train, taken = self.options.train, self._keys("selection") | self._keys("confirmation")
        chosen: dict[str, Row] = {}
        for row in self._rows[train.set]:
            if (train.levels is None or row.level in train.levels) and row.key not in taken:
                chosen.setdefault(row.key, row)
        rows = [chosen[key] for key in sorted(chosen)]
        if len(rows) < (train.problems or 1):
            raise UsageError(f"task.options.train: {train.set!r} has {len(rows)} problems"
                             + (f" of levels {list(train.levels)}" if train.levels else "")
                             + f" that are in no evaluation set, {train.problems or 'some'} were asked for")
        return self._short(rows, train.problems)

    def _short(self, rows: list[Row], count: int | None) -> list[Row]:
        """The first `count` rows, without those whose prompt is too long to train on (as verl filters them)."""
        rows = rows[:count]
        prompts = self.tokenizer([self.template.replace("{problem}", row.problem) for row in rows])["input_ids"]
        return [row for row, prompt in zip(rows, prompts, strict=True) if len(prompt) <= self.options.max_prompt_tokens]

    def problems(self, split: str, purpose: str, count: int) -> list[Problem]:
        check_known(self, split, purpose)
        name, rows = self._evaluated(split, purpose)
        if name is None:
            raise UsageError(f"split {split!r} has no confirmation problems: name a set in task.options.splits.{split}.confirmation, or "
                             "leave this benchmark out of the confirmation (configs/math_confirm.yaml)")
        if count > len(rows):
            raise UsageError(f"split {split!r} has {len(rows)} {purpose} problems (set {name!r}), the config asks for {count}")
        return [self.problem(f"{name}/{row.id}", row.problem, row.answer, split) for row in rows[:count]]

    def _evaluated(self, split: str, purpose: str) -> tuple[str | None, list[Row]]:
        """The set and its rows for this purpose, in the set's own order."""
        sets = self.options.splits[split]
        name = sets.selection if purpose == "selection" else sets.confirmation
        rows = self._rows[name] if name else []
        if sets.selection == sets.confirmation:
            rows = [row for row in rows if half(row) == purpose]
        if purpose == "confirmation":
            taken = self._keys("selection")
            rows = [row for row in rows if row.key not in taken]
        return name, rows

    def _keys(self, purpose: str) -> set[str]:
        return {row.key for split in self.splits for row in self._evaluated(split, purpose)[1]}

    # --- marks

    def grade(self, problems: Sequence[Problem], completions: Sequence[Sequence[int]], truncated: Sequence[bool]) -> list[Grade]:
        answers = [boxed(text) for text in self.written(completions)]
        given = [(p.answer, a) for p, a in zip(problems, answers, strict=True) if a is not None]
        verdicts = iter(self.grader.verdicts(given))
        grades = []
        for answer, completion, cut in zip(answers, completions, truncated, strict=True):
            verdict = None if answer is None else next(verdicts)
            # A right answer counts where the completion was cut off later, as in verl's MATH reward; its format does not.
            grades.append(self.mark(verdict is Verdict.EQUAL, answer is not None, cut, len(completion),
                                    grader_failed=float(verdict in FAILED)))
        return grades

    def data_sha256(self) -> str:
        for name in self.pins:
            data.read(self.data, name)  # the files are what the lock says
        options = self.options.model_dump(mode="json", include={"train", "splits"})
        return text_hash({"sets": self.pins, "options": options, "grader": self.grader.version, **self.prompt_hashes()})


TASK = Math


def half(row: Row) -> str:
    """Which half of a set a problem belongs to, by its own text."""
    return PURPOSES[hashlib.sha256(row.key.encode()).digest()[0] % 2]
