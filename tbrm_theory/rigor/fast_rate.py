"""``sup_t Λ(π_t, μ)`` over ``t ∈ [0,1]`` (B7), enclosed by subdivision.

From one initial state ``P_s(τ) = P_t(τ) e^{(s-t) f(τ)} / E_t e^{(s-t) f} ≤ P_t(τ) e^{|s-t| D}``, where ``D`` is the largest
spread ``max f - min f``. So the moment matrix of ``π_s`` is at most ``e^{|s-t| D}`` times that of ``π_t``, and so is Λ. A value
at the centre of an interval thus bounds Λ on all of it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from flint import arb, arb_mat, fmpq

from tbrm_theory.rigor.coverage import DataMoments
from tbrm_theory.rigor.decision import INFINITY, Between
from tbrm_theory.rigor.problem import moments
from tbrm_theory.rigor.soft import SoftProblem

__all__ = ["largest_second_moment"]

SQUARINGS = 16
"""Enough for a relative 1e-4, less than the subdivision leaves."""
TIGHT, ENOUGH_SUBDIVISIONS = fmpq(1, 100), 50
"""How narrow the enclosure is to be, and after how many subdivisions it may be wider if only it is decided."""
MOST_SUBDIVISIONS = 200
"""Then the subdivision gives up undecided."""


@dataclass(frozen=True)
class _Interval:
    centre: fmpq
    radius: fmpq
    value: arb
    """Λ at the centre."""
    bound: arb
    """At least Λ on the whole interval."""


def largest_second_moment(soft: SoftProblem, data: DataMoments, threshold: arb) -> Between:
    """``sup_t Λ(π_t, μ)``, refined until it is known to one part in a hundred, and on which side of ``threshold`` it lies.

    Transitions are deterministic and Λ finite (``data.identifies_all``).
    """
    spread = soft.spread()
    low = arb(1)
    for t in (fmpq(0), fmpq(1, 2), fmpq(1)):
        low = low.max(data.second_moment_at_least(tilted_moments(soft, data, t)))

    def interval(centre: fmpq, radius: fmpq) -> _Interval:
        value = data.second_moment_of(tilted_moments(soft, data, centre), SQUARINGS)
        return _Interval(centre, radius, value, value * (spread * radius).exp())

    pending = [interval(fmpq(1, 2), fmpq(1, 2)), interval(fmpq(0), fmpq(0)), interval(fmpq(1), fmpq(0))]
    for subdivisions in range(MOST_SUBDIVISIONS):
        if any(part.value.is_nan() for part in pending):
            return Between(low, INFINITY)
        low = max([low, *(part.value for part in pending)], key=lambda value: float(value.lower()))
        high = functools.reduce(arb.max, [part.bound for part in pending])
        decided = low > threshold or high < threshold
        if decided and (high < low * (1 + TIGHT) or subdivisions >= ENOUGH_SUBDIVISIONS):
            break
        widest = max(pending, key=lambda part: float(part.bound.upper()))
        pending.remove(widest)
        third = widest.radius / 3
        pending.append(_Interval(widest.centre, third, widest.value, widest.value * (spread * third).exp()))
        pending += [interval(centre, third) for centre in (widest.centre - 2 * third, widest.centre + 2 * third)]
    return Between(low, high)


def tilted_moments(soft: SoftProblem, data: DataMoments, t: fmpq) -> arb_mat:
    """``E_{π_t}[φφᵀ]`` on the basis of the data, for ``P_t ∝ P_{π*} e^{t f_θ}``: the soft plan of the reward ``R_β + t u``."""
    reward, terms = soft.regularized_reward, soft.terms
    plan = soft.soft_plan(soft.tabulate(lambda h, s, a: reward[h][s][a] + t * terms[h][s][a]))
    matrix = moments(soft.problem, soft.tabulate(lambda h, s, a: plan[h][s][a].exp()))
    return arb_mat(len(data.basis), len(data.basis), [matrix[i][j] for i in data.basis for j in data.basis])
