"""Where data come from: a policy, a mixture of policies, history-dependent behaviour, fixed data (theory.md §0).

A behaviour draws trajectories, and knows its own exact law on enumerated ones. If it is one Markov policy, or a mixture of several
of which one is drawn for each episode, ``components`` lists them with their weights, and expectations are the weighted sums of
theirs, without enumeration. A mixture is in general not the law of any Markov policy (X1).

``named_behaviours`` makes the ones that the experiments compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from tbrm_theory.dynamic_programming import check_policy
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.occupancy import Enumeration
from tbrm_theory.sampling import CumulativeRows, PolicyDraw, check_can_act, check_draw, policy_batch, roll_out
from tbrm_theory.shapes import PerLayerStateAction
from tbrm_theory.tables import normalised, safe_log
from tbrm_theory.trajectories import (
    Dataset,
    TrajectoryBatch,
    check_trajectories,
    sample_trajectories,
    trajectory_return,
)

__all__ = [
    "Behaviour",
    "Components",
    "FixedDataset",
    "HistoryBehaviour",
    "MarkovBehaviour",
    "MixtureBehaviour",
]

Components: TypeAlias = list[tuple[float, PerLayerStateAction]]
"""Weights, summing to 1, and the tables ``log μ_i`` of Markov policies."""


@runtime_checkable
class Behaviour(Protocol):
    """A law on the trajectories of a problem."""

    @property
    def components(self) -> Components | None:
        """The Markov policies that this is a mixture of, one drawn for each episode; None if it is nothing of the kind."""

    def sample(self, mdp: RegularizedMDP, count: int, generator: torch.Generator) -> TrajectoryBatch:
        """``count`` independent trajectories for each batch element, ``(…, N, H)``."""

    def log_law(self, mdp: RegularizedMDP, listed: Enumeration) -> Float[Tensor, "... trajectories"]:
        """``log P_μ(τ)`` of every listed trajectory of ``mdp``."""


@dataclass(frozen=True, eq=False)
class MarkovBehaviour:
    """One policy, given by its tables ``log μ``; leading dimensions are a batch of behaviours."""

    log_policy: PerLayerStateAction

    @property
    def components(self) -> Components:
        return [(1.0, self.log_policy)]

    def sample(self, mdp: RegularizedMDP, count: int, generator: torch.Generator) -> TrajectoryBatch:
        return sample_trajectories(mdp, self.log_policy, count, generator)

    def log_law(self, mdp: RegularizedMDP, listed: Enumeration) -> Float[Tensor, "... trajectories"]:
        check_policy(mdp, self.log_policy, "log_policy")
        return listed.log_law(self.log_policy)


@dataclass(frozen=True, eq=False)
class MixtureBehaviour:
    """One of several policies, drawn for each episode and kept until its end: what a replay buffer holds.

    Raises:
        InvalidInputError: no policies, another number of weights, or weights that are no probabilities with sum 1.
    """

    weights: tuple[float, ...]
    log_policies: tuple[PerLayerStateAction, ...]

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.log_policies) or not self.weights:
            expected = f"expected one for each of {len(self.log_policies)} policies, at least one"
            raise InvalidInputError("weights", f"{expected}, found {len(self.weights)}")
        weights = normalised(torch.tensor(self.weights, dtype=torch.float64), "weights")
        object.__setattr__(self, "weights", tuple(weights.tolist()))

    @property
    def components(self) -> Components:
        return list(zip(self.weights, self.log_policies, strict=True))

    def sample(self, mdp: RegularizedMDP, count: int, generator: torch.Generator) -> TrajectoryBatch:
        check_draw(mdp, count, generator)
        batch = policy_batch(self.log_policies)
        weights = torch.tensor(self.weights, dtype=torch.float64, device=mdp.initial.device)
        episodes = torch.zeros(batch.numel() * count, dtype=torch.int64, device=mdp.initial.device)
        choice = CumulativeRows(weights).draw(episodes, generator).reshape(*batch, count)
        choose = PolicyDraw(mdp, self.log_policies, batch, count, generator, choice)
        return TrajectoryBatch(*roll_out(mdp, batch, count, choose, generator))

    def log_law(self, mdp: RegularizedMDP, listed: Enumeration) -> Float[Tensor, "... trajectories"]:
        laws = []
        for i, (weight, log_policy) in enumerate(self.components):
            check_policy(mdp, log_policy, f"log_policies[{i}]")
            laws.append(safe_log(listed.log_dynamics.new_tensor(weight)) + listed.log_law(log_policy))
        return torch.logsumexp(torch.stack(torch.broadcast_tensors(*laws)), dim=0)


@dataclass(frozen=True, eq=False)
class HistoryBehaviour:
    """Does again what it did in the step before, with probability ``repeat``; else draws from ``log_policy``.

    An action is known by its index. After the first step, an action that does not exist in the new state is not repeated. The
    history matters beyond the state, so no Markov policy of this problem has the same law, in general.

    Raises:
        InvalidInputError: ``repeat`` is not between 0 and 1.
    """

    log_policy: PerLayerStateAction
    repeat: float

    def __post_init__(self) -> None:
        if not 0 <= self.repeat <= 1:
            raise InvalidInputError("repeat", f"expected a probability, found {self.repeat}")

    @property
    def components(self) -> None:
        return None

    def sample(self, mdp: RegularizedMDP, count: int, generator: torch.Generator) -> TrajectoryBatch:
        check_draw(mdp, count, generator)
        if self.repeat > 0:  # leads to states that the policy alone never sees
            check_can_act(mdp, self.log_policy, "log_policy", visitor=mdp.log_reference)
        batch = policy_batch([self.log_policy])
        fresh = PolicyDraw(mdp, [self.log_policy], batch, count, generator)

        def choose(h: int, block: slice, state: Tensor, previous_action: Tensor | None) -> Tensor:
            action = fresh(h, block, state, previous_action)
            if previous_action is None:
                return action
            uniform = torch.rand(state.shape, generator=generator, dtype=torch.float64, device=state.device)
            again = (uniform < self.repeat) & _exists(mdp, h, state, previous_action)
            return torch.where(again, previous_action, action)

        return TrajectoryBatch(*roll_out(mdp, batch, count, choose, generator))

    def log_law(self, mdp: RegularizedMDP, listed: Enumeration) -> Float[Tensor, "... trajectories"]:
        check_policy(mdp, self.log_policy, "log_policy")
        repeat = listed.log_dynamics.new_tensor(self.repeat)
        law = listed.log_dynamics + self.log_policy[0][..., listed.states[:, 0], listed.actions[:, 0]]
        for h in range(1, mdp.horizon):
            state, action, previous = listed.states[:, h], listed.actions[:, h], listed.actions[:, h - 1]
            fresh = self.log_policy[h][..., state, action]
            again = torch.where(action == previous, safe_log(repeat), -torch.inf)
            mixed = torch.logaddexp(fresh + safe_log(1 - repeat), again)
            law = law + torch.where(_exists(mdp, h, state, previous), mixed, fresh)
        return law


def _exists(mdp: RegularizedMDP, h: int, state: Tensor, action: Tensor) -> Tensor:
    """Whether the action index of another layer stands for an action that exists in this layer's state."""
    actions = mdp.valid[h].shape[-1]
    return (action < actions) & mdp.valid[h][..., state, action.clamp(max=actions - 1)]


