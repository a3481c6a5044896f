"""One residual for each trajectory: TBRM and its nearest relatives, which differ in the value of the first state.

A residual is what a loss drives to zero; squaring and averaging are separate (``squared_loss``), with no hidden ½ and no
hidden β². All are ``V + g_θ(τ)`` with ``g_θ(τ) = log π_θ(τ)/π_ref(τ) - r(τ)/β`` (``reward_gap``, theory.md §5), in units of β.

Sources: [Y] Eq. 4, Algorithm 1, App. E and F; [R] (ReVal); [A] (A*-PO); Malkin et al., arXiv 2201.13259; Richemond et al. (DRO),
arXiv 2405.19107.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.losses.trajectory_scores import (
    TrajectoryResidual,
    TrajectoryScores,
    checked,
    needed,
    temperature,
    trajectory_sum,
    unmasked,
)
from tbrm_theory.tables import first_index

__all__ = [
    "a_star_po_loss",
    "a_star_po_residual",
    "dro_loss",
    "dro_residual",
    "first_logit_loss",
    "first_logit_residual",
    "iterative_loss",
    "iterative_residual",
    "reval_loss",
    "reval_residual",
    "reward_gap",
    "squared_loss",
    "tbrm_loss",
    "tbrm_residual",
    "trajectory_balance_loss",
    "trajectory_balance_residual",
    "trajectory_log_ratio",
]


# -- residuals -------------------------------------------------------------------------------------------


def trajectory_log_ratio(scores: TrajectoryScores) -> TrajectoryResidual:
    """``log π_θ(τ)/π_ref(τ) = Σ_h [log π_θ - log π_ref](a_h|s_h)`` over unmasked steps, ``(…, N)``."""
    return checked(trajectory_sum(scores.log_policy - scores.log_reference, scores), scores)


def reward_gap(scores: TrajectoryScores, *, beta: float | Tensor) -> TrajectoryResidual:
    """``g_θ(τ) = log π_θ(τ)/π_ref(τ) - r(τ)/β``: 0 up to a constant of the prompt at the optimum (theory.md §5), ``(…, N)``."""
    return checked(trajectory_log_ratio(scores) - scores.trajectory_return / temperature(beta, scores), scores)


def tbrm_residual(scores: TrajectoryScores, *, beta: float | Tensor) -> TrajectoryResidual:
    """``f_θ(τ) = V_θ(s_1) + log π_θ(τ)/π_ref(τ) - r(τ)/β`` ([Y] Eq. 4; theory.md I5), ``(…, N)``."""
    scaled_return = scores.trajectory_return / temperature(beta, scores)
    return checked(scores.initial_value + trajectory_log_ratio(scores) - scaled_return, scores)


def first_logit_residual(scores: TrajectoryScores, *, beta: float | Tensor) -> TrajectoryResidual:
    """``logit_θ(s_1,a_1) + Σ_{h≥2} log π_θ - Σ_h log π_ref - r(τ)/β`` ([Y] Algorithm 1; theory.md I5), ``(…, N)``."""
    first_logit = needed(scores.first_logit, "first_logit", "Algorithm 1's form")
    log_policy = unmasked(scores.log_policy, scores)[..., 1:].sum(-1)
    log_reference = trajectory_sum(scores.log_reference, scores)
    scaled_return = scores.trajectory_return / temperature(beta, scores)
    return checked(first_logit + log_policy - log_reference - scaled_return, scores)


def reval_residual(scores: TrajectoryScores, *, beta: float | Tensor) -> TrajectoryResidual:
    """``V_θ(s_1) - V_ref(s_1) + log π_θ(τ)/π_ref(τ) - r(τ)/β`` ([R]; theory.md X6), ``(…, N)``."""
    reference_value = needed(scores.reference_initial_value, "reference_initial_value", "ReVal")
    return checked(tbrm_residual(scores, beta=beta) - reference_value, scores)


def iterative_residual(scores: TrajectoryScores, *, beta: float | Tensor) -> TrajectoryResidual:
    """``V(s_1) + log π_θ(τ)/π_ref(τ) - r(τ)/β`` with ``V`` frozen ([Y] App. F; theory.md X5), ``(…, N)``."""
    frozen = needed(scores.frozen_initial_value, "frozen_initial_value", "the iterative variant").detach()
    scaled_return = scores.trajectory_return / temperature(beta, scores)
    return checked(frozen + trajectory_log_ratio(scores) - scaled_return, scores)


def trajectory_balance_residual(scores: TrajectoryScores, *, beta: float | Tensor) -> TrajectoryResidual:
    """``log Z_φ(s_1) + log π_θ(τ)/π_ref(τ) - r(τ)/β`` (Malkin et al.; theory.md I6), ``(…, N)``.

    The target law is ``π_ref(τ) exp(r(τ)/β) / Z``; the backward policy is 1 on a tree. With ``log Z`` tied to ``V_θ(s_1)`` this is
    TBRM.
    """
    log_partition = needed(scores.log_partition, "log_partition", "trajectory balance")
    return checked(log_partition + reward_gap(scores, beta=beta), scores)


def dro_residual(scores: TrajectoryScores, *, beta: float | Tensor) -> TrajectoryResidual:
    """``V̂(s_1) + log π_θ(τ)/π_ref(τ) - r(τ)/β`` with ``V̂`` trained too (DRO-V, Richemond et al.), ``(…, N)``."""
    return checked(needed(scores.baseline, "baseline", "DRO") + reward_gap(scores, beta=beta), scores)


def a_star_po_residual(scores: TrajectoryScores, *, beta: float | Tensor) -> TrajectoryResidual:
    """``V̂*(s_1) + log π_θ(τ)/π_ref(τ) - r(τ)/β`` with ``V̂*`` a constant ([A]; [Y] App. E), ``(…, N)``.

    ``V̂* = log mean exp(r/β)`` over rollouts of ``π_ref``, made before training.
    """
    baseline = needed(scores.baseline, "baseline", "A*-PO").detach()
    return checked(baseline + reward_gap(scores, beta=beta), scores)


# -- losses ----------------------------------------------------------------------------------------------


def squared_loss(residual: TrajectoryResidual) -> Float[Tensor, "..."]:
    """Mean over trajectories of ``residual²``, ``(…, N) → (…)``.

    Raises:
        InvalidInputError: no trajectories, or a residual that is NaN.
    """
    if residual.shape[-1:].numel() == 0 or residual.dim() == 0:
        raise InvalidInputError("residual", f"expected shape (…, trajectories), found {tuple(residual.shape)}")
    bad = residual.isnan()
    if bool(bad.any()):
        raise InvalidInputError(f"residual{first_index(bad)}", "expected a number, found nan")
    return residual.square().mean(-1)


def tbrm_loss(scores: TrajectoryScores, *, beta: float | Tensor) -> Float[Tensor, "..."]:
    """``mean_τ f_θ(τ)²``, the empirical TBRM loss ([Y] Eq. 4), ``(…)``."""
    return squared_loss(tbrm_residual(scores, beta=beta))


def first_logit_loss(scores: TrajectoryScores, *, beta: float | Tensor) -> Float[Tensor, "..."]:
    """``mean_τ f_θ(τ)²`` by the first logit, as [Y] Algorithm 1 computes it, ``(…)``."""
    return squared_loss(first_logit_residual(scores, beta=beta))


def iterative_loss(scores: TrajectoryScores, *, beta: float | Tensor) -> Float[Tensor, "..."]:
    """``mean_τ (V(s_1) + g_θ(τ))²`` with ``V`` frozen ([Y] App. F), ``(…)``."""
    return squared_loss(iterative_residual(scores, beta=beta))


def reval_loss(scores: TrajectoryScores, *, beta: float | Tensor) -> Float[Tensor, "..."]:
    """``mean_τ (V_θ(s_1) - V_ref(s_1) + g_θ(τ))²`` ([R]), ``(…)``."""
    return squared_loss(reval_residual(scores, beta=beta))


def trajectory_balance_loss(scores: TrajectoryScores, *, beta: float | Tensor) -> Float[Tensor, "..."]:
    """``mean_τ (log Z_φ(s_1) + g_θ(τ))²`` (Malkin et al.), ``(…)``."""
    return squared_loss(trajectory_balance_residual(scores, beta=beta))


def dro_loss(scores: TrajectoryScores, *, beta: float | Tensor) -> Float[Tensor, "..."]:
    """``mean_τ (V̂(s_1) + g_θ(τ))²``, ``V̂`` trained too (Richemond et al.; [Y] App. E, footnote 4), ``(…)``."""
    return squared_loss(dro_residual(scores, beta=beta))


def a_star_po_loss(scores: TrajectoryScores, *, beta: float | Tensor) -> Float[Tensor, "..."]:
    """``mean_τ (V̂*(s_1) + g_θ(τ))²``, ``V̂*`` a constant ([A]), ``(…)``."""
    return squared_loss(a_star_po_residual(scores, beta=beta))
