"""The memory estimate: its sums by hand, what autograd keeps counted in real models, and that it moves the right way."""
from __future__ import annotations

import pytest
import torch
import transformers
from helpers_models import tiny_model

from poise_hpc import config as configuration
from poise_hpc.planning import memory, shape
from poise_hpc.planning.devices import GIB
from poise_hpc.planning.memory import Lengths
from poise_hpc.settings import overlay
from poise_hpc.training.policy import Policy

SHAPE = shape.Shape("Made up", parameters=1_000_000, looked_up=0, layers=3, hidden=10, intermediate=40, heads=2, kv_heads=1, head_dim=5,
                    vocabulary=50, gated=True)
LENGTHS = Lengths(prompt=6, completion=8, mean=8)


def make(train=None, ranks=1, dtype="float32", **sections):
    return configuration.parse(overlay({
        "model": {"dtype": dtype}, "rollout": {"prompts": 8, "group_size": 4}, "jobs": {"ranks": ranks},
        "train": {"minibatches": 1, "microbatch_tokens": 76} | (train or {})}, sections))


def lines(config, **given):
    return {(line.name, phase): line.bytes for line in memory.estimate(SHAPE, config, LENGTHS, **given).lines for phase in line.phases}


def state(config):
    """Megabytes of weights, gradients and optimizer in the step: one byte a parameter is one."""
    return sum(line.bytes for line in memory.state(SHAPE, config, True, False) if "step" in line.phases) / 1e6


