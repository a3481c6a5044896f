"""What an adversarial search moves in: batches of small layered problems with policies, data and logits.

A candidate has a successor table for each transition, which is discrete and changes by mutation, and tables of unconstrained
numbers, which change by gradient steps: logits of policies, of transitions and of mixture weights, rewards, residuals. Probabilities
are thus kept in log space and can become as small as they like. A batch of candidates is one object; the batch is the first dimension.

:class:`Problems` is what a claim sees of them, differentiable; one of them is an :class:`~tbrm_theory.instance.Instance` with the
names ``pi`` (policy), ``mu`` (the data: a policy, or a mixture of ``mu1`` and ``mu2``), ``theta`` and ``better`` (logits).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.instance import Instance
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.shapes import PerLayerStateAction
from tbrm_theory.tables import safe_log
from tbrm_theory.transitions import DenseTransition, DeterministicTransition, Transition

__all__ = ["Candidates", "Data", "Problems", "Shape", "join"]

Data: TypeAlias = list[tuple[Tensor, PerLayerStateAction]]
"""Weights ``(…)`` and tables ``log μ_i`` of the policies that data are drawn from, one for each episode."""

_MIXTURE = ("mu1", "mu2")
_NOISY = 0.1  # spread of the logits of transitions: near 0, where an action hardly matters
_SHIFT = 0.5  # how far a mutation moves a number, typically


@dataclass(frozen=True)
class Shape:
    """Sizes of a problem: one first state, then the same number of states and actions in every layer."""

    horizon: int
    first_actions: int = 3
    states: int = 2
    actions: int = 2
    stochastic: bool = False

    @property
    def layers(self) -> list[tuple[int, int]]:
        """``(S_h, A_h)``."""
        return [(1, self.first_actions)] + [(self.states, self.actions)] * (self.horizon - 1)

    def sizes(self, table: str) -> list[tuple[int, ...]]:
        """The shapes of one candidate's tables of this name."""
        if table == "weights":
            return [(len(_MIXTURE),)]
        if table == "transition":
            return [(*layer, self.states) for layer in self.layers[:-1]]
        return list(self.layers)


@dataclass(frozen=True, eq=False)
class Candidates:
    """A batch of points of the search space."""

    shape: Shape
    successors: tuple[Tensor, ...]
    """``next_state`` ``(R, S_h, A_h)`` for each transition; not used if the shape is stochastic."""
    tables: dict[str, tuple[Tensor, ...]]
    """Unconstrained numbers by name."""

    @classmethod
    def random(cls, shape: Shape, names: Sequence[str], count: int, generator: torch.Generator) -> Candidates:
        """Random tables; how spread out they are differs from candidate to candidate by a factor of 20. Transitions start noisy."""
        successors = tuple(
            torch.randint(shape.states, (count, *layer), generator=generator) for layer in shape.layers[:-1]
        )
        tables = {}
        for name in names:
            spread = 0.3 * 20 ** torch.rand(count, generator=generator, dtype=torch.float64)
            if name == "transition":
                spread = torch.full_like(spread, _NOISY)
            tables[name] = tuple(
                spread.reshape(count, *[1] * len(size))
                * torch.randn(count, *size, generator=generator, dtype=torch.float64)
                for size in shape.sizes(name)
            )
        return cls(shape, successors, tables)

    @property
    def count(self) -> int:
        return len(next(iter(self.tables.values()))[0])

    @property
    def leaves(self) -> list[Tensor]:
        """Every table of numbers."""
        return [layer for layers in self.tables.values() for layer in layers]

    def pick(self, index: Tensor) -> Candidates:
        """The candidates with these numbers, in this order, as copies."""
        return Candidates(
            self.shape,
            tuple(table[index] for table in self.successors),
            {name: tuple(layer.detach()[index].clone() for layer in layers) for name, layers in self.tables.items()},
        )

    def mutated(self, generator: torch.Generator) -> Candidates:
        """Each with one successor changed, every second one with its numbers moved too."""
        chosen = torch.randint(max(len(self.successors), 1), (self.count,), generator=generator)
        successors = []
        for h, table in enumerate(self.successors):
            cells = table.flatten(1).clone()
            cell = torch.randint(cells.shape[1], (self.count, 1), generator=generator)
            value = torch.randint(self.shape.states, (self.count, 1), generator=generator)
            changed = cells.scatter(1, cell, value)
            successors.append(torch.where((chosen == h).unsqueeze(-1), changed, cells).reshape(table.shape))
        moved = (torch.rand(self.count, generator=generator, dtype=torch.float64) < 0.5).to(torch.float64) * _SHIFT
        return replace(
            self,
            successors=tuple(successors),
            tables={name: _shifted(layers, moved, generator) for name, layers in self.tables.items()},
        )

    def lengthened(self) -> Candidates:
        """One layer more, like the last one and entered without leaving the state; the first layer if there is no other.

        How a search at one horizon starts from the winner at the horizon before.
        """
        shape = replace(self.shape, horizon=self.shape.horizon + 1)
        if self.shape.horizon == 1:
            raise InvalidInputError("horizon", "expected at least 2 layers to lengthen, found 1")
        states, actions = self.shape.layers[-1]
        staying = torch.arange(states)[:, None].expand(self.count, states, actions)
        tables = {
            name: layers if name == "weights" else (*layers, layers[-1].clone()) for name, layers in self.tables.items()
        }
        return Candidates(shape, (*self.successors, staying), tables)

    def transitions(self) -> tuple[Transition, ...]:
        if self.shape.stochastic:
            return tuple(DenseTransition(torch.softmax(layer, -1)) for layer in self.tables["transition"])
        return tuple(DeterministicTransition(table, self.shape.states) for table in self.successors)

    def log_policy(self, name: str) -> PerLayerStateAction:
        return tuple(torch.log_softmax(layer, -1) for layer in self.tables[name])

    def problem(self) -> RegularizedMDP:
        """The batch of problems at temperature 1, with the rewards and references that are among the tables; else 0 and uniform."""
        uniform = [torch.full(layer, 1 / layer[1], dtype=torch.float64) for layer in self.shape.layers]
        return RegularizedMDP(
            beta=1.0,
            initial=torch.ones(1, dtype=torch.float64),
            reward=self.tables.get("reward", [torch.zeros_like(table) for table in uniform]),
            reference=[log.exp() for log in self.log_policy("reference")] if "reference" in self.tables else uniform,
            transitions=self.transitions(),
        )

    def data(self) -> Data:
        """The policy ``mu``, the mixture of ``mu1`` and ``mu2``, or the uniform policy if neither is among the tables."""
        one = torch.ones(self.count, dtype=torch.float64)
        if "mu" in self.tables:
            return [(one, self.log_policy("mu"))]
        if "weights" not in self.tables:
            return [
                (one, tuple(torch.full(layer, -math.log(layer[1]), dtype=torch.float64) for layer in self.shape.layers))
            ]
        weights = torch.softmax(self.tables["weights"][0], -1)
        return [(weights[:, i], self.log_policy(name)) for i, name in enumerate(_MIXTURE)]


