"""Random families: rewards, laws and successors drawn independently; the actions are numbered without meaning.

Layers are all of one size, or, with ``ragged``, of sizes drawn up to it. With ``batch`` there are that many
independent problems of the same sizes along a leading dimension, drawn in one go: a million small ones take
seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.random_tables import (
    ReferenceKind,
    draw_existing,
    draw_reference,
    draw_simplex,
    draw_subset,
    seeded,
)
from tbrm_theory.registry import Count, Share, Temperature, family
from tbrm_theory.transitions import DenseTransition, DeterministicTransition, SparseTransition, Transition

__all__ = ["dense_random", "deterministic_dag", "garnet", "one_state"]

Shape: TypeAlias = tuple[int, ...]


@family("one-state", deterministic=True)
def one_state(
    seed: int,
    *,
    horizon: Count = 4,
    actions: Count = 2,
    beta: Temperature = 0.2,
    reference: ReferenceKind = "uniform",
    missing: Share = 0.0,
    batch: Count | None = None,
) -> RegularizedMDP:
    """A single state in every layer (X1, X4); the reward of each action is uniform on [0, 1]."""

    def stay(pairs: Shape, next_states: int, generator: torch.Generator) -> Transition:
        return DeterministicTransition(torch.zeros(pairs, dtype=torch.int64), next_states)

    sizes = [(1, actions)] * horizon
    return _random_problem(seeded(seed), sizes, stay, beta, reference, missing, batch)


@family("dense-random", deterministic=False)
def dense_random(
    seed: int,
    *,
    horizon: Count = 4,
    states: Count = 6,
    actions: Count = 3,
    beta: Temperature = 0.2,
    reference: ReferenceKind = "uniform",
    missing: Share = 0.0,
    ragged: bool = False,
    batch: Count | None = None,
) -> RegularizedMDP:
    """Any state may follow any other, by Dirichlet laws; rewards are uniform on [0, 1]."""

    def dirichlet(pairs: Shape, next_states: int, generator: torch.Generator) -> Transition:
        return DenseTransition(draw_simplex((*pairs, next_states), generator))

    generator = seeded(seed)
    sizes = _layer_sizes(horizon, states, actions, ragged, generator)
    return _random_problem(generator, sizes, dirichlet, beta, reference, missing, batch)


@family("garnet", deterministic=False)
def garnet(
    seed: int,
    *,
    horizon: Count = 4,
    states: Count = 6,
    actions: Count = 3,
    branching: Count = 2,
    beta: Temperature = 0.2,
    reference: ReferenceKind = "uniform",
    missing: Share = 0.0,
    ragged: bool = False,
    batch: Count | None = None,
) -> RegularizedMDP:
    """A few distinct successors, ``branching`` for each pair, with Dirichlet weights; rewards in [0, 1]."""

    def few(pairs: Shape, next_states: int, generator: torch.Generator) -> Transition:
        successors = draw_subset((*pairs, min(branching, next_states)), next_states, generator)
        return SparseTransition(successors, draw_simplex(tuple(successors.shape), generator), next_states)

    generator = seeded(seed)
    sizes = _layer_sizes(horizon, states, actions, ragged, generator)
    return _random_problem(generator, sizes, few, beta, reference, missing, batch)


@family("deterministic-dag", deterministic=True)
def deterministic_dag(
    seed: int,
    *,
    horizon: Count = 4,
    states: Count = 6,
    actions: Count = 3,
    beta: Temperature = 0.2,
    reference: ReferenceKind = "uniform",
    missing: Share = 0.0,
    ragged: bool = False,
    batch: Count | None = None,
) -> RegularizedMDP:
    """Every action leads to a random state of the next layer, so paths merge; rewards in [0, 1]."""

    def one(pairs: Shape, next_states: int, generator: torch.Generator) -> Transition:
        return DeterministicTransition(torch.randint(next_states, pairs, generator=generator), next_states)

    generator = seeded(seed)
    sizes = _layer_sizes(horizon, states, actions, ragged, generator)
    return _random_problem(generator, sizes, one, beta, reference, missing, batch)


def _layer_sizes(
    horizon: int, states: int, actions: int, ragged: bool, generator: torch.Generator
) -> list[tuple[int, int]]:
    """``(S_h, A_h)`` of every layer: the given sizes, or each uniform from 1 up to them."""
    if not ragged:
        return [(states, actions)] * horizon
    drawn = [1 + torch.randint(limit, (horizon,), generator=generator) for limit in (states, actions)]
    return list(zip(*(sizes.tolist() for sizes in drawn), strict=True))


def _random_problem(
    generator: torch.Generator,
    sizes: list[tuple[int, int]],
    draw_kernel: Callable[[Shape, int, torch.Generator], Transition],
    beta: float,
    reference: ReferenceKind,
    missing: float,
    batch: int | None,
) -> RegularizedMDP:
    """Rewards uniform on [0, 1], a Dirichlet initial law, kernels from ``draw_kernel(pairs, S', generator)``."""
    leading = () if batch is None else (batch,)
    pairs = [(*leading, *size) for size in sizes]
    one_for_all = reference == "uniform" and missing == 0  # then a batch has a single reference
    exists = [draw_existing(shape, missing, generator) for shape in (sizes if one_for_all else pairs)]
    initial = draw_simplex((*leading, sizes[0][0]), generator)
    reward = [torch.rand(shape, generator=generator, dtype=torch.float64) for shape in pairs]
    transitions = [
        draw_kernel(shape, next_states, generator) for shape, (next_states, _) in zip(pairs, sizes[1:], strict=False)
    ]
    return RegularizedMDP(
        beta=beta,
        initial=initial,
        reward=reward,
        reference=[draw_reference(reference, table, generator) for table in exists],  # last: alters nothing else
        transitions=transitions,
    )
