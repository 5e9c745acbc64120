"""Batches that the contract checks try an algorithm on: small, random, and of the kinds that break formulas.

Finite everywhere, padding included, as in training. Everything is a function of the seed.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .base import Algorithm, PolicyBatch, RolloutBatch

Batch = TypeVar("Batch", RolloutBatch, PolicyBatch)

MAX_LENGTH = 12      # tokens
PADDED = 2           # columns that no completion reaches
FORMAT_REWARD = 0.1  # of a valid completion; 1 more for a right one
KINDS = ("mixed", "continuous", "equal", "all-wrong", "all-right", "all-invalid", "all-truncated", "one-token", "group-of-one", "large-group")


def rollouts(algorithm: Algorithm, kind: str = "mixed", seed: int = 0, step: int = 0, steps: int = 10) -> RolloutBatch:
    """A step's completions; `kind` is one of KINDS. Three groups of 8, of which one is all right and one all wrong."""
    g = torch.Generator().manual_seed(seed * 1009 + KINDS.index(kind) * 101 + step)
    group = {"group-of-one": torch.arange(6), "large-group": torch.arange(2).repeat_interleave(96)}.get(
        kind, torch.arange(4).repeat_interleave(8))
    N, T, groups = len(group), MAX_LENGTH + PADDED, int(group.max()) + 1
    ease = torch.tensor([0.0, 1.0, 0.5, 0.5])[torch.arange(groups) % 4]
    correct = (torch.rand(N, generator=g) < ease[group]).float()
    length = torch.randint(1, MAX_LENGTH + 1, (N,), generator=g)
    valid = (torch.rand(N, generator=g) < 0.8) | (correct > 0)
    match kind:
        case "equal":
            correct, valid = torch.zeros(N), torch.ones(N, dtype=torch.bool)
            length = torch.full((N,), 5)
        case "all-wrong":
            correct = torch.zeros(N)
        case "all-right":
            correct, valid = torch.ones(N), torch.ones(N, dtype=torch.bool)
        case "all-invalid":
            correct, valid = torch.zeros(N), torch.zeros(N, dtype=torch.bool)
        case "all-truncated":
            length = torch.full((N,), MAX_LENGTH)
        case "one-token":
            length = torch.ones(N, dtype=torch.int64)
    reward = correct + FORMAT_REWARD * valid
    if kind == "continuous":
        reward = reward + torch.rand(N, generator=g)
    return RolloutBatch(
        reward=reward, components={"correct": correct, "format": valid.float()}, valid=valid, truncated=length == MAX_LENGTH,
        group=group, mask=torch.arange(T) < length[:, None], length=length, step=step, progress=step / steps, max_length=MAX_LENGTH,
        logp_old=-2 * torch.rand(N, T, generator=g), logp_rollout=-2 * torch.rand(N, T, generator=g),
        logp_ref=-2 * torch.rand(N, T, generator=g) if "ref_logp" in algorithm.needs else None,
        entropy=2 * torch.rand(N, T, generator=g) if "entropy" in algorithm.needs else None)


def contest(algorithm: Algorithm, step: int = 0) -> RolloutBatch:
    """Four groups of 8 with 2, 4, 4 and 6 right completions, alike in everything else; still at the reference model."""
    r = rollouts(algorithm, step=step)
    rank, right = torch.arange(32) % 8, torch.tensor([2, 4, 4, 6])[r.group]
    correct, valid, length = (rank < right).float(), torch.ones(32, dtype=torch.bool), torch.full((32,), 6)
    logp = torch.full_like(r.logp_old, -1.0)
    return replace(
        r, reward=correct + FORMAT_REWARD, components={"correct": correct, "format": valid.float()}, valid=valid, truncated=~valid,
        length=length, mask=torch.arange(logp.shape[1]) < length[:, None], logp_old=logp, logp_rollout=logp,
        logp_ref=None if r.logp_ref is None else logp, entropy=None if r.entropy is None else torch.ones_like(logp))


