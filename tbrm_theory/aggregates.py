"""One number for many runs on several problems: the interquartile mean, with an interval by resampling runs within each problem.

Agarwal et al., arXiv 2108.13264: the mean of the middle half is less noisy than the median and is not ruled by one bad run, as the
mean is; the bootstrap is stratified, since the problems are chosen and only the runs are drawn.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.stats

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.statistics import Interval

__all__ = ["interquartile_mean", "stratified_interval"]

Table = npt.NDArray[np.float64]


def interquartile_mean(scores: Table) -> Table:
    """The mean of what is left without the lowest and the highest quarter, over problems and runs together.

    Args:
        scores: ``(problems, runs, …)``; a quarter of the runs is rounded down.
    """
    return np.asarray(scipy.stats.trim_mean(_checked(scores).reshape(-1, *scores.shape[2:]), 0.25, axis=0))


def stratified_interval(
    scores: Table, *, seed: int, confidence: float = 0.95, resamples: int = 2000
) -> tuple[Table, Table]:
    """Both ends of the percentile bootstrap interval of :func:`interquartile_mean`: runs are drawn anew within each problem."""
    problems, runs = _checked(scores).shape[:2]
    generator = np.random.default_rng(seed)
    drawn = generator.integers(runs, size=(resamples, problems, runs))
    means = np.stack([interquartile_mean(scores[np.arange(problems)[:, None], index]) for index in drawn])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return low, high


def interval_of_runs(scores: Table, *, seed: int) -> tuple[float, Interval]:
    """The interquartile mean of the runs on one problem, and its interval."""
    table = np.asarray(scores, dtype=np.float64)[None]
    low, high = stratified_interval(table, seed=seed)
    return float(interquartile_mean(table)), Interval(float(low), float(high))


def _checked(scores: Table) -> Table:
    if scores.ndim < 2 or 0 in scores.shape:
        raise InvalidInputError("scores", f"expected shape (problems, runs, …), none of them 0, found {scores.shape}")
    if not np.isfinite(scores).all():
        raise InvalidInputError("scores", "expected finite numbers")
    return scores
