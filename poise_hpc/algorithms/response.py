"""Mechanical evidence: which inputs an algorithm's advantages and loss respond to, found by changing one at a time."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from . import probes
from .base import Algorithm, RolloutBatch

INPUTS = ("reward", "components", "valid", "truncated", "group", "length", "logp_old", "logp_rollout", "logp_ref", "entropy",
          "progress", "step")


def response_report(algorithm: Algorithm, seed: int = 0) -> dict[str, float]:
    """Input -> largest relative change of advantages or token loss when that field alone is changed; 0.0: no response.

    A field is changed as it stands in the batch: a `length` that only enters through the mask does not count. What
    is gated (a pass rate, a limit) responds on batches that open the gate; several are tried.
    """
    report = dict.fromkeys(INPUTS, 0.0)
    for _, batch in probes.variety(algorithm, seed):
        before = _values(algorithm, batch, batch)
        for name, changed in _changes(batch, seed):
            try:
                after = _values(algorithm, batch, changed)
            except Exception:  # candidate code, on a batch that no training makes: to refuse it is a response, and no fault
                report[name] = 1.0
                continue
            report[name] = max(report[name], *(_change(a, b) for a, b in zip(before, after, strict=True)))
    return {name: round(value, 6) for name, value in report.items()}


def _values(algorithm: Algorithm, batch: RolloutBatch, changed: RolloutBatch) -> tuple[Tensor, ...]:
    """Advantages, what is kept and selected, and the loss at the policy of the unchanged batch, at sampled tokens."""
    state = probes.fresh_state(algorithm)
    chosen = algorithm.select(changed, state)
    A, keep = probes.advantages(algorithm, changed, state)
    policy = probes.policy_batch(changed, A, 0.3)
    policy = replace(policy, logp=probes.policy_batch(batch, A, 0.3).logp)
    loss = probes.token_loss(algorithm, policy, state).detach()
    kept = keep.float() if chosen is None else keep * chosen[changed.group].float()
    return A[batch.mask], kept, loss[batch.mask]


def _change(before: Tensor, after: Tensor) -> float:
    scale = max(float(before.abs().max()), float(after.abs().max()), 1e-12)
    change = float((before - after).abs().max())
    return change / scale if change > 1e-6 else 0.0


def _changes(batch: RolloutBatch, seed: int) -> Iterator[tuple[str, RolloutBatch]]:
    random = torch.Generator().manual_seed(seed + 2)
    N, n = len(batch.reward), int((batch.group == 0).sum())
    some = torch.arange(N) % 3 == 0
    noise = torch.randn(batch.logp_old.shape, generator=random)
    yield "reward", replace(batch, reward=batch.reward + 0.3 * torch.randn(N, generator=random))
    yield "components", replace(batch, components={k: torch.where(some, 1 - x, x) for k, x in batch.components.items()})
    yield "valid", replace(batch, valid=batch.valid ^ some)
    yield "truncated", replace(batch, truncated=batch.truncated ^ some)
    yield "group", replace(batch, group=(torch.arange(N) + n // 2) % N // n)  # groups of the same size, other members
    yield "length", replace(batch, length=torch.where(some, batch.max_length, (batch.length // 2).clamp(min=1)))
    yield "logp_old", replace(batch, logp_old=batch.logp_old + 0.2 * noise)
    yield "logp_rollout", replace(batch, logp_rollout=batch.logp_rollout + 0.2 * noise)
    if batch.logp_ref is not None:
        yield "logp_ref", replace(batch, logp_ref=batch.logp_ref + 0.2 * noise)
    if batch.entropy is not None:
        yield "entropy", replace(batch, entropy=batch.entropy + 0.2 * noise.abs())
    yield "progress", replace(batch, progress=(batch.progress + 0.37) % 1)
    yield "step", replace(batch, step=batch.step + 37)
