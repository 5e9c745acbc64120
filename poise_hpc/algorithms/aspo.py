"""ASPO: the importance ratio of successful tokens turned upside down.

Wang et al. 2025, arXiv:2510.06062. Where A > 0, PPO's ratio gives the largest weight to tokens that have already gained.
ASPO uses pi_old pi / sg(pi^2): the weight is 1/w, and lagging tokens gain most. Tokens with w > 1 + eps_high stay
without gradient, as in PPO; a weight above `inverse_max` is cut in value and keeps its gradient's direction. The rest
is DAPO's: clip-higher and the token mean.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise_hpc.algorithms.base import Advantages, Algorithm, Mechanism, PolicyBatch, Reduction, RolloutBatch
from poise_hpc.algorithms.ops import clipped, group_mean, group_std, log_ratio, sg


@dataclass(frozen=True)
class ASPO(Algorithm):
    clip_low: float = 0.2         # epsilon_low
    clip_high: float = 0.28       # epsilon_high
    inverse_max: float = 3.0      # largest inverted weight
    std_floor: float = 1e-6       # added to the group's standard deviation
    inverted_ratio: bool = True   # False: PPO's ratio for all tokens
    token_mean: bool = True       # False: GRPO's mean over sequences of token means

    mechanisms = (Mechanism("inverted-ratio", "ratio", off={"inverted_ratio": False}),
                  Mechanism("clip-higher", "clipping", off={"clip_high": 0.2}),
                  Mechanism("token-mean", "reduction", off={"token_mean": False}))
    zero_advantage_zero_loss = True

    @property
    def reduction(self) -> Reduction:
        return Reduction.TOKEN_MEAN if self.token_mean else Reduction.SEQ_MEAN_TOKEN_MEAN

    def advantages(self, rollouts: RolloutBatch, state: dict[str, Any]) -> Advantages:
        # A_i = (R_i - mean R) / (std R + floor), over the group of i
        R, g = rollouts.reward, rollouts.group
        return Advantages((R - group_mean(R, g)) / (group_std(R, g) + self.std_floor))

    def token_loss(self, batch: PolicyBatch, state: dict[str, Any]) -> Tensor:
        # A > 0: l = -A v,  v = sg(min(1/w, max)) pi / sg(pi), no gradient where w > 1 + eps_high.  Elsewhere PPO's clip.
        d, A = log_ratio(batch), batch.advantage
        loss = clipped(d.exp(), A, self.clip_low, self.clip_high)
        if not self.inverted_ratio:
            return loss
        weight = (-sg(d)).exp().clamp(max=self.inverse_max)
        v = torch.where(sg(d).exp() > 1 + self.clip_high, weight, weight * (d - sg(d)).exp())
        return torch.where(A > 0, -A * v, loss)


ALGORITHM = ASPO()
