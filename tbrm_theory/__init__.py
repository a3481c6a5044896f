"""Exact checks of Trajectory Bellman Residual Minimization, and training with the very loss that was checked."""

from __future__ import annotations

from typing import Any

from tbrm_theory.coverage import change_of_measure
from tbrm_theory.dynamic_programming import evaluate, objective, regret, solve
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.losses import TrajectoryScores, tbrm_loss, tbrm_residual
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.population import population_loss

__all__ = [
    "InvalidInputError",
    "RegularizedMDP",
    "TrajectoryScores",
    "change_of_measure",
    "evaluate",
    "make",
    "objective",
    "population_loss",
    "regret",
    "solve",
    "tbrm_loss",
    "tbrm_residual",
]


def make(name: str, *, seed: int = 0, **options: Any) -> RegularizedMDP:
    """An instance of a named family (``tbrm families`` lists them); see :func:`tbrm_theory.families.make`."""
    from tbrm_theory import families  # imports gymnasium, which nothing else needs

    return families.make(name, seed=seed, **options)
