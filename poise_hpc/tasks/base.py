"""What a task is: problems, a verifier with reward components, and (optionally) a model to start from.

A task is a module of `poise_hpc.tasks` with `TASK = <class>`, or any class given as "package.module:Class". It is
made with `TASK(options, model_options)`: the config's `task.options` and `model.options`, which it checks itself.

Nothing here imports torch: the controller and the graders use tasks too.
"""
from __future__ import annotations

import difflib
import hashlib
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import ValidationError

from .. import config as configuration
from .. import files
from ..config import Config
from ..section import Section
from ..types import PoiseError, UsageError

PURPOSES = ("selection", "confirmation")
Progress = Callable[..., None]  # (stage, step, total, **figures), as worker.progress


@dataclass(frozen=True)
class Problem:
    id: str                  # unique within the task, equal for equal prompts
    prompt: tuple[int, ...]  # token ids
    answer: str              # what `grade` compares with
    split: str


@dataclass(frozen=True)
class Grade:
    """One completion's mark. `components` holds "correct" and "format" at least; `reward` is what they add up to."""

    reward: float
    components: dict[str, float]
    valid: bool              # an answer could be read
    correct: bool            # and it is right


class Task(Protocol):
    name: str
    eos_id: int
    pad_id: int
    max_new_tokens: int
    splits: tuple[str, ...]

    def train_problem(self, seed: int, index: int) -> Problem:
        """Pure. The trainer asks for index = step * prompts + i, and for later ones when it samples again."""

    def problems(self, split: str, purpose: str, count: int) -> list[Problem]:
        """The first `count` of a fixed list. No prompt is in two of training, selection and confirmation."""

    def grade(self, problems: Sequence[Problem], completions: Sequence[Sequence[int]], truncated: Sequence[bool]) -> list[Grade]:
        """One mark per completion. Completion i answers problems[i]: the sampled tokens, the end token included."""

    def show(self, tokens: Sequence[int]) -> str:
        """Tokens as text, for people."""

    def model_recipe(self) -> dict[str, Any]:
        """Everything that `make_model`'s weights depend on, JSON-able: its hash names the cache entry."""

    def make_model(self, folder: Path, progress: Progress) -> None:
        """Train the start model and write it to `folder` as a Hugging Face folder with safetensors."""

    def data_sha256(self) -> str:
        """Hash of the problems: jobs refuse to compare numbers on different data."""


def load_task(config: Config, data_sha256: str | None = None) -> Task:
    """The task that the config names, with its options checked and the benchmarks' splits known. `data_sha256`: what
    its data were when the campaign was prepared."""
    name, make = config.task.name, _named(config.task.name)
    # Tasks in natural language write their prompts with the tokenizer of the model that the config names.
    from_folder = getattr(make, "reads_model_folder", False) and config.model.path is not None
    task: Task = make(config.task.options, {"path": config.model.path} if from_folder else config.model.options)
    for key, benchmark in config.evaluate.benchmarks.items():
        if benchmark.split not in task.splits:
            raise UsageError(f"evaluate.benchmarks.{key}.split: task {name!r} has no split {benchmark.split!r}"
                             + did_you_mean(benchmark.split, task.splits))
    if data_sha256 is not None and (found := task.data_sha256()) != data_sha256:
        raise PoiseError(f"the problems of task {name!r} have changed since this campaign was prepared (hash {found[:12]}, then "
                         f"{data_sha256[:12]}): data, template, tokenizer, grader or task code. Restore them, or start another campaign")
    return task


def check_known(task: Task, split: str, purpose: str) -> None:
    """UsageError for problems of a split that the task does not have, or for no purpose of ours."""
    if split not in task.splits:
        raise UsageError(f"task {task.name!r} has no split {split!r}" + did_you_mean(split, task.splits))
    if purpose not in PURPOSES:
        raise UsageError(f"a purpose is one of {', '.join(PURPOSES)}, not {purpose!r}")


def summary(config: Config) -> str:
    """The reward, the longest completion and the start model in one line, for who designs algorithms; "" where the task tells nothing
    (a class method `summary(options, model_options)`)."""
    tell = getattr(_named(config.task.name), "summary", None)
    return tell(config.task.options, config.model.options) if tell else ""


def _named(name: str) -> Callable[..., Task]:
    return _plug_in(name) if ":" in name else _own(name)


def _own(name: str) -> Callable[..., Task]:
    known = sorted(m.name for m in pkgutil.iter_modules(importlib.import_module("poise_hpc.tasks").__path__))
    module = importlib.import_module(f"poise_hpc.tasks.{name}") if name in known else None
    if not hasattr(module, "TASK"):
        tasks = [m for m in known if hasattr(importlib.import_module(f"poise_hpc.tasks.{m}"), "TASK")]
        raise UsageError(f"task.name: there is no task {name!r}" + did_you_mean(name, tasks)
                         + " (a task of your own is named 'package.module:Class')")
    return module.TASK


def _plug_in(name: str) -> Callable[..., Task]:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"task.name: {name!r} cannot be loaded ({error}). Wanted: 'package.module:Class', importable in the jobs' "
                         "environment") from None


S = TypeVar("S", bound=Section)


def parse_options(section: type[S], data: dict[str, Any], where: str) -> S:
    """Options as a typed section; UsageError naming the key otherwise."""
    try:
        return section.model_validate(data)
    except ValidationError as error:
        raise UsageError("\n".join(_explain(section, e, where) for e in error.errors())) from None


def _explain(section: type[Section], error: Any, where: str) -> str:
    key = ".".join(str(part) for part in (where, *error["loc"]))
    if error["type"] == "extra_forbidden" and len(error["loc"]) == 1:
        return f"unknown key '{key}'" + did_you_mean(str(error["loc"][0]), list(section.model_fields))
    message = str(error["ctx"]["error"]) if error["type"] == "value_error" else error["msg"][0].lower() + error["msg"][1:]
    return f"'{key}': {message}, got {error['input']!r}"


def did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


# --- model folders


def weights_sha256(folder: Path) -> str:
    """Hash of a Hugging Face folder's weights: over the name and hash of each safetensors file."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise PoiseError(f"{folder} holds no *.safetensors: a Hugging Face model folder was wanted")
    return hashlib.sha256(files.dumps({p.name: file_sha256(p) for p in weights}).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def run_prepare(job: dict[str, Any], attempt_dir: Path) -> dict[str, Any]:
    """The prepare job: the start model, made or found, and the hashes of model and data."""
    from .. import worker
    from ..rollout.base import check_installed
    from .cache import prepared_model

    config = configuration.parse(job["config"])
    check_installed(config)
    task = load_task(config)
    if config.model.source == "path":
        folder = Path(config.model.path or "")
        if not (folder / "config.json").is_file():
            raise PoiseError(f"model.path: {folder} is no Hugging Face model folder (it has no config.json)")
    else:
        folder = prepared_model(task, Path(job["cache_dir"]), worker.progress)
    task.train_problem(config.search.train_seeds[0], 0)  # problems that are missing are missed here, not in or after training
    for benchmark in config.evaluate.benchmarks.values():
        task.problems(benchmark.split, config.evaluate.purpose, benchmark.problems)
    vocabulary = getattr(task, "vocabulary", dict)()  # a plug-in need not have any; its records are then read with its own code
    return {"model": str(folder), "model_sha256": weights_sha256(folder), "data_sha256": task.data_sha256(), "vocabulary": vocabulary}
