"""What decoding keeps is what a forward would compute, and is found by the right tokens."""
from __future__ import annotations

import helpers_training as h
import pytest
import torch
from helpers_models import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from poise_hpc.rollout.hf_engine import HFEngine
from poise_hpc.training import buckets
from poise_hpc.training.batch import take_groups
from poise_hpc.training.policy import Policy

PROMPTS = {"equal": [[2, 3, 4], [5, 6, 7], [8, 9, 2]], "ragged": [[2, 3, 4, 9, 9], [5, 6], [7, 8, 9]]}
NEVER = 99  # an end token outside of the vocabulary: all completions have all their tokens
N = 4       # per prompt


def drawn(model, prompts, eos=1, limit=1 << 30, **options):
    return HFEngine(model, recall_bytes=limit, **options).generate(
        prompts, N, temperature=0.8, max_new_tokens=7, eos_id=eos, pad_id=0, keys=range(len(prompts)))


def forward(policy, prompts, groups, rows, r, recall=None):
    """Log-probs of these rows, which belong to these groups, their gradients, and the forward's FLOPs in products."""
    chosen, group = [prompts[g] for g in groups], torch.tensor([groups.index(i // N) for i in rows.tolist()])
    arguments = chosen, group, r.tokens[rows, :int(r.length[rows].max())], r.length[rows]
    policy.zero_grad()
    with FlopCounterMode(display=False) as flops:
        if recall is None:
            logp = policy(*arguments)[0]
        else:
            with recall.replay(torch.tensor(groups), list(map(len, chosen)), rows, r.length[rows]):
                logp = policy(*arguments)[0]
    (logp * torch.linspace(-1, 1, logp.numel()).view(logp.shape)).sum().backward()
    return logp.detach(), {name: p.grad.clone() for name, p in policy.named_parameters()}, flops.get_total_flops()


@pytest.mark.parametrize("eos", [1, NEVER], ids=["natural", "fixed"])
@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_replay_equals_a_plain_forward_with_its_gradients(monkeypatch, kind, prompts, eos):
    if kind == "qwen2":  # llama in one bucket, this in several
        monkeypatch.setattr(buckets, "FLOOR", 1)
    policy = Policy(tiny_model(kind), 0.8)
    r = drawn(policy.model, prompts, eos)
    assert len(r.recall.outputs) == 2 * 7, "seven linear layers in each of two blocks"
    for groups, rows in (([0, 1, 2], torch.arange(12)), ([0, 2], torch.tensor([9, 8, 11, 1, 3]))):
        (a, da, plain), (b, db, replayed) = (forward(policy, prompts, groups, rows, r, recall) for recall in (None, r.recall))
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-5)
        for name in da:
            torch.testing.assert_close(db[name], da[name], atol=2e-4, rtol=1e-4)
        assert replayed < 0.2 * plain, "attention and the head are all that is left"


def test_fixed_lengths_need_no_copies():
    policy = Policy(tiny_model("qwen2"), 0.8)
    r = drawn(policy.model, PROMPTS["equal"], NEVER)
    with r.recall.replay(torch.arange(3), [3, 3, 3], torch.arange(12), r.length):
        layer = policy.model.model.layers[0].mlp.up_proj
        known = layer(torch.zeros(1, 3 * 3 + 12 * 6, 16))
    assert known.data_ptr() == r.recall.outputs[layer.weight].data_ptr()


def test_sampling_is_not_disturbed():
    model = tiny_model("qwen2")
    with_recall, without = drawn(model, PROMPTS["ragged"]), drawn(model, PROMPTS["ragged"], limit=0)
    assert with_recall.tokens.equal(without.tokens) and with_recall.logp.equal(without.logp)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("options", [{"limit": 1000}, {"rows_at_once": 8}], ids=["too much memory", "in parts"])
def test_nothing_is_kept(options):
    assert drawn(tiny_model("qwen2"), PROMPTS["equal"], **options).recall is None


def test_layers_that_are_not_linear_are_computed():
    assert drawn(tiny_model("gpt2"), PROMPTS["equal"]).recall is None


def test_layers_not_called_once_per_token_are_computed():
    """Once twice, once for some of the tokens, once not at all after the prompt."""
    model = tiny_model("qwen2")
    mlps = [model.model.layers[i].mlp for i in range(2)]
    up, gate, twice, decoding = mlps[0].up_proj, mlps[0].gate_proj, mlps[1].up_proj, mlps[1].gate_proj
    mlps[0].forward = lambda x: mlps[0].down_proj(torch.cat([up(x[:1]), up(x[1:])]) * gate(x))
    mlps[1].forward = lambda x: mlps[1].down_proj(twice(x) * twice(x) + (decoding(x) if x.shape[1] > 1 else 0))
    kept = drawn(model, PROMPTS["equal"]).recall.outputs
    assert len(kept) == 14 - 3 and not {up.weight, twice.weight, decoding.weight} & kept.keys()


def test_groups_left_out_are_renumbered():
    trainer = h.make_trainer(h.make_config())
    batch = trainer.sample(0, 0, 6, loop_clock())
    part = take_groups(batch, torch.tensor([False, True, False, True, True, False]))
    rows = torch.arange(12)
    expected = trainer.forward(trainer.engine, without_recall(part), rows, False)[0]
    with FlopCounterMode(display=False) as flops:
        torch.testing.assert_close(trainer.forward(trainer.engine, part, rows, False)[0], expected, atol=1e-5, rtol=1e-5)
    assert part.recall.rows.tolist() == [4, 5, 6, 7, 12, 13, 14, 15, 16, 17, 18, 19]
    with FlopCounterMode(display=False) as plain:
        trainer.forward(trainer.engine, without_recall(part), rows, False)
    assert flops.get_total_flops() < 0.2 * plain.get_total_flops()


def test_only_the_first_update_of_a_step_replays(monkeypatch):
    trainer, seen = h.make_trainer(h.make_config()), []
    original = trainer.forward
    monkeypatch.setattr(trainer, "forward", lambda policy, batch, *rest: (seen.append(batch.recall is not None), original(policy, batch, *rest))[1])
    for step in range(2):
        trainer.step(step)
    assert seen == 2 * [True, False, False, False], "two epochs of two minibatches"


@pytest.fixture(scope="module", autouse=True)
def _ranks():
    h.start_alone()


def loop_clock():
    from poise_hpc.training.metrics import Stopwatch

    return Stopwatch()


def without_recall(batch):
    from dataclasses import replace

    return replace(batch, recall=None)
