"""From per-problem counts to points, and from training curves to a few numbers that describe a run. Pure functions.

Letters: n samples of a problem, c of them correct. All scores are in points, 0..100.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from ..config import Benchmark
from ..types import PoiseError


def pass_at(k: int, n: int, c: int) -> float:
    """Unbiased pass@k = 1 - C(n-c, k) / C(n, k): k of the n samples, drawn without replacement, hold a correct one.

    Chen et al. 2021, arXiv:2107.03374, eq. 1. As a product of n-c over-n factors: no huge binomials.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} needs 0 <= c <= n and 1 <= k <= n, got c={c}, n={n}")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def metric(name: str, n: int, correct: Sequence[int]) -> float:
    """Mean of a metric over problems, in points. "acc@1": the chance that one sample is correct, c / n;
    "avg@N" is the same, named after the N samples it is averaged over; "pass@K": see `pass_at`."""
    kind, _, k = name.partition("@")
    if not correct:
        raise ValueError(f"{name} of no problems")
    each = [pass_at(int(k), n, c) for c in correct] if kind == "pass" else [c / n for c in correct]
    return 100.0 * fmean(each)


def merge(elements: Iterable[Mapping[str, Any]], benchmarks: Mapping[str, Benchmark]) -> dict[str, Any]:
    """Elements of one run (one per point and benchmark, as `evaluation.job` writes them) to its scores.

    `benchmarks` is the config's table. Returns {"points": {at: {"overall", "benchmarks": {"hard/pass@32": ...},
    "valid", "truncated", "length"}}, "curve": mean of the points' overalls, "final": the last point's}.
    """
    table: dict[str, dict[str, Mapping[str, Any]]] = {}
    for element in elements:
        table.setdefault(element["at"], {})[element["benchmark"]] = element
    missing = [f"{at}-{name}" for at, found in table.items() for name in benchmarks if name not in found]
    if missing or not table:
        raise PoiseError(f"the evaluation is not complete; missing: {', '.join(missing) or 'everything'}")
    points = {at: _point(table[at], benchmarks) for at in sorted(table, key=float)}
    overall = [point["overall"] for point in points.values()]
    return {"points": points, "curve": fmean(overall), "final": overall[-1]}


def last_point(table: Any, benchmarks: Mapping[str, Benchmark]) -> dict[str, dict[str, float]]:
    """"hard/pass@32" -> training seed -> points, at the last evaluation point, from an entry's `evaluations` (rows of
    `entry.EVALUATION_ROW`). Their mean over seeds is what `Score.benchmarks` holds."""
    out: dict[str, dict[str, float]] = {}
    last = table[table["at"] == table["at"].max()] if len(table) else table
    for name, benchmark in benchmarks.items():
        rows = last[last["benchmark"] == name.encode()]
        for seed in sorted(set(rows["seed"].tolist())):
            of = rows[rows["seed"] == seed]
            for kind in benchmark.metrics:
                out.setdefault(f"{name}/{kind}", {})[str(seed)] = metric(kind, int(of["n"][0]), of["correct"].tolist())
    return out


def _point(elements: Mapping[str, Mapping[str, Any]], benchmarks: Mapping[str, Benchmark]) -> dict[str, Any]:
    scores, overall = {}, 0.0
    for name, benchmark in benchmarks.items():
        element = elements[name]
        for kind, weight in benchmark.metrics.items():
            scores[f"{name}/{kind}"] = metric(kind, element["n"], element["correct"])
            overall += weight * scores[f"{name}/{kind}"]
    used = [elements[name] for name in benchmarks]

    def share(key: str) -> float:  # of all samples of all benchmarks, in points
        return 100.0 * sum(sum(e[key]) for e in used) / sum(e["n"] * len(e[key]) for e in used)

    samples = [(e["n"], length) for e in used for length in e["mean_length"]]
    return {"overall": overall, "benchmarks": scores, "valid": share("valid"), "truncated": share("truncated"),
            "length": sum(n * length for n, length in samples) / sum(n for n, _ in samples)}


def behaviour(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """A run's training curve (rows of `curves.jsonl`) condensed to what diversity and reflection look at.

    A feature whose curve is absent, or too short, is left out. Start and end are means over a tenth of the run.
    """
    rows = list(rows)

    def curve(key: str) -> list[float]:
        values = (row.get(key) for row in rows)
        return [float(v) for v in values if isinstance(v, (int, float)) and math.isfinite(v)]

    out: dict[str, float] = {}
    if entropy := curve("entropy"):
        out |= {"entropy_min": min(entropy), "entropy_ratio": _ratio(*_ends(entropy))}
    for key, name in (("kl_old", "kl_max"), ("kl_ref", "kl_ref_max"), ("gradient_norm", "gradient_norm_max")):
        if values := curve(key):
            out[name] = max(values)
    for key, name in (("gradient_norm", "gradient_norm_mean"), ("clip_fraction", "clip_fraction_mean"),
                      ("zero_variance", "zero_variance_mean")):
        if values := curve(key):
            out[name] = fmean(values)
    if length := curve("length"):
        out["length_ratio"] = _ratio(*_ends(length))
    if len(reward := curve("reward")) >= 2:
        smooth = _smooth(reward)
        middle = smooth[(len(smooth) - 1) // 2]
        out |= {"reward_gain_early": middle - smooth[0], "reward_gain_late": smooth[-1] - middle,
                "reward_drop_max": _drop(smooth)}
    return out


def _window(values: Sequence[float]) -> int:
    return max(1, len(values) // 10)


def _ends(values: Sequence[float]) -> tuple[float, float]:
    w = _window(values)
    return fmean(values[:w]), fmean(values[-w:])


def _ratio(start: float, end: float) -> float:
    """end / start; 0 where the curve starts at 0 (nothing to lose)."""
    return end / start if start else 0.0


def _smooth(values: Sequence[float]) -> list[float]:
    """Means over all windows of a tenth of the run."""
    w = _window(values)
    return [fmean(values[i:i + w]) for i in range(len(values) - w + 1)]


def _drop(values: Sequence[float]) -> float:
    """Largest fall from the best value so far."""
    best, drop = values[0], 0.0
    for v in values:
        best = max(best, v)
        drop = max(drop, best - v)
    return drop
