"""What is minimised: a loss under a behaviour (exact) or on a set of trajectories (empirical), with its Gauss-Newton metric.

Both objectives see the data through the same three things: the loss of given logits, and the moment matrix
``M = E[φφᵀ]`` of the trajectory features ``φ(τ) = Σ_h e_(h,s_h,a_h)`` as a matrix and as a product. TBRM's residual is
``f = φᵀ u``, so its Gauss-Newton matrix is ``M`` seen through the derivative of ``u`` in the parameters (``optimisers``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import scipy.sparse
import torch
from jaxtyping import Float
from torch import Tensor

from tbrm_theory.behaviours import Behaviour
from tbrm_theory.dynamic_programming import admissible_logits
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.losses import brm_residual, tbrm_residual
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.occupancy import (
    enumerate_trajectories,
    flatten_tables,
    moment_matrix,
    moment_product,
    occupancy,
    unflatten_tables,
)
from tbrm_theory.population import population_loss
from tbrm_theory.scores import pair_index, table_scores
from tbrm_theory.shapes import PerLayerStateAction, Scalars
from tbrm_theory.trajectories import TrajectoryBatch

__all__ = ["Objective", "PopulationObjective", "SampleObjective"]


@runtime_checkable
class Objective(Protocol):
    mdp: RegularizedMDP

    def loss(self, logits: PerLayerStateAction, loss: str = "tbrm") -> Scalars:
        """The loss named ``"tbrm"`` or ``"brm"``, ``(…)``."""

    def pair_mass(self) -> Float[Tensor, " pairs"]:
        """The diagonal of ``M``: how much data each pair has."""

    def moment_matrix(self) -> Float[Tensor, "pairs pairs"]:
        """``M``, dense."""

    def moment_product(self, g: Float[Tensor, "... pairs"]) -> Float[Tensor, "... pairs"]:
        """``M g``, without forming ``M``."""


@dataclass(frozen=True, eq=False)
class PopulationObjective:
    """The exact expectation under a Markov behaviour or a mixture of Markov policies."""

    mdp: RegularizedMDP
    behaviour: Behaviour

    @property
    def _components(self) -> list[tuple[float, PerLayerStateAction]]:
        return self.behaviour.components

    def loss(self, logits: PerLayerStateAction, loss: str = "tbrm") -> Scalars:
        return population_loss(self.mdp, logits, self.behaviour, loss=loss)

    def pair_mass(self) -> Float[Tensor, " pairs"]:
        masses = [w * flatten_tables(occupancy(self.mdp, log).state_action) for w, log in self._components]
        return torch.stack(masses).sum(0)

    def moment_matrix(self) -> Float[Tensor, "pairs pairs"]:
        weight, log_policy = self._components[0]
        matrix = weight * moment_matrix(self.mdp, log_policy)
        for weight, log_policy in self._components[1:]:
            matrix += weight * moment_matrix(self.mdp, log_policy)
        return matrix

    def moment_product(self, g: Float[Tensor, "... pairs"]) -> Float[Tensor, "... pairs"]:
        tables = unflatten_tables(self.mdp, g)
        return torch.stack(
            [w * flatten_tables(moment_product(self.mdp, log, tables)) for w, log in self._components]
        ).sum(0)


@dataclass(frozen=True, eq=False)
class SampleObjective:
    """The weighted mean over a fixed set of trajectories.

    Args:
        trajectories: ``(N, H)``.
        weights: ``(N,)``, summing to 1; ``None`` for the plain mean.
        observed_return: ``(N,)`` returns in reward units; ``None`` for the exact ones.
    """

    mdp: RegularizedMDP
    trajectories: TrajectoryBatch
    weights: Float[Tensor, " trajectories"] | None = None
    observed_return: Float[Tensor, " trajectories"] | None = None

    @classmethod
    def enumerated(cls, mdp: RegularizedMDP, behaviour: Behaviour) -> SampleObjective:
        """The population objective of any behaviour, by listing all trajectories of a small problem."""
        listed = enumerate_trajectories(mdp)
        weights = behaviour.log_law(listed).exp()
        mask = torch.ones_like(listed.states, dtype=torch.bool)
        return cls(mdp, TrajectoryBatch(listed.states, listed.actions, mask), weights)

    @cached_property
    def _weights(self) -> Float[Tensor, " trajectories"]:
        if self.weights is not None:
            return self.weights
        count = self.trajectories.states.shape[-2]
        return self.mdp.initial.new_full((count,), 1 / count)

    @cached_property
    def returns(self) -> Float[Tensor, " trajectories"]:
        if self.observed_return is not None:
            return self.observed_return
        rewards = flatten_tables(self.mdp.reward)[self._pairs]
        return torch.where(self.trajectories.mask, rewards, 0.0).sum(-1)

    @cached_property
    def _pairs(self) -> Tensor:
        return pair_index(self.mdp.reference, self.trajectories)

    @cached_property
    def features(self) -> scipy.sparse.csr_array:
        """``φ(τ)``, one sparse row for each trajectory, with ``H`` ones."""
        count, horizon = self._pairs.shape
        size = sum(table.shape[-2:].numel() for table in self.mdp.reference)
        ones = torch.ones(count * horizon, dtype=torch.float64).numpy()
        rows = torch.arange(count + 1).mul(horizon).numpy()
        return scipy.sparse.csr_array((ones, self._pairs.flatten().cpu().numpy(), rows), shape=(count, size))

    def loss(self, logits: PerLayerStateAction, loss: str = "tbrm") -> Scalars:
        q = admissible_logits(self.mdp, logits)
        scores = table_scores(
            q, self.mdp.log_reference, self.mdp.reward, self.trajectories, trajectory_return=self.returns
        )
        if loss == "tbrm":
            squares = tbrm_residual(scores, beta=self.mdp.beta).square()
        elif loss == "brm":
            squares = brm_residual(scores, beta=self.mdp.beta).square().sum(-1)
        else:
            raise InvalidInputError("loss", f"expected tbrm or brm, found {loss!r}")
        return (self._weights * squares).sum(-1)

    def pair_mass(self) -> Float[Tensor, " pairs"]:
        return torch.from_numpy(self.features.T @ self._weights.cpu().numpy()).to(self._weights.device)

    def moment_matrix(self) -> Float[Tensor, "pairs pairs"]:
        weighted = self.features.multiply(self._weights.cpu().numpy()[:, None])
        return torch.from_numpy((self.features.T @ weighted).toarray()).to(self._weights.device)

    def moment_product(self, g: Float[Tensor, "... pairs"]) -> Float[Tensor, "... pairs"]:
        flow = self._weights * g[..., self._pairs].sum(-1)
        flow = flow.unsqueeze(-1).expand(*flow.shape, self._pairs.shape[-1])
        return torch.zeros_like(g).index_add(-1, self._pairs.flatten(), flow.flatten(-2))
