"""Parameter vectors to logits: tabular, linear, a small network.

``theta`` is ``(…, D)``; leading dimensions are independent seeds. ``logits`` maps it to one table ``(…, S_h, A_h)`` for each
layer; the cells of non-existent actions hold 0 and are ignored by everything that reads logits. The derivative of that map is
available as a product with a direction, as its adjoint, and as the congruence ``Jᵀ M J`` that Gauss-Newton needs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tbrm_theory.dynamic_programming import solve
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.occupancy import flatten_tables, occupancy, unflatten_tables
from tbrm_theory.shapes import PerLayerStateAction

__all__ = ["Linear", "Network", "Parametrisation", "Tabular", "linear_features"]

Parameters = Float[Tensor, "*seeds parameters"]


class Parametrisation(ABC):
    """A differentiable map from ``theta`` to logits."""

    mdp: RegularizedMDP
    size: int
    """``D``, the number of parameters."""

    @abstractmethod
    def flat_logits(self, theta: Parameters) -> Float[Tensor, "*seeds pairs"]:
        """The logits of all layers side by side."""

    def logits(self, theta: Parameters) -> PerLayerStateAction:
        return unflatten_tables(self.mdp, self.flat_logits(theta))

    def initial(self, seeds: int, generator: torch.Generator, *, scale: float = 1.0) -> Parameters:
        """Random starting points ``(seeds, D)``, i.i.d. normal."""
        draws = torch.randn(seeds, self.size, generator=generator, dtype=torch.float64, device=generator.device)
        return scale * draws

    def derivative(self, theta: Parameters, direction: Parameters) -> Float[Tensor, "*seeds pairs"]:
        """``J v``: the change of the logits along ``direction``."""
        return cast(Tensor, torch.func.jvp(self.flat_logits, (theta,), (direction,))[1])

    def adjoint(self, theta: Parameters, covector: Float[Tensor, "*seeds pairs"]) -> Parameters:
        """``Jᵀ w``."""
        return cast(Tensor, torch.func.vjp(self.flat_logits, theta)[1](covector)[0])

    @abstractmethod
    def congruence(
        self, theta: Parameters, matrix: Float[Tensor, "*seeds pairs pairs"]
    ) -> Float[Tensor, "*seeds parameters parameters"]:
        """``Jᵀ M J`` for a matrix over pairs."""


class Tabular(Parametrisation):
    """One parameter for each logit that matters: existing actions of reachable states.

    From the second layer on, the logit of an only action changes neither ``π_θ`` nor ``f_θ`` (I8) and is left out.
    """

    free: Int[Tensor, " parameters"]
    """Positions of the parameters in the flat vector of all pairs."""

    def __init__(self, mdp: RegularizedMDP) -> None:
        self.mdp = mdp
        matters = []
        reachable = occupancy(mdp, mdp.log_reference).state
        for h, (valid, mass) in enumerate(zip(mdp.valid, reachable, strict=True)):
            several = valid.sum(-1, keepdim=True) > 1
            matters.append(valid & (mass > 0).unsqueeze(-1) & (several if h else torch.ones_like(several)))
        self.free = flatten_tables(_as_numbers(matters)).nonzero().squeeze(-1)
        self.size = len(self.free)
        self._pairs = sum(table.shape[-2:].numel() for table in mdp.reference)

    def flat_logits(self, theta: Parameters) -> Float[Tensor, "*seeds pairs"]:
        return theta.new_zeros(*theta.shape[:-1], self._pairs).index_copy(-1, self.free, theta)

    def parameters(self, logits: PerLayerStateAction) -> Parameters:
        """The parameters of given logits: the inverse of ``logits`` on the cells that matter."""
        return flatten_tables(logits)[..., self.free]

    def congruence(
        self, theta: Parameters, matrix: Float[Tensor, "*seeds pairs pairs"]
    ) -> Float[Tensor, "*seeds parameters parameters"]:
        return matrix[..., self.free[:, None], self.free[None, :]]


def _as_numbers(masks: list[Tensor]) -> PerLayerStateAction:
    return tuple(mask.to(torch.float64) for mask in masks)


class Linear(Parametrisation):
    """``logits = Φ θ`` with features ``Φ`` of shape ``(pairs, D)``."""

    def __init__(self, mdp: RegularizedMDP, features: Float[Tensor, "pairs parameters"]) -> None:
        pairs = sum(table.shape[-2:].numel() for table in mdp.reference)
        if features.shape[0] != pairs:
            raise InvalidInputError("features", f"expected {pairs} rows, one for each pair, found {features.shape[0]}")
        self.mdp, self.features, self.size = mdp, features, features.shape[1]

    def flat_logits(self, theta: Parameters) -> Float[Tensor, "*seeds pairs"]:
        return theta @ self.features.T

    def congruence(
        self, theta: Parameters, matrix: Float[Tensor, "*seeds pairs pairs"]
    ) -> Float[Tensor, "*seeds parameters parameters"]:
        return self.features.T @ matrix @ self.features


def linear_features(
    mdp: RegularizedMDP, dimension: int, generator: torch.Generator, *, realisable: bool
) -> Float[Tensor, "pairs parameters"]:
    """Random features; when ``realisable``, the first column is ``Q*``, so that ``θ* = (1, 0, …)`` is optimal."""
    valid = flatten_tables(_as_numbers(list(mdp.valid))) > 0
    features = torch.randn(len(valid), dimension, generator=generator, dtype=torch.float64, device=generator.device)
    if realisable:
        features[:, 0] = flatten_tables(solve(mdp).q)
    return torch.where(valid.unsqueeze(-1), features, 0.0)


class Network(Parametrisation):
    """A two-layer tanh network on fixed random features of ``(h, s)``, one output for each action; weights shared by all states."""

    def __init__(self, mdp: RegularizedMDP, generator: torch.Generator, *, features: int = 16, width: int = 32) -> None:
        self.mdp = mdp
        states = sum(table.shape[-2] for table in mdp.reference)
        actions = max(table.shape[-1] for table in mdp.reference)
        random = torch.randn(states, features - 1, generator=generator, dtype=torch.float64, device=generator.device)
        self._inputs = torch.cat([random, torch.ones_like(random[:, :1])], dim=-1)
        self._shapes = [(features, width), (width, width), (width, actions)]
        self.size = sum(rows * columns for rows, columns in self._shapes)

    def flat_logits(self, theta: Parameters) -> Float[Tensor, "*seeds pairs"]:
        pieces = theta.split([rows * columns for rows, columns in self._shapes], dim=-1)
        first, second, last = (
            piece.unflatten(-1, shape) / shape[0] ** 0.5 for piece, shape in zip(pieces, self._shapes, strict=True)
        )
        outputs = torch.tanh(torch.tanh(self._inputs @ first) @ second) @ last  # (…, all states, actions)
        layers = outputs.split([table.shape[-2] for table in self.mdp.reference], dim=-2)
        return flatten_tables(
            tuple(layer[..., : table.shape[-1]] for layer, table in zip(layers, self.mdp.reference, strict=True))
        )

    def congruence(
        self, theta: Parameters, matrix: Float[Tensor, "*seeds pairs pairs"]
    ) -> Float[Tensor, "*seeds parameters parameters"]:
        jacobian = torch.func.jacrev(self.flat_logits)
        for _ in theta.shape[:-1]:
            jacobian = torch.func.vmap(jacobian)
        j = jacobian(theta)
        return j.transpose(-1, -2) @ matrix @ j
