"""The policy: log-probs (and entropies) of completions under a transformers causal LM, differentiable.

Packed (`packing.py`) where the model allows it and `share_prompt` is on, else one padded row per completion.
Log-probs are at the sampling temperature. Dropout is off: pi_theta is one distribution, not a random one.

Not covered: tensor or sequence parallelism, chunked logits for large vocabularies.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import packing


class Policy(nn.Module):
    def __init__(self, model: nn.Module, temperature: float, share_prompt: bool = True):
        super().__init__()
        self.model, self.temperature = model.eval(), temperature
        self.packed = share_prompt and packing.supports(model)
        if self.packed:
            packing.install(model)

    def forward(self, prompts: Sequence[Sequence[int]], group: Tensor, tokens: Tensor, length: Tensor,
                entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        """log pi(y_t | x, y_<t) (B, T) of completions `tokens` (B, T) of `length` (B,), 0 at padding, and their
        entropy in nats (B, T) if asked for. Completion i answers prompts[group[i]]."""
        logits, source, target, sampled = (self._packed if self.packed else self._padded)(prompts, group, tokens, length)
        logits = logits if self.temperature == 1.0 else logits / self.temperature
        logp = LogProb.apply(logits, source, target)
        return spread(logp, sampled), spread(entropies(logits)[source], sampled) if entropy else None

    def _packed(self, prompts: Sequence[Sequence[int]], group: Tensor, tokens: Tensor,
                length: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        p = packing.pack(prompts, group, tokens, length)
        # A mask of four dimensions is passed through as it is: no (L, L) mask is made.
        logits = self.model(input_ids=p.tokens, position_ids=p.positions, attention_mask=torch.ones(1, 1, 1, 1, device=tokens.device),
                            use_cache=False, logits_to_keep=p.logits_at, packing=p).logits[0]
        return logits, p.source, p.target, p.sampled

    def _padded(self, prompts: Sequence[Sequence[int]], group: Tensor, tokens: Tensor,
                length: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Prompt and completion in one row, padded on the right: a causal model needs no mask for that."""
        rows = [list(prompts[g]) + y[:n].tolist() for g, y, n in zip(group.tolist(), tokens, length.tolist())]
        first = torch.tensor([len(prompts[g]) - 1 for g in group.tolist()], device=tokens.device)
        x = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long, device=tokens.device)
        for i, row in enumerate(rows):
            x[i, :len(row)] = torch.tensor(row)
        logits = self.model(input_ids=x, attention_mask=None, use_cache=False).logits
        column = torch.arange(tokens.shape[1], device=tokens.device)
        sampled = column < length[:, None]
        at = torch.arange(len(rows), device=tokens.device)[:, None] * x.shape[1] + first[:, None] + column
        return logits.flatten(0, 1), at[sampled], tokens[sampled], sampled


class LogProb(torch.autograd.Function):
    """log softmax(logits[source])[target] (M,) from logits (U, V): keeps the logits it was given and nothing else of
    their size. Several sampled tokens may come from one row of logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, source: Tensor, target: Tensor) -> Tensor:
        normalizer = torch.logsumexp(logits.float(), -1)
        ctx.save_for_backward(logits, normalizer, source, target)
        return logits[source, target].float() - normalizer[source]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # d log p_target / d logits = onehot(target) - softmax
        logits, normalizer, source, target = ctx.saved_tensors
        per_row = torch.zeros_like(normalizer).index_add_(0, source, gradient)
        out = (logits.float() - normalizer[:, None]).exp_().mul_(-per_row[:, None])
        out.index_put_((source, target), gradient, accumulate=True)
        return out.to(logits.dtype), None, None


def entropies(logits: Tensor) -> Tensor:
    """(U,) nats, differentiable."""
    logp = torch.log_softmax(logits.float(), -1)
    return -(logp.exp() * logp).sum(-1)


def spread(values: Tensor, where: Tensor) -> Tensor:
    """(M,) values, row by row, to their places in (B, T); 0 elsewhere."""
    return values.new_zeros(where.shape).masked_scatter(where, values)
