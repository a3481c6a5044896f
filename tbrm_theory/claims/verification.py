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

import joblib

from tbrm_theory.claims.cases import Case, check_family, file_case, make_case
from tbrm_theory.claims.comparison import Comparison
from tbrm_theory.claims.registry import Claim
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.families import FAMILIES
from tbrm_theory.instance import Instance

__all__ = ["Attempt", "Outcome", "Verdict", "Worst", "by_number", "verify"]


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

    @property
    def rank(self) -> tuple[float, float]:
        """Larger is worse: of two inequalities without an error the tighter one."""
        return self.share, self.ratio or 0.0


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

    def add(self, attempt: Attempt) -> None:
        """Count one attempt."""
        self.seconds += attempt.seconds
        if attempt.worst is None:
            self.skipped[attempt.reason] += 1
            return
        self.instances += 1
        self.violations += attempt.violated
        found, candidate = self.worst, attempt.worst
        if found is None or candidate.rank > found.rank:
            self.worst = candidate


@dataclass(frozen=True)
class Attempt:
    """One claim on one problem."""

    reason: str = ""
    """Why the claim was not checked; empty if it was."""
    worst: Worst | None = None
    violated: bool = False
    seconds: float = 0.0

    @classmethod
    def at(cls, claim: Claim, case: Case) -> Attempt:
        """Check the claim, unless the case is outside its assumptions."""
        started = time.perf_counter()
        reason = (case.too_large if claim.problem is None else None) or claim.requires(case)
        if reason:
            return cls(reason, seconds=time.perf_counter() - started)
        return cls.of(claim.check(case), case, started)

    @classmethod
    def of(cls, comparison: Comparison, case: Case, started: float | None = None) -> Attempt:
        worst = Worst(comparison.error, comparison.bound, comparison.ratio, case.family, case.seed)
        seconds = 0.0 if started is None else time.perf_counter() - started
        return cls("", worst, not comparison.holds, seconds)


def verify(
    claims: Sequence[Claim],
    families: Sequence[str] | None = None,
    instances: int = 200,
    seed: int = 0,
    *,
    file: tuple[str, Instance] | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Outcome]:
    """Check every claim on ``instances`` problems, drawn from the families in turn with seeds from ``seed`` on.

    Args:
        families: names of families; all of them for None.
        file: the name and contents of an instance file to take the place of the families (see ``file_case``).
        workers: processes; the outcome does not depend on their number.
        progress: called with the comparisons made so far and their number in the end.

    Returns:
        The outcome of each claim by id. One that the families refuse too often has fewer instances, or none: each family is
        asked at most ``instances`` times.

    Raises:
        InvalidInputError: no such family, no families or claims, fewer than one instance, or a file for a claim that has problems
            of its own.
    """
    names = list(FAMILIES) if families is None else list(dict.fromkeys(families))
    if instances < 1:
        raise InvalidInputError("instances", f"expected at least 1, found {instances}")
    if not names or not claims:
        raise InvalidInputError("claims" if names else "families", "expected at least one")
    for name in names:
        check_family(name)
    own = [claim for claim in claims if claim.problem is not None]
    if file is not None:
        names = [file[0]]
        if own:
            raise InvalidInputError(
                "claims", f"{own[0].id} is about problems of its own, and cannot be tried on a file"
            )
    outcomes = {claim.id: Outcome() for claim in claims}
    wanted = {claim.id: min(instances, claim.problems or instances) for claim in claims}

    def count(attempts: dict[str, list[Attempt]]) -> None:
        for claim_id, found in attempts.items():
            for attempt in found:
                if outcomes[claim_id].instances < wanted[claim_id]:
                    outcomes[claim_id].add(attempt)
        if progress is not None:
            progress(sum(outcome.instances for outcome in outcomes.values()), sum(wanted.values()))

    chunks = [
        ([c for c in sharing if start < wanted[c.id]], range(seed + start, seed + min(start + _CHUNK, instances)))
        for sharing in _by_problem(own)
        for start in range(0, max(wanted[c.id] for c in sharing), _CHUNK)
    ]
    rest = [joblib.delayed(_on_own)(some, seeds) for some, seeds in chunks]
    with joblib.Parallel(n_jobs=workers, return_as="generator") as run:
        for turn in range(instances):
            pending = [c for c in claims if c.problem is None and outcomes[c.id].instances < instances]
            if not pending:
                break
            tasks = [joblib.delayed(_on_family)(pending, name, seed + turn, file) for name in names]
            beside, rest = rest[:_BESIDE], rest[_BESIDE:]
            for attempts in run(tasks + beside):
                count(attempts)
        for attempts in run(rest):
            count(attempts)
    return outcomes


_BESIDE = 16
"""Tasks on problems of their own beside a turn of the families, so that no process waits for the turn to end."""
_CHUNK = 20
"""Problems of their own that claims are tried on in one task."""


def _on_family(
    claims: Sequence[Claim], name: str, seed: int, file: tuple[str, Instance] | None
) -> dict[str, list[Attempt]]:
    case = make_case(name, seed) if file is None else file_case(file[1], name, seed)
    return {claim.id: [Attempt.at(claim, case)] for claim in claims}


def _by_problem(claims: Sequence[Claim]) -> list[list[Claim]]:
    """Claims that are about the very same problems together, so that each problem is made once."""
    groups: dict[Callable[[int], Case] | None, list[Claim]] = {}
    for claim in claims:
        groups.setdefault(claim.problem, []).append(claim)
    return list(groups.values())


def _on_own(claims: Sequence[Claim], seeds: Sequence[int]) -> dict[str, list[Attempt]]:
    found: dict[str, list[Attempt]] = {claim.id: [] for claim in claims}
    make = claims[0].problem
    assert make is not None
    for seed in seeds:
        case = make(seed)
        for claim in claims:
            found[claim.id].append(Attempt.at(claim, case))
    return found


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
        worst=max(found, key=lambda worst: worst.rank) if found else None,
        seconds=sum(outcome.seconds for outcome in group),
    )
