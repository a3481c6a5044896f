"""The tabular TBRM loss on listed trajectories, with its first and second derivative written out (theory.md C1).

Everything is a function of ``theta``, the logits of all existing actions side by side, ``(…, P)``. With ``f = Σ_h u_h``,
``u_1 = logit - R_β`` and ``u_h = log π_θ - R_β``, and ``e_h(s,a) = E[f 1{s_h=s, a_h=a}]``:

* ``½∇L = e_h(s,a) - π_θ(a|s) e_h(s)``, without the second term in layer 1;
* ``½∇²L = E[∇f ∇fᵀ] - ⊕_s e_h(s) (diag π - π πᵀ)(s)``, the sum over the states of layers ``h ≥ 2``.

Written for the claims: no code is shared with ``losses``, ``population`` or autograd. ``weights`` is any law on the listed
trajectories, and the reward may be any table, ``(…, P)``, so that many problems on the same graph are one object.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.occupancy import Enumeration
from tbrm_theory.shapes import PerLayerStateAction
from tbrm_theory.tables import side_by_side

__all__ = ["ListedLoss", "flat", "tables"]

Pairs = Float[Tensor, "... pairs"]
PerTrajectory = Float[Tensor, "... trajectories"]


@dataclass(frozen=True, eq=False)
class ListedLoss:
    """``L(θ) = Σ_τ w(τ) (f_θ(τ) - ξ(τ))²`` on the ``P`` existing pairs of a problem."""

    pair: Int[Tensor, "trajectories horizon"]
    """Which pair every step takes."""
    state: Int[Tensor, " pairs"]
    """Which state every pair belongs to, counted over all layers."""
    layer: Int[Tensor, " pairs"]
    states: int
    reward: Pairs
    """``R_β``."""
    weights: PerTrajectory
    noise: PerTrajectory
    """``ξ(τ)``, the noise of the observed return, in units of β."""

    @classmethod
    def of(cls, mdp: RegularizedMDP, listed: Enumeration, weights: PerTrajectory) -> ListedLoss:
        """The noise-free loss of a problem under a law on its listed trajectories."""
        exists = torch.cat([valid.flatten() for valid in mdp.valid])
        number = exists.cumsum(0) - 1
        sizes = [tuple(table.shape[-2:]) for table in mdp.reference]
        pair, state, layer, pairs, states = [], [], [], 0, 0
        for h, (count, width) in enumerate(sizes):
            pair.append(number[pairs + width * listed.states[:, h] + listed.actions[:, h]])
            state.append(states + torch.arange(count).repeat_interleave(width))
            layer.append(torch.full((count * width,), h))
            pairs, states = pairs + count * width, states + count
        reward = flat(mdp, mdp.regularized_reward)
        whose, where = torch.cat(state)[exists], torch.cat(layer)[exists]
        return cls(torch.stack(pair, -1), whose, where, states, reward, weights, torch.zeros_like(weights))

    def under(self, weights: PerTrajectory) -> ListedLoss:
        """The same with another law."""
        return replace(self, weights=weights)

    def observing(self, noise: PerTrajectory) -> ListedLoss:
        """The same with noisy returns."""
        return replace(self, noise=noise)

    @property
    def horizon(self) -> int:
        return self.pair.shape[-1]

    @property
    def mass(self) -> Pairs:
        """``d_h(s,a)``."""
        return self._collected(self.weights)

    # -- the loss and its first derivative --------------------------------------------------------------------------

    def policy(self, theta: Pairs) -> Pairs:
        """``π_θ(a|s)``."""
        shifted = (theta - self._largest(theta)).exp()
        return shifted / self._total(shifted)[..., self.state]

    def terms(self, theta: Pairs) -> Pairs:
        """``u_h(s,a)``."""
        top = self._largest(theta)
        log_policy = theta - top - self._total((theta - top).exp()).log()[..., self.state]
        return torch.where(self.layer == 0, theta, log_policy) - self.reward

    def residual(self, theta: Pairs) -> PerTrajectory:
        """``f_θ(τ) - ξ(τ)``."""
        return self.terms(theta)[..., self.pair].sum(-1) - self.noise

    def value(self, theta: Pairs) -> Float[Tensor, "..."]:
        """``L(θ)``."""
        return (self.weights * self.residual(theta).square()).sum(-1)

    def collected_residual(self, theta: Pairs) -> Pairs:
        """``e_h(s,a)``."""
        return self._collected(self.weights * self.residual(theta))

    def gradient(self, theta: Pairs) -> Pairs:
        """``∇L(θ)``."""
        e = self.collected_residual(theta)
        mean = self.policy(theta) * self._total(e)[..., self.state]
        return 2 * torch.where(self.layer == 0, e, e - mean)

    # -- matrices, for few pairs --------------------------------------------------------------------------------------

    @property
    def visits(self) -> Float[Tensor, "trajectories pairs"]:
        """``φ(τ) = Σ_h e_(h,s_h,a_h)``."""
        table = torch.zeros(len(self.pair), len(self.state), dtype=torch.float64)
        return table.scatter(-1, self.pair, 1.0)

    @property
    def moments(self) -> Float[Tensor, "... pairs pairs"]:
        """``M = E[φφᵀ]``."""
        visits = self.visits
        return visits.T @ (self.weights.unsqueeze(-1) * visits)

    def residual_derivative(self, theta: Pairs) -> Float[Tensor, "... trajectories pairs"]:
        """``∇f_θ(τ)``: the pairs visited, less ``π_θ`` in every state visited after the first layer."""
        visits = self.visits
        occupied = torch.zeros(len(visits), self.states, dtype=torch.float64).index_add(-1, self.state, visits)
        later = torch.where(self.layer == 0, 0.0, self.policy(theta))
        return visits - occupied[:, self.state] * later.unsqueeze(-2)

    def hessian(self, theta: Pairs) -> Float[Tensor, "... pairs pairs"]:
        """``∇²L(θ)``."""
        derivative, policy = self.residual_derivative(theta), self.policy(theta)
        e = torch.where(self.layer == 0, 0.0, self._total(self.collected_residual(theta))[..., self.state])
        same = (self.state.unsqueeze(-1) == self.state).to(torch.float64)
        bend = torch.diag_embed(policy) - policy.unsqueeze(-1) * policy.unsqueeze(-2) * same
        return 2 * (derivative.mT @ (self.weights.unsqueeze(-1) * derivative) - e.unsqueeze(-1) * bend)

    # -- sums ---------------------------------------------------------------------------------------------------------

    def _collected(self, amounts: PerTrajectory) -> Pairs:
        """``Σ_τ X(τ) φ(τ)``."""
        steps = amounts.unsqueeze(-1).expand(*amounts.shape, self.horizon).flatten(-2)
        return amounts.new_zeros(*amounts.shape[:-1], len(self.state)).index_add(-1, self.pair.flatten(), steps)

    def _total(self, amounts: Pairs) -> Float[Tensor, "... states"]:
        """The sum over the actions of every state."""
        return amounts.new_zeros(*amounts.shape[:-1], self.states).index_add(-1, self.state, amounts)

    def _largest(self, theta: Pairs) -> Pairs:
        """The largest logit of the state that a pair belongs to."""
        index = self.state.expand(theta.shape)
        top = theta.new_full((*theta.shape[:-1], self.states), -torch.inf).scatter_reduce(-1, index, theta, "amax")
        return top.gather(-1, index)


def flat(mdp: RegularizedMDP, tables: PerLayerStateAction) -> Pairs:
    """The entries of all existing actions side by side."""
    return side_by_side([table[..., valid] for table, valid in zip(tables, mdp.valid, strict=True)])


def tables(mdp: RegularizedMDP, theta: Pairs) -> PerLayerStateAction:
    """The inverse of :func:`flat`, ``-inf`` where the action does not exist."""
    layers, start = [], 0
    for valid in mdp.valid:
        count = int(valid.sum())
        empty = theta.new_full((*theta.shape[:-1], valid.numel()), -torch.inf)
        where = valid.flatten().nonzero().squeeze(-1)
        layers.append(empty.index_copy(-1, where, theta[..., start : start + count]).unflatten(-1, valid.shape))
        start += count
    return tuple(layers)
