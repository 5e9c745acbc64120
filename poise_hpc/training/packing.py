"""One forward without waste: the completions of a group share their prompt, and nothing is padded but attention.

A microbatch of G prompts and B completions y becomes one row of L tokens,

    prompt 0 | prompt 1 | ... | y_0 without its last token | y_1 without its last token | ...

so that every layer but attention, and the output head, computes exactly the tokens that are needed, once. Attention
sees which token may look at which: a completion at its group's prompt and at itself. It takes sequences of similar length together, in
rectangles (`buckets.py`) that are gathered from the row. Gradients of all completions of a group meet in the prompt. The
result equals a plain forward per completion to rounding.

Works with models that use transformers' attention interface (`supports`); the others run unpacked (`policy.py`).
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ..rollout import attention as decoding
from .buckets import Bucket, Numbers, of_microbatch

NAME = "poise_packed"  # of our attention function in transformers' registry


@dataclass(frozen=True)
class Rectangle:
    """Sequences that attention takes in one call."""

    bucket: Bucket       # of n sequences
    mask: Tensor | None  # (n or 1, 1, queries, keys) 0 or -inf; None: causal


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a microbatch are. M: sampled tokens."""

    tokens: Tensor           # (1, L) int64
    positions: Tensor        # (1, L) int64, position within the own sequence
    rectangles: tuple[Rectangle, ...]  # of prompts, then of completions
    queries: Tensor          # (sum of n * queries,) index into L, rectangle by rectangle; padding repeats some token
    keys: Tensor             # (sum of n * keys,) index into L; a prompt is there for each of its completions
    outputs: Tensor          # (L,) index into queries: where a token's own output is
    dense: bool              # queries are all tokens in their order: nothing to gather
    logits_at: Tensor        # (U,) index into L: the tokens whose successor was sampled
    source: Tensor           # (M,) index into U, for each sampled token, row by row
    target: Tensor           # (M,) the sampled tokens
    sampled: Tensor          # (B, T) bool


def pack(prompts: Sequence[Sequence[int]], group: Tensor, tokens: Tensor, length: Tensor, dtype: torch.dtype = torch.float32) -> Packing:
    """G prompts; B completions `tokens` (B, T) of `length` (B,) >= 1, each with the index `group` (B,) of its prompt;
    the model's `dtype`."""
    device, (B, T), G = tokens.device, tokens.shape, len(prompts)
    size = torch.tensor([len(p) for p in prompts], device=device)
    rectangles, queries, keys, outputs = arrange(size.cpu().numpy(), length.cpu().numpy() - 1, group.cpu().numpy(), device, dtype)
    P, C = int(size.max()), int(length.max()) - 1
    column = torch.arange(max(P, T), device=device)
    in_prompt, in_completion = column[:P] < size[:, None], column[:C] < length[:, None] - 1
    sampled = column[:T] < length[:, None]
    at_prompt_end, in_completions = size.cumsum(0) - 1, torch.arange(int(size.sum()), len(outputs), device=device)
    # Token 0 of a completion comes from its prompt's last token, token t from token t - 1.
    source = torch.cat([group[:, None], G + (in_completion.flatten().cumsum(0) - 1).view(B, C)], 1)[sampled[:, :C + 1]]
    return Packing(
        tokens=torch.cat([torch.tensor([t for p in prompts for t in p], device=device), tokens[:, :C][in_completion]])[None],
        positions=torch.cat([column[:P].expand(G, P)[in_prompt], (size[group, None] + column[:C])[in_completion]])[None],
        rectangles=rectangles, queries=torch.from_numpy(queries).to(device), keys=torch.from_numpy(keys).to(device),
        outputs=torch.from_numpy(outputs).to(device), dense=np.array_equal(queries, np.arange(len(outputs))),
        logits_at=torch.cat([at_prompt_end, in_completions]), source=source, target=tokens[sampled], sampled=sampled)