@pytest.mark.parametrize(("train", "ranks", "dtype", "megabytes"), [
    ({"zero_stage": 0}, 1, "float32", 4 + 4 + 8),                               # weights, gradients, Adam
    ({"zero_stage": 0}, 4, "float32", 4 + 4 + 8 + 4),                           # and a bucket, all of it
    ({"zero_stage": 0}, 1, "bfloat16", 2 + 2 + 4 + 8 + 4),                      # gradients and their sum in float32, master weights
    ({"zero_stage": 1}, 4, "bfloat16", 2 + 2 + 4 + (4 + 8) / 4),                # the optimizer's divided by the ranks
    ({"zero_stage": 2}, 4, "bfloat16", 2 + (4 + 4 + 8 + 4) / 4),                # gradients too, as they come and as the optimizer takes them
    ({"zero_stage": 3}, 4, "bfloat16", (2 + 4 + 4 + 8 + 4) / 4),                # weights too
    ({"zero_stage": 2, "deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}}, 4, "bfloat16", 2),
])
def test_state_by_hand(train, ranks, dtype, megabytes):
    assert state(make(train, ranks, dtype)) == pytest.approx(megabytes)


def test_under_zero_3_only_the_transformers_sampler_needs_whole_weights_and_only_while_it_samples():
    def copies(engine):
        config = configuration.parse({"train": {"zero_stage": 3}, "rollout": {"engine": engine}, "jobs": {"ranks": 4}})
        return [(line.bytes, line.phases) for line in memory.state(SHAPE, config, True, False) if line.name == "weights, to sample from"]

    assert copies("hf") == [(4e6, ("rollout",))] and copies("vllm") == []


def test_reduction_bucket_is_deepspeeds_default_on_a_gpu_and_as_large_as_the_model_at_most_on_a_cpu():
    config = make({"zero_stage": 2}, 2, "bfloat16")
    assert lines(config)["reduction bucket", "backward"] == 2 * 500_000_000
    assert lines(config, gpu=False)["reduction bucket", "backward"] == 2 * 1_000_000


def test_cache_by_hand():
    # 8 prompts of 6 and 32 completions of 8 tokens; keys and values of 3 layers x 1 head x 5: 30 numbers a token.
    found = lines(make())
    assert found["cache of keys and values", "rollout"] == 30 * 4 * (32 * 8 + 8 * 6)
    assert found["logits of the last tokens", "rollout"] == 32 * 50 * 24


def test_the_transformers_sampler_takes_as_many_prompts_together_as_their_cache_allows(monkeypatch):
    from poise_hpc.rollout import kv_cache

    assert kv_cache.prompts_at_once(1024, 4, 6, 8, 120) == 256   # 1,024 completions
    monkeypatch.setattr(kv_cache, "CACHE_BYTES", 120 * (6 + 4 * 8) * 3 + 1)
    assert kv_cache.prompts_at_once(1024, 4, 6, 8, 120) == 3     # as many as fit
    assert kv_cache.prompts_at_once(1024, 400, 6, 8, 120) == 1   # at least one
    assert lines(make())["cache of keys and values", "rollout"] == 30 * 4 * (6 + 4 * 8) * 3


def test_vllm_needs_room_for_its_weights():
    """1,000,000 parameters of 4 bytes, and 14 tokens of 120 bytes, in a share of 0.4 of the memory."""
    def lacks(gb, **rollout):
        config = configuration.parse({"rollout": {"engine": "vllm", **rollout}, "jobs": {"ranks": 2, "evaluate_by": "seed"}})
        return memory.vllm_lacks(SHAPE, config, LENGTHS, gb)

    needed = (4e6 + 14 * 120) / 2**30
    assert lacks(1.001 * needed / 0.4) == "" and "tensor_parallel: 2" in lacks(0.999 * needed / 0.4)
    assert lacks(0.501 * needed / 0.4, tensor_parallel=2) == ""
    assert lacks(1.001 * needed / 0.9, vllm={"gpu_memory_utilization": 0.9}) == "" and lacks(None) == ""


def test_attention_by_hand():
    # Queries 10 wide, keys 5, or 10 repeated. A quarter of the prompt each: 8 + 6 / 4 queries, 6 + 8 + 6 / 4 keys; a mask of 8 x 14.
    assert memory.attention(SHAPE, 4, LENGTHS, 4, True, gpu=False) == (2 * 4 * (10 * 9.5 + 5 * 15.5), 4 * 8 * 14)
    assert memory.attention(SHAPE, 4, LENGTHS, 4, True, gpu=True) == (2 * 4 * (10 * 9.5 + 10 * 15.5), 4 * 8 * 14)
    # Longer than their prompt: whole sequences, without a mask; repeated in float32 only. 1,000 of 5,000 tokens on average, and padding.
    long = Lengths(prompt=6, completion=5000, mean=1000)
    assert memory.attention(SHAPE, 2, long, 4, True, gpu=True) == pytest.approx((2 * 2 * 15 * (6 + 1150 + 1.5), 0))
    assert memory.attention(SHAPE, 4, long, 4, True, gpu=True) == pytest.approx((2 * 4 * 20 * (6 + 1150 + 1.5), 0))


def test_vllm_takes_its_share_while_sampling_and_none_later():
    config = make(rollout={"engine": "vllm", "vllm": {"gpu_memory_utilization": 0.5}}, jobs={"evaluate_by": "seed"})
    found = lines(config, memory_gb=80)
    assert found["vLLM, its weights and cache", "rollout"] == 40 * GIB
    assert not any("vLLM" in name for name, phase in found if phase != "rollout")


def test_a_microbatch_is_no_larger_than_what_a_rank_has():
    # A group is 6 + 4 * 8 = 38 tokens; two ranks have 4 groups each.
    assert memory.microbatch(make(), LENGTHS) == 76
    assert memory.microbatch(make({"microbatch_tokens": 65536}, 2), LENGTHS) == 4 * 38
    assert memory.microbatch(make({"microbatch_tokens": 1}), LENGTHS) == 6 + 8  # one completion always fits


def test_peak_is_the_phase_that_needs_most():
    found = memory.estimate(SHAPE, make(), LENGTHS)
    assert found.peak == found.phase(found.worst) == max(found.phase(p) for p in memory.PHASES)


@pytest.mark.parametrize("change", [{"gradient_checkpointing": True}, {"microbatch_tokens": 38}, {"zero_stage": 1}])
def test_what_saves_memory_does(change):
    big = shape.of_model(tiny_model("qwen2", hidden=64, layers=8))
    def before(train):
        return memory.estimate(big, make({"microbatch_tokens": 304} | train, ranks=2), LENGTHS, gpu=False).phase("backward")
    gone = before({}) - before(change)
    if change != {"zero_stage": 1}:
        assert gone > 0
    else:  # of 16 bytes a parameter 6 go; float32 master weights of one half and a bucket come
        assert gone == pytest.approx(big.parameters * (8 / 2 - 4 / 2 - 4))


# --- against real models


def kept(policy, prompts, group, tokens, length):
    """Bytes that autograd keeps of a forward, parameters not counted."""
    own, found = {p.untyped_storage().data_ptr() for p in policy.parameters()}, {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = (storage.nbytes(), storage)  # held, so that no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        policy(prompts, group, tokens, length)
    return sum(size for size, _ in found.values())


def model(kind, layers):
    torch.manual_seed(0)
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_embd=96, n_layer=layers, n_head=4, n_positions=512))
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=64, hidden_size=96, intermediate_size=480, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2))


