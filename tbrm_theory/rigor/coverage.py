"""κ, Λ, χ² and C_∞ from occupancies and moment matrices, in rationals where π is rational and in balls where it is not.

κ and Λ are computed from their definitions as suprema over additive functions, hence for any μ, mixtures too. Both live on the
quotient of these functions by the kernel of ``M = E_μ[φφᵀ]``, and the pivot columns of ``M`` are a basis of it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import cast

import torch
from flint import arb, arb_mat, ctx, fmpq, fmpq_mat, fmpz

from tbrm_theory.behaviours import Components
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.instance import Instance
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.rigor.decision import INFINITY, Number, enclosure, is_infinite
from tbrm_theory.rigor.problem import Component, ExactProblem, Table, occupancy, occupancy_of_states, rational_moments
from tbrm_theory.shapes import PerLayerStateAction

__all__ = [
    "DataMoments",
    "chi_squares",
    "closed_form",
    "exact_suprema",
    "is_positive_semidefinite",
    "largest_ratio",
    "top_eigenvalue",
]

SQUARINGS = 40
"""``tr(N^m)`` with ``m = 2**40`` encloses the top eigenvalue to a relative ``log(n)/m``, some 1e-12."""
MOST_BITS = 20_480

# -- formulas on occupancies ---------------------------------------------------------------------------------------


def chi_squares(p: Sequence[Sequence[Number]], q: Sequence[Sequence[Number]]) -> list[Number]:
    """``χ²(p_h ‖ q_h)`` of each layer, the laws of a layer flattened; ``∞`` where ``q`` misses what ``p`` has."""
    return [_chi_square(*layers) for layers in zip(p, q, strict=True)]


def _chi_square(p: Sequence[Number], q: Sequence[Number]) -> Number:
    total: Number = fmpq(-1)
    for x, y in zip(p, q, strict=True):
        if x == 0:
            continue
        if y == 0:
            return INFINITY
        total = total + x * x / y
    return total


def flat(table: Table) -> list[list[Number]]:
    """The pairs of each layer in one list."""
    return [[cell for row in layer for cell in row] for layer in table]


def closed_form(pi: Table, mu: Table) -> Number:
    """I12: ``1 + Σ_h [χ²(d^π_h(s,a)‖d^μ_h(s,a)) - χ²(d^π_h(s)‖d^μ_h(s))]`` of two occupancies; ``∞`` as soon as one χ² is."""
    total: Number = fmpq(1)
    by_state = chi_squares(occupancy_of_states(pi), occupancy_of_states(mu))
    for of_pairs, of_states in zip(chi_squares(flat(pi), flat(mu)), by_state, strict=True):
        if is_infinite(of_pairs):
            return INFINITY
        total = total + of_pairs - of_states
    return total


def largest_ratio(pi: Table, mu: Table) -> Number:
    """``C_∞``: the largest ``d^π_h(s,a)/d^μ_h(s,a)`` over the pairs that a rational π visits."""
    ratios = [
        (INFINITY if y == 0 else x / y)
        for p, q in zip(flat(pi), flat(mu), strict=True)
        for x, y in zip(p, q, strict=True)
        if x > 0
    ]
    return INFINITY if any(map(is_infinite, ratios)) else max(ratios)


# -- suprema over additive functions -------------------------------------------------------------------------------


class DataMoments:
    """``M = E_μ[φφᵀ]`` of data from rational policies, and the suprema that divide by it."""

    def __init__(self, problem: ExactProblem, components: Sequence[Component]) -> None:
        self.problem = problem
        self.matrix = rational_moments(problem, components)
        reduced, self.rank = self.matrix.rref()
        rows = reduced.tolist()
        self.basis = [next(j for j, cell in enumerate(rows[i]) if cell != 0) for i in range(self.rank)]
        self.on_basis = _principal(self.matrix.tolist(), self.basis)

    @property
    def identifies_all(self) -> bool:
        """Whether an additive function that vanishes on all data vanishes on every feasible trajectory.

        Then, and for full-support π only then, Λ is finite.
        """
        everywhere = rational_moments(self.problem, [(fmpq(1), self.problem.reference)])
        return bool(everywhere.rank() == self.rank)

    def kappa(self, visits: Table) -> Number:
        """``sup_f (E_π Σf)²/E_μ[(Σf)²] = vᵀM⁺v`` for the occupancy ``v`` of a rational π; ``∞`` if ``v ∉ range M``."""
        v = fmpq_mat(len(self.problem.pairs), 1, cast("list[fmpq]", self.vector(visits)))
        chosen = fmpq_mat(self.rank, 1, [v[j, 0] for j in self.basis])
        solution = self.on_basis.solve(chosen)
        f = fmpq_mat(len(self.problem.pairs), 1)
        for i, j in enumerate(self.basis):
            f[j, 0] = solution[i, 0]
        if self.matrix * f != v:
            return INFINITY
        return (f.transpose() * v)[0, 0]

    def kappa_of_full_support(self, visits: Table) -> Number:
        """The same for a π of balls that takes every action; a ball of any number if it is not known whether κ is ``∞``."""
        v = arb_mat(len(self.problem.pairs), 1, [arb(x) for x in self.vector(visits)])
        chosen = arb_mat(self.rank, 1, [v[j, 0] for j in self.basis])
        f = arb_mat(self.on_basis).solve(chosen)
        if self.identifies_all:  # then v is in the range of M, as M's kernel is that of E_π[φφᵀ]
            return (f.transpose() * chosen)[0, 0]
        rows = self.matrix.tolist()
        columns = arb_mat(fmpq_mat([[row[j] for j in self.basis] for row in rows]))
        outside = columns * f - v
        return INFINITY if any(x != 0 for x in outside.entries()) else arb.nan()

    def vector(self, visits: Table) -> list[Number]:
        return [visits[h][s][a] for h, s, a in self.problem.pairs]

    # -- second moment, Λ ------------------------------------------------------------------------------------------

    def bounds_second_moments_of(self, target: fmpq_mat) -> bool:
        """Whether Λ is finite: whether ``Mf = 0`` implies ``target·f = 0``."""
        stacked = fmpq_mat([*self.matrix.tolist(), *target.tolist()])
        return bool(stacked.rank() == self.rank)

    def second_moment(self, target: fmpq_mat) -> Number:
        """A ball around ``Λ = sup_f fᵀ target f / fᵀMf``, where it is finite; a ball of any number if that takes too many bits."""
        bits = ctx.prec
        while bits <= MOST_BITS:
            with ctx.workprec(bits):
                value = self.second_moment_of(arb_mat(_principal(target.tolist(), self.basis)), SQUARINGS)
                if value.rel_accuracy_bits() > SQUARINGS - 10:
                    return value
            bits *= 2
        return arb.nan()

    def second_moment_of(self, target: arb_mat, squarings: int) -> arb:
        """The same for ``target`` on the basis, at the present precision."""
        # A power of two for each pair makes the diagonal of M about 1; the eigenvalues stay.
        powers = [arb(2) ** (-_exponent(self.on_basis[i, i]) // 2) for i in range(self.rank)]
        scale = arb_mat(self.rank, self.rank)
        for i, power in enumerate(powers):
            scale[i, i] = power
        try:
            quotient = (scale * arb_mat(self.on_basis) * scale).solve(scale * target * scale)
        except ZeroDivisionError:  # M could be singular as far as these digits tell
            return arb.nan()
        return top_eigenvalue(quotient, squarings)

    def second_moment_at_least(self, target: arb_mat) -> arb:
        """A bound of Λ from below that needs no digits: what an indicator of one pair gives."""
        ratios = [target[i, i] / self.on_basis[i, i] for i in range(self.rank)]
        return functools.reduce(arb.max, ratios)

    def second_moment_at_most(self, target: fmpq_mat, bound: fmpq) -> bool:
        """Whether ``Λ ≤ bound``, where it is finite: whether ``bound·M - target`` is positive semidefinite."""
        return is_positive_semidefinite(bound * self.on_basis - _principal(target.tolist(), self.basis))


def exact_suprema(mdp: RegularizedMDP, log_pi: PerLayerStateAction, components: Components) -> tuple[float, float]:
    """``κ(π,μ)`` and ``Λ(π,μ)`` of a mixture, to the last digits of a double, however singular its moment matrix is.

    The probabilities are those of the tables as doubles. No batch dimensions.

    Raises:
        InvalidInputError: mass on actions that do not exist, or a probability that is no double (a logarithm below some -745).
    """
    problem = ExactProblem(Instance(mdp))

    def table(log_policy: PerLayerStateAction, where: str) -> Table:
        for h, (log, valid) in enumerate(zip(log_policy, mdp.valid, strict=True)):
            taken = log > -torch.inf
            if bool((taken & (~valid | (log.exp() == 0))).any()):
                raise InvalidInputError(f"{where}[{h}]", "expected probabilities of existing actions that are doubles")
        return problem.distributions([log.exp() for log in log_policy])

    pi = table(log_pi, "log_pi")
    data = DataMoments(problem, [(fmpq(*w.as_integer_ratio()), table(mu, "mu")) for w, mu in components if w > 0])
    kappa = data.kappa(occupancy(problem, pi))
    target = rational_moments(problem, [(fmpq(1), pi)])
    second = data.second_moment(target) if data.bounds_second_moments_of(target) else INFINITY
    return enclosure(kappa)[0], enclosure(second)[0]


def _principal(rows: list[list[fmpq]], basis: Sequence[int]) -> fmpq_mat:
    return fmpq_mat(len(basis), len(basis), [rows[i][j] for i in basis for j in basis])


def is_positive_semidefinite(matrix: fmpq_mat) -> bool:
    """By symmetric elimination in integers: no pivot is negative, and the rest of the row of a zero pivot is zero.

    Bareiss's division by the pivot before is exact and keeps the entries minors of the matrix; as long as these pivots are positive,
    they have the signs of those of ``LDLᵀ``.
    """
    integers, _ = matrix.numer_denom()
    rows = [row[i:] for i, row in enumerate(integers.tolist())]  # the upper triangle
    before = fmpz(1)
    while rows:
        pivot, *row = rows[0]
        if pivot < 0 or (pivot == 0 and any(cell != 0 for cell in row)):
            return False
        rows = rows[1:]
        if pivot != 0:
            rows = [
                [(pivot * cell - row[i] * row[i + j]) // before for j, cell in enumerate(below)]
                for i, below in enumerate(rows)
            ]
            before = pivot
    return True


def _exponent(number: fmpq) -> int:
    """``log2`` of a positive rational, to within 1."""
    return int(number.p.bit_length()) - int(number.q.bit_length())


def top_eigenvalue(matrix: arb_mat, squarings: int) -> arb:
    """The largest eigenvalue of a matrix whose eigenvalues are real and non-negative, from the trace of a power.

    ``λ^m ≤ tr(N^m) ≤ n λ^m``. Every square is divided by its trace, and the logarithms of these are added up.
    """
    log_trace, scale = arb(0), arb(1)
    for _ in range(squarings):
        trace = matrix.trace()
        log_trace, scale = log_trace + trace.log() * scale, scale / 2
        matrix = matrix * (1 / trace)
        matrix = matrix * matrix
    log_high = log_trace + matrix.trace().log() * scale
    log_low = log_high - arb(matrix.nrows()).log() * scale
    return log_low.exp().union(log_high.exp())
