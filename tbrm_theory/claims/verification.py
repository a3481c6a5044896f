"""Claims over families: what was tried, what was refused and why, the worst error and where it occurred.

A case is drawn once and serves every claim that still wants one. Families take turns, seed after seed, until each claim has its
number of instances; a claim that every family refuses ends as *not exercised*, which is no success. A claim with problems of its
own is checked on these instead.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from tbrm_theory.claims.cases import Case, make_case
from tbrm_theory.claims.comparison import Comparison
from tbrm_theory.claims.registry import Claim
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.families import FAMILIES

__all__ = ["Outcome", "Verdict", "Worst", "by_number", "verify"]


class Verdict(StrEnum):
    HOLDS = "holds"
    VIOLATED = "violated"
    NOT_EXERCISED = "not exercised"


@dataclass(frozen=True)
class Worst:
    """The comparison closest to its bound, or furthest beyond, and the case to reproduce it."""

    error: float
    """Relative to the size of the terms."""
    bound: float
    ratio: float | None
    """The largest left/right of an inequality."""
    family: str
    seed: int

    @property
    def share(self) -> float:
        return self.error / self.bound


@dataclass
class Outcome:
    """What became of one claim, or of all parts of one."""

    instances: int = 0
    """Problems on which both sides were computed."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Problems refused, by reason."""
    violations: int = 0
    worst: Worst | None = None
    seconds: float = 0.0

    @property
    def verdict(self) -> Verdict:
        if self.violations:
            return Verdict.VIOLATED
        return Verdict.HOLDS if self.instances else Verdict.NOT_EXERCISED

    def add(self, comparison: Comparison, case: Case) -> None:
        """Count one comparison."""
        self.instances += 1
        self.violations += not comparison.holds
        ratio, found = comparison.ratio, self.worst
        candidate = Worst(comparison.error, comparison.bound, ratio, case.family, case.seed)
        if found is None or (candidate.share, ratio or 0.0) > (found.share, found.ratio or 0.0):
            self.worst = candidate


def verify(
    claims: Sequence[Claim],
    families: Sequence[str] | None = None,
    instances: int = 200,
    seed: int = 0,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Outcome]:
    """Check every claim on ``instances`` problems, drawn from the families in turn with seeds from ``seed`` on.

    Args:
        families: names of families; all of them for None.
        progress: called with the comparisons made so far and their number in the end.

    Returns:
        The outcome of each claim by id. One that the families refuse too often has fewer instances, or none: each family is
        asked at most ``instances`` times.

    Raises:
        InvalidInputError: no such family, no families or claims, or fewer than one instance.
    """
    names = list(FAMILIES) if families is None else list(dict.fromkeys(families))
    if instances < 1:
        raise InvalidInputError("instances", f"expected at least 1, found {instances}")
    if not names or not claims:
        raise InvalidInputError("claims" if names else "families", "expected at least one")
    outcomes = {claim.id: Outcome() for claim in claims}
    wanted = {claim.id: min(instances, claim.problems or instances) for claim in claims}

    def report() -> None:
        if progress is not None:
            progress(sum(outcome.instances for outcome in outcomes.values()), sum(wanted.values()))

    on_families = [claim for claim in claims if claim.problem is None]
    for turn in range(instances):
        for name in names:
            pending = [claim for claim in on_families if outcomes[claim.id].instances < instances]
            if not pending:
                break
            case = make_case(name, seed + turn)
            for claim in pending:
                _try(claim, case, outcomes[claim.id])
            report()
    for claim in claims:
        if claim.problem is not None:
            for turn in range(wanted[claim.id]):
                _try(claim, claim.problem(seed + turn), outcomes[claim.id])
                report()
    return outcomes


def _try(claim: Claim, case: Case, outcome: Outcome) -> None:
    started = time.perf_counter()
    reason = (case.too_large if claim.problem is None else None) or claim.requires(case)
    if reason:
        outcome.skipped[reason] += 1
    else:
        outcome.add(claim.check(case), case)
    outcome.seconds += time.perf_counter() - started


def by_number(claims: Sequence[Claim], outcomes: dict[str, Outcome]) -> dict[str, Outcome]:
    """The outcomes under the numbers of theory.md: of several parts the fewest instances and the worst error.

    A number is violated if a part is, and not exercised if a part is not.
    """
    parts: dict[str, list[Outcome]] = {}
    for claim in claims:
        parts.setdefault(claim.number, []).append(outcomes[claim.id])
    return {number: _together(group) for number, group in parts.items()}


def _together(group: list[Outcome]) -> Outcome:
    found = [outcome.worst for outcome in group if outcome.worst is not None]
    return Outcome(
        instances=min(outcome.instances for outcome in group),
        skipped=sum((outcome.skipped for outcome in group), Counter()),
        violations=sum(outcome.violations for outcome in group),
        worst=max(found, key=lambda worst: worst.share) if found else None,
        seconds=sum(outcome.seconds for outcome in group),
    )
