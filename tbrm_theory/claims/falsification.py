"""Adversarial search: gradient ascent on left/right of an inequality, over a batch of problems at once.

A search has rounds. In each, every candidate climbs by Adam on ``log(left/right)`` with maxima smoothed (less from round to round) and
steps getting smaller; then the best quarter stays, mutated copies of it (other successor tables, moved numbers) take half of the
places and new random candidates the rest. The best few are then polished with the maxima themselves.

A float64 ratio above 1 is called a violation only after :mod:`tbrm_theory.rigor` has decided it on the saved instance: rationals or
balls, no rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tbrm_theory.claims.search_space import Candidates, Problems, Shape, join
from tbrm_theory.claims.search_targets import Target
from tbrm_theory.instance import Instance
from tbrm_theory.rigor import STATEMENTS, Decision, decide

__all__ = ["Finding", "certified_ratio", "falsify", "ratio_of"]

_ROUNDS = 5
_KEPT = 8
"""Candidates that are polished."""
_FAST, _SLOW = 0.3, 1e-4
"""Step sizes in units of a logit: where the first round begins, where polishing ends."""
_SHARP = (4.0, 256.0)
"""Sharpness of maxima in the first and the last round."""
_EXCESS = 1e-6
"""Of (left - 1)/(right - 1), what the denominator is raised by: both near 0 is no success."""
_NEXT_TO_ZERO = 1e-6
"""A probability below this is 0 after snapping."""


@dataclass(frozen=True, eq=False)
class Finding:
    """The worst instance at one horizon, and what is certain about it."""

    horizon: int
    ratio: float
    """A certified lower bound of left/right, from the enclosures of the exact sides; ``inf`` if left alone is infinite."""
    float64_ratio: float
    """The same by the code that the search climbs on."""
    instance: Instance
    decision: Decision
    seed: int
    seconds: float

    @property
    def violated(self) -> bool:
        """Whether left > right is proved."""
        return self.decision.violated is True


def ratio_of(target: Target, instance: Instance) -> float:
    """left/right of one instance in float64, by the code that the search climbs on."""
    with torch.no_grad():
        left, right = target.sides(Problems.of(instance), None)
    return (left / right).item()


def falsify(
    target: Target,
    *,
    steps: int,
    restarts: int,
    seed: int,
    progress: Callable[[Shape, int], None] | None = None,
) -> list[Finding]:
    """The worst instance found at each horizon of a target.

    Args:
        steps: gradient steps at each horizon, all rounds together.
        restarts: candidates in the batch.
        progress: called with the shape and the steps done in it.

    Returns:
        one finding for each of the target's shapes, in their order.
    """
    findings: list[Finding] = []
    winner: Candidates | None = None
    for shape in target.shapes:
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(1000 * seed + shape.horizon)
        start = winner.lengthened() if winner is not None and shape.horizon >= target.warm_from else None

        def report(done: int, shape: Shape = shape) -> None:
            if progress is not None:
                progress(shape, done)

        winner = _Search(target, shape, steps, restarts * target.crowd, generator, report).run(start)
        with torch.no_grad():
            instance = target.build(winner).instance(0)
        if target.snapped:
            instance = _snapped(instance)
        decision = decide(target.decided_as, instance)
        seconds = time.perf_counter() - started
        ratio = certified_ratio(decision, STATEMENTS[target.decided_as].relation)
        findings.append(Finding(shape.horizon, ratio, ratio_of(target, instance), instance, decision, seed, seconds))
    return findings


def certified_ratio(decision: Decision, relation: str) -> float:
    """A lower bound of left/right, or of right/left if that is larger and the statement an equality."""
    (left, most), (least, right) = decision.left, decision.right
    sides = [(left, right), (least, most)] if relation == "equal" else [(left, right)]
    return max(_quotient(larger, smaller) for larger, smaller in sides)


def _quotient(left: float, right: float) -> float:
    if right <= 0:
        return math.inf if left > 0 else 0.0
    return 1.0 if left == right else math.inf if math.isinf(left) else left / right


class _Search:
    """One search: a target, a shape, and how long."""

    def __init__(
        self,
        target: Target,
        shape: Shape,
        steps: int,
        restarts: int,
        generator: torch.Generator,
        report: Callable[[int], None],
    ) -> None:
        self.target, self.shape, self.steps, self.restarts = target, shape, steps, restarts
        self.generator, self.report = generator, report
        self.done = 0

    def run(self, start: Candidates | None) -> Candidates:
        """The best candidate, a batch of one; from copies of ``start`` if there is one, else from random ones."""
        if start is None:
            candidates = self._random(self.restarts)
        else:
            copies = start.pick(torch.zeros(max(self.restarts - 1, 1), dtype=torch.int64)).mutated(self.generator)
            candidates = join([start, copies])
        each = max(self.steps // (_ROUNDS + 2), 1)
        for turn in range(_ROUNDS):
            share = turn / (_ROUNDS - 1)
            sharpness = _SHARP[0] ** (1 - share) * _SHARP[1] ** share
            fast = _FAST * 0.1**share
            candidates = self._climb(candidates, each, fast, fast / 3, sharpness)
            scores = self._scores(candidates)
            order = scores.argsort(descending=True)
            if scores[order[0]] >= math.log(self.target.enough) or turn == _ROUNDS - 1:
                break
            candidates = self._next_generation(candidates.pick(order[: max(self.restarts // 4, 1)]), start is None)
        best = candidates.pick(order[:_KEPT])
        best = join([best, self._climb(best, 2 * each, 0.1 * _FAST, _SLOW, None)])
        self.report(self.steps)
        return best.pick(self._scores(best).argmax()[None])

    def _next_generation(self, elite: Candidates, from_scratch: bool) -> Candidates:
        children = self.restarts // 2 if from_scratch else self.restarts - elite.count
        parents = torch.randint(elite.count, (max(children, 1),), generator=self.generator)
        parts = [elite, elite.pick(parents).mutated(self.generator)]
        fresh = self.restarts - elite.count - children
        return join([*parts, self._random(fresh)] if fresh > 0 else parts)

    def _random(self, count: int) -> Candidates:
        return Candidates.random(self.shape, self.target.tables, count, self.generator)

    def _climb(
        self, candidates: Candidates, steps: int, fast: float, slow: float, sharpness: float | None
    ) -> Candidates:
        """Adam with a step that shrinks from ``fast`` to ``slow``; each candidate by itself, since the sum separates."""
        candidates = candidates.pick(torch.arange(candidates.count))
        leaves = candidates.leaves
        for leaf in leaves:
            leaf.requires_grad_(True)
        # A gradient far below 1 still counts: the limit of a family is approached ever more flatly.
        adam = torch.optim.Adam(leaves, lr=fast, betas=(0.9, 0.98), eps=1e-60, maximize=True)
        for step in range(steps):
            adam.param_groups[0]["lr"] = fast * (slow / fast) ** (step / max(steps - 1, 1))
            adam.zero_grad()
            score = self._score(candidates, sharpness)
            torch.where(score.isfinite(), score, 0.0).sum().backward()
            for leaf in leaves:
                if leaf.grad is not None:
                    leaf.grad.nan_to_num_(0.0, 0.0, 0.0)
            adam.step()
            self.done += 1
            self.report(self.done)
        return candidates

    def _score(self, candidates: Candidates, sharpness: float | None) -> Tensor:
        left, right = self.target.sides(self.target.build(candidates), sharpness)
        if self.target.excess:
            left, right = left - 1, right - 1 + _EXCESS
        score = left.log() - right.log()
        # A false inequality is refuted by enough; beyond, its supremum may be infinite, and its instances degenerate.
        return score if self.target.enough <= 1 else score.clamp(max=math.log(self.target.enough))

    def _scores(self, candidates: Candidates) -> Tensor:
        """With the maxima themselves; what is not finite is worst."""
        with torch.no_grad():
            return torch.nan_to_num(self._score(candidates, None), -math.inf, -math.inf, -math.inf)


def _snapped(instance: Instance) -> Instance:
    """The same with every probability next to 0 at 0."""

    def snap(table: Tensor) -> Tensor:
        kept = torch.where(table < _NEXT_TO_ZERO, 0.0, table)
        return kept / kept.sum(-1, keepdim=True)

    policies = {name: tuple(snap(table) for table in tables) for name, tables in instance.probabilities.items()}
    return Instance.from_probabilities(instance.mdp, policies, instance.mixtures, instance.logits)
