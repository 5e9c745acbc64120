"""Buckets of attention: by hand, the best of all cuts, and close to what is needed."""
from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

from poise_hpc.training import buckets

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import bench_packing  # noqa: E402


def members(found):
    return [b.members.tolist() for b in found]


def test_split_by_hand():
    # After prompts of 10: 2 (10 + 2) = 24 cells each of the short ones, 100 (10 + 100) = 11,000 each of the long ones.
    p, c = np.full(4, 10), np.array([2, 100, 2, 100])
    two = buckets.split(p, c, 21_000)   # together 4 x 11,000: 21,952 more than 2 x 24 + 2 x 11,000
    assert members(two) == [[0, 2], [1, 3]] and [b.cells for b in two] == [48, 22_000]
    assert [(b.whole, b.queries, b.keys) for b in two] == [(False, 2, 12), (False, 100, 110)]
    one = buckets.split(p, c, 22_000)
    assert members(one) == [[0, 1, 2, 3]] and one[0].cells == 44_000


def test_whole_sequences_where_they_are_fewer_cells():
    # 2,010 (2,010 + 256) / 2 = 2,277,330 < 2,000 (10 + 2,000)
    (found,) = buckets.split(np.array([10]), np.array([2000]), 0)
    assert found.whole and (found.queries, found.keys, found.cells) == (2010, 2010, 2_277_330)
    (found,) = buckets.split(np.array([2000]), np.array([10]), 0)
    assert not found.whole and (found.queries, found.keys, found.cells) == (10, 2010, 20_100)
    # The longest sequence counts: it has not the longest completion.
    (found,) = buckets.split(np.array([10, 300]), np.array([2000, 1900]), 1 << 40)
    assert found.whole and found.keys == 2200
    (found,) = buckets.split(np.array([0]), np.array([7]), 0)
    assert found.whole  # prompts need no mask, however short


def test_completions_of_one_token_feed_none():
    assert buckets.split(np.array([3, 3]), np.array([0, 0]), 0) == []
    assert members(buckets.split(np.array([3, 3, 3]), np.array([4, 0, 4]), 0)) == [[0, 2]]


@pytest.mark.parametrize("seed", range(8))
def test_no_cuts_are_better(seed):
    """All cuts of seven sequences that are no longer than the grid is fine."""
    rng = np.random.default_rng(seed)
    p, c, price = rng.integers(1, 40, 7), rng.integers(1, buckets.GRID + 1, 7), int(rng.integers(1, 2000))
    c[0] = buckets.GRID
    order = np.argsort(c, kind="stable")

    def cost(edges):
        return sum(buckets.bucket(m, p[m], c[m]).cells + price for m in (order[a:b] for a, b in itertools.pairwise(edges)))

    best = min(cost((0, *inner, 7)) for k in range(7) for inner in itertools.combinations(range(1, 7), k))
    assert cost(buckets.cuts(p[order], c[order], price)) == best


@pytest.mark.parametrize("ranks", [1, 8])
def test_natural_lengths_need_few_buckets_and_little_more_than_the_cells_that_are_needed(ranks):
    found = bench_packing.count(ranks, 32768)
    assert found["buckets"] < 1.5 < 8 < found["one rectangle"]
    assert found["buckets per microbatch"] < 12
    assert found["padded rows"] < 1.15


def test_similar_lengths_stay_together():
    """A microbatch of the embedded lab."""
    size, rest = np.full(4, 19), np.repeat([4, 8, 13, 16, 19], [3, 6, 10, 5, 8])
    of_prompts, of_completions = buckets.of_microbatch(size, rest, np.arange(32) // 8)
    assert members(of_prompts) == [list(range(4))] and members(of_completions) == [list(range(32))]
