"""Rollouts: completions sampled from the policy, with the log-probs they were drawn at.

Randomness is an argument. Row (i, j), sample j of prompt i, draws its tokens with uniforms that are a pure function of
(keys[i], j, position): counter-based streams, so nothing depends on the batch a row is in, on the rank, or on what was
drawn before. The arithmetic of a batched model may still differ in the last bits between batches.
"""
from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..types import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..config import Config
    from .recall import Recall


@dataclass(frozen=True)
class Rollouts:
    """N completions on the CPU, right-padded to the longest (T tokens). Values at padded tokens: pad_id and 0."""

    tokens: Tensor     # (N, T) int64; the end token is part of a completion
    logp: Tensor       # (N, T) float32, log-prob at the sampling temperature (at 1 for greedy)
    length: Tensor     # (N,) int64, tokens before the padding, at least 1
    truncated: Tensor  # (N,) bool, no end token within max_new_tokens
    recall: Recall | None = None  # what a forward over these completions need not compute again; None: nothing was kept

    @property
    def mask(self) -> Tensor:
        """(N, T) bool, True on sampled tokens."""
        import torch

        return torch.arange(self.tokens.shape[1]) < self.length[:, None]


class RolloutEngine(Protocol):
    """A sampler. `rollout.conformance.check` is its contract, executable."""

    exact: bool                # its log-probs are the trainer's own model's: logp_old need not be computed again
    copies: bool = False       # it keeps weights of its own, and takes them parameter by parameter
    collective: bool = False   # several ranks compute together: each calls `generate`, without prompts, too

    def generate(self, prompts: Sequence[Sequence[int]], n: int, *, temperature: float, max_new_tokens: int,
                 eos_id: int, pad_id: int, keys: Sequence[int], first: int = 0) -> Rollouts:
        """n completions of each prompt; row i * n + j is sample `first` + j of prompt i. Plain sampling from the softmax
        (no top-p, no top-k); temperature 0 is greedy. `keys[i]` is from `stream_key`."""

    def load_weights(self, model: nn.Module) -> None:
        """Sample from `model`'s present weights from now on."""

    def rest(self) -> None:
        """Nothing is sampled until the next `load_weights`: memory that can be given back is."""


def check_installed(config: Config) -> None:
    """UsageError if the config wants vLLM and this environment has none."""
    if wants_vllm(config) and importlib.util.find_spec("vllm") is None:
        raise UsageError("rollout.engine or evaluate.engine is 'vllm', and vLLM is not installed in this Python environment: "
                         "pip install 'poise_hpc[vllm]', or give 'hf'")


def wants_vllm(config: Config) -> bool:
    return "vllm" in (config.rollout.engine, config.evaluation_engine)


def stream_key(*parts: int | str) -> int:
    """64-bit key of a random stream, e.g. stream_key(seed, step, round, prompt). Any change of a part is a new stream."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def uniforms(keys: Sequence[int], n: int, length: int, first: int = 0) -> np.ndarray:
    """(len(keys) * n, length) float64 in [0, 1): row i * n + j is a pure function of (keys[i], first + j), and a prefix of
    what a longer `length` gives."""
    key = np.repeat(np.asarray(keys, dtype=np.uint64), n)[:, None]
    sample = np.tile(np.arange(first, first + n, dtype=np.uint64), len(keys))[:, None]
    block = np.arange((length + 1) // 2, dtype=np.uint64)[None, :]
    zero = np.zeros((len(key), block.shape[1]), dtype=np.uint64)
    words = philox((block + zero, sample + zero, zero, zero), (key & _LOW, key >> np.uint64(32)))
    bits = np.stack([(words[0] << np.uint64(32)) | words[1], (words[2] << np.uint64(32)) | words[3]], axis=-1)
    return ((bits >> np.uint64(11)) * 2.0**-53).reshape(len(key), -1)[:, :length]


_LOW = np.uint64(0xFFFFFFFF)


def philox(counter: tuple[np.ndarray, ...], key: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, ...]:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): four 32-bit words of counter
    and two of key, in uint64 arrays, to four random 32-bit words. Elementwise."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> np.uint64(32)) ^ c1 ^ k0, p1 & _LOW, (p0 >> np.uint64(32)) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _LOW, (k1 + np.uint64(0xBB67AE85)) & _LOW
    return c0, c1, c2, c3
