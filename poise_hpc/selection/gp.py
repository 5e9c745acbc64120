"""Exact Gaussian process regression with one length scale, as small as the search needs it. N points, F features, Q queries.

    k(x, x') = exp(-|x - x'|^2 / (2 l^2)),   y = f(x) + e,   f ~ GP(0, k),   e_i ~ N(0, noise_i)

Rasmussen & Williams 2006, Gaussian Processes for Machine Learning, algorithm 2.1. The prior variance is 1: the caller scales y.
scikit-learn's regressor computes the same (`tests/test_gp.py` compares the two) and takes ten times as long at these sizes,
most of it in checks of its input and in importing itself.
"""
from __future__ import annotations

import numpy as np

LENGTHS = np.geomspace(0.5, 10.0, 16)  # length scales to choose from, each 1.22 times the one before: a likelihood is flatter than that


def regress(x: np.ndarray, y: np.ndarray, noise: np.ndarray, length: float, query: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(Q,) mean and sd of f at `query` (Q, F), given `x` (N, F), `y` (N,) and `noise` (N,), variances above 0."""
    covariance = kernel(squares(x, x), length) + np.diag(noise)
    across = kernel(squares(query, x), length)
    solved = np.linalg.solve(covariance, np.concatenate([y[:, None], across.T], axis=1))
    return across @ solved[:, 0], np.sqrt(np.maximum(1.0 - (across * solved[:, 1:].T).sum(axis=1), 0.0))


def likeliest_length(x: np.ndarray, y: np.ndarray, noise: np.ndarray) -> float:
    """Of LENGTHS, the one with the largest marginal likelihood of y; the first of equals."""
    return float(LENGTHS[np.argmax(log_likelihood(x, y, noise, LENGTHS))])


def log_likelihood(x: np.ndarray, y: np.ndarray, noise: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(len(lengths),) log p(y | x, l) = -y' C^-1 y / 2 - log |C| / 2 - N log(2 pi) / 2, C = K + diag(noise)."""
    covariance = kernel(squares(x, x), lengths[:, None, None]) + np.diag(noise)
    root = np.linalg.cholesky(covariance)
    white = np.linalg.solve(root, np.broadcast_to(y[:, None], (len(lengths), len(y), 1)))[:, :, 0]
    return -0.5 * (white**2).sum(axis=1) - np.log(np.diagonal(root, axis1=1, axis2=2)).sum(axis=1) - 0.5 * len(y) * np.log(2 * np.pi)


def squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(len(a), len(b)) squared distances of rows."""
    return np.maximum((a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T, 0.0)


def kernel(squared: np.ndarray, length: float | np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * squared / np.square(length))
