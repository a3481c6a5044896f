"""Exact checks of Trajectory Bellman Residual Minimization, and training with the very loss that was checked."""

from __future__ import annotations

from tbrm_theory.dynamic_programming import evaluate, objective, regret, solve
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP

__all__ = ["InvalidInputError", "RegularizedMDP", "evaluate", "objective", "regret", "solve"]
