import pytest
import torch
from helpers_algorithms import tokens

from poise_hpc.algorithms import ops
from poise_hpc.algorithms.base import Reduction

GROUP = torch.tensor([0, 0, 1, 1, 1])
X = torch.tensor([1.0, 3.0, 0.0, 3.0, 6.0])


def test_group_statistics():
    # means 2 and 3; sums of squares 2 and 18, over n - 1 = 1 and 2
    torch.testing.assert_close(ops.group_mean(X, GROUP), torch.tensor([2.0, 2, 3, 3, 3]))
    torch.testing.assert_close(ops.group_std(X, GROUP), torch.tensor([2**0.5, 2**0.5, 3, 3, 3]))
    assert ops.group_size(GROUP).tolist() == [2, 2, 3, 3, 3]


def test_group_statistics_over_some_completions():
    where = torch.tensor([False, False, True, False, True])  # none of group 0: all of it
    torch.testing.assert_close(ops.group_mean(X, GROUP, where), torch.tensor([2.0, 2, 3, 3, 3]))
    torch.testing.assert_close(ops.group_std(X, GROUP, where)[2:], torch.full((3,), 18**0.5))
    assert ops.group_size(GROUP, where).tolist() == [2, 2, 2, 2, 2]


def test_group_medians():
    # group 0: 1, 4 -> 2.5; group 1: -1, 2, 5 -> 2; group 2 is empty; group 3: 7
    group, x = torch.tensor([1, 0, 1, 0, 1, 3]), torch.tensor([5.0, 1.0, -1.0, 4.0, 2.0, 7.0])
    assert ops.group_median(x, group).tolist() == [2, 2.5, 2, 2.5, 2, 7]
    assert ops.group_median(torch.tensor([0.0, 1.0, 1.0, 1.0]), torch.zeros(4, dtype=torch.int64)).tolist() == [1, 1, 1, 1]
    assert ops.group_median(torch.tensor([]), torch.tensor([], dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("value", [0.1, 0.7, 1e-3, 1 / 3, 1.1, -0.3, 1e4])
@pytest.mark.parametrize("n", [2, 3, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_rewards_centre_to_exactly_zero(value, n, dtype):
    R, g = torch.full((n,), value, dtype=dtype), torch.zeros(n, dtype=torch.int64)
    assert (R - ops.group_mean(R, g)).abs().max() == 0 and (R - ops.group_median(R, g)).abs().max() == 0
    assert ops.group_std(R, g).max() == 0


def test_equal_rewards_of_those_that_count_centre_to_exactly_zero():
    # In float32 (1.9 - 0.8) + 0.8 is not 1.9: what does not count must not come in by rounding.
    R, g = torch.tensor([1.9] * 7 + [0.8]), torch.zeros(8, dtype=torch.int64)
    live = torch.arange(8) < 7
    assert (R - ops.group_mean(R, g, live))[live].abs().max() == 0 and ops.group_std(R, g, live).max() == 0


def test_a_lone_completion_has_no_spread():
    assert ops.group_std(torch.tensor([5.0]), torch.tensor([0])).item() == 0
    assert ops.group_mean(torch.tensor([]), torch.tensor([], dtype=torch.int64)).shape == (0,)


def test_ratio_masks_before_exp():
    batch = tokens([[0.5, 300.0], [-0.5, 0.0]], [1.0, 1.0], length=[1, 2])
    w = ops.ratio(batch)
    torch.testing.assert_close(w, torch.tensor([[0.5, 0.0], [-0.5, 0.0]]).exp())
    w.sum().backward()
    assert batch.logp.grad[0].tolist() == [pytest.approx(1.6487213), 0.0]  # e^0.5, and nothing from padding


def test_ratio_of_a_runaway_token_is_finite():
    assert ops.ratio(tokens([[500.0]], [1.0])).item() == pytest.approx(torch.tensor(20.0).exp().item())


def test_sequence_log_ratios():
    batch = tokens([[0.5, 0.1, 9.0]], [1.0], length=[2])
    assert ops.sequence_log_ratio(batch).item() == pytest.approx(0.6)
    assert ops.mean_log_ratio(batch).item() == pytest.approx(0.3)


def test_kl_estimators_by_hand():
    # d = log 2: k1 = log 2, k2 = (log 2)^2 / 2, k3 = 1/2 - 1 + log 2
    d = torch.tensor(2.0).log()
    batch = tokens([[0.0, 0.0]], [0.0], length=[1], logp_ref=torch.tensor([[-1.0 - d, -50.0]]))
    assert ops.k1(batch).tolist() == [[pytest.approx(0.6931472), 0.0]]
    assert ops.k2(batch).tolist() == [[pytest.approx(0.2402265), 0.0]]
    assert ops.k3(batch).tolist() == [[pytest.approx(0.1931472), 0.0]]


@pytest.mark.parametrize(("reduction", "m", "z"), [
    # lengths 2 and 3; the third completion (length 1) is not kept; longest allowed 10
    (Reduction.TOKEN_MEAN, [[1, 1, 0], [1, 1, 1], [0, 0, 0]], 5),
    (Reduction.SEQ_MEAN_TOKEN_MEAN, [[1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3], [0, 0, 0]], 2),
    (Reduction.SEQ_MEAN_TOKEN_SUM, [[1, 1, 0], [1, 1, 1], [0, 0, 0]], 2),
    (Reduction.SEQ_MEAN_TOKEN_SUM_NORM, [[1, 1, 0], [1, 1, 1], [0, 0, 0]], 20)])
def test_token_weights(reduction, m, z):
    length, keep = torch.tensor([2, 3, 1]), torch.tensor([True, True, False])
    mask = torch.arange(3) < length.unsqueeze(-1)
    weights, share = ops.token_weights(reduction, mask, length, keep, 10)
    torch.testing.assert_close(weights, torch.tensor(m, dtype=torch.float32))
    assert share.item() == z
    parts = [ops.token_weights(reduction, mask[i:j], length[i:j], keep[i:j], 10)[1] for i, j in ((0, 1), (1, 3), (3, 3))]
    assert sum(p.item() for p in parts) == z  # shares of ranks and microbatches add up, an empty one included
