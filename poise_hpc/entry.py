"""An archive entry in memory, and how its tables are built from a candidate's files. `archive` writes and reads it."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .types import Outcome, PoiseError

EVALUATION_ROW = np.dtype([  # one (training seed, snapshot, benchmark, problem)
    ("seed", "<i4"), ("at", "<f8"), ("benchmark", "S32"), ("problem", "S64"), ("n", "<i4"), ("correct", "<i4"),
    ("valid", "<i4"), ("truncated", "<i4"), ("mean_length", "<f4"),
    ("first", "<i8")])  # of its n completions; -1: not kept


@dataclass(frozen=True, eq=False)
class Entry:
    """Everything of one candidate; enough to run it again. S training seeds, K curves, T training steps."""

    id: str
    name: str
    parents: tuple[str, ...]
    proposer: str
    proposal: dict[str, Any]                # types.Proposal
    outcome: Outcome
    cause: str                              # "" when it succeeded
    message: str
    created: str                            # ISO 8601, UTC
    config: str                             # the campaign's resolved config, YAML
    code: dict[str, str]                    # file name -> text: the whole package
    seeds: tuple[int, ...]                  # training seeds, in the order of `curve_values`
    versions: dict[str, str]                # package -> version
    hashes: dict[str, str]                  # "model", "data", "code", ... -> sha256
    pick: dict[str, Any] = field(default_factory=dict)              # why this parent: selection.acquisition.Pick
    checks: list[dict[str, Any]] = field(default_factory=list)      # name, passed, message, seconds
    attempts: list[dict[str, Any]] = field(default_factory=list)    # stage, seed, number, outcome, cause, run_seconds, job_id, host
    timings: dict[str, Any] = field(default_factory=dict)           # summed seconds
    score: dict[str, Any] | None = None     # types.Score; None when it failed or was screened out
    screenings: list[dict[str, Any]] = field(default_factory=list)  # types.Screening, of each rung that it was judged at
    behaviour: dict[str, float] = field(default_factory=dict)       # condensed training curves
    reflection: dict[str, Any] = field(default_factory=dict)        # types.Reflection
    vocabulary: dict[str, Any] = field(default_factory=dict)        # {"symbols": [...]}, or {"tokenizer": name, "files": {name: sha256}}
    curve_names: tuple[str, ...] = ()       # (K,)
    curve_steps: np.ndarray = field(default_factory=lambda: np.zeros(0, "<i8"))            # (T,) training step, from 0
    curve_values: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0), "<f8"))   # (S, K, T) NaN: not there
    evaluations: np.ndarray = field(default_factory=lambda: np.zeros(0, EVALUATION_ROW))   # rows of EVALUATION_ROW
    completion_tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, "<u2"))      # flat uint16 or uint32
    completion_offsets: np.ndarray = field(default_factory=lambda: np.zeros(1, "<i8"))     # completion i: tokens[o[i]:o[i + 1]]


SCALARS = ("id", "name", "parents", "proposer", "proposal", "outcome", "cause", "message", "created", "seeds", "versions",
           "hashes", "pick", "checks", "attempts", "timings", "score", "screenings", "behaviour", "reflection", "vocabulary", "curve_names")


Element = tuple[int, Mapping[str, Any], np.ndarray | None, np.ndarray | None]


def evaluation_tables(elements: Iterable[Element]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows of EVALUATION_ROW, flat tokens, offsets) from (training seed, element, its tokens, its offsets (P * n + 1,));
    elements are as `evaluation.job` writes them, None for tokens and offsets leaves their completions out.

    By the column: a record holds thousands of rows, and one by one they would cost more than all the rest.
    """
    tables, parts, offsets, count, start = [np.zeros(0, EVALUATION_ROW)], [np.zeros(0, "<u2")], [np.zeros(1, "<i8")], 0, 0
    for seed, e, tokens, ends in elements:
        n, names = e["n"], ("correct", "valid", "truncated", "mean_length")
        table = np.zeros(len(e["problem_ids"]), EVALUATION_ROW)
        table["seed"], table["at"], table["benchmark"], table["n"] = seed, float(e["at"]), _name(e["benchmark"], 32), n
        table["problem"], table["first"] = [_name(p, 64) for p in e["problem_ids"]], -1
        for name in names:
            table[name] = e[name]
        if tokens is not None and ends is not None:
            table["first"] = count + n * np.arange(len(table))
            parts.append(tokens)
            offsets.append(start + ends[1:])
            count, start = count + len(ends) - 1, start + len(tokens)
        tables.append(table)
    flat = np.concatenate(parts)
    return np.concatenate(tables), flat.astype("<u4" if flat.size and flat.max() > 0xFFFF else "<u2"), np.concatenate(offsets)


def curve_table(rows_by_seed: Mapping[int, Iterable[Mapping[str, Any]]]) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """(names (K,), steps (T,), values (S, K, T)) from curves.jsonl rows of each seed; what a row lacks is NaN."""
    rows = {seed: list(r) for seed, r in rows_by_seed.items()}
    names = sorted({k for r in rows.values() for row in r for k, v in row.items() if k != "step" and isinstance(v, (int, float))})
    steps = sorted({int(row["step"]) for r in rows.values() for row in r})
    column, place = {n: i for i, n in enumerate(names)}, {t: i for i, t in enumerate(steps)}
    values = np.full((len(rows), len(names), len(steps)), np.nan)
    for s, seed_rows in enumerate(rows.values()):
        for row in seed_rows:
            for name in column.keys() & row.keys():
                if row[name] is not None:
                    values[s, column[name], place[int(row["step"])]] = row[name]
    return tuple(names), np.array(steps, "<i8"), values


def _name(value: Any, width: int) -> bytes:
    raw = str(value).encode()
    if len(raw) > width:
        raise PoiseError(f"the archive stores names of at most {width} bytes, got {len(raw)}: {value!r}. Shorten it")
    return raw
