"""From a recipe to a readable `algorithm.py`: two functions, one block a part, each with its formula above it."""
from __future__ import annotations

import re
import textwrap
from functools import cache

from .catalogue import IN_ADVANTAGES, IN_TOKEN_LOSS, SLOTS, Part, default
from .recipe import Recipe, brought, company, declared, knobs_of, off_values, spare_knobs, standard

WIDTH = 116
OPS = ("clipped", "group_mean", "group_size", "group_std", "k2", "k3", "log_ratio", "masked_mean", "pass_rate",
       "sequence_log_ratio")
D = "d = log_ratio(batch)  # log pi_theta - log pi_old"


def render(recipe: Recipe, name: str) -> str:
    """The package's one file."""
    body = "\n\n".join(filter(None, (_fields(recipe), _declarations(recipe), _reduction(recipe), _initial_state(recipe),
                                      _select(recipe), _advantages(recipe), _token_loss(recipe))))
    used = [op for op in OPS if re.search(rf"\b{op}\(", body)]
    imports = ["from poise_hpc.algorithms.base import Advantages, Algorithm, Mechanism, PolicyBatch, Reduction, RolloutBatch"]
    imports += [f"from poise_hpc.algorithms.ops import {', '.join(used)}"] if used else []
    return "\n".join((
        _docstring(recipe, name), "from __future__ import annotations", "",
        "from dataclasses import dataclass", "from typing import Any", "",
        "import torch", "from torch import Tensor", "", *imports, "", "",
        "@dataclass(frozen=True)", f"class {class_name(name)}(Algorithm):", textwrap.indent(body, "    "), "", "",
        f"ALGORITHM = {class_name(name)}()", ""))


def class_name(name: str) -> str:
    return "".join(word.capitalize() for word in re.findall(r"[A-Za-z0-9]+", name))


def literal(value: object) -> str:
    return re.sub(r"e([+-])0*(\d)", lambda m: f"e{m[1].replace('+', '')}{m[2]}", repr(value))


def _docstring(recipe: Recipe, name: str) -> str:
    title = f'"""{name}: GRPO with {", ".join(part.name + brought(company(part)) for part in declared(recipe))}.'
    lines = textwrap.wrap(title, WIDTH, subsequent_indent="    ", break_on_hyphens=False)
    lines += ["", "Written by the offline proposer, which recombines published mechanisms.", ""]
    for part in _chosen(recipe):
        lines += _wrapped(f"{part.name}: {part.formula} ({part.source})", WIDTH, "", "    ")
    return "\n".join((*lines, "the rest: GRPO (Shao et al. 2024, arXiv:2402.03300)", '"""'))


def _chosen(recipe: Recipe) -> list[Part]:
    return [part for part in recipe.by_slot.values() if part.name in recipe.chosen]


def _fields(recipe: Recipe) -> str:
    rows = [(part.flag, "bool", True, f"{part.name}; False: {_instead(part)}") for part in _chosen(recipe) if part.flag]
    rows += [(k.name, type(k.default).__name__, recipe.values[k.name], k.meaning) for k in knobs_of(recipe)]
    rows += [(k.name, type(k.default).__name__, standard(k, recipe), f"{k.meaning}; idle here") for k in spare_knobs(recipe)]
    texts = [f"{n}: {kind} = {literal(value)}" for n, kind, value, _ in rows]
    width = max(map(len, texts), default=0)
    return "\n".join(f"{text:<{width}}  # {meaning}" for text, (*_, meaning) in zip(texts, rows, strict=True))


def _instead(part: Part) -> str:
    return GRPO.name if (GRPO := default(part.slot)) is not None else "without it"


def _declarations(recipe: Recipe) -> str:
    here = recipe.by_slot.values()
    lines = []
    if needs := sorted({part.needs for part in here if part.needs}):
        lines.append(f"needs = frozenset({{{', '.join(map(_quoted, needs))}}})")
    lines += ["mechanisms = ("]
    for part in declared(recipe):
        off = ", ".join(f"{_quoted(k)}: {literal(v)}" for k, v in off_values(part, recipe).items())
        lines.append(f"    Mechanism({_quoted(part.name)}, {_quoted(SLOTS[part.slot][0])}, {{{off}}}),")
    lines += [")", f"zero_advantage_zero_loss = {all(part.zero_safe for part in here)}"]
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return f'"{text}"'