def arrange(size: Numbers, rest: Numbers, group: Numbers, device: torch.device,
            dtype: torch.dtype) -> tuple[tuple[Rectangle, ...], Numbers, Numbers, Numbers]:
    """Rectangles, queries, keys and outputs of prompts of `size` (G,), and completions of `rest` (B,) tokens that are fed."""
    G, none, p = len(size), 0 * size, size[group]
    at = np.cumsum(np.concatenate([[0], size, rest]))
    of_prompts, of_completions = of_microbatch(size, rest, group)
    parts = [(bucket, _layout(bucket, none, none, at[:G], size), None) for bucket in of_prompts]
    for bucket in of_completions:
        parts.append((bucket, _layout(bucket, at[group], p, at[G:-1], rest), None if bucket.whole else _mask(bucket, p, device, dtype)))
    queries = np.concatenate([rows[:, -bucket.queries:].ravel() for bucket, (rows, _), _ in parts])
    own = np.concatenate([own[:, -bucket.queries:].ravel() for bucket, (_, own), _ in parts]).nonzero()[0]
    outputs = np.empty(at[-1], np.int64)
    outputs[queries[own]] = own
    return (tuple(Rectangle(bucket, mask) for bucket, _, mask in parts), queries,
            np.concatenate([rows.ravel() for _, (rows, _), _ in parts]), outputs)


def _layout(bucket: Bucket, prompt_at: Numbers, p: Numbers, at: Numbers, c: Numbers) -> tuple[Numbers, NDArray[np.bool_]]:
    """(n, keys): the tokens of each row, an index into L, and which of them are its own, not its prompt's and no padding."""
    prompt_at, p, at, c = (x[bucket.members, None] for x in (prompt_at, p, at, c))
    column, begin = np.arange(bucket.keys), p if bucket.whole else bucket.prompt
    rows = np.where(column < begin, prompt_at + np.minimum(column, p - 1), at + np.minimum(column - begin, c - 1))
    return rows, (column >= begin) & (column < begin + c)


def _mask(bucket: Bucket, p: Numbers, device: torch.device, dtype: torch.dtype) -> Tensor:
    """As numbers: of a bool mask every layer would make numbers of its own, and keep them."""
    p, P, C = p[bucket.members], bucket.prompt, bucket.queries
    ragged = bool((p < P).any())
    aligned = -(-(P + C) // 8) * 8  # rows of other lengths are copied by every call on CUDA
    mask = torch.full((len(p) if ragged else 1, 1, C, aligned), -torch.inf, dtype=dtype, device=device).triu_(P + 1)[..., :P + C]
    if ragged:
        mask[..., :P].masked_fill_(torch.from_numpy(np.arange(P) >= p[:, None]).to(device)[:, None, None], -torch.inf)
    return mask


class _Gather(torch.autograd.Function):
    """(L, ...) -> (queries, ...). Padding copies some token but receives no gradient, so that the backward is
    a gather, too (index_select's own would add)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, queries: Tensor, outputs: Tensor) -> Tensor:
        ctx.save_for_backward(outputs)
        return x.index_select(0, queries)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


class _Return(torch.autograd.Function):
    """(queries, ...) -> (L, ...)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, outputs: Tensor) -> Tensor:
        ctx.save_for_backward(outputs)
        ctx.rows = len(x)
        return x.index_select(0, outputs)

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
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    # Kept as it is, a view of GPT-2's one array for queries, keys and values would keep all of it.
    q = q.contiguous() if packing.dense else _Gather.apply(q, packing.queries, packing.outputs)
    k, v = k.index_select(0, packing.keys), v.index_select(0, packing.keys)
    n = [(len(r.bucket.members), r.bucket.queries, r.bucket.keys) for r in packing.rectangles]
    # The backward of `split` is one copy, that of slices several.
    parts = zip(packing.rectangles, n, q.split([rows * queries for rows, queries, _ in n]),
                *(x.split([rows * keys for rows, _, keys in n]) for x in (k, v)), strict=True)
    out = torch.cat([_rectangle(r.mask, rows, *qkv, scaling) for r, (rows, _, _), *qkv in parts])
    return (out if packing.dense else _Return.apply(out, packing.outputs))[None], None


def _rectangle(mask: Tensor | None, rows: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """(rows * queries or keys, heads, size) each, to (rows * queries, heads, size)."""
    q, k, v = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in (query, key, value))
    # Grouped queries: CUDA's kernels know them without a mask, in 16 bits.
    grouped = k.shape[1] < q.shape[1] and (not q.is_cuda or (mask is None and q.element_size() == 2))
    if k.shape[1] < q.shape[1] and not grouped:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(0, 1)


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
