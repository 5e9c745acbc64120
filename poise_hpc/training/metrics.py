"""The row that each training step adds to the curves: pure functions of the step's batch and its updates.

Everything here is reproducible to the bit; times are kept apart (`Stopwatch`).
"""
from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..algorithms.base import RolloutBatch
from .batch import StepBatch

FAR = 0.2  # |ratio - 1| beyond which a token counts into clip_fraction, whatever the algorithm clips at


def sampling(batch: StepBatch) -> dict[str, Any]:
    """Means over all completions that the step sampled, groups that selection dropped included."""
    r = batch.rollouts
    row = {
        "reward": mean(r.reward),
        "components": {name: mean(value) for name, value in sorted(r.components.items())},
        "acc": mean(batch.correct),
        "valid": mean(r.valid),
        "truncated": mean(r.truncated),
        "length": mean(r.length),                              # tokens
        "entropy": -mean(r.logp_old[r.mask]),                  # nats, Monte-Carlo: -log pi_old of what was sampled
        "zero_variance": mean(zero_variance(r)),               # share of groups
        "groups_sampled": r.groups,
    }
    if r.logp_ref is not None:
        row["kl_ref"] = mean(k3(r.logp_old, r.logp_ref)[r.mask])
    return row


def zero_variance(r: RolloutBatch) -> Tensor:
    """(G,) bool: all completions of the group got the same reward."""
    empty = torch.zeros(r.groups, dtype=r.reward.dtype)
    low = empty.scatter_reduce(0, r.group, r.reward, "amin", include_self=False)
    return low == empty.scatter_reduce(0, r.group, r.reward, "amax", include_self=False)


def advantage(value: Tensor, live: Tensor) -> dict[str, float]:
    """Of advantage (N, T) over the tokens in `live` (N, T)."""
    A = value[live]
    return {"advantage_mean": mean(A), "advantage_std": float(A.double().std(correction=0)) if len(A) else 0.0,
            "advantage_max": float(A.abs().max()) if len(A) else 0.0}


def effective_share(weight: Tensor) -> float:
    """Effective sample size of importance weights, as a share of their number: (sum w)^2 / (n sum w^2)."""
    w = weight.double()
    return float(w.sum() ** 2 / (len(w) * (w * w).sum())) if len(w) else 1.0


def k3(logp: Tensor, other: Tensor) -> Tensor:
    """Estimator of KL(pi || other) per token sampled from pi: e^-d - 1 + d >= 0, with d = logp - other."""
    d = logp - other
    return torch.exp(-d) - 1 + d


def drift(logp: Tensor, logp_old: Tensor, live: Tensor) -> Tensor:
    """(3,) float64: tokens, sum of k3 of pi_old against pi_theta, tokens with a ratio far from 1. `live` (B, T) bool."""
    d = (logp - logp_old)[live].double()
    return torch.stack([torch.tensor(float(d.numel()), dtype=torch.float64), k3(-d, torch.zeros_like(d)).sum().cpu(),
                        ((d.exp() - 1).abs() > FAR).double().sum().cpu()])


def mean(x: Tensor) -> float:
    return float(x.double().mean()) if x.numel() else 0.0


class Stopwatch:
    """Seconds per part of a step. What is in no part is the caller's "rest"."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start
