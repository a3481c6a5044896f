"""One-layer transition kernels: deterministic, sparse, dense.

A kernel ``P(s' | s, a)`` takes a layer with ``S`` states and ``A`` actions to one with ``S'`` states. All three kinds offer the
same operations, each one call for any number of leading batch dimensions:

* ``expect(value)``      ``(…, S') → (…, S, A)``   ``E[value(s') | s, a]``
* ``variance(value)``    ``(…, S') → (…, S, A)``   ``Var[value(s') | s, a]``, summed as squares so that it never cancels
* ``push(mass)``         ``(…, S, A) → (…, S')``   the adjoint of ``expect``: moves probability forward
* ``edges()``            the kernel as lists of ``(s, a, s', p)`` with a common last dimension, for sampling and enumeration

The batch dimensions of a kernel and of its argument broadcast against each other. A deterministic kernel is a successor table;
a sparse one lists ``K`` successors for each pair, padded with probability 0, so both are gathers and scatter-adds; a dense one
is a matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tbrm_theory.shapes import NextStateTable, StateActionTable, SuccessorTable

__all__ = ["DenseTransition", "DeterministicTransition", "SparseTransition", "Transition"]


def _gather(value: Tensor, index: Tensor) -> Tensor:
    """``value[…, index]`` for an ``index`` of shape ``(S, A)`` or, batched, ``(…, S, A)``."""
    if index.dim() == 2:
        return value.index_select(-1, index.flatten()).unflatten(-1, index.shape)
    batch = torch.broadcast_shapes(value.shape[:-1], index.shape[:-2])
    flat = index.expand(*batch, *index.shape[-2:]).flatten(-2)
    return value.expand(*batch, value.shape[-1]).gather(-1, flat).unflatten(-1, index.shape[-2:])


def _scatter(mass: Tensor, index: Tensor, size: int) -> Tensor:
    """The adjoint of :func:`_gather`: adds every ``mass[…, s, a]`` to cell ``index[…, s, a]`` of ``size`` cells."""
    if index.dim() == 2:
        return mass.new_zeros(*mass.shape[:-2], size).index_add(-1, index.flatten(), mass.flatten(-2))
    batch = torch.broadcast_shapes(mass.shape[:-2], index.shape[:-2])
    flat_index = index.expand(*batch, *index.shape[-2:]).flatten(-2)
    flat_mass = mass.expand(*batch, *mass.shape[-2:]).flatten(-2)
    return flat_mass.new_zeros(*batch, size).scatter_add(-1, flat_index, flat_mass)


def _behind_batch(table: Tensor, own_dimensions: int) -> Tensor:
    return table if table.dim() == own_dimensions else table.unsqueeze(-own_dimensions - 1)


@dataclass(frozen=True, eq=False)
class DeterministicTransition:
    """``s' = next_state[s, a]``; several pairs may lead to one state."""

    next_state: SuccessorTable
    next_states: int
    """``S'``, the number of states of the next layer."""

    @property
    def shape(self) -> tuple[int, int, int]:
        states, actions = self.next_state.shape[-2:]
        return states, actions, self.next_states

    def expect(self, value: NextStateTable) -> StateActionTable:
        return _gather(value, self.next_state)

    def variance(self, value: NextStateTable) -> StateActionTable:
        return torch.zeros_like(_gather(value, self.next_state))

    def push(self, mass: StateActionTable) -> NextStateTable:
        return _scatter(mass, self.next_state, self.next_states)

    def edges(self) -> tuple[Int[Tensor, "... states actions 1"], Float[Tensor, "... states actions 1"]]:
        next_state = self.next_state.unsqueeze(-1)
        return next_state, torch.ones_like(next_state, dtype=torch.float64)

    def behind_batch(self) -> DeterministicTransition:
        """The same kernel for arguments with one more batch dimension, placed last."""
        return DeterministicTransition(_behind_batch(self.next_state, 2), self.next_states)

    def to(self, device: torch.device | str) -> DeterministicTransition:
        return DeterministicTransition(self.next_state.to(device), self.next_states)


@dataclass(frozen=True, eq=False)
class SparseTransition:
    """``K`` listed successors for each pair, padded with probability 0."""

    next_state: Int[Tensor, "... states actions successors"]
    probability: Float[Tensor, "... states actions successors"]
    next_states: int

    @property
    def shape(self) -> tuple[int, int, int]:
        states, actions = self.probability.shape[-3:-1]
        return states, actions, self.next_states

    def _successor_values(self, value: NextStateTable) -> Float[Tensor, "... states actions successors"]:
        """``value(s')`` on the listed successors."""
        flat = _gather(value, self.next_state.flatten(-2))
        return flat.unflatten(-1, self.next_state.shape[-2:])

    def expect(self, value: NextStateTable) -> StateActionTable:
        return (self.probability * self._successor_values(value)).sum(-1)

    def variance(self, value: NextStateTable) -> StateActionTable:
        values = self._successor_values(value)
        mean = (self.probability * values).sum(-1, keepdim=True)
        return (self.probability * (values - mean).square()).sum(-1)

    def push(self, mass: StateActionTable) -> NextStateTable:
        flow = self.probability * mass.unsqueeze(-1)
        return _scatter(flow.flatten(-2), self.next_state.flatten(-2), self.next_states)

    def edges(
        self,
    ) -> tuple[Int[Tensor, "... states actions successors"], Float[Tensor, "... states actions successors"]]:
        return self.next_state, self.probability

    def behind_batch(self) -> SparseTransition:
        return SparseTransition(_behind_batch(self.next_state, 3), _behind_batch(self.probability, 3), self.next_states)

    def to(self, device: torch.device | str) -> SparseTransition:
        return SparseTransition(self.next_state.to(device), self.probability.to(device), self.next_states)


@dataclass(frozen=True, eq=False)
class DenseTransition:
    """The whole table ``P[s, a, s']``."""

    probability: Float[Tensor, "... states actions next_states"]

    @property
    def shape(self) -> tuple[int, int, int]:
        states, actions, next_states = self.probability.shape[-3:]
        return states, actions, next_states

    def expect(self, value: NextStateTable) -> StateActionTable:
        if self.probability.dim() == 3:  # one kernel for the whole batch: a single matrix product
            flat = value @ self.probability.flatten(0, 1).T
            return flat.unflatten(-1, self.probability.shape[:2])
        return (self.probability * value[..., None, None, :]).sum(-1)

    def variance(self, value: NextStateTable) -> StateActionTable:
        deviation = value[..., None, None, :] - self.expect(value).unsqueeze(-1)
        return (self.probability * deviation.square()).sum(-1)

    def push(self, mass: StateActionTable) -> NextStateTable:
        if self.probability.dim() == 3:
            return mass.flatten(-2) @ self.probability.flatten(0, 1)
        return (self.probability * mass.unsqueeze(-1)).sum((-3, -2))

    def edges(
        self,
    ) -> tuple[Int[Tensor, "... states actions successors"], Float[Tensor, "... states actions successors"]]:
        successors = torch.arange(self.probability.shape[-1], device=self.probability.device)
        return successors.expand(self.probability.shape), self.probability

    def behind_batch(self) -> DenseTransition:
        return DenseTransition(_behind_batch(self.probability, 3))

    def to(self, device: torch.device | str) -> DenseTransition:
        return DenseTransition(self.probability.to(device))


Transition: TypeAlias = DeterministicTransition | SparseTransition | DenseTransition
