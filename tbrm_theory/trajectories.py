"""Batches of trajectories: what they are, whether a problem can produce them, and drawing them from a policy.

A batch holds the indices of the states and actions of ``N`` trajectories of ``H`` steps, with leading batch dimensions ``…``
(independent seeds). ``mask`` is True while the response goes on. Padding begins with the first state, after the first step,
from which everything is forced and rewardless (``endings``); padded steps hold the states and actions that follow from there, so
every index is valid. The first step is never padding, since ``V(s_1)`` counts even where the action is forced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.feasibility import check_horizon, first_problem
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.sampling import PolicyDraw, check_draw, policy_batch, roll_out
from tbrm_theory.shapes import PerLayerStateAction
from tbrm_theory.tables import check_finite

__all__ = [
    "Dataset",
    "TrajectoryBatch",
    "check_trajectories",
    "concatenate",
    "sample_trajectories",
    "trajectory_return",
]


@dataclass(frozen=True, eq=False)
class TrajectoryBatch:
    """``N`` trajectories of ``H`` steps; :func:`check_trajectories` says whether a problem can produce them.

    Raises:
        InvalidInputError: no trajectories or steps, other than integer indices and a boolean mask, or unequal shapes.
    """

    states: Int64[Tensor, "... trajectories steps"]
    actions: Int64[Tensor, "... trajectories steps"]
    mask: Bool[Tensor, "... trajectories steps"]
    """False on padding, which only follows the end of a response."""

    def __post_init__(self) -> None:
        for name, dtype in (("states", torch.int64), ("actions", torch.int64), ("mask", torch.bool)):
            table = getattr(self, name)
            if table.dtype != dtype:
                raise InvalidInputError(f"trajectories.{name}", f"expected {dtype}, found {table.dtype}")
            if table.dim() < 2 or 0 in table.shape:
                expected = "expected shape (…, trajectories, steps), none of them 0"
                raise InvalidInputError(f"trajectories.{name}", f"{expected}, found {tuple(table.shape)}")
            if table.shape != self.states.shape:
                expected = f"expected the shape of states, {tuple(self.states.shape)}"
                raise InvalidInputError(f"trajectories.{name}", f"{expected}, found {tuple(table.shape)}")

    @property
    def count(self) -> int:
        """``N``, the number of trajectories of each batch element."""
        return self.states.shape[-2]

    @property
    def horizon(self) -> int:
        return self.states.shape[-1]

    def rows(self, index: Tensor | slice) -> TrajectoryBatch:
        """The trajectories at ``index`` (positions, with repetitions if any; a mask; or a slice) of every batch element."""
        return TrajectoryBatch(self.states[..., index, :], self.actions[..., index, :], self.mask[..., index, :])

    def to(self, device: torch.device | str) -> TrajectoryBatch:
        return TrajectoryBatch(self.states.to(device), self.actions.to(device), self.mask.to(device))


def concatenate(batches: Sequence[TrajectoryBatch]) -> TrajectoryBatch:
    """All trajectories one after another; batch dimensions must be equal.

    Raises:
        InvalidInputError: nothing to concatenate, or batches of another horizon or batch shape.
    """
    if not batches:
        raise InvalidInputError("batches", "expected at least one batch of trajectories")
    for i, batch in enumerate(batches):
        if (*batch.states.shape[:-2], batch.horizon) != (*batches[0].states.shape[:-2], batches[0].horizon):
            expected = f"expected the batch shape and horizon of the first, {tuple(batches[0].states.shape)}"
            raise InvalidInputError(f"batches[{i}]", f"{expected}, found {tuple(batch.states.shape)}")
    columns = [
        [batch.states for batch in batches],
        [batch.actions for batch in batches],
        [b.mask for b in batches],
    ]
    return TrajectoryBatch(*(torch.cat(column, dim=-2) for column in columns))


@dataclass(frozen=True, eq=False)
class Dataset:
    """Trajectories with their returns as observed, in reward units; noisy ones need not be the sum of the rewards.

    Raises:
        InvalidInputError: another number of returns than of trajectories, or one that is not a finite number.
    """

    batch: TrajectoryBatch
    trajectory_return: Float[Tensor, "... trajectories"]

    def __post_init__(self) -> None:
        expected, found = self.batch.states.shape[:-1], self.trajectory_return.shape
        if expected != found:
            raise InvalidInputError("trajectory_return", f"expected shape {tuple(expected)}, found {tuple(found)}")
        check_finite(self.trajectory_return, "trajectory_return")

    def rows(self, index: Tensor | slice) -> Dataset:
        """The trajectories at ``index`` with their returns."""
        return Dataset(self.batch.rows(index), self.trajectory_return[..., index])


# -- against a problem ---------------------------------------------------------------------------------------------


def trajectory_return(mdp: RegularizedMDP, batch: TrajectoryBatch) -> Float[Tensor, "... trajectories"]:
    """``r(τ) = Σ_h r_h(s_h,a_h)`` over unmasked steps, in reward units, ``(…, N)``.

    Raises:
        InvalidInputError: a batch of problems, or trajectories of another horizon.
    """
    check_horizon(mdp, batch.horizon)
    total = torch.zeros(batch.states.shape[:-1], dtype=torch.float64, device=batch.states.device)
    for h, reward in enumerate(mdp.reward):
        taken = reward[batch.states[..., h], batch.actions[..., h]]
        total += torch.where(batch.mask[..., h], taken, 0.0)
    return total


def check_trajectories(mdp: RegularizedMDP, batch: TrajectoryBatch) -> None:
    """Refuse trajectories that the problem cannot produce, and padding before the end of a response.

    Raises:
        InvalidInputError: names the trajectory and the step, ``trajectories[3].actions[2]``, and what was expected there.
    """
    problem = first_problem(mdp, batch.states, batch.actions, batch.mask)
    if problem is not None:
        position = "".join(f"[{i}]" for i in problem.trajectory)
        raise InvalidInputError(f"trajectories{position}.{problem.field}[{problem.step}]", problem.text)


# -- drawing -------------------------------------------------------------------------------------------------------


def sample_trajectories(
    mdp: RegularizedMDP, log_policy: PerLayerStateAction, count: int, generator: torch.Generator
) -> TrajectoryBatch:
    """``count`` trajectories of ``π`` for each batch element of ``log_policy``, ``(…, N, H)``; no gradient flows through.

    Raises:
        InvalidInputError: a batch of problems, ``count`` below 1, a generator of another device than the problem's, a malformed
            policy, or one that takes non-existent actions.
    """
    check_draw(mdp, count, generator)
    batch = policy_batch([log_policy])
    choose = PolicyDraw(mdp, [log_policy], batch, count, generator)
    return TrajectoryBatch(*roll_out(mdp, batch, count, choose, generator))
