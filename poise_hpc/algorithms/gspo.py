"""GSPO: one importance ratio per completion, the geometric mean of its tokens' ratios.

Zheng et al. 2025, arXiv:2507.18071, eq. 5 to 7, in the token form of eq. 14: s_t = sg(s) pi_t / sg(pi_t) has the value s at
every token and the gradient of its own token. The unit of clipping is the unit of the reward.

Deviation: epsilon. The paper's 3e-4 / 4e-4 belong to thousands of tokens, over which log s averages; for completions of
tens of tokens we clip at 0.03 / 0.04. A long-completion recipe should set the paper's.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from poise_hpc.algorithms.base import Advantages, Algorithm, Mechanism, PolicyBatch, Reduction, RolloutBatch
from poise_hpc.algorithms.ops import clipped, group_mean, group_std, log_ratio, mean_log_ratio, sg


@dataclass(frozen=True)
class GSPO(Algorithm):
    clip_low: float = 0.03        # epsilon_low
    clip_high: float = 0.04       # epsilon_high
    std_floor: float = 1e-6       # added to the group's standard deviation
    sequence_ratio: bool = True   # False: GRPO's token ratio (which wants a clip of 0.2)

    reduction = Reduction.SEQ_MEAN_TOKEN_MEAN
    mechanisms = (Mechanism("sequence-ratio", "ratio", off={"sequence_ratio": False, "clip_low": 0.2, "clip_high": 0.2}),)
    zero_advantage_zero_loss = True

    def advantages(self, rollouts: RolloutBatch, state: dict[str, Any]) -> Advantages:
        # A_i = (R_i - mean R) / (std R + floor), over the group of i
        R, g = rollouts.reward, rollouts.group
        return Advantages((R - group_mean(R, g)) / (group_std(R, g) + self.std_floor))

    def token_loss(self, batch: PolicyBatch, state: dict[str, Any]) -> Tensor:
        # log s_t = l_t - sg(l_t) + sg(mean_t log-ratio),   l_t = log pi_theta(y_t)
        d = log_ratio(batch)
        log_s = d - sg(d) + sg(mean_log_ratio(batch)) if self.sequence_ratio else d
        return clipped(log_s.exp(), batch.advantage, self.clip_low, self.clip_high)


ALGORITHM = GSPO()
