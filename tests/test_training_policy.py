from __future__ import annotations

import copy

import pytest
import torch
from helpers_models import tiny_model

from poise_hpc.rollout import conformance
from poise_hpc.rollout.hf_engine import HFEngine
from poise_hpc.training import buckets, packing
from poise_hpc.training.logprobs import LogProb, entropies
from poise_hpc.training.policy import Policy

PROMPTS = {"equal": [[2, 3, 4], [5, 6, 7]], "ragged": [[2, 3, 4, 9, 9], [5, 6]]}
GROUP = torch.tensor([0, 0, 1, 1, 1])
TOKENS = torch.tensor([[7, 8, 1, 0], [9, 1, 0, 0], [1, 0, 0, 0], [4, 5, 6, 7], [4, 5, 6, 1]])
LENGTH = torch.tensor([3, 2, 1, 4, 4])


def oracle(model, prompts, group, tokens, length, temperature):
    """One plain forward per completion: log-probs and entropies (B, T)."""
    logp, entropy = (torch.zeros(tokens.shape, dtype=model.dtype) for _ in range(2))
    for i, (g, n) in enumerate(zip(group.tolist(), length.tolist())):
        x = torch.tensor(prompts[g] + tokens[i, :n].tolist())
        scores = torch.log_softmax(model(input_ids=x[None]).logits[0, len(prompts[g]) - 1:-1] / temperature, -1)
        logp[i, :n] = scores.gather(1, tokens[i, :n, None]).squeeze(1)
        entropy[i, :n] = -(scores.exp() * scores).sum(1)
    return logp, entropy


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_equals_a_plain_forward_with_its_gradients(kind, prompts, share_prompt):
    plain = tiny_model(kind)
    policy = Policy(copy.deepcopy(plain), 0.7, share_prompt)
    assert policy.packed == share_prompt
    weight = torch.randn(TOKENS.shape, generator=torch.Generator().manual_seed(1))
    results = []
    for model, (logp, entropy) in ((plain, oracle(plain, prompts, GROUP, TOKENS, LENGTH, 0.7)),
                                   (policy.model, policy(prompts, GROUP, TOKENS, LENGTH, entropy=True))):
        ((logp.exp() + entropy) * weight).sum().backward()
        results.append((logp, entropy, dict(model.named_parameters())))
    (logp, entropy, parameters), (logp2, entropy2, parameters2) = results
    torch.testing.assert_close(logp2, logp, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy2, entropy, atol=1e-5, rtol=1e-5)
    for name, p in parameters.items():
        torch.testing.assert_close(parameters2[name].grad, p.grad, atol=1e-5, rtol=1e-4, msg=lambda m: f"{name}: {m}")


def test_all_of_one_length_needs_no_padding():
    tokens, length = TOKENS[3:], LENGTH[3:]
    model = tiny_model("llama")
    p = packing.pack(PROMPTS["equal"][1:], torch.tensor([0, 0]), tokens, length)
    assert p.dense and p.tokens.tolist() == [[5, 6, 7, 4, 5, 6, 4, 5, 6]] and p.positions.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 5]]
    expected = oracle(model, PROMPTS["equal"][1:], [0, 0] and torch.tensor([0, 0]), tokens, length, 1.0)[0]
    torch.testing.assert_close(Policy(model, 1.0)(PROMPTS["equal"][1:], torch.tensor([0, 0]), tokens, length)[0], expected,
                               atol=1e-5, rtol=1e-5)


def test_only_one_token_each():
    model = tiny_model("gpt2")
    tokens, length = torch.tensor([[4], [5]]), torch.tensor([1, 1])
    expected = oracle(model, PROMPTS["ragged"], torch.tensor([0, 1]), tokens, length, 1.0)[0]
    logp = Policy(model, 1.0)(PROMPTS["ragged"], torch.tensor([0, 1]), tokens, length)[0]
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=1e-5)
    logp.sum().backward()


