"""GPG: the plain policy gradient, neither ratio nor clip, with groups that teach nothing made up for.

Chu et al. 2025, Group Policy Gradient, arXiv:2504.02546, eq. 5 to 7: l = -alpha A log pi, A = R - mean R, alpha = number of
groups / number of groups whose rewards differ, so that the step does not shrink when most groups are all right or all
wrong. (verl's alpha counts completions with a non-zero reward instead.)
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from poise_hpc.algorithms.base import Advantages, Algorithm, Mechanism, PolicyBatch, Reduction, RolloutBatch
from poise_hpc.algorithms.ops import clipped, group_mean, group_std, ratio


@dataclass(frozen=True)
class GPG(Algorithm):
    clip: float = 0.2             # epsilon of GRPO's clip, without "no-ratio"
    divide_by_std: bool = False   # True: GRPO's advantage
    std_floor: float = 1e-6       # added to the group's std, where it is divided by
    rescale: bool = True          # alpha; False: 1
    no_ratio: bool = True         # False: GRPO's clipped ratio
    token_mean: bool = True       # False: GRPO's mean over sequences of token means

    mechanisms = (Mechanism("no-ratio", "clipping", off={"no_ratio": False}),
                  Mechanism("no-std", "normalization", off={"divide_by_std": True}),
                  Mechanism("degenerate-rescale", "normalization", off={"rescale": False}),
                  Mechanism("token-mean", "reduction", off={"token_mean": False}))
    zero_advantage_zero_loss = True

    @property
    def reduction(self) -> Reduction:
        return Reduction.TOKEN_MEAN if self.token_mean else Reduction.SEQ_MEAN_TOKEN_MEAN

    def advantages(self, rollouts: RolloutBatch, state: dict[str, Any]) -> Advantages:
        # A_i = alpha (R_i - mean R),   alpha = N / completions in groups whose rewards differ
        R, g = rollouts.reward, rollouts.group
        A, std = R - group_mean(R, g), group_std(R, g)
        if self.divide_by_std:
            A = A / (std + self.std_floor)
        alpha = R.numel() / (std > 0).sum().clamp(min=1) if self.rescale else 1.0
        return Advantages(alpha * A)

    def token_loss(self, batch: PolicyBatch, state: dict[str, Any]) -> Tensor:
        # l = -A log pi
        if not self.no_ratio:
            return clipped(ratio(batch), batch.advantage, self.clip, self.clip)
        return -batch.advantage * batch.logp


ALGORITHM = GPG()
