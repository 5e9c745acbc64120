"""The few operations that policy-optimization formulas are made of. Pure functions of tensors.

N completions of a training step, B of a microbatch, T tokens. `group` (N,) int64 says which completions share a prompt;
`where` (N,) bool restricts a group's statistics to some of its completions.
"""
from __future__ import annotations

import torch
from torch import Tensor

from .base import PolicyBatch, Reduction

LOG_LIMIT = 20.0  # log-ratios are cut here before exp, as verl does: e^20 = 4.9e8 still squares within float32


# -- over the completions of a group -----------------------------------------------------------------------------------

def group_size(group: Tensor, where: Tensor | None = None) -> Tensor:
    """(N,) float, how many completions the group of i has (of those in `where`, or all if it has none there)."""
    weight = _weight(group, where)
    return _sum(weight, group)[group].to(torch.get_default_dtype())


def group_mean(x: Tensor, group: Tensor, where: Tensor | None = None) -> Tensor:
    """(N,) mean of x over the group of i. A group without a completion in `where` uses all of its completions.

    Equal values have exactly their value as mean: otherwise (R - mean) / (std + 1e-6) turns the rounding error of
    the mean of 0.1 into an advantage.
    """
    weight = _weight(group, where)
    low = x.new_full((_groups(group),), torch.inf).scatter_reduce(0, group, torch.where(weight > 0, x, torch.inf), "amin")[group]
    mean = _sum((x - low).double() * weight, group) / _sum(weight, group).clamp(min=1)
    return (low.double() + mean[group]).to(x.dtype)


def group_std(x: Tensor, group: Tensor, where: Tensor | None = None, ddof: int = 1) -> Tensor:
    """(N,) standard deviation of x over the group of i; exactly 0 for equal values and for fewer than ddof + 1 of them."""
    weight = _weight(group, where)
    squares = _sum((x - group_mean(x, group, where)).double().square() * weight, group)
    return (squares / (_sum(weight, group) - ddof).clamp(min=1)).sqrt()[group].to(x.dtype)


def group_median(x: Tensor, group: Tensor) -> Tensor:
    """(N,) median of x over the group of i; of an even number the mean of the middle two. Equal values have exactly their value."""
    by_value = x.argsort(stable=True)
    order = by_value[group[by_value].argsort(stable=True)]  # by group, and by value in it
    size = torch.bincount(group, minlength=_groups(group))
    first = size.cumsum(0) - size
    low, high = (x[order[first + (size + shift).clamp(min=0) // 2]] for shift in (-1, 0))
    return ((low + high) / 2)[group]


def pass_rate(correct: Tensor, group: Tensor, where: Tensor | None = None) -> Tensor:
    """(N,) p, the share of the group of i with a component `correct` above 0."""
    return group_mean((correct > 0).to(torch.get_default_dtype()), group, where)


def _groups(group: Tensor) -> int:
    return int(group.max()) + 1 if group.numel() else 0


def _sum(x: Tensor, group: Tensor) -> Tensor:
    return x.new_zeros(_groups(group)).index_add(0, group, x)


def _weight(group: Tensor, where: Tensor | None) -> Tensor:
    """(N,) float64: 1 for the completions that count."""
    everyone = torch.ones_like(group, dtype=torch.float64)
    if where is None:
        return everyone
    live = where.double()
    return torch.where(_sum(live, group)[group] > 0, live, everyone)


# -- over the tokens of a completion -----------------------------------------------------------------------------------

def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """(B, 1) sum of x (B, T) over sampled tokens."""
    return torch.where(mask, x, 0.0).sum(-1, keepdim=True)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """(B, 1) mean of x (B, T) over sampled tokens."""
    return masked_sum(x, mask) / mask.sum(-1, keepdim=True).clamp(min=1)


def sg(x: Tensor) -> Tensor:
    """Stop-gradient."""
    return x.detach()


def log_ratio(batch: PolicyBatch) -> Tensor:
    """(B, T) log pi_theta - log pi_old within +-LOG_LIMIT; 0 at padded tokens, *before* anybody takes exp of it."""
    return torch.where(batch.mask, batch.logp - batch.logp_old, 0.0).clamp(-LOG_LIMIT, LOG_LIMIT)


def ratio(batch: PolicyBatch) -> Tensor:
    """(B, T) w = pi_theta / pi_old of the token; 1 at padded tokens."""
    return log_ratio(batch).exp()


def sequence_log_ratio(batch: PolicyBatch) -> Tensor:
    """(B, 1) log pi_theta(y) - log pi_old(y) of the whole completion, not divided by its length."""
    return masked_sum(batch.logp - batch.logp_old, batch.mask).clamp(-LOG_LIMIT, LOG_LIMIT)


def mean_log_ratio(batch: PolicyBatch) -> Tensor:
    """(B, 1) log s, the mean over tokens of the log-ratio."""
    return masked_mean(batch.logp - batch.logp_old, batch.mask).clamp(-LOG_LIMIT, LOG_LIMIT)


def clipped(w: Tensor, A: Tensor, low: float, high: float) -> Tensor:
    """(B, T) l = -min(w A, clip(w, 1 - low, 1 + high) A). Schulman et al. 2017, PPO, arXiv:1707.06347, eq. 7."""
    return -torch.minimum(w * A, w.clamp(1 - low, 1 + high) * A)


# -- KL(pi_theta || pi_ref), Schulman 2020, joschu.net/blog/kl-approx.html. (B, T); 0 at padded tokens ----------------

def k1(batch: PolicyBatch) -> Tensor:
    """d = log pi_theta - log pi_ref: unbiased as a value, but its gradient has mean 0. Not for a loss."""
    assert batch.logp_ref is not None, 'declare needs = frozenset({"ref_logp"})'
    return torch.where(batch.mask, batch.logp - batch.logp_ref, 0.0)


def k2(batch: PolicyBatch) -> Tensor:
    """d^2 / 2: biased as a value, on-policy its gradient is the gradient of the KL."""
    return k1(batch).square() / 2


def k3(batch: PolicyBatch) -> Tensor:
    """e^-d - 1 + d: unbiased and never negative; GRPO's choice."""
    d = k1(batch).clamp(-LOG_LIMIT, LOG_LIMIT)
    return (-d).exp() - 1 + d


# -- the reduction -----------------------------------------------------------------------------------------------------

def token_weights(reduction: Reduction, mask: Tensor, length: Tensor, keep: Tensor | None,
                  max_length: int) -> tuple[Tensor, Tensor]:
    """m (N, T) and z (), this part's share of Z: the loss is sum(m l) / Z, with z summed over all ranks and microbatches.

    `keep` (N,) bool, None for all; `max_length` in tokens, the longest allowed completion.
    """
    kept = torch.ones_like(length, dtype=torch.bool) if keep is None else keep
    m = (mask & kept.unsqueeze(-1)).to(torch.get_default_dtype())  # float32; the digest computes in float64
    completions = kept.sum().to(m.dtype)
    match reduction:
        case Reduction.TOKEN_MEAN:
            return m, m.sum()
        case Reduction.SEQ_MEAN_TOKEN_MEAN:
            return m / length.clamp(min=1).unsqueeze(-1), completions
        case Reduction.SEQ_MEAN_TOKEN_SUM:
            return m, completions
        case Reduction.SEQ_MEAN_TOKEN_SUM_NORM:
            return m, completions * max_length
    raise ValueError(f"unknown reduction {reduction!r}; one of {', '.join(Reduction)} is wanted")
