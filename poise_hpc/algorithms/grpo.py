"""GRPO: group-relative advantages, clipped ratio, mean over sequences of token means.

Shao et al. 2024, DeepSeekMath, arXiv:2402.03300, eq. 3 (its KL term is off by default here: beta = 0).
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import Advantages, Algorithm, Mechanism, PolicyBatch, Reduction, RolloutBatch
from .ops import group_mean, group_std, ratio


@dataclass(frozen=True)
class GRPO(Algorithm):
    clip: float = 0.2        # epsilon
    std_floor: float = 1e-6  # added to the group's standard deviation

    reduction = Reduction.SEQ_MEAN_TOKEN_MEAN
    mechanisms = (Mechanism("group-std", "normalization"), Mechanism("symmetric-clip", "clipping"))
    zero_advantage_zero_loss = True

    def advantages(self, rollouts: RolloutBatch, state: dict[str, Any]) -> Advantages:
        # A_i = (R_i - mean R) / (std R + floor), over the group of i
        R, g = rollouts.reward, rollouts.group
        return Advantages((R - group_mean(R, g)) / (group_std(R, g) + self.std_floor))

    def token_loss(self, batch: PolicyBatch, state: dict[str, Any]) -> Tensor:
        # l = -min(w A, clip(w, 1 - eps, 1 + eps) A),   w = pi_theta / pi_old
        w, A = ratio(batch), batch.advantage
        return -torch.minimum(w * A, w.clamp(1 - self.clip, 1 + self.clip) * A)


ALGORITHM = GRPO()
