"""Two sides of an inequality as exact rationals or balls, and what follows from them.

A rational side is an ``fmpq``; a ball (``arb``) contains the true value; ``+∞`` is the ball ``INFINITY``, and it is only used where
a side is known to be infinite. A comparison of balls is true only if it holds for every pair of points in them.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeAlias

from flint import arb, fmpq

__all__ = ["INFINITY", "Between", "Decision", "Number", "Relation", "Sides", "enclosure", "is_infinite", "verdict"]

Number: TypeAlias = fmpq | arb
Relation: TypeAlias = Literal["at most", "equal"]

INFINITY = arb.pos_inf()


@dataclass(frozen=True)
class Decision:
    """What was certified about ``left ≤ right`` (or ``left = right``) on one instance."""

    left: tuple[float, float]
    """Floats that enclose the left side; ``(inf, inf)`` if it is infinite."""
    right: tuple[float, float]
    violated: bool | None
    """True and False are proved. None: not decided at the highest precision; two balls that meet at equality end here."""
    exact: Literal["rational", "ball"]
    """Whether the verdict needed no rounding at all. The floats of ``left`` may come from a ball all the same."""
    digits: int
    """Decimal digits that the balls carried; 0 where there were none."""


@dataclass(frozen=True)
class Between:
    """A number of which only bounds are known; ``high`` may be infinite, which a ball could not express."""

    low: arb
    high: arb


@dataclass(frozen=True)
class Sides:
    """Both sides at the present precision, and the verdict if another argument than comparing them gives one."""

    left: Number
    right: Number | Between
    violated: bool | None = None
    exact: bool = False
    """``violated`` was found in rational arithmetic although a side is a ball."""

    @property
    def rational(self) -> bool:
        return self.exact or all(isinstance(side, fmpq) or is_infinite(side) for side in (self.left, self.right))


def is_infinite(side: Number | Between) -> bool:
    """Whether a side is ``+∞``, as opposed to a ball too wide to know."""
    return isinstance(side, arb) and bool(side.lower() > 0) and not side.is_finite()


def verdict(sides: Sides, relation: Relation) -> bool | None:
    """Whether ``left ≤ right`` (or ``left = right``) fails; ``∞ ≤ ∞`` and ``∞ = ∞`` hold.

    An equality of balls can be refuted and never proved: False then means that the balls meet, with 60 digits of the larger side
    or of 1 known.
    """
    if sides.violated is not None:
        return sides.violated
    left, right = sides.left, sides.right
    if isinstance(right, Between):
        return True if left > right.high else False if left <= right.low else None
    if is_infinite(left) or is_infinite(right):
        if relation == "equal":
            return is_infinite(left) != is_infinite(right)
        return not is_infinite(right)
    if relation == "at most":
        return True if left > right else False if left <= right else None
    if left == right:
        return False
    if sides.rational or left > right or left < right:
        return True
    gap, size = arb(left - right), abs(arb(left)).max(abs(arb(right))).max(arb(1))
    return False if abs(gap) < size * arb(10) ** -60 else None


def enclosure(side: Number | Between) -> tuple[float, float]:
    """The largest float below and the smallest above, up to one unit in the last place."""
    if isinstance(side, Between):
        return enclosure(side.low)[0], enclosure(side.high)[1]
    if is_infinite(side):
        return math.inf, math.inf
    if isinstance(side, fmpq):
        value = Fraction(int(side.p), int(side.q))
        return _below(value), 0.0 - _below(-value)
    if side.is_nan() or not side.is_finite():
        return -math.inf, math.inf
    low, high = float(side.lower()), float(side.upper())
    return math.nextafter(min(low, sys.float_info.max), -math.inf), math.nextafter(
        max(high, -sys.float_info.max), math.inf
    )


def _below(value: Fraction) -> float:
    """The largest float at most ``value``; beyond the largest float, that one."""
    try:
        nearest = float(value)
    except OverflowError:
        return sys.float_info.max if value > 0 else -math.inf
    return (nearest if Fraction(nearest) <= value else math.nextafter(nearest, -math.inf)) + 0.0  # not -0.0
