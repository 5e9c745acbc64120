"""A key-value cache in buffers of their final size: decoding writes in place, where a growing cache copies itself
at every token.
"""
from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

CACHE_BYTES = 16 << 30  # of keys and values at a time; longer completions are sampled for fewer prompts together


def prompts_at_once(rows: int, n: int, prompt: int, completion: int, bytes_per_token: int) -> int:
    """How many prompts are sampled n times each in one batch: of `rows` completions and CACHE_BYTES at most, but at least one."""
    return max(1, min(rows // n, CACHE_BYTES // (bytes_per_token * (prompt + n * completion))))


class BufferLayer(CacheLayerMixin):
    """One layer's keys and values of the completions, (rows, heads, capacity, size), of which `used` positions are filled."""

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
        """Keep these rows; only what is filled is copied."""
        if self.used == 0:
            return
        keys, values = self.keys[:, :, :self.used], self.values[:, :, :self.used]
        self.keys = self.keys.new_empty(len(rows), *self.keys.shape[1:])
        self.values = self.values.new_empty(len(rows), *self.values.shape[1:])
        torch.index_select(keys, 0, rows, out=self.keys[:, :, :self.used])
        torch.index_select(values, 0, rows, out=self.values[:, :, :self.used])

    def get_seq_length(self) -> int:
        return self.used

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.used + query_length, 0

    def get_max_length(self) -> int:
        return -1  # `capacity` is ours: transformers would size masks by it
