"""Residuals and losses as pure functions of trajectory scores; the toy problems and the language models call these.

A residual is what a loss drives to zero; squaring and averaging are separate (``squared_loss``), with no hidden ½ and no
hidden β². Residuals are in units of ``beta``, rewards and returns in reward units. Shapes: ``…`` are leading batch
dimensions (seeds), ``N`` trajectories, ``H`` steps; only batch dimensions broadcast. Steps where ``mask`` is False are
padding: they contribute exactly 0, to values and to gradients, whatever they hold.

Sources: [Y] Eq. 3 (BRM), Eq. 4 and Algorithm 1 (TBRM), App. F (iterative variant); [R] (ReVal); theory.md §0, I5, §5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.tables import first_index

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

_OWN_DIMENSIONS = {  # of every field: (N, H) or (N,)
    "log_policy": 2,
    "log_reference": 2,
    "mask": 2,
    "initial_value": 1,
    "trajectory_return": 1,
    "first_logit": 1,
    "value": 2,
    "reward": 2,
    "reference_initial_value": 1,
    "frozen_initial_value": 1,
}


@dataclass(frozen=True, eq=False)
class TrajectoryScores:
    """All that a loss sees of a batch of trajectories.

    Raises:
        InvalidInputError: no trajectories, shapes that do not fit together, or a mask that is not a prefix.
    """

    log_policy: Float[Tensor, "... trajectories steps"]
    """``log π_θ(a_h|s_h)`` of the actions taken."""
    log_reference: Float[Tensor, "... trajectories steps"]
    """``log π_ref(a_h|s_h)`` of the same."""
    mask: Bool[Tensor, "... trajectories steps"]
    """True where there is an action: on the first steps of a trajectory, at least one."""
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
        size = self.log_policy.shape[-2:]
        if len(size) < 2 or 0 in self.log_policy.shape:
            found = tuple(self.log_policy.shape)
            raise InvalidInputError(
                "scores.log_policy", f"expected shape (…, trajectories, steps), none of them 0, found {found}"
            )
        batch = torch.Size()
        for name, table in self.given().items():
            own = size[: _OWN_DIMENSIONS[name]]
            if table.shape[-len(own) :] != own:
                expected = ", ".join(str(length) for length in own)
                raise InvalidInputError(f"scores.{name}", f"expected shape (…, {expected}), found {tuple(table.shape)}")
            batch = _broadcast(batch, table.shape[: -len(own)], f"scores.{name}")
        out_of_place = ~self.mask
        out_of_place[..., 1:] = self.mask[..., 1:] & ~self.mask[..., :-1]
        if bool(out_of_place.any()):
            raise InvalidInputError(
                f"scores.mask{first_index(out_of_place)}",
                "expected True on the first steps of a trajectory, at least one, and False on the others",
            )

    def given(self) -> dict[str, Tensor]:
        """Every field but those that are None."""
        fields = {name: getattr(self, name) for name in _OWN_DIMENSIONS}
        return {name: table for name, table in fields.items() if table is not None}

    @property
    def batch_shape(self) -> torch.Size:
        """The broadcast leading dimensions of all fields."""
        shapes = [table.shape[: -_OWN_DIMENSIONS[name]] for name, table in self.given().items()]
        return torch.Size(torch.broadcast_shapes(*shapes))


def _broadcast(batch: torch.Size, other: torch.Size, where: str) -> torch.Size:
    try:
        return torch.Size(torch.broadcast_shapes(batch, other))
    except RuntimeError:
        raise InvalidInputError(
            where, f"expected batch dimensions that broadcast with {tuple(batch)}, found {tuple(other)}"
        ) from None


def _need(table: Tensor | None, name: str, why: str) -> Tensor:
    if table is None:
        raise InvalidInputError(f"scores.{name}", f"missing; {why} needs it")
    return table


def _temperature(beta: float | Tensor, scores: TrajectoryScores) -> Float[Tensor, "... 1"]:
    """``beta``, one number or one for each batch element, in a shape that divides ``(…, N)``."""
    temperature = torch.as_tensor(beta, dtype=scores.log_policy.dtype, device=scores.log_policy.device)
    bad = ~((temperature > 0) & torch.isfinite(temperature))
    if bool(bad.any()):
        found = temperature[bad][0].item()
        raise InvalidInputError(f"beta{first_index(bad)}", f"expected a positive, finite temperature, found {found}")
    if _broadcast(scores.batch_shape, temperature.shape, "beta") != scores.batch_shape:
        raise InvalidInputError(
            "beta",
            f"expected one number or the batch dimensions {tuple(scores.batch_shape)} of the scores,"
            f" found shape {tuple(temperature.shape)}",
        )
    return temperature.unsqueeze(-1)


def _checked(residual: Tensor, scores: TrajectoryScores) -> Tensor:
    """``residual``, refused if a number is missing in it; the scores are searched for the cause only then."""
    bad = residual.isnan()
    if bool(bad.any()):
        for name, table in scores.given().items():
            missing = table.isnan()
            if _OWN_DIMENSIONS[name] == 2:
                missing = missing & scores.mask
            if bool(missing.any()):
                raise InvalidInputError(f"scores.{name}{first_index(missing)}", "expected a number, found nan")
        raise InvalidInputError(f"residual{first_index(bad)}", "∞ - ∞ in the scores of this trajectory")
    return residual


# -- residuals -------------------------------------------------------------------------------------------


def trajectory_log_ratio(scores: TrajectoryScores) -> TrajectoryResidual:
    """``log π_θ(τ)/π_ref(τ) = Σ_h [log π_θ - log π_ref](a_h|s_h)`` over unmasked steps, ``(…, N)``."""
    ratio = torch.where(scores.mask, scores.log_policy - scores.log_reference, 0.0).sum(-1)
    return _checked(ratio, scores)


def tbrm_residual(scores: TrajectoryScores, *, beta: float | Tensor) -> TrajectoryResidual:
    """``f_θ(τ) = V_θ(s_1) + log π_θ(τ)/π_ref(τ) - r(τ)/β`` ([Y] Eq. 4; theory.md I5), ``(…, N)``."""
    scaled_return = scores.trajectory_return / _temperature(beta, scores)
    return _checked(scores.initial_value + trajectory_log_ratio(scores) - scaled_return, scores)


def first_logit_residual(scores: TrajectoryScores, *, beta: float | Tensor) -> TrajectoryResidual:
    """``logit_θ(s_1,a_1) + Σ_{h≥2} log π_θ - Σ_h log π_ref - r(τ)/β`` ([Y] Algorithm 1; theory.md I5), ``(…, N)``."""
    first_logit = _need(scores.first_logit, "first_logit", "Algorithm 1's form")
    log_policy = torch.where(scores.mask, scores.log_policy, 0.0)[..., 1:].sum(-1)
    log_reference = torch.where(scores.mask, scores.log_reference, 0.0).sum(-1)
    scaled_return = scores.trajectory_return / _temperature(beta, scores)
    return _checked(first_logit + log_policy - log_reference - scaled_return, scores)


def reval_residual(scores: TrajectoryScores, *, beta: float | Tensor) -> TrajectoryResidual:
    """``V_θ(s_1) - V_ref(s_1) + log π_θ(τ)/π_ref(τ) - r(τ)/β`` ([R]; theory.md X6), ``(…, N)``."""
    reference_value = _need(scores.reference_initial_value, "reference_initial_value", "ReVal")
    return _checked(tbrm_residual(scores, beta=beta) - reference_value, scores)


def iterative_residual(scores: TrajectoryScores, *, beta: float | Tensor) -> TrajectoryResidual:
    """``V(s_1) + log π_θ(τ)/π_ref(τ) - r(τ)/β`` with ``V`` frozen ([Y] App. F; theory.md X5), ``(…, N)``."""
    frozen = _need(scores.frozen_initial_value, "frozen_initial_value", "the iterative variant").detach()
    scaled_return = scores.trajectory_return / _temperature(beta, scores)
    return _checked(frozen + trajectory_log_ratio(scores) - scaled_return, scores)


def brm_residual(scores: TrajectoryScores, *, beta: float | Tensor) -> StepResidual:
    """``logit_θ(s_h,a_h) - r_h/β - log π_ref(a_h|s_h) - V_θ(s_{h+1})`` ([Y] Eq. 3), ``(…, N, H)``; 0 on padding.

    The logit is ``V_θ(s_h) + log π_θ(a_h|s_h)``; after the last unmasked step the next value is 0.
    """
    value = torch.where(scores.mask, _need(scores.value, "value", "BRM"), 0.0)
    reward = torch.where(scores.mask, _need(scores.reward, "reward", "BRM"), 0.0)
    log_ratio = torch.where(scores.mask, scores.log_policy - scores.log_reference, 0.0)
    next_value = torch.nn.functional.pad(value[..., 1:], (0, 1))
    return _checked(value + log_ratio - reward / _temperature(beta, scores).unsqueeze(-1) - next_value, scores)


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
