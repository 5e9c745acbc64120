"""Whose fault it is: what candidate code does wrong is a CandidateError with its cause, before it reaches a weight."""
from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from test_training_batch import step_batch

from poise_hpc.algorithms.base import Advantages, PolicyBatch
from poise_hpc.algorithms.grpo import GRPO
from poise_hpc.training import candidate
from poise_hpc.types import CandidateError

ROLLOUTS = step_batch([1, 3, 2, 2], 2, [1, 0, 0.5, 0.5]).rollouts


def policy_batch() -> PolicyBatch:
    r = ROLLOUTS
    return PolicyBatch(r.logp_old.clone(), r.logp_old, torch.ones(4, 3), r.mask, r.length, r.reward, 0.0, 3)


def algorithm(**methods):
    return dataclass(frozen=True)(type("Mine", (GRPO,), methods))()


def cause(function, *arguments):
    with pytest.raises(CandidateError) as caught:
        function(*arguments)
    return caught.value.cause


@pytest.mark.parametrize("result, expected", [
    (lambda r: 1 / 0, "raised"),
    (lambda r: r.reward, "wrong-type"),
    (lambda r: Advantages([1.0]), "wrong-type"),
    (lambda r: Advantages(r.reward[:2]), "wrong-shape"),
    (lambda r: Advantages(r.reward, r.reward), "wrong-type"),
    (lambda r: Advantages(r.reward, r.valid[:1]), "wrong-shape"),
    (lambda r: Advantages(r.reward.log()), "nonfinite-advantage"),
])
def test_bad_advantages(result, expected):
    assert cause(candidate.advantages, algorithm(advantages=lambda self, r, s: result(r)), ROLLOUTS, {}) == expected


@pytest.mark.parametrize("loss, expected", [
    (lambda b: b.nothing, "raised"),
    (lambda b: None, "wrong-type"),
    (lambda b: b.logp.sum(), "wrong-shape"),
    (lambda b: b.logp * float("nan"), "nonfinite-loss"),
    (lambda b: b.logp.detach(), "no-gradient"),
    (lambda b: (b.logp + 1.0).sqrt(), "nonfinite-gradient"),  # sqrt'(0) is infinite
])
def test_bad_losses(loss, expected):
    mine = algorithm(token_loss=lambda self, b, s: loss(b))
    assert cause(candidate.loss_gradient, mine, policy_batch(), torch.ones(4, 3), {}) == expected


def test_bad_selection_and_state():
    assert cause(candidate.select, algorithm(select=lambda self, r, s: r.valid), ROLLOUTS, {}) == "wrong-shape"
    assert candidate.select(GRPO(), ROLLOUTS, {}).tolist() == [True, True]
    assert cause(candidate.plain_state, {"x": torch.ones(1)}) == "state-not-json"
    assert cause(candidate.plain_state, {"x": float("nan")}) == "state-not-json"
    assert candidate.plain_state({"a": (1, 2)}) == {"a": [1, 2]}


def test_the_message_holds_the_end_of_the_traceback():
    with pytest.raises(CandidateError, match="(?s)advantages raised ZeroDivisionError.*test_training_candidate.py"):
        candidate.advantages(algorithm(advantages=lambda self, r, s: 1 / 0), ROLLOUTS, {})


def test_values_at_padding_do_not_count():
    values = torch.where(ROLLOUTS.mask, 2.0, float("nan"))
    A, keep = candidate.advantages(algorithm(advantages=lambda self, r, s: Advantages(values)), ROLLOUTS, {})
    assert A.sum() == 2.0 * 8 and keep.all()
    mine = algorithm(token_loss=lambda self, b, s: torch.where(b.mask, b.logp, float("nan")))
    g = candidate.loss_gradient(mine, policy_batch(), torch.full((4, 3), 0.5), {})
    assert g.loss == -4.0 and g.logp.tolist() == (0.5 * ROLLOUTS.mask).tolist()


def test_writing_into_the_inputs_changes_nothing_of_ours():
    def spoil(self, r, s):
        r.reward.zero_()
        r.components["correct"].zero_()
        return Advantages(r.reward)

    before = ROLLOUTS.reward.clone()
    candidate.advantages(algorithm(advantages=spoil), ROLLOUTS, {})
    assert ROLLOUTS.reward.equal(before) and ROLLOUTS.components["correct"].equal(before)
    batch = policy_batch()
    candidate.loss_gradient(algorithm(token_loss=lambda self, b, s: b.logp.mul_(2)), batch, torch.ones(4, 3), {})
    assert batch.logp.equal(ROLLOUTS.logp_old)


def test_gradient_is_of_weighted_loss_in_logp_and_entropy():
    batch = PolicyBatch(**{**policy_batch().__dict__, "entropy": torch.full((4, 3), 2.0)})
    mine = algorithm(token_loss=lambda self, b, s: b.logp * 3 - 0.5 * b.entropy)
    g = candidate.loss_gradient(mine, batch, torch.full((4, 3), 0.25), {})
    assert g.loss == 8 * 0.25 * (-3 - 1)
    assert g.logp.tolist() == (0.75 * ROLLOUTS.mask).tolist() and g.entropy.tolist() == (-0.125 * ROLLOUTS.mask).tolist()
