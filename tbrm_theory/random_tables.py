"""Random and uniform tables that instances are made of; every draw comes from an explicit generator.

Shapes may have any number of leading batch dimensions.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tbrm_theory.shapes import StateActionMask, StateActionTable

__all__ = ["ReferenceKind", "draw_existing", "draw_reference", "draw_simplex", "draw_subset", "seeded"]

ReferenceKind: TypeAlias = Literal["uniform", "dirichlet"]
"""Over the existing actions of a state: all alike, or a uniform point of the simplex, ``Dirichlet(1, …, 1)``."""

_SMALLEST = 2.0**-53  # torch.rand draws multiples of this, 0 included, whose logarithm is not finite


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _exponential(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Independent exponential variables, all positive (three times faster than ``Tensor.exponential_``)."""
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    return uniform.clamp_(min=_SMALLEST).log_().neg_()


def draw_simplex(shape: tuple[int, ...], generator: torch.Generator) -> Float[Tensor, "... outcomes"]:
    """Laws over the last dimension, ``Dirichlet(1, …, 1)``: exponential variables divided by their sum."""
    weight = _exponential(shape, generator)
    return weight.div_(weight.sum(-1, keepdim=True))


def draw_existing(shape: tuple[int, ...], missing: float, generator: torch.Generator) -> StateActionMask:
    """Which actions exist: each is missing with the given probability, but one of each state never is."""
    if missing == 0:
        return torch.ones(shape, dtype=torch.bool)
    exists = torch.rand(shape, generator=generator) >= missing
    kept = torch.randint(shape[-1], shape[:-1], generator=generator)
    return exists.scatter_(-1, kept.unsqueeze(-1), True)


def draw_reference(kind: ReferenceKind, exists: StateActionMask, generator: torch.Generator) -> StateActionTable:
    """A reference policy on the existing actions, 0 on the others."""
    weight = exists.to(torch.float64)
    if kind == "dirichlet":
        weight = torch.where(exists, _exponential(tuple(exists.shape), generator), 0.0)
    return weight / weight.sum(-1, keepdim=True)


def draw_subset(shape: tuple[int, ...], size: int, generator: torch.Generator) -> Int[Tensor, "... chosen"]:
    """Distinct members of ``0 … size-1`` along the last dimension, every subset alike (Floyd's algorithm)."""
    chosen = torch.empty(shape, dtype=torch.int64)
    for k in range(shape[-1]):
        newest = size - shape[-1] + k
        drawn = torch.randint(newest + 1, shape[:-1], generator=generator)
        taken = (chosen[..., :k] == drawn.unsqueeze(-1)).any(-1)
        chosen[..., k] = torch.where(taken, newest, drawn)
    return chosen
