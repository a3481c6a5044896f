"""The registry of problem families; their options are read off the signatures of functions and nowhere else.

A family is a function ``(seed, *, option=default, …) -> RegularizedMDP`` under the decorator :func:`family`.
The first line of its docstring is its summary. The annotation of an option says what values it takes:
``int``, ``float``, ``bool`` or ``Literal[…]``, with an :class:`Interval` where not all numbers will do, and
``| None`` where the family chooses.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP

__all__ = [
    "FAMILIES",
    "Count",
    "Family",
    "Interval",
    "Option",
    "Share",
    "Temperature",
    "expected_one_of",
    "family",
]


@dataclass(frozen=True)
class Interval:
    """The numbers from ``low`` to ``high``, the ends included unless said otherwise."""

    low: float | int
    high: float | int = math.inf
    without_low: bool = False
    without_high: bool = False

    def __contains__(self, number: float | int) -> bool:
        above = number > self.low if self.without_low else number >= self.low
        below = number < self.high if self.without_high else number <= self.high
        return above and below

    def __str__(self) -> str:
        low = f"more than {self.low:g}" if self.without_low else f"at least {self.low:g}"
        if self.high == math.inf:
            return low
        return f"{low} and {'less than' if self.without_high else 'at most'} {self.high:g}"


Count: TypeAlias = Annotated[int, Interval(1)]
Share: TypeAlias = Annotated[float, Interval(0, 1, without_high=True)]
Temperature: TypeAlias = Annotated[float, Interval(0, without_low=True)]

_NOUNS = {int: "an integer", float: "a finite number", bool: "True or False"}


@dataclass(frozen=True)
class Option:
    """A keyword of a family: its default and the values it takes."""

    name: str
    default: Any
    kind: type
    interval: Interval | None = None
    choices: tuple[Any, ...] = ()
    may_be_none: bool = False

    @classmethod
    def of(cls, name: str, default: Any, annotation: Any) -> Option:
        """Read an annotation such as ``Count | None`` or ``Literal["uniform", "dirichlet"]``."""
        may_be_none, interval = False, None
        if get_origin(annotation) in (Union, UnionType):
            may_be_none = True
            (annotation,) = (part for part in get_args(annotation) if part is not NoneType)
        if get_origin(annotation) is Annotated:
            annotation, interval = get_args(annotation)
        choices = get_args(annotation) if get_origin(annotation) is Literal else ()
        return cls(name, default, type(choices[0]) if choices else annotation, interval, choices, may_be_none)

    @property
    def expected(self) -> str:
        """What a value must be, for people."""
        if self.choices:
            what = f"one of {', '.join(map(repr, self.choices))}"
        else:
            what = _NOUNS[self.kind] + (f", {self.interval}" if self.interval else "")
        return f"{what}, or None" if self.may_be_none else what

    def checked(self, value: Any, where: str) -> Any:
        """The value as the option's own type.

        Raises:
            InvalidInputError: the value is of another type, not among the choices, or outside the interval.
        """
        if value is None and self.may_be_none:
            return None
        number = self._converted(value)
        if number is None or (self.choices and number not in self.choices) or not self._inside(number):
            raise InvalidInputError(where, f"expected {self.expected}, found {value!r}")
        return number

    def _converted(self, value: Any) -> Any:
        """As ``kind``; None for another type. ``True`` is no number here, and ``1`` is no truth value."""
        if self.kind in (bool, str) or isinstance(value, bool):
            return value if isinstance(value, self.kind) and isinstance(value, bool) == (self.kind is bool) else None
        try:
            return operator.index(value) if self.kind is int else float(operator.pos(value))
        except (TypeError, ValueError, OverflowError):
            return None

    def _inside(self, value: Any) -> bool:
        if self.kind is float and not math.isfinite(value):
            return False
        return self.interval is None or value in self.interval


@dataclass(frozen=True)
class Family:
    """A named family of problems; ``deterministic`` says whether its default instance is."""

    name: str
    summary: str
    deterministic: bool
    function: Callable[..., RegularizedMDP]

    @cached_property
    def options(self) -> Mapping[str, Option]:
        """Every keyword of the function, in its order."""
        types = get_type_hints(self.function, include_extras=True)
        return {
            name: Option.of(name, parameter.default, types[name])
            for name, parameter in inspect.signature(self.function).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }

    def make(self, seed: int, options: Mapping[str, Any]) -> RegularizedMDP:
        """One instance.

        Raises:
            InvalidInputError: an unknown option, or a value that the option does not take.
        """
        where = f"{self.name}.seed"
        seed = Option("seed", 0, int, Interval(0, 2**63, without_high=True)).checked(seed, where)
        for name in options:
            if name not in self.options:
                raise InvalidInputError(self.name, expected_one_of("option", name, self.options))
        checked = {name: self.options[name].checked(value, f"{self.name}.{name}") for name, value in options.items()}
        return self.function(seed, **checked)


FAMILIES: dict[str, Family] = {}


def family(
    name: str, *, deterministic: bool
) -> Callable[[Callable[..., RegularizedMDP]], Callable[..., RegularizedMDP]]:
    """Register the function below under ``name``."""

    def register(function: Callable[..., RegularizedMDP]) -> Callable[..., RegularizedMDP]:
        summary = (inspect.getdoc(function) or "").partition("\n")[0]
        FAMILIES[name] = Family(name, summary, deterministic, function)
        return function

    return register


def expected_one_of(what: str, found: str, known: Mapping[str, Any]) -> str:
    """``unknown option 'horzon'; did you mean 'horizon'? Expected one of …``."""
    near = get_close_matches(found, known, n=1)
    hint = f"did you mean {near[0]!r}? Expected" if near else "expected"
    return f"unknown {what} {found!r}; {hint} one of {', '.join(known)}"
