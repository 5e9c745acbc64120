"""The Gaussian process: by hand, against scikit-learn, and its likelihood."""
from __future__ import annotations

import numpy as np
import pytest

from poise_hpc.selection import gp


def data(seed: int = 0, count: int = 40, features: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, features))
    return x, np.sin(x[:, 0]) + 0.3 * x[:, 1], rng.uniform(0.01, 0.5, count)


def test_one_point_by_hand():
    # k = 1 at the point, noise 1: weight 1/2. At distance l: k = exp(-1/2) = 0.6065, mean 0.6065 * 2 / 2, variance 1 - 0.3679 / 2.
    mean, sd = gp.regress(np.array([[0.0]]), np.array([2.0]), np.array([1.0]), 3.0, np.array([[0.0], [3.0], [1e3]]))
    np.testing.assert_allclose(mean, [1.0, np.exp(-0.5), 0.0])
    np.testing.assert_allclose(sd**2, [0.5, 1 - np.exp(-1) / 2, 1.0])


@pytest.mark.parametrize("length", [0.5, 2.0, 10.0])
def test_it_agrees_with_scikit_learn(length):
    process = pytest.importorskip("sklearn.gaussian_process")
    x, y, noise = data()
    theirs = process.GaussianProcessRegressor(process.kernels.RBF(length), alpha=noise, optimizer=None).fit(x, y)
    query = np.concatenate([x, data(seed=1)[0]])
    for ours, wanted in zip(gp.regress(x, y, noise, length, query), theirs.predict(query, return_std=True), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(gp.log_likelihood(x, y, noise, np.array([length])), theirs.log_marginal_likelihood(np.log([length])))


def test_the_likeliest_length_is_the_one_that_data_were_drawn_with():
    rng = np.random.default_rng(2)
    x, noise = rng.uniform(-4, 4, (64, 1)), np.full(64, 0.01)
    found = []
    for length in (0.6, 5.0):
        covariance = gp.kernel(gp.squares(x, x), length) + np.diag(noise)
        y = np.linalg.cholesky(covariance) @ rng.normal(size=64)
        found.append(gp.likeliest_length(x, y, noise))
    assert 0.5 <= found[0] <= 0.9 and 3.0 <= found[1] <= 9.0


def test_points_that_coincide_do_no_harm():
    x, y, noise = np.zeros((50, 3)), np.arange(50.0), np.full(50, 0.01)
    mean, sd = gp.regress(x, y, noise, 2.0, x[:1])
    np.testing.assert_allclose(mean, 24.5, rtol=1e-3)
    assert 0 < sd[0] < 0.05 and gp.likeliest_length(x, y, noise) == gp.LENGTHS[0]
