"""Intervals, slopes and p-values against published values and exact sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.statistics import (
    CHECK_FAILURE_RATE,
    SUITE_FAILURE_RATE,
    binomial_interval,
    bootstrap_interval,
    chi_square_p_value,
    log_log_slope,
)

MENDEL = [315, 101, 108, 32]  # peas: round yellow, wrinkled yellow, round green, wrinkled green


def test_chi_square_of_mendels_peas():
    """Expected 9:3:3:1, χ² = 0.470024 with 3 degrees of freedom, whose tail is erfc(√(x/2)) + √(2x/π) e^{-x/2}."""
    expected = [9 / 16, 3 / 16, 3 / 16, 1 / 16]
    x = sum((seen - 556 * p) ** 2 / (556 * p) for seen, p in zip(MENDEL, expected, strict=True))
    assert x == pytest.approx(0.470024, abs=1e-6)
    tail = math.erfc(math.sqrt(x / 2)) + math.sqrt(2 * x / math.pi) * math.exp(-x / 2)
    assert chi_square_p_value(MENDEL, expected) == pytest.approx(tail, rel=1e-12)
    assert chi_square_p_value(torch.tensor(MENDEL), torch.tensor(expected, dtype=torch.float64)) == pytest.approx(tail)


def test_chi_square_pools_the_rare_cells():
    """100 counts: 0.02 + 0.02 + 0.02 expect 2 each, 6 together; they are one cell, whatever their order."""
    rare = chi_square_p_value([3, 52, 1, 41, 3], [0.02, 0.5, 0.02, 0.44, 0.02])
    assert rare == pytest.approx(scipy.stats.chisquare([52, 41, 7], [50, 44, 6]).pvalue)


def test_chi_square_pools_a_small_rest_with_the_rarest_sufficient_cell():
    """0.01 expects one count in 100, so the next cell, which expects 9, joins it."""
    rest = chi_square_p_value([0, 11, 89], [0.01, 0.09, 0.9])
    assert rest == pytest.approx(scipy.stats.chisquare([11, 89], [10, 90]).pvalue)


def test_chi_square_of_one_cell_says_nothing():
    assert chi_square_p_value([10], [1.0]) == 1.0
    assert chi_square_p_value([3, 1], [0.5, 0.5]) == 1.0  # both pooled


def test_chi_square_of_an_impossible_cell_is_zero():
    assert chi_square_p_value([99, 1], [1.0, 0.0]) == 0.0
    assert chi_square_p_value([50, 50, 0], [0.5, 0.5, 0.0]) == 1.0


def test_chi_square_p_values_are_uniform():
    """Under the null hypothesis a p-value is below 0.1 in 10 % of experiments; 2,000 of them with a pooled cell."""
    probability = np.array([0.4, 0.3, 0.2, 0.06, 0.02, 0.01, 0.01])
    draws = np.random.default_rng(0).multinomial(400, probability, size=2000)
    small = sum(chi_square_p_value(row, probability) < 0.1 for row in draws)
    assert scipy.stats.binomtest(small, 2000, 0.1).pvalue > CHECK_FAILURE_RATE


def test_the_failure_rates_leave_room_for_a_hundred_checks():
    assert CHECK_FAILURE_RATE * 100 <= SUITE_FAILURE_RATE * (1 + 1e-12)


def test_wilson_interval_is_the_root_of_its_quadratic():
    """``|p̂ - p| = z √(p(1-p)/n)`` at both ends; 15 of 148 gives 0.0624 to 0.1605 (Newcombe 1998, method 3)."""
    low, high = binomial_interval(15, 148)
    assert (low, high) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    z = scipy.stats.norm.ppf(0.975)
    for p in (low, high):
        assert abs(15 / 148 - p) == pytest.approx(z * math.sqrt(p * (1 - p) / 148), rel=1e-9)


def test_exact_interval_has_exact_tails():
    """``P(X ≥ 3)`` at the lower end and ``P(X ≤ 3)`` at the upper end are 2.5 %, summed term by term."""
    low, high = binomial_interval(3, 20, method="exact")

    def term(k: int, p: float) -> float:
        return math.comb(20, k) * p**k * (1 - p) ** (20 - k)

    assert math.fsum(term(k, low) for k in range(3, 21)) == pytest.approx(0.025, rel=1e-6)
    assert math.fsum(term(k, high) for k in range(4)) == pytest.approx(0.025, rel=1e-6)


def test_interval_of_no_successes_starts_at_zero():
    assert binomial_interval(0, 10, method="exact").low == 0.0
    assert binomial_interval(0, 10, method="exact").high == pytest.approx(1 - 0.025**0.1)
    assert binomial_interval(10, 10).high == 1.0


def test_log_log_slope_of_a_power():
    x = [1.0, 2.0, 5.0, 10.0]
    slope, (low, high) = log_log_slope(x, [3 * v**-1.5 for v in x])
    assert slope == pytest.approx(-1.5, abs=1e-12)
    assert (low, high) == pytest.approx((-1.5, -1.5), abs=1e-9)


def test_log_log_slope_covers_the_exponent_as_often_as_it_says():
    """90 % of 1,000 intervals, from 6 points with log-normal noise, hold the exponent -1."""
    generator = np.random.default_rng(1)
    x = np.array([10.0, 20, 40, 80, 160, 320])
    covered = 0
    for _ in range(1000):
        _, (low, high) = log_log_slope(x, np.exp(generator.normal(0, 0.3, 6)) / x, confidence=0.9)
        covered += low <= -1 <= high
    assert scipy.stats.binomtest(covered, 1000, 0.9).pvalue > CHECK_FAILURE_RATE


def test_bootstrap_interval_is_close_to_the_normal_one():
    """The mean of 400 normal draws; the interval repeats with its seed and changes with it."""
    sample = np.random.default_rng(2).normal(3.0, 2.0, 400)
    low, high = bootstrap_interval(sample, seed=0)
    error = sample.std(ddof=1) / 20
    assert low == pytest.approx(sample.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(sample.mean() + 1.96 * error, abs=0.1 * error)
    assert (low, high) == bootstrap_interval(torch.from_numpy(sample), seed=0)
    assert (low, high) != bootstrap_interval(sample, seed=1)


def test_bootstrap_interval_of_a_statistic_that_hardly_moves():
    """The median of equal numbers, and of all but one equal ones, for which BCa is 0/0."""
    assert bootstrap_interval([2.0, 2.0, 2.0], np.median, seed=0) == (2.0, 2.0)
    low, high = bootstrap_interval([0.0] * 7 + [1.0], np.median, seed=0)
    assert 0.0 == low <= high <= 1.0


@pytest.mark.parametrize(
    ("call", "where"),
    [
        (lambda: chi_square_p_value([1, 2], [1.0]), "expected"),
        (lambda: chi_square_p_value([0, 0], [0.5, 0.5]), "observed"),
        (lambda: chi_square_p_value([-1, 2], [0.5, 0.5]), "observed"),
        (lambda: chi_square_p_value([0.5, 2], [0.5, 0.5]), "observed"),
        (lambda: chi_square_p_value([math.nan, 2], [0.5, 0.5]), "observed"),
        (lambda: chi_square_p_value([1, 2], [0.5, 0.6]), "expected"),
        (lambda: chi_square_p_value([1, 2], [1.5, -0.5]), "expected"),
        (lambda: chi_square_p_value([], []), "observed"),
        (lambda: binomial_interval(0, 0), "trials"),
        (lambda: binomial_interval(3, 2), "successes"),
        (lambda: binomial_interval(1, 2, confidence=1.0), "confidence"),
        (lambda: log_log_slope([1.0, 2.0], [1.0, 2.0]), "x"),
        (lambda: log_log_slope([1.0, 2.0, 3.0], [1.0, 2.0]), "y"),
        (lambda: log_log_slope([1.0, 2.0, 3.0], [1.0, 0.0, 2.0]), "y"),
        (lambda: log_log_slope([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]), "x"),
        (lambda: bootstrap_interval([1.0], seed=0), "sample"),
        (lambda: bootstrap_interval([1.0, math.inf], seed=0), "sample"),
        (lambda: bootstrap_interval([1.0, 2.0], seed=0, confidence=0.0), "confidence"),
    ],
)
def test_bad_input_is_named(call: Callable[[], Any], where: str):
    with pytest.raises(InvalidInputError) as error:
        call()
    assert error.value.where == where


def test_the_interval_of_a_slope_is_students_with_two_degrees_fewer_than_points() -> None:
    """Five points, worked by hand: 3.182446 is the 97.5 % quantile of Student's t with 3 degrees of freedom."""
    logs, noise = [0.0, 1.0, 2.0, 3.0, 4.0], [0.1, -0.2, 0.0, 0.2, -0.1]  # of sum 0
    slope = 2.0 + sum((x - 2) * e for x, e in zip(logs, noise, strict=True)) / 10
    left = [e - (slope - 2.0) * (x - 2) for x, e in zip(logs, noise, strict=True)]
    width = 3.182446305284263 * math.sqrt(sum(e * e for e in left) / 3 / 10)
    found = log_log_slope([math.exp(x) for x in logs], [math.exp(2 * x + e) for x, e in zip(logs, noise, strict=True)])
    assert found.slope == pytest.approx(slope, rel=1e-12)
    assert found.interval == pytest.approx((slope - width, slope + width), rel=1e-10)
