"""The cost model: arithmetic by hand, and corrections that learn."""
from __future__ import annotations

import math

import pytest

from poise_hpc import config as configuration
from poise_hpc.planning import cost, devices
from poise_hpc.planning.cost import Tokens, correct
from poise_hpc.planning.memory import Lengths
from poise_hpc.planning.shape import Shape
from poise_hpc.settings import overlay
from poise_hpc.types import UsageError

SHAPE = Shape("Made up", parameters=1000, looked_up=200, layers=2, hidden=10, intermediate=40, heads=2, kv_heads=1, head_dim=5, vocabulary=20,
              gated=True)
LENGTHS, TOKENS = Lengths(prompt=6, completion=8, mean=4), Tokens(prompt=6, completion=4)


def make(train=None, **sections):
    return configuration.parse(overlay({"rollout": {"prompts": 4, "group_size": 2}, "train": {"epochs": 1, "minibatches": 1} | (train or {})},
                                       sections))


def test_forward_by_hand():
    # 3 tokens: 2 x 800 in matrices, and 4 x 2 layers x 10 wide x 5 tokens looked at.
    assert cost.forward_flops(SHAPE, 3, 5) == 3 * (1600 + 400)


def test_update_is_three_forwards_of_shared_prompts_and_of_the_completions_that_are_trained():
    prompts = cost.forward_flops(SHAPE, 4 * 6, 3)
    completions = cost.forward_flops(SHAPE, 8 * 4, 6 + 2)
    assert cost.update_flops(SHAPE, make(), TOKENS) == 3 * (prompts + completions)
    assert cost.update_flops(SHAPE, make({"epochs": 2}), Tokens(6, 4, trained=0.5)) == 2 * 3 * (prompts + completions / 2)
    assert cost.update_flops(SHAPE, make({"share_prompt": False}), TOKENS) == 3 * (2 * prompts + completions)


def test_ranks_share_the_work():
    big = Shape("Made up", 10**9, 0, 2, 10, 40, 2, 1, 5, 20, True)
    device = devices.Device("made up", 1e12, 1e12, None, layer_s=0.0)
    def parts(ranks):
        return cost.predict(big, make(jobs={"ranks": ranks}), TOKENS, LENGTHS, device, gpu=True)
    one, four = parts(1), parts(4)
    assert four["update"] < one["update"] < 4.5 * four["update"]
    assert four["evaluate"] == one["evaluate"]  # one rank evaluates


def test_decoding_reads_all_weights_at_every_step_however_few_rows_there_are():
    device = devices.Device("made up", flops=1e30, bandwidth=100.0, memory_gb=None, rollout_share=1.0, layer_s=0.0)
    # 8 steps x 4 bytes x 1000 weights; 2 rows x 4 tokens that look at 6 + 2, 2 x 2 layers x 5 numbers of 4 bytes each.
    seconds = cost.decode(SHAPE, make(), device, TOKENS, LENGTHS, 1, 2, 1024, "hf")
    assert seconds == pytest.approx((8 * 4 * 1000 + 2 * 4 * 8 * 20 * 4) / 100)


def test_recomputing_costs_a_third_more():
    device = devices.Device("made up", 1e6, 1e30, None, layer_s=0.0)
    plain, again = (cost.update(SHAPE, make({"gradient_checkpointing": x}), TOKENS, LENGTHS, device) for x in (False, True))
    assert again == pytest.approx(plain * 4 / 3)


# --- corrections


def test_nothing_measured_nothing_corrected():
    found = correct([])
    assert (found.runs, found.factor) == (0, 1.0)
    assert found.spread > 6  # a factor of 3 is no surprise, so 90 % of runs are within more


def test_one_run_by_hand():
    # x = log 2; weight of the run 1 / 0.35^2 against 1 / (log 3)^2 for the prior at 0.
    data, prior = 1 / 0.35**2, 1 / math.log(3) ** 2
    assert correct([2.0]).factor == pytest.approx(math.exp(math.log(2) * data / (data + prior)))


def test_corrections_approach_what_is_measured_and_become_surer():
    found = [correct([4.0, 2.0] * n) for n in (1, 2, 8, 64)]
    truth = math.sqrt(8)
    gaps = [abs(math.log(c.factor / truth)) for c in found]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 0.01
    assert found[0].spread > found[2].spread > found[3].spread > 1


def test_a_part_that_took_no_time_teaches_nothing():
    assert correct([0.0]) == correct([])


@pytest.mark.parametrize(("word", "name"), [
    ("H100", "H100"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("nvidia_a100-sxm4-40gb", "A100 40 GB"),
    ("a100-40", "A100 40 GB"), ("NVIDIA A100-SXM4-80GB", "A100 80 GB"), ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("a10", "A10")])
def test_devices_by_any_of_their_names(word, name):
    assert devices.find(word).name == name


def test_an_unknown_device_is_refused_by_name():
    with pytest.raises(UsageError, match=r"'tpu' is not known here; known: b200"):
        devices.find("tpu")
