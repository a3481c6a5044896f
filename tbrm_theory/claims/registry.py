"""Claims by id. A claim is a function of a case under the decorator :func:`claim`; its docstring is the statement.

The first line of the docstring states the claim, what follows says how the two sides are computed and, for a statement of this
project, proves it. The id is theory.md's, ``I6``, with a letter for each part, ``I6.b``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from tbrm_theory.claims.cases import Case
from tbrm_theory.claims.comparison import Comparison
from tbrm_theory.errors import InvalidInputError

__all__ = ["CLAIMS", "Assumption", "Claim", "claim", "select"]

Assumption: TypeAlias = Callable[[Case], str | None]
"""Why a case is outside an assumption, as computed from the case; None if it is within."""


@dataclass(frozen=True)
class Claim:
    """A statement that can be checked on a case."""

    id: str
    source: str
    """Where the statement comes from: a number of [Y], or ``own``."""
    statement: str
    """In one line."""
    requires: Assumption
    check: Callable[[Case], Comparison]
    """Computes both sides; only for cases that ``requires`` lets pass."""
    problem: Callable[[int], Case] | None = None
    """The problems that the statement is about, one for each seed, if it is not about those of the families."""
    problems: int | None = None
    """How many different problems ``problem`` makes; None if any number."""

    @property
    def number(self) -> str:
        """The number in theory.md, without the part: ``I6`` of ``I6.b``."""
        return self.id.partition(".")[0]


CLAIMS: dict[str, Claim] = {}
"""Every claim by id, in the order of theory.md, whatever the order of imports."""
_SECTIONS = "IBCXOF"
"""Identities, inequalities, convergence, boundaries, own additions, and the family of losses."""


def claim(
    claim_id: str,
    *,
    source: str,
    requires: Sequence[Assumption] = (),
    problem: Callable[[int], Case] | None = None,
    problems: int | None = None,
) -> Callable[[Callable[[Case], Comparison]], Callable[[Case], Comparison]]:
    """Register the function below under ``claim_id``; every assumption must let a case pass.

    A statement about problems of its own, such as a counterexample, brings them as ``problem``; it is then checked on these, seed
    after seed, at most ``problems`` of them, and not on the families.
    """

    def refusal(case: Case) -> str | None:
        return next((reason for assumption in requires if (reason := assumption(case))), None)

    def register(check: Callable[[Case], Comparison]) -> Callable[[Case], Comparison]:
        statement = (inspect.getdoc(check) or "").partition("\n")[0]
        registered = Claim(claim_id, source, statement, refusal, check, problem, problems)
        ordered = sorted([*CLAIMS.values(), registered], key=_place)
        CLAIMS.clear()
        CLAIMS.update({claim.id: claim for claim in ordered})
        return check

    return register


def _place(claim: Claim) -> tuple[int, int, str]:
    """Section, number and part."""
    return _SECTIONS.index(claim.id[0]), int(claim.number[1:]), claim.id


def select(ids: Sequence[str] | None) -> list[Claim]:
    """The claims with these ids, a number standing for all its parts; all of them for None.

    Raises:
        InvalidInputError: an id that no claim has.
    """
    if ids is None:
        return list(CLAIMS.values())
    numbers = list(dict.fromkeys(claim.number for claim in CLAIMS.values()))
    for wanted in ids:
        if wanted not in CLAIMS and wanted not in numbers:
            raise InvalidInputError(
                "claims", f"unknown claim {wanted!r}; expected one of {', '.join(numbers)}, or a part"
            )
    return [claim for claim in CLAIMS.values() if claim.id in ids or claim.number in ids]
