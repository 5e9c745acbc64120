"""The novelty gate, before any compute: a candidate that repeats another one is refused, with the reason and the id.

Three tests, against every visible and pending candidate whose mechanisms overlap with the draft's by at least half:
same mechanisms with the same hyperparameters; the same code up to names, comments and docstrings; nearly the same text.
It compares what is written, not what it computes: two spellings of one formula pass.

A large archive is not opened for that. Each index row has the candidate's `signature`, three digests; where none of them
is the draft's, none of the tests can succeed.
"""
from __future__ import annotations

import ast
import hashlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from .. import syntax
from ..files import dumps
from ..types import Proposal
from .base import Context, Draft

TEXT_OVERLAP = 0.9  # share of three-word runs that two proposals have in common
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}-2"  # whose syntax trees a signature is made of, and how


def check_novelty(draft: Draft, context: Context) -> str | None:
    """Why the draft is refused, naming the candidate that it repeats; None if it is new. Without files the proposal is compared."""
    if banned := sorted(context.vetoed & set(draft.proposal.mechanisms)):
        return f"the researcher has ruled out {', '.join(banned)}"
    mine = hyperparameters(draft.proposal, draft.files)
    for id, proposal in _neighbours(draft, context):
        same_mechanisms = set(proposal.mechanisms) == set(draft.proposal.mechanisms)
        files = context.code(id) if draft.files or (same_mechanisms and mine is not None) else {}
        if same_mechanisms and mine is not None and mine == hyperparameters(proposal, files):
            return f"it has the mechanisms and the hyperparameters of {id} ({proposal.name})"
        if draft.files and fingerprint(draft.files) == fingerprint(files):
            return f"its code is that of {id} ({proposal.name}) up to names, comments and docstrings"
        if same_text(draft.proposal, proposal):
            return f"its proposal reads like that of {id} ({proposal.name})"
    return None


def _neighbours(draft: Draft, context: Context) -> Iterator[tuple[str, Proposal]]:
    """Candidates worth opening, by their index rows: alike in mechanisms, and not told apart by their signatures."""
    mine = set(draft.proposal.mechanisms)
    a, b, c = (signature(draft.proposal, draft.files).split()[1:] + ["none", "none"])[:3] if context.entries else ("none",) * 3
    for entry in context.entries:
        theirs = entry.signature  # written out: this runs for every entry of the archive
        if ((a in theirs or b in theirs or c in theirs or not theirs.startswith(PYTHON))
                and _overlap(mine, set(entry.mechanisms)) >= 0.5):
            yield entry.id, context.proposals[entry.id]
    for id, proposal in context.pending:
        if _overlap(mine, set(proposal.mechanisms)) >= 0.5:
            yield id, proposal


def signature(proposal: Proposal, files: Mapping[str, str]) -> str:
    """What the three tests need to be equal, as digests, after the Python version: mechanisms with hyperparameters, if they are
    known; the code, if there is any; the numbers in the text. "3.11-2 r0123... c0123... n0123..."
    """
    hyper, numbers = hyperparameters(proposal, files), _numbers(_words(proposal))
    signs = [_recipe_sign(proposal.mechanisms, hyper)] if hyper is not None else []
    signs += [_sign("c", dumps(fingerprint(files)))] if files else []
    return " ".join([PYTHON, *signs, _sign("n", dumps(numbers))])


def recipe_sign(mechanisms: Iterable[str], stated: Mapping[str, Any]) -> str:
    """The first sign of a proposal that will state these hyperparameters: known before anything is written."""
    return _recipe_sign(mechanisms, dumps(stated))


def _recipe_sign(mechanisms: Iterable[str], hyper: str) -> str:
    return _sign("r", dumps([sorted(set(mechanisms)), hyper]))


def _sign(kind: str, text: str) -> str:
    return kind + hashlib.sha256(text.encode()).hexdigest()[:16]


def _overlap(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b) if a | b else 1.0


def hyperparameters(proposal: Proposal, files: Mapping[str, str]) -> str | None:
    """Canonical text of the hyperparameters: what the proposal states, else the fields of the package; None if neither says."""
    if (recipe := proposal.details.get("recipe")) is not None:
        return dumps(recipe)
    if (stated := stated_values(proposal)) is not None:
        return dumps(stated)
    found = fields(files)
    return dumps(found) if found else None


