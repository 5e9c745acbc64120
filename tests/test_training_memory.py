"""Log-probs without all logits: equal to the plain ones, and nothing of tokens x vocabulary is ever made."""
from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers_models import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from poise_hpc.training import logprobs
from poise_hpc.training.batch import deal
from poise_hpc.training.logprobs import Form, Head
from poise_hpc.training.policy import Policy, recompute_layers
from poise_hpc.types import PoiseError

FORMS = {"plain": Form(), "scale": Form(scale=0.25), "cap": Form(cap=3.0), "both": Form(scale=1.5, cap=2.0)}
SOURCE = torch.tensor([0, 4, 4, 1, 8, 2, 6])  # of 9 rows: several tokens from one, none from others


def plain(hidden, weight, bias, source, target, form, temperature):
    z = torch.nn.functional.linear(hidden, weight, bias) * form.scale
    z = z if form.cap is None else form.cap * torch.tanh(z / form.cap)
    logp = torch.log_softmax(z / temperature, -1)
    return logp[source, target], -(logp.exp() * logp).sum(-1)


def inputs(dtype, vocabulary=11, bias=True):
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 5, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for n in (9, vocabulary))
    b = torch.randn(vocabulary, generator=g, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    return hidden, weight, b, torch.randint(vocabulary, (len(SOURCE),), generator=g)


@pytest.fixture
def small_pieces(monkeypatch):
    """Two rows of 11 logits at a time: nine rows are five pieces."""
    monkeypatch.setattr(logprobs, "AT_ONCE", 22)
    monkeypatch.setattr(logprobs, "LARGE", 1)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_equals_plain_log_softmax(small_pieces, dtype, tolerance, form, bias):
    results = []
    for fused in (False, True):
        hidden, weight, b, target = inputs(dtype, bias=bias)
        arguments = (hidden, weight, b, SOURCE, target, form, 0.7)
        logp, H = logprobs.HeadLogProb.apply(*arguments, True) if fused else plain(*arguments)
        (torch.sin(logp).sum() + (H * torch.arange(9)).sum()).backward()
        results.append((logp, H, hidden.grad, weight.grad, *([b.grad] if bias else [])))
    for a, b in zip(*results):
        torch.testing.assert_close(b, a, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_gradcheck(small_pieces, form):
    hidden, weight, b, target = inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda *x: logprobs.HeadLogProb.apply(*x, SOURCE, target, form, 0.7, True), (hidden, weight, b))
    assert torch.autograd.gradcheck(lambda *x: logprobs.HeadLogProb.apply(*x, None, SOURCE, target, form, 1.0, False), (hidden, weight))


def test_bfloat16_is_as_exact_as_the_plain_way(small_pieces):
    exact = inputs(torch.bfloat16)
    wanted = plain(*(None if x is None else x.detach().double() for x in exact[:3]), SOURCE, exact[3], Form(), 1.0)[0]
    fused = logprobs.HeadLogProb.apply(*exact[:3], SOURCE, exact[3], Form(), 1.0, False)[0]
    assert fused.dtype == torch.float32
    error, plain_error = ((x - wanted).abs().max() for x in (fused, plain(*exact[:3], SOURCE, exact[3], Form(), 1.0)[0]))
    assert error < 0.05 and error <= plain_error  # log_softmax's own result would be rounded to 8 bits


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gives, forward and backward."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy", [False, True])
def test_no_tensor_of_tokens_x_vocabulary(monkeypatch, dtype, entropy):
    tokens, vocabulary, width = 60, 500, 8
    monkeypatch.setattr(logprobs, "AT_ONCE", 10 * vocabulary)
    linear = torch.nn.Linear(width, vocabulary, bias=False, dtype=dtype)
    hidden, source = torch.randn(tokens, width, dtype=dtype, requires_grad=True), torch.arange(tokens)
    with Largest() as seen:
        sum(x.sum() for x in Head(linear, Form())(hidden, source, source, 0.9, entropy)).backward()
    assert seen.numel == 10 * vocabulary
    with Largest() as seen:  # the plain way does make them
        logprobs.from_logits(linear(hidden), source, source, entropy)[0].sum().backward()
    assert seen.numel == tokens * vocabulary


PROMPTS, GROUP = [[2, 3, 4, 9, 9], [5, 6]], torch.tensor([0, 0, 1])
TOKENS, LENGTH = torch.tensor([[7, 8, 1, 0], [9, 1, 0, 0], [4, 5, 6, 7]]), torch.tensor([3, 2, 4])