def test_pack_by_hand():
    p = packing.pack([[2, 3], [5]], torch.tensor([1, 0]), torch.tensor([[7, 8, 1], [9, 1, 0]]), torch.tensor([3, 2]))
    assert p.tokens.tolist() == [[2, 3, 5, 7, 8, 9]]
    assert p.positions.tolist() == [[0, 1, 0, 1, 2, 2]]
    assert p.logits_at.tolist() == [1, 2, 3, 4, 5]     # ends of the prompts, then the completions
    assert p.source.tolist() == [1, 2, 3, 0, 4] and p.target.tolist() == [7, 8, 1, 9, 1]
    # Rectangles: prompts, 2 3 | 5 .; completions, 7 8 | 9 ., whose keys are 5 . 7 8 | 2 3 9 .
    assert p.queries.tolist() == [0, 1, 2, 2, 3, 4, 5, 5]  # padding repeats a token
    assert p.outputs.tolist() == [0, 1, 2, 4, 5, 6]
    assert p.keys.tolist() == [0, 1, 2, 2, 2, 2, 3, 4, 0, 1, 5, 5] and not p.dense
    assert [r.mask is None for r in p.rectangles] == [True, False]
    seen = p.rectangles[1].mask == 0
    assert seen[0, 0].tolist() == [[True, False, True, False], [True, False, True, True]]
    assert seen[1, 0].tolist() == [[True, True, True, False], [True, True, True, True]]


def test_pack_whole_sequences_by_hand(monkeypatch):
    # Tiles of one token: 4 (4 + 1) / 2 = 10 cells of a whole sequence of four, 3 x (1 + 3) = 12 with a mask.
    monkeypatch.setattr(buckets, "TILE", 1)
    p = packing.pack([[2], [3]], torch.tensor([1, 0]), torch.tensor([[7, 8, 9, 1], [4, 5, 1, 0]]), torch.tensor([4, 3]))
    assert p.tokens.tolist() == [[2, 3, 7, 8, 9, 4, 5]]
    assert [r.mask is None for r in p.rectangles] == [True, True]
    assert p.queries.tolist() == p.keys.tolist() == [0, 1, 1, 2, 3, 4, 0, 5, 6, 6]  # 2 | 3; 3 7 8 9 | 2 4 5 .
    assert p.outputs.tolist() == [0, 1, 3, 4, 5, 7, 8]  # the prompts' from their own rectangle


@pytest.fixture
def small_buckets(monkeypatch):
    """Buckets cost nothing: a few tokens are in many, of both ways."""
    for name, value in (("TILE", 4), ("FLOOR", 1), ("SHARE", 0.0)):
        monkeypatch.setattr(buckets, name, value)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("prompt_lengths", [(9, 9), (3, 14)])
