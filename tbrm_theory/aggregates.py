"""One number for many runs on several problems: the interquartile mean, with an interval by resampling runs within each problem.

Agarwal et al., arXiv 2108.13264: the mean of the middle half is less noisy than the median and is not ruled by one bad run, as the
mean is; the bootstrap is stratified, since the problems are chosen and only the runs are drawn.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tbrm_theory.errors import InvalidInputError

__all__ = ["interquartile_mean", "stratified_interval"]

Table = npt.NDArray[np.float64]


def interquartile_mean(scores: Table) -> Table:
    """The mean of what is left without the lowest and the highest quarter, over problems and runs together.

    Args:
        scores: ``(problems, runs, …)``; a quarter of all runs is rounded down.

    Raises:
        InvalidInputError: no runs, or a number that is not finite.
    """
    _check(scores)
    return _middle_mean(scores.reshape(-1, *scores.shape[2:]))


def stratified_interval(
    scores: Table, *, seed: int, confidence: float = 0.95, resamples: int = 2000
) -> tuple[Table, Table]:
    """Both ends of the percentile bootstrap interval of :func:`interquartile_mean`: runs are drawn anew within each problem.

    Raises:
        InvalidInputError: no runs, or a number that is not finite.
    """
    _check(scores)
    problems, runs = scores.shape[:2]
    drawn = np.random.default_rng(seed).integers(runs, size=(resamples, problems, runs))
    samples = scores[np.arange(problems)[:, None], drawn]  # (resamples, problems, runs, …)
    means = _middle_mean(np.moveaxis(samples.reshape(resamples, problems * runs, *scores.shape[2:]), 0, 1))
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return np.asarray(low), np.asarray(high)


def _middle_mean(scores: Table) -> Table:
    """Over the first dimension."""
    cut = len(scores) // 4
    return np.asarray(np.sort(scores, axis=0)[cut : len(scores) - cut].mean(0))


def _check(scores: Table) -> None:
    if scores.ndim < 2 or 0 in scores.shape:
        raise InvalidInputError("scores", f"expected shape (problems, runs, …), none of them 0, found {scores.shape}")
    if not np.isfinite(scores).all():
        raise InvalidInputError("scores", "expected finite numbers")
