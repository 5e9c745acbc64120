"""What tasks in natural language share: a prompt template, the start model's tokenizer, a reward from components.

Such a task has no model of its own: it works with any causal language model in a Hugging Face folder (`model.source:
path`), whose tokenizer writes the prompts. Templates are files with `{problem}` in them, used to the last newline.
"""
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from .. import files
from ..section import Positive, Section
from ..types import PoiseError, UsageError
from .base import Grade, Problem, Progress, did_you_mean, file_sha256, parse_options

TEMPLATES = Path(__file__).parent / "templates"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json",
                   "added_tokens.json")
Weight = Annotated[float, Field(ge=0)]


class Reward(Section):
    """R = correct * [right] + format * [answer given, and ended by itself] + length * (1 - tokens / max_new_tokens)."""

    correct: Weight = 1.0
    format: Weight = 0.0
    length: Weight = 0.0


class TextOptions(Section):
    template: str = "qwen-boxed"      # a file of tasks/templates, or a path
    max_new_tokens: Positive = 3072
    max_prompt_tokens: Positive = 1024
    eos_token: str | None = None      # ends a completion; None: the tokenizer's own
    reward: Reward = Reward()


class TextTask:
    """Base class: subclasses add problems and a verifier. See `tasks.base.Task`."""

    name = "text"
    reads_model_folder = True         # `load_task` hands over {"path": model.path}

    def __init__(self, options: TextOptions, model: dict[str, Any] | None):
        self.text_options = options
        path = (model or {}).get("path")
        if path is None:
            raise UsageError(f"task {self.name!r} has no start model of its own: set model.source: path and model.path: a Hugging Face "
                             "folder with weights and tokenizer")
        self.folder = Path(path)
        if not any((self.folder / name).is_file() for name in TOKENIZER_FILES):
            raise UsageError(f"model.path: {self.folder} has no tokenizer (none of {', '.join(TOKENIZER_FILES[:4])})")
        self.max_new_tokens = options.max_new_tokens
        self.template = read_template(options.template)

    @classmethod
    def summary(cls, options: dict[str, Any], model: dict[str, Any]) -> str:
        known = {key: value for key, value in options.items() if key in TextOptions.model_fields}
        o = parse_options(TextOptions, known, "task.options")
        return (f"reward = {o.reward.correct:g} correct + {o.reward.format:g} format + {o.reward.length:g} length (components: correct and format 0 or 1, "
                f"length from 1 for no token to 0 at the limit); completions of at most {o.max_new_tokens} tokens")

    # --- text and tokens

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder, local_files_only=True)

    @cached_property
    def eos_id(self) -> int:
        wanted = self.text_options.eos_token
        id = self.tokenizer.eos_token_id if wanted is None else self.tokenizer.get_vocab().get(wanted)
        if id is None:
            raise UsageError("task.options.eos_token: " + (f"the tokenizer has no token {wanted!r}" if wanted else
                             "the tokenizer names no end token: set one"))
        return id

    @cached_property
    def pad_id(self) -> int:
        # Padding is masked by length everywhere, so the end token serves where a tokenizer has none.
        id = self.tokenizer.pad_token_id
        return self.eos_id if id is None else id

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt with this problem; a beginning token where the tokenizer adds one."""
        return tuple(self.tokenizer(self.template.replace("{problem}", text))["input_ids"])

    def problem(self, id: str, text: str, answer: str, split: str) -> Problem:
        prompt = self.encode(text)
        if len(prompt) > self.text_options.max_prompt_tokens:
            raise PoiseError(f"the prompt of {id} has {len(prompt)} tokens, task.options.max_prompt_tokens allows "
                             f"{self.text_options.max_prompt_tokens}: raise it, or take the problem out of the set")
        return Problem(id, prompt, answer, split)

    def show(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens))

    def written(self, completions: Sequence[Sequence[int]]) -> list[str]:
        """Completions as the verifier reads them: without special tokens."""
        return self.tokenizer.batch_decode([list(c) for c in completions], skip_special_tokens=True)

    def vocabulary(self) -> dict[str, Any]:
        """How to read a record's completions: with the tokenizer of these files, from the model folder of that name."""
        return {"tokenizer": self.folder.resolve().name, "files": self.prompt_hashes()["tokenizer"]}

    # --- marks

    def mark(self, correct: bool, valid: bool, truncated: bool, tokens: int, **more: float) -> Grade:
        weight = self.text_options.reward
        parts = {"correct": float(correct), "format": float(valid and not truncated), "length": 1 - tokens / self.max_new_tokens}
        reward = weight.correct * parts["correct"] + weight.format * parts["format"] + weight.length * parts["length"]
        return Grade(reward, parts | more, valid, correct)

    # --- the rest of a task

    def model_recipe(self) -> dict[str, Any]:
        raise UsageError(f"task {self.name!r} has no start model of its own")

    def make_model(self, folder: Path, progress: Progress) -> None:
        self.model_recipe()

    def prompt_hashes(self) -> dict[str, Any]:
        """What prompts depend on besides the problems."""
        return {"template": self.template, "eos_token": self.text_options.eos_token, "max_prompt_tokens": self.text_options.max_prompt_tokens,
                "tokenizer": {n: file_sha256(self.folder / n) for n in TOKENIZER_FILES if (self.folder / n).is_file()}}


def read_template(name: str) -> str:
    path = Path(name) if "/" in name else TEMPLATES / f"{name}.txt"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        known = sorted(p.stem for p in TEMPLATES.glob("*.txt"))
        raise UsageError(f"task.options.template: there is no template {name!r}" + did_you_mean(name, known) + " (or the path of a file)") from None
    if text.count("{problem}") != 1:
        raise UsageError(f"task.options.template: {path} must hold {{problem}} exactly once")
    return text


def text_hash(data: Any) -> str:
    return hashlib.sha256(files.dumps(data).encode()).hexdigest()
