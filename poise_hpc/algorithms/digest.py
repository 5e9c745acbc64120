"""What an algorithm computes, as a digest: two packages that train alike have the same one, however they are written.

    g_t = d(1/Z sum m l) / d logp,  for a few dozen steps in a row, `select` beside it

g is all that training takes from an algorithm: a constant in the loss, or a factor moved from A to l, changes nothing. The steps are
seeded and dense: pass rates, validity, truncation and lengths of every kind, state carried on, progress from 0 to 1, and log-ratios
that are log-uniform token by token and completion by completion, so that two clips a few hundredths apart are told apart.

In float64, rounded to six digits: how an expression is arranged does not matter. What casts to float32 itself may be told apart
from its equal; that costs a training, not a candidate. Not told apart: what differs nowhere on these steps (a threshold moved by
less than about 1 %, what happens after STEPS steps, other group sizes, a schedule between two of the visited progresses).
"""
from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import ops, probes
from .base import Algorithm, PolicyBatch, RolloutBatch

VERSION = 1                 # of these steps: digests of different versions say nothing about each other
STEPS = 40
GROUPS, TOKENS = 16, 16     # a step has GROUPS groups of SIZES[step % 2] completions
SIZES = (8, 6)
NOTHING = 1e-8              # a gradient below it is rounding
SMALLEST, LARGEST = 1e-4, 4.0  # |log-ratio|


def digest(algorithm: Algorithm, seed: int = 0) -> str:
    """"1:" and 16 hex digits; "" if it cannot be computed, which no package is blamed for."""
    sha = hashlib.sha256()
    with double():
        random, state = torch.Generator().manual_seed(seed), probes.fresh_state(algorithm)
        try:
            for step in range(STEPS):
                for values in _step(algorithm, random, step, state):
                    sha.update(_rounded(values))
        except Exception:  # candidate code, in a precision that it was not promised: nobody is blamed, the digest is merely unknown
            return ""
    return f"{VERSION}:{sha.hexdigest()[:16]}"


@contextmanager
def double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _step(algorithm: Algorithm, random: torch.Generator, step: int, state: dict) -> Iterator[Tensor]:
    """What is selected, and g with respect to logp and the entropy."""
    batch, drift = _rollouts(random, step), _drift(random, GROUPS * SIZES[step % 2])
    logp_ref, entropy = batch.logp_ref, batch.entropy
    seen = probes.shown(batch, algorithm)
    chosen = algorithm.select(seen, state)
    yield torch.ones(GROUPS) if chosen is None else chosen.to(torch.get_default_dtype())
    A, keep = probes.advantages(algorithm, seen, state)
    if chosen is not None:
        keep = keep & chosen[batch.group]
    policy = PolicyBatch(
        logp=(batch.logp_old + drift).requires_grad_(), logp_old=batch.logp_old, advantage=A, mask=batch.mask, length=batch.length,
        reward=batch.reward, progress=batch.progress, max_length=batch.max_length, logp_ref=logp_ref if seen.logp_ref is not None else None,
        entropy=(entropy * (1 + drift.abs())).requires_grad_() if seen.entropy is not None else None)
    loss = probes.token_loss(algorithm, policy, state)
    m, z = ops.token_weights(algorithm.reduction, batch.mask, batch.length, keep, batch.max_length)
    inputs = [policy.logp] + ([policy.entropy] if policy.entropy is not None else [])
    grads = torch.autograd.grad(torch.where(m > 0, m * loss, 0.0).sum() / z.clamp(min=1), inputs, allow_unused=True)
    for g in [*grads, None][:2]:
        yield torch.zeros_like(drift) if g is None else g


def _rollouts(random: torch.Generator, step: int) -> RolloutBatch:
    """Pass rates from none to all, one completion in five invalid, one in eight cut off; the same whatever the algorithm needs.

    From step to step the levels of reward, entropy, length and distance from the reference move through their ranges without a
    gap: a target that a state steers to, or a threshold on a mean, lies between two of them.
    """
    n, T = SIZES[step % 2], TOKENS
    N, dtype = GROUPS * n, torch.get_default_dtype()
    rand, randn = lambda *shape: torch.rand(*shape, generator=random), lambda *shape: torch.randn(*shape, generator=random)
    hard, flat, long, far = (_level(step, k) for k in range(4))
    rate = (torch.arange(GROUPS) / (GROUPS - 1)).pow(4 ** (2 * hard - 1)).repeat_interleave(n)
    valid, truncated = rand(N) < 0.8, rand(N) < 0.125
    valid = valid & ~truncated
    correct = (rand(N) < rate) & valid
    length = torch.where(truncated, T, (T * rand(N).pow(4 ** (1 - 2 * long))).long() + 1)
    parts = {"correct": correct.to(dtype), "format": valid.to(dtype)}
    reward = 2 * parts["correct"] - 1 if step % 5 == 4 else parts["correct"] + 0.1 * parts["format"]
    nats = 0.005 * 800**flat
    logp = -nats * torch.exp(2 * randn(N, T)).clamp(1e-3, 20 / nats)
    return RolloutBatch(
        reward=reward, components=parts, valid=valid, truncated=truncated, group=torch.arange(GROUPS).repeat_interleave(n),
        mask=torch.arange(T) < length.unsqueeze(-1), length=length, logp_old=logp, logp_rollout=logp + 0.05 * randn(N, T), step=step,
        progress=step / STEPS, max_length=T, logp_ref=logp + 0.001 * 2000**far * randn(N, T), entropy=2 * nats * rand(N, T))


def _level(step: int, k: int) -> float:
    """In [0, 1): evenly spread over the steps, and over each of their beginnings (multiples of an irrational number)."""
    return (0.5 + (step + 1) * math.sqrt((2, 3, 5, 7)[k])) % 1


def _drift(random: torch.Generator, N: int) -> Tensor:
    """(N, TOKENS) log-ratios: of every second completion each token its own size and sign; of the others all tokens nearly one
    size and sign, so that their mean is log-uniform too."""
    def sized(*shape: int) -> Tensor:
        size = torch.exp(math.log(SMALLEST) + math.log(LARGEST / SMALLEST) * torch.rand(*shape, generator=random))
        return torch.where(torch.rand(*shape, generator=random) < 0.5, size, -size)

    each, together = sized(N, TOKENS), sized(N, 1) * (0.8 + 0.4 * torch.rand(N, TOKENS, generator=random))
    return torch.where((torch.arange(N) % 2 == 0).unsqueeze(-1), each, together)


def _rounded(values: Tensor) -> bytes:
    """Times pi: what is a round number by design (a half, a 2048th) does not lie between two rounded ones."""
    flat = [0.0 if abs(x) < NOTHING else x for x in (math.pi * values).flatten().tolist()]
    return " ".join(f"{x:.5e}" for x in flat).encode()
