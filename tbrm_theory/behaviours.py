"""Where data come from: a Markov policy, or a mixture of policies drawn once per episode (a replay buffer)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.occupancy import Enumeration
from tbrm_theory.shapes import PerLayerStateAction
from tbrm_theory.tables import safe_log

__all__ = ["Behaviour", "MarkovBehaviour", "MixtureBehaviour"]


@dataclass(frozen=True, eq=False)
class MarkovBehaviour:
    """The law of one Markov policy ``log μ``."""

    log_policy: PerLayerStateAction

    @property
    def components(self) -> list[tuple[float, PerLayerStateAction]]:
        return [(1.0, self.log_policy)]

    def log_law(self, listed: Enumeration) -> Float[Tensor, "... trajectories"]:
        """``log P_μ(τ)`` of listed trajectories."""
        return listed.log_law(self.log_policy)


@dataclass(frozen=True, eq=False)
class MixtureBehaviour:
    """One of several Markov policies, drawn once per episode; in general not the law of a Markov policy (X1)."""

    weights: tuple[float, ...]
    log_policies: tuple[PerLayerStateAction, ...]

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.log_policies) or not self.weights:
            raise InvalidInputError("weights", f"expected one for each of {len(self.log_policies)} policies")
        if min(self.weights) < 0 or abs(sum(self.weights) - 1) > 1e-9:
            raise InvalidInputError("weights", f"expected probabilities that sum to 1, found {self.weights}")

    @property
    def components(self) -> list[tuple[float, PerLayerStateAction]]:
        return list(zip(self.weights, self.log_policies, strict=True))

    def log_law(self, listed: Enumeration) -> Float[Tensor, "... trajectories"]:
        """``log Σ_i w_i P_i(τ)`` of listed trajectories."""
        laws = torch.stack([listed.log_law(log_policy) for log_policy in self.log_policies])
        weights = safe_log(torch.tensor(self.weights, dtype=laws.dtype, device=laws.device))
        return torch.logsumexp(laws + weights.reshape(-1, *[1] * (laws.dim() - 1)), dim=0)


Behaviour: TypeAlias = MarkovBehaviour | MixtureBehaviour
