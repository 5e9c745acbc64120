"""CN-GRPO: all-wrong, mixed and all-right groups normalized apart.

Mechanism of POISE, Xia et al. 2026, arXiv:2603.23951, one of its three design principles. The paper says that the three kinds of
group are treated apart; how could not be found. Our choices:
- mixed (some right, some wrong): GRPO, (R - mean) / std;
- all wrong, all right: no division by the std, which there measures only format or shaping, and would blow a difference
  of 0.1 up to the size of a success; the plain difference times a scale of its own. All wrong: 1, format is all there
  is to learn. All right: 0, a solved prompt is left alone.
With a plain 0/1 reward it is GRPO: such groups have advantage 0 anyway.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise_hpc.algorithms.base import Advantages, Algorithm, Mechanism, PolicyBatch, Reduction, RolloutBatch
from poise_hpc.algorithms.ops import clipped, group_mean, group_std, pass_rate, ratio


@dataclass(frozen=True)
class ConditionalNormalization(Algorithm):
    clip: float = 0.2                        # epsilon
    std_floor: float = 1e-6                  # added to the group's standard deviation
    wrong_scale: float = 1.0                 # of R - mean R where all are wrong
    right_scale: float = 0.0                 # of R - mean R where all are right
    conditional_normalization: bool = True   # False: GRPO

    reduction = Reduction.SEQ_MEAN_TOKEN_MEAN
    mechanisms = (Mechanism("conditional-normalization", "normalization", off={"conditional_normalization": False}),)
    zero_advantage_zero_loss = True

    def advantages(self, rollouts: RolloutBatch, state: dict[str, Any]) -> Advantages:
        # A_i = (R_i - mean R) / (std R + floor) if 0 < p < 1,   scale_0 (R_i - mean R) if p = 0,   scale_1 (...) if p = 1
        R, g = rollouts.reward, rollouts.group
        C, p = R - group_mean(R, g), pass_rate(rollouts.components["correct"], g)
        A = C / (group_std(R, g) + self.std_floor)
        if self.conditional_normalization:
            A = torch.where(p == 0, self.wrong_scale * C, torch.where(p == 1, self.right_scale * C, A))
        return Advantages(A)

    def token_loss(self, batch: PolicyBatch, state: dict[str, Any]) -> Tensor:
        return clipped(ratio(batch), batch.advantage, self.clip, self.clip)


ALGORITHM = ConditionalNormalization()
