"""Intervals, rates and tests for numbers that come from random draws.

A rate is the slope of a log-log regression, with its interval. A stochastic check is a p-value against a rate of false alarms that
is stated once, for the whole suite: :data:`SUITE_FAILURE_RATE`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.special
import scipy.stats
from torch import Tensor

from tbrm_theory.errors import InvalidInputError

__all__ = [
    "CHECK_FAILURE_RATE",
    "SUITE_FAILURE_RATE",
    "Interval",
    "Slope",
    "binomial_interval",
    "bootstrap_interval",
    "chi_square_p_value",
    "log_log_slope",
]

SUITE_FAILURE_RATE = 1e-4
"""The probability that any stochastic check of the test suite fails although all is right, over the choice of its seeds."""
CHECK_FAILURE_RATE = 1e-6
"""A single check fails at a smaller p-value than this, which leaves room for a hundred checks."""

Numbers: TypeAlias = Sequence[float | int] | npt.NDArray[Any] | Tensor


class Interval(NamedTuple):
    low: float
    high: float


class Slope(NamedTuple):
    slope: float
    interval: Interval


def chi_square_p_value(observed: Numbers, expected: Numbers, *, least: float = 5.0) -> float:
    """Pearson's test of counts against probabilities: how likely counts at least this far off are.

    Cells that expect fewer than ``least`` counts are pooled, the rarest first, until none is left; the χ² law is only accurate
    above some 5.

    Args:
        observed: how often each cell occurred.
        expected: the probability of each cell; they sum to 1 within 1e-9.

    Returns:
        0 if a cell of probability 0 occurred; 1 if pooling leaves a single cell, which says nothing.

    Raises:
        InvalidInputError: unequal lengths, no counts, negative or fractional ones, or other than probabilities.
    """
    counts, probability = _vector(observed, "observed"), _vector(expected, "expected")
    if counts.shape != probability.shape:
        raise InvalidInputError("expected", f"expected {len(counts)} probabilities, found {len(probability)}")
    if (counts < 0).any() or (counts != np.round(counts)).any() or counts.sum() == 0:
        raise InvalidInputError("observed", "expected counts, not all of them 0")
    if (probability < 0).any() or abs(probability.sum() - 1) > 1e-9:
        raise InvalidInputError("expected", f"expected probabilities that sum to 1, found the sum {probability.sum()}")
    if counts[probability == 0].any():
        return 0.0
    order = np.argsort(probability, kind="stable")
    order = order[probability[order] > 0]
    mean, counts = probability[order] * counts.sum(), counts[order]
    sums = np.cumsum(mean)
    # The rarest cells form one, up to the first that brings it to `least` and after which none is below `least`.
    pooled = max(int(np.searchsorted(sums, least)), int(np.searchsorted(mean, least)) - 1)
    pooled = min(pooled, len(mean) - 1)
    mean = np.concatenate([mean[: pooled + 1].sum(keepdims=True), mean[pooled + 1 :]])
    counts = np.concatenate([counts[: pooled + 1].sum(keepdims=True), counts[pooled + 1 :]])
    if len(mean) == 1:
        return 1.0
    statistic = float(((counts - mean) ** 2 / mean).sum())
    return float(scipy.stats.chi2.sf(statistic, len(mean) - 1))


def binomial_interval(
    successes: int, trials: int, *, confidence: float = 0.95, method: Literal["wilson", "exact"] = "wilson"
) -> Interval:
    """Wilson's interval for a probability, or Clopper and Pearson's, which is wider and never covers too little.

    Raises:
        InvalidInputError: no trials, other than 0 to ``trials`` successes, or a confidence outside ``(0, 1)``.
    """
    if trials < 1:
        raise InvalidInputError("trials", f"expected at least 1, found {trials}")
    if not 0 <= successes <= trials:
        raise InvalidInputError("successes", f"expected from 0 to {trials}, found {successes}")
    _check_confidence(confidence)
    if method == "exact":
        # Quantiles of beta laws. SciPy's own function finds them by bisection on the binomial law, a thousand times slower.
        tail, failures = (1 - confidence) / 2, trials - successes
        low = scipy.special.betaincinv(successes, failures + 1, tail) if successes else 0.0
        high = scipy.special.betaincinv(successes + 1, failures, 1 - tail) if failures else 1.0
        return Interval(float(low), float(high))
    found = scipy.stats.binomtest(successes, trials).proportion_ci(confidence, method)
    return Interval(float(found.low), float(found.high))


def log_log_slope(x: Numbers, y: Numbers, *, confidence: float = 0.95) -> Slope:
    """The exponent ``b`` of ``y ≈ c·x^b`` by least squares on logarithms, with Student's interval.

    Raises:
        InvalidInputError: fewer than three points, unequal lengths, numbers that are not positive, or a single ``x``.
    """
    _check_confidence(confidence)
    logs = []
    for name, values in (("x", x), ("y", y)):
        vector = _vector(values, name)
        if (vector <= 0).any():
            raise InvalidInputError(name, f"expected positive numbers, found {vector[vector <= 0][0]}")
        logs.append(np.log(vector))
    if len(logs[0]) != len(logs[1]):
        raise InvalidInputError("y", f"expected {len(logs[0])} numbers, as in x, found {len(logs[1])}")
    if len(logs[0]) < 3:
        raise InvalidInputError("x", f"expected at least 3 points, found {len(logs[0])}")
    if np.ptp(logs[0]) == 0:
        raise InvalidInputError("x", "expected different numbers, found one only")
    fit = scipy.stats.linregress(*logs)
    width = float(fit.stderr * scipy.stats.t.ppf((1 + confidence) / 2, len(logs[0]) - 2))
    slope = float(fit.slope)
    return Slope(slope, Interval(slope - width, slope + width))


def bootstrap_interval(
    sample: Numbers,
    statistic: Callable[..., Any] = np.mean,
    *,
    seed: int,
    confidence: float = 0.95,
    resamples: int = 9999,
) -> Interval:
    """Efron's interval for a statistic of independent draws, corrected for bias and acceleration (BCa).

    Where leaving out a draw never changes the statistic there is no such correction, and the plain percentiles are given.

    Args:
        statistic: a function of an array and an ``axis``, such as ``np.mean`` or ``np.median``.
        seed: of the resampling.

    Raises:
        InvalidInputError: fewer than two numbers, or one that is not finite.
    """
    values = _vector(sample, "sample")
    if len(values) < 2:
        raise InvalidInputError("sample", f"expected at least 2 numbers, found {len(values)}")
    _check_confidence(confidence)
    if np.ptp(values) == 0:
        point = float(statistic(values, axis=-1))
        return Interval(point, point)

    def interval(method: str) -> Interval:
        with warnings.catch_warnings(), np.errstate(invalid="ignore"):
            warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
            found = scipy.stats.bootstrap(
                (values,),
                statistic,
                confidence_level=confidence,
                n_resamples=resamples,
                method=method,
                random_state=np.random.default_rng(seed),
            ).confidence_interval
        return Interval(float(found.low), float(found.high))

    corrected = interval("BCa")
    return corrected if np.isfinite(corrected).all() else interval("percentile")


def _vector(values: Numbers, name: str) -> npt.NDArray[np.float64]:
    vector = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
    if vector.ndim != 1 or not len(vector):
        raise InvalidInputError(name, f"expected a list of numbers, found shape {vector.shape}")
    if not np.isfinite(vector).all():
        raise InvalidInputError(name, f"expected finite numbers, found {vector[~np.isfinite(vector)][0]}")
    return vector


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise InvalidInputError("confidence", f"expected a number between 0 and 1, found {confidence}")
