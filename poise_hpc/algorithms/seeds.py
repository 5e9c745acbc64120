"""The seed algorithms by name. Needs no torch: the login node copies their source, jobs import it."""
from __future__ import annotations

import difflib
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from ..types import UsageError

if TYPE_CHECKING:
    from .base import Algorithm

SEEDS: dict[str, str] = {name: f"poise_hpc.algorithms.{name}" for name in (
    "grpo", "dr_grpo", "rloo", "reinforce_pp", "dapo", "gspo", "gmpo", "sapo", "cispo", "aspo", "topr", "gpg", "maxrl",
    "analytic_variance", "validity_masking", "conditional_normalization", "length_shaping")}


def source(name: str) -> str:
    """A seed's module text. Its imports are absolute: it is a stand-alone candidate package as it stands."""
    return (Path(__file__).parent / f"{_known(name)}.py").read_text(encoding="utf-8")


def seed(name: str) -> Algorithm:
    return importlib.import_module(SEEDS[_known(name)]).ALGORITHM


def _known(name: str) -> str:
    if name not in SEEDS:
        close = difflib.get_close_matches(name, SEEDS, n=1)
        raise UsageError(f"no seed algorithm {name!r}" + (f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(SEEDS)}"))
    return name
