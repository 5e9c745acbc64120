from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers_models import tiny_model

from poise_hpc.rollout import attention, conformance
from poise_hpc.rollout.base import philox, stream_key, uniforms
from poise_hpc.rollout.hf_engine import HFEngine, finish, left_pad, sample
from poise_hpc.types import PoiseError

ARGUMENTS = {"temperature": 1.0, "max_new_tokens": 12, "eos_id": 1, "pad_id": 0}


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_transformers_engine_conforms(kind):
    model = tiny_model(kind)
    conformance.check(HFEngine(model), model)


def test_conformance_notices_stale_weights():
    class Stale(HFEngine):
        def load_weights(self, model):
            import copy
            if not hasattr(self, "model"):
                self.model = copy.deepcopy(model)

    model = tiny_model("gpt2")
    with pytest.raises(AssertionError, match="differ from the model's"):
        conformance.check(Stale(model), model)


@pytest.mark.parametrize("counter, key, expected", [  # known answers of Random123
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
])
def test_philox_known_answers(counter, key, expected):
    words = philox(tuple(np.array([c], np.uint64) for c in counter), tuple(np.array([k], np.uint64) for k in key))
    assert tuple(int(w[0]) for w in words) == expected


def test_uniforms_depend_on_key_and_sample_only():
    u = uniforms([7, 2**64 - 1], 3, 5)
    np.testing.assert_array_equal(uniforms([2**64 - 1], 2, 9)[1, :5], u[4])
    assert len(np.unique(u)) == u.size and 0 <= u.min() and u.max() < 1
    assert abs(uniforms(range(50), 4, 100).mean() - 0.5) < 0.01  # 20,000 draws: sd 0.002
    assert stream_key(0, 1) != stream_key(1, 0) and 0 <= stream_key("x") < 2**64


def test_sample_is_the_inverse_cdf():
    logits = torch.tensor([0.5, 0.25, 0.0, 0.25]).log().expand(5, 4)  # token 2 is impossible
    token, logp = sample(logits, 1.0, torch.tensor([0.0, 0.49, 0.51, 0.76, 1 - 2**-53], dtype=torch.float64))
    assert token.tolist() == [0, 0, 1, 3, 3]
    torch.testing.assert_close(logp.exp(), torch.tensor([0.5, 0.5, 0.25, 0.25, 0.25]))
    token, logp = sample(logits, 0.5, torch.tensor([0.6, 0.67, 0.9, 0.9, 0.9], dtype=torch.float64))  # p^2: 4/6, 1/6, 0, 1/6
    assert token.tolist() == [0, 1, 3, 3, 3]
    assert sample(logits, 0.0, torch.rand(5))[0].tolist() == [0] * 5


def test_finish_cuts_after_the_first_end_token():
    r = finish(torch.tensor([[5, 1, 9, 9], [5, 6, 7, 9], [1, 1, 1, 9]]), -torch.ones(3, 4), eos_id=1, pad_id=0)
    assert r.tokens.tolist() == [[5, 1, 0, 0], [5, 6, 7, 9], [1, 0, 0, 0]]
    assert r.length.tolist() == [2, 4, 1] and r.truncated.tolist() == [False, True, False]
    assert r.logp.sum(1).tolist() == [-2, -4, -1]


def test_rows_leave_the_batch_without_changing_the_rest(monkeypatch):
    model, prompts, keys = tiny_model("qwen2"), [[2, 3, 4], [5, 6, 7]], [1, 2]
    early = HFEngine(model).generate(prompts, 16, keys=keys, **ARGUMENTS)
    assert 2 < early.length.float().mean() < 11  # rows do end at different times
    monkeypatch.setattr("poise_hpc.rollout.hf_engine.COMPACT", -1.0)
    never = HFEngine(model).generate(prompts, 16, keys=keys, **ARGUMENTS)
    small = HFEngine(model, rows_at_once=16).generate(prompts, 16, keys=keys, **ARGUMENTS)
    for other in (never, small):
        assert early.tokens.equal(other.tokens) and early.truncated.equal(other.truncated)
        torch.testing.assert_close(early.logp, other.logp, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind, kept", [("qwen2", 2 * 2 * 2 * 4 * 4), ("gpt2", 2 * 2 * 4 * 4 * 4)])  # layers, keys and values, heads, size, bytes
def test_a_large_cache_is_filled_for_fewer_prompts_at_a_time(monkeypatch, kind, kept):
    engine, prompts, together = HFEngine(tiny_model(kind)), [[2, 3, 4], [5, 6, 7], [3, 3, 3]], []
    decode = engine._decode
    monkeypatch.setattr(engine, "_decode", lambda part, *rest: (together.append(len(part)), decode(part, *rest))[1])
    whole = engine.generate(prompts, 4, keys=[1, 2, 3], **ARGUMENTS)
    monkeypatch.setattr("poise_hpc.rollout.kv_cache.CACHE_BYTES", 2 * kept * (3 + 4 * 12))
    parts = engine.generate(prompts, 4, keys=[1, 2, 3], **ARGUMENTS)
    monkeypatch.setattr("poise_hpc.rollout.kv_cache.CACHE_BYTES", 2 * kept * (3 + 4 * 12) - 1)
    engine.generate(prompts, 4, keys=[1, 2, 3], **ARGUMENTS)
    assert together == [3, 2, 1, 1, 1, 1] and parts.tokens.equal(whole.tokens)


def test_dropout_is_off_while_sampling_and_the_mode_is_kept():
    model = tiny_model("gpt2").train()
    a, b = (HFEngine(model).generate([[2, 3]], 8, keys=[5], **ARGUMENTS) for _ in range(2))
    assert a.logp.equal(b.logp) and model.training


@pytest.mark.parametrize("left", [range(6), [1, 4, 5]], ids=["all", "some finished"])
def test_decoding_attention_is_softmax_over_prompt_and_completion(left):
    """Against the formula, for 2 prompts of 4 and 2 tokens, 3 rows each, 4 heads that share 2 key-value heads."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(6, 4, 1, 8, generator=draw), *torch.randn(2, 6, 2, 3, 8, generator=draw)
    pk, pv = torch.randn(2, 2, 2, 4, 8, generator=draw)
    mask = torch.tensor([[True, True, True, True], [False, False, True, True]])
    row = torch.tensor(left)
    prompts = attention.Prompts([(pk, pv)], mask, 3, row)
    module = type("Layer", (), {"layer_idx": 0})()
    out, _ = attention.attention(module, q[row], k[row], v[row], None, scaling=0.5, prompts=prompts)
    for b, i in enumerate(left):
        for head in range(4):
            keys = torch.cat([pk[i // 3, head // 2][mask[i // 3]], k[i, head // 2]])
            values = torch.cat([pv[i // 3, head // 2][mask[i // 3]], v[i, head // 2]])
            torch.testing.assert_close(out[b, 0, head], (0.5 * keys @ q[i, head, 0]).softmax(0) @ values)


def test_bad_input_is_named():
    model = tiny_model("gpt2")
    with pytest.raises(ValueError, match="2 prompts and 1 keys"):
        HFEngine(model).generate([[2], [3]], 2, keys=[0], **ARGUMENTS)
    with pytest.raises(ValueError, match="empty prompt"):
        left_pad([[2], []], torch.device("cpu"))
    model = tiny_model("gpt2")
    model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(PoiseError, match="sliding_attention"):
        HFEngine(model).generate([[2]], 2, keys=[0], **ARGUMENTS)
