"""Intervals against formulas worked out by hand."""

from __future__ import annotations

from math import sqrt

import pytest

from megasora.evaluation.intervals import summarise, wilson_interval

Z = 1.959963984540054
"""97.5 % point of the normal distribution."""


def test_mean_and_standard_deviation_by_hand() -> None:
    # mean 4; squared differences 4, 0, 4 over n - 1 = 2
    found = summarise([2.0, 4.0, 6.0])
    assert (found.count, found.mean) == (3, 4.0)
    assert found.std == pytest.approx(2.0)


def test_the_bootstrap_of_two_clips_is_their_range() -> None:
    # means of two draws from {0, 1} are 0, 1/2, 1 with probability 1/4, 1/2, 1/4: both tails hold more than 2.5 %
    found = summarise([0.0, 1.0])
    assert (found.low, found.high) == (0.0, 1.0)


def test_the_bootstrap_of_many_clips_is_the_normal_interval() -> None:
    # 1,000 clips, half 0 and half 1: the mean's standard error is 0.5 / sqrt(1000)
    found = summarise([0.0, 1.0] * 500)
    half = Z * 0.5 / sqrt(1000)
    assert found.low == pytest.approx(0.5 - half, abs=0.002)
    assert found.high == pytest.approx(0.5 + half, abs=0.002)


def test_equal_clips_have_an_interval_of_no_width_and_one_clip_has_none() -> None:
    equal = summarise([3.0] * 5)
    assert (equal.std, equal.low, equal.high) == (0.0, 3.0, 3.0)
    one = summarise([3.0])
    assert (one.mean, one.std, one.low, one.high) == (3.0, None, None, None)
    with pytest.raises(ValueError, match="at least one"):
        summarise([])


def test_the_same_seed_gives_the_same_interval() -> None:
    values = [0.1, 0.5, 0.9, 0.2]
    assert summarise(values, seed=3) == summarise(values, seed=3)


@pytest.mark.parametrize(("successes", "trials"), [(7, 10), (1, 3), (50, 100)])
def test_wilson_solves_its_equation(successes: int, trials: int) -> None:
    # the ends are the shares p with (successes / trials - p)^2 = z^2 p (1 - p) / trials
    for end in wilson_interval(successes, trials):
        assert (successes / trials - end) ** 2 == pytest.approx(Z**2 * end * (1 - end) / trials, rel=1e-9)


def test_wilson_at_the_ends_by_hand() -> None:
    # no success: (0, z^2 / (n + z^2)); n = 10: 3.8414588 / 13.8414588 = 0.2775328
    low, high = wilson_interval(0, 10)
    assert low == 0.0
    assert high == pytest.approx(0.2775328, abs=1e-7)
    assert wilson_interval(10, 10) == pytest.approx((1 - 0.2775328, 1.0), abs=1e-7)
    with pytest.raises(ValueError, match="no share"):
        wilson_interval(3, 2)