def policy_batch(r: RolloutBatch, advantage: Tensor, drift: float = 0.3, seed: int = 0) -> PolicyBatch:
    """The whole step as one microbatch, after the policy has moved: log-ratios are +-drift times a number in [0, 1]."""
    g = torch.Generator().manual_seed(seed + 7)
    d = drift * (2 * torch.rand(r.logp_old.shape, generator=g) - 1)
    return PolicyBatch(
        logp=r.logp_old + d, logp_old=r.logp_old, advantage=torch.where(r.mask, advantage, 0.0), mask=r.mask, length=r.length,
        reward=r.reward, progress=r.progress, max_length=r.max_length, logp_ref=r.logp_ref, entropy=r.entropy)


def random_advantage(r: RolloutBatch, seed: int = 0) -> Tensor:
    """(N, T) advantages that differ between completions only, of both signs."""
    g = torch.Generator().manual_seed(seed + 11)
    return torch.randn(len(r.group), 1, generator=g).expand(r.mask.shape)


# -- changes of a batch ------------------------------------------------------------------------------------------------

def tensors(batch: RolloutBatch | PolicyBatch) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every field; components are named components.correct."""
    for f in fields(batch):
        value = getattr(batch, f.name)
        if isinstance(value, Tensor):
            yield f.name, value
        elif isinstance(value, dict):
            yield from ((f"{f.name}.{name}", x) for name, x in value.items())


def rows(batch: Batch, index: Tensor) -> Batch:
    """These completions, in this order. Group numbers stay."""
    return _map(batch, lambda name, x: x[index])


def garbage_padding(batch: Batch, seed: int = 0) -> Batch:
    """The same batch with other finite values where there is no token."""
    g = torch.Generator().manual_seed(seed + 13)

    def fill(name: str, x: Tensor) -> Tensor:
        if x.dim() < 2 or name == "mask":
            return x
        return torch.where(batch.mask, x, 30 * (2 * torch.rand(x.shape, generator=g) - 1))
    return _map(batch, fill)


def trimmed(batch: Batch) -> Batch:
    """Without the columns that no completion reaches."""
    longest = int(batch.length.max())
    return _map(batch, lambda name, x: x[:, :longest] if x.dim() == 2 else x)


def copy(batch: Batch) -> Batch:
    return _map(batch, lambda name, x: x.clone())


def _map(batch: Batch, change: Any) -> Batch:
    new: dict[str, Any] = {}
    for f in fields(batch):
        value = getattr(batch, f.name)
        if isinstance(value, Tensor):
            new[f.name] = change(f.name, value)
        elif isinstance(value, dict):
            new[f.name] = {name: change(name, x) for name, x in value.items()}
    return replace(batch, **new)


@dataclass(frozen=True)
class Perturbation:
    """A change of one input alone, in the rollouts and in the microbatch made of them."""

    seed: int = 0

    def __call__(self, batch: Batch, name: str) -> Batch | None:
        """None: the batch has no such input."""
        g = torch.Generator().manual_seed(self.seed + 17)
        value = getattr(batch, name, None)
        match value:
            case None:
                return None
            case dict():
                return replace(batch, **{name: {k: 1 - v for k, v in value.items()}})
            case float():
                return replace(batch, **{name: 0.9 - value})
            case int():
                return replace(batch, **{name: value + 5})
        assert isinstance(value, Tensor)
        if name == "group":  # every second completion moves to the next group
            return replace(batch, group=(value + torch.arange(len(value)) % 2) % (int(value.max()) + 1))
        if value.dtype == torch.bool:
            return replace(batch, **{name: value ^ (torch.rand(value.shape, generator=g) < 0.5)})
        if name == "length":
            return replace(batch, length=(value + torch.randint(1, 4, value.shape, generator=g)) % batch.max_length + 1)
        return replace(batch, **{name: value + 0.1 * torch.rand(value.shape, generator=g)})
