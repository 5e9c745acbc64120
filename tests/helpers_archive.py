"""Entries and summaries made by hand, for the tests of the archive and of the selection."""
from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from poise_hpc.entry import Entry, curve_table, evaluation_tables
from poise_hpc.types import EntrySummary, Outcome, Score, Screening


def score(overall: float, sd: float = 1.0, seeds: int = 4, benchmarks: dict[str, float] | None = None) -> Score:
    """`seeds` values around `overall` whose sample standard deviation is `sd`."""
    offsets = np.array([(-1.0) ** i for i in range(seeds)])
    spread = np.std(offsets - offsets.mean(), ddof=1) if seeds > 1 else 1.0
    values = overall + (offsets - offsets.mean()) * sd / spread
    half = float(3.0 * sd / np.sqrt(seeds))
    return Score(overall=overall, ci=(overall - half, overall + half) if seeds > 1 else None,
                 by_seed={str(i): float(v) for i, v in enumerate(values)}, final=overall, curve={"1.0": overall, "0.5": overall - 5},
                 benchmarks=benchmarks or {"hard/pass@8": overall, "easy/acc@1": overall})


def row(id: str, overall: float | None, parents: tuple[str, ...] = (), mechanisms: tuple[str, ...] = (), *,
        behaviour: dict[str, float] | None = None, **score_options: Any) -> EntrySummary:
    failed = overall is None
    return EntrySummary(
        id=id, name=f"{id}-GRPO", parents=parents, outcome=Outcome.CANDIDATE_ERROR if failed else Outcome.SUCCEEDED,
        cause="nonfinite-loss" if failed else "", proposer="offline", mechanisms=mechanisms,
        score=None if failed else score(overall, **score_options), behaviour=behaviour or {}, verdict="undecided",
        run_seconds=60.0, created="2026-01-01T00:00:00Z")


def screened(id: str, delta: float, parents: tuple[str, ...] = (), mechanisms: tuple[str, ...] = ()) -> EntrySummary:
    """Ended at half of the training, `delta` points from a baseline that has 40 there."""
    found = Screening("0.5", "behind", False, {"0": 40.0 + delta}, 40.0 + delta, 10.0, delta, None, delta, 0.0)
    return replace(row(id, None, parents, mechanisms), outcome=Outcome.SCREENED_OUT, cause="behind", verdict="screened", screened=found)


def entry(number: int = 7, **changes: Any) -> Entry:
    """A small whole entry: two seeds, three steps, two problems, six completions."""
    element = {"at": 1.0, "benchmark": "hard", "problem_ids": [4, 9], "n": 3, "correct": [1, 3], "valid": [2, 3],
               "truncated": [1, 0], "mean_length": [2.5, 4.0]}
    lengths = np.array([1, 2, 3, 1, 1, 4])
    offsets = np.concatenate([[0], lengths.cumsum()])
    table, tokens, offsets = evaluation_tables((s, element, np.arange(12) + s, offsets) for s in (0, 1))
    names, steps, values = curve_table({0: [{"step": 1, "reward": 0.1, "entropy": 1.0}, {"step": 2, "reward": 0.2, "entropy": 0.9}],
                                        1: [{"step": 1, "reward": 0.3, "entropy": 1.1}]})
    data = dict(
        id=f"c{number:04d}", name="VM-AV-GRPO", parents=("c0000",), proposer="offline",
        proposal={"name": "VM-AV-GRPO", "parents": ["c0000"], "mechanisms": ["validity masking", "analytic variance"],
                  "hypothesis": "sep\u2028arated \U0001f642", "description": "", "expected_effect": ""},
        outcome=Outcome.SUCCEEDED, cause="", message="", created="2026-01-01T00:00:00Z", config="train:\n  steps: 3\n",
        code={"algorithm.py": "x = 1  # \u03b8\n", "parts/helper.py": "y = 2\n"}, seeds=(0, 1), versions={"torch": "2.13.0"},
        hashes={"model": "ab" * 32}, pick={"parent": "c0000", "explanation": "only one"},
        checks=[{"name": "padding", "passed": True, "message": "", "seconds": 0.5}],
        attempts=[{"stage": "train", "seed": 0, "number": 1, "outcome": "preempted", "cause": "", "run_seconds": 10.0},
                  {"stage": "train", "seed": 0, "number": 2, "outcome": "succeeded", "cause": "", "run_seconds": 5.5}],
        timings={"rollout_s": 3.25}, score=asdict(score(50.0)), behaviour={"entropy_ratio": 0.5},
        reflection={"verdict": "supported", "text": "it held"}, vocabulary={"symbols": [str(t) for t in range(12)]},
        curve_names=names, curve_steps=steps, curve_values=values,
        evaluations=table, completion_tokens=tokens, completion_offsets=offsets)
    data |= changes
    code = {f"code:{name}": hashlib.sha256(text.encode()).hexdigest() for name, text in data["code"].items()}
    return Entry(**data | {"hashes": code | data["hashes"]})
