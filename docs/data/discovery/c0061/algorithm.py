"""SMOOTH-TOPR-OPMASK-KLOLD-GRPO: GRPO with smoothed-std, tapered, off-policy-mask, kl-old.

Written by the offline proposer, which recombines published mechanisms.

smoothed-std: A <- A / (std R + c) (between GRPO, arXiv:2402.03300, and Dr.GRPO, arXiv:2503.20783)
tapered: l = -u A log pi, u = 1 where A >= 0, clip(pi / pi_old of the completion, 0, 1) elsewhere, no gradient
    through u (TOPR, Le Roux et al. 2025, arXiv:2503.14286)
off-policy-mask: l = 0 for completions with A < 0 and mean_t(log pi_old - log pi) > delta (DeepSeek-V3.2, 2025,
    arXiv:2512.02556)
kl-old: l <- l + beta (exp(d) - 1 - d), an estimate of KL(pi_old, pi) (PPO, Schulman et al. 2017, arXiv:1707.06347,
    eq. 8 with a fixed beta)
the rest: GRPO (Shao et al. 2024, arXiv:2402.03300)
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise_hpc.algorithms.base import Advantages, Algorithm, Mechanism, PolicyBatch, Reduction, RolloutBatch
from poise_hpc.algorithms.ops import clipped, group_mean, group_std, log_ratio, masked_mean, sequence_log_ratio


@dataclass(frozen=True)
class SmoothToprOpmaskKloldGrpo(Algorithm):
    smoothed_std: bool = True   # smoothed-std; False: group-std
    tapered: bool = True        # tapered; False: symmetric-clip
    std_smoothing: float = 0.1  # c, in units of reward
    drift_limit: float = 0.1    # delta, nats per token
    kl_old_beta: float = 0.1    # beta
    std_floor: float = 1e-6     # added to the standard deviation; idle here
    clip: float = 0.2           # epsilon; idle here

    mechanisms = (
        Mechanism("smoothed-std", "normalization", {"smoothed_std": False}),
        Mechanism("tapered", "clipping", {"tapered": False}),
        Mechanism("off-policy-mask", "masking", {"drift_limit": 1000000000.0}),
        Mechanism("kl-old", "kl", {"kl_old_beta": 0.0}),
    )
    zero_advantage_zero_loss = False

    def advantages(self, rollouts: RolloutBatch, state: dict[str, Any]) -> Advantages:
        R, g = rollouts.reward, rollouts.group
        # group-mean: A = R - mean R
        A = R - group_mean(R, g)
        # smoothed-std: A <- A / (std R + c)
        if self.smoothed_std:
            A = A / (group_std(R, g) + self.std_smoothing)
        else:
            A = A / (group_std(R, g) + self.std_floor)
        return Advantages(A)

    def token_loss(self, batch: PolicyBatch, state: dict[str, Any]) -> Tensor:
        A = batch.advantage
        d = log_ratio(batch)  # log pi_theta - log pi_old
        # token-ratio: w_t = pi / pi_old of the token
        w = d.exp()
        # tapered: l = -u A log pi, u = 1 where A >= 0, clip(pi / pi_old of the completion, 0, 1) elsewhere, no
        #     gradient through u
        if self.tapered:
            u = torch.where(A >= 0, 1.0, sequence_log_ratio(batch).detach().clamp(max=0).exp())
            loss = -u * A * batch.logp
        else:
            loss = clipped(w, A, self.clip, self.clip)
        # off-policy-mask: l = 0 for completions with A < 0 and mean_t(log pi_old - log pi) > delta
        drift = -masked_mean(d.detach(), batch.mask)
        loss = torch.where((A < 0) & (drift > self.drift_limit), 0.0, loss)
        # kl-old: l <- l + beta (exp(d) - 1 - d), an estimate of KL(pi_old, pi)
        loss = loss + self.kl_old_beta * (d.exp() - 1 - d)
        return loss


ALGORITHM = SmoothToprOpmaskKloldGrpo()