@pytest.mark.parametrize(("kind", "tolerance"), [("gpt2", 1e-10), ("llama", 1e-5), ("qwen2", 1e-5)])  # RMSNorm is float32, always
def test_several_buckets_equal_plain_forwards(small_buckets, kind, tolerance, prompt_lengths, recompute):
    g = torch.Generator().manual_seed(sum(prompt_lengths))
    prompts = [torch.randint(2, 16, (n,), generator=g).tolist() for n in prompt_lengths]
    length = torch.tensor([1, 4, 4, 25, 40, 2, 39, 8, 9, 30])
    group, tokens = torch.randint(2, (len(length),), generator=g), torch.randint(16, (len(length), 40), generator=g)
    plain = tiny_model(kind).double()
    policy = Policy(copy.deepcopy(plain), 0.7, recompute=recompute)
    weight = torch.randn(tokens.shape, generator=g, dtype=torch.float64)
    found, expected = policy(prompts, group, tokens, length, entropy=True), oracle(plain, prompts, group, tokens, length, 0.7)
    for logp, entropy in (found, expected):
        ((logp.exp() + entropy) * weight).sum().backward()
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    for (name, a), b in zip(plain.named_parameters(), policy.model.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, atol=tolerance, rtol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


def one_by_one(prompts, group, length, q, k, v):
    """Attention of each prompt, and of each completion after its prompt, in float64: (heads, L, size)."""
    ends = torch.tensor([*map(len, prompts), *(length - 1).tolist()]).cumsum(0).tolist()
    own = [range(a, b) for a, b in zip([0, *ends], ends)]
    rows = [[*own[g], *own[len(prompts) + i]] for i, g in enumerate(group.tolist())]
    outs = []
    for part, row in zip(own, [*own[:len(prompts)], *rows], strict=True):
        row = torch.tensor(row)
        scores = q[:, row] @ k.repeat_interleave(2, 0)[:, row].mT * 0.3
        seen = torch.ones(len(row), len(row), dtype=torch.bool).tril()
        out = torch.where(seen, scores, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 0)[:, row]
        outs.append(out[:, len(row) - len(part):])
    return torch.cat(outs, 1)


@pytest.mark.parametrize("seed", range(6))
def test_attention_of_any_lengths_equals_one_sequence_at_a_time(small_buckets, seed):
    """Grouped queries, float64, outputs and gradients."""
    g = torch.Generator().manual_seed(seed)
    prompts = [[2] * n for n in torch.randint(1, 30, (3,), generator=g).tolist()]
    group, length = torch.randint(3, (12,), generator=g), torch.randint(1, 60, (12,), generator=g)
    p = packing.pack(prompts, group, torch.ones(12, int(length.max()), dtype=torch.long), length, torch.float64)
    ways = [r.mask is None for r in p.rectangles[1:]]
    assert any(ways) and len(ways) > 3
    L = p.tokens.shape[1]
    qkv = [torch.randn(heads, L, 5, generator=g, dtype=torch.float64).requires_grad_() for heads in (4, 2, 2)]
    weight = torch.randn(4, L, 5, generator=g, dtype=torch.float64)
    out = packing.attention(None, *(x[None] for x in qkv), None, packing=p, scaling=0.3)[0][0].transpose(0, 1)
    expected = one_by_one(prompts, group, length, *qkv)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(torch.autograd.grad((out * weight).sum(), qkv), torch.autograd.grad((expected * weight).sum(), qkv),
                               atol=1e-12, rtol=1e-12)


def test_rollouts_with_a_packed_model_are_unchanged():
    model = tiny_model("qwen2")
    Policy(model, 1.0)
    conformance.check(HFEngine(model), model)


def test_sampler_and_policy_agree():
    """What makes `exact` true: the sampler's log-probs are the policy's."""
    model, prompts = tiny_model("qwen2"), [[2, 3, 4], [5, 6, 7, 8, 9]]
    r = HFEngine(model).generate(prompts, 4, temperature=0.8, max_new_tokens=9, eos_id=1, pad_id=0, keys=[1, 2])
    logp, _ = Policy(model, 0.8)(prompts, torch.arange(2).repeat_interleave(4), r.tokens, r.length)
    torch.testing.assert_close(logp, r.logp, atol=1e-5, rtol=1e-5)


def test_log_prob_and_entropy_by_hand():
    logits = torch.tensor([[0.0, 3.0], [0.0, 0.0]]).log1p().requires_grad_()  # odds 1:4, 1:1
    logp = LogProb.apply(logits, torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]))
    torch.testing.assert_close(logp.exp(), torch.tensor([0.2, 0.8, 0.5]))
    logp.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[1 - 2 * 0.2, 1 - 2 * 0.8], [-0.5, 0.5]]))
    torch.testing.assert_close(entropies(logits)[1], torch.tensor(2.0).log())
    torch.autograd.gradcheck(lambda x: LogProb.apply(x, torch.tensor([0, 0, 2]), torch.tensor([3, 1, 0])),
                             torch.randn(3, 4, dtype=torch.float64, requires_grad=True), atol=1e-3, eps=1e-3)


def test_unsupported_models_run_unpacked():
    model = tiny_model("llama")
    model.config.layer_types = ["full_attention", "sliding_attention"]
    assert not Policy(model, 1.0).packed
