"""REINFORCE++: advantages whitened over the whole batch instead of within each group.

Hu et al. 2025, arXiv:2501.03262. The default is the paper's "REINFORCE++-baseline": the group's mean is taken off, then
mean and std of all *tokens* of the batch normalize (a completion counts by its length). `group_baseline=False` is plain
REINFORCE++, which needs no groups. The batch's scale is one number, so easy and hard prompts keep their difference.

Deviations: beta = 0 by default; where set, the KL term is the paper's k2. Whitening moves the mean, so completions of a
group of equal rewards can get a small advantage, as in verl.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise_hpc.algorithms.base import Advantages, Algorithm, Mechanism, PolicyBatch, Reduction, RolloutBatch
from poise_hpc.algorithms.ops import clipped, group_mean, group_std, k2, ratio


@dataclass(frozen=True)
class ReinforcePP(Algorithm):
    clip: float = 0.2              # epsilon
    group_baseline: bool = True    # take off the group's mean first
    batch_whitening: bool = True   # False: GRPO's division by the group's std
    variance_floor: float = 1e-8   # added to the batch's variance
    std_floor: float = 1e-6        # added to the group's std, where it is divided by
    token_mean: bool = True        # False: GRPO's mean over sequences of token means
    kl_beta: float = 0.0           # beta

    mechanisms = (Mechanism("batch-std", "normalization", off={"batch_whitening": False, "group_baseline": True}),
                  Mechanism("token-mean", "reduction", off={"token_mean": False}))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"ref_logp"} if self.kl_beta else ())

    @property
    def reduction(self) -> Reduction:
        return Reduction.TOKEN_MEAN if self.token_mean else Reduction.SEQ_MEAN_TOKEN_MEAN

    @property
    def zero_advantage_zero_loss(self) -> bool:
        return self.kl_beta == 0

    def advantages(self, rollouts: RolloutBatch, state: dict[str, Any]) -> Advantages:
        # C_i = R_i - mean R;  A_i = (C_i - mean C) / sqrt(var C + floor), mean and var over all tokens of the batch
        R, g = rollouts.reward, rollouts.group
        C = R - group_mean(R, g if self.group_baseline else torch.zeros_like(g))
        if not self.batch_whitening:
            return Advantages(C / (group_std(R, g) + self.std_floor))
        n = rollouts.length.to(R.dtype)
        C = C - (n * C).sum() / n.sum()
        variance = (n * C.square()).sum() / (n.sum() - 1).clamp(min=1)
        return Advantages(C * (variance + self.variance_floor).rsqrt())

    def token_loss(self, batch: PolicyBatch, state: dict[str, Any]) -> Tensor:
        # l = -min(w A, clip(w, 1 - eps, 1 + eps) A) + beta k2
        loss = clipped(ratio(batch), batch.advantage, self.clip, self.clip)
        return loss + self.kl_beta * k2(batch) if self.kl_beta else loss


ALGORITHM = ReinforcePP()
