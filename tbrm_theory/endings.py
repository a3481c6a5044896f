"""Where a response is over: states from which everything is forced and rewardless (theory.md §0, responses of different length).

Such a state has one action, of reward 0, with one successor, and so on to the last layer; the absorbing state after an
end-of-sequence token is one. The steps from there add nothing to a trajectory's residual, since ``log π = log π_ref = 0`` and
``r = 0``, and they are the same whoever acts. So they can be masked, and left out of a file and filled in again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.tables import per_distinct_layer
from tbrm_theory.transitions import DeterministicTransition, Transition

__all__ = ["Endings", "endings", "finished"]


@dataclass(frozen=True, eq=False)
class Endings:
    """Where everything that follows is forced and rewardless, and what it then is; one table for each layer."""

    state: tuple[Bool[Tensor, " _"], ...]
    """Whether all is forced and rewardless from ``s`` on, the action there included."""
    pair: tuple[Bool[Tensor, "_ _"], ...]
    """Whether it is so from the successor of ``(s, a)`` on, which is then unique. True throughout the last layer."""
    action: tuple[Int[Tensor, " _"], ...]
    """The only action of ``s``, where ``state`` holds."""
    successor: tuple[Int[Tensor, "_ _"], ...]
    """The only successor of ``(s, a)``, where ``pair`` holds; one table fewer than there are layers."""


def finished(mdp: RegularizedMDP) -> tuple[Bool[Tensor, " _"], ...]:
    """Whether the response is over in ``s``, one table ``(S_h,)`` for each layer.

    Raises:
        InvalidInputError: the problem has batch dimensions.
    """
    return endings(mdp).state


def endings(mdp: RegularizedMDP) -> Endings:
    """The end of every response, by one backward sweep over the layers.

    Raises:
        InvalidInputError: the problem has batch dimensions.
    """
    if mdp.batch_shape:
        raise InvalidInputError("mdp", f"expected one problem, found a batch of shape {tuple(mdp.batch_shape)}")
    quiet = per_distinct_layer(_one_rewardless_action, mdp.valid, mdp.reward)
    action = per_distinct_layer(lambda valid: valid.to(torch.int8).argmax(-1), mdp.valid)
    successor = per_distinct_layer(_only_successor, mdp.transitions)
    pair = [torch.ones_like(mdp.valid[-1])]
    state = [quiet[-1]]
    for h in range(mdp.horizon - 2, -1, -1):
        only = successor[h]
        pair.append((only >= 0) & state[-1][only.clamp(min=0)])
        state.append(quiet[h] & pair[-1].gather(-1, action[h].unsqueeze(-1)).squeeze(-1))
    return Endings(tuple(reversed(state)), tuple(reversed(pair)), action, successor)


def _one_rewardless_action(valid: Tensor, reward: Tensor) -> Tensor:
    return (valid.sum(-1) == 1) & ~(valid & (reward != 0)).any(-1)


def _only_successor(kernel: Transition) -> Tensor:
    if isinstance(kernel, DeterministicTransition):
        return kernel.next_state
    next_state, probability = kernel.edges()
    lowest = torch.where(probability > 0, next_state, kernel.shape[-1]).amin(-1)
    highest = torch.where(probability > 0, next_state, -1).amax(-1)
    return torch.where(lowest == highest, highest, -1)
