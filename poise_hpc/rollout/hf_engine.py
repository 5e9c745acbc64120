"""Rollouts with any transformers causal LM: a decoding loop over a key-value cache.

What it saves against `model.generate`, all of it exact: a prompt is computed and kept once per group; no attention masks;
cache buffers of their final size; finished rows leave the batch; logits of the last position only; one uniform per
token, drawn beforehand.

Not covered: several devices, sliding-window and linear-attention layers, stop strings.
"""
from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from . import attention
from .base import RolloutEngine, Rollouts, uniforms
from .kv_cache import BufferLayer, prompts_at_once
from .recall import Recorder

COMPACT = 0.8  # finished rows leave once at most this share of the batch is alive: copying the cache costs, too


class HFEngine(RolloutEngine):
    """Samples from the very module it is given: `load_weights` keeps a reference, there is no second copy."""

    def __init__(self, model: nn.Module, rows_at_once: int = 1024, recall_bytes: int = 0):
        self.rows_at_once = rows_at_once
        self.recall_bytes = recall_bytes  # what may be kept for the update (`recall.py`); 0: nothing is
        self.exact = model.dtype == torch.float32  # in bfloat16 the order of summation shows in the log-probs
        self.load_weights(model)

    def load_weights(self, model: nn.Module) -> None:
        attention.install(model)
        self.model = model

    def generate(self, prompts: Sequence[Sequence[int]], n: int, *, temperature: float, max_new_tokens: int,
                 eos_id: int, pad_id: int, keys: Sequence[int], first: int = 0) -> Rollouts:
        if len(prompts) != len(keys) or not prompts:
            raise ValueError(f"{len(prompts)} prompts and {len(keys)} keys: one key per prompt, and at least one, were wanted")
        config = self.model.config.get_text_config()
        kept = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        kept *= 2 * config.num_hidden_layers * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        step = prompts_at_once(self.rows_at_once, n, max(map(len, prompts)), max_new_tokens, kept * self.model.dtype.itemsize)
        training = self.model.training
        self.model.eval()  # with dropout on, the log-probs would be those of no policy
        recorder = Recorder(self.model, len(prompts), max(map(len, prompts)), len(prompts) * n, max_new_tokens - 1)
        recorded = len(prompts) <= step and recorder.bytes <= self.recall_bytes
        with torch.inference_mode(), recorder.recording() if recorded else nullcontext():
            parts = [self._decode(prompts[i:i + step], n, temperature, eos_id, uniforms(keys[i:i + step], n, max_new_tokens, first), recorder)
                     for i in range(0, len(prompts), step)]
        self.model.train(training)
        tokens, logp = (torch.cat(part).cpu() for part in zip(*parts))
        return replace(finish(tokens, logp, eos_id, pad_id), recall=recorder.recall() if recorded else None)

    def _decode(self, prompts: Sequence[Sequence[int]], n: int, temperature: float, eos_id: int,
                uniform: object, recorder: Recorder) -> tuple[Tensor, Tensor]:
        """Tokens and log-probs (len(prompts) * n, max_new_tokens); what follows an end token is arbitrary."""
        from transformers.cache_utils import Cache

        device = self.model.device
        u = torch.as_tensor(uniform, device=device)
        N, T = u.shape
        tokens, logp = torch.zeros(N, T, dtype=torch.long, device=device), torch.zeros(N, T, device=device)
        x, mask = left_pad(prompts, device)
        position = torch.arange(x.shape[1], device=device)[None] if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
        out = self.model(input_ids=x, attention_mask=mask, position_ids=position, use_cache=True, logits_to_keep=1)

        rows = torch.arange(N, device=device)   # of the result: the rows still in the batch
        shared = attention.Prompts([(layer.keys, layer.values) for layer in out.past_key_values.layers],
                                   None if mask is None else mask.bool(), n, rows)
        cache = Cache(layers=[BufferLayer(T) for _ in shared.layers])
        position = position[:, -1].expand(len(prompts))[rows // n, None]
        logits = out.logits[rows // n, -1]
        alive = torch.ones(N, dtype=torch.bool, device=device)
        unmasked = torch.ones(1, 1, 1, 1, device=device)  # four dimensions: transformers makes no mask of its own
        for t in range(T):
            token, token_logp = sample(logits, temperature, u[rows, t])
            tokens[rows, t], logp[rows, t] = token, token_logp
            alive &= token != eos_id
            left = int(alive.sum())
            if left == 0 or t == T - 1:
                break
            if left <= COMPACT * len(rows):
                keep = alive.nonzero().squeeze(1)
                rows, token, position, alive = rows[keep], token[keep], position[keep], alive[keep]
                shared.row = rows
                for layer in cache.layers:
                    layer.select(keep)
            position = position + 1
            recorder.decode(rows, t)
            logits = self.model(input_ids=token[:, None], attention_mask=unmasked, position_ids=position,
                                past_key_values=cache, use_cache=True, prompts=shared).logits[:, -1]
        return tokens, logp


def sample(logits: Tensor, temperature: float, u: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (B,) and their log-probs (B,) float32 from logits (B, V): the inverse of the distribution function at
    u (B,) in [0, 1), or the most likely token at temperature 0, whose log-prob is taken at temperature 1."""
    scores = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token = scores.argmax(-1)
    else:
        # float64: summed over a large vocabulary, float32 would lose what distinguishes rare tokens
        cdf = scores.exp().cumsum(-1, dtype=torch.float64)
        token = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True).squeeze(1).clamp(max=cdf.shape[1] - 1)
    return token, scores.gather(1, token[:, None]).squeeze(1)


def left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Prompts (B, P), padded with 0 on the left, and the attention mask (B, P); None where there is no padding."""
    lengths = [len(p) for p in prompts]
    if min(lengths) == 0:
        raise ValueError("an empty prompt: at least one token (the begin token) is wanted")
    P = max(lengths)
    x = torch.tensor([[0] * (P - len(p)) + list(p) for p in prompts], device=device)
    if min(lengths) == P:
        return x, None
    return x, (torch.arange(P, device=device) >= P - torch.tensor(lengths, device=device)[:, None]).long()


def finish(tokens: Tensor, logp: Tensor, eos_id: int, pad_id: int) -> Rollouts:
    """Cut each row after its first end token, and all rows at the longest."""
    ended = tokens == eos_id
    truncated = ~ended.any(1)
    length = torch.where(truncated, tokens.shape[1], ended.int().argmax(1) + 1)
    tokens, logp = tokens[:, :length.max()], logp[:, :length.max()]
    padding = torch.arange(tokens.shape[1]) >= length[:, None]
    return Rollouts(tokens.masked_fill(padding, pad_id), logp.masked_fill(padding, 0.0), length, truncated)
