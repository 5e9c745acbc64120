"""Batches that a reader can compute by hand, and the scalar loss of an algorithm."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from poise_hpc.algorithms import ops
from poise_hpc.algorithms.base import Algorithm, PolicyBatch, RolloutBatch


def rolled(reward: list[list[float]], *, correct: list[list[float]] | None = None, valid: list[list[bool]] | None = None,
           length: list[int] | None = None, max_length: int = 10, **more: Any) -> RolloutBatch:
    """One row of `reward` a group. Correct where the reward is at least 1, valid everywhere, unless said otherwise."""
    R = torch.tensor(reward)
    N = R.numel()
    right = (R >= 1).float() if correct is None else torch.tensor(correct).float()
    ok = torch.ones(N, dtype=torch.bool) if valid is None else torch.tensor(valid).flatten()
    n = torch.full((N,), 2) if length is None else torch.tensor(length)
    T = int(n.max())
    zeros = torch.zeros(N, T)
    return RolloutBatch(**{
        "reward": R.flatten(), "components": {"correct": right.flatten(), "format": ok.float()}, "valid": ok,
        "truncated": torch.zeros(N, dtype=torch.bool), "group": torch.arange(len(reward)).repeat_interleave(R.shape[1]),
        "mask": torch.arange(T) < n.unsqueeze(-1), "length": n, "logp_old": zeros - 1, "logp_rollout": zeros - 1, "step": 0,
        "progress": 0.0, "max_length": max_length} | more)


def tokens(d: list[list[float]], A: list[float], *, length: list[int] | None = None, logp_old: float = -1.0, **more: Any) -> PolicyBatch:
    """Completions with log-ratios d and advantage A each; logp carries the gradient."""
    D = torch.tensor(d)
    B, T = D.shape
    n = torch.full((B,), T) if length is None else torch.tensor(length)
    old = torch.full((B, T), logp_old)
    return PolicyBatch(**{
        "logp": (old + D).requires_grad_(), "logp_old": old, "advantage": torch.tensor(A).unsqueeze(-1).expand(B, T),
        "mask": torch.arange(T) < n.unsqueeze(-1), "length": n, "reward": torch.zeros(B), "progress": 0.0, "max_length": 10} | more)


def loss_and_grad(algorithm: Algorithm, batch: PolicyBatch) -> tuple[Tensor, Tensor]:
    """J = sum(m l) / Z and dJ / dlogp."""
    m, z = ops.token_weights(algorithm.reduction, batch.mask, batch.length, None, batch.max_length)
    loss = (m * algorithm.token_loss(batch, algorithm.initial_state())).sum() / z
    return loss.detach(), torch.autograd.grad(loss, batch.logp)[0]


def gradient(algorithm: Algorithm, batch: PolicyBatch) -> Tensor:
    """d l_t / d logp_t summed over the batch, unreduced."""
    return torch.autograd.grad(algorithm.token_loss(batch, algorithm.initial_state()).sum(), batch.logp)[0]


def advantage(algorithm: Algorithm, batch: RolloutBatch) -> Tensor:
    return algorithm.advantages(batch, algorithm.initial_state()).value
