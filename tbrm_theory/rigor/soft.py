"""What has exponentials and logarithms in it, in balls at the present precision: values, policies, regret, residuals, losses.

Everything follows the definitions of theory.md §0: the regret is a difference of objectives and the loss a raw second moment. In
floating point both would cancel; a ball says how much they did, and more digits mend it. Cells of actions that do not exist hold an
exact zero and are never read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

from flint import arb, fmpq

from tbrm_theory.rigor.problem import Component, ExactProblem, Table, occupancy

__all__ = ["SoftProblem", "weighted"]

BallTable = list[list[list[arb]]]


class SoftProblem:
    """The optimum, and ``θ = logits[name]`` if a name or a table of logits is given."""

    def __init__(self, problem: ExactProblem, logits: Table) -> None:
        self.problem = problem
        self.logits = self.tabulate(lambda h, s, a: arb(logits[h][s][a]))
        self.values = self._log_sums(self.logits)
        self.log_policy = self._normalised(self.logits, self.values)
        self.policy = self._exponential(self.log_policy)

    def tabulate(self, entry: Callable[[int, int, int], arb]) -> BallTable:
        """The table of ``entry(h, s, a)`` over the actions that exist."""
        return [
            [
                [entry(h, s, a) if probability > 0 else arb(0) for a, probability in enumerate(row)]
                for s, row in enumerate(layer)
            ]
            for h, layer in enumerate(self.problem.reference)
        ]

    # -- the optimum -----------------------------------------------------------------------------------------------

    @cached_property
    def regularized_reward(self) -> BallTable:
        """``R_β = r/β + log π_ref``."""
        problem = self.problem
        return self.tabulate(
            lambda h, s, a: arb(problem.reward[h][s][a] / problem.beta) + arb(problem.reference[h][s][a]).log()
        )

    def soft_plan(self, reward: BallTable) -> BallTable:
        """``log π`` of the soft-optimal policy for a reward in units of β: ``Q = g + E V(s')``, ``V = log Σ exp Q``."""
        q: BallTable = [[] for _ in reward]
        after: list[arb] = []
        for h in reversed(range(len(reward))):
            q[h] = [[g + self._expected(h, s, a, after) for a, g in enumerate(row)] for s, row in enumerate(reward[h])]
            after = self._log_sums_of_layer(h, q[h])
        return self._normalised(q, self._log_sums(q))

    @cached_property
    def optimal_log_policy(self) -> BallTable:
        return self.soft_plan(self.regularized_reward)

    @cached_property
    def optimal_policy(self) -> BallTable:
        return self._exponential(self.optimal_log_policy)

    def objective(self, policy: BallTable, log_policy: BallTable) -> arb:
        """``J_β(π)/β = E_π Σ_h [R_β - log π]``."""
        reward = self.regularized_reward
        gain = self.tabulate(lambda h, s, a: reward[h][s][a] - log_policy[h][s][a])
        return weighted(occupancy(self.problem, policy), gain)

    @cached_property
    def regret(self) -> arb:
        """``J_β(π*) - J_β(π_θ)`` in reward units."""
        best = self.objective(self.optimal_policy, self.optimal_log_policy)
        return (best - self.objective(self.policy, self.log_policy)) * self.problem.beta

    @cached_property
    def divergence_from_optimum(self) -> arb:
        """``KL(P_{π*} ‖ P_{π_θ})``."""
        star, own = self.optimal_log_policy, self.log_policy
        gap = self.tabulate(lambda h, s, a: star[h][s][a] - own[h][s][a])
        return weighted(occupancy(self.problem, self.optimal_policy), gap)

    @cached_property
    def corollary4(self) -> arb:
        """``β{E_{π*} Σ_h (T_β Q_θ - Q_θ) + E_{π_θ} Σ_h (Q_θ - T_β Q_θ)}`` ([Y] Cor. 4)."""
        following = [*self.values[1:], []]
        excess = self.tabulate(
            lambda h, s, a: (
                self.regularized_reward[h][s][a] + self._expected(h, s, a, following[h]) - self.logits[h][s][a]
            )
        )
        star, own = (occupancy(self.problem, policy) for policy in (self.optimal_policy, self.policy))
        return (weighted(star, excess) - weighted(own, excess)) * self.problem.beta

    # -- the residual ----------------------------------------------------------------------------------------------

    @cached_property
    def terms(self) -> BallTable:
        """``u_h`` of ``f_θ(τ) = Σ_h u_h(s_h,a_h)``: ``logit - R_β`` in the first layer, ``log π_θ - R_β`` later."""
        return self.tabulate(
            lambda h, s, a: (self.log_policy if h else self.logits)[h][s][a] - self.regularized_reward[h][s][a]
        )

    def loss(self, behaviour: Sequence[Component]) -> arb:
        """``L_μ(θ) = E_μ f_θ²``."""
        return sum((weight * self._over_starts(self._moments(mu)[1]) for weight, mu in behaviour), arb(0))

    def variance_within_starts(self, behaviour: Sequence[Component]) -> arb:
        """``E_μ Var_μ(f_θ | s_1)``."""
        parts = [(weight, *self._moments(mu)) for weight, mu in behaviour]
        means = [sum((w * mean[s] for w, mean, _ in parts), arb(0)) for s in range(len(self.problem.initial))]
        squares = [sum((w * square[s] for w, _, square in parts), arb(0)) for s in range(len(self.problem.initial))]
        return self._over_starts([square - mean * mean for square, mean in zip(squares, means, strict=True)])

    def spread(self) -> arb:
        """The largest ``max_τ f_θ - min_τ f_θ`` over the trajectories of one initial state."""
        high, low = self._extremes(lambda x, y: x.max(y)), self._extremes(lambda x, y: x.min(y))
        gaps = [x - y for x, y, mass in zip(high, low, self.problem.initial, strict=True) if mass > 0]
        widest = gaps[0]
        for gap in gaps[1:]:
            widest = widest.max(gap)
        return widest

    def covariances(self, behaviour: Sequence[Component]) -> BallTable:
        """``e_h(s,a) = E_μ[f_θ 1{s_h=s, a_h=a}]`` (C1)."""
        parts = [(weight, self._covariances(mu)) for weight, mu in behaviour]
        return self.tabulate(lambda h, s, a: sum((weight * table[h][s][a] for weight, table in parts), arb(0)))

    def half_gradient(self, covariances: BallTable) -> BallTable:
        """``G = ½∇L``: ``G_1 = e_1`` and ``G_h(s,a) = e_h(s,a) - π_θ(a|s) e_h(s)`` later (C1)."""
        sums = [[sum(row, arb(0)) for row in layer] for layer in covariances]
        return self.tabulate(
            lambda h, s, a: covariances[h][s][a] - (self.policy[h][s][a] * sums[h][s] if h else arb(0))
        )

    # -- parts -----------------------------------------------------------------------------------------------------

    def _moments(self, mu: Table) -> tuple[list[arb], list[arb]]:
        """``E_μ[f_θ | s_1]`` and ``E_μ[f_θ² | s_1]``, from the steps ``logit - R_β - V_θ(s')`` of its definition."""
        problem = self.problem
        mean, square = [arb(0)], [arb(0)]  # after the last layer there is one end, of value 0
        for h in reversed(range(problem.horizon)):
            first, second = [], []
            for s in range(len(problem.reference[h])):
                m, q = arb(0), arb(0)
                for a in problem.actions(h, s):
                    step = self.logits[h][s][a] - self.regularized_reward[h][s][a]
                    for target, probability in problem.successors[h][s][a] or [(0, fmpq(1))]:
                        value = self.values[h + 1][target] if h + 1 < problem.horizon else arb(0)
                        share, x = mu[h][s][a] * probability, step - value
                        m += share * (x + mean[target])
                        q += share * (x * x + 2 * x * mean[target] + square[target])
                first.append(m)
                second.append(q)
            mean, square = first, second
        return mean, square

    def _covariances(self, mu: Table) -> BallTable:
        """Of one policy: what was collected on the way, the present term and the mean of the rest, times the occupancy."""
        problem = self.problem
        rest: list[list[list[arb]]] = [[] for _ in range(problem.horizon)]  # of each pair, after it
        after: list[arb] = []
        for h in reversed(range(problem.horizon)):
            rest[h] = [
                [self._expected(h, s, a, after) for a in range(len(row))] for s, row in enumerate(problem.reference[h])
            ]
            after = [
                sum((mu[h][s][a] * (self.terms[h][s][a] + rest[h][s][a]) for a in problem.actions(h, s)), arb(0))
                for s in range(len(problem.reference[h]))
            ]
        visits, found = occupancy(problem, mu), []
        so_far = [arb(0)] * len(problem.initial)  # E[Σ_{k<h} u_k 1{s_h = s}]
        for h, layer in enumerate(problem.reference):
            collected = [
                [mu[h][s][a] * so_far[s] + visits[h][s][a] * self.terms[h][s][a] for a in range(len(row))]
                for s, row in enumerate(layer)
            ]
            found.append(
                [[c + visits[h][s][a] * rest[h][s][a] for a, c in enumerate(row)] for s, row in enumerate(collected)]
            )
            so_far = [arb(0)] * (len(problem.reference[h + 1]) if h + 1 < problem.horizon else 0)
            for s, row in enumerate(collected):
                for a, c in enumerate(row):
                    for target, probability in problem.successors[h][s][a]:
                        so_far[target] += c * probability
        return found

    def _extremes(self, choose: Callable[[arb, arb], arb]) -> list[arb]:
        problem, after = self.problem, [arb(0)]
        for h in reversed(range(problem.horizon)):
            here = []
            for s in range(len(problem.reference[h])):
                sums = [
                    self.terms[h][s][a] + after[target]
                    for a in problem.actions(h, s)
                    for target, _ in problem.successors[h][s][a] or [(0, fmpq(1))]
                ]
                best = sums[0]
                for other in sums[1:]:
                    best = choose(best, other)
                here.append(best)
            after = here
        return after

    def _over_starts(self, values: Sequence[arb]) -> arb:
        return sum((mass * value for mass, value in zip(self.problem.initial, values, strict=True)), arb(0))

    def _expected(self, h: int, s: int, a: int, after: Sequence[arb]) -> arb:
        """``E[after(s')]``; 0 after the last layer."""
        return sum((p * after[target] for target, p in self.problem.successors[h][s][a]), arb(0))

    def _log_sums_of_layer(self, h: int, layer: Sequence[Sequence[arb]]) -> list[arb]:
        return [sum((row[a].exp() for a in self.problem.actions(h, s)), arb(0)).log() for s, row in enumerate(layer)]

    def _log_sums(self, table: BallTable) -> list[list[arb]]:
        return [self._log_sums_of_layer(h, layer) for h, layer in enumerate(table)]

    def _normalised(self, table: BallTable, sums: list[list[arb]]) -> BallTable:
        return self.tabulate(lambda h, s, a: table[h][s][a] - sums[h][s])

    def _exponential(self, table: BallTable) -> BallTable:
        return self.tabulate(lambda h, s, a: table[h][s][a].exp())


def weighted(visits: Table, table: BallTable) -> arb:
    """``Σ_h Σ_{s,a} d_h(s,a) table_h(s,a)``."""
    total = arb(0)
    for layer, values in zip(visits, table, strict=True):
        for row, cells in zip(layer, values, strict=True):
            for mass, cell in zip(row, cells, strict=True):
                total += mass * cell
    return total
