"""Parameter vectors to logits: tabular, linear, a small network.

``theta`` is ``(…, D)``; leading dimensions are independent seeds. ``logits`` maps it to one table ``(…, S_h, A_h)`` for each
layer; whatever the cells of non-existent actions hold is ignored by everything that reads logits. The derivative ``J`` of that
map is available as a product with a direction, as its adjoint, and as a matrix; Gauss-Newton needs all three.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tbrm_theory.dynamic_programming import admissible_logits, soft_policy, solve
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.occupancy import flatten_tables, unflatten_tables
from tbrm_theory.population import LOSSES, soft_plan
from tbrm_theory.shapes import PerLayerStateAction
from tbrm_theory.tables import check_finite, check_shapes

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
        if seeds < 1:
            raise InvalidInputError("seeds", f"expected at least 1, found {seeds}")
        draws = torch.randn(seeds, self.size, generator=generator, dtype=torch.float64, device=generator.device)
        return scale * draws

    def moved(self, theta: Parameters, step: Parameters) -> Parameters:
        """The parameters after a step from ``theta``: ``theta + step``, unless there are better coordinates for steps."""
        return theta + step

    def derivative(self, theta: Parameters, direction: Parameters) -> Float[Tensor, "*seeds pairs"]:
        """``J v``: the change of the logits along ``direction``."""
        return cast(Tensor, torch.func.jvp(self.flat_logits, (theta,), (direction,))[1])

    def adjoint(self, theta: Parameters, covector: Float[Tensor, "*seeds pairs"]) -> Parameters:
        """``Jᵀ w``."""
        return cast(Tensor, torch.func.vjp(self.flat_logits, theta)[1](covector)[0])

    def jacobian(self, theta: Parameters) -> Float[Tensor, "*seeds pairs parameters"]:
        """``J`` itself."""
        jacobian = torch.func.jacrev(self.flat_logits)
        for _ in theta.shape[:-1]:
            jacobian = torch.func.vmap(jacobian)
        return cast(Tensor, jacobian(theta))


class Tabular(Parametrisation):
    """One parameter for each logit that matters: existing actions of reachable states.

    From the second layer on, the logit of an only action changes neither ``π_θ`` nor ``f_θ`` (I8) and is left out; it stays 0.
    BRM sees that logit, so ``loss="brm"`` keeps it.
    """

    free: Int[Tensor, " parameters"]
    """Positions of the parameters in the flat vector of all pairs."""

    def __init__(self, mdp: RegularizedMDP, *, loss: str = "tbrm") -> None:
        if loss not in LOSSES:
            raise InvalidInputError("loss", f"expected one of {', '.join(LOSSES)}, found {loss!r}")
        self.mdp = mdp
        matters = []
        reachable = mdp.initial > 0
        for h, valid in enumerate(mdp.valid):
            pairs = valid & reachable.unsqueeze(-1)
            alone = valid.sum(-1, keepdim=True) == 1
            matters.append(pairs & ~alone if h > 0 and loss == "tbrm" else pairs)
            if h < mdp.horizon - 1:
                reachable = mdp.transitions[h].push(pairs.to(torch.float64)) > 0
        if any(table.dim() > 2 for table in matters):
            expected = "expected one set of states and actions"
            raise InvalidInputError("mdp", f"{expected}, found a batch of shape {tuple(mdp.batch_shape)}")
        cells = torch.cat([table.flatten() for table in matters])
        self.free = cells.nonzero().squeeze(-1)
        self.size, self._pairs = len(self.free), len(cells)

    def flat_logits(self, theta: Parameters) -> Float[Tensor, "*seeds pairs"]:
        return theta.new_zeros(*theta.shape[:-1], self._pairs).index_copy(-1, self.free, theta)

    def parameters(self, logits: PerLayerStateAction) -> Parameters:
        """The parameters of given logits: the inverse of ``logits`` on the cells that matter."""
        check_shapes(logits, self.mdp.reference, "logits")
        return flatten_tables(logits)[..., self.free]

    def moved(self, theta: Parameters, step: Parameters) -> Parameters:
        """The step taken in the space of additive functions: the soft plan of ``g_θ`` plus the step (I14).

        ``V_θ(s_1) + log π_θ(τ) = Σ_h g_h`` with ``g_1 = logit`` and ``g_h = log π_θ`` later. If transitions are deterministic, ``f``
        changes by exactly ``φᵀ step``, whatever its size: in these coordinates TBRM is a linear least-squares problem. If not,
        ``g`` changes by the step less its mean under ``π_θ`` in every later state, which to first order is ``theta + step``; that
        itself would have to keep steps below about 1, where the softmax bends.
        """
        g = []
        for h, (q, change) in enumerate(
            zip(admissible_logits(self.mdp, self.logits(theta)), self.logits(step), strict=True)
        ):
            own = q if h == 0 else soft_policy(q)
            if h > 0 and not self.mdp.is_deterministic:
                change = change - (own.exp() * change).sum(-1, keepdim=True)
            g.append(own + change)
        first, *later = soft_plan(self.mdp, tuple(g))
        return self.parameters((first, *(soft_policy(q) for q in later)))

    def derivative(self, theta: Parameters, direction: Parameters) -> Float[Tensor, "*seeds pairs"]:
        return self.flat_logits(direction)

    def adjoint(self, theta: Parameters, covector: Float[Tensor, "*seeds pairs"]) -> Parameters:
        return covector.index_select(-1, self.free)

    def jacobian(self, theta: Parameters) -> Float[Tensor, "*seeds pairs parameters"]:
        columns = torch.eye(self._pairs, dtype=theta.dtype, device=theta.device).index_select(-1, self.free)
        return columns.expand(*theta.shape[:-1], -1, -1)


class Linear(Parametrisation):
    """``logits = Φ θ`` with features ``Φ`` of shape ``(pairs, D)``."""

    def __init__(self, mdp: RegularizedMDP, features: Float[Tensor, "pairs parameters"]) -> None:
        pairs = sum(table.shape[-2:].numel() for table in mdp.reference)
        if features.dim() != 2 or features.shape[0] != pairs or features.shape[1] == 0:
            expected = f"expected {pairs} rows, one for each pair, and at least one column"
            raise InvalidInputError("features", f"{expected}, found shape {tuple(features.shape)}")
        check_finite(features, "features")
        self.mdp, self.features, self.size = mdp, features.to(torch.float64), features.shape[1]

    def flat_logits(self, theta: Parameters) -> Float[Tensor, "*seeds pairs"]:
        return theta @ self.features.T

    def derivative(self, theta: Parameters, direction: Parameters) -> Float[Tensor, "*seeds pairs"]:
        return self.flat_logits(direction)

    def adjoint(self, theta: Parameters, covector: Float[Tensor, "*seeds pairs"]) -> Parameters:
        return covector @ self.features

    def jacobian(self, theta: Parameters) -> Float[Tensor, "*seeds pairs parameters"]:
        return self.features.expand(*theta.shape[:-1], -1, -1)


def linear_features(
    mdp: RegularizedMDP, dimension: int, generator: torch.Generator, *, realisable: bool
) -> Float[Tensor, "pairs parameters"]:
    """Random features; when ``realisable``, the first column is ``Q*``, so that ``θ* = (1, 0, …)`` is optimal.

    Raises:
        InvalidInputError: ``dimension`` below 1, or a batch of problems, each of which has a ``Q*`` of its own.
    """
    if mdp.batch_shape:
        raise InvalidInputError("mdp", f"expected one problem, found a batch of shape {tuple(mdp.batch_shape)}")
    if dimension < 1:
        raise InvalidInputError("dimension", f"expected at least 1, found {dimension}")
    valid = torch.cat([table.flatten() for table in mdp.valid])
    features = torch.randn(len(valid), dimension, generator=generator, dtype=torch.float64, device=generator.device)
    if realisable:
        features[:, 0] = flatten_tables(solve(mdp).q)
    return torch.where(valid.unsqueeze(-1), features, 0.0)


class Network(Parametrisation):
    """Two layers of tanh on fixed random features of ``(h, s)``, and one output for each action; all states share the weights.

    Each weight is its parameter over the root of the layer's inputs.
    """

    def __init__(self, mdp: RegularizedMDP, generator: torch.Generator, *, features: int = 16, width: int = 32) -> None:
        for name, size in (("features", features), ("width", width)):
            if size < 1:
                raise InvalidInputError(name, f"expected at least 1, found {size}")
        self.mdp = mdp
        states = sum(table.shape[-2] for table in mdp.reference)
        actions = max(table.shape[-1] for table in mdp.reference)
        random = torch.randn(states, features - 1, generator=generator, dtype=torch.float64, device=generator.device)
        constant = torch.ones(states, 1, dtype=torch.float64, device=generator.device)
        self._inputs = torch.cat([random, constant], dim=-1)
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
