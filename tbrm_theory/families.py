"""Named families of problems: ``make("chain", seed=0, horizon=5)``.

Those made by hand and the trees are below, the random ones in ``random_families``, the real ones in
``gymnasium_import``, the verifiable token tasks in ``verifiable_tasks``. Each default ``beta`` leaves the
reference at least 0.05 of the reward range short of the optimum, so that there is something to learn. ``seed``
decides everything random. Layers that are alike share their tensors: a horizon of 10⁴ costs one table.

Options in common: ``reference`` is uniform, or drawn from a Dirichlet law; ``missing`` is the probability that
an action does not exist.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from tbrm_theory import gymnasium_import, random_families, verifiable_tasks
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.random_tables import (
    ReferenceKind,
    draw_existing,
    draw_reference,
    draw_simplex,
    seeded,
)
from tbrm_theory.registry import (
    FAMILIES,
    Count,
    Family,
    Interval,
    Share,
    Temperature,
    expected_one_of,
    family,
)
from tbrm_theory.transitions import DeterministicTransition, SparseTransition, Transition

__all__ = ["FAMILIES", "REGISTERED_ELSEWHERE", "Family", "make"]

REGISTERED_ELSEWHERE = (random_families, gymnasium_import, verifiable_tasks)
"""Importing these modules adds their families to :data:`FAMILIES`."""

_LARGEST_TREE = 10_000_000  # pairs of state and action


def make(name: str, *, seed: int = 0, **options: Any) -> RegularizedMDP:
    """An instance of the family ``name``; ``FAMILIES[name].options`` lists its options and their defaults.

    Raises:
        InvalidInputError: an unknown family or option, with the valid ones, or a value that the option
            does not take.
    """
    if name not in FAMILIES:
        raise InvalidInputError("family", expected_one_of("family", str(name), FAMILIES))
    return FAMILIES[name].make(seed, options)


# -- by hand -------------------------------------------------------------------------------------------------


@family("two-armed-bandit", deterministic=True)
def two_armed_bandit(
    seed: int, *, advantage: float = 10.0, folded: bool = True, beta: Temperature = 1.0
) -> RegularizedMDP:
    """One decision between two arms (X5): R_β = (advantage, 0), or r/β with ``folded=False``.

    The reference is uniform, and nothing is random.
    """
    reference = torch.full((1, 2), 0.5, dtype=torch.float64)
    scaled = torch.tensor([[advantage, 0.0]], dtype=torch.float64)
    reward = beta * (scaled - reference.log() if folded else scaled)
    return RegularizedMDP(beta=beta, initial=torch.ones(1), reward=[reward], reference=[reference], transitions=[])


@family("chain", deterministic=True)
def chain(
    seed: int,
    *,
    horizon: Count = 8,
    states: Annotated[int, Interval(2)] = 5,
    slip: Share = 0.0,
    beta: Temperature = 0.2,
    reference: ReferenceKind = "uniform",
) -> RegularizedMDP:
    """A walk left or right: 1 for every step right at the far end, 0.1 for every step left at the start.

    Positions merge. With probability ``slip`` a step goes the other way; the reward is that of the action.
    """
    position = torch.arange(states)
    moved = torch.stack([position - 1, position + 1], dim=-1).clamp(0, states - 1)
    reward = torch.zeros(states, 2, dtype=torch.float64)
    reward[0, 0], reward[-1, 1] = 0.1, 1.0
    kernel: Transition = DeterministicTransition(moved, states)
    if slip > 0:
        probability = torch.tensor([1 - slip, slip], dtype=torch.float64).expand(states, 2, 2)
        kernel = SparseTransition(torch.stack([moved, moved.flip(-1)], dim=-1), probability, states)
    policy = draw_reference(reference, torch.ones(states, 2, dtype=torch.bool), seeded(seed))
    return RegularizedMDP(
        beta=beta,
        initial=(position == 0).double(),  # the start is the left end
        reward=[reward] * horizon,
        reference=[policy] * horizon,
        transitions=[kernel] * (horizon - 1),
    )


@family("combination-lock", deterministic=True)
def combination_lock(
    seed: int,
    *,
    horizon: Count = 5,
    actions: Annotated[int, Interval(2)] = 2,
    scrambled: bool = False,
    beta: Temperature = 0.2,
    reference: ReferenceKind = "uniform",
) -> RegularizedMDP:
    """One right action in every step, 1 for the whole combination, no way back (X4).

    State 0 is still right, and the start; state 1 is wrong for ever. Action 0 is the right one, or, when
    ``scrambled``, one drawn for each layer.
    """
    generator = seeded(seed)
    combination = [0] * horizon
    if scrambled:
        combination = torch.randint(actions, (horizon,), generator=generator).tolist()
    wrong = 1 - torch.eye(actions, dtype=torch.int64)  # a row for each right action
    kernels = [DeterministicTransition(torch.stack([row, torch.ones_like(row)]), 2) for row in wrong]
    policy = draw_reference(reference, torch.ones(2, actions, dtype=torch.bool), generator)
    nothing, opened = torch.zeros(2, 2, actions, dtype=torch.float64)
    opened[0, combination[-1]] = 1.0
    return RegularizedMDP(
        beta=beta,
        initial=torch.tensor([1.0, 0.0], dtype=torch.float64),
        reward=[nothing] * (horizon - 1) + [opened],
        reference=[policy] * horizon,
        transitions=[kernels[action] for action in combination[:-1]],
    )


# -- trees ---------------------------------------------------------------------------------------------------


@family("deterministic-tree", deterministic=True)
def deterministic_tree(
    seed: int,
    *,
    horizon: Count = 4,
    actions: Count = 3,
    roots: Count = 1,
    beta: Temperature = 0.2,
    reference: ReferenceKind = "uniform",
    missing: Share = 0.0,
) -> RegularizedMDP:
    """Every action leads to a state of its own, so paths never merge; rewards are uniform on [0, 1].

    With ``missing`` the branches differ in number: a state for each action that exists, and no other.
    """
    generator = seeded(seed)
    exists = [draw_existing((roots, actions), missing, generator)]
    while len(exists) < horizon:
        branches = int(exists[-1].sum())
        _check_tree("deterministic-tree", branches * actions)
        exists.append(draw_existing((branches, actions), missing, generator))
    return RegularizedMDP(
        beta=beta,
        initial=draw_simplex((roots,), generator),
        reward=[torch.rand(table.shape, generator=generator, dtype=torch.float64) for table in exists],
        reference=[draw_reference(reference, table, generator) for table in exists],
        transitions=[_branch(table) for table in exists[:-1]],
    )


@family("token-tree", deterministic=True)
def token_tree(
    seed: int,
    *,
    horizon: Count = 5,
    vocabulary: Count = 4,
    prompts: Count = 1,
    rewards: Literal["outcome", "step"] = "outcome",
    correct: Annotated[float, Interval(0, 1, without_low=True)] = 0.1,
    beta: Temperature = 0.5,
    reference: ReferenceKind = "uniform",
) -> RegularizedMDP:
    """Responses of fixed length, a state for each prompt and prefix; 1 at the end of some, or random steps.

    Of each prompt's responses a share ``correct``, rounded up, is correct: ``rewards="outcome"`` gives 1 for the
    last token of these, ``"step"`` instead gives every token a reward uniform on [0, 1].
    """
    generator = seeded(seed)
    shapes = [(prompts * vocabulary**h, vocabulary) for h in range(horizon)]
    _check_tree("token-tree", prompts * vocabulary**horizon)
    exists = [torch.ones(shape, dtype=torch.bool) for shape in shapes]
    if rewards == "step":
        reward = [torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    else:
        order = torch.rand(prompts, vocabulary**horizon, generator=generator).argsort(-1)
        outcome = (order < math.ceil(correct * order.shape[-1])).double()
        reward = [*(torch.zeros(shape) for shape in shapes[:-1]), outcome.reshape(shapes[-1])]
    return RegularizedMDP(
        beta=beta,
        initial=torch.full((prompts,), 1 / prompts, dtype=torch.float64),
        reward=reward,
        reference=[draw_reference(reference, table, generator) for table in exists],
        transitions=[_branch(table) for table in exists[:-1]],
    )


def _branch(exists: Tensor) -> DeterministicTransition:
    """A state of the next layer for each existing action, in the order of ``(s, a)``."""
    child = exists.flatten().cumsum(0).reshape(exists.shape) - 1
    return DeterministicTransition(torch.where(exists, child, 0), int(exists.sum()))


def _check_tree(name: str, pairs: int) -> None:
    if pairs > _LARGEST_TREE:
        raise InvalidInputError(f"{name}.horizon", f"expected a tree of at most {_LARGEST_TREE} pairs, found {pairs}")
