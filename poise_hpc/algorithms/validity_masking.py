"""VM-GRPO: group statistics over completions whose answer could be parsed.

Mechanism of POISE, Xia et al. 2026, arXiv:2603.23951 (in VM-AV-GRPO, Overall +4.6 over GRPO). The paper says that statistics run
over format-valid samples only; what an invalid completion gets instead could not be found. Our choices:
- valid completions: (R - mean) / std over the group's valid ones, so that broken formats move neither baseline nor scale;
- invalid ones stay in the loss, compared with the valid ones' mean, in units of the *whole* group's std: with the std of
  the valid ones, 0 when they are all right, they would get an advantage of -10^6;
- a group without a valid completion falls back to plain statistics.
Where every completion is valid it is GRPO.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise_hpc.algorithms.base import Advantages, Algorithm, Mechanism, PolicyBatch, Reduction, RolloutBatch
from poise_hpc.algorithms.ops import clipped, group_mean, group_std, ratio


@dataclass(frozen=True)
class ValidityMasking(Algorithm):
    clip: float = 0.2               # epsilon
    std_floor: float = 1e-6         # added to standard deviations
    validity_masking: bool = True   # False: GRPO

    reduction = Reduction.SEQ_MEAN_TOKEN_MEAN
    mechanisms = (Mechanism("validity-masking", "masking", off={"validity_masking": False}),)
    zero_advantage_zero_loss = True

    def advantages(self, rollouts: RolloutBatch, state: dict[str, Any]) -> Advantages:
        # A_i = (R_i - mean_v R) / (s_i + floor),   s_i = std_v R if i is valid else std R;   _v: over valid completions
        R, g = rollouts.reward, rollouts.group
        live = rollouts.valid if self.validity_masking else torch.ones_like(rollouts.valid)
        std = torch.where(live, group_std(R, g, live), group_std(R, g))
        return Advantages((R - group_mean(R, g, live)) / (std + self.std_floor))

    def token_loss(self, batch: PolicyBatch, state: dict[str, Any]) -> Tensor:
        return clipped(ratio(batch), batch.advantage, self.clip, self.clip)


ALGORITHM = ValidityMasking()
