"""What can be searched for: an inequality, the problems it is searched on, and whether it is true.

Every target compares ``left ≤ right`` on a batch of :class:`~tbrm_theory.claims.search_space.Problems`; the search maximises
left/right. Those named ``false-…`` are planted: a search that cannot refute them would not refute a false theorem either.

Rewards. In a deterministic problem regret, loss and coverage depend on the rewards through ``R_β`` only, and up to a number for each
first state through ``π*`` alone. So B5 and B7 are searched with ``r = 0`` and the reference for ``π*``, in the coordinates of I14: any
additive ``f`` is the residual of the soft plan of ``log π* + f``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from tbrm_theory.claims.search_quantities import (
    c_inf,
    chi_squares,
    gradient_domination,
    kappa,
    kappa_formula,
    largest_residual,
    maximum,
    mean,
    mixture_kappa,
    path_laws,
    second_moment,
    square_mean,
)
from tbrm_theory.claims.search_space import Candidates, Problems, Shape
from tbrm_theory.dynamic_programming import regret, soft_policy, solve
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.population import additive_moments, residual_terms, soft_plan
from tbrm_theory.rigor import STATEMENTS
from tbrm_theory.shapes import PerLayerStateAction, Scalars
from tbrm_theory.tables import safe_log

__all__ = ["LARGEST_RESIDUAL", "TARGETS", "Target", "select_targets"]

Sides: TypeAlias = tuple[Scalars, Scalars]
Side: TypeAlias = Callable[[Problems, float | None], Scalars]

LARGEST_RESIDUAL = 20.0
"""``max|f|`` in the search of B5, whose left/right grows with it.

With ``F = max|f|`` a bandit reaches ``(F - 1 + e⁻ᶠ)/(F (1 + e⁻ᶠ))``, and in the variance form, where ``f`` may range over ``2F``,
``1 - 1/(2F)``: 0.949999998 and 0.975 at F = 20.
"""
_TIMES = 5
"""Values of t in B7's supremum while searching; with more the right side can only grow."""


@dataclass(frozen=True)
class Target:
    """An inequality ``left ≤ right`` and where to look for the largest left/right."""

    id: str
    decided_as: str
    """The statement of :mod:`tbrm_theory.rigor` that decides whether an instance violates it."""
    shapes: tuple[Shape, ...]
    """One search for each, in increasing horizon."""
    tables: tuple[str, ...]
    """What the search may change besides successor tables."""
    build: Callable[[Candidates], Problems]
    sides: Callable[[Problems, float | None], Sides]
    """Both sides; the second argument is the sharpness of maxima."""
    excess: bool = False
    """Search for the largest (left - 1)/(right - 1): of 1 + x ≤ 1 + y, which x = y = 0 would satisfy with equality."""
    warm_from: int = 99
    """From this horizon on the search starts from the winner of the horizon before."""
    snapped: bool = False
    """Probabilities next to 0 in the winner become 0."""
    enough: float = 1 - 1e-9
    """A search ends when it has found this."""

    @property
    def statement(self) -> str:
        return STATEMENTS[self.decided_as].text

    @property
    def true(self) -> bool:
        """Whether it holds; False for those planted and for X1."""
        return STATEMENTS[self.decided_as].true


def select_targets(claim: str) -> list[Target]:
    """The targets with this id, a number standing for all its parts.

    Raises:
        InvalidInputError: there is none.
    """
    found = [target for target in TARGETS.values() if claim in (target.id, target.id.partition(".")[0])]
    if not found:
        raise InvalidInputError("claim", f"no search for {claim!r}; expected one of {', '.join(TARGETS)}")
    return found


# -- problems ------------------------------------------------------------------------------------------------------


def _coverage(candidates: Candidates) -> Problems:
    """A policy and data; rewards do not matter."""
    return Problems(candidates.problem(), candidates.data(), pi=candidates.log_policy("pi"))


def _plan(candidates: Candidates, largest: float | None, centred: bool = True) -> Problems:
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