def gemma2():
    """Soft-capped logits, tied embeddings, a sliding window: runs unpacked."""
    import transformers as tf

    torch.manual_seed(0)
    return tf.Gemma2ForCausalLM(tf.Gemma2Config(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=4,
        final_logit_softcapping=0.5, query_pre_attn_scalar=4, max_position_embeddings=64, initializer_range=0.3)).eval()


def granite():
    import transformers as tf

    torch.manual_seed(0)
    return tf.GraniteForCausalLM(tf.GraniteConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        logits_scaling=4.0, initializer_range=0.3, max_position_embeddings=64, tie_word_embeddings=True)).eval()


MODELS = {"gpt2": lambda: tiny_model("gpt2"), "qwen2": lambda: tiny_model("qwen2"), "gemma2": gemma2, "granite": granite}


def outcome(policy):
    logp, entropy = policy(PROMPTS, GROUP, TOKENS, LENGTH, entropy=True)
    ((logp.exp() + 0.1 * entropy) * torch.arange(1, 13).view(3, 4)).sum().backward()
    return logp, entropy, {n: p.grad for n, p in policy.model.named_parameters()}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("change", ["head", "recompute", "both"])
def test_a_policy_without_logits_or_activations_is_the_same_policy(monkeypatch, kind, change):
    model = MODELS[kind]()
    expected = outcome(Policy(copy.deepcopy(model), 0.7))
    if change != "recompute":
        monkeypatch.setattr(logprobs, "AT_ONCE", 40)
        monkeypatch.setattr(logprobs, "LARGE", 1)
    policy = Policy(model, 0.7, recompute=change != "head")
    assert (policy.head is not None) == (change != "recompute")
    if policy.head is not None:
        policy.model.lm_head.forward = None  # not called any more
    logp, entropy, gradients = outcome(policy)
    torch.testing.assert_close(logp, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, expected[1], atol=1e-5, rtol=1e-5)
    assert gradients.keys() == expected[2].keys()
    for name, g in gradients.items():
        torch.testing.assert_close(g, expected[2][name], atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_a_model_that_does_more_to_its_logits_keeps_them(small_pieces, capsys):
    model = tiny_model("qwen2")
    model.lm_head.register_forward_hook(lambda module, arguments, out: 2 * out)
    assert Policy(model, 1.0).head is None and "Qwen2ForCausalLM: logits are more than" in capsys.readouterr().out


def test_layers_are_computed_again_in_the_backward_only():
    policy, calls = Policy(tiny_model("qwen2"), 1.0, recompute=True), []
    policy.model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        policy(PROMPTS, GROUP, TOKENS, LENGTH)
    assert len(calls) == 1
    policy(PROMPTS, GROUP, TOKENS, LENGTH)[0].sum().backward()
    assert len(calls) == 3


def test_a_model_whose_layers_cannot_be_recomputed_is_refused():
    with pytest.raises(PoiseError, match="Linear has no layers that transformers can checkpoint"):
        recompute_layers(torch.nn.Linear(2, 2))


def test_peak_by_hand():
    # 32k tokens x 152k symbols, bfloat16, 1536 wide: pieces of 883 rows
    found = logprobs.peak_bytes(32768, 151936, 1536)
    assert found == {"logits": 883 * 151936 * 10, "weight gradient": 151936 * 1536 * 6, "hidden gradient": 32768 * 1536 * 2}
    assert sum(found.values()) < 2.9e9 < 32768 * 151936 * 4  # one float32 copy of all logits: 19.9 GB


@pytest.mark.parametrize("ranks", [1, 8])
def test_microbatches_of_natural_lengths_are_full(ranks):
    """256 groups of 8, log-normal lengths with a mean of 640 tokens, up to 3,072: the mathematics setting."""
    rng = np.random.default_rng(0)
    prompt, group = torch.tensor(rng.integers(60, 400, 256)), torch.arange(256).repeat_interleave(8)
    length = torch.tensor(np.clip(rng.lognormal(6.3, 0.6, 2048), 20, 3072).astype(int))
    dealt = deal(torch.arange(2048), group, length, prompt, ranks, 32768)
    assert sorted(torch.cat([rows for rank in dealt for rows in rank]).tolist()) == list(range(2048))
    tokens = [[int(length[rows].sum() + prompt[group[rows].unique()].sum()) for rows in rank if len(rows)] for rank in dealt]
    assert max(max(rank) for rank in tokens) <= 32768
    per_rank = [sum(rank) for rank in tokens]
    assert max(per_rank) < 1.01 * sum(per_rank) / ranks                                   # no rank waits for another
    assert sum(per_rank) > 0.85 * 32768 * sum(len(rank) for rank in tokens)               # filled
