"""Residuals and losses as pure functions of trajectory scores; the toy problems and the language models call these.

A residual is what a loss drives to zero; squaring and averaging are separate (``squared_loss``), with no hidden ½ and no hidden
β². Residuals are in units of ``beta``, rewards and returns in reward units. Shapes: ``…`` are leading batch dimensions (seeds),
``N`` trajectories, ``H`` steps. Steps where ``mask`` is False are padding: they contribute exactly 0, whatever they hold.

Sources: [Y] Eq. 3 (BRM), Eq. 4 and Algorithm 1 (TBRM), App. F (iterative variant); [R] (ReVal); theory.md §0, I5, §5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tbrm_theory.errors import InvalidInputError

__all__ = [
    "RESIDUALS",
    "StepResidual",
    "TrajectoryResidual",
    "TrajectoryScores",
    "brm_loss",
    "brm_residual",
    "first_logit_residual",
    "iterative_residual",
    "reval_residual",
    "squared_loss",
    "tbrm_loss",
    "tbrm_residual",
    "trajectory_log_ratio",
]

TrajectoryResidual = Float[Tensor, "... trajectories"]
StepResidual = Float[Tensor, "... trajectories steps"]


@dataclass(frozen=True, eq=False)
class TrajectoryScores:
    """All that a loss sees of a batch of trajectories.

    Raises:
        InvalidInputError: no trajectories, or shapes that do not fit together.
    """

    log_policy: Float[Tensor, "... trajectories steps"]
    """``log π_θ(a_h|s_h)`` of the actions taken."""
    log_reference: Float[Tensor, "... trajectories steps"]
    """``log π_ref(a_h|s_h)`` of the same."""
    mask: Bool[Tensor, "... trajectories steps"]
    """True where there is an action; True on a prefix of the steps."""
    initial_value: Float[Tensor, "... trajectories"]
    """``V_θ(s_1) = logsumexp`` of the first state's logits."""
    trajectory_return: Float[Tensor, "... trajectories"]
    """``r(τ)``, in reward units."""
    first_logit: Float[Tensor, "... trajectories"] | None = None
    """``logit_θ(s_1, a_1)``, for Algorithm 1's form."""
    value: Float[Tensor, "... trajectories steps"] | None = None
    """``V_θ(s_h)`` of every state visited, for losses per step."""
    reward: Float[Tensor, "... trajectories steps"] | None = None
    """``r_h(s_h,a_h)``, in reward units, for losses per step."""
    reference_initial_value: Float[Tensor, "... trajectories"] | None = None
    """``V_ref(s_1)`` from the reference model's own logits, for ReVal."""
    frozen_initial_value: Float[Tensor, "... trajectories"] | None = None
    """``V_θ(s_1)`` at frozen parameters, for the iterative variant."""

    def __post_init__(self) -> None:
        per_step = {"log_reference": self.log_reference, "mask": self.mask, "value": self.value, "reward": self.reward}
        per_trajectory = {
            "initial_value": self.initial_value,
            "trajectory_return": self.trajectory_return,
            "first_logit": self.first_logit,
            "reference_initial_value": self.reference_initial_value,
            "frozen_initial_value": self.frozen_initial_value,
        }
        if self.log_policy.dim() < 2 or 0 in self.log_policy.shape:
            raise InvalidInputError(
                "scores.log_policy",
                f"expected shape (…, trajectories, steps), none of them 0, found {tuple(self.log_policy.shape)}",
            )
        expected = self.log_policy.shape[-2:]
        for name, table in per_step.items():
            if table is not None and table.shape[-2:] != expected:
                raise InvalidInputError(
                    f"scores.{name}",
                    f"expected (trajectories, steps) = {tuple(expected)}, found {tuple(table.shape[-2:])}",
                )
        for name, vector in per_trajectory.items():
            if vector is not None and vector.shape[-1:] != expected[:1]:
                raise InvalidInputError(
                    f"scores.{name}", f"expected {expected[0]} trajectories, found {tuple(vector.shape[-1:])}"
                )


def _need(table: Tensor | None, name: str, why: str) -> Tensor:
    if table is None:
        raise InvalidInputError(f"scores.{name}", f"missing; {why} needs it")
    return table


def _temperature(beta: float | Tensor) -> Tensor:
    """``beta`` as a tensor ``(…)`` that broadcasts against residuals ``(…, N)``."""
    temperature = torch.as_tensor(beta)
    if not bool(((temperature > 0) & torch.isfinite(temperature)).all()):
        raise InvalidInputError("beta", f"expected a positive temperature, found {beta}")
    return temperature.unsqueeze(-1)


def _checked(residual: Tensor) -> Tensor:
    bad = residual.isnan()
    if bool(bad.any()):
        index = "".join(f"[{i}]" for i in bad.nonzero()[0].tolist())
        raise InvalidInputError(f"residual{index}", "not a number: the scores of this trajectory hold NaN or ∞ - ∞")
    return residual


