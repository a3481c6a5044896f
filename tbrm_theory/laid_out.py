"""A problem with all its layers in one table, for training hundreds of settings at once.

A cell is a pair of layer and state; layers lie one below the other, and states with fewer actions than others are padded with actions
that do not exist. One row of logits is then one tensor ``(cells, actions)``, and an update costs the same handful of operations at
any horizon. ``sampling`` and ``scores`` do the same one layer at a time, for problems of any size, and judge this module in its tests.

Trajectories come from uniform numbers that the caller draws: settings that are given the same ones are compared on the same luck, and a
setting does not know which others are trained beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from tbrm_theory.endings import finished
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.shapes import PerLayerStateAction

__all__ = ["Cells", "LaidOut", "Rollouts", "lay_out", "read"]

Cells = Float[Tensor, "... cells actions"]


@dataclass(frozen=True, eq=False)
class Rollouts:
    """``N`` trajectories of ``H`` steps for each batch element: the cell and the action of every step."""

    cell: Int64[Tensor, "... trajectories steps"]
    action: Int64[Tensor, "... trajectories steps"]
    mask: Bool[Tensor, "... trajectories steps"]

    @property
    def first(self) -> Int64[Tensor, "... trajectories"]:
        """The first state."""
        return self.cell[..., 0]


@dataclass(frozen=True, eq=False)
class LaidOut:
    """The tables of one problem; :func:`lay_out` makes them."""

    beta: float
    sizes: tuple[tuple[int, int], ...]
    """``(S_h, A_h)`` of every layer."""
    initial: Float[Tensor, " first_states"]
    log_reference: Cells
    """``-inf`` where there is no action."""
    reward: Cells
    successor: Int64[Tensor, "cells actions successors"]
    """Cells of the next layer; 0 throughout the last."""
    cumulative: Float[Tensor, "cells actions successors"]
    """How likely one of the successors up to this one is."""
    finished: Bool[Tensor, " cells"]
    """Whether all that follows is forced and rewardless, so that its steps are padding."""

    @property
    def horizon(self) -> int:
        return len(self.sizes)

    @property
    def draws(self) -> int:
        """How many uniform numbers a step takes: one for the action, one for the successor where it is random."""
        return 1 if self.successor.shape[-1] == 1 else 2

    def per_layer(self, cells: Cells) -> PerLayerStateAction:
        """The table of each layer, ``(…, S_h, A_h)``."""
        rows = cells.split([states for states, _ in self.sizes], dim=-2)
        return tuple(table[..., :actions] for table, (_, actions) in zip(rows, self.sizes, strict=True))

    def first_states(self, uniform: Float[Tensor, "... prompts"]) -> Int64[Tensor, "... prompts"]:
        """The first state that each uniform number stands for, by the law ``ρ``."""
        return _invert(self.initial.cumsum(-1), uniform)

    def roll_out(
        self,
        log_policy: Cells,
        first: Int64[Tensor, "... trajectories"],
        uniform: Float[Tensor, "... trajectories steps draws"],
    ) -> Rollouts:
        """A trajectory of ``π`` from each first state; batch dimensions broadcast, and no gradient flows through.

        Args:
            uniform: what decides the action, and the successor, of every step.
        """
        cumulative = log_policy.detach().exp().cumsum(-1)
        batch = torch.broadcast_shapes(cumulative.shape[:-2], first.shape[:-1], uniform.shape[:-3])
        cumulative = cumulative.expand(*batch, *cumulative.shape[-2:])
        cell = first.expand(*batch, first.shape[-1])
        cells, actions = [], []
        for h in range(self.horizon):
            rows = cumulative.gather(-2, cell.unsqueeze(-1).expand(*cell.shape, cumulative.shape[-1]))
            action = _invert(rows, uniform[..., h, 0])
            cells.append(cell)
            actions.append(action)
            if h < self.horizon - 1:
                if self.draws == 1:
                    cell = self.successor[cell, action, 0]
                else:
                    cell = self.successor[cell, action, _invert(self.cumulative[cell, action], uniform[..., h, 1])]
        visited = torch.stack(cells, dim=-1)
        mask = ~self.finished[visited]
        mask[..., 0] = True  # V(s_1) counts even where the action is forced
        return Rollouts(visited, torch.stack(actions, dim=-1), mask)

    def trajectory_return(self, rollouts: Rollouts) -> Float[Tensor, "... trajectories"]:
        """``r(τ)`` in reward units."""
        return torch.where(rollouts.mask, self.reward[rollouts.cell, rollouts.action], 0.0).sum(-1)


def read(
    cells: Float[Tensor, "... cells"], index: Int64[Tensor, "... trajectories steps"]
) -> Float[Tensor, "... trajectories steps"]:
    """``cells[…, index]`` with the same batch dimensions."""
    return cells.gather(-1, index.flatten(-2)).unflatten(-1, index.shape[-2:])


def lay_out(mdp: RegularizedMDP) -> LaidOut:
    """Lay all layers of one problem into one table.

    Raises:
        InvalidInputError: a batch of problems.
    """
    if mdp.batch_shape:
        raise InvalidInputError("mdp", f"expected one problem, found a batch of shape {tuple(mdp.batch_shape)}")
    sizes = tuple((table.shape[-2], table.shape[-1]) for table in mdp.reference)
    widest = max(actions for _, actions in sizes)
    edges = [kernel.edges() for kernel in mdp.transitions]
    branches = max((probability.shape[-1] for _, probability in edges), default=1)
    successor, cumulative, start = [], [], 0
    for h, (states, actions) in enumerate(sizes):
        start += states
        table = torch.zeros(states, widest, branches, dtype=torch.int64)
        law = torch.ones(states, widest, branches, dtype=torch.float64)
        if h < len(edges):
            next_state, probability = edges[h]
            table[:, :actions, : next_state.shape[-1]] = start + next_state
            law[:, :actions, : next_state.shape[-1]] = probability.cumsum(-1)
        successor.append(table)
        cumulative.append(law)

    def stacked(tables: PerLayerStateAction, empty: float) -> Tensor:
        padded = [torch.nn.functional.pad(t, (0, widest - t.shape[-1]), value=empty) for t in tables]
        return torch.cat(padded, dim=-2)

    return LaidOut(
        beta=float(mdp.beta),
        sizes=sizes,
        initial=mdp.initial,
        log_reference=stacked(mdp.log_reference, -torch.inf),
        reward=torch.where(stacked(mdp.log_reference, -torch.inf) > -torch.inf, stacked(mdp.reward, 0.0), 0.0),
        successor=torch.cat(successor),
        cumulative=torch.cat(cumulative),
        finished=torch.cat(finished(mdp)),
    )


def _invert(
    cumulative: Float[Tensor, "*rows outcomes"], uniform: Float[Tensor, "*draws"]
) -> Int64[Tensor, "*draws"]:
    """The first outcome whose cumulative probability exceeds the uniform number, never one of probability 0.

    Adding a probability of 0 leaves the sum exactly as it is, so such an outcome is passed over; a number beyond the last sum, which
    rounding may leave below 1, stands for the last outcome that added something.
    """
    total = cumulative[..., -1:]
    within = torch.minimum(uniform.unsqueeze(-1), torch.nextafter(total, torch.zeros_like(total)))
    return (cumulative <= within).sum(-1)