def stated_values(proposal: Proposal) -> dict[str, Any] | None:
    """Hyperparameters that the proposal gives; None if it gives no list of them."""
    stated = proposal.details.get("hyperparameters")
    return None if stated is None else {name: _number(value) for name, value in stated.items()}


def fields(files: Mapping[str, str]) -> dict[str, Any]:
    """Annotated class fields with a default: an algorithm's hyperparameters."""
    return {name: _number(text) for name, text in _fields_of(files.get("algorithm.py", ""))}


def _number(value: Any) -> Any:
    """0.2 for 0.2, "0.20" and "2e-1"; what is no number stays."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


@lru_cache(maxsize=4096)
def _fields_of(text: str) -> tuple[tuple[str, str], ...]:
    try:
        tree = syntax.parse(text)
    except (SyntaxError, ValueError):
        return ()
    return tuple(sorted((node.target.id, ast.unparse(node.value))
                        for cls in tree.body if isinstance(cls, ast.ClassDef)
                        for node in cls.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value))


def fingerprint(files: Mapping[str, str]) -> tuple[str, ...]:
    """The package without docstrings, comments, layout, and the names that it chose itself."""
    return tuple(sorted(_normalized(text) for text in files.values()))


@lru_cache(maxsize=4096)
def _normalized(text: str) -> str:
    """The syntax tree in one line a word, one walk: every draft and every record goes through it. Names that the text binds itself
    (classes, arguments and variables of functions; not methods and fields, which the interface reads) are numbered in the
    order of their appearance; docstrings and annotations of functions are left out."""
    try:
        tree = syntax.parse(text)
    except (SyntaxError, ValueError):
        return text  # the static gate says what is wrong with it
    words: list[str] = []
    names: list[int] = []  # places in `words` of names that may turn out to be bound
    bound: set[str] = set()

    def put_name(name: str) -> None:
        names.append(len(words))
        words.append(name)

    def visit(node: ast.AST, inside: bool) -> None:
        kind = type(node)
        words.append(kind.__name__)
        if kind is ast.Name or kind is ast.arg:
            name = node.id if kind is ast.Name else node.arg
            put_name(name)
            if kind is ast.Name:
                words.append(type(node.ctx).__name__)
            if inside and (kind is ast.arg or type(node.ctx) is ast.Store):
                bound.add(name)
            return
        inside = inside or kind is ast.FunctionDef
        for field in kind._fields:
            value = getattr(node, field, None)
            if field == "returns" and kind is ast.FunctionDef:
                continue
            if isinstance(value, ast.AST):
                visit(value, inside)
            elif isinstance(value, list):
                words.append("[")
                documented = field == "body" and kind in DOCUMENTED and ast.get_docstring(node, clean=False) is not None
                for item in value[1:] if documented else value:
                    visit(item, inside) if isinstance(item, ast.AST) else words.append(repr(item))
                words.append("]")
            elif field == "name" and kind is ast.ClassDef:
                bound.add(value)
                put_name(value)
            else:
                words.append(repr(value))

    visit(tree, False)
    number: dict[str, str] = {}
    for place in names:
        if words[place] in bound:
            words[place] = number.setdefault(words[place], str(len(number)))
    return "\n".join(words)


def same_text(a: Proposal, b: Proposal) -> bool:
    """Nearly the same hypothesis and description. A changed number is a change; the ids of parents are not."""
    mine, theirs = _words(a), _words(b)
    return bool(mine) and _numbers(mine) == _numbers(theirs) and _overlap(_runs(mine), _runs(theirs)) >= TEXT_OVERLAP


def _words(proposal: Proposal) -> list[str]:
    text = re.sub(r"\bc\d{4,}\b", "", f"{proposal.hypothesis} {proposal.description}".lower())
    return re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?|[^\W\d]+", text)


def _numbers(words: list[str]) -> list[str]:
    return sorted(w for w in words if w[0].isdigit())


def _runs(words: list[str]) -> set[str]:
    return {" ".join(words[i:i + 3]) for i in range(max(1, len(words) - 2))}
