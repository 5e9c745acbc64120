"""Dr.GRPO: GRPO without its two biases, the division by the group's std and by the completion's length.

Liu et al. 2025, Understanding R1-Zero-Like Training, arXiv:2503.20783, sec. 3. A = R - mean R; the token sum is divided
by a constant, the longest allowed completion, so that long wrong completions are not diluted.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from poise_hpc.algorithms.base import Advantages, Algorithm, Mechanism, PolicyBatch, Reduction, RolloutBatch
from poise_hpc.algorithms.ops import clipped, group_mean, group_std, ratio


@dataclass(frozen=True)
class DrGRPO(Algorithm):
    clip: float = 0.2             # epsilon
    divide_by_std: bool = False   # True: as GRPO
    std_floor: float = 1e-6       # added to the group's std, where it is divided by
    constant_norm: bool = True    # divide by the longest allowed length; False: by the completion's own

    mechanisms = (Mechanism("no-std", "normalization", off={"divide_by_std": True}),
                  Mechanism("sequence-sum-norm", "reduction", off={"constant_norm": False}))
    zero_advantage_zero_loss = True

    @property
    def reduction(self) -> Reduction:
        return Reduction.SEQ_MEAN_TOKEN_SUM_NORM if self.constant_norm else Reduction.SEQ_MEAN_TOKEN_MEAN

    def advantages(self, rollouts: RolloutBatch, state: dict[str, Any]) -> Advantages:
        # A_i = R_i - mean R, over the group of i
        R, g = rollouts.reward, rollouts.group
        A = R - group_mean(R, g)
        return Advantages(A / (group_std(R, g) + self.std_floor) if self.divide_by_std else A)

    def token_loss(self, batch: PolicyBatch, state: dict[str, Any]) -> Tensor:
        return clipped(ratio(batch), batch.advantage, self.clip, self.clip)


ALGORITHM = DrGRPO()
