"""Each seed against values that a reader can compute, and GRPO where its mechanisms are switched off."""
from dataclasses import replace
from math import exp, log

import pytest
import torch
from helpers_algorithms import advantage, gradient, loss_and_grad, rolled, tokens

from poise_hpc.algorithms.base import Reduction
from poise_hpc.algorithms.checks import CHECKS
from poise_hpc.algorithms.seeds import SEEDS, seed, source
from poise_hpc.types import UsageError

GRPO = seed("grpo")


def close(got, want):
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float32), rtol=1e-5, atol=1e-5)


def one(name, d, A, **fields):
    """Loss and gradient of a completion of one token with log-ratio d."""
    batch = tokens([[d]], [A])
    algorithm = replace(seed(name), **fields)
    return algorithm.token_loss(batch, algorithm.initial_state()).item(), gradient(algorithm, batch).item()


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.name)
@pytest.mark.parametrize("name", SEEDS)
def test_contract(name, check):
    check.run(seed(name), 0)


VARIANTS = [replace(GRPO, kl_beta=0.1), replace(seed("rloo"), kl_beta=0.1), replace(seed("reinforce_pp"), kl_beta=0.1),
            replace(seed("reinforce_pp"), group_baseline=False), replace(seed("analytic_variance"), exponent=1.0)]


@pytest.mark.parametrize("algorithm", VARIANTS, ids=repr)
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.name)
def test_contract_of_variants(algorithm, check):
    check.run(algorithm, 1)


def test_an_unknown_seed_is_named_with_the_one_that_was_meant():
    with pytest.raises(UsageError, match="did you mean 'gspo'"):
        source("gsop")


# -- all mechanisms off: GRPO ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [n for n in SEEDS if n != "grpo"])
def test_without_its_mechanisms_a_seed_is_grpo(name):
    algorithm = seed(name)
    for mechanism in algorithm.mechanisms:
        algorithm = algorithm.without(mechanism.name)
    rolls = rolled([[1.1, 0.0, 0.1, 0.1], [1.1, 1.1, 0.0, 1.1], [0.1, 0.0, 0.0, 0.1]], length=[1, 2, 3, 10] * 3,
                   valid=[[True, False, True, True], [True, True, False, True], [True, False, False, True]])
    close(advantage(algorithm, rolls), advantage(GRPO, rolls).tolist())
    assert algorithm.select(rolls, {}) is None
    batch = tokens([[0.5, -0.5, 0.1], [0.05, 0.0, 0.3], [-0.4, 0.6, 0.0]], [1.5, -0.7, 0.3], length=[3, 1, 2])
    for got, want in zip(loss_and_grad(algorithm, batch), loss_and_grad(GRPO, batch), strict=True):
        close(got, want.tolist())


def test_an_unknown_mechanism_is_refused_by_name():
    with pytest.raises(KeyError, match="it declares: group-std, symmetric-clip"):
        GRPO.without("clip-higher")


# -- advantages --------------------------------------------------------------------------------------------------------

def test_grpo_advantages():
    # mean 1/2, std 1 / sqrt 2: +-0.7071 ... / 0.7071; an all-right group gives exactly 0
    A = advantage(GRPO, rolled([[1.0, 0.0], [1.0, 1.0]]))
    close(A[:2], [0.5**0.5, -(0.5**0.5)])
    assert A[2:].tolist() == [0, 0]


def test_dr_grpo_advantages_and_reduction():
    close(advantage(seed("dr_grpo"), rolled([[1.0, 0.0, 0.0, 0.0]])), [0.75, -0.25, -0.25, -0.25])
    assert seed("dr_grpo").reduction is Reduction.SEQ_MEAN_TOKEN_SUM_NORM


def test_rloo_compares_with_the_others():
    # 1 - mean(0, 0, 0) = 1;  0 - mean(1, 0, 0) = -1/3
    close(advantage(seed("rloo"), rolled([[1.0, 0.0, 0.0, 0.0]])), [1, -1 / 3, -1 / 3, -1 / 3])


def test_rloo_charges_the_kl_in_the_reward():
    # log pi_old / pi_ref of the whole completion: 2 * 0.3 for the first, 0 for the second; R = 1 - 0.5 * 0.6 = 0.7 and 0
    ref = torch.tensor([[-1.3, -1.3], [-1.0, -1.0]])
    close(advantage(replace(seed("rloo"), kl_beta=0.5), rolled([[1.0, 0.0]], logp_ref=ref)), [0.7, -0.7])


def test_reinforce_pp_whitens_over_tokens():
    # centred +-1/2; three tokens of +1/2 and one of -1/2: mean 1/4, variance (3/16 + 9/16) / 3 = 1/4, std 1/2
    close(advantage(seed("reinforce_pp"), rolled([[1.0, 0.0]], length=[3, 1])), [0.5, -1.5])


