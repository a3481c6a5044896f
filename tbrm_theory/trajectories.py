"""Batches of trajectories, and sampling them.

A trajectory is ``(s_0, a_0, …, s_{H-1}, a_{H-1})`` as indices into the layers. ``mask`` is True while the response goes on.
Sampling inverts cumulative distributions, one layer at a time for all trajectories and seeds at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.shapes import PerLayerStateAction

__all__ = ["TrajectoryBatch", "sample_trajectories"]


@dataclass(frozen=True, eq=False)
class TrajectoryBatch:
    """``N`` trajectories of ``H`` steps, with leading batch dimensions for independent seeds."""

    states: Int[Tensor, "... trajectories steps"]
    actions: Int[Tensor, "... trajectories steps"]
    mask: Bool[Tensor, "... trajectories steps"]

    def __post_init__(self) -> None:
        if 0 in self.states.shape:
            raise InvalidInputError("trajectories", f"expected at least one, found shape {tuple(self.states.shape)}")
        for name, table in (("actions", self.actions), ("mask", self.mask)):
            if table.shape != self.states.shape:
                raise InvalidInputError(
                    f"trajectories.{name}",
                    f"expected the shape of states, {tuple(self.states.shape)}, found {tuple(table.shape)}",
                )


def sample_trajectories(
    mdp: RegularizedMDP, log_policy: PerLayerStateAction, count: int, generator: torch.Generator
) -> TrajectoryBatch:
    """Draw ``count`` trajectories of a policy, for each leading batch element of the policy.

    Raises:
        InvalidInputError: ``count`` below 1, or a problem with batch dimensions.
    """
    if count < 1:
        raise InvalidInputError("count", f"expected at least 1, found {count}")
    if mdp.batch_shape:
        raise InvalidInputError("mdp", f"expected one problem, found a batch of shape {tuple(mdp.batch_shape)}")
    batch = torch.broadcast_shapes(*(table.shape[:-2] for table in log_policy))
    state = _draw(mdp.initial.expand(*batch, count, -1), generator)
    states, actions = [], []
    for h, log in enumerate(log_policy):
        probability = log.exp().expand(*batch, *log.shape[-2:])
        rows = state.unsqueeze(-1).expand(*state.shape, probability.shape[-1])
        action = _draw(probability.gather(-2, rows), generator)
        states.append(state)
        actions.append(action)
        if h < mdp.horizon - 1:
            target, weight = mdp.transitions[h].edges()
            successor = _draw(weight[state, action], generator) if weight.shape[-1] > 1 else torch.zeros_like(state)
            state = target[state, action].gather(-1, successor.unsqueeze(-1)).squeeze(-1)
    taken = torch.stack(actions, dim=-1)
    return TrajectoryBatch(torch.stack(states, dim=-1), taken, torch.ones_like(taken, dtype=torch.bool))


def _draw(probability: Float[Tensor, "*batch outcomes"], generator: torch.Generator) -> Int[Tensor, "*batch"]:
    """One outcome for each row; never one of probability 0, whatever the rounding of the cumulative sums."""
    cumulative = probability.cumsum(-1)
    uniform = torch.rand(
        probability.shape[:-1], generator=generator, dtype=torch.float64, device=probability.device
    ).unsqueeze(-1)
    # Scaled by its own total, the draw stays below the last step of the sum; an outcome of probability 0 is no step.
    return (cumulative <= uniform * cumulative[..., -1:]).sum(-1).clamp(max=probability.shape[-1] - 1)