# -- residuals ------------------------------------------------------------------------------------------------------


def trajectory_log_ratio(scores: TrajectoryScores) -> TrajectoryResidual:
    """``log π_θ(τ)/π_ref(τ) = Σ_h [log π_θ - log π_ref](a_h|s_h)`` over unmasked steps, ``(…, N)``."""
    return torch.where(scores.mask, scores.log_policy - scores.log_reference, 0.0).sum(-1)


def tbrm_residual(scores: TrajectoryScores, *, beta: float | Tensor) -> TrajectoryResidual:
    """``f_θ(τ) = V_θ(s_1) + log π_θ(τ)/π_ref(τ) - r(τ)/β`` ([Y] Eq. 4; theory.md I5), ``(…, N)``."""
    scaled_return = scores.trajectory_return / _temperature(beta)
    return _checked(scores.initial_value + trajectory_log_ratio(scores) - scaled_return)


def first_logit_residual(scores: TrajectoryScores, *, beta: float | Tensor) -> TrajectoryResidual:
    """``logit_θ(s_1,a_1) + Σ_{h≥2} log π_θ - Σ_h log π_ref - r(τ)/β`` ([Y] Algorithm 1; theory.md I5), ``(…, N)``."""
    first_logit = _need(scores.first_logit, "first_logit", "Algorithm 1's form")
    log_policy = torch.where(scores.mask, scores.log_policy, 0.0)[..., 1:].sum(-1)
    log_reference = torch.where(scores.mask, scores.log_reference, 0.0).sum(-1)
    return _checked(first_logit + log_policy - log_reference - scores.trajectory_return / _temperature(beta))


def reval_residual(scores: TrajectoryScores, *, beta: float | Tensor) -> TrajectoryResidual:
    """``V_θ(s_1) - V_ref(s_1) + log π_θ(τ)/π_ref(τ) - r(τ)/β`` ([R]; theory.md X6), ``(…, N)``."""
    reference_value = _need(scores.reference_initial_value, "reference_initial_value", "ReVal")
    return _checked(tbrm_residual(scores, beta=beta) - reference_value)


def iterative_residual(scores: TrajectoryScores, *, beta: float | Tensor) -> TrajectoryResidual:
    """``V(s_1) + log π_θ(τ)/π_ref(τ) - r(τ)/β`` with ``V`` frozen ([Y] App. F; theory.md X5), ``(…, N)``."""
    frozen = _need(scores.frozen_initial_value, "frozen_initial_value", "the iterative variant").detach()
    return _checked(frozen + trajectory_log_ratio(scores) - scores.trajectory_return / _temperature(beta))


def brm_residual(scores: TrajectoryScores, *, beta: float | Tensor) -> StepResidual:
    """``logit_θ(s_h,a_h) - r_h/β - log π_ref(a_h|s_h) - V_θ(s_{h+1})`` ([Y] Eq. 3), ``(…, N, H)``; 0 on padding.

    The logit is ``V_θ(s_h) + log π_θ(a_h|s_h)``; after the last unmasked step the next value is 0.
    """
    value = torch.where(scores.mask, _need(scores.value, "value", "BRM"), 0.0)
    reward = _need(scores.reward, "reward", "BRM") / _temperature(beta).unsqueeze(-1)
    next_value = torch.nn.functional.pad(value[..., 1:], (0, 1))
    residual = value + scores.log_policy - reward - scores.log_reference - next_value
    return _checked(torch.where(scores.mask, residual, 0.0))


# -- losses ---------------------------------------------------------------------------------------------------------


def squared_loss(residual: TrajectoryResidual) -> Float[Tensor, "..."]:
    """Mean over trajectories of ``residual²``, ``(…, N) → (…)``."""
    return residual.square().mean(-1)


def tbrm_loss(scores: TrajectoryScores, *, beta: float | Tensor) -> Float[Tensor, "..."]:
    """``mean_τ f_θ(τ)²``, the empirical TBRM loss ([Y] Eq. 4), ``(…)``."""
    return squared_loss(tbrm_residual(scores, beta=beta))


def brm_loss(scores: TrajectoryScores, *, beta: float | Tensor) -> Float[Tensor, "..."]:
    """``mean_τ Σ_h residual_h²``, the empirical BRM loss ([Y] Eq. 3), ``(…)``."""
    return brm_residual(scores, beta=beta).square().sum(-1).mean(-1)


RESIDUALS: dict[str, Callable[..., Tensor]] = {
    "tbrm": tbrm_residual,
    "tbrm-first-logit": first_logit_residual,
    "tbrm-iterative": iterative_residual,
    "reval": reval_residual,
    "brm": brm_residual,
}
"""Every residual by name; each takes ``(scores, *, beta)``."""