@dataclass(frozen=True, eq=False)
class FixedDataset:
    """Given trajectories ``(N, H)``, such as those of a file, each as likely as the others.

    Args:
        trajectory_return: returns as observed, ``(N,)`` in reward units; the sums of the rewards if not given.

    Raises:
        InvalidInputError: batch dimensions, or returns that do not fit the trajectories.
    """

    batch: TrajectoryBatch
    trajectory_return: Float[Tensor, " trajectories"] | None = None

    def __post_init__(self) -> None:
        if self.batch.states.dim() != 2:
            expected = "expected shape (trajectories, steps)"
            raise InvalidInputError("trajectories", f"{expected}, found {tuple(self.batch.states.shape)}")
        if self.trajectory_return is not None:
            Dataset(self.batch, self.trajectory_return)

    @property
    def components(self) -> None:
        return None

    def data(self, mdp: RegularizedMDP) -> Dataset:
        """All trajectories with their returns."""
        observed = self.trajectory_return
        return Dataset(self.batch, trajectory_return(mdp, self.batch) if observed is None else observed)

    def draw(self, mdp: RegularizedMDP, count: int, generator: torch.Generator) -> Dataset:
        """``count`` of the trajectories, with replacement and with their returns."""
        check_draw(mdp, count, generator)
        device = self.batch.states.device
        return self.data(mdp).rows(torch.randint(self.batch.count, (count,), generator=generator, device=device))

    def sample(self, mdp: RegularizedMDP, count: int, generator: torch.Generator) -> TrajectoryBatch:
        """``count`` of the trajectories, with replacement; see :meth:`draw` for their returns."""
        return self.draw(mdp, count, generator).batch

    def log_law(self, mdp: RegularizedMDP, listed: Enumeration) -> Float[Tensor, " trajectories"]:
        """The logarithm of the share of every listed trajectory among the given ones."""
        check_trajectories(mdp, self.batch)
        both = [torch.cat([part.states, part.actions], dim=-1) for part in (listed, self.batch)]
        _, number = torch.unique(torch.cat(both), dim=0, return_inverse=True)
        times = torch.bincount(number[len(listed.states) :], minlength=int(number.max()) + 1)
        return safe_log(times[number[: len(listed.states)]].to(torch.float64) / self.batch.count)
