"""Losses on groups of responses to one prompt, which need no value of it: differences of residuals, or a mean over the group.

``group_size`` consecutive trajectories share their first state. ``g_θ(τ) = log π_θ(τ)/π_ref(τ) - r(τ)/β`` (``reward_gap``).

Sources: theory.md §5, I6, I10; [Y] App. E; Richter et al., arXiv 2010.10436 (VarGrad); Kimi Team, arXiv 2501.12599; Azar et al.,
arXiv 2310.12036 (IPO); Rafailov et al., arXiv 2305.18290 (DPO).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from tbrm_theory.losses.trajectory_residuals import reward_gap, squared_loss, trajectory_log_ratio
from tbrm_theory.losses.trajectory_scores import TrajectoryResidual, TrajectoryScores, checked, grouped, temperature

__all__ = ["dpo_loss", "kimi_loss", "kimi_residual", "pairwise_loss", "vargrad_loss"]


def kimi_residual(scores: TrajectoryScores, *, beta: float | Tensor, group_size: int) -> TrajectoryResidual:
    """``log mean exp(r/β) + g_θ(τ)``, the mean over the group itself (Kimi k1.5, §2.3.2; [Y] App. E), ``(…, N)``.

    A group of one is refused: its mean is ``r/β``, the reward cancels and ``(log π_θ/π_ref)²`` is left.
    """
    scaled_return = grouped(scores.trajectory_return / temperature(beta, scores), group_size)
    value = scaled_return.logsumexp(-1, keepdim=True) - math.log(group_size)
    own = value.expand_as(scaled_return).flatten(-2)
    return checked(own + reward_gap(scores, beta=beta), scores)


def kimi_loss(scores: TrajectoryScores, *, beta: float | Tensor, group_size: int) -> Float[Tensor, "..."]:
    """``mean_τ (log mean exp(r/β) + g_θ(τ))²`` (Kimi k1.5, §2.3.2; [Y] App. E), ``(…)``."""
    return squared_loss(kimi_residual(scores, beta=beta, group_size=group_size))


def vargrad_loss(scores: TrajectoryScores, *, beta: float | Tensor, group_size: int) -> Float[Tensor, "..."]:
    """Mean over groups of ``Σ_i (g_i - ḡ)² / (n - 1)``: the log-variance divergence (Richter et al.; theory.md I6), ``(…)``."""
    gap = grouped(reward_gap(scores, beta=beta), group_size)
    return checked(gap.var(-1).mean(-1), scores, "loss")


def pairwise_loss(scores: TrajectoryScores, *, beta: float | Tensor, group_size: int) -> Float[Tensor, "..."]:
    """Mean over groups and pairs ``i < j`` of ``(g_i - g_j)²`` (IPO-like, [Y] App. E; theory.md I10), ``(…)``: 2 VarGrad."""
    gap = grouped(reward_gap(scores, beta=beta), group_size)
    one, other = _pairs(group_size, gap.device)
    return checked((gap[..., one] - gap[..., other]).square().mean((-1, -2)), scores, "loss")


def dpo_loss(scores: TrajectoryScores, *, beta: float | Tensor, group_size: int) -> Float[Tensor, "..."]:
    """Mean over groups and pairs ``i < j`` of ``-p log σ(d) - (1 - p) log σ(-d)``, ``(…)`` (Rafailov et al., Eq. 7).

    ``d = β [log π_θ(τ_i)/π_ref(τ_i) - log π_θ(τ_j)/π_ref(τ_j)]``; ``p = σ(r_i - r_j)`` is the probability of the label "i is
    preferred" under Bradley-Terry, in place of a drawn label. Rewards are in reward units, for ``β`` is in ``d`` already; a
    difference beyond ±40 is a certain label.
    """
    preference = grouped(temperature(beta, scores) * trajectory_log_ratio(scores), group_size)
    returns = grouped(scores.trajectory_return, group_size)
    one, other = _pairs(group_size, preference.device)
    margin = preference[..., one] - preference[..., other]
    label = torch.sigmoid(returns[..., one] - returns[..., other])
    agree, disagree = (torch.nn.functional.logsigmoid(sign * margin) for sign in (1, -1))
    return checked(-(label * agree + (1 - label) * disagree).mean((-1, -2)), scores, "loss")


def _pairs(group_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The indices ``i < j`` of all pairs."""
    one, other = torch.triu_indices(group_size, group_size, offset=1, device=device)
    return one, other
