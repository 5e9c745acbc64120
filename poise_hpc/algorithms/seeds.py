"""The seed algorithms by name. Needs no torch: the login node copies their source, jobs import it."""
from __future__ import annotations

import difflib
import re
from pathlib import Path

from ..types import UsageError

SEEDS = ("grpo", "dr_grpo", "rloo", "reinforce_pp", "dapo", "gspo", "gmpo", "sapo", "cispo", "aspo", "topr", "gpg", "maxrl",
         "analytic_variance", "validity_masking", "conditional_normalization", "length_shaping")


def source(name: str) -> str:
    """A seed's module text as a stand-alone candidate package: imports absolute."""
    if name not in SEEDS:
        close = difflib.get_close_matches(name, SEEDS, n=1)
        raise UsageError(f"no seed algorithm {name!r}" + (f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(SEEDS)}"))
    text = (Path(__file__).parent / f"{name}.py").read_text()
    return re.sub(r"^from \.(\w+) import", r"from poise_hpc.algorithms.\1 import", text, flags=re.MULTILINE)
