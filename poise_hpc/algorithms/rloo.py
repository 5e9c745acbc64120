"""RLOO: REINFORCE with the mean of the group's other rewards as baseline.

Ahmadian et al. 2024, Back to Basics, arXiv:2402.14740, eq. 8: A_i = R_i - 1/(G-1) sum over j != i of R_j. The baseline
is independent of y_i, so the gradient is unbiased; the action is the whole completion, so tokens are summed.

Deviations: several updates a batch need a ratio, so the token loss is PPO's clip (equal to REINFORCE in the first update;
verl does the same). The paper's KL inside the reward, R - beta log(pi / pi_ref), is off by default.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from poise_hpc.algorithms.base import Advantages, Algorithm, Mechanism, PolicyBatch, Reduction, RolloutBatch
from poise_hpc.algorithms.ops import clipped, group_mean, group_size, group_std, masked_sum, ratio


@dataclass(frozen=True)
class RLOO(Algorithm):
    clip: float = 0.2            # epsilon
    kl_beta: float = 0.0         # beta, of the KL inside the reward
    leave_one_out: bool = True   # False: GRPO's (R - mean) / std
    std_floor: float = 1e-6      # added to the group's std, where it is divided by
    token_sum: bool = True       # False: GRPO's mean over the tokens of a completion

    mechanisms = (Mechanism("leave-one-out", "advantage", off={"leave_one_out": False}),
                  Mechanism("sequence-sum", "reduction", off={"token_sum": False}))
    zero_advantage_zero_loss = True

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"ref_logp"} if self.kl_beta else ())

    @property
    def reduction(self) -> Reduction:
        return Reduction.SEQ_MEAN_TOKEN_SUM if self.token_sum else Reduction.SEQ_MEAN_TOKEN_MEAN

    def advantages(self, rollouts: RolloutBatch, state: dict[str, Any]) -> Advantages:
        # A_i = R_i - mean of the others = G / (G - 1) (R_i - mean R)
        R, g = rollouts.reward, rollouts.group
        if self.kl_beta:
            R = R - self.kl_beta * masked_sum(rollouts.logp_old - rollouts.logp_ref, rollouts.mask).squeeze(-1)
        A, G = R - group_mean(R, g), group_size(g)
        return Advantages(A * G / (G - 1).clamp(min=1) if self.leave_one_out else A / (group_std(R, g) + self.std_floor))

    def token_loss(self, batch: PolicyBatch, state: dict[str, Any]) -> Tensor:
        return clipped(ratio(batch), batch.advantage, self.clip, self.clip)


ALGORITHM = RLOO()
