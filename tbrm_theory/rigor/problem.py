"""A problem in exact numbers: the floats of an instance are dyadic rationals, and each probability row is divided by its exact sum.

Tables are nested lists ``[layer][state][action]`` in the file's own shape. Occupancies and moments take a policy of rationals or of
balls and answer in kind. Nothing here calls the package's own occupancies, kernels' operators or solvers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias, cast

from flint import fmpq, fmpq_mat
from torch import Tensor

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.instance import Instance
from tbrm_theory.rigor.decision import Number

__all__ = [
    "Component",
    "ExactProblem",
    "Pair",
    "Table",
    "mixed_table",
    "moments",
    "occupancy",
    "occupancy_of_states",
    "rational_moments",
]

Table: TypeAlias = Sequence[Sequence[Sequence[Number]]]
Pair: TypeAlias = tuple[int, int, int]
"""``(layer, state, action)``, from 0."""
Component: TypeAlias = tuple[fmpq, Table]
"""A weight and a policy of a mixture."""


def _rational(number: float) -> fmpq:
    return fmpq(*number.as_integer_ratio())


def _distribution(row: Sequence[float]) -> list[fmpq]:
    exact = [_rational(number) for number in row]
    total = sum(exact, fmpq(0))
    return [number / total for number in exact]


@dataclass(frozen=True)
class ExactProblem:
    """The problem of an instance, and its policies, mixtures and logits by name."""

    instance: Instance

    @property
    def horizon(self) -> int:
        return self.instance.mdp.horizon

    @cached_property
    def beta(self) -> fmpq:
        return _rational(self.instance.mdp.beta.item())

    @cached_property
    def initial(self) -> list[fmpq]:
        return _distribution(self.instance.mdp.initial.tolist())

    @cached_property
    def reward(self) -> list[list[list[fmpq]]]:
        return self._numbers(self.instance.mdp.reward)

    @cached_property
    def reference(self) -> list[list[list[fmpq]]]:
        return self.distributions(self.instance.mdp.reference)

    @cached_property
    def successors(self) -> list[list[list[list[tuple[int, fmpq]]]]]:
        """``[h][s][a]``: the next states of positive probability; none after the last layer or an action that does not exist."""
        mdp = self.instance.mdp
        found = []
        for h, kernel in enumerate(mdp.transitions):
            targets, probabilities = (mdp.rows(h, table) for table in kernel.edges())
            found.append(
                [
                    [
                        _arcs(targets[s][a], probabilities[s][a]) if self.reference[h][s][a] > 0 else []
                        for a in range(len(row))
                    ]
                    for s, row in enumerate(self.reference[h])
                ]
            )
        return [*found, [[[] for _ in row] for row in self.reference[-1]]]

    @cached_property
    def deterministic(self) -> bool:
        """Whether every pair leads to one state."""
        return all(len(arcs) <= 1 for layer in self.successors for row in layer for arcs in row)

    @cached_property
    def pairs(self) -> list[Pair]:
        """Every action that exists."""
        return [
            (h, s, a)
            for h, layer in enumerate(self.reference)
            for s, row in enumerate(layer)
            for a, probability in enumerate(row)
            if probability > 0
        ]

    def actions(self, h: int, s: int) -> list[int]:
        """The actions that exist in a state."""
        return [a for a, probability in enumerate(self.reference[h][s]) if probability > 0]

    # -- by name ---------------------------------------------------------------------------------------------------

    def policy(self, name: str) -> list[list[list[fmpq]]]:
        """A policy of the instance, or ``reference``.

        Raises:
            InvalidInputError: no such policy, the optimum, or mass on an action that does not exist.
        """
        if name == "reference":
            return self.reference
        if name == "optimal":
            raise InvalidInputError("policies.optimal", "expected a policy of rational numbers, found the optimum")
        if name not in self.instance.probabilities:
            raise InvalidInputError(f"policies.{name}", "expected this policy in the instance, found none")
        table = self.distributions(self.instance.probabilities[name])
        for h, layer in enumerate(table):
            for s, row in enumerate(layer):
                for a, probability in enumerate(row):
                    if probability > 0 and self.reference[h][s][a] == 0:
                        where = f"policies.{name}[{h}][{s}][{a}]"
                        raise InvalidInputError(where, "expected no mass on an action that does not exist")
        return table

    def behaviour(self, name: str) -> list[Component]:
        """A policy as a mixture of one, or a mixture; its weights are divided by their sum."""
        if name not in self.instance.mixtures:
            return [(fmpq(1), self.policy(name))]
        parts = self.instance.mixtures[name]
        weights = _distribution([weight for weight, _ in parts])
        return [(weight, self.policy(policy)) for weight, (_, policy) in zip(weights, parts, strict=True)]

    def logits(self, name: str) -> list[list[list[fmpq]]]:
        """Logits of the instance; 0 where the action does not exist, and never to be read there."""
        if name not in self.instance.logits:
            raise InvalidInputError(f"logits.{name}", "expected these logits in the instance, found none")
        return self._numbers(self.instance.logits[name])

    # -- reading ---------------------------------------------------------------------------------------------------

    def _numbers(self, tables: Sequence[Tensor]) -> list[list[list[fmpq]]]:
        return [
            [
                [_rational(x) if p > 0 else fmpq(0) for x, p in zip(*rows, strict=True)]
                for rows in zip(self.instance.mdp.rows(h, table), self.reference[h], strict=True)
            ]
            for h, table in enumerate(tables)
        ]

    def distributions(self, tables: Sequence[Tensor]) -> list[list[list[fmpq]]]:
        """Tables of probabilities, each row divided by its exact sum."""
        return [[_distribution(row) for row in self.instance.mdp.rows(h, table)] for h, table in enumerate(tables)]


def _arcs(targets: Sequence[int], probabilities: Sequence[float]) -> list[tuple[int, fmpq]]:
    total: dict[int, fmpq] = {}
    for target, probability in zip(targets, _distribution(probabilities), strict=True):
        if probability > 0:
            total[target] = total.get(target, fmpq(0)) + probability
    return list(total.items())


# -- where a policy goes -------------------------------------------------------------------------------------------


def occupancy(problem: ExactProblem, policy: Table) -> Table:
    """``d_h(s,a)``."""
    states: list[Number] = list(problem.initial)
    found = []
    for h, layer in enumerate(policy):
        pairs = [[mass * share for share in row] for mass, row in zip(states, layer, strict=True)]
        found.append(pairs)
        states = _pushed(problem, h, pairs)
    return found


def occupancy_of_states(pairs: Table) -> list[list[Number]]:
    """``d_h(s)``."""
    return [[sum(row, fmpq(0)) for row in layer] for layer in pairs]


def mixed_table(components: Sequence[tuple[fmpq, Table]]) -> Table:
    """``Σ_i w_i table_i``."""
    tables = [table for _, table in components]
    return [
        [
            [sum((weight * table[h][s][a] for weight, table in components), fmpq(0)) for a in range(len(row))]
            for s, row in enumerate(layer)
        ]
        for h, layer in enumerate(tables[0])
    ]


def moments(problem: ExactProblem, policy: Table) -> list[list[Number]]:
    """``E[φφᵀ]``, ``φ(τ) = Σ_h e_(h,s_h,a_h)``, over ``problem.pairs``: how likely both of two pairs are visited (I12)."""
    place = {pair: i for i, pair in enumerate(problem.pairs)}
    matrix: list[list[Number]] = [[fmpq(0)] * len(place) for _ in place]
    visits = occupancy(problem, policy)
    for (h, s, a), i in place.items():
        mass = visits[h][s][a]
        if mass == 0:  # of a ball this is true only if it is exactly zero
            continue
        matrix[i][i] = mass
        here: list[list[Number]] = [[fmpq(0)] * len(row) for row in policy[h]]
        here[s][a] = mass
        for k in range(h, problem.horizon - 1):
            states = _pushed(problem, k, here)
            here = [[m * share for share in row] for m, row in zip(states, policy[k + 1], strict=True)]
            for (later, t, b), j in place.items():
                if later == k + 1:
                    matrix[i][j] = matrix[j][i] = here[t][b]
    return matrix


def rational_moments(problem: ExactProblem, components: Sequence[Component]) -> fmpq_mat:
    """``E[φφᵀ]`` of a mixture of rational policies."""
    total = fmpq_mat(len(problem.pairs), len(problem.pairs))
    for weight, policy in components:
        total += weight * fmpq_mat(cast("list[list[fmpq]]", moments(problem, policy)))
    return total


def _pushed(problem: ExactProblem, h: int, pairs: Sequence[Sequence[Number]]) -> list[Number]:
    """Mass of the pairs of layer ``h``, moved to the states of the next; none after the last layer."""
    if h == problem.horizon - 1:
        return []
    states: list[Number] = [fmpq(0)] * len(problem.reference[h + 1])
    for s, row in enumerate(pairs):
        for a, mass in enumerate(row):
            for target, probability in problem.successors[h][s][a]:
                states[target] = states[target] + mass * probability
    return states
