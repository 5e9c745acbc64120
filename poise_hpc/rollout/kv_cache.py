"""A key-value cache in buffers of their final size: decoding writes in place, where a growing cache copies itself
at every token. For models whose every layer attends to the whole past.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from ..types import PoiseError


class BufferLayer(CacheLayerMixin):
    """One layer's keys and values, (rows, heads, capacity, head size), of which `used` positions are filled."""

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.used = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, heads, _, size = key_states.shape
        self.keys = key_states.new_empty(rows, heads, self.capacity, size)
        self.values = value_states.new_empty(rows, heads, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.used + key_states.shape[2]
        self.keys[:, :, self.used:end] = key_states
        self.values[:, :, self.used:end] = value_states
        self.used = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) these rows; only what is filled is copied."""
        keys, values, self.is_initialized = self.keys[:, :, :self.used], self.values[:, :, :self.used], False
        self.lazy_initialization(keys[:1].expand(len(rows), -1, -1, -1), values[:1])
        torch.index_select(keys, 0, rows, out=self.keys[:, :, :self.used])
        torch.index_select(values, 0, rows, out=self.values[:, :, :self.used])

    def get_seq_length(self) -> int:
        return self.used

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.used + query_length, 0

    def get_max_length(self) -> int:
        return -1  # `capacity` is ours: transformers would size masks by it


def buffer_cache(model: nn.Module, capacity: int) -> Cache:
    """An empty cache of `capacity` positions for `model`."""
    kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise PoiseError(f"{type(model).__name__} has layers of kind {', '.join(sorted(kinds))}; the transformers rollout engine "
                         f"wants full attention in every layer. Choose another model, or `rollout.engine: vllm`")
    return Cache(layers=[BufferLayer(capacity) for _ in range(model.config.num_hidden_layers)])
