"""Correctness-first efficiency shaping: brevity counts only among right completions of a group that already passes.

Design principle of POISE, Xia et al. 2026, arXiv:2603.23951 (DACE-GRPO: 29 % shorter at Overall +3.9; unconditional compression,
DCBE-GRPO, collapsed). The paper gates the length term on the group's pass rate; the formula could not be found. Our choices:
- the term is added to GRPO's advantage, not to the reward: in an all-right group the division by the std would blow
  differences in length up to full scale;
- only right completions get it, relative to the mean length of the group's right ones, so that it cannot reward a short
  wrong one nor push a group as a whole;
- it is bounded by `length_weight`, below the difference that correctness makes.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from poise_hpc.algorithms.base import Advantages, Algorithm, Mechanism, PolicyBatch, Reduction, RolloutBatch
from poise_hpc.algorithms.ops import clipped, group_mean, group_std, pass_rate, ratio


@dataclass(frozen=True)
class LengthShaping(Algorithm):
    clip: float = 0.2             # epsilon
    std_floor: float = 1e-6       # added to the group's standard deviation
    length_weight: float = 0.2    # weight of the length term; 0: GRPO
    length_gate: float = 0.75     # pass rate from which length counts

    reduction = Reduction.SEQ_MEAN_TOKEN_MEAN
    mechanisms = (Mechanism("gated-length", "length", off={"length_weight": 0.0}),)
    zero_advantage_zero_loss = True

    def advantages(self, rollouts: RolloutBatch, state: dict[str, Any]) -> Advantages:
        # A_i = (R_i - mean R) / (std R + floor) + weight 1[p >= gate] 1[i right] clip((mean_r L - L_i) / mean_r L, -1, 1)
        # L = |y|,  mean_r over the right completions of the group of i
        R, g, correct = rollouts.reward, rollouts.group, rollouts.components["correct"] > 0
        A = (R - group_mean(R, g)) / (group_std(R, g) + self.std_floor)
        L = rollouts.length.to(R.dtype)
        mean = group_mean(L, g, correct)
        counts = correct & (pass_rate(correct.to(R.dtype), g) >= self.length_gate)
        return Advantages(A + self.length_weight * counts * ((mean - L) / mean.clamp(min=1)).clamp(-1, 1))

    def token_loss(self, batch: PolicyBatch, state: dict[str, Any]) -> Tensor:
        return clipped(ratio(batch), batch.advantage, self.clip, self.clip)


ALGORITHM = LengthShaping()
