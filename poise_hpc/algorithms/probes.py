"""Small batches that algorithms are examined with, and one examined update. Everything is a function of a seed.

Padded tokens hold finite garbage on purpose. Rewards are composite: correct + 0.1 format.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from . import ops
from .base import Advantages, Algorithm, PolicyBatch, RolloutBatch

DRIFTS = (0.0, 0.3, 20.0)  # |log-ratio| of a probe: on-policy, a few updates later, far away
STEPS = 100                # progress = step / STEPS


class Broken(Exception):
    """What an algorithm returned is not what it promised. The message says what came and what was wanted."""


@dataclass(frozen=True)
class Update:
    """One whole optimizer step of an algorithm on one batch."""

    advantage: Tensor   # (N, T)
    keep: Tensor        # (N,) bool
    loss: Tensor        # (N, T) unreduced, detached
    weight: Tensor      # (N, T) m
    z: Tensor           # ()
    grad: Tensor        # (N, T) d(sum m l) / d logp, not divided by Z

    @property
    def total(self) -> Tensor:
        return torch.where(self.weight > 0, self.weight * self.loss, 0.0).sum()


def rollouts(algorithm: Algorithm, correct: Tensor, *, tokens: int = 8, seed: int = 0, valid: Tensor | None = None,
             truncated: bool = False, step: int = 0) -> RolloutBatch:
    """A batch with `correct` (G, n) 0/1, one row a group; reward = correct + 0.1 valid; lengths 1 .. tokens."""
    random = torch.Generator().manual_seed(seed)
    G, n = correct.shape
    N = G * n
    ok = correct.flatten().bool() if valid is None else valid.flatten()
    length = torch.full((N,), tokens) if truncated else torch.randint(1, tokens + 1, (N,), generator=random)
    logp = -3 * torch.rand(N, tokens, generator=random) - 0.01
    optional = {"logp_ref": logp + 0.2 * torch.randn(N, tokens, generator=random)} if "ref_logp" in algorithm.needs else {}
    if "entropy" in algorithm.needs:
        optional["entropy"] = 2 * torch.rand(N, tokens, generator=random)
    parts = {"correct": correct.flatten().float(), "format": ok.float()}
    return RolloutBatch(
        reward=parts["correct"] + 0.1 * parts["format"], components=parts, valid=ok, truncated=torch.full((N,), truncated),
        group=torch.arange(G).repeat_interleave(n), mask=torch.arange(tokens) < length.unsqueeze(-1), length=length, logp_old=logp,
        logp_rollout=logp + 0.01 * torch.randn(N, tokens, generator=random), step=step, progress=step / STEPS, max_length=tokens, **optional)


def variety(algorithm: Algorithm, seed: int = 0) -> Iterator[tuple[str, RolloutBatch]]:
    """(what is special about it, batch): the ordinary one and the corners of a training run."""
    random = torch.Generator().manual_seed(seed)
    mixed = torch.rand(4, 6, generator=random) < torch.tensor([[0.2], [0.5], [0.8], [0.5]])
    some = torch.rand(4, 6, generator=random) < 0.7
    rare = torch.zeros(2, 8)
    rare[:, 0] = 1

    def make(correct: Tensor, **more: Any) -> RolloutBatch:
        return rollouts(algorithm, correct, seed=seed, **more)

    yield "mixed rewards", make(mixed, valid=mixed | some)
    yield "one success a group", make(rare, valid=torch.rand(2, 8, generator=random) < 0.6)
    yield "all wrong and invalid", make(torch.zeros(3, 4), valid=torch.zeros(3, 4, dtype=torch.bool))
    yield "all wrong, some valid", make(torch.zeros(4, 6), valid=some)
    yield "all right", make(torch.ones(3, 4))
    yield "one invalid among right ones", make(torch.tensor([[1, 1, 1, 0, 1, 1.0]]))
    yield "all truncated", make(mixed, valid=torch.zeros(4, 6, dtype=torch.bool), truncated=True, step=50)
    yield "completions of one token", make(mixed, tokens=1)
    yield "groups of two", make(torch.tensor([[1, 0], [0, 0.0]]))
    yield "a group of 64", make((torch.arange(64) < 3).float().unsqueeze(0), valid=torch.rand(1, 64, generator=random) < 0.5)
    signed = make(mixed, step=99)
    yield "rewards of -1 and 1", replace(signed, reward=2 * signed.components["correct"] - 1)


def shown(batch: RolloutBatch, algorithm: Algorithm) -> RolloutBatch:
    """The batch as the algorithm is shown it: without what it does not need."""
    return replace(batch, logp_ref=batch.logp_ref if "ref_logp" in algorithm.needs else None,
                   entropy=batch.entropy if "entropy" in algorithm.needs else None)


def fresh_state(algorithm: Algorithm) -> dict[str, Any]:
    return algorithm.initial_state()


def advantages(algorithm: Algorithm, batch: RolloutBatch, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A (N, T) and keep (N,); Broken unless well-formed."""
    N, T = batch.mask.shape
    out = algorithm.advantages(batch, state)
    if not isinstance(out, Advantages):
        raise Broken(f"advantages() returned {type(out).__name__}; `Advantages(value, keep)` is wanted")
    A, keep = out.value, out.keep
    if not isinstance(A, Tensor) or not A.is_floating_point() or A.shape not in {(N,), (N, T)}:
        raise Broken(f"advantages have {_what(A)}; float of shape (N,) = ({N},) or (N, T) = ({N}, {T}) is wanted")
    if keep is not None and (not isinstance(keep, Tensor) or keep.dtype != torch.bool or keep.shape != (N,)):
        raise Broken(f"keep has {_what(keep)}; bool of shape (N,) = ({N},) or None is wanted")
    if A.requires_grad:
        raise Broken("advantages carry a gradient; they are constants of the update")
    A = A.unsqueeze(-1).expand(N, T) if A.ndim == 1 else A
    if not A[batch.mask].isfinite().all():
        raise Broken(f"{int((~A[batch.mask].isfinite()).sum())} of {int(batch.mask.sum())} advantages are not finite")
    return torch.where(batch.mask, A, 0.0), torch.ones(N, dtype=torch.bool) if keep is None else keep


