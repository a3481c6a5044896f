"""One residual for each step or for each suffix of a trajectory: BRM, soft Q-learning, path consistency.

Every loss is ``mean_τ Σ_h residual_h²`` over unmasked steps; all need the reward of each step. With ``ρ_h = log π_θ/π_ref(a_h|s_h)``
a one-step residual is ``V(s_h) + ρ_h - r_h/β - V(s_{h+1})`` and a multi-step one ``V(s_h) + Σ_{k≥h} (ρ_k - r_k/β)``, with
``V = 0`` after the last step. What differs is whose V it is, and what of it is trained:

===================  ==============================  =======================================  ===========================
loss                 ``V(s_h)``                      ``V(s_{h+1})``, one-step alone           later ``ρ_k``, multi-step
===================  ==============================  =======================================  ===========================
BRM                  the model's, trained            the model's, trained                     none
SQL one, multi       frozen                          frozen                                   trained
SQL one, multi (q)   the model's, trained            frozen                                   held, in one sum
PCL one, multi       a second model's, trained       a second model's, trained                trained
===================  ==============================  =======================================  ===========================

Sources: [Y] Eq. 3 and App. E; soft Q-learning as in Guo et al., arXiv 2106.07704 (``V`` frozen, log-ratio trained) and, "-q", as in
Haarnoja et al., arXiv 1702.08165, and Schulman et al., arXiv 1704.06440 (the logit is regressed on a frozen target); Nachum et
al., PCL, arXiv 1702.08892.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tbrm_theory.losses.trajectory_scores import (
    StepResidual,
    TrajectoryScores,
    checked,
    needed,
    step_temperature,
    unmasked,
)

__all__ = [
    "brm_loss",
    "brm_residual",
    "pcl_multi_step_loss",
    "pcl_multi_step_residual",
    "pcl_one_step_loss",
    "pcl_one_step_residual",
    "sql_multi_step_loss",
    "sql_multi_step_q_loss",
    "sql_multi_step_q_residual",
    "sql_multi_step_residual",
    "sql_one_step_loss",
    "sql_one_step_q_loss",
    "sql_one_step_q_residual",
    "sql_one_step_residual",
]


def _log_ratio(scores: TrajectoryScores) -> StepResidual:
    """``ρ_h``, 0 on padding."""
    return unmasked(scores.log_policy - scores.log_reference, scores)


def _scaled_reward(scores: TrajectoryScores, beta: float | Tensor, why: str) -> StepResidual:
    """``r_h/β``, 0 on padding."""
    return unmasked(needed(scores.reward, "reward", why), scores) / step_temperature(beta, scores)


def _frozen(scores: TrajectoryScores) -> StepResidual:
    """The frozen values, 0 on padding."""
    return unmasked(needed(scores.frozen_value, "frozen_value", "soft Q-learning"), scores).detach()


def _next(value: StepResidual) -> StepResidual:
    """``V(s_{h+1})``; 0 after the last step, because values on padding are."""
    return torch.nn.functional.pad(value[..., 1:], (0, 1))


def _suffix_sums(table: StepResidual) -> StepResidual:
    """``Σ_{k≥h}``."""
    return table.flip(-1).cumsum(-1).flip(-1)


def _summed_squares(residual: StepResidual) -> Float[Tensor, "..."]:
    """``mean_τ Σ_h residual_h²``."""
    return residual.square().sum(-1).mean(-1)


# -- residuals -------------------------------------------------------------------------------------------


def brm_residual(scores: TrajectoryScores, *, beta: float | Tensor) -> StepResidual:
    """``logit_θ(s_h,a_h) - r_h/β - log π_ref(a_h|s_h) - V_θ(s_{h+1})`` ([Y] Eq. 3), ``(…, N, H)``; 0 on padding.

    The logit is ``V_θ(s_h) + log π_θ(a_h|s_h)``; after the last unmasked step the next value is 0.
    """
    value = unmasked(needed(scores.value, "value", "BRM"), scores)
    return checked(value + _log_ratio(scores) - _scaled_reward(scores, beta, "BRM") - _next(value), scores)


def sql_one_step_residual(scores: TrajectoryScores, *, beta: float | Tensor) -> StepResidual:
    """``V(s_h) + ρ_h - r_h/β - V(s_{h+1})`` with ``V`` frozen ([Y] App. E, single-step), ``(…, N, H)``; 0 on padding."""
    value = _frozen(scores)
    reward = _scaled_reward(scores, beta, "soft Q-learning")
    return checked(value + _log_ratio(scores) - reward - _next(value), scores)


def sql_multi_step_residual(scores: TrajectoryScores, *, beta: float | Tensor) -> StepResidual:
    """``V(s_h) + Σ_{k≥h} (ρ_k - r_k/β)`` with ``V`` frozen ([Y] App. E, multi-step), ``(…, N, H)``; 0 on padding."""
    gap = _log_ratio(scores) - _scaled_reward(scores, beta, "soft Q-learning")
    return checked(_frozen(scores) + _suffix_sums(gap), scores)


def sql_one_step_q_residual(scores: TrajectoryScores, *, beta: float | Tensor) -> StepResidual:
    """``logit_θ(s_h,a_h) - log π_ref(a_h|s_h) - r_h/β - V(s_{h+1})``, the next ``V`` frozen ([Y] App. E), ``(…, N, H)``; 0 on padding.

    On the last step it is TBRM's.
    """
    value = unmasked(needed(scores.value, "value", "soft Q-learning on logits"), scores)
    reward = _scaled_reward(scores, beta, "soft Q-learning")
    return checked(value + _log_ratio(scores) - reward - _next(_frozen(scores)), scores)


def sql_multi_step_q_residual(scores: TrajectoryScores, *, beta: float | Tensor) -> StepResidual:
    """``logit_θ(s_h,a_h) - log π_ref(a_h|s_h) - r_h/β - Σ_{k>h} (r_k/β - ρ_k)``, the sum a constant, ``(…, N, H)``; 0 on padding.

    Our reading of the multi-step form of [Y] App. E that matches the original soft Q-learning: the logit is regressed on the
    regularised return of the steps that follow (Schulman et al.), whose policy is the present one, held constant.
    """
    value = unmasked(needed(scores.value, "value", "soft Q-learning on logits"), scores)
    log_ratio = _log_ratio(scores)
    gap = log_ratio - _scaled_reward(scores, beta, "soft Q-learning")
    return checked(value + gap + _next(_suffix_sums(gap.detach())), scores)


def pcl_one_step_residual(scores: TrajectoryScores, *, beta: float | Tensor) -> StepResidual:
    """``V_φ(s_h) + ρ_h - r_h/β - V_φ(s_{h+1})``, both models trained ([Y] App. E, SAC style), ``(…, N, H)``; 0 on padding."""
    value = unmasked(needed(scores.critic, "critic", "path consistency"), scores)
    reward = _scaled_reward(scores, beta, "path consistency")
    return checked(value + _log_ratio(scores) - reward - _next(value), scores)


def pcl_multi_step_residual(scores: TrajectoryScores, *, beta: float | Tensor) -> StepResidual:
    """``V_φ(s_h) + Σ_{k≥h} (ρ_k - r_k/β)``, both models trained (Nachum et al.), ``(…, N, H)``; 0 on padding."""
    value = unmasked(needed(scores.critic, "critic", "path consistency"), scores)
    return checked(value + _suffix_sums(_log_ratio(scores) - _scaled_reward(scores, beta, "path consistency")), scores)


# -- losses ----------------------------------------------------------------------------------------------


def brm_loss(scores: TrajectoryScores, *, beta: float | Tensor) -> Float[Tensor, "..."]:
    """``mean_τ Σ_h residual_h²``, the empirical BRM loss ([Y] Eq. 3), ``(…)``."""
    return _summed_squares(brm_residual(scores, beta=beta))


def sql_one_step_loss(scores: TrajectoryScores, *, beta: float | Tensor) -> Float[Tensor, "..."]:
    """``mean_τ Σ_h (V(s_h) + ρ_h - r_h/β - V(s_{h+1}))²``, ``V`` frozen ([Y] App. E), ``(…)``."""
    return _summed_squares(sql_one_step_residual(scores, beta=beta))


def sql_multi_step_loss(scores: TrajectoryScores, *, beta: float | Tensor) -> Float[Tensor, "..."]:
    """``mean_τ Σ_h (V(s_h) + Σ_{k≥h} (ρ_k - r_k/β))²``, ``V`` frozen ([Y] App. E), ``(…)``."""
    return _summed_squares(sql_multi_step_residual(scores, beta=beta))


def sql_one_step_q_loss(scores: TrajectoryScores, *, beta: float | Tensor) -> Float[Tensor, "..."]:
    """``mean_τ Σ_h (logit_θ - log π_ref - r_h/β - V(s_{h+1}))²``, ``V`` frozen ([Y] App. E), ``(…)``."""
    return _summed_squares(sql_one_step_q_residual(scores, beta=beta))


def sql_multi_step_q_loss(scores: TrajectoryScores, *, beta: float | Tensor) -> Float[Tensor, "..."]:
    """``mean_τ Σ_h (logit_θ - log π_ref - r_h/β - Σ_{k>h} (r_k/β - ρ_k))²``, the sum a constant ([Y] App. E), ``(…)``."""
    return _summed_squares(sql_multi_step_q_residual(scores, beta=beta))


def pcl_one_step_loss(scores: TrajectoryScores, *, beta: float | Tensor) -> Float[Tensor, "..."]:
    """``mean_τ Σ_h (V_φ(s_h) + ρ_h - r_h/β - V_φ(s_{h+1}))²`` ([Y] App. E), ``(…)``."""
    return _summed_squares(pcl_one_step_residual(scores, beta=beta))


def pcl_multi_step_loss(scores: TrajectoryScores, *, beta: float | Tensor) -> Float[Tensor, "..."]:
    """``mean_τ Σ_h (V_φ(s_h) + Σ_{k≥h} (ρ_k - r_k/β))²`` ([Y] App. E), ``(…)``."""
    return _summed_squares(pcl_multi_step_residual(scores, beta=beta))
