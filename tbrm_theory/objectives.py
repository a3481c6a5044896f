"""What is minimised: a loss under a behaviour (exact) or on a set of trajectories (empirical), with its Gauss-Newton metric.

Both objectives see the data through the same three things: the loss of given logits, and the moment matrix
``M = E[φφᵀ]`` of the trajectory features ``φ(τ) = Σ_h e_(h,s_h,a_h)`` as a matrix and as a product. TBRM's residual is
``f = φᵀ u``, so its Gauss-Newton matrix is ``M`` seen through the derivative of ``u`` in the parameters (``optimisers``).
Vectors over pairs ``(h, s, a)`` are those of ``flatten_tables``. Leading dimensions of logits and vectors are independent seeds;
the problem and the data have none.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tbrm_theory.behaviours import Behaviour, Components
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
from tbrm_theory.population import LOSSES, population_loss
from tbrm_theory.scores import pair_index, table_scores
from tbrm_theory.shapes import PerLayerStateAction, Scalars
from tbrm_theory.tables import check_finite, normalised
from tbrm_theory.trajectories import TrajectoryBatch, check_trajectories, trajectory_return

__all__ = ["Objective", "PopulationObjective", "SampleObjective"]


@runtime_checkable
class Objective(Protocol):
    """A loss of logits on given data."""

    @property
    def mdp(self) -> RegularizedMDP: ...

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
    """The exact expectation under a Markov behaviour or a mixture of Markov policies.

    Raises:
        InvalidInputError: other behaviour, for which ``SampleObjective.enumerated`` serves; behaviour that takes actions that do
            not exist, so that every loss is infinite; a batch of problems or of behaviours.
    """

    mdp: RegularizedMDP
    behaviour: Behaviour

    def __post_init__(self) -> None:
        if self.behaviour.components is None:
            raise InvalidInputError("behaviour", "expected a Markov policy or a mixture of them")
        loss = self.loss(self.mdp.reward)  # of any logits
        if loss.shape:
            raise InvalidInputError("behaviour", f"expected one problem and one behaviour, found {tuple(loss.shape)}")
        if not bool(torch.isfinite(loss)):
            raise InvalidInputError("behaviour", "expected actions that exist, found a positive probability of others")

    @property
    def _components(self) -> Components:
        return self.behaviour.components or []

    def loss(self, logits: PerLayerStateAction, loss: str = "tbrm") -> Scalars:
        return population_loss(self.mdp, logits, self.behaviour, loss=loss)

    def pair_mass(self) -> Float[Tensor, " pairs"]:
        masses = [w * flatten_tables(occupancy(self.mdp, log).state_action) for w, log in self._components]
        return torch.stack(masses).sum(0)

    def moment_matrix(self) -> Float[Tensor, "pairs pairs"]:
        return torch.stack([w * moment_matrix(self.mdp, log) for w, log in self._components]).sum(0)

    def moment_product(self, g: Float[Tensor, "... pairs"]) -> Float[Tensor, "... pairs"]:
        tables = unflatten_tables(self.mdp, g)
        products = [w * flatten_tables(moment_product(self.mdp, log, tables)) for w, log in self._components]
        return torch.stack(products).sum(0)


@dataclass(frozen=True, eq=False)
class SampleObjective:
    """The weighted mean over a fixed set of trajectories.

    Args:
        trajectories: ``(N, H)``.
        weights: ``(N,)``, summing to 1; ``None`` for the plain mean.
        observed_return: ``(N,)`` returns in reward units; ``None`` for the exact ones.

    Raises:
        InvalidInputError: trajectories that the problem cannot produce, batch dimensions, weights that are no distribution,
            returns that are not finite, or shapes that do not fit.
    """

    mdp: RegularizedMDP
    trajectories: TrajectoryBatch
    weights: Float[Tensor, " trajectories"] | None = None
    observed_return: Float[Tensor, " trajectories"] | None = None

    def __post_init__(self) -> None:
        shape = self.trajectories.states.shape
        if len(shape) != 2:
            raise InvalidInputError("trajectories", f"expected shape (trajectories, steps), found {tuple(shape)}")
        check_trajectories(self.mdp, self.trajectories)
        for name in ("weights", "observed_return"):
            vector = getattr(self, name)
            if vector is not None and vector.shape != shape[:1]:
                raise InvalidInputError(name, f"expected shape {tuple(shape[:1])}, found {tuple(vector.shape)}")
        if self.weights is not None:
            object.__setattr__(self, "weights", normalised(self.weights, "weights"))
        if self.observed_return is not None:
            check_finite(self.observed_return, "observed_return")

    @classmethod
    def enumerated(cls, mdp: RegularizedMDP, behaviour: Behaviour) -> SampleObjective:
        """The population objective of any behaviour, by listing all trajectories of a small problem."""
        listed = enumerate_trajectories(mdp)
        mask = torch.ones_like(listed.states, dtype=torch.bool)
        return cls(mdp, TrajectoryBatch(listed.states, listed.actions, mask), behaviour.log_law(mdp, listed).exp())

    @cached_property
    def trajectory_weights(self) -> Float[Tensor, " trajectories"]:
        """``weights``, or ``1/N`` for every trajectory."""
        if self.weights is not None:
            return self.weights
        count = self.trajectories.count
        return self.mdp.initial.new_full((count,), 1 / count)

    @cached_property
    def returns(self) -> Float[Tensor, " trajectories"]:
        """``observed_return``, or the exact ones."""
        if self.observed_return is not None:
            return self.observed_return
        return trajectory_return(self.mdp, self.trajectories)

    @cached_property
    def _size(self) -> int:
        return sum(table.shape[-2:].numel() for table in self.mdp.reference)

    @cached_property
    def _pairs(self) -> Int[Tensor, "trajectories steps"]:
        """Positions of the pairs visited; of padding, one place beyond the last pair."""
        return torch.where(self.trajectories.mask, pair_index(self.mdp.reference, self.trajectories), self._size)

    @cached_property
    def features(self) -> scipy.sparse.csr_array:
        """``φ(τ)``, one sparse row for each trajectory, with a one for each step that is not padding."""
        count, steps = self._pairs.shape
        rows = np.arange(count + 1) * steps
        visits = (np.ones(count * steps), self._pairs.flatten().cpu().numpy(), rows)
        return scipy.sparse.csr_array(visits, shape=(count, self._size + 1))[:, :-1]

    def loss(self, logits: PerLayerStateAction, loss: str = "tbrm") -> Scalars:
        if loss not in LOSSES:
            raise InvalidInputError("loss", f"expected one of {', '.join(LOSSES)}, found {loss!r}")
        q = admissible_logits(self.mdp, logits)
        scores = table_scores(
            q, self.mdp.log_reference, self.mdp.reward, self.trajectories, trajectory_return=self.returns
        )
        if loss == "tbrm":
            squares = tbrm_residual(scores, beta=self.mdp.beta).square()
        else:
            squares = brm_residual(scores, beta=self.mdp.beta).square().sum(-1)
        return (self.trajectory_weights * squares).sum(-1)

    def pair_mass(self) -> Float[Tensor, " pairs"]:
        weights = self.trajectory_weights
        mass = weights.new_zeros(self._size + 1)
        return mass.index_add(0, self._pairs.flatten(), weights.repeat_interleave(self._pairs.shape[-1]))[:-1]

    def moment_matrix(self) -> Float[Tensor, "pairs pairs"]:
        weights = scipy.sparse.diags_array(self.trajectory_weights.cpu().numpy())
        matrix = (self.features.T @ weights @ self.features).toarray()
        return torch.from_numpy(matrix).to(self.mdp.initial.device)

    def moment_product(self, g: Float[Tensor, "... pairs"]) -> Float[Tensor, "... pairs"]:
        padded = torch.nn.functional.pad(g, (0, 1))
        sums = padded[..., self._pairs].sum(-1)
        flow = (self.trajectory_weights * sums).unsqueeze(-1).expand(*sums.shape, self._pairs.shape[-1])
        return torch.zeros_like(padded).index_add(-1, self._pairs.flatten(), flow.flatten(-2))[..., :-1]