ALIKE, RAGGED = [30] * 12, [300, 280, 170, 150, 120, 100, 90, 90, 60, 30, 20, 10]  # the one with a mask, the other in buckets of both ways


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("packed", "lengths"), [(True, ALIKE), (True, RAGGED), (False, ALIKE)], ids=["packed", "packed-ragged", "padded"])
@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_activations_of_a_layer_are_what_autograd_keeps(kind, packed, lengths, recompute, dtype):
    G, n, P, C, mean = 3, 4, 20, max(lengths), sum(lengths) / 12
    prompts, group = [list(range(1, P + 1))] * G, torch.arange(G).repeat_interleave(n)
    tokens, length = torch.randint(1, 60, (G * n, C), generator=torch.Generator().manual_seed(0)), torch.tensor(lengths)
    counted = {layers: kept(Policy(model(kind, layers).to(getattr(torch, dtype)), 1.0, packed, recompute), prompts, group, tokens, length)
               for layers in (1, 3)}
    m = G * P + sum(lengths) if packed else G * n * (P + C)
    config = make({"microbatch_tokens": m, "share_prompt": packed, "gradient_checkpointing": recompute}, dtype=dtype)
    sizes = {layers: shape.of_model(model(kind, layers)) for layers in (1, 3)}
    name = "layers' inputs" if recompute else "activations"
    estimated = {layers: next(x.bytes for x in memory.activations(sizes[layers], config, Lengths(P, C, mean), gpu=False) if x.name == name)
                 for layers in (1, 3)}
    a_layer = (counted[3] - counted[1]) / 2
    assert 0.95 * a_layer < (estimated[3] - estimated[1]) / 2 < 1.15 * a_layer


@pytest.mark.parametrize(("kind", "tied"), [("gpt2", True), ("qwen2", False), ("llama", False)])
def test_shape_is_read_without_weights(kind, tied, tmp_path):
    real = tiny_model(kind)
    real.config.save_pretrained(tmp_path)
    found = shape.read(tmp_path)
    assert found.parameters == sum(p.numel() for p in real.parameters())
    positions = 64 * 16 if kind == "gpt2" else 0
    assert found.looked_up == positions + (0 if tied else 16 * 16)
    assert (found.hidden, found.layers, found.kv_heads, found.gated) == (16, 2, 4 if kind == "gpt2" else 2, kind != "gpt2")


def test_of_the_papers_model(tmp_path):
    # Qwen2.5-1.5B: 1,543,714,304 parameters with tied embeddings, as its model card says (1.54B).
    transformers.Qwen2Config(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
                             vocab_size=151936, tie_word_embeddings=True).save_pretrained(tmp_path)
    found = shape.read(tmp_path / "config.json")
    assert (found.parameters, found.kv_per_token) == (1_543_714_304, 28 * 2 * 2 * 128)
