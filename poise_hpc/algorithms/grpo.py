"""GRPO: group-relative advantages, clipped ratio, mean over sequences of token means.

Shao et al. 2024, DeepSeekMath, arXiv:2402.03300, eq. 3 and 4. Deviation: beta = 0 by default (the paper's is 0.04),
as in nearly all later work on verifiable rewards; no reference model is loaded then.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from poise_hpc.algorithms.base import Advantages, Algorithm, Mechanism, PolicyBatch, Reduction, RolloutBatch
from poise_hpc.algorithms.ops import clipped, group_mean, group_std, k3, ratio


@dataclass(frozen=True)
class GRPO(Algorithm):
    clip: float = 0.2           # epsilon
    std_floor: float = 1e-6     # added to the group's standard deviation
    divide_by_std: bool = True
    kl_beta: float = 0.0        # beta, weight of KL(pi_theta || pi_ref)

    reduction = Reduction.SEQ_MEAN_TOKEN_MEAN
    mechanisms = (Mechanism("group-std", "normalization", off={"divide_by_std": False}),
                  Mechanism("symmetric-clip", "clipping", off={"clip": 1e9}))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"ref_logp"} if self.kl_beta else ())

    @property
    def zero_advantage_zero_loss(self) -> bool:
        return self.kl_beta == 0

    def advantages(self, rollouts: RolloutBatch, state: dict[str, Any]) -> Advantages:
        # A_i = (R_i - mean R) / (std R + floor), over the group of i
        R, g = rollouts.reward, rollouts.group
        A = R - group_mean(R, g)
        return Advantages(A / (group_std(R, g) + self.std_floor) if self.divide_by_std else A)

    def token_loss(self, batch: PolicyBatch, state: dict[str, Any]) -> Tensor:
        # l = -min(w A, clip(w, 1 - eps, 1 + eps) A) + beta k3,   w = pi_theta / pi_old
        loss = clipped(ratio(batch), batch.advantage, self.clip, self.clip)
        return loss + self.kl_beta * k3(batch) if self.kl_beta else loss


ALGORITHM = GRPO()
