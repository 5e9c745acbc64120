"""CISPO: the clip bounds the importance weight and stops no token's gradient.

MiniMax-M1, 2025, arXiv:2506.13585, eq. 4 and 5: REINFORCE with a detached, clipped weight. Rare tokens at which a completion
turns ("however", "wait") lose their gradient under PPO's clip after one update; here they keep it. No lower bound.

Deviation: the paper tunes epsilon_high and does not print it; weights up to 2 here. TRL's `epsilon_high` is the bound itself.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from poise_hpc.algorithms.base import Advantages, Algorithm, Mechanism, PolicyBatch, Reduction, RolloutBatch
from poise_hpc.algorithms.ops import clipped, group_mean, group_std, ratio, sg


@dataclass(frozen=True)
class CISPO(Algorithm):
    clip: float = 0.2              # epsilon of GRPO's clip, without the mechanism
    weight_high: float = 1.0       # epsilon_high: the weight is at most 1 + this
    std_floor: float = 1e-6        # added to the group's standard deviation
    detached_weight: bool = True   # False: GRPO's clip
    token_mean: bool = True        # False: GRPO's mean over sequences of token means

    mechanisms = (Mechanism("detached-weight", "clipping", off={"detached_weight": False}),
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
        # l = -sg(min(w, 1 + eps_high)) A log pi
        w, A = ratio(batch), batch.advantage
        if not self.detached_weight:
            return clipped(w, A, self.clip, self.clip)
        return -sg(w).clamp(max=1 + self.weight_high) * A * batch.logp


ALGORITHM = CISPO()
