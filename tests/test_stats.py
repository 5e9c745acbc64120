import math

import numpy as np
import pytest
from helpers_archive import score as made_score

from poise_hpc import stats
from poise_hpc.types import PoiseError


def merged(*overalls, hard=10.0):
    """Points at 0.5 and 1.0, as evaluation.metrics.merge returns them."""
    points = {at: {"overall": o, "benchmarks": {"hard/pass@32": hard}, "valid": 1.0, "truncated": 0.0, "length": 9.0}
              for at, o in zip(("0.5", "1.0"), overalls, strict=True)}
    return {"points": points, "curve": sum(overalls) / 2, "final": overalls[-1]}


def test_mean_interval_by_hand():
    # 1, 2, 3: mean 2, sd 1, t(0.975, 2) = 4.3027, half width 4.3027 / sqrt(3) = 2.4841
    mean, (low, high) = stats.mean_interval([1.0, 2.0, 3.0])
    assert mean == 2 and high - mean == pytest.approx(2.4841, abs=1e-4) == mean - low


def test_one_value_has_no_interval():
    assert stats.mean_interval([5.0]) == (5.0, None)


def test_paired_difference_takes_common_seeds_only():
    # Seeds 0 and 1: differences 1 and 3, mean 2, sd sqrt(2), t(0.975, 1) = 12.7062, half width 12.7062
    delta, ci = stats.paired_difference({"0": 11.0, "1": 23.0, "7": 99.0}, {"0": 10.0, "1": 20.0, "2": 0.0})
    assert delta == 2 and ci == pytest.approx((2 - 12.7062, 2 + 12.7062), abs=1e-3)
    assert stats.paired_difference({"0": 1.0}, {"1": 1.0}) is None


def test_pairing_removes_what_seeds_share():
    ours, theirs = {"0": 11.0, "1": 51.0, "2": 91.0}, {"0": 10.0, "1": 50.0, "2": 90.0}
    assert stats.paired_difference(ours, theirs)[1] == (1.0, 1.0)


def test_score_by_hand():
    ours = {0: merged(20.0, 40.0, hard=8.0), 1: merged(24.0, 44.0, hard=12.0)}
    base = {0: merged(20.0, 38.0), 1: merged(20.0, 40.0), 2: merged(0.0, 0.0)}
    s = stats.score(ours, base, "curve")
    assert s.by_seed == {"0": 30.0, "1": 34.0} and s.overall == 32 and s.final == 42
    assert s.curve == {"0.5": 22.0, "1.0": 42.0} and s.benchmarks == {"hard/pass@32": 10.0}
    assert s.delta == 2.5  # 30 - 29 and 34 - 30
    assert stats.score(ours, base, "final").overall == 42
    alone = stats.score({0: ours[0]}, None, "curve")
    assert alone.ci is None and alone.delta is None


def test_score_without_a_seed_says_so():
    with pytest.raises(PoiseError, match="at least one training seed"):
        stats.score({}, None, "curve")


def test_pooled_sd_by_hand():
    # sd 3 from 3 seeds and sd 1 from 2: sqrt((2 * 9 + 1 * 1) / 3); a single seed adds nothing
    scores = [made_score(10, sd=3, seeds=3), made_score(50, sd=1, seeds=2), made_score(90, seeds=1)]
    assert stats.pooled_sd(scores) == pytest.approx(math.sqrt(19 / 3))
    assert stats.pooled_sd(scores[2:]) is None and stats.pooled_sd([]) is None


def test_standard_errors_shrink_to_the_pooled_spread():
    # one seed: the pooled 2 / sqrt(1). Two equal seeds: v = (4 * 4 + 0) / (4 + 1) = 3.2, se = sqrt(1.6)
    scores = [made_score(10, seeds=1), made_score(10, sd=0.0, seeds=2)]
    np.testing.assert_allclose(stats.standard_errors(scores, 2.0), [2.0, math.sqrt(1.6)])
    np.testing.assert_allclose(stats.standard_errors(scores, None), [0, 0])
