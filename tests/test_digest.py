"""The digest of what an algorithm computes: the same function collides, however it is written; another one does not."""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers_offline import load
from torch import Tensor

from poise_hpc.agent.recipe import make
from poise_hpc.agent.render import render
from poise_hpc.algorithms import seeds
from poise_hpc.algorithms.base import Advantages, Algorithm, PolicyBatch, Reduction, RolloutBatch
from poise_hpc.algorithms.digest import digest
from poise_hpc.algorithms.grpo import GRPO


@dataclass(frozen=True)
class Rewritten(Algorithm):
    """GRPO in other words: A is halved and the loss doubled, the clip is a cut of log w, 1/|y| stands in the loss, a constant is added."""

    clip: float = 0.2
    std_floor: float = 1e-6
    reduction = Reduction.SEQ_MEAN_TOKEN_SUM

    def advantages(self, rollouts: RolloutBatch, state: dict[str, Any]) -> Advantages:
        R, value = rollouts.reward, torch.zeros_like(rollouts.reward)
        for g in range(rollouts.groups):
            mine = rollouts.group == g
            centred = R[mine] - R[mine].mean()
            value[mine] = centred / 2 / (torch.sqrt(centred.square().sum() / (mine.sum() - 1)) + self.std_floor)
        return Advantages(value)

    def token_loss(self, batch: PolicyBatch, state: dict[str, Any]) -> Tensor:
        d = torch.where(batch.mask, batch.logp - batch.logp_old, 0.0)
        A = 2 * batch.advantage
        cut = torch.where(A > 0, torch.minimum((1 + self.clip) * A, d.exp() * A), torch.minimum((1 - self.clip) * A, d.exp() * A))
        return 7.0 - cut / batch.length.unsqueeze(-1)


def test_another_spelling_of_grpo_is_grpo():
    assert digest(Rewritten()) == digest(GRPO()) != ""


@pytest.mark.parametrize(("seed", "parts"), [
    ("maxrl", ["maxrl", "no-std"]), ("validity_masking", ["validity-masking"]), ("length_shaping", ["gated-length"]),
    ("rloo", ["leave-one-out", "no-std", "sequence-sum"])])
def test_a_seed_and_the_same_recipe_from_the_catalogue(seed, parts):
    """Written independently of each other."""
    knobs = {k: v for k, v in vars(seeds.seed(seed)).items() if k.startswith("clip")}
    assert digest(load(render(make(parts, knobs), "X"))) == digest(seeds.seed(seed))


@pytest.mark.parametrize(("one", "other"), [
    (GRPO(), GRPO(clip=0.21)), (GRPO(), GRPO(clip=0.202)), (GRPO(), Rewritten(std_floor=1e-4)),
    (seeds.seed("gspo"), replace(seeds.seed("gspo"), clip_high=0.041)), (seeds.seed("gspo"), replace(seeds.seed("gspo"), clip_low=0.0303))])
def test_a_moved_hyperparameter_is_another_algorithm(one, other):
    assert digest(one) != digest(other)


@pytest.mark.parametrize("target", [0.3, 1.0])
def test_a_target_that_the_state_steers_to_is_seen(target):
    """The controller moves by the sign of (target - entropy) alone: the steps' entropies pass every target on both sides."""
    one, other = (load(render(make(["entropy-target"], {}), "X")) for _ in range(2))
    assert digest(one) == digest(other)
    field = next(name for name in vars(one) if "target" in name)
    assert digest(replace(one, **{field: target})) != digest(replace(one, **{field: 1.2 * target}))


def test_no_two_seeds_compute_the_same():
    found = {name: digest(seeds.seed(name)) for name in seeds.SEEDS}
    assert len(set(found.values())) == len(seeds.SEEDS) and "" not in found.values()


def test_a_late_change_is_seen():
    @dataclass(frozen=True)
    class Late(GRPO):
        after: float = 0.9

        def advantages(self, rollouts, state):
            found = super().advantages(rollouts, state)
            return replace(found, value=found.value * (2.0 if rollouts.progress > self.after else 1.0))

    assert digest(Late()) != digest(GRPO()) and digest(Late(after=1.0)) == digest(GRPO())


def test_what_is_not_needed_changes_nothing_and_what_breaks_has_none():
    @dataclass(frozen=True)
    class Needs(GRPO):
        needs = frozenset({"ref_logp", "entropy"})

    @dataclass(frozen=True)
    class Single(GRPO):
        def advantages(self, rollouts, state):
            weight = torch.zeros(len(rollouts.reward), dtype=torch.float32)
            return Advantages(weight.index_add(0, torch.arange(len(weight)), rollouts.reward))  # mixes precisions: an error in float64

    assert digest(Needs()) == digest(GRPO())
    assert digest(Single()) == ""
    assert torch.get_default_dtype() == torch.float32
