"""Where a field ``G`` vanishes: the points at which the method that subtracts a multiple of ``G`` comes to rest.

:func:`rest` follows the flow ``x' = -G(x)`` by implicit Euler steps ``(I/Δ + J) δ = -G`` whose length ``Δ`` grows as ``G`` shrinks
(pseudo-transient continuation, Kelley and Keyes, SIAM J. Numer. Anal. 35, 1998): at first what training with small steps does, at
the end Newton's method. So a point of rest is exact. Which of several a start leads to need not be the one that small steps lead to: a
long step may change the basin. ``G`` need not be a gradient. ``J`` is by central differences, good to ten digits, which costs the
accuracy of the step and not that of the zero.

Of every point found it says what kind it is: the least real part of the eigenvalues of ``J``, negative where the flow leaves the point
(a saddle or a maximum), and how far ``J`` is from symmetric: a field with a symmetric ``J`` is the gradient of some function, and
only there is a point of rest a minimum of anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from tbrm_theory.errors import InvalidInputError

__all__ = ["Rest", "jacobian", "rest"]

Points = Float[Tensor, "points parameters"]
Field = Callable[[Points], Points]

DIFFERENCE = 1e-5
"""Of the central differences, in units of logits."""
RESIDUAL = 1e-12
"""The largest entry of ``G`` at rest, relative to the largest where the flow begins."""
FAR = 25.0
"""A row of which an entry is further than this from its start runs away: a probability of about e^-25."""
LONGEST_STEP = 1.0


@dataclass(frozen=True, eq=False)
class Rest:
    """Where the flow from each start went."""

    point: Points
    residual: Float[Tensor, " points"]
    """The largest entry of ``G`` there, relative to the largest of all starts."""
    converged: Bool[Tensor, " points"]
    """The residual is rounding."""
    runs_away: Bool[Tensor, " points"]
    """Logits grew without end: no point of rest was found on the way."""
    least_eigenvalue: Float[Tensor, " points"]
    """The least real part over the largest absolute value; 0, or rounding below it, where a direction changes nothing."""
    asymmetry: Float[Tensor, " points"]
    """``|J - Jᵀ|/|J|``: rounding if ``G`` is a gradient near the point."""
    steps: Int64[Tensor, " points"]
    """Steps of the flow."""


def jacobian(field: Field, points: Points) -> tuple[Points, Float[Tensor, "points parameters parameters"]]:
    """``G`` and ``∂G_i/∂x_j`` at every point, all in one call of ``field``."""
    count, size = points.shape
    shift = DIFFERENCE * torch.eye(size, dtype=points.dtype, device=points.device)
    around = torch.cat([torch.zeros(1, size, dtype=points.dtype, device=points.device), shift, -shift])
    values = field((points.unsqueeze(1) + around).flatten(0, 1)).unflatten(0, (count, 2 * size + 1))
    centre, above, below = values.split([1, size, size], dim=1)
    return centre.squeeze(1), ((above - below) / (2 * DIFFERENCE)).transpose(-1, -2)


def rest(field: Field, starts: Points, *, steps: int = 200) -> Rest:
    """Follow the flow from every start until it rests, runs away, or ``steps`` are done.

    Raises:
        InvalidInputError: no starts, or a start or a value of the field that is not finite.
    """
    if starts.numel() == 0 or not bool(starts.isfinite().all()):
        raise InvalidInputError("starts", "expected at least one, and finite numbers")
    point = starts.clone()
    value, slope = jacobian(field, point)
    largest = value.abs().amax()
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    length = 1 / slope.flatten(1).norm(dim=-1).clamp(min=1e-3 * scale)
    identity = torch.eye(starts.shape[-1], dtype=starts.dtype, device=starts.device)
    taken = torch.zeros(len(starts), dtype=torch.int64, device=starts.device)
    for _ in range(steps):
        size = value.norm(dim=-1)
        moving = (value.abs().amax(-1) > RESIDUAL * scale) & ~_far(point, starts)
        if not bool(moving.any()):
            break
        leaving = -torch.linalg.eigvals(slope).real.amin(-1)
        length = torch.where(leaving > 0, length.clamp(max=0.5 / leaving), length)
        step = -torch.linalg.solve(identity / length[:, None, None] + slope, value)
        longest = step.abs().amax(-1, keepdim=True)
        step = step * (LONGEST_STEP / longest).clamp(max=1.0)
        point = torch.where(moving.unsqueeze(-1), point + step, point)
        taken = taken + moving.to(torch.int64)
        value, slope = jacobian(field, point)
        if not bool(value.isfinite().all()):
            raise InvalidInputError("field", "not finite on the way")
        shrunk = size / value.norm(dim=-1).clamp(min=1e-300)
        growth = torch.where(shrunk >= 1, shrunk.clamp(2.0, 4.0), shrunk.clamp(min=0.3))
        length = (length * growth).clamp(max=1e9)
    eigenvalues = torch.linalg.eigvals(slope)
    spread = eigenvalues.abs().amax(-1).clamp(min=1e-300)
    residual = value.abs().amax(-1) / scale
    away = _far(point, starts)
    skew = (slope - slope.transpose(-1, -2)).flatten(1).norm(dim=-1)
    return Rest(
        point=point,
        residual=residual,
        converged=(residual <= RESIDUAL) & ~away,
        runs_away=away,
        least_eigenvalue=eigenvalues.real.amin(-1) / spread,
        asymmetry=skew / slope.flatten(1).norm(dim=-1).clamp(min=1e-300),
        steps=taken,
    )


def _far(point: Points, start: Points) -> Bool[Tensor, " points"]:
    return (point - start).abs().amax(-1) > FAR
