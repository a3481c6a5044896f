"""Hypothesis strategies for valid problems of every kind, with policies and logits on them.

Ragged layers and rows, one state, one action, actions that do not exist, several first states, some of probability 0,
dense, sparse and deterministic transitions, temperatures from 1e-6 to 1e6. Everything shrinks to what can be read: one layer,
one state, one action, rewards that are small integers, probabilities that are simple fractions, temperature 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.transitions import DenseTransition, DeterministicTransition, SparseTransition, Transition

ORDINARY_BETAS = (1.0, 0.5, 2.0, 0.1)
EXTREME_BETAS = (1.0, 1e-3, 1e3, 1e-6, 1e6)
KINDS = ("deterministic", "sparse", "dense")

# A later alternative is never preferred when shrinking, so a counterexample is made of integers where it can be.
numbers = st.one_of(
    st.integers(-2, 2).map(float),
    st.sampled_from([0.5, -0.5, 0.25, 1 / 3]),
    st.floats(-5, 5, allow_nan=False, allow_subnormal=False),
)


@st.composite
def distributions(draw: st.DrawFn, size: int, *, holes: bool = True) -> list[float]:
    """``size`` probabilities, multiples of a simple fraction; with ``holes`` some may be 0, one never is."""
    weights = draw(st.lists(st.integers(0 if holes else 1, 4), min_size=size, max_size=size))
    if not any(weights):
        weights[draw(st.integers(0, size - 1))] = 1
    return [weight / sum(weights) for weight in weights]


def table(rows: Sequence[Sequence[float]], width: int) -> Tensor:
    """Rows of different lengths, padded with zeros."""
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=torch.float64)


@st.composite
def kernels(draw: st.DrawFn, kind: str, exists: Tensor, next_states: int) -> Transition:
    """A transition of the given kind; the rows of actions that do not exist hold anything legal, zeros included."""
    states, actions = exists.shape

    def for_each_pair(one: st.SearchStrategy[list[float]]) -> list[list[list[float]]]:
        return [[draw(one) for _ in range(actions)] for _ in range(states)]

    targets = st.integers(0, next_states - 1)
    if kind == "deterministic":
        rows = [[draw(targets) for _ in range(actions)] for _ in range(states)]
        return DeterministicTransition(torch.tensor(rows), next_states)
    width = draw(st.integers(1, 3)) if kind == "sparse" else next_states
    probability = torch.tensor(for_each_pair(distributions(width)), dtype=torch.float64)
    if draw(st.booleans()):
        probability = torch.where(exists.unsqueeze(-1), probability, 0.0)
    if kind == "dense":
        return DenseTransition(probability)
    # The same successor may be listed twice: its probabilities add up.
    listed = [[draw(st.lists(targets, min_size=width, max_size=width)) for _ in range(actions)] for _ in range(states)]
    return SparseTransition(torch.tensor(listed), probability, next_states)


@st.composite
def problems(
    draw: st.DrawFn,
    *,
    kinds: Sequence[str] = KINDS,
    betas: Sequence[float] = ORDINARY_BETAS,
    max_horizon: int = 3,
    max_states: int = 3,
    max_actions: int = 3,
    min_horizon: int = 1,
) -> RegularizedMDP:
    """A valid problem without batch dimensions, small enough to list."""
    horizon = draw(st.integers(min_horizon, max_horizon))
    states = [draw(st.integers(1, max_states)) for _ in range(horizon)]
    counts = [
        draw(st.lists(st.integers(1, max_actions), min_size=size, max_size=size)) for size in states
    ]  # how many actions each state lists
    reference = [table([draw(distributions(count)) for count in row], max(row)) for row in counts]
    reward = [
        table([draw(st.lists(numbers, min_size=count, max_size=count)) for count in row], max(row)) for row in counts
    ]
    return RegularizedMDP(
        beta=draw(st.sampled_from(betas)),
        initial=torch.tensor(draw(distributions(states[0])), dtype=torch.float64),
        reward=reward,
        reference=reference,
        transitions=[
            draw(kernels(draw(st.sampled_from(kinds)), here > 0, next_states))
            for here, next_states in zip(reference, states[1:], strict=False)
        ],
        action_counts=counts,
    )


@st.composite
def probability_tables(draw: st.DrawFn, mdp: RegularizedMDP, *, holes: bool = True) -> list[Tensor]:
    """The probabilities of a policy on the actions that exist; with ``holes`` it need not take all of them."""
    tables = []
    for valid in mdp.valid:
        policy = torch.zeros(valid.shape, dtype=torch.float64)
        for row, exists in zip(policy, valid, strict=True):
            row[exists] = torch.tensor(draw(distributions(int(exists.sum()), holes=holes)), dtype=torch.float64)
        tables.append(policy)
    return tables


def log_policies(mdp: RegularizedMDP, *, holes: bool = True) -> st.SearchStrategy[tuple[Tensor, ...]]:
    """Tables ``log π``, ``-inf`` for actions not taken."""
    return probability_tables(mdp, holes=holes).map(lambda tables: tuple(policy.log() for policy in tables))


@st.composite
def tables_of(draw: st.DrawFn, mdp: RegularizedMDP, entries: st.SearchStrategy[float] = numbers) -> tuple[Tensor, ...]:
    """One number for each ``(h, s, a)``, those of missing actions included: logits, or an additive function."""
    return tuple(
        torch.tensor(
            [draw(st.lists(entries, min_size=layer.shape[1], max_size=layer.shape[1])) for _ in layer],
            dtype=torch.float64,
        )
        for layer in mdp.reference
    )


def one_of(mdp: RegularizedMDP, i: int) -> RegularizedMDP:
    """The ``i``-th problem of a batch with one dimension; tables without a batch are common to all."""

    def pick(table: Tensor, own: int) -> Tensor:
        return table[i] if table.dim() > own else table

    def kernel(transition: Transition) -> Transition:
        match transition:
            case DeterministicTransition():
                return DeterministicTransition(pick(transition.next_state, 2), transition.next_states)
            case SparseTransition():
                successors, probability = pick(transition.next_state, 3), pick(transition.probability, 3)
                return SparseTransition(successors, probability, transition.next_states)
            case DenseTransition():
                return DenseTransition(pick(transition.probability, 3))

    return RegularizedMDP(
        beta=pick(mdp.beta, 0),
        initial=pick(mdp.initial, 1),
        reward=[pick(table, 2) for table in mdp.reward],
        reference=[pick(table, 2) for table in mdp.reference],
        transitions=[kernel(transition) for transition in mdp.transitions],
    )
