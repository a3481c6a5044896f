"""A problem with all its layers in one table, for training hundreds of settings at once.

A cell is a pair of layer and state that occurs; layers lie one below the other, and states with fewer actions than others are padded
with actions that do not exist. One row of logits is then one tensor ``(cells, actions)``, and an update costs the same handful of
operations at any horizon. ``sampling`` and ``scores`` do the same one layer at a time, for problems of any size, and judge this module
in its tests.

Trajectories come from uniform numbers that the caller draws: settings that are given the same ones are compared on the same luck,
and a setting does not know which others are trained beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from tbrm_theory.endings import finished
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.occupancy import occupancy
from tbrm_theory.shapes import PerLayerStateAction

__all__ = ["Cells", "LaidOut", "Rollouts", "lay_out", "read"]

Cells = Float[Tensor, "... cells actions"]


@dataclass(frozen=True, eq=False)
class Rollouts:
    """``N`` trajectories of ``H`` steps for each batch element."""

    cell: Int64[Tensor, "... trajectories steps"]
    pair: Int64[Tensor, "... trajectories steps"]
    """``cell · actions + action``, the position in a flattened table."""
    mask: Bool[Tensor, "... trajectories steps"]

    @property
    def first(self) -> Int64[Tensor, "... trajectories"]:
        """The first state."""
        return self.cell[..., 0]


@dataclass(frozen=True, eq=False)
class LaidOut:
    """The tables of one problem; :func:`lay_out` makes them."""

    mdp: RegularizedMDP
    states: tuple[Int64[Tensor, " _"], ...]
    """For each layer, the states that occur."""
    initial: Float[Tensor, " first_states"]
    log_reference: Cells
    """``-inf`` where there is no action."""
    reward: Cells
    successor: Int64[Tensor, "pairs successors"]
    """Cells of the next layer."""
    cumulative: Float[Tensor, "pairs successors"]
    """For the choice among the successors, as :func:`_cumulative` has it."""
    finished: Bool[Tensor, " cells"]
    """Whether all that follows is forced and rewardless, so that its steps are padding."""

    @property
    def horizon(self) -> int:
        return len(self.states)

    @property
    def draws(self) -> int:
        """How many uniform numbers a step takes: one for the action, one for the successor where it is random."""
        return 1 if self.successor.shape[-1] == 1 else 2

    def per_layer(self, cells: Cells) -> PerLayerStateAction:
        """The table of each layer, ``(…, S_h, A_h)``, with that of ``log π_ref`` in states that never occur."""
        tables = []
        for part, states, log_reference in zip(
            cells.split([len(states) for states in self.states], dim=-2),
            self.states,
            self.mdp.log_reference,
            strict=True,
        ):
            table = log_reference.repeat(*cells.shape[:-2], 1, 1)
            table[..., states, :] = part[..., : table.shape[-1]]
            tables.append(table)
        return tuple(tables)

    def first_states(self, uniform: Float[Tensor, "... prompts"]) -> Int64[Tensor, "... prompts"]:
        """The first state that each uniform number stands for, by the law ``ρ``."""
        return torch.searchsorted(_cumulative(self.initial), uniform, right=True)

    def roll_out(
        self,
        log_policy: Cells,
        first: Int64[Tensor, "... trajectories"],
        uniform: Float[Tensor, "... trajectories steps draws"],
    ) -> Rollouts:
        """A trajectory of ``π`` from each first state; batch dimensions broadcast, and no gradient flows through.

        Args:
            uniform: what decides the action, and the successor where it is random, of every step.
        """
        cumulative = _cumulative(log_policy.detach().exp())
        actions = cumulative.shape[-1]
        batch = np.broadcast_shapes(cumulative.shape[:-2], first.shape[:-1], uniform.shape[:-3])  # torch's is slow
        cumulative = cumulative.expand(*batch, *cumulative.shape[-2:])
        cell = first.expand(*batch, first.shape[-1])
        cells, pairs = [], []
        for h in range(self.horizon):
            law = cumulative.gather(-2, cell.unsqueeze(-1).expand(*cell.shape, actions))
            pair = cell * actions + _choose(law, uniform[..., h, 0])
            cells.append(cell)
            pairs.append(pair)
            if h == self.horizon - 1:
                break
            if self.draws == 1:
                cell = self.successor.take(pair)
            else:
                choice = _choose(self.cumulative[pair], uniform[..., h, 1])
                cell = self.successor.take(pair * self.successor.shape[-1] + choice)
        visited = torch.stack(cells, dim=-1)
        mask = ~self.finished[visited]
        mask[..., 0] = True  # V(s_1) counts even where the action is forced
        return Rollouts(visited, torch.stack(pairs, dim=-1), mask)

    def trajectory_return(self, rollouts: Rollouts) -> Float[Tensor, "... trajectories"]:
        """``r(τ)`` in reward units; padding has reward 0."""
        return self.reward.take(rollouts.pair).sum(-1)


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
    occurs = [mass > 0 for mass in occupancy(mdp, mdp.log_reference).state]
    states = tuple(table.nonzero().squeeze(-1) for table in occurs)
    widest = max(table.shape[-1] for table in mdp.reference)
    edges = [kernel.edges() for kernel in mdp.transitions]
    branches = max((probability.shape[-1] for _, probability in edges), default=1)
    shape = (sum(len(layer) for layer in states), widest, branches)
    law = mdp.initial.new_zeros(shape)
    successor = torch.zeros_like(law, dtype=torch.int64)
    law[..., 0] = 1.0  # where nothing follows
    start = 0
    for h, (next_state, probability) in enumerate(edges):
        here, there = slice(start, start + len(states[h])), start + len(states[h])
        position = there + occurs[h + 1].cumsum(0) - 1  # of a state that occurs, among the cells
        part = (here, slice(next_state.shape[-2]), slice(next_state.shape[-1]))
        successor[part] = position[next_state[states[h]]].clamp(min=there)
        law[part] = probability[states[h]]
        start = there

    def stacked(tables: Sequence[Tensor], empty: float) -> Tensor:
        kept = [table[layer] for table, layer in zip(tables, states, strict=True)]
        return torch.cat([torch.nn.functional.pad(t, (0, widest - t.shape[-1]), value=empty) for t in kept])

    log_reference = stacked(mdp.log_reference, -torch.inf)
    return LaidOut(
        mdp=mdp,
        states=states,
        initial=mdp.initial[states[0]],
        log_reference=log_reference,
        reward=torch.where(log_reference > -torch.inf, stacked(mdp.reward, 0.0), 0.0),
        successor=successor.flatten(0, 1),
        cumulative=_cumulative(law.flatten(0, 1)),
        finished=torch.cat([table[layer] for table, layer in zip(finished(mdp), states, strict=True)]),
    )


def _cumulative(probability: Float[Tensor, "*rows outcomes"]) -> Float[Tensor, "*rows outcomes"]:
    """Cumulative probabilities in which the first that exceeds a number below 1 is never that of an outcome of probability 0.

    Adding a probability of 0 leaves the sum exactly as it is, so such an outcome is passed over. The whole sum, which rounding may
    leave below 1, becomes infinite, wherever it is reached: at the last outcome that added something.
    """
    sums = probability.cumsum(-1)
    return sums.masked_fill_(sums == sums[..., -1:], torch.inf)


def _choose(law: Float[Tensor, "*draws outcomes"], uniform: Float[Tensor, "*rows"]) -> Int64[Tensor, "*draws"]:
    """The outcome that each number stands for."""
    numbers = uniform.unsqueeze(-1).expand(*law.shape[:-1], 1).contiguous()
    return torch.searchsorted(law, numbers, right=True).squeeze(-1)
