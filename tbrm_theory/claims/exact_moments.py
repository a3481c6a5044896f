"""κ in rational arithmetic, for small problems: the other side of claims about data that are not Markov.

From the definition alone, ``κ = sup_f (E_π Σf)² / E_μ[(Σf)²]`` over all additive ``f``: the moments ``v = E_π φ`` and
``M = E_μ[φφᵀ]`` are sums over listed trajectories, and ``M x = v`` is reduced without rounding, so that whether it has a solution is
decided and not estimated. Shares nothing with ``coverage`` and ``moments`` but the list of trajectories.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from flint import fmpq, fmpq_mat
from torch import Tensor

from tbrm_theory.occupancy import Enumeration

__all__ = ["exact_kappa", "in_rationals"]


def in_rationals(law: Tensor) -> list[Fraction]:
    """The probabilities of a law on listed trajectories, as the rationals that the doubles are."""
    return [Fraction(probability) for probability in law.tolist()]


def exact_kappa(listed: Enumeration, law_pi: Sequence[Fraction], law_mu: Sequence[Fraction]) -> Fraction | float:
    """``κ(π,μ) = vᵀ x`` with ``M x = v``; ``inf`` if there is no such ``x``.

    Only which trajectories are possible decides whether there is one, so laws that do not quite sum to 1 do no harm.
    """
    states, actions = listed.states.tolist(), listed.actions.tolist()
    visits = [list(zip(range(len(s)), s, a, strict=True)) for s, a in zip(states, actions, strict=True)]
    place = {pair: i for i, pair in enumerate(sorted({pair for visited in visits for pair in visited}))}
    n = len(place)
    mean = [Fraction(0)] * n
    matrix = [[Fraction(0)] * n for _ in range(n)]
    for visited, p, m in zip(visits, law_pi, law_mu, strict=True):
        where = [place[pair] for pair in visited]
        for i in where:
            mean[i] += p
            for j in where:
                matrix[i][j] += m
    system = fmpq_mat([[*map(_rational, row), _rational(v)] for row, v in zip(matrix, mean, strict=True)])
    reduced, rank = system.rref()
    kappa = Fraction(0)
    for row in range(rank):
        column = next(j for j in range(n + 1) if reduced[row, j] != 0)
        if column == n:  # 0 = 1: the mean is not in the range of M
            return math.inf
        value = reduced[row, n]
        kappa += mean[column] * Fraction(int(value.p), int(value.q))
    return kappa


def _rational(number: Fraction) -> fmpq:
    return fmpq(number.numerator, number.denominator)