def _logits(candidates: Candidates) -> Problems:
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


def _kappa(problems: Problems, _: float | None) -> Scalars:
    return kappa(problems.mdp, _pi(problems), problems.mu)


def _mixture_kappa(problems: Problems, _: float | None) -> Scalars:
    return mixture_kappa(problems.mdp, _pi(problems), problems.data)


def _second_moment(problems: Problems, _: float | None) -> Scalars:
    return second_moment(problems.mdp, _pi(problems), problems.mu)


def _lemma1(problems: Problems, _: float | None) -> Scalars:
    return 1 + torch.stack(chi_squares(problems.mdp, _pi(problems), problems.data)).sum(0)


def _largest_shift(problems: Problems, sharpness: float | None) -> Scalars:
    shifts = torch.stack(chi_squares(problems.mdp, _pi(problems), problems.data), -1)
    return 1 + maximum(safe_log(shifts), sharpness).exp()


def _formula(problems: Problems, _: float | None) -> Scalars:
    return 1 + kappa_formula(problems.mdp, _pi(problems), problems.data)


def _of_ratio(bound: Callable[[int, Tensor], Tensor]) -> Side:
    """A function of H and ``C_∞``."""

    def side(problems: Problems, sharpness: float | None) -> Scalars:
        return bound(problems.mdp.horizon, c_inf(problems.mdp, _pi(problems), problems.data, sharpness))

    return side


def _both(left: Side, right: Side) -> Callable[[Problems, float | None], Sides]:
    return lambda problems, sharpness: (left(problems, sharpness), right(problems, sharpness))


def _regret(problems: Problems) -> Scalars:
    return regret(problems.mdp, tuple(soft_policy(table) for table in _theta(problems)))


def _theorem2(problems: Problems, factor: float = 1.0, shift: int = 0) -> Sides:
    """B5 with ``factor`` in front of the right side; with ``shift`` 1 the variance form, each κ less 1."""
    mdp, data = problems.mdp, problems.data
    policies = (solve(mdp).log_policy, tuple(soft_policy(table) for table in _theta(problems)))
    roots = [(1 - shift + kappa_formula(mdp, log_pi, data)).sqrt() for log_pi in policies]
    moments = additive_moments(mdp, residual_terms(mdp, _theta(problems)), problems.mu)
    error = (mdp.initial * (moments.variance + (1 - shift) * moments.mean.square())).sum(-1)
    return _regret(problems), factor * mdp.beta * (roots[0] + roots[1]) * error.sqrt()


def _fast_rate(problems: Problems, factor: float) -> Sides:
    """B7 with ``factor`` in front of the right side; a few values of t stand for the supremum."""
    mdp = problems.mdp
    largest = second_moment(mdp, path_laws(mdp, _theta(problems), _TIMES), problems.mu).amax(0)
    loss = square_mean(mdp, residual_terms(mdp, _theta(problems)), problems.data)
    return _regret(problems), factor * mdp.beta * largest * loss


def _domination(problems: Problems, sharpness: float | None) -> Sides:
    """C1. It says of a stationary point that its loss is at most 0."""
    return gradient_domination(problems.mdp, _theta(problems), problems.mu, sharpness)


def _domination_of_gap(problems: Problems, sharpness: float | None) -> Sides:
    """What would make every stationary point a global minimum: that the loss above ``better``'s is dominated."""
    assert problems.better is not None
    loss, bound = _domination(problems, sharpness)
    return loss - square_mean(problems.mdp, residual_terms(problems.mdp, problems.better), problems.data), bound


# -- the table -----------------------------------------------------------------------------------------------------

_MARKOV, _MIXTURE = ("pi", "mu"), ("pi", "mu1", "mu2", "weights")
_FUNCTION, _FREE = ("reference", "residual", "mu"), ("reward", "theta", "mu")
_STOCHASTIC = (Shape(2, first_actions=2, stochastic=True),)


def _deterministic(*horizons: int, first_actions: int = 3) -> tuple[Shape, ...]:
    return tuple(Shape(h, first_actions=first_actions) for h in horizons)


