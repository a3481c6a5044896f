"""Trajectory scores of no model: unrelated random numbers in every field, and ways to change them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from tbrm_theory.losses import TrajectoryScores
from tests.plain_losses import Row

STEP_FIELDS = (
    "log_policy",
    "log_reference",
    "value",
    "reward",
    "behaviour_log_policy",
    "critic",
    "frozen_value",
    "entropy",
)
TRAJECTORY_FIELDS = (
    "initial_value",
    "trajectory_return",
    "first_logit",
    "reference_initial_value",
    "frozen_initial_value",
    "log_partition",
    "baseline",
)
FLOAT_FIELDS = STEP_FIELDS + TRAJECTORY_FIELDS
REQUIRED = ("log_policy", "log_reference", "mask", "initial_value", "trajectory_return")


def draw_scores(
    *, batch: tuple[int, ...] = (), trajectories: int = 5, steps: int = 4, seed: int = 0, spread: float = 1.0
) -> TrajectoryScores:
    """Normal numbers of standard deviation ``spread``; trajectories of all lengths from 1 to ``steps``."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return spread * torch.randn(*batch, *shape, generator=generator, dtype=torch.float64)

    lengths = torch.arange(trajectories) % steps + 1
    mask = (torch.arange(steps) < lengths.unsqueeze(-1)).expand(*batch, trajectories, steps)
    return TrajectoryScores(
        mask=mask,
        **{name: draw(trajectories, steps) for name in STEP_FIELDS},
        **{name: draw(trajectories) for name in TRAJECTORY_FIELDS},
    )


def changed(scores: TrajectoryScores, change: Callable[[str, Tensor], Tensor]) -> TrajectoryScores:
    """Every field, the mask included, put through ``change(name, table)``."""
    return dataclasses.replace(scores, **{name: change(name, table) for name, table in scores.given().items()})


def without(scores: TrajectoryScores, *names: str) -> TrajectoryScores:
    return TrajectoryScores(**{name: table for name, table in scores.given().items() if name not in names})


def picked(scores: TrajectoryScores, index: int | slice | Tensor) -> TrajectoryScores:
    """Some of the trajectories of a batch without leading dimensions."""
    rows = slice(index, index + 1) if isinstance(index, int) else index
    return changed(scores, lambda _, table: table[rows])


def filled(scores: TrajectoryScores, padding: float) -> TrajectoryScores:
    """The same number on all padding, of every field that has any."""
    return changed(
        scores, lambda field, table: torch.where(scores.mask, table, padding) if field in STEP_FIELDS else table
    )


def plain_rows(scores: TrajectoryScores) -> list[Row]:
    """One dictionary of lists and numbers for each trajectory, masked steps left out."""
    rows: list[Row] = []
    for i, length in enumerate(scores.mask.sum(-1).tolist()):
        row: Row = {field: getattr(scores, field)[i].tolist()[:length] for field in STEP_FIELDS}
        rows.append(row | {field: getattr(scores, field)[i].item() for field in TRAJECTORY_FIELDS})
    return rows


def with_gradients(
    function: Callable[[TrajectoryScores], Tensor], scores: TrajectoryScores
) -> tuple[Tensor, dict[str, Tensor]]:
    """The value of ``function``, and the gradient of its sum in every score; zeros where there is none."""
    leaves = {field: getattr(scores, field).clone().requires_grad_() for field in FLOAT_FIELDS}
    value = function(dataclasses.replace(scores, **leaves))
    found = torch.autograd.grad(value.sum(), list(leaves.values()), allow_unused=True)
    gradients = {
        field: torch.zeros_like(leaf) if gradient is None else gradient
        for (field, leaf), gradient in zip(leaves.items(), found, strict=True)
    }
    return value.detach(), gradients
