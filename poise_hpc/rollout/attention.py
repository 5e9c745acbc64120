"""Attention while decoding: one new token per row, rows of a group share their prompt's keys and values.

A step reads every key and value once, and that is most of what it costs: so the prompt's are kept once per group, not
once per completion, and are met by all its rows in one matrix product. Plain products also take a half to a third of
the time of PyTorch's CPU attention kernel, which is made for long queries.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..types import PoiseError

NAME = "poise_decode"  # in transformers' registry


@dataclass
class Prompts:
    """Keys and values of G prompts, for decoding B rows: at first n per prompt, fewer once rows have finished."""

    layers: list[tuple[Tensor, Tensor]]  # of each model layer: (G, key-value heads, P, size)
    mask: Tensor | None                  # (G, P) bool, False at padding; None without any
    n: int
    row: Tensor                          # (B,) of the n * G: row g * n + j belongs to prompt g

    def spread(self, x: Tensor) -> Tensor:
        """(B, heads, r, size) -> (G, heads, n * r, size): all rows of a prompt side by side; 0 for finished ones."""
        G, (_, heads, r, size) = len(self.layers[0][0]), x.shape
        if len(self.row) < G * self.n:
            x = x.new_zeros(G * self.n, heads, r, size).index_copy_(0, self.row, x)
        return x.view(G, self.n, heads, r, size).transpose(1, 2).reshape(G, heads, self.n * r, size)

    def collect(self, x: Tensor) -> Tensor:
        """The inverse of `spread`."""
        G, heads, rows, size = x.shape
        x = x.view(G, heads, self.n, -1, size).transpose(1, 2).reshape(G * self.n, heads, -1, size)
        return x[self.row] if len(self.row) < G * self.n else x


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
              scaling: float | None = None, prompts: Prompts | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface. Decoding: query (B, heads, 1, size), key and value (B, key-value heads, t, size)
    of the completions so far, to (B, 1, heads, size). Without `prompts` this is transformers' SDPA."""
    if prompts is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    B, heads, _, size = query.shape
    prompt_key, prompt_value = prompts.layers[module.layer_idx]
    # Grouped-query attention: the r heads that share keys are rows of one product.
    q = query.reshape(B, key.shape[1], -1, size) * (size**-0.5 if scaling is None else scaling)
    to_prompt = torch.matmul(prompts.spread(q), prompt_key.transpose(2, 3))
    if prompts.mask is not None:
        to_prompt = to_prompt.masked_fill(~prompts.mask[:, None, None], -torch.inf)
    P = prompt_key.shape[2]
    weights = torch.cat([prompts.collect(to_prompt), torch.matmul(q, key.transpose(2, 3))], -1).softmax(-1)
    out = prompts.collect(torch.matmul(prompts.spread(weights[..., :P]), prompt_value)) + torch.matmul(weights[..., P:], value)
    return out.reshape(B, 1, heads, size), None


def install(model: nn.Module) -> None:
    """Let `model` decode with `attention`; ordinary calls of it go on as before."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if not getattr(model, "_supports_attention_backend", False) or kinds != {"full_attention"}:
        raise PoiseError(f"{type(model).__name__} (layers: {', '.join(sorted(kinds))}) cannot be sampled by the transformers engine, "
                         "which wants full attention in every layer, through transformers' attention interface. Choose another "
                         "model, or `rollout.engine: vllm`")
    if model.config._attn_implementation == "sdpa":  # training may have installed its own, which knows this one
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.config._attn_implementation = NAME