def test_dapo_selects_mixed_groups():
    chosen = seed("dapo").select(rolled([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.1, 0.0]]), {})
    assert chosen.tolist() == [False, True, False, False]  # a difference in format alone is none


def test_dapo_punishes_completions_near_the_limit():
    # limit 10, buffer 2 (a fifth): 9 tokens are half way in, 10 all the way: R = 1 - 0.25, 1 - 0.5, 1
    batch = rolled([[1.0, 1.0, 1.0]], length=[9, 10, 8])
    A = advantage(replace(seed("dapo"), overlong_buffer=0.2), batch)
    close(A, [0.0, -1.0, 1.0])


def test_gpg_makes_up_for_groups_that_teach_nothing():
    # one of two groups is mixed: alpha = 2
    close(advantage(seed("gpg"), rolled([[1.0, 0.0], [1.0, 1.0]])), [1.0, -1.0, 0.0, 0.0])


def test_maxrl_divides_by_the_mean():
    # mean 1/4: (1 - 1/4) / (1/4) = 3 and -1. Nothing right: 0.
    close(advantage(seed("maxrl"), rolled([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])), [3, -1, -1, -1, 0, 0, 0, 0])


def test_analytic_variance_scales_by_correctness_alone():
    # 1 right of 4: p = (1 + 1) / (4 + 2) = 1/3, sqrt(2/9) = 0.4714. Spread in format does not shrink the success.
    plain = advantage(seed("analytic_variance"), rolled([[1.0, 0.0, 0.0, 0.0]]))
    close(plain[0], 0.75 / (2 / 9) ** 0.5)
    mixed = rolled([[1.0, 0.5, 0.0, 0.5]])  # mean 1/2, the same p
    close(advantage(seed("analytic_variance"), mixed)[0], 0.5 / (2 / 9) ** 0.5)


def test_analytic_variance_keeps_format_small_where_nothing_is_right():
    # K = 0 of 4: p = 1/6, sqrt(5/36) = 0.3727: 0.05 / 0.3727 = 0.134, where GRPO makes it +-0.87
    batch = rolled([[0.1, 0.0, 0.1, 0.0]])
    close(advantage(seed("analytic_variance"), batch)[0], 0.05 / (5 / 36) ** 0.5)
    close(advantage(GRPO, batch)[0], 0.05 / (0.01 / 3) ** 0.5)


def test_validity_masking_leaves_invalid_completions_out_of_the_statistics():
    # valid: 1, 0 (mean 1/2, std 0.7071). Invalid, -1: in units of the whole group's std, 1.
    batch = rolled([[1.0, 0.0, -1.0]], valid=[[True, True, False]])
    close(advantage(seed("validity_masking"), batch), [0.5**0.5, -(0.5**0.5), -1.5])


def test_validity_masking_stays_bounded_where_all_valid_ones_are_right():
    # valid: std 0. The invalid one: (0 - 1) / std(1, 1, 1, 0) = -1 / 0.5
    batch = rolled([[1.0, 1.0, 1.0, 0.0]], valid=[[True, True, True, False]])
    close(advantage(seed("validity_masking"), batch), [0, 0, 0, -2])


def test_conditional_normalization_tells_three_kinds_of_groups_apart():
    batch = rolled([[0.1, 0.0], [1.1, 1.0], [1.1, 0.1]])
    # all wrong: plain difference; all right: nothing; mixed: GRPO
    close(advantage(seed("conditional_normalization"), batch), [0.05, -0.05, 0, 0, 0.5**0.5, -(0.5**0.5)])


def test_length_shaping_is_gated_and_only_among_right_ones():
    # three of four right: gate 0.75 is open; right lengths 2, 4, 6, mean 4: +-0.2 * 1/2. The wrong one gets nothing.
    open_, shut = rolled([[1.0, 1.0, 1.0, 0.0]], length=[2, 4, 6, 1]), rolled([[1.0, 1.0, 0.0, 0.0]], length=[2, 6, 1, 1])
    shaping = seed("length_shaping")
    close(advantage(shaping, open_) - advantage(GRPO, open_), [0.1, 0.0, -0.1, 0.0])
    assert torch.equal(advantage(shaping, shut), advantage(GRPO, shut))


# -- token losses ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("d", "A", "loss", "grad"), [
    (0.5, 2.0, -2.4, 0.0),               # w = 1.65 > 1.2: clipped, -1.2 * 2
    (-0.5, 2.0, -2 * exp(-0.5), -2 * exp(-0.5)),   # below 1 and A > 0: not clipped
    (-0.5, -1.0, 0.8, 0.0),              # w = 0.61 < 0.8: clipped
    (0.5, -1.0, exp(0.5), exp(0.5))])    # above 1 and A < 0: not clipped
