"""MaxRL: divides by the group's mean reward, so that the first successes on a hard prompt weigh most.

Maximum Likelihood RL, 2026, arXiv:2602.02710: with K of G right, the average score of the right completions estimates a
truncated maximum-likelihood objective; with a baseline it is A = (R - mean R) / mean R, 0 where nothing is right.

Deviations: the paper's reward is 0/1, whose smallest non-zero mean is 1/G; we never divide by less, so that composite
rewards stay bounded. The loss around it is GRPO's clip, which the paper leaves to the recipe.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise_hpc.algorithms.base import Advantages, Algorithm, Mechanism, PolicyBatch, Reduction, RolloutBatch
from poise_hpc.algorithms.ops import clipped, group_mean, group_size, group_std, ratio


@dataclass(frozen=True)
class MaxRL(Algorithm):
    clip: float = 0.2             # epsilon
    divide_by_mean: bool = True   # False: GRPO's division by the std
    std_floor: float = 1e-6       # added to the group's std, where it is divided by

    reduction = Reduction.SEQ_MEAN_TOKEN_MEAN
    mechanisms = (Mechanism("maxrl", "normalization", off={"divide_by_mean": False}),)
    zero_advantage_zero_loss = True

    def advantages(self, rollouts: RolloutBatch, state: dict[str, Any]) -> Advantages:
        # A_i = (R_i - mean R) / max(mean R, 1/G), over the group of i
        R, g = rollouts.reward, rollouts.group
        mean = group_mean(R, g)
        scale = torch.maximum(mean, 1 / group_size(g)) if self.divide_by_mean else group_std(R, g) + self.std_floor
        return Advantages((R - mean) / scale)

    def token_loss(self, batch: PolicyBatch, state: dict[str, Any]) -> Tensor:
        return clipped(ratio(batch), batch.advantage, self.clip, self.clip)


ALGORITHM = MaxRL()
