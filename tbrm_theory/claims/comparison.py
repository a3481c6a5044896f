"""What it means that two sides agree in float64. The only place where a tolerance comes from.

The model. Every operation returns its exact result times ``1 + δ`` with ``|δ| ≤ ε = 2⁻⁵²``; that is twice the unit roundoff, so
it covers ``exp`` and ``log``, which err by up to one unit in the last place. Then, to first order in ε, a quantity that is a
sum of terms is off by at most

    ε · (rounded operations along the longest chain from an input to the result) · (sum of the absolute terms).

The second factor is ``operations``, the third is ``scale``; an error is given as a fraction of ``scale``, and an identity holds if
it is at most ``ε · operations``. How to count:

* a sum of ``n`` terms is ``n`` operations, since no order of summation is assumed;
* ``log``, ``logsumexp`` and ``exp`` count a few each, and a logarithm of something near 1 has terms of size 1 (scales are at
  least 1 in units of β);
* a probability that is the exponential of a sum of logarithms, ``P(τ) = exp ℓ(τ)``, inherits the absolute error of ``ℓ`` as a
  relative one. So a term ``P(τ) X(τ)`` enters ``scale`` as ``P (1 + |ℓ|) |X|``;
* both sides round, so their operations add up.

Nothing here is fitted: errors seen in practice are one to four orders of magnitude below the bound, since roundings cancel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["EPSILON", "Comparison", "Relation"]

Relation: TypeAlias = Literal["equal", "at most"]

EPSILON = torch.finfo(torch.float64).eps


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two sides computed by independent code, entry by entry.

    ``left``, ``right`` and ``scale`` broadcast. For ``relation="at most"`` the statement is ``left ≤ right``, and only an
    excess counts as an error.
    """

    left: Float[Tensor, "..."]
    right: Float[Tensor, "..."]
    scale: Float[Tensor, "..."]
    """The size of the terms that each side sums, positive."""
    operations: int
    """Rounded operations along the longest chain, both sides together."""
    relation: Relation = "equal"

    @cached_property
    def error(self) -> float:
        """The largest ``|left - right| / scale``, or excess of ``left`` over ``right``.

        It is ``inf`` for NaN on either side, and where sides differ and the scale is not a finite, non-negative number: no error is
        small relative to that.
        """
        gap = torch.where(self.left == self.right, 0.0, self.left - self.right)  # ∞ agrees with ∞
        gap = gap.abs() if self.relation == "equal" else torch.where(gap < 0, 0.0, gap)
        relative = torch.where((self.scale >= 0) & (self.scale < math.inf), gap / self.scale, math.inf)
        largest = torch.where(gap == 0, 0.0, relative).max().item()
        return math.inf if math.isnan(largest) else largest

    @property
    def bound(self) -> float:
        """What rounding explains: ``ε · operations``."""
        return self.operations * EPSILON

    @property
    def share(self) -> float:
        """The error as a share of the bound; the comparison that has the largest is the worst one."""
        return self.error / self.bound

    @property
    def holds(self) -> bool:
        return self.error <= self.bound

    @cached_property
    def ratio(self) -> float | None:
        """How tight an inequality is: the largest ``left/right`` where the right side is positive. None for an equality."""
        if self.relation == "equal":
            return None
        left, right = torch.broadcast_tensors(self.left, self.right)
        ratios = (left / right)[(right > 0) & (right < math.inf)]
        return ratios.max().item() if ratios.numel() else None
