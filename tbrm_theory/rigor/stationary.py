"""Proof that a zero of ``∇L`` exists near given logits, by the Krawczyk operator.

The free coordinates are the logits of states with data, those of the first layer whole and, later, all but the first action of each
state: the gauge (I8) holds that one where it is. The rest of the gradient vanishes with these coordinates, since it is zero in states
without data and sums to zero over the actions of a later state. For the map ``G = ½∇L``, a point ``x``, a box ``X`` around it and any
matrix ``Y``, if ``x - Y G(x) + (I - Y G'(X))(X - x)`` lies in the interior of ``X``, then ``X`` holds exactly one zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flint import arb, arb_mat, ctx, fmpq

from tbrm_theory.rigor.problem import (
    Component,
    ExactProblem,
    Pair,
    Table,
    mixed_table,
    occupancy,
    rational_moments,
)
from tbrm_theory.rigor.soft import SoftProblem

__all__ = ["Search", "StationaryPoint", "stationary_point"]

NEWTON_STEPS = 60


@dataclass(frozen=True)
class StationaryPoint:
    """A box that holds exactly one zero of the gradient modulo gauge."""

    loss: arb
    """``L`` there."""
    distance: arb
    """The largest change of a logit from the given ones."""
    strict_minimum: bool
    """Whether the Hessian on the free coordinates is proved positive definite in the box."""


def stationary_point(problem: ExactProblem, logits: Table, behaviour: Sequence[Component]) -> StationaryPoint | None:
    """Newton's method from ``logits``, then the proof; None if there is none at this precision."""
    search = Search(problem, logits, behaviour)
    point = search.start
    try:
        for _ in range(NEWTON_STEPS):
            gradient, slope = search.gradient(point)
            step = slope.solve(gradient).mid()
            point = (point - step).mid()
            if all(abs(x) < arb(2) ** (-ctx.prec // 2) for x in step.entries()):
                return search.proof(point)
    except ZeroDivisionError:  # a singular slope
        pass
    return None


class Search:
    """The gradient and the Hessian of ``½L`` as functions of the free coordinates, columns of balls."""

    def __init__(self, problem: ExactProblem, logits: Table, behaviour: Sequence[Component]) -> None:
        self.problem, self.logits, self.behaviour = problem, logits, behaviour
        visits = mixed_table([(weight, occupancy(problem, policy)) for weight, policy in behaviour])
        self.free: list[Pair] = [
            (h, s, a)
            for h, s, a in problem.pairs
            if sum(visits[h][s], fmpq(0)) > 0 and (h == 0 or a != problem.actions(h, s)[0])
        ]
        self.moments = arb_mat(rational_moments(problem, behaviour))
        self.start = arb_mat(len(self.free), 1, [arb(logits[h][s][a]) for h, s, a in self.free])

    def at(self, point: arb_mat) -> SoftProblem:
        table = [[list(row) for row in layer] for layer in self.logits]
        for (h, s, a), x in zip(self.free, point.entries(), strict=True):
            table[h][s][a] = x
        return SoftProblem(self.problem, table)

    def gradient(self, point: arb_mat) -> tuple[arb_mat, arb_mat]:
        """``½∇L`` and ``½∇²L`` on the free coordinates.

        ``∇f = (I - Π)ᵀφ`` and ``∇²f = -Σ_{h≥2} (diag π_s - π_s π_sᵀ)``, ``Π[(h,s,a),(h,s,b)] = π_θ(b|s)`` for ``h ≥ 2``; so
        ``½∇²L = (I - Π)ᵀ E_μ[φφᵀ] (I - Π) - Σ_{h≥2} e_h(s)(diag π_s - π_s π_sᵀ)``.
        """
        soft, pairs = self.at(point), self.problem.pairs
        covariances = soft.covariances(self.behaviour)
        half = soft.half_gradient(covariances)
        place = {pair: i for i, pair in enumerate(pairs)}
        columns = arb_mat(len(pairs), len(self.free))
        for j, (h, s, b) in enumerate(self.free):
            columns[place[h, s, b], j] = arb(1)
            if h:
                for a in self.problem.actions(h, s):
                    i = place[h, s, a]
                    columns[i, j] = columns[i, j] - soft.policy[h][s][b]
        slope = columns.transpose() * self.moments * columns
        for i, (h, s, a) in enumerate(self.free):
            for j, (k, t, b) in enumerate(self.free):
                if h and (h, s) == (k, t):
                    share = soft.policy[h][s][a]
                    curvature = share * ((1 if a == b else 0) - soft.policy[h][s][b])
                    slope[i, j] = slope[i, j] - sum(covariances[h][s], arb(0)) * curvature
        return arb_mat(len(self.free), 1, [half[h][s][a] for h, s, a in self.free]), slope

    def proof(self, point: arb_mat) -> StationaryPoint | None:
        """Krawczyk's test of a small box around the point.

        Raises:
            ZeroDivisionError: the Hessian may be singular.
        """
        radius = arb(2) ** (-ctx.prec // 4)
        offset = arb_mat(point.nrows(), 1, [arb(0, radius)] * point.nrows())
        box = point + offset
        gradient, slope = self.gradient(point)
        preconditioner = slope.inv().mid()
        _, slope_in_box = self.gradient(box)
        identity = arb_mat(len(self.free), len(self.free), 1)
        image = point - preconditioner * gradient + (identity - preconditioner * slope_in_box) * offset
        if not all(x.contains_interior(y) for x, y in zip(box.entries(), image.entries(), strict=True)):
            return None
        distance = arb(0)
        for x, y in zip(self.start.entries(), image.entries(), strict=True):
            distance = distance.max(abs(x - y))
        loss = self.at(image).loss(self.behaviour)
        return StationaryPoint(loss, distance, is_positive_definite(slope_in_box))


def is_positive_definite(matrix: arb_mat) -> bool:
    """Whether every pivot of symmetric elimination is proved positive."""
    rows = matrix.tolist()
    while rows:
        pivot, row = rows[0][0], rows[0][1:]
        if not pivot > 0:
            return False
        rows = [
            [cell - below[0] / pivot * other for cell, other in zip(below[1:], row, strict=True)] for below in rows[1:]
        ]
    return True