def test_grpo_clips(d, A, loss, grad):
    assert one("grpo", d, A) == (pytest.approx(loss), pytest.approx(grad))


def test_dapo_clips_higher():
    assert one("dapo", log(1.25), 1.0)[1] == pytest.approx(-1.25)  # GRPO's gradient is 0 there
    assert one("dapo", 0.5, 1.0) == (pytest.approx(-1.28), 0.0)


def test_gspo_gives_every_token_the_ratio_of_the_completion():
    # mean log-ratio (0.03 - 0.01) / 2 = 0.01: every l_t = -e^0.01, gradient -e^0.01 a token
    batch = tokens([[0.03, -0.01]], [1.0])
    close(seed("gspo").token_loss(batch, {}).detach(), [[-exp(0.01)] * 2])
    close(gradient(seed("gspo"), batch), [[-exp(0.01)] * 2])
    # the token form: a token's loss moves that token only, so an advantage of the first leaves the second alone
    first = replace(batch, advantage=torch.tensor([[1.0, 0.0]]))
    close(gradient(seed("gspo"), first), [[-exp(0.01), 0.0]])


def test_gmpo_takes_the_geometric_mean_and_clips_one_side():
    # A > 0: 1.0 is cut to 0.4, -0.6 is not: exp((0.4 - 0.6) / 2); the cut token has no gradient
    batch = tokens([[1.0, -0.6]], [2.0])
    loss, grad = loss_and_grad(seed("gmpo"), batch)
    close(loss, -2 * exp(-0.1))
    close(grad, [[0.0, -exp(-0.1)]])


def test_sapo_gates_softly():
    # on-policy: sigmoid(0) = 1/2, value -A 4 / tau / 2, slope exactly that of the policy gradient
    assert one("sapo", 0.0, 1.0) == (pytest.approx(-2.0), pytest.approx(-1.0))
    assert one("sapo", 0.0, -1.0) == (pytest.approx(2 / 1.05), pytest.approx(1.0))
    far = exp(1.5) * 4 / (1 + exp(-(exp(1.5) - 1))) * (1 - 1 / (1 + exp(-(exp(1.5) - 1))))
    assert one("sapo", 1.5, 1.0)[1] == pytest.approx(-far)  # w f'(w), fading but not 0


def test_cispo_bounds_the_weight_and_keeps_the_gradient():
    # w = e^1.5 = 4.5, cut to 2: l = -2 log pi = -2 * 0.5, gradient -2
    assert one("cispo", 1.5, 1.0) == (pytest.approx(-1.0), pytest.approx(-2.0))
    assert one("cispo", -1.0, -1.0)[1] == pytest.approx(exp(-1))


def test_aspo_inverts_the_weight_of_successes():
    assert one("aspo", 0.1, 1.0)[1] == pytest.approx(-exp(-0.1))    # PPO: -e^0.1
    assert one("aspo", -0.5, 1.0)[1] == pytest.approx(-exp(0.5))
    assert one("aspo", -2.0, 1.0)[1] == pytest.approx(-3.0)         # 1/w = 7.4, cut to 3
    assert one("aspo", 0.5, 1.0)[1] == 0.0                          # w > 1.28: dropped, as in PPO
    assert one("aspo", 0.5, -1.0)[1] == pytest.approx(exp(0.5))     # failures as in PPO


def test_topr_tapers_failures_by_the_whole_completion():
    # successes: 1 whatever the ratio. Failures: min(e^(-0.2 - 0.3), 1) at every token.
    batch = tokens([[2.0, 0.0], [-0.2, -0.3], [0.5, 0.1]], [1.0, -1.0, -1.0])
    close(gradient(seed("topr"), batch), [[-1.0, -1.0], [exp(-0.5)] * 2, [1.0, 1.0]])


def test_gpg_has_neither_ratio_nor_clip():
    assert one("gpg", 3.0, 1.0) == (pytest.approx(-2.0), pytest.approx(-1.0))  # -A log pi, log pi = -1 + 3


def test_kl_terms():
    # log pi - log pi_ref = log 2: k3 = 1/2 - 1 + log 2, d k3 = 1 - 1/2; k2 gives log 2 as gradient
    batch = tokens([[0.0]], [0.0], logp_ref=torch.tensor([[-1 - log(2)]]))
    grpo = replace(GRPO, kl_beta=0.1)
    close(loss_and_grad(grpo, batch)[0], 0.1 * (log(2) - 0.5))
    close(gradient(grpo, batch), [[0.05]])
    close(gradient(replace(seed("reinforce_pp"), kl_beta=0.1), batch), [[0.1 * log(2)]])
    assert grpo.needs == {"ref_logp"} and not grpo.zero_advantage_zero_loss
    assert GRPO.needs == frozenset() and GRPO.zero_advantage_zero_loss
