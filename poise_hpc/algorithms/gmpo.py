"""GMPO: maximizes the geometric instead of the arithmetic mean of the tokens' clipped ratios.

Zhao et al. 2025, Geometric-Mean Policy Optimization, arXiv:2507.20673, eq. 4: outliers among the ratios weigh less, so
a wider clip can be afforded, exp(-0.4) to exp(0.4). The clip is one-sided, on the side that A pushes to.

Deviation from verl: it averages over the completions of a microbatch, we over those of the whole step.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise_hpc.algorithms.base import Advantages, Algorithm, Mechanism, PolicyBatch, Reduction, RolloutBatch
from poise_hpc.algorithms.ops import clipped, group_mean, group_std, log_ratio, masked_mean


@dataclass(frozen=True)
class GMPO(Algorithm):
    clip: float = 0.2             # epsilon of GRPO's clip, without the mechanism
    log_range: float = 0.4        # bound of a token's log-ratio
    std_floor: float = 1e-6       # added to the group's standard deviation
    geometric_mean: bool = True   # False: GRPO

    reduction = Reduction.SEQ_MEAN_TOKEN_MEAN
    mechanisms = (Mechanism("geometric-mean", "clipping", off={"geometric_mean": False}),)
    zero_advantage_zero_loss = True

    def advantages(self, rollouts: RolloutBatch, state: dict[str, Any]) -> Advantages:
        # A_i = (R_i - mean R) / (std R + floor), over the group of i
        R, g = rollouts.reward, rollouts.group
        return Advantages((R - group_mean(R, g)) / (group_std(R, g) + self.std_floor))

    def token_loss(self, batch: PolicyBatch, state: dict[str, Any]) -> Tensor:
        # l = -A exp(mean_t c_t),   c_t = min(d, range) if A > 0 else max(d, -range),   d = log-ratio. The same at every token.
        d, A = log_ratio(batch), batch.advantage
        if not self.geometric_mean:
            return clipped(d.exp(), A, self.clip, self.clip)
        c = torch.where(A > 0, d.clamp(max=self.log_range), d.clamp(min=-self.log_range))
        return -A * masked_mean(c, batch.mask).exp()


ALGORITHM = GMPO()
