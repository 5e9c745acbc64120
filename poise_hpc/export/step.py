"""Between an algorithm and a foreign trainer: what every adapter needs, and no trainer has. Exports take this file along.

The same arithmetic as `training.candidate` and `training.loop`, which also take blame apart and deal rows to ranks. The vectors
that an export stores come from those two; its test compares.
"""
from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from poise_hpc.algorithms.base import Algorithm, RolloutBatch


def advantages(algorithm: Algorithm, rollouts: RolloutBatch, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A (N, T) float32, 0 at padding and where left out, and keep (N,) bool. Groups that `select` drops are not sampled
    again: they leave the loss and Z, and `advantages` does not see them."""
    N, T = rollouts.mask.shape
    value, keep = torch.zeros(N, T, device=rollouts.mask.device), torch.zeros(N, dtype=torch.bool, device=rollouts.mask.device)
    chosen = algorithm.select(rollouts, state)
    rows = torch.ones_like(keep) if chosen is None else chosen[rollouts.group]
    if not rows.any():
        return value, keep
    out = algorithm.advantages(rollouts if rows.all() else taken(rollouts, rows), state)
    A = out.value.detach().float()
    value[rows] = A if A.ndim == 2 else A[:, None].expand(-1, T)
    keep[rows] = True if out.keep is None else out.keep
    live = rollouts.mask & keep[:, None]
    if not value[live].isfinite().all():
        raise FloatingPointError(f"{type(algorithm).__name__}.advantages: {int((~value[live].isfinite()).sum())} of {int(live.sum())} "
                                 "values are NaN or infinite")
    return torch.where(live, value, 0.0), keep


def taken(rollouts: RolloutBatch, rows: Tensor) -> RolloutBatch:
    """The completions in `rows` (N,) bool, groups renumbered in their order."""
    def of(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: x[rows] for name, x in value.items()}
        return value[rows] if isinstance(value, Tensor) else value

    part = replace(rollouts, **{f.name: of(getattr(rollouts, f.name)) for f in fields(rollouts)})
    return replace(part, group=torch.unique(part.group, return_inverse=True)[1])


def importance_weights(mask: Tensor, logp_old: Tensor, logp_rollout: Tensor, cap: float) -> Tensor:
    """w (N, T): min(pi_old / sampler, cap), a constant; 1 where the sampler gave no log-prob (NaN)."""
    d = torch.where(mask & ~logp_rollout.isnan(), logp_old - logp_rollout, 0.0)
    return d.exp().clamp(max=cap)


def plain(state: dict[str, Any]) -> dict[str, Any]:
    """The state as a checkpoint would give it back."""
    return json.loads(json.dumps(state, allow_nan=False))


class Components(dict[str, Tensor]):
    """Reward components by name; what is missing is explained."""

    def __missing__(self, name: str) -> Tensor:
        raise ValueError(f"the algorithm reads the reward component {name!r}; `components` gives {', '.join(self) or 'none'}")


def required(reads: frozenset[str], components: Any, valid: Any, how: str) -> None:
    """ValueError where the algorithm reads what nobody gives."""
    missing = [f"the reward component {name.partition('.')[2]!r}" for name in sorted(reads)
               if name.startswith("components.") and name.partition(".")[2] not in components]
    if "valid" in reads and valid is None:
        missing.append("`valid`, whether an answer could be parsed")
    if missing:
        raise ValueError(f"the algorithm reads {' and '.join(missing)}; {how}")
