"""The Algorithm interface: what a policy-optimization algorithm is, and nothing else.

    J(theta) = 1/Z  sum over tokens of  m * w * l(A)

An algorithm owns A (`advantages`), l (`token_loss`) and the choice of m and Z (`reduction`).
The framework owns the masks, the truncated importance weight w between sampler and trainer, the global
normalization Z over ranks and microbatches, and finite checks. A value must not depend on how a batch is split.

Letters: N completions of one training step over all ranks, G groups (one per prompt), B completions of one
microbatch, T tokens (right-padded width). Log-probabilities are natural logarithms, at the sampling temperature.

Not covered: critics and value heads, extra forward passes other than the reference model's, changes to sampling.
"""
from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, ClassVar

from torch import Tensor


class Reduction(StrEnum):
    """m and Z. Sums run over the whole optimizer step: all ranks, all microbatches, kept completions only."""

    TOKEN_MEAN = "token-mean"                            # m = 1,        Z = number of tokens
    SEQ_MEAN_TOKEN_MEAN = "seq-mean-token-mean"          # m = 1 / |y|,  Z = number of completions
    SEQ_MEAN_TOKEN_SUM = "seq-mean-token-sum"            # m = 1,        Z = number of completions
    SEQ_MEAN_TOKEN_SUM_NORM = "seq-mean-token-sum-norm"  # m = 1,        Z = number of completions * longest allowed |y|


@dataclass(frozen=True)
class Mechanism:
    """A named part of an algorithm that can be switched off, for ablation."""

    name: str                       # "clip-higher"
    kind: str                       # advantage | normalization | clipping | ratio | masking | kl | entropy | length | selection | reduction
    off: dict[str, Any] = field(default_factory=dict)  # hyperparameter values without it: {"clip_high": 0.2}


@dataclass(frozen=True)
class RolloutBatch:
    """All completions of one training step, over all ranks, with their rewards. Nothing carries a gradient."""

    reward: Tensor                  # (N,) float, total reward
    components: dict[str, Tensor]   # name -> (N,) float; "correct" and "format" at least
    valid: Tensor                   # (N,) bool, the answer could be parsed
    truncated: Tensor               # (N,) bool, cut at the token limit
    group: Tensor                   # (N,) int64 in [0, G), completions of one prompt share it
    mask: Tensor                    # (N, T) bool, True on sampled tokens (the end token included)
    length: Tensor                  # (N,) int64, sampled tokens, = mask.sum(1)
    logp_old: Tensor                # (N, T) log pi_old(y_t), by the trainer's model before the update
    logp_rollout: Tensor            # (N, T) log-prob that the sampler reported
    step: int                       # training step, from 0
    progress: float                 # step / total steps, in [0, 1)
    max_length: int                 # longest allowed completion, tokens
    logp_ref: Tensor | None = None  # (N, T) log pi_ref(y_t); only with needs = {"ref_logp"}
    entropy: Tensor | None = None   # (N, T) entropy of pi_old, nats; only with needs = {"entropy"}

    @property
    def groups(self) -> int:
        return int(self.group.max()) + 1 if self.group.numel() else 0


@dataclass(frozen=True)
class Advantages:
    """`value` (N,) is the same for every token of a completion, or (N, T). `keep` (N,) bool: False takes a
    completion out of the loss *and* out of Z."""

    value: Tensor
    keep: Tensor | None = None


@dataclass(frozen=True)
class PolicyBatch:
    """Completions of one microbatch, right-padded. Only `logp` (and `entropy`) carry a gradient."""

    logp: Tensor                    # (B, T) log pi_theta(y_t | x, y_<t)
    logp_old: Tensor                # (B, T) log pi_old, the policy before this training step
    advantage: Tensor               # (B, T) A, constant w.r.t. theta
    mask: Tensor                    # (B, T) bool, True on sampled tokens
    length: Tensor                  # (B,) int64
    reward: Tensor                  # (B,) float, total reward
    progress: float                 # as in RolloutBatch
    max_length: int
    logp_ref: Tensor | None = None  # (B, T); only with needs = {"ref_logp"}
    entropy: Tensor | None = None   # (B, T) of pi_theta, nats, differentiable; only with needs = {"entropy"}


NEEDS = frozenset({"ref_logp", "entropy"})


@dataclass(frozen=True)
class Algorithm:
    """Subclass as a frozen dataclass; its fields are the hyperparameters. Values at padded tokens are ignored
    but must be finite: mask the *input* of exp and log.

    `state` is a small JSON-able dict that is checkpointed. `advantages` may change it (it runs once per training
    step, on the same data on every rank); `token_loss` only reads it.

    `needs`, `reduction` and `zero_advantage_zero_loss` may be properties where a field decides.
    """

    needs: ClassVar[frozenset[str]] = frozenset()                    # subset of NEEDS; the rest is None
    reduction: ClassVar[Reduction] = Reduction.SEQ_MEAN_TOKEN_MEAN
    mechanisms: ClassVar[tuple[Mechanism, ...]] = ()
    # True promises: where A == 0, token_loss and its gradient are exactly 0. The trainer then leaves such
    # completions out of forward and backward (they still count in Z). Checked before any training.
    zero_advantage_zero_loss: ClassVar[bool] = False

    def initial_state(self) -> dict[str, Any]:
        return {}

    def select(self, rollouts: RolloutBatch, state: dict[str, Any]) -> Tensor | None:
        """(G,) bool, the groups to train on; None keeps all. Dropped groups leave the loss and Z, and are
        sampled again with fresh prompts up to the recipe's `rollout.max_rounds`."""
        return None

    def advantages(self, rollouts: RolloutBatch, state: dict[str, Any]) -> Advantages:
        raise NotImplementedError

    def token_loss(self, batch: PolicyBatch, state: dict[str, Any]) -> Tensor:
        """(B, T) unreduced loss, to be minimized."""
        raise NotImplementedError

    def without(self, mechanism: str) -> Algorithm:
        """This algorithm with one of its mechanisms switched off."""
        for m in self.mechanisms:
            if m.name == mechanism:
                return replace(self, **m.off)
        known = ", ".join(m.name for m in self.mechanisms) or "none"
        raise KeyError(f"{type(self).__name__} has no mechanism {mechanism!r}; it declares: {known}")
