from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import helpers_training as h
import pytest
import torch

from poise_hpc.algorithms.base import Advantages, Reduction
from poise_hpc.algorithms.grpo import GRPO
from poise_hpc.training import loop
from poise_hpc.types import CandidateError


@pytest.fixture(scope="module", autouse=True)
def _ranks():
    h.start_alone()


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.engine.full_model().parameters()])


def logits(trainer):
    with torch.no_grad():
        return trainer.engine.full_model()(input_ids=torch.tensor([[2, 3, 4, 5, 6, 7]])).logits


@dataclass(frozen=True)
class Plain(GRPO):
    """REINFORCE on the rewards themselves."""
    zero_advantage_zero_loss = False
    reduction = Reduction.SEQ_MEAN_TOKEN_SUM

    def advantages(self, rollouts, state):
        return Advantages(rollouts.reward)


def test_steps_are_repeatable_to_the_bit_and_depend_on_the_seed():
    runs = [(h.make_trainer(h.make_config(), seed=seed)) for seed in (0, 0, 1)]
    rows = [[t.step(i)[0] for i in range(2)] for t in runs]
    assert rows[0] == rows[1] and weights(runs[0]).equal(weights(runs[1]))
    assert rows[0] != rows[2]


def test_policy_is_computed_by_reproducible_operations_only():
    """On a GPU attention has a reproducible backward only where what has none raises."""
    trainer, seen = h.make_trainer(h.make_config()), []
    def note(*_):
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()))
    norm = trainer.engine.model.model.norm
    norm.weight.register_hook(note)
    torch.use_deterministic_algorithms(True, warn_only=True)
    trainer.rollouts(0, loop.metrics.Stopwatch())
    norm.register_forward_pre_hook(note)  # sampling goes through the same module
    one = torch.zeros(1, 1, dtype=torch.long)
    trainer.engine.backward(trainer.engine([[0]], one[0], one, one[0] + 1)[0].sum())
    assert seen == [(True, False)] * 2
    assert torch.is_deterministic_algorithms_warn_only_enabled()


def test_random_rewards_are_coins_whatever_was_said_and_what_is_right_is_still_recorded():
    conf = h.make_config({"reward": "random"}, rollout={"prompts": 30, "group_size": 8})
    sampled, _ = h.make_trainer(conf).rollouts(0, loop.metrics.Stopwatch())
    plain, _ = h.make_trainer(h.make_config(rollout={"prompts": 30, "group_size": 8})).rollouts(0, loop.metrics.Stopwatch())
    reward = sampled.rollouts.reward
    assert set(reward.tolist()) == {0.0, 1.0} and abs(reward.mean().item() - 0.5) < 0.13  # 4 standard deviations of 240 coins
    assert all(reward.equal(values) for values in sampled.rollouts.components.values()) and bool(sampled.rollouts.valid.all())
    assert sampled.tokens.equal(plain.tokens) and sampled.correct.equal(plain.correct)
    assert h.make_trainer(conf).rollouts(0, loop.metrics.Stopwatch())[0].rollouts.reward.equal(reward)
    assert not h.make_trainer(conf, seed=1).rollouts(0, loop.metrics.Stopwatch())[0].rollouts.reward.equal(reward)


def test_global_random_state_does_not_matter():
    a, b = h.make_trainer(h.make_config()), h.make_trainer(h.make_config())
    torch.manual_seed(1)
    first = a.step(0)[0]
    torch.manual_seed(2)
    assert b.step(0)[0] == first


