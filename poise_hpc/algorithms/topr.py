"""TOPR: tapered off-policy REINFORCE. Successes at full weight, failures fading as they become unlikely.

Le Roux et al. 2025, arXiv:2503.14286, eq. 9: l = -u A log pi(y), u = 1 where A >= 0, else sg(clip(pi(y) / mu(y), 0, 1)) of
the whole completion. Without a ratio on successes the update never vanishes; with it on failures it never runs away.

Deviation: the paper has rewards -1 / 1 and a baseline that is tuned; here A = R - mean R of the group.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise_hpc.algorithms.base import Advantages, Algorithm, Mechanism, PolicyBatch, Reduction, RolloutBatch
from poise_hpc.algorithms.ops import clipped, group_mean, group_std, ratio, sequence_log_ratio, sg


@dataclass(frozen=True)
class TOPR(Algorithm):
    clip: float = 0.2             # epsilon of GRPO's clip, without the mechanism
    divide_by_std: bool = False   # True: GRPO's advantage
    std_floor: float = 1e-6       # added to the group's std, where it is divided by
    tapered: bool = True          # False: GRPO's clip
    token_sum: bool = True        # log pi(y); False: GRPO's mean over the tokens of a completion

    mechanisms = (Mechanism("tapered", "clipping", off={"tapered": False}),
                  Mechanism("no-std", "normalization", off={"divide_by_std": True}),
                  Mechanism("sequence-sum", "reduction", off={"token_sum": False}))
    zero_advantage_zero_loss = True

    @property
    def reduction(self) -> Reduction:
        return Reduction.SEQ_MEAN_TOKEN_SUM if self.token_sum else Reduction.SEQ_MEAN_TOKEN_MEAN

    def advantages(self, rollouts: RolloutBatch, state: dict[str, Any]) -> Advantages:
        # A_i = R_i - mean R, over the group of i
        R, g = rollouts.reward, rollouts.group
        A = R - group_mean(R, g)
        return Advantages(A / (group_std(R, g) + self.std_floor) if self.divide_by_std else A)

    def token_loss(self, batch: PolicyBatch, state: dict[str, Any]) -> Tensor:
        # l = -u A log pi,   u = 1 if A >= 0 else sg(min(pi(y) / pi_old(y), 1))
        A = batch.advantage
        if not self.tapered:
            return clipped(ratio(batch), A, self.clip, self.clip)
        u = torch.where(A >= 0, 1.0, sg(sequence_log_ratio(batch)).clamp(max=0).exp())
        return -u * A * batch.logp


ALGORITHM = TOPR()
