"""Right-hand sides of the regret bounds of theory.md §2, in reward units."""

from __future__ import annotations

import torch

from tbrm_theory.dynamic_programming import Solution, admissible_logits, bellman_operator, soft_policy, solve
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.occupancy import occupancy
from tbrm_theory.shapes import PerLayerStateAction, Scalars

__all__ = ["corollary4"]


def corollary4(mdp: RegularizedMDP, logits: PerLayerStateAction, *, solution: Solution | None = None) -> Scalars:
    """``β{ E_{π*} Σ_h (T_β Q_θ - Q_θ) + E_{π_θ} Σ_h (Q_θ - T_β Q_θ) }`` ([Y] Cor. 4; theory.md B4), ``(…)``.

    At least ``J_β(π*) - J_β(π_θ)``, whatever the transitions; the slack is ``β KL(P_{π*} ‖ P_{π_θ})``.

    Args:
        logits: ``Q_θ``, one table for each layer; those of non-existent actions are ignored.
        solution: ``solve(mdp)``, when the caller has it already.

    Raises:
        InvalidInputError: wrong number of layers or shape, or a logit of an existing action not finite.
    """
    q = admissible_logits(mdp, logits)
    optimal = occupancy(mdp, (solution or solve(mdp)).log_policy).state_action
    softmax = occupancy(mdp, tuple(soft_policy(table) for table in q)).state_action
    layers = []
    for valid, backed_up, own, star, theta in zip(
        mdp.valid, bellman_operator(mdp, q), q, optimal, softmax, strict=True
    ):
        gap = torch.where(valid, backed_up, 0.0) - torch.where(valid, own, 0.0)
        layers.append((star * gap).sum((-2, -1)) - (theta * gap).sum((-2, -1)))
    return mdp.beta * torch.stack(torch.broadcast_tensors(*layers)).sum(0)
