"""What a loss sees of a batch of trajectories, and how it may look at it.

Shapes: ``…`` are leading batch dimensions (seeds), ``N`` trajectories, ``H`` steps; only batch dimensions broadcast. Values and
log-probabilities are in units of ``beta``, rewards and returns in reward units. Steps where ``mask`` is False are padding:
they contribute exactly 0, to values and to gradients, whatever they hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.tables import first_index

__all__ = [
    "StepResidual",
    "TrajectoryResidual",
    "TrajectoryScores",
    "checked",
    "grouped",
    "needed",
    "step_temperature",
    "temperature",
    "trajectory_sum",
    "unmasked",
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
    "behaviour_log_policy": 2,
    "log_partition": 1,
    "baseline": 1,
    "critic": 2,
    "frozen_value": 2,
    "entropy": 2,
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
    behaviour_log_policy: Float[Tensor, "... trajectories steps"] | None = None
    """``log μ(a_h|s_h)`` under the policy that sampled ("old log-probabilities"), for ratios; a constant."""
    log_partition: Float[Tensor, "... trajectories"] | None = None
    """``log Z_φ(s_1)``, a parameter of its own, for trajectory balance."""
    baseline: Float[Tensor, "... trajectories"] | None = None
    """``V̂(s_1)``, an estimate of ``V*(s_1)`` or a second model, for point-wise alignment."""
    critic: Float[Tensor, "... trajectories steps"] | None = None
    """``V_φ(s_h)`` of a separate value model, for path consistency and PPO."""
    frozen_value: Float[Tensor, "... trajectories steps"] | None = None
    """``V_θ(s_h)`` at frozen parameters, for soft Q-learning; a constant."""
    entropy: Float[Tensor, "... trajectories steps"] | None = None
    """``H(π_θ(·|s_h))`` in nats, for PPO's bonus."""

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
        return torch.Size(np.broadcast_shapes(*shapes))


def _broadcast(batch: torch.Size, other: torch.Size, where: str) -> torch.Size:
    try:
        return torch.Size(np.broadcast_shapes(batch, other))  # torch's own takes a hundred times as long
    except ValueError:
        raise InvalidInputError(
            where, f"expected batch dimensions that broadcast with {tuple(batch)}, found {tuple(other)}"
        ) from None


def needed(table: Tensor | None, name: str, why: str) -> Tensor:
    """An optional score, refused if it is missing."""
    if table is None:
        raise InvalidInputError(f"scores.{name}", f"missing; {why} needs it")
    return table


def unmasked(table: StepResidual, scores: TrajectoryScores) -> StepResidual:
    """The table with 0 on padding."""
    return torch.where(scores.mask, table, 0.0)


def trajectory_sum(table: StepResidual, scores: TrajectoryScores) -> TrajectoryResidual:
    """``Σ_h`` over unmasked steps, ``(…, N, H) → (…, N)``."""
    return unmasked(table, scores).sum(-1)


def temperature(beta: float | Tensor, scores: TrajectoryScores) -> Float[Tensor, "... 1"]:
    """``beta``, one number or one for each batch element, in a shape that divides ``(…, N)``."""
    number = torch.as_tensor(beta, dtype=scores.log_policy.dtype, device=scores.log_policy.device)
    bad = ~((number > 0) & torch.isfinite(number))
    if bool(bad.any()):
        found = number[bad][0].item()
        raise InvalidInputError(f"beta{first_index(bad)}", f"expected a positive, finite temperature, found {found}")
    if _broadcast(scores.batch_shape, number.shape, "beta") != scores.batch_shape:
        raise InvalidInputError(
            "beta",
            f"expected one number or the batch dimensions {tuple(scores.batch_shape)} of the scores,"
            f" found shape {tuple(number.shape)}",
        )
    return number.unsqueeze(-1)


def step_temperature(beta: float | Tensor, scores: TrajectoryScores) -> Float[Tensor, "... 1 1"]:
    """The same in a shape that divides ``(…, N, H)``."""
    return temperature(beta, scores).unsqueeze(-1)


def grouped(table: TrajectoryResidual, group_size: int) -> Float[Tensor, "... groups group_size"]:
    """Consecutive trajectories that answer one prompt, ``(…, N) → (…, N / n, n)``.

    Raises:
        InvalidInputError: groups smaller than 2, or that do not divide the trajectories.
    """
    count = table.shape[-1]
    if group_size < 2:
        raise InvalidInputError("group_size", f"expected at least 2 trajectories, found {group_size}")
    if count % group_size:
        raise InvalidInputError("group_size", f"expected a divisor of the {count} trajectories, found {group_size}")
    return table.unflatten(-1, (count // group_size, group_size))


def checked(result: Tensor, scores: TrajectoryScores, what: str = "residual") -> Tensor:
    """``result``, refused if a number is missing in it; the scores are searched for the cause only then."""
    bad = result.isnan()
    if bool(bad.any()):
        for name, table in scores.given().items():
            missing = table.isnan()
            if _OWN_DIMENSIONS[name] == 2:
                missing = missing & scores.mask
            if bool(missing.any()):
                raise InvalidInputError(f"scores.{name}{first_index(missing)}", "expected a number, found nan")
        raise InvalidInputError(f"{what}{first_index(bad)}", "∞ - ∞ in the scores of this trajectory")
    return result