def join(parts: Sequence[Candidates]) -> Candidates:
    """Several batches of one shape as one."""
    first = parts[0]
    tables = {
        name: tuple(torch.cat(layers) for layers in zip(*(part.tables[name] for part in parts), strict=True))
        for name in first.tables
    }
    successors = tuple(torch.cat(layers) for layers in zip(*(part.successors for part in parts), strict=True))
    return Candidates(first.shape, successors, tables)


def _shifted(layers: tuple[Tensor, ...], size: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Numbers moved by normal noise of the given size, ``(R,)``."""
    return tuple(
        layer
        + size.reshape(-1, *[1] * (layer.dim() - 1))
        * torch.randn(layer.shape, generator=generator, dtype=torch.float64)
        for layer in layers
    )


@dataclass(frozen=True, eq=False)
class Problems:
    """A batch of problems, or one, and what a claim compares on them."""

    mdp: RegularizedMDP
    data: Data
    pi: PerLayerStateAction | None = None
    """``log π``."""
    theta: PerLayerStateAction | None = None
    """``logit_θ``."""
    better: PerLayerStateAction | None = None
    """Other logits, for which the loss may be lower."""

    @property
    def mu(self) -> PerLayerStateAction:
        """``log μ`` of Markov data."""
        [(_, log_mu)] = self.data
        return log_mu

    @classmethod
    def of(cls, instance: Instance) -> Problems:
        """One problem, from a document with the names of this module.

        Raises:
            InvalidInputError: no data named ``mu``.
        """
        if "mu" in instance.policies:
            parts = [(1.0, "mu")]
        elif "mu" in instance.mixtures:
            parts = list(instance.mixtures["mu"])
        else:
            raise InvalidInputError("policies.mu", "expected this policy or a mixture of this name, found neither")
        data = [(torch.tensor(weight, dtype=torch.float64), instance.policies[name]) for weight, name in parts]
        logits = instance.logits
        return cls(instance.mdp, data, instance.policies.get("pi"), logits.get("theta"), logits.get("better"))

    def instance(self, index: int) -> Instance:
        """One of the batch as an instance."""

        def one(tables: PerLayerStateAction) -> PerLayerStateAction:
            return tuple(table.detach()[index] if table.dim() > 2 else table.detach() for table in tables)

        mixed = len(self.data) > 1
        names = _MIXTURE if mixed else ("mu",)
        logs = {name: one(log) for name, (_, log) in zip(names, self.data, strict=True)}
        weights = [(weight[index].item(), name) for name, (weight, _) in zip(names, self.data, strict=True)]
        if self.pi is not None:
            logs = {"pi": one(self.pi)} | logs
        return Instance.from_probabilities(
            _one_problem(self.mdp, index, one),
            {name: tuple(_rows(table) for table in log) for name, log in logs.items()},
            {"mu": weights} if mixed else {},
            {name: one(table) for name, table in (("theta", self.theta), ("better", self.better)) if table is not None},
        )


def _rows(log_policy: Tensor) -> Tensor:
    probability = log_policy.exp()
    return probability / probability.sum(-1, keepdim=True)


def _one_problem(mdp: RegularizedMDP, index: int, one: Any) -> RegularizedMDP:
    def kernel(transition: Transition) -> Transition:
        match transition:
            case DeterministicTransition():
                return DeterministicTransition(transition.next_state[index], transition.next_states)
            case DenseTransition():
                return DenseTransition(_rows(safe_log(transition.probability.detach()[index])))
        raise InvalidInputError("transitions", "expected successor tables or dense ones")

    return RegularizedMDP(
        beta=mdp.beta,
        initial=mdp.initial,
        reward=one(mdp.reward),
        reference=[_rows(safe_log(table)) for table in one(mdp.reference)],
        transitions=[kernel(transition) for transition in mdp.transitions],
    )
