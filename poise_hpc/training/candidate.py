"""Calls into candidate code. Blame is set here: what goes wrong inside these calls, or comes out of them in the wrong
shape or not finite, is a `CandidateError`; everything else is ours or the cluster's.
"""
from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import files, inside
from ..algorithms.base import Advantages, Algorithm, PolicyBatch, RolloutBatch
from ..types import CandidateError
from .batch import clone

T = TypeVar("T")
TAIL = 2000  # characters of a traceback that are kept


def call(what: str, function: Callable[..., T], *arguments: Any) -> T:
    try:
        with inside.candidate_code():
            return function(*arguments)
    except CandidateError:
        raise
    except Exception as error:
        raise CandidateError("raised", f"{what} raised {type(error).__name__}:\n{traceback.format_exc()[-TAIL:]}") from error


def select(algorithm: Algorithm, rollouts: RolloutBatch, state: dict[str, Any]) -> Tensor:
    """(G,) bool, the groups to train on."""
    keep = call("select", algorithm.select, clone(rollouts), state)
    if keep is None:
        return torch.ones(rollouts.groups, dtype=torch.bool)
    wanted(keep, "select", (rollouts.groups,), torch.bool)
    return keep


def advantages(algorithm: Algorithm, rollouts: RolloutBatch, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Advantage (N, T) float32, 0 at padding, and keep (N,) bool."""
    result = call("advantages", algorithm.advantages, clone(rollouts), state)
    if not isinstance(result, Advantages):
        raise CandidateError("wrong-type", f"advantages returned {type(result).__name__}, Advantages was wanted")
    value, keep, (N, T) = result.value, result.keep, rollouts.mask.shape
    if isinstance(value, Tensor) and value.dim() == 1:
        wanted(value, "advantages: value", (N,))
        value = value[:, None].expand(N, T)
    else:
        wanted(value, "advantages: value", (N, T))
    if keep is None:
        keep = torch.ones(N, dtype=torch.bool)
    wanted(keep, "advantages: keep", (N,), torch.bool)
    value = value.detach().float()
    finite(value[rollouts.mask & keep[:, None]], "nonfinite-advantage", "advantages")
    return torch.where(rollouts.mask & keep[:, None], value, 0.0), keep


@dataclass(frozen=True)
class LossGradient:
    """A microbatch's share of J and its derivatives; constants, 0 at padding."""

    loss: float
    logp: Tensor                    # (B, T) dJ / d logp
    entropy: Tensor | None = None   # (B, T) dJ / d entropy


def loss_gradient(algorithm: Algorithm, batch: PolicyBatch, weight: Tensor, state: dict[str, Any]) -> LossGradient:
    """J = sum of weight (B, T) * token_loss, differentiated on leaves of its own: the candidate's part of the graph ends
    here, so that a fault in it is its fault, and is found before it reaches a weight."""
    leaves = [batch.logp.detach().requires_grad_()]
    if batch.entropy is not None:
        leaves.append(batch.entropy.detach().requires_grad_())
    # Clones: code that writes into what it is given does not write into a leaf.
    copies = {"logp": leaves[0].clone()} | ({"entropy": leaves[1].clone()} if len(leaves) > 1 else {})
    loss = call("token_loss", algorithm.token_loss, replace(batch, **copies), state)
    wanted(loss, "token_loss", tuple(batch.mask.shape))
    finite(loss.detach()[batch.mask], "nonfinite-loss", "token_loss")
    if not loss.requires_grad:
        raise CandidateError("no-gradient", "token_loss returned a constant: it must be computed from batch.logp")
    J = (torch.where(batch.mask, loss, 0.0) * weight).sum()
    gradients = call("token_loss (backward)", lambda: torch.autograd.grad(J, leaves, allow_unused=True))
    gradients = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(gradients, leaves)]
    for g in gradients:
        finite(g[batch.mask], "nonfinite-gradient", "the gradient of token_loss")
    return LossGradient(float(J.detach()), *(torch.where(batch.mask, g, 0.0) for g in gradients))


def plain_state(state: dict[str, Any]) -> dict[str, Any]:
    """The state as a checkpoint would give it back: what runs on must not differ from what is resumed."""
    try:
        return json.loads(files.dumps(state))
    except (TypeError, ValueError) as error:
        raise CandidateError("state-not-json", f"the state must be plain finite JSON data ({error}); it is {str(state)[:300]}") from None


def wanted(value: Any, what: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    if not isinstance(value, Tensor):
        raise CandidateError("wrong-type", f"{what} is of type {type(value).__name__}, a tensor {shape} was wanted")
    if tuple(value.shape) != shape:
        raise CandidateError("wrong-shape", f"{what} has shape {tuple(value.shape)}, {shape} was wanted")
    if dtype is not None and value.dtype != dtype:
        raise CandidateError("wrong-type", f"{what} is of {value.dtype}, {dtype} was wanted")


def finite(value: Tensor, cause: str, what: str) -> None:
    bad = int((~torch.isfinite(value)).sum())
    if bad:
        raise CandidateError(cause, f"{what}: {bad} of {value.numel()} values are NaN or infinite")
