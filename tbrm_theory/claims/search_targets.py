"""What can be searched for: an inequality, the problems it is searched on, and whether it is true.

Every target compares ``left ≤ right`` on a batch of :class:`~tbrm_theory.claims.search_space.Problems`; the search maximises
left/right. Those named ``false-…`` are planted: a search that cannot refute them would not refute a false theorem either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from tbrm_theory.claims.search_sides import (
    Sides,
    both,
    coverage_problems,
    domination,
    fast_rate,
    formula,
    free_problems,
    kappa,
    largest_second_moment,
    largest_shift,
    lemma1,
    loss_at_stationary_point,
    of_c_inf,
    planned_problems,
    theorem2,
)
from tbrm_theory.claims.search_space import Candidates, Problems, Shape
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.rigor import STATEMENTS

__all__ = ["LARGEST_RESIDUAL", "TARGETS", "Target", "select_targets"]

LARGEST_RESIDUAL = 20.0
"""``max|f|`` in the search of B5, whose left/right grows with it.

With ``F = max|f|`` a bandit reaches ``(F - 1 + e⁻ᶠ)/(F (1 + e⁻ᶠ))``, and in the variance form, where ``f`` may range over ``2F``,
``1 - 1/(2F)``: 0.949999998 and 0.975 at F = 20.
"""


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
    crowd: int = 1
    """So many times the candidates, where few random ones lead anywhere."""
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


# -- the table -----------------------------------------------------------------------------------------------------

_MARKOV, _MIXTURE = ("pi", "mu"), ("pi", "mu1", "mu2", "weights")
_FUNCTION, _FREE = ("reference", "residual", "mu"), ("reward", "theta", "mu")
_STOCHASTIC = (Shape(2, first_actions=2, stochastic=True),)


def _deterministic(*horizons: int, first_actions: int = 3) -> tuple[Shape, ...]:
    return tuple(Shape(h, first_actions=first_actions) for h in horizons)


def _covered(
    target_id: str, decided_as: str, sides: Callable[[Problems, float | None], Sides], *horizons: int, **options: Any
) -> Target:
    """About a policy and Markov data."""
    return Target(target_id, decided_as, _deterministic(*horizons), _MARKOV, coverage_problems, sides, **options)


def _mixed(
    target_id: str, decided_as: str, shape: Shape, sides: Callable[[Problems, float | None], Sides], **options: Any
) -> Target:
    """About a policy and a mixture."""
    return Target(target_id, decided_as, (shape,), _MIXTURE, coverage_problems, sides, **options)


def _planned(
    target_id: str,
    decided_as: str,
    sides: Callable[[Problems, float | None], Sides],
    *horizons: int,
    largest: float | None = None,
    centred: bool = True,
    **options: Any,
) -> Target:
    """About regret and loss, in two-action problems."""
    build = partial(planned_problems, largest=largest, centred=centred)
    return Target(target_id, decided_as, _deterministic(*horizons, first_actions=2), _FUNCTION, build, sides, **options)


_ALL = (
    _covered("B1", "B1", both(kappa, lemma1), 1, 2, 3, excess=True),
    _covered("B2.a", "B2.a", both(lemma1, of_c_inf(lambda h, c: 1 + h * (c - 1))), 1, 2, 3, excess=True),
    _covered("B2.b", "B2.b", both(lemma1, of_c_inf(lambda h, c: h * c)), 1, 2, 3),
    _covered("B3", "B3", both(largest_second_moment, of_c_inf(lambda h, c: h * c)), 2, 3, 4, 5, warm_from=4),
    _planned("B5.a", "B5.a", theorem2, 1, 2, largest=LARGEST_RESIDUAL),
    _planned("B5.b", "B5.b", partial(theorem2, shift=1), 1, 2, largest=LARGEST_RESIDUAL, centred=False),
    _planned("B7", "B7", fast_rate, 1, 2, 3),
    Target("C1", "C1", _deterministic(1, 2, 3), _FREE, free_problems, domination),
    _mixed(
        "X1",
        "false-mixture-lemma1",
        Shape(2, first_actions=2, states=1),
        both(kappa, lemma1),
        snapped=True,
        enough=1e10,
    ),
    # Planted.
    _covered(
        "false-lambda-one-plus",
        "false-lambda-one-plus",
        both(largest_second_moment, of_c_inf(lambda h, c: 1 + h * (c - 1))),
        2,
        enough=1.5,
    ),
    _covered(
        "false-lambda-small-constant",
        "false-lambda-small-constant",
        both(largest_second_moment, of_c_inf(lambda h, c: (h - 0.5) * c)),
        2,
        enough=1.3,
    ),
    _covered("false-kappa-max-chi", "false-kappa-max-chi", both(kappa, largest_shift), 2, enough=1.9),
    _mixed("false-mixture-i12", "false-mixture-i12", Shape(2), both(kappa, formula), enough=100.0),
    _mixed("false-mixture-lemma1", "false-mixture-lemma1", Shape(2), both(kappa, lemma1), enough=100.0),
    _planned("false-b5-half", "false-b5-half", partial(theorem2, factor=0.5), 1, largest=LARGEST_RESIDUAL, enough=1.8),
    _planned("false-b7-half", "false-b7-half", partial(fast_rate, factor=0.25), 1, enough=1.9),
    Target(
        "false-c1-stochastic",
        "false-c1-stochastic",
        _STOCHASTIC,
        ("reward", "theta", "transition"),
        free_problems,
        domination,
        enough=1e3,
    ),
    Target(
        "false-c1-stochastic-global",
        "false-c1-stochastic-global",
        _STOCHASTIC,
        ("reward", "theta", "better", "transition"),
        free_problems,
        loss_at_stationary_point,
        crowd=4,
        enough=10.0,
    ),
)
TARGETS: dict[str, Target] = {target.id: target for target in _ALL}
"""By id, the true statements first."""
