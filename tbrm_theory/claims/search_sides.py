"""The two sides of what is searched, as functions of a batch of problems, and how candidates become problems.

Rewards. In a deterministic problem regret, loss and coverage depend on the rewards through ``R_β`` only, and up to a number for each
first state through ``π*`` alone. So B5 and B7 are searched with ``r = 0`` and the reference for ``π*``, in the coordinates of I14: any
additive ``f`` is the residual of the soft plan of ``log π* + f``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from tbrm_theory.claims.search_quantities import (
    c_inf,
    chi_squares,
    gradient_domination,
    kappa_formula,
    largest_residual,
    maximum,
    mean,
    mixture_kappa,
    path_laws,
    second_moment,
    square_mean,
)
from tbrm_theory.claims.search_space import Candidates, Problems
from tbrm_theory.dynamic_programming import regret, soft_policy, solve
from tbrm_theory.population import additive_moments, residual_terms, soft_plan
from tbrm_theory.shapes import PerLayerStateAction, Scalars
from tbrm_theory.tables import safe_log

__all__ = [
    "Sides",
    "both",
    "coverage_problems",
    "domination",
    "fast_rate",
    "formula",
    "free_problems",
    "kappa",
    "largest_second_moment",
    "largest_shift",
    "lemma1",
    "loss_at_stationary_point",
    "of_c_inf",
    "planned_problems",
    "theorem2",
]

Sides: TypeAlias = tuple[Scalars, Scalars]
Side: TypeAlias = Callable[[Problems, float | None], Scalars]

_TIMES = 5
"""Values of t in B7's supremum while searching; with more the right side can only grow."""


# -- problems ------------------------------------------------------------------------------------------------------


def coverage_problems(candidates: Candidates) -> Problems:
    """A policy and data; rewards do not matter."""
    return Problems(candidates.problem(), candidates.data(), pi=candidates.log_policy("pi"))


def planned_problems(candidates: Candidates, largest: float | None, centred: bool = True) -> Problems:
    """Logits whose residual is the additive function ``residual``, scaled to ``largest``.

    If ``centred``, its mean under the data is 0 before: the best ``V_θ(s_1)``, which changes the loss alone.
    """
    mdp, data, u = candidates.problem(), candidates.data(), candidates.tables["residual"]
    [(_, log_mu)] = data
    if centred:
        u = (u[0] - mean(mdp, u, log_mu)[..., None, None], *u[1:])
    if largest is not None:
        scale = largest / largest_residual(mdp, u)
        u = tuple(scale[..., None, None] * layer for layer in u)
    theta = soft_plan(mdp, tuple(log + layer for log, layer in zip(mdp.log_reference, u, strict=True)))
    return Problems(mdp, data, theta=theta)


def free_problems(candidates: Candidates) -> Problems:
    """Rewards, logits and data, all free."""
    tables = candidates.tables
    return Problems(candidates.problem(), candidates.data(), theta=tables["theta"], better=tables.get("better"))


# -- sides ---------------------------------------------------------------------------------------------------------


def _pi(problems: Problems) -> PerLayerStateAction:
    assert problems.pi is not None
    return problems.pi


def _theta(problems: Problems) -> PerLayerStateAction:
    assert problems.theta is not None
    return problems.theta


def kappa(problems: Problems, _: float | None) -> Scalars:
    """By I12 for Markov data, by linear algebra for a mixture."""
    if len(problems.data) == 1:
        return 1 + kappa_formula(problems.mdp, _pi(problems), problems.data)
    return mixture_kappa(problems.mdp, _pi(problems), problems.data)


def largest_second_moment(problems: Problems, _: float | None) -> Scalars:
    return second_moment(problems.mdp, _pi(problems), problems.mu)


def lemma1(problems: Problems, _: float | None) -> Scalars:
    return 1 + torch.stack(chi_squares(problems.mdp, _pi(problems), problems.data)).sum(0)


def largest_shift(problems: Problems, sharpness: float | None) -> Scalars:
    shifts = torch.stack(chi_squares(problems.mdp, _pi(problems), problems.data), -1)
    return 1 + maximum(safe_log(shifts), sharpness).exp()


def formula(problems: Problems, _: float | None) -> Scalars:
    return 1 + kappa_formula(problems.mdp, _pi(problems), problems.data)


def of_c_inf(bound: Callable[[int, Tensor], Tensor]) -> Side:
    """A function of H and ``C_∞``."""

    def side(problems: Problems, sharpness: float | None) -> Scalars:
        return bound(problems.mdp.horizon, c_inf(problems.mdp, _pi(problems), problems.data, sharpness))

    return side


def both(left: Side, right: Side) -> Callable[[Problems, float | None], Sides]:
    return lambda problems, sharpness: (left(problems, sharpness), right(problems, sharpness))


def _regret(problems: Problems) -> Scalars:
    return regret(problems.mdp, tuple(soft_policy(table) for table in _theta(problems)))


def theorem2(problems: Problems, _: float | None, *, factor: float = 1.0, shift: int = 0) -> Sides:
    """B5 with ``factor`` in front of the right side; with ``shift`` 1 the variance form, each κ less 1."""
    mdp, data = problems.mdp, problems.data
    policies = (solve(mdp).log_policy, tuple(soft_policy(table) for table in _theta(problems)))
    roots = [(1 - shift + kappa_formula(mdp, log_pi, data)).sqrt() for log_pi in policies]
    moments = additive_moments(mdp, residual_terms(mdp, _theta(problems)), problems.mu)
    error = (mdp.initial * (moments.variance + (1 - shift) * moments.mean.square())).sum(-1)
    return _regret(problems), factor * mdp.beta * (roots[0] + roots[1]) * error.sqrt()


def fast_rate(problems: Problems, _: float | None, *, factor: float = 0.5) -> Sides:
    """B7 with ``factor`` in front of the right side; a few values of t stand for the supremum."""
    mdp = problems.mdp
    largest = second_moment(mdp, path_laws(mdp, _theta(problems), _TIMES), problems.mu).amax(0)
    loss = square_mean(mdp, residual_terms(mdp, _theta(problems)), problems.data)
    return _regret(problems), factor * mdp.beta * largest * loss


def domination(problems: Problems, sharpness: float | None) -> Sides:
    """C1. It says of a stationary point that its loss is at most 0."""
    return gradient_domination(problems.mdp, _theta(problems), problems.mu, sharpness)


def loss_at_stationary_point(problems: Problems, sharpness: float | None) -> Sides:
    """``L(θ)`` against ``L(better)``, made harder by C1's bound of ``L(θ)`` so that only a stationary ``θ`` can win.

    The gradient with respect to ``θ`` is reversed: while everything else climbs, ``θ`` descends its own loss to a stationary point.
    """
    assert problems.better is not None
    mdp, theta = problems.mdp, tuple(table.detach() for table in _theta(problems))
    descending = tuple(2 * fixed - table for fixed, table in zip(theta, _theta(problems), strict=True))
    left, right = (
        square_mean(mdp, residual_terms(mdp, logits), problems.data) for logits in (descending, problems.better)
    )
    _, bound = gradient_domination(mdp, theta, problems.mu, sharpness)
    return left, right + bound