def policy_batch(batch: RolloutBatch, A: Tensor, drift: float, seed: int = 0) -> PolicyBatch:
    """What token_loss sees of a batch when the policy has moved by log-ratios of about +-drift."""
    random = torch.Generator().manual_seed(seed + 1)
    noise = torch.randn(batch.logp_old.shape, generator=random)
    logp = batch.logp_old + drift * (noise.sign() if drift > 1 else noise)
    return PolicyBatch(logp=logp.requires_grad_(), logp_old=batch.logp_old, advantage=A, mask=batch.mask, length=batch.length,
                       reward=batch.reward, progress=batch.progress, max_length=batch.max_length, logp_ref=batch.logp_ref,
                       entropy=None if batch.entropy is None else batch.entropy.clone().requires_grad_())


def token_loss(algorithm: Algorithm, batch: PolicyBatch, state: dict[str, Any]) -> Tensor:
    """l (B, T); Broken unless well-formed."""
    loss = algorithm.token_loss(batch, state)
    if not isinstance(loss, Tensor) or loss.shape != batch.mask.shape:
        raise Broken(f"token_loss has {_what(loss)}; the unreduced loss of shape (B, T) = {tuple(batch.mask.shape)} is wanted")
    if not loss.requires_grad:
        raise Broken("token_loss does not depend on batch.logp: it carries no gradient")
    if not loss.isfinite().all():
        where = "sampled" if not loss[batch.mask].isfinite().all() else "padded"
        raise Broken(f"token_loss is not finite at {where} tokens; mask the *input* of exp and log")
    return loss


def update(algorithm: Algorithm, batch: RolloutBatch, drift: float = 0.3, state: dict[str, Any] | None = None) -> Update:
    state = fresh_state(algorithm) if state is None else state
    A, keep = advantages(algorithm, batch, state)
    return update_policy(algorithm, policy_batch(batch, A, drift), keep, state)


def update_policy(algorithm: Algorithm, batch: PolicyBatch, keep: Tensor, state: dict[str, Any]) -> Update:
    loss = token_loss(algorithm, batch, state)
    m, z = ops.token_weights(algorithm.reduction, batch.mask, batch.length, keep, batch.max_length)
    inputs = [batch.logp] + ([batch.entropy] if batch.entropy is not None else [])
    grads = torch.autograd.grad(torch.where(m > 0, m * loss, 0.0).sum(), inputs, allow_unused=True)
    if any(g is not None and not g.isfinite().all() for g in grads):
        raise Broken("the gradient of the loss is not finite; mask the *input* of exp and log")
    grad = torch.zeros_like(batch.logp) if grads[0] is None else grads[0]
    return Update(batch.advantage, keep, loss.detach(), m, z, grad)


def rows(batch: Any, index: Tensor, width: int | None = None) -> Any:
    """Some completions of a RolloutBatch or PolicyBatch, in the order of `index`, cut to `width` tokens."""
    def take(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: take(v) for k, v in x.items()}
        if not isinstance(x, Tensor):
            return x
        y = x.detach()[index]
        y = y[:, :width] if y.ndim == 2 else y
        return y.clone().requires_grad_(x.requires_grad)

    return replace(batch, **{f.name: take(getattr(batch, f.name)) for f in fields(batch)})


def tensors(batch: Any) -> dict[str, Tensor]:
    """name -> tensor of a batch, the reward components included."""
    found = {f.name: getattr(batch, f.name) for f in fields(batch)}
    found |= {f"components.{k}": v for k, v in found.get("components", {}).items()}
    return {name: x for name, x in found.items() if isinstance(x, Tensor)}


def _what(x: Any) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"type {type(x).__name__}"
