"""DAPO: clip-higher, dynamic sampling, token-level loss, soft overlong punishment.

Yu et al. 2025, arXiv:2503.14476, eq. 8 to 13. Groups that are all right or all wrong are dropped and sampled again, up to
the recipe's number of rounds (the paper has no cap).

Deviations: the punishment grows over the last tenth of the limit instead of the paper's fifth (4,096 of 20,480 tokens),
because tight limits would punish right answers; its weight is 0.5, half the range of a 0/1 reward, as the paper's 1 is
of its -1/1 reward.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise_hpc.algorithms.base import Advantages, Algorithm, Mechanism, PolicyBatch, Reduction, RolloutBatch
from poise_hpc.algorithms.ops import clipped, group_mean, group_std, pass_rate, ratio


@dataclass(frozen=True)
class DAPO(Algorithm):
    clip_low: float = 0.2          # epsilon_low
    clip_high: float = 0.28        # epsilon_high
    std_floor: float = 1e-6        # added to the group's standard deviation
    dynamic_sampling: bool = True
    token_mean: bool = True        # False: GRPO's mean over sequences of token means
    overlong_weight: float = 0.5   # penalty at the limit, in reward
    overlong_buffer: float = 0.1   # share of the limit over which it grows

    mechanisms = (Mechanism("clip-higher", "clipping", off={"clip_high": 0.2}),
                  Mechanism("dynamic-sampling", "selection", off={"dynamic_sampling": False}),
                  Mechanism("token-mean", "reduction", off={"token_mean": False}),
                  Mechanism("overlong-penalty", "length", off={"overlong_weight": 0.0}))
    zero_advantage_zero_loss = True

    @property
    def reduction(self) -> Reduction:
        return Reduction.TOKEN_MEAN if self.token_mean else Reduction.SEQ_MEAN_TOKEN_MEAN

    def select(self, rollouts: RolloutBatch, state: dict[str, Any]) -> Tensor | None:
        # 0 < number of right completions < G
        if not self.dynamic_sampling:
            return None
        g, p = rollouts.group, pass_rate(rollouts.components["correct"], rollouts.group)
        mixed = torch.zeros(rollouts.groups, dtype=torch.bool, device=g.device)
        mixed[g] = (p > 0) & (p < 1)
        return mixed

    def advantages(self, rollouts: RolloutBatch, state: dict[str, Any]) -> Advantages:
        # R <- R - weight * clip((|y| - (L - buffer)) / buffer, 0, 1);  A_i = (R_i - mean R) / (std R + floor)
        L, buffer = rollouts.max_length, self.overlong_buffer * rollouts.max_length
        R, g = rollouts.reward - self.overlong_weight * ((rollouts.length - (L - buffer)) / buffer).clamp(0, 1), rollouts.group
        return Advantages((R - group_mean(R, g)) / (group_std(R, g) + self.std_floor))

    def token_loss(self, batch: PolicyBatch, state: dict[str, Any]) -> Tensor:
        # l = -min(w A, clip(w, 1 - eps_low, 1 + eps_high) A)
        return clipped(ratio(batch), batch.advantage, self.clip_low, self.clip_high)


ALGORITHM = DAPO()
