"""AV-GRPO: scales by the analytic variance of correctness, not by the empirical std of the whole reward.

Mechanism of POISE, Xia et al. 2026, arXiv:2603.23951 (AV-GRPO, Overall +3.1 over GRPO). The paper names it and says what it
is for, a stronger gradient from sparse successes; the formula could not be found. Our choices:
- correctness is Bernoulli(p), so its variance is p (1 - p), known from p alone; p is the component "correct" of the group;
- p is smoothed, (K + prior) / (G + 2 prior): the variance of an all-wrong group is small but not 0, so that differences in
  format there are not blown up to full scale;
- the exponent is 1/2 (a std). 1 divides by the variance itself and enlarges sparse successes further.
It matters where the reward is composite: GRPO's std grows with the spread of the format reward, and a success shrinks.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from poise_hpc.algorithms.base import Advantages, Algorithm, Mechanism, PolicyBatch, Reduction, RolloutBatch
from poise_hpc.algorithms.ops import clipped, group_mean, group_size, group_std, pass_rate, ratio


@dataclass(frozen=True)
class AnalyticVariance(Algorithm):
    clip: float = 0.2                # epsilon
    prior: float = 1.0               # pseudo-counts of a right and of a wrong completion
    exponent: float = 0.5            # of the variance
    analytic_variance: bool = True   # False: GRPO's std
    std_floor: float = 1e-6          # added to the group's std, where it is divided by

    reduction = Reduction.SEQ_MEAN_TOKEN_MEAN
    mechanisms = (Mechanism("analytic-variance", "normalization", off={"analytic_variance": False}),)
    zero_advantage_zero_loss = True

    def advantages(self, rollouts: RolloutBatch, state: dict[str, Any]) -> Advantages:
        # A_i = (R_i - mean R) / (p (1 - p))^exponent,   p = (K + prior) / (G + 2 prior), K right of G in the group of i
        R, g = rollouts.reward, rollouts.group
        A = R - group_mean(R, g)
        if not self.analytic_variance:
            return Advantages(A / (group_std(R, g) + self.std_floor))
        G = group_size(g)
        p = (pass_rate(rollouts.components["correct"], g) * G + self.prior) / (G + 2 * self.prior)
        return Advantages(A / (p * (1 - p)) ** self.exponent)

    def token_loss(self, batch: PolicyBatch, state: dict[str, Any]) -> Tensor:
        return clipped(ratio(batch), batch.advantage, self.clip, self.clip)


ALGORITHM = AnalyticVariance()
