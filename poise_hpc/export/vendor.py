"""A package's code made independent: with it go the few modules of poise_hpc that it needs, and imports point to the copies.

    <plug-in>/__init__.py               ALGORITHM, READS
    <plug-in>/adapter.py  step.py       the trainer's adapter, and what adapters share
    <plug-in>/algorithm/*.py            the package as it stands in the archive
    <plug-in>/_poise_hpc/*.py           copies of poise_hpc.algorithms.*

Needs no torch: nothing is imported, text is read and rewritten.
"""
from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from .. import __version__
from ..types import UsageError

OURS, HERE = "poise_hpc.algorithms", "poise_hpc.export"
COPIES = "_poise_hpc"
ROOT = Path(__file__).parents[1]


def plugin(code: Mapping[str, str], target: str, reads: list[str]) -> dict[str, str]:
    """Path inside the plug-in -> text."""
    adapters = {name: (ROOT / "export" / own).read_text(encoding="utf-8") for name, own in (("adapter.py", f"{target}.py"), ("step.py", "step.py"))}
    files = {f"algorithm/{name}": rewritten(text, f"..{COPIES}") for name, text in code.items()}
    files.setdefault("algorithm/__init__.py", "")
    for name in sorted(needed([*code.values(), *adapters.values()])):
        text = (ROOT / "algorithms" / f"{name}.py").read_text(encoding="utf-8")
        files[f"{COPIES}/{name}.py"] = origin(f"algorithms/{name}.py") + rewritten(text, ".")
    files[f"{COPIES}/__init__.py"] = ""
    for name, text in adapters.items():
        own = f"{target}.py" if name == "adapter.py" else name
        files[name] = origin(f"export/{own}") + rewritten(text, f".{COPIES}", ".")
    files["__init__.py"] = ('"""ALGORITHM, and what it reads of rollouts that a trainer must be told where to find."""\n'
                            f"from .algorithm.algorithm import ALGORITHM\n\n__all__ = [\"ALGORITHM\", \"READS\"]\n\nREADS = frozenset({sorted(reads)!r})\n")
    return files


def origin(path: str) -> str:
    return f"# Copied from poise_hpc {__version__} (Apache-2.0, see LICENSE), poise_hpc/{path}; imports changed, nothing else.\n"


def needed(texts: list[str]) -> set[str]:
    """Modules of poise_hpc.algorithms that these texts import, and what those import."""
    found: set[str] = set()
    waiting = {name for text in texts for name in imported(text)}
    while waiting:
        name = waiting.pop()
        path = ROOT / "algorithms" / f"{name}.py"
        if not path.exists():
            raise UsageError(f"the package imports {OURS}.{name}, which this version of poise_hpc has not; check out the version "
                             "that its record names, and export with that")
        found.add(name)
        waiting |= set(imported(path.read_text(encoding="utf-8"))) - found
    return found


def imported(text: str) -> Iterator[str]:
    """Module names below poise_hpc.algorithms, from any of the ways to import them."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix(f"{OURS}.") for alias in node.names if alias.name.startswith(f"{OURS}."))
        elif isinstance(node, ast.ImportFrom) and node.module == OURS:
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{OURS}."):
            yield node.module.removeprefix(f"{OURS}.")
        elif isinstance(node, ast.ImportFrom) and node.level == 1 and node.module and (ROOT / "algorithms" / f"{node.module}.py").exists():
            yield node.module  # of our own modules; a package's own `.ops` takes ours along for nothing


def rewritten(text: str, algorithms: str, export: str = "") -> str:
    """`from poise_hpc.algorithms.x import y` -> `from <algorithms>.x import y`; the same for poise_hpc.export."""
    lines = text.split("\n")  # as `ast` counts them: splitlines also splits at form feeds
    for node in sorted((n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import | ast.ImportFrom)), key=lambda n: -n.lineno):
        first, last = node.lineno - 1, node.end_lineno
        whole = "\n".join(lines[first:last])
        changed = relative(node, whole, OURS, algorithms)
        lines[first:last] = (relative(node, changed, HERE, export) if export else changed).split("\n")
    return "\n".join(lines)


def relative(node: ast.Import | ast.ImportFrom, text: str, package: str, base: str) -> str:
    if isinstance(node, ast.ImportFrom):
        dot = "" if base.endswith(".") else "."
        return re.sub(rf"\bfrom(\s+){re.escape(package)}(\.)?", lambda m: f"from{m[1]}{base}{dot if m[2] else ''}", text)
    return re.sub(rf"\bimport\s+{re.escape(package)}\.(\w+)\s+as\b", lambda m: f"from {base} import {m[1]} as", text)
