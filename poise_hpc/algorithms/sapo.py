"""SAPO: a smooth gate instead of the hard clip.

Gao et al. 2025, Soft Adaptive Policy Optimization, arXiv:2511.20347, eq. 5 and 6: f(w) = 4/tau sigmoid(tau (w - 1)), whose
slope is 1 at w = 1 and fades on both sides, faster for A <= 0, where tokens that were not sampled gain.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise_hpc.algorithms.base import Advantages, Algorithm, Mechanism, PolicyBatch, Reduction, RolloutBatch
from poise_hpc.algorithms.ops import clipped, group_mean, group_std, ratio


@dataclass(frozen=True)
class SAPO(Algorithm):
    clip: float = 0.2             # epsilon of GRPO's clip, without the mechanism
    tau_positive: float = 1.0     # tau where A > 0
    tau_negative: float = 1.05    # tau elsewhere
    std_floor: float = 1e-6       # added to the group's standard deviation
    soft_gate: bool = True        # False: GRPO

    reduction = Reduction.SEQ_MEAN_TOKEN_MEAN
    mechanisms = (Mechanism("soft-gate", "clipping", off={"soft_gate": False}),)
    zero_advantage_zero_loss = True

    def advantages(self, rollouts: RolloutBatch, state: dict[str, Any]) -> Advantages:
        # A_i = (R_i - mean R) / (std R + floor), over the group of i
        R, g = rollouts.reward, rollouts.group
        return Advantages((R - group_mean(R, g)) / (group_std(R, g) + self.std_floor))

    def token_loss(self, batch: PolicyBatch, state: dict[str, Any]) -> Tensor:
        # l = -A 4 / tau sigmoid(tau (w - 1))
        w, A = ratio(batch), batch.advantage
        if not self.soft_gate:
            return clipped(w, A, self.clip, self.clip)
        tau = torch.where(A > 0, self.tau_positive, self.tau_negative)
        return -A * 4 / tau * torch.sigmoid(tau * (w - 1))


ALGORITHM = SAPO()