_H_TIMES_C = _of_ratio(lambda h, c: h * c)
_ALL = (
    Target("B1", "B1", _deterministic(1, 2, 3), _MARKOV, _coverage, _both(_kappa, _lemma1), excess=True),
    Target("B2", "B2.b", _deterministic(1, 2, 3), _MARKOV, _coverage, _both(_lemma1, _H_TIMES_C)),
    Target("B3", "B3", _deterministic(2, 3, 4, 5), _MARKOV, _coverage, _both(_second_moment, _H_TIMES_C), warm_from=4),
    Target(
        "B5.a",
        "B5.a",
        _deterministic(1, 2, first_actions=2),
        _FUNCTION,
        partial(_plan, largest=LARGEST_RESIDUAL),
        lambda problems, _: _theorem2(problems),
    ),
    Target(
        "B5.b",
        "B5.b",
        _deterministic(1, 2, first_actions=2),
        _FUNCTION,
        partial(_plan, largest=LARGEST_RESIDUAL, centred=False),
        lambda problems, _: _theorem2(problems, shift=1),
    ),
    Target("B7", "B7", _deterministic(1, 2), _FUNCTION, partial(_plan, largest=None), lambda p, _: _fast_rate(p, 0.5)),
    Target("C1", "C1", _deterministic(1, 2, 3), _FREE, _logits, _domination),
    Target(
        "X1",
        "false-mixture-lemma1",
        (Shape(2, first_actions=2, states=1),),
        _MIXTURE,
        _coverage,
        _both(_mixture_kappa, _lemma1),
        snapped=True,
        enough=1e10,
    ),
    Target(
        "false-lambda-one-plus",
        "false-lambda-one-plus",
        _deterministic(2),
        _MARKOV,
        _coverage,
        _both(_second_moment, _of_ratio(lambda h, c: 1 + h * (c - 1))),
        enough=1.5,
    ),
    Target(
        "false-lambda-small-constant",
        "false-lambda-small-constant",
        _deterministic(2),
        _MARKOV,
        _coverage,
        _both(_second_moment, _of_ratio(lambda h, c: (h - 0.5) * c)),
        enough=1.3,
    ),
    Target(
        "false-kappa-max-chi",
        "false-kappa-max-chi",
        _deterministic(2),
        _MARKOV,
        _coverage,
        _both(_kappa, _largest_shift),
        enough=1.9,
    ),
    Target(
        "false-mixture-i12",
        "false-mixture-i12",
        _deterministic(2),
        _MIXTURE,
        _coverage,
        _both(_mixture_kappa, _formula),
        enough=100,
    ),
    Target(
        "false-mixture-lemma1",
        "false-mixture-lemma1",
        _deterministic(2),
        _MIXTURE,
        _coverage,
        _both(_mixture_kappa, _lemma1),
        enough=100,
    ),
    Target(
        "false-b5-half",
        "false-b5-half",
        _deterministic(1, first_actions=2),
        _FUNCTION,
        partial(_plan, largest=LARGEST_RESIDUAL),
        lambda problems, _: _theorem2(problems, factor=0.5),
        enough=1.8,
    ),
    Target(
        "false-b7-half",
        "false-b7-half",
        _deterministic(1),
        _FUNCTION,
        partial(_plan, largest=None),
        lambda problems, _: _fast_rate(problems, 0.25),
        enough=1.9,
    ),
    Target(
        "false-c1-stochastic",
        "false-c1-stochastic",
        _STOCHASTIC,
        (*_FREE, "transition"),
        _logits,
        _domination,
        enough=1e6,
    ),
    Target(
        "false-c1-stochastic-global",
        "false-c1-stochastic-global",
        _STOCHASTIC,
        ("reward", "theta", "better", "transition"),
        _logits,
        _domination_of_gap,
        enough=1e6,
    ),
)
TARGETS: dict[str, Target] = {target.id: target for target in _ALL}
"""By id, the true statements first."""
