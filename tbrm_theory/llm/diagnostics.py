"""What the theory says to watch while training: one number for each row, or for a batch of them.

Everything reads detached :class:`TrajectoryScores` and returns finite numbers.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from tbrm_theory.losses import TrajectoryScores, tbrm_residual, trajectory_log_ratio

__all__ = ["ROW_DIAGNOSTICS", "log_second_moment", "on_policy_bound", "row_diagnostics"]


ROW_DIAGNOSTICS = ("residual", "squared_residual", "initial_value", "initial_value_drift", "log_ratio", "log_weight")
"""Of every row: ``βf_θ`` and its square, ``βV_θ(s_1)`` and how far it is from the reference's (all in reward units), and the
trajectory's ``log π_θ/π_ref`` and ``log π_θ/μ``, which is 0 on-policy."""


def row_diagnostics(scores: TrajectoryScores, *, beta: float) -> Float[Tensor, "rows quantities"]:
    """One column for each of ``ROW_DIAGNOSTICS``."""
    assert scores.reference_initial_value is not None
    assert scores.behaviour_log_policy is not None
    residual = beta * tbrm_residual(scores, beta=beta)
    drift = beta * (scores.initial_value - scores.reference_initial_value)
    log_weight = torch.where(scores.mask, scores.log_policy - scores.behaviour_log_policy, 0.0).sum(-1)
    columns = residual, residual.square(), beta * scores.initial_value, drift, trajectory_log_ratio(scores), log_weight
    return torch.stack(columns, -1)


def log_second_moment(log_weight: Float[Tensor, " rows"]) -> float:
    """``log mean w²``: of ``w = π_θ/μ`` it estimates ``log(1 + χ²(P_π ‖ P_μ))``, on trees ``log κ(π_θ, μ)`` (theory.md I13)."""
    log_weight = log_weight.double()
    return float((2 * log_weight).logsumexp(0)) - math.log(len(log_weight))


def on_policy_bound(
    residual: Float[Tensor, " rows"], log_weight: Float[Tensor, " rows"], *, beta: float
) -> tuple[float, float]:
    """An estimate of B5's right side ``β (√κ(π*,μ) + √κ(π_θ,μ)) √L``, in reward units, and of ``log κ(π*,μ)`` in it.

    By theory.md B7 ``π*/π_θ ∝ e^{-f}``, so the weights of π* against the data are ``v = w e^{-f}`` up to a factor ``e^{V_θ-V*}``
    for each prompt, and ``κ̂ = mean v²/(mean v)²``. One mean over the batch divides out what the prompts have in common; its
    spread between prompts stays in ``κ̂`` and usually raises it. On-policy ``w = 1``. The estimate sees sampled completions
    only and is therefore low where π* puts mass on what was never sampled; it is a gauge, not a certificate.
    """
    residual, log_weight = residual.double(), log_weight.double()
    optimal = log_weight - residual
    log_kappa_optimal = log_second_moment(optimal) - 2 * (float(optimal.logsumexp(0)) - math.log(len(optimal)))
    log_kappa_policy = log_second_moment(log_weight)
    root_loss = float(residual.square().mean().sqrt())
    return beta * root_loss * (_exp(log_kappa_optimal / 2) + _exp(log_kappa_policy / 2)), log_kappa_optimal


def _exp(number: float) -> float:
    """Capped where it says "vacuous" all the same, so that logs stay plain JSON."""
    return math.exp(min(number, 600.0))
