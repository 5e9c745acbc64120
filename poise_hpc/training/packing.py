"""One forward without waste: the completions of a group share their prompt, and nothing is padded but attention.

A microbatch of G prompts and B completions y becomes one row of L tokens,

    prompt 0 | prompt 1 | ... | y_0 without its last token | y_1 without its last token | ...

so that every layer but attention, and the output head, computes exactly the tokens that are needed, once. Attention
sees which token may look at which: a completion at its group's prompt and at itself. Gradients of all completions
of a group meet in the prompt. The result equals a plain forward per completion to rounding.

Works with models that use transformers' attention interface (`supports`); the others run unpacked (`policy.py`).
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ..rollout import attention as decoding

NAME = "poise_packed"  # of our attention function in transformers' registry


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a microbatch are. P: longest prompt; C: longest completion - 1; M: sampled tokens."""

    tokens: Tensor           # (1, L) int64
    positions: Tensor        # (1, L) int64, position within the own sequence
    padded: Tensor           # (G * P + B * C,) index into L: prompts, then completions, padded to rectangles
    packed: Tensor           # (L,) index into G * P + B * C, the inverse
    prompt_rectangle: tuple[int, int]      # G, P
    completion_rectangle: tuple[int, int]  # B, C
    group: Tensor            # (B,) prompt of a completion
    mask: Tensor             # (B or 1, 1, C, P + C) bool, what completions may look at
    logits_at: Tensor        # (U,) index into L: the tokens whose successor was sampled
    source: Tensor           # (M,) index into U, for each sampled token, row by row
    target: Tensor           # (M,) the sampled tokens
    sampled: Tensor          # (B, T) bool

    @property
    def dense(self) -> bool:
        return len(self.padded) == len(self.packed)  # nothing is padded: rectangles are views


def pack(prompts: Sequence[Sequence[int]], group: Tensor, tokens: Tensor, length: Tensor) -> Packing:
    """G prompts; B completions `tokens` (B, T) of `length` (B,) >= 1, each with the index `group` (B,) of its prompt."""
    device, (B, T), G = tokens.device, tokens.shape, len(prompts)
    size = torch.tensor([len(p) for p in prompts], device=device)
    P, C = int(size.max()), int(length.max()) - 1
    column = torch.arange(max(P, T), device=device)
    in_prompt, in_completion = column[:P] < size[:, None], column[:C] < length[:, None] - 1
    sampled = column[:T] < length[:, None]

    rectangle = torch.cat([in_prompt.flatten(), in_completion.flatten()])
    packed = rectangle.nonzero().squeeze(1)
    padded = (rectangle.cumsum(0) - 1).clamp(min=0)  # padding repeats the token before it: any finite value will do
    at_prompt_end, in_completions = size.cumsum(0) - 1, torch.arange(int(size.sum()), len(packed), device=device)
    # Token 0 of a completion comes from its prompt's last token, token t from token t - 1.
    source = torch.cat([group[:, None], G + (in_completion.flatten().cumsum(0) - 1).view(B, C)], 1)[sampled[:, :C + 1]]

    causal = column[:C, None] >= column[:C]
    if bool((size == P).all()):
        mask = torch.cat([causal.new_ones(C, P), causal], 1)[None, None]
    else:
        mask = torch.cat([in_prompt[group][:, None].expand(B, C, P), causal.expand(B, C, C)], 2)[:, None]
    return Packing(
        tokens=torch.cat([torch.tensor([t for p in prompts for t in p], device=device), tokens[:, :C][in_completion]])[None],
        positions=torch.cat([column[:P].expand(G, P)[in_prompt], (size[group, None] + column[:C])[in_completion]])[None],
        padded=padded, packed=packed, prompt_rectangle=(G, P), completion_rectangle=(B, C), group=group, mask=mask,
        logits_at=torch.cat([at_prompt_end, in_completions]), source=source, target=tokens[sampled], sampled=sampled)


class _ToRectangles(torch.autograd.Function):
    """(L, ...) -> (G * P + B * C, ...). Padding copies some token but receives no gradient, so that the backward is
    a gather, too (index_select's own would add row by row)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, padded: Tensor, packed: Tensor) -> Tensor:
        ctx.save_for_backward(packed)
        return x.index_select(0, padded)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


class _FromRectangles(torch.autograd.Function):
    """(G * P + B * C, ...) -> (L, ...)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.rows = len(x)
        return x.index_select(0, packed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        out = gradient.new_zeros(ctx.rows, *gradient.shape[1:])
        return out.index_copy_(0, ctx.saved_tensors[0], gradient), None


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
              packing: Packing | None = None, scaling: float | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: (1, heads, L, size) each, to (1, L, heads, size). Without a packing (rollouts
    with the same module) this is the sampler's."""
    if packing is None:
        return decoding.attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    (G, P), (B, C) = packing.prompt_rectangle, packing.completion_rectangle
    repeat = query.shape[1] // key.shape[1]  # grouped-query attention: heads per key-value head

    def rectangles(x: Tensor) -> tuple[Tensor, Tensor]:  # -> (G, heads, P, size), (B, heads, C, size)
        x = x[0].transpose(0, 1)
        if not packing.dense:
            x = _ToRectangles.apply(x, packing.padded, packing.packed)
        x = x.repeat_interleave(repeat, 1) if x.shape[1] < query.shape[1] else x
        prompts, completions = x.split((G * P, B * C))  # its backward is one copy, that of slices several
        return prompts.unflatten(0, (G, P)).transpose(1, 2), completions.unflatten(0, (B, C)).transpose(1, 2)

    (qp, qc), (kp, kc), (vp, vc) = rectangles(query), rectangles(key), rectangles(value)
    prompts = scaled_dot_product_attention(qp, kp, vp, is_causal=True, scale=scaling)
    out = prompts.transpose(1, 2).flatten(0, 1)
    if C:
        kc, vc = torch.cat([kp[packing.group], kc], 2), torch.cat([vp[packing.group], vc], 2)
        completions = scaled_dot_product_attention(qc, kc, vc, attn_mask=packing.mask, scale=scaling)
        out = torch.cat([out, completions.transpose(1, 2).flatten(0, 1)])
    if not packing.dense:
        out = _FromRectangles.apply(out, packing.packed)
    return out[None], None


def supports(model: nn.Module) -> bool:
    """Does every layer of `model` attend to its whole past through transformers' attention interface?"""
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    return bool(getattr(model, "_supports_attention_backend", False)) and kinds == {"full_attention"}


def install(model: nn.Module) -> None:
    """Let `model` use `attention`; ordinary calls of it go on as before."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.config._attn_implementation = NAME
