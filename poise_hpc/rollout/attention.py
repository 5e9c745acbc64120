"""Attention while decoding on a CPU: one query per row, as two plain matrix products.

PyTorch's CPU kernel for attention is made for long queries: with one query per row it takes 2 to 3 times as long as the
products (128 rows, 4 to 8 heads, 30 to 60 positions). Everything else goes to transformers' own function.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NAME = "poise_decode"  # in transformers' registry


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
              scaling: float | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: query (B, heads, Q, size), key and value (B, key-value heads, K, size), to
    (B, Q, heads, size)."""
    if query.shape[2] > 1 or query.device.type != "cpu" or query.requires_grad:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    B, heads, _, size = query.shape
    # Grouped-query attention: the heads that share keys are the rows of one product.
    scores = torch.matmul(query.view(B, key.shape[1], -1, size) * (size**-0.5 if scaling is None else scaling), key.transpose(2, 3))
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -torch.inf)  # (B, 1, 1, K) bool; the own position is never masked
    return torch.matmul(scores.softmax(-1), value).view(B, 1, heads, size), None


def install(model: nn.Module) -> None:
    """Let `model` decode with `attention`, if it uses transformers' SDPA now and its layers can be told."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    if getattr(model, "_supports_attention_backend", False) and model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.config._attn_implementation = NAME
