"""Means, intervals and differences over training seeds; no I/O, no state. Points are 0..100.

Seeds are paired: every candidate trains on the same ones, so a difference is taken seed by seed. Not here: a
correction for having picked the best of many. Its cure is fresh seeds and confirmation prompts, not arithmetic;
`expected_best` says how much of it there is to cure.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Literal

import numpy as np

from .types import PoiseError, Score

LEVEL = 0.95
PRIOR_SEEDS = 4  # how many degrees of freedom the pooled seed spread is worth against an entry's own


def mean_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, tuple[float, float] | None]:
    """Mean and its two-sided Student t interval; None as interval with one value."""
    x = np.asarray(values, float)
    mean = float(x.mean())
    if x.size < 2:
        return mean, None
    from scipy.special import stdtrit  # Student's t quantile; scipy.stats.t.ppf is this, after a second of imports

    half = float(stdtrit(x.size - 1, 0.5 + level / 2) * x.std(ddof=1) / np.sqrt(x.size))
    return mean, (mean - half, mean + half)


def paired_difference(ours: Mapping[str, float], theirs: Mapping[str, float],
                      level: float = LEVEL) -> tuple[float, tuple[float, float] | None] | None:
    """Mean of ours - theirs over the seeds both have, with its t interval; None without a common seed."""
    common = sorted(ours.keys() & theirs.keys())
    return mean_interval([ours[s] - theirs[s] for s in common], level) if common else None


def score(evaluations_by_seed: Mapping[Any, Mapping[str, Any]], baseline_by_seed: Mapping[Any, Mapping[str, Any]] | None,
          use: Literal["curve", "final"]) -> Score:
    """A candidate's figures from `evaluation.metrics.merge` of each training seed.

    `use` names what selection takes as a seed's Overall: the mean over the evaluation points, or the last one.
    """
    if not evaluations_by_seed:
        raise PoiseError("a score needs the evaluation of at least one training seed, got none")
    runs = {str(seed): merged for seed, merged in evaluations_by_seed.items()}
    by_seed = {seed: float(merged[use]) for seed, merged in runs.items()}
    overall, ci = mean_interval(list(by_seed.values()))
    ats = sorted(set.intersection(*(set(m["points"]) for m in runs.values())), key=float)
    last = [m["points"][ats[-1]] for m in runs.values()]
    against = {str(seed): float(merged[use]) for seed, merged in (baseline_by_seed or {}).items()}
    difference = paired_difference(by_seed, against)
    return Score(
        overall=overall, ci=ci, by_seed=by_seed, final=_mean(m["final"] for m in runs.values()),
        curve={at: _mean(m["points"][at]["overall"] for m in runs.values()) for at in ats},
        benchmarks={name: _mean(point["benchmarks"][name] for point in last) for name in last[0]["benchmarks"]},
        delta=difference[0] if difference else None, delta_ci=difference[1] if difference else None)


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


# --- uncertainty of a score, borrowed from all entries

def spread(scores: Sequence[Score]) -> tuple[np.ndarray, np.ndarray]:
    """(seeds n, sum of squared deviations over seeds), each (N,); without a Python loop, for 10,000 entries."""
    n = np.array([len(s.by_seed) for s in scores])
    values = np.fromiter(chain.from_iterable(s.by_seed.values() for s in scores), float, int(n.sum()))
    starts = np.cumsum(n) - n
    mean = np.add.reduceat(values, starts) / n
    return n, np.add.reduceat((values - np.repeat(mean, n)) ** 2, starts)


def pooled_sd(scores: Sequence[Score]) -> float | None:
    """Standard deviation of one seed's Overall, pooled over entries; None if no entry has two seeds."""
    return _pooled(*spread(scores)) if scores else None


def _pooled(n: np.ndarray, squares: np.ndarray) -> float | None:
    freedom = int((n - 1).sum())
    return float(np.sqrt(squares.sum() / freedom)) if freedom else None


def standard_errors(scores: Sequence[Score], pooled: float | None) -> np.ndarray:
    """(N,) standard error of each `overall`, with the seed variance shrunk to the pooled one.

        v = (d0 pooled^2 + sum_s (y_s - mean y)^2) / (d0 + n - 1),   se = sqrt(v / n),   d0 = PRIOR_SEEDS

    Two seeds that happen to agree would otherwise look certain (Smyth 2004's moderated variance, with a fixed d0).
    Without a pooled value nobody's noise is known: all zero.
    """
    if not scores or pooled is None:
        return np.zeros(len(scores))
    return _errors(*spread(scores), pooled)


def _errors(n: np.ndarray, squares: np.ndarray, pooled: float) -> np.ndarray:
    return np.sqrt((PRIOR_SEEDS * pooled**2 + squares) / (PRIOR_SEEDS + n - 1) / n)


def seed_noise(n: np.ndarray, squares: np.ndarray) -> tuple[np.ndarray, float | None]:
    """(`standard_errors` (N,), `pooled_sd`) from what `spread` gives."""
    pooled = _pooled(n, squares)
    return (np.zeros(len(n)) if pooled is None else _errors(n, squares, pooled)), pooled


# --- what picking the best does

def paired_sd(scores: Sequence[Score]) -> float | None:
    """Noise of one seed's Overall once what a seed does to all entries is taken off, since paired differences do not see it.

        sigma^2 = sum_is (y_is - mean_s y_i - mean_i y_s + mean y)^2 / ((N - 1) (S - 1))

    Over the N entries that have the most common S seeds; None with fewer than two of either.
    """
    kept = Counter(tuple(sorted(s.by_seed)) for s in scores).most_common(1)
    seeds = kept[0][0] if kept else ()
    y = np.array([[s.by_seed[seed] for seed in seeds] for s in scores if tuple(sorted(s.by_seed)) == seeds])
    if min(y.shape, default=0) < 2:
        return None
    rest = y - y.mean(axis=1, keepdims=True) - y.mean(axis=0) + y.mean()
    return float(np.sqrt((rest**2).sum() / ((y.shape[0] - 1) * (y.shape[1] - 1))))


def expected_best(count: int) -> float:
    """Expected maximum of `count` independent standard normal draws: by so many standard errors the best of equals leads."""
    from scipy.special import ndtr

    x = np.linspace(-9.0, 9.0, 7201)
    below = ndtr(x) ** count
    return float(((x[1:] + x[:-1]) / 2 * np.diff(below)).sum())
