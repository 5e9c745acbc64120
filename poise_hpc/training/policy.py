"""The policy: log-probs (and entropies) of completions under a transformers causal LM, differentiable.

Packed (`packing.py`) where the model allows it and `share_prompt` is on, else one padded row per completion.
Log-probs are at the sampling temperature. Dropout is off: pi_theta is one distribution, not a random one.

Not covered: tensor or sequence parallelism.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..types import PoiseError
from . import logprobs, packing


class Policy(nn.Module):
    def __init__(self, model: nn.Module, temperature: float, share_prompt: bool = True, recompute: bool = False):
        """`recompute`: layers keep their inputs only and are computed again in the backward (gradient checkpointing)."""
        super().__init__()
        self.model, self.temperature = model.eval(), temperature
        self.packed = share_prompt and packing.supports(model)
        if self.packed:
            packing.install(model)
        if recompute:
            recompute_layers(model)
        self.head = logprobs.find_head(model)

    def forward(self, prompts: Sequence[Sequence[int]], group: Tensor, tokens: Tensor, length: Tensor,
                entropy: bool = False) -> tuple[Tensor, Tensor | None]:
        """log pi(y_t | x, y_<t) (B, T) of completions `tokens` (B, T) of `length` (B,), 0 at padding, and their
        entropy in nats (B, T) if asked for. Completion i answers prompts[group[i]]."""
        inputs, rows, source, target, sampled = (self._packed if self.packed else self._padded)(prompts, group, tokens, length)
        if self.head is not None and len(rows) * len(self.head.weight) > logprobs.AT_ONCE:
            hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1).index_select(0, rows)
            logp, *H = self.head(hidden, source, target, self.temperature, entropy)
            H = H[0] if H else None
        else:
            keep = {"logits_to_keep": rows} if self.packed else {}
            logits = self.model(**inputs, **keep, use_cache=False).logits.flatten(0, 1)
            logits = logits if self.packed else logits.index_select(0, rows)
            logits = logits if self.temperature == 1.0 else logits / self.temperature
            logp, H = logprobs.from_logits(logits, source, target, entropy)
        return spread(logp, sampled), None if H is None else spread(H[source], sampled)

    def _packed(self, prompts: Sequence[Sequence[int]], group: Tensor, tokens: Tensor,
                length: Tensor) -> tuple[dict[str, Any], Tensor, Tensor, Tensor, Tensor]:
        """The model's inputs; (U,) the tokens whose logits are needed; source, target (M,); sampled (B, T)."""
        p = packing.pack(prompts, group, tokens, length, self.model.dtype)
        # A mask of four dimensions is passed through as it is: no (L, L) mask is made.
        inputs = {"input_ids": p.tokens, "position_ids": p.positions, "attention_mask": torch.ones(1, 1, 1, 1, device=tokens.device),
                  "packing": p}
        return inputs, p.logits_at, p.source, p.target, p.sampled

    def _padded(self, prompts: Sequence[Sequence[int]], group: Tensor, tokens: Tensor,
                length: Tensor) -> tuple[dict[str, Any], Tensor, Tensor, Tensor, Tensor]:
        """Prompt and completion in one row, padded on the right: a causal model needs no mask for that."""
        rows = [list(prompts[g]) + y[:n].tolist() for g, y, n in zip(group.tolist(), tokens, length.tolist())]
        first = torch.tensor([len(prompts[g]) - 1 for g in group.tolist()], device=tokens.device)
        x = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long, device=tokens.device)
        for i, row in enumerate(rows):
            x[i, :len(row)] = torch.tensor(row)
        column = torch.arange(tokens.shape[1], device=tokens.device)
        sampled = column < length[:, None]
        at = (torch.arange(len(rows), device=tokens.device)[:, None] * x.shape[1] + first[:, None] + column)[sampled]
        return {"input_ids": x, "attention_mask": None}, at, torch.arange(len(at), device=tokens.device), tokens[sampled], sampled


def recompute_layers(model: nn.Module) -> None:
    """Gradient checkpointing of every layer that transformers marks for it. Not through transformers' own switch: it acts
    in training mode only, and that would turn dropout on."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise PoiseError(f"train.gradient_checkpointing: {type(model).__name__} has no layers that transformers can checkpoint; set it to "
                         "false, with smaller train.microbatch_tokens")
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments, **options)
    return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **options)


def spread(values: Tensor, where: Tensor) -> Tensor:
    """(M,) values, row by row, to their places in (B, T); 0 elsewhere."""
    return values.new_zeros(where.shape).masked_scatter(where, values)