def test_gradient_of_an_update_is_that_of_J_written_out():
    """One update against the formula, on one plain forward per completion and torch's own autograd."""
    conf = h.make_config({"epochs": 1, "minibatches": 1})
    trainer, gradients = h.make_trainer(conf, Plain()), {}
    parameters = dict(trainer.engine.full_model().named_parameters())
    trainer.engine._engine.optimizer.register_step_pre_hook(lambda *_: gradients.update({k: p.grad.clone() for k, p in parameters.items()}))
    plain = h.tiny_model("qwen2")
    sampled, _ = trainer.rollouts(0, loop.metrics.Stopwatch())
    r, J = sampled.rollouts, 0.0
    for i in range(len(r.reward)):
        prompt, y = list(sampled.prompts[r.group[i]]), sampled.tokens[i, :r.length[i]].tolist()
        scores = torch.log_softmax(plain(input_ids=torch.tensor([prompt + y])).logits[0, len(prompt) - 1:-1], -1)
        logp = scores[range(len(y)), y]
        J = J - r.reward[i] * (logp - logp.detach()).exp().sum() / len(r.reward)   # ratio 1 before the first update
    J.backward()
    expected = {k: p.grad for k, p in plain.named_parameters()}
    norm = torch.cat([g.flatten() for g in expected.values()]).norm()
    row, _ = trainer.step(0)
    assert row["gradient_norm"] == pytest.approx(float(norm), rel=1e-4) and row["loss"] == pytest.approx(float(J.detach()), abs=1e-5)
    clip = min(1.0, 1.0 / float(norm))
    for name, g in gradients.items():  # the hook of the test sees the clipped gradient
        torch.testing.assert_close(g, expected[name] * clip, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("change", [{"skip_zero_advantage": False}, {"microbatch_tokens": 25}, {"share_prompt": False}])
def test_ways_to_compute_the_same(change):
    results = []
    for train in ({}, change):
        trainer = h.make_trainer(h.make_config(train))
        row = [trainer.step(i)[0] for i in range(2)][-1]
        results.append((row["gradient_norm"], row["loss"], row["reward"], logits(trainer)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)


def test_nothing_to_learn_still_takes_its_optimizer_step():
    """Zero advantages everywhere: skipped or not, momentum goes on moving the weights alike."""
    @dataclass(frozen=True)
    class Pauses(GRPO):
        def advantages(self, rollouts, state):
            return Advantages(super().advantages(rollouts, state).value * (rollouts.step == 0))

    moved = []
    for skip in (True, False):
        trainer = h.make_trainer(h.make_config({"skip_zero_advantage": skip}), Pauses())
        trainer.step(0)
        before = logits(trainer)
        row, _ = trainer.step(1)
        assert row["trained_rows"] == (0 if skip else 24) and row["gradient_norm"] < 1e-6
        moved.append(logits(trainer))
        assert not moved[-1].equal(before)
    torch.testing.assert_close(*moved, atol=2e-4, rtol=2e-4)


def test_training_raises_the_reward():
    trainer = h.make_trainer(h.make_config({"steps": 12}, rollout={"prompts": 8, "group_size": 8}))
    rewards = [trainer.step(i)[0]["reward"] for i in range(12)]
    assert sum(rewards[-3:]) > 2 * sum(rewards[:3])


def test_selection_samples_again_with_other_prompts():
    @dataclass(frozen=True)
    class Picky(GRPO):
        def select(self, rollouts, state):
            keep = torch.zeros(rollouts.groups, dtype=torch.bool)
            keep[:2] = True
            return keep

    trainer = h.make_trainer(h.make_config(rollout={"max_rounds": 2}), Picky())
    sampled, batch = trainer.rollouts(0, loop.metrics.Stopwatch())
    assert sampled.rollouts.groups == 6 + 4 and len(batch.prompts) == 2 + 2  # 4 missing after round 0, 2 of them kept
    plain = h.make_trainer(h.make_config()).rollouts(0, loop.metrics.Stopwatch())[0]
    assert sampled.tokens[:24, :plain.tokens.shape[1]].equal(plain.tokens)
    later = {trainer.task.train_problem(0, (1 * 6 + 0) * 6 + i).prompt for i in range(4)}  # round 1 of 6 steps x 6 prompts
    assert set(sampled.prompts[6:]) == later
    row, _ = trainer.step(1)
    assert row["groups_sampled"] == 10 and row["trained_rows"] <= 16


def test_selection_of_nothing_changes_nothing():
    nothing = dataclass(frozen=True)(type("None_", (GRPO,), {"select": lambda self, r, s: torch.zeros(r.groups, dtype=torch.bool)}))()
    trainer = h.make_trainer(h.make_config(), nothing)
    before = weights(trainer)
    row, _ = trainer.step(0)
    assert row["trained_rows"] == 0 and weights(trainer).equal(before)


def test_dropped_completions_leave_loss_and_normalization():
    """keep = False for half of the rows equals a batch without them."""
    @dataclass(frozen=True)
    class Half(Plain):
        def advantages(self, rollouts, state):
            return Advantages(rollouts.reward, keep=rollouts.group % 2 == 0)

    rows = torch.arange(24)
    trainer = h.make_trainer(h.make_config(), Half())
    r = trainer.rollouts(0, loop.metrics.Stopwatch())[1].rollouts
    keep = r.group % 2 == 0
    W = loop.token_weights(trainer.algorithm, r, keep, rows)
    assert (W[~keep] == 0).all() and torch.allclose(W[keep][r.mask[keep]], torch.tensor(1 / 12))
    assert trainer.step(0)[0]["trained_rows"] == 12


def test_what_an_algorithm_needs_is_there_and_nothing_else():
    seen = {}

    @dataclass(frozen=True)
    class Needy(GRPO):
        needs = frozenset({"ref_logp", "entropy"})

        def advantages(self, rollouts, state):
            seen["rollouts"] = rollouts
            return super().advantages(rollouts, state)

        def token_loss(self, batch, state):
            seen["batch"] = batch
            return super().token_loss(batch, state) - 0.1 * batch.entropy + 0.1 * (batch.logp - batch.logp_ref) ** 2

    row, _ = h.make_trainer(h.make_config(), Needy()).step(0)
    r, b = seen["rollouts"], seen["batch"]
    torch.testing.assert_close(r.logp_ref, r.logp_old, atol=1e-5, rtol=1e-5)  # the start weights are the reference
    assert (r.entropy[r.mask] > 0).all() and r.entropy.max() <= torch.tensor(16.0).log() and abs(row["kl_ref"]) < 1e-6
    assert b.logp_ref.shape == b.entropy.shape == b.mask.shape
    page = (Path(__file__).parents[1] / "archive_store" / "README.md").read_text()
    cells = " ".join(line.split(" | ")[0] for line in page.partition("| curve |")[2].partition("\n\n")[0].splitlines())
    assert set(re.findall(r"`(\w+)`", cells)) == row.keys() - {"step", "components"}  # the archive's page explains each
    h.make_trainer(h.make_config(), dataclass(frozen=True)(type("Frugal", (Needy,), {"needs": frozenset(), "token_loss": GRPO.token_loss}))()).step(0)
    assert seen["rollouts"].entropy is None and seen["rollouts"].logp_ref is None


def test_importance_weights_are_truncated_and_absent_for_an_exact_sampler():
    @dataclass(frozen=True)
    class R:
        mask = torch.tensor([[True, True, True, False]])
        logp_old = torch.log(torch.tensor([[0.5, 0.1, 0.9, 1.0]]))
        logp_rollout = torch.log(torch.tensor([[0.5, 0.2, 0.1, 0.1]]))

    torch.testing.assert_close(loop.importance_weights(R(), 2.0, False), torch.tensor([[1.0, 0.5, 2.0, 1.0]]))
    assert loop.importance_weights(R(), 2.0, True).eq(1).all()


def test_an_inexact_sampler_gets_its_old_log_probs_from_the_trainer():
    trainer = h.make_trainer(h.make_config({"learning_rate": 1e-9}))
    trainer.sampler.exact = False
    batch = trainer.rollouts(0, loop.metrics.Stopwatch())[1]
    torch.testing.assert_close(batch.rollouts.logp_old, batch.rollouts.logp_rollout, atol=1e-5, rtol=1e-5)
    assert not batch.rollouts.logp_old.equal(batch.rollouts.logp_rollout)  # computed in another order
    assert trainer.step(0)[0]["ess"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("stage", range(4))
def test_bfloat16_learns_like_float32(stage):
    """The old policy is scored by the trainer itself: in bfloat16 the sampler's log-probs differ visibly."""
    half = h.make_trainer(h.make_config({"zero_stage": stage, "epochs": 1, "minibatches": 1}, model={"dtype": "bfloat16"}))
    full = h.make_trainer(h.make_config({"epochs": 1, "minibatches": 1}), Plain())
    half.algorithm = Plain()
    assert not half.sampler.exact
    half.sampler.generate, half.sampler.exact = full.sampler.generate, False  # the same completions for both
    rows = half.step(0)[0], full.step(0)[0]
    assert rows[0]["gradient_norm"] == pytest.approx(rows[1]["gradient_norm"], rel=0.1)  # weights rounded to 8 bits
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], abs=0.01)


def test_faults_of_the_candidate_are_its_own():
    broken = dataclass(frozen=True)(type("Broken", (GRPO,), {"token_loss": lambda self, b, s: b.logp * float("inf")}))()
    trainer = h.make_trainer(h.make_config(), broken)
    before = weights(trainer)
    with pytest.raises(CandidateError, match="nonfinite-loss"):
        trainer.step(0)
    assert weights(trainer).equal(before)  # it never reached a weight
    huge = dataclass(frozen=True)(type("Huge", (Plain,), {"token_loss": lambda self, b, s: b.logp * 1e37}))()
    with pytest.raises(CandidateError, match="nonfinite-gradient"):
        h.make_trainer(h.make_config(), huge).step(0)


def test_faults_of_the_task_are_not_the_candidates():
    trainer = h.make_trainer(h.make_config())
    trainer.task.grade = lambda *a: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.step(0)
