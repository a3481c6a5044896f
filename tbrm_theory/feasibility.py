"""Whether a problem can produce given trajectories: indices, first states, successors, existing actions, and padding.

All trajectories of a batch are checked at once, one step after another.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from jaxtyping import Bool, Int64
from torch import Tensor

from tbrm_theory.endings import finished
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.transitions import DenseTransition, DeterministicTransition, SparseTransition, Transition

__all__ = ["Problem", "check_horizon", "first_problem"]


class Problem(NamedTuple):
    """What is wrong with one step of one trajectory."""

    trajectory: tuple[int, ...]
    """Its position, batch dimensions first."""
    field: str
    """``states``, ``actions`` or ``mask``."""
    step: int
    text: str
    """What was expected there and what was found."""


def check_horizon(mdp: RegularizedMDP, steps: int) -> None:
    """Refuse a batch of problems, whose trajectories would not be comparable, and trajectories of another horizon.

    Raises:
        InvalidInputError: either of them.
    """
    if mdp.batch_shape:
        raise InvalidInputError("mdp", f"expected one problem, found a batch of shape {tuple(mdp.batch_shape)}")
    if steps != mdp.horizon:
        raise InvalidInputError("trajectories", f"expected {mdp.horizon} steps, found {steps}")


def first_problem(
    mdp: RegularizedMDP,
    states: Int64[Tensor, "... trajectories steps"],
    actions: Int64[Tensor, "... trajectories steps"],
    mask: Bool[Tensor, "... trajectories steps"],
) -> Problem | None:
    """Something wrong in the earliest step in which anything is, in the first trajectory there; None if all is well.

    Raises:
        InvalidInputError: a batch of problems, or trajectories of another horizon.
    """
    check_horizon(mdp, states.shape[-1])
    tables = {"states": states, "actions": actions, "mask": mask}
    for field, h, bad, expected in _checks(mdp, states, actions, mask):
        if bool(bad.any()):
            index = tuple(bad.nonzero()[0].tolist())
            return Problem(index, field, h, f"expected {expected}, found {tables[field][(*index, h)].item()}")
    return None


def _checks(
    mdp: RegularizedMDP, states: Tensor, actions: Tensor, mask: Tensor
) -> Iterator[tuple[str, int, Tensor, str]]:
    """Field, step, which trajectories are wrong, what was expected; each relies on those before it having passed."""
    over = finished(mdp)
    for h, valid in enumerate(mdp.valid):
        s, a, goes_on = states[..., h], actions[..., h], mask[..., h]
        sizes = valid.shape
        yield "states", h, (s < 0) | (s >= sizes[0]), f"a state of layer {h}, from 0 to {sizes[0] - 1}"
        if h == 0:
            yield "states", h, mdp.initial[s] == 0, "a first state of positive probability"
            yield "mask", h, ~goes_on, "True, since the first step is never padding"
        else:
            impossible = ~_possible(mdp.transitions[h - 1], states[..., h - 1], actions[..., h - 1], s)
            yield "states", h, impossible, "a possible successor of the step before"
            yield "mask", h, goes_on & ~mask[..., h - 1], "False, as in the step before"
            yield (
                "mask",
                h,
                ~goes_on & ~over[h][s],
                "True, since not all is forced and rewardless from here on",
            )
        yield "actions", h, (a < 0) | (a >= sizes[1]), f"an action of layer {h}, from 0 to {sizes[1] - 1}"
        yield (
            "actions",
            h,
            ~valid[s, a],
            "an action that exists in this state (reference probability above 0)",
        )


def _possible(kernel: Transition, state: Tensor, action: Tensor, next_state: Tensor) -> Tensor:
    """Whether ``P(s'|s,a) > 0``."""
    match kernel:
        case DeterministicTransition():
            return kernel.next_state[state, action] == next_state
        case SparseTransition():
            here = kernel.next_state[state, action] == next_state.unsqueeze(-1)
            return (here & (kernel.probability[state, action] > 0)).any(-1)
        case DenseTransition():
            return kernel.probability[state, action, next_state] > 0
