"""The inequalities of theory.md and the false ones that a search must refute, as two sides on one instance.

Names in the instance: policy ``pi`` is the target π; policy ``mu`` is Markov data, or mixture ``mu`` is data of policies drawn
once per episode (its components may have any names); logits ``theta`` are θ, and ``better`` are others to compare with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from flint import arb, fmpq

from tbrm_theory.rigor.coverage import DataMoments, chi_squares, closed_form, flat, largest_ratio
from tbrm_theory.rigor.decision import INFINITY, Between, Number, Relation, Sides, is_infinite
from tbrm_theory.rigor.fast_rate import largest_second_moment
from tbrm_theory.rigor.problem import Component, ExactProblem, Table, mixed_table, occupancy, rational_moments
from tbrm_theory.rigor.soft import SoftProblem
from tbrm_theory.rigor.stationary import stationary_point

__all__ = ["STATEMENTS", "Statement"]


Bound: TypeAlias = Callable[[int, Any], fmpq]
"""A bound as a function of H and C_∞."""


@dataclass(frozen=True)
class Statement:
    """What is claimed, and how to compute both sides of it at the present precision."""

    text: str
    sides: Callable[[ExactProblem], Sides]
    relation: Relation = "at most"
    deterministic: bool = False
    """Whether it speaks of deterministic transitions only."""
    markov: bool = False
    """Whether it speaks of Markov data only."""
    true: bool = True


# -- change of measure, in rationals -------------------------------------------------------------------------------


def _occupancies(problem: ExactProblem) -> tuple[Table, Table]:
    """Of ``pi`` and of ``mu``."""
    return occupancy(problem, problem.policy("pi")), _data_occupancy(problem, problem.behaviour("mu"))


def _data_occupancy(problem: ExactProblem, behaviour: list[Component]) -> Table:
    return mixed_table([(weight, occupancy(problem, policy)) for weight, policy in behaviour])


def _kappa(problem: ExactProblem) -> Number:
    return DataMoments(problem, problem.behaviour("mu")).kappa(occupancy(problem, problem.policy("pi")))


def _lemma1(problem: ExactProblem) -> Number:
    pi, mu = _occupancies(problem)
    shifts = chi_squares(flat(pi), flat(mu))
    return INFINITY if any(map(is_infinite, shifts)) else 1 + sum(shifts, fmpq(0))


def _largest_shift(problem: ExactProblem) -> Number:
    """``1 + max_h χ²(d^π_h(s,a) ‖ d^μ_h(s,a))``."""
    pi, mu = _occupancies(problem)
    shifts = chi_squares(flat(pi), flat(mu))
    return INFINITY if any(map(is_infinite, shifts)) else 1 + max(shifts)


def _of_largest_ratio(problem: ExactProblem, bound: Bound) -> Number:
    """A function of H and C_∞."""
    ratio = largest_ratio(*_occupancies(problem))
    return INFINITY if is_infinite(ratio) else bound(problem.horizon, ratio)


def _kappa_at_most_lemma1(problem: ExactProblem) -> Sides:
    return Sides(_kappa(problem), _lemma1(problem))


def _kappa_at_most_largest_shift(problem: ExactProblem) -> Sides:
    return Sides(_kappa(problem), _largest_shift(problem))


def _closed_form_is_kappa(problem: ExactProblem) -> Sides:
    return Sides(closed_form(*_occupancies(problem)), _kappa(problem))


def _lemma1_at_most(bound: Bound) -> Callable[[ExactProblem], Sides]:
    return lambda problem: Sides(_lemma1(problem), _of_largest_ratio(problem, bound))


def _second_moment_at_most(bound: Bound) -> Callable[[ExactProblem], Sides]:
    """By a ball around Λ, and where that meets the bound by whether ``bound·M_μ - M_π`` is positive semidefinite."""

    def sides(problem: ExactProblem) -> Sides:
        data = DataMoments(problem, problem.behaviour("mu"))
        target = rational_moments(problem, [(fmpq(1), problem.policy("pi"))])
        right = _of_largest_ratio(problem, bound)
        if not data.bounds_second_moments_of(target):
            return Sides(INFINITY, right)
        left = data.second_moment(target)
        if is_infinite(right) or left < right or left > right:
            return Sides(left, right)
        assert isinstance(right, fmpq)
        return Sides(left, right, violated=not data.second_moment_at_most(target, right), exact=True)

    return sides


# -- regret and loss, in balls -------------------------------------------------------------------------------------


def _theta(problem: ExactProblem) -> SoftProblem:
    return SoftProblem(problem, problem.logits("theta"))


def _kappa_of_full_support(problem: ExactProblem, behaviour: list[Component], visits: Table) -> Number:
    """κ of a policy of balls with full support: I12 for Markov data, the supremum itself for a mixture."""
    if len(behaviour) == 1:
        return closed_form(visits, _data_occupancy(problem, behaviour))
    return DataMoments(problem, behaviour).kappa_of_full_support(visits)


def _root(number: Number) -> arb:
    """Of a ball around a number that is not negative."""
    return arb(number).nonnegative_part().sqrt()


def _theorem2(problem: ExactProblem, factor: fmpq, *, within_starts: bool) -> Sides:
    """``regret ≤ factor·β(√κ(π*,μ) + √κ(π_θ,μ))√L_μ``; within starts, each κ less 1 and the variance given ``s_1``."""
    soft, behaviour = _theta(problem), problem.behaviour("mu")
    kappas = [
        _kappa_of_full_support(problem, behaviour, occupancy(problem, policy))
        for policy in (soft.optimal_policy, soft.policy)
    ]
    if any(map(is_infinite, kappas)):
        return Sides(soft.regret, INFINITY)
    shift, error = (1, soft.variance_within_starts(behaviour)) if within_starts else (0, soft.loss(behaviour))
    roots = sum((_root(kappa - shift) for kappa in kappas), arb(0))
    return Sides(soft.regret, factor * problem.beta * roots * _root(error))


def _fast_rate(problem: ExactProblem, factor: fmpq) -> Sides:
    """``regret ≤ factor·β·sup_t Λ(π_t,μ)·L_μ``."""
    soft, behaviour = _theta(problem), problem.behaviour("mu")
    data = DataMoments(problem, behaviour)
    if not data.identifies_all:
        return Sides(soft.regret, INFINITY)
    slope = factor * problem.beta * soft.loss(behaviour)
    largest = largest_second_moment(soft, data, soft.regret / slope)
    return Sides(soft.regret, Between(slope * largest.low, slope * largest.high))


def _corollary4(problem: ExactProblem) -> Sides:
    soft = _theta(problem)
    return Sides(soft.regret + problem.beta * soft.divergence_from_optimum, soft.corollary4)


def _gradient_domination(problem: ExactProblem) -> Sides:
    soft, behaviour = _theta(problem), problem.behaviour("mu")
    visits, half = _data_occupancy(problem, behaviour), soft.half_gradient(soft.covariances(behaviour))
    size = arb(0)
    for h, s, a in problem.pairs:
        if visits[h][s][a] > 0:
            size = size.max(abs(soft.terms[h][s][a]))
    norm = sum((abs(half[h][s][a]) for h, s, a in problem.pairs), arb(0))
    return Sides(soft.loss(behaviour), problem.horizon * size * norm)  # (H/2)·max|u|·‖2G‖


def _stationary_at_most(problem: ExactProblem, right: Callable[[ExactProblem, list[Component]], Number]) -> Sides:
    """The loss at a proved stationary point near ``theta``; a ball of any number if none is proved."""
    behaviour = problem.behaviour("mu")
    point = stationary_point(problem, problem.logits("theta"), behaviour)
    return Sides(arb.nan() if point is None else point.loss, right(problem, behaviour))


def _better(problem: ExactProblem, behaviour: list[Component]) -> Number:
    return SoftProblem(problem, problem.logits("better")).loss(behaviour)


# -- the table -----------------------------------------------------------------------------------------------------


STATEMENTS: dict[str, Statement] = {
    "I12": Statement("1 + Σ_h [χ²(s,a) - χ²(s)] = κ(π,μ)", _closed_form_is_kappa, "equal", markov=True),
    "B1": Statement("κ(π,μ) ≤ 1 + Σ_h χ²_h(s,a)", _kappa_at_most_lemma1, markov=True),
    "B2.a": Statement("1 + Σ_h χ²_h(s,a) ≤ 1 + H(C_∞ - 1)", _lemma1_at_most(lambda h, c: 1 + h * (c - 1))),
    "B2.b": Statement("1 + Σ_h χ²_h(s,a) ≤ H·C_∞", _lemma1_at_most(lambda h, c: h * c)),
    "B3": Statement("Λ(π,μ) ≤ H·C_∞", _second_moment_at_most(lambda h, c: h * c), markov=True),
    "B4": Statement("regret + β KL(P_{π*} ‖ P_{π_θ}) = Corollary 4's right side", _corollary4, "equal"),
    "B5.a": Statement(
        "regret ≤ β(√κ(π*,μ) + √κ(π_θ,μ))√L_μ",
        partial(_theorem2, factor=fmpq(1), within_starts=False),
        deterministic=True,
    ),
    "B5.b": Statement(
        "regret ≤ β(√(κ(π*,μ) - 1) + √(κ(π_θ,μ) - 1))√(E Var_μ(f | s_1))",
        partial(_theorem2, factor=fmpq(1), within_starts=True),
        deterministic=True,
    ),
    "B7": Statement("regret ≤ (β/2) sup_t Λ(π_t,μ)·L_μ", partial(_fast_rate, factor=fmpq(1, 2)), deterministic=True),
    "C1": Statement("L_μ ≤ (H/2) max|u| ‖∇L_μ‖_1", _gradient_domination, deterministic=True),
    # Plausible and false.
    "false-lambda-one-plus": Statement(
        "Λ(π,μ) ≤ 1 + H(C_∞ - 1)", _second_moment_at_most(lambda h, c: 1 + h * (c - 1)), markov=True, true=False
    ),
    "false-lambda-small-constant": Statement(
        "Λ(π,μ) ≤ (H - ½)·C_∞", _second_moment_at_most(lambda h, c: (h - fmpq(1, 2)) * c), markov=True, true=False
    ),
    "false-kappa-max-chi": Statement(
        "κ(π,μ) ≤ 1 + max_h χ²_h(s,a)", _kappa_at_most_largest_shift, markov=True, true=False
    ),
    "false-mixture-i12": Statement(
        "1 + Σ_h [χ²(s,a) - χ²(s)] = κ(π,μ), mixtures too", _closed_form_is_kappa, "equal", true=False
    ),
    "false-mixture-lemma1": Statement("κ(π,μ) ≤ 1 + Σ_h χ²_h(s,a), mixtures too", _kappa_at_most_lemma1, true=False),
    "false-b5-half": Statement(
        "regret ≤ ½β(√κ(π*,μ) + √κ(π_θ,μ))√L_μ",
        partial(_theorem2, factor=fmpq(1, 2), within_starts=False),
        deterministic=True,
        true=False,
    ),
    "false-b7-half": Statement(
        "regret ≤ (β/4) sup_t Λ(π_t,μ)·L_μ",
        partial(_fast_rate, factor=fmpq(1, 4)),
        deterministic=True,
        true=False,
    ),
    "false-c1-stochastic": Statement(
        "a stationary point near theta has L_μ ≤ 0",
        partial(_stationary_at_most, right=lambda problem, behaviour: fmpq(0)),
        true=False,
    ),
    "false-c1-stochastic-global": Statement(
        "a stationary point near theta has L_μ ≤ L_μ(better), another table of logits",
        partial(_stationary_at_most, right=_better),
        true=False,
    ),
}
"""By id; those that are false are named so."""