def _reduction(recipe: Recipe) -> str:
    part, grpo = recipe.by_slot["reduction"], default("reduction")
    assert grpo is not None
    if part is grpo:
        return ""  # the interface's default
    return ("@property\ndef reduction(self) -> Reduction:\n"
            f"    # {part.name}: {part.formula}\n"
            f"    return Reduction.{part.code} if self.{part.flag} else Reduction.{grpo.code}")


def _initial_state(recipe: Recipe) -> str:
    state = {k: v for part in recipe.by_slot.values() for k, v in part.state.items()}
    if not state:
        return ""
    return "def initial_state(self) -> dict[str, Any]:\n    return {" + ", ".join(f"{_quoted(k)}: {literal(v)}" for k, v in state.items()) + "}"


def _select(recipe: Recipe) -> str:
    part = recipe.by_slot.get("selection")
    if part is None:
        return ""
    lines = [f"if not self.{part.flag}:", "    return None"] if part.flag else []
    lines += ["g = rollouts.group", "keep = torch.zeros(rollouts.groups, dtype=torch.bool, device=g.device)", *_comment(part), part.code, "return keep"]
    return _function("select(self, rollouts: RolloutBatch, state: dict[str, Any]) -> Tensor | None", lines)


def _advantages(recipe: Recipe) -> str:
    here = recipe.by_slot
    lines = ["R, g = rollouts.reward, rollouts.group"]
    for slot in IN_ADVANTAGES:
        if slot in here:
            lines += _block(here[slot], recipe)
    for part in here.values():
        lines += [f"# {part.name}: state for the next step", part.after] if part.after else []
    lines.append("return Advantages(A, keep)" if "keep" in here else "return Advantages(A)")
    return _function("advantages(self, rollouts: RolloutBatch, state: dict[str, Any]) -> Advantages", lines)


def _token_loss(recipe: Recipe) -> str:
    here = recipe.by_slot
    blocks = {slot: _block(here[slot], recipe) for slot in IN_TOKEN_LOSS if slot in here}
    if not _uses("w", [line for slot, block in blocks.items() if slot != "ratio" for line in block]):
        del blocks["ratio"]
    lines = [line for block in blocks.values() for line in block]
    head = ["A = batch.advantage"] + ([D] if _uses("d", lines) else [])
    return _function("token_loss(self, batch: PolicyBatch, state: dict[str, Any]) -> Tensor", [*head, *lines, "return loss"])


def _uses(name: str, lines: list[str]) -> bool:
    code = "\n".join(line for line in lines if not line.startswith("#"))
    return re.search(rf"(?<![.\w]){name}\b", code) is not None


def _block(part: Part, recipe: Recipe) -> list[str]:
    """A part's lines. A bool field switches between it and GRPO's part, unless the code reads the field itself."""
    code = _code(part, recipe)
    if not part.flag or part.name not in recipe.chosen or f"self.{part.flag}" in code:
        return [*_comment(part), *code.splitlines()]
    lines = [*_comment(part), f"if self.{part.flag}:", *textwrap.indent(code, "    ").splitlines()]
    if (grpo := default(part.slot)) is not None:
        lines += ["else:", *textwrap.indent(_code(grpo, recipe), "    ").splitlines()]
    return lines


def _code(part: Part, recipe: Recipe) -> str:
    """With the statistics mask where there is one."""
    masked = "statistics" in recipe.by_slot
    return part.code.replace("{live}", ", live" if masked else "").replace("{std}", "spread" if masked else "group_std(R, g)")


def _comment(part: Part) -> list[str]:
    return _wrapped(f"{part.name}: {part.formula}", WIDTH - 8, "# ", "#     ")


@cache  # a few texts for each part of the catalogue
def _wrapped(text: str, width: int, first: str, others: str) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)


def _function(signature: str, lines: list[str]) -> str:
    return f"def {signature}:\n" + textwrap.indent("\n".join(lines), "    ")
