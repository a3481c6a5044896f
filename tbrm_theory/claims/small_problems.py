"""Problems small enough to list all pairs of their trajectories, for the claims about groups of responses.

Half of them have stochastic transitions; layers are ragged and actions missing in some; the temperature is moderate in most and
extreme, down to 1e-6 and up to 1000 in units of the rewards, in the others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tbrm_theory.behaviours import Components
from tbrm_theory.claims.cases import DRAWS, Case, case_of
from tbrm_theory.expected_updates import ExpectedUpdate
from tbrm_theory.families import make
from tbrm_theory.random_tables import seeded
from tbrm_theory.shapes import PerLayerStateAction

__all__ = [
    "MOST_PAIRS",
    "PROBLEMS",
    "any_problem",
    "certain_problem",
    "data_of",
    "draw_of",
    "few_pairs",
    "noisy_problem",
    "rows_of",
    "update_of",
]

MOST_PAIRS = 700
PROBLEMS = 36
"""How many of them a claim is tried on: each has the expected gradients of a loss or two."""
_CERTAIN: tuple[tuple[str, dict[str, Any]], ...] = (
    ("deterministic-dag", {"horizon": 3, "states": 2, "actions": 2, "reference": "dirichlet"}),
    ("token-tree", {"horizon": 2, "vocabulary": 3, "prompts": 2, "rewards": "step", "reference": "dirichlet"}),
    ("deterministic-tree", {"horizon": 3, "actions": 2, "roots": 2, "missing": 0.3}),
    ("one-state", {"horizon": 3, "actions": 2, "reference": "dirichlet"}),
    ("token-tree", {"horizon": 3, "vocabulary": 2, "prompts": 2, "rewards": "outcome"}),
)
_NOISY: tuple[tuple[str, dict[str, Any]], ...] = (
    ("dense-random", {"horizon": 2, "states": 2, "actions": 2, "reference": "dirichlet"}),
    ("garnet", {"horizon": 2, "states": 3, "actions": 2, "branching": 2}),
    ("dense-random", {"horizon": 2, "states": 2, "actions": 3, "missing": 0.3, "reference": "dirichlet"}),
)
_EXTREME = (1e-6, 1e-3, 1e3)


def few_pairs(case: Case) -> str | None:
    """Pairs of trajectories from one first state."""
    pairs = int(case.listed.states[:, 0].bincount().square().sum())
    return None if pairs <= MOST_PAIRS else f"more than {MOST_PAIRS} pairs of trajectories"


def certain_problem(seed: int) -> Case:
    """Deterministic transitions."""
    return _small(_CERTAIN, seed)


def noisy_problem(seed: int) -> Case:
    """Stochastic transitions."""
    return _small(_NOISY, seed)


def any_problem(seed: int) -> Case:
    """Either, by turns."""
    return noisy_problem(seed) if seed % 2 else certain_problem(seed)


def _small(choices: tuple[tuple[str, dict[str, Any]], ...], seed: int) -> Case:
    turn = seed // 2
    name, options = choices[turn % len(choices)]
    spread = torch.rand((), generator=seeded(seed), dtype=torch.float64).item()
    beta = _EXTREME[turn // 4 % len(_EXTREME)] if turn % 4 == 3 else 0.1 * 30**spread
    return case_of(make(name, seed=seed, beta=beta, **options), name, seed)


def draw_of(case: Case, tables: PerLayerStateAction) -> PerLayerStateAction:
    """One of the case's draws of these tables, by turns."""
    return tuple(table[case.seed // 7 % DRAWS] for table in tables)


def data_of(case: Case) -> PerLayerStateAction:
    """``log μ`` of Markov data with full support, one of the two draws."""
    return draw_of(case, case.log_behaviour)


def update_of(case: Case, loss: str, data: Components | None, **settings: Any) -> ExpectedUpdate:
    """On the trajectories that the case has listed."""
    return ExpectedUpdate(case.mdp, loss, data, listed=case.listed, **settings)


def rows_of(update: ExpectedUpdate, case: Case) -> Tensor:
    """The case's logits, both draws, with 0 for what else the loss learns."""
    nothing = tuple(torch.zeros_like(table[..., 0]) for table in case.mdp.reference)
    return torch.stack([update.row(tuple(table[i] for table in case.logits), nothing) for i in range(DRAWS)])
