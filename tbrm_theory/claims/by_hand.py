"""The other side of the claims: sums over listed trajectories and over the edges of kernels.

Written from the definitions of theory.md §0, and apart from ``Enumeration`` and ``edges`` it shares no code with the solver, the
occupancies, the scores and the losses that it is compared with. A batch dimension, if any, comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tbrm_theory.claims.cases import Case
from tbrm_theory.shapes import PerLayerState, PerLayerStateAction, StateActionTable, StateTable
from tbrm_theory.tables import side_by_side

__all__ = [
    "backup",
    "entropic_values",
    "existing",
    "expectation",
    "largest_mean_square",
    "largest_second_moment",
    "log_sum_by_start",
    "log_sum_exp",
    "magnitude",
    "mean_by_start",
    "residual",
    "return_in_beta",
    "second_moments",
    "size",
    "successor_variance",
    "sum_over_states",
    "values",
    "visited",
]

PerTrajectory = Float[Tensor, "... trajectories"]


def log_sum_exp(table: StateActionTable) -> StateTable:
    """``log Σ_a exp table(s,a)``, ``-inf`` entries adding nothing."""
    top = table.amax(-1, keepdim=True)
    return (top + (table - top).exp().sum(-1, keepdim=True).log()).squeeze(-1)


def values(logits: PerLayerStateAction) -> PerLayerState:
    """``V_Q(s)`` of every layer."""
    return tuple(log_sum_exp(table) for table in logits)


def entropic_values(f: PerLayerStateAction, log_policy: PerLayerStateAction) -> PerLayerState:
    """``E_{a~π}[f(s,a) - log π(a|s)]`` of every layer, ``0 log 0 = 0``."""
    return tuple(
        torch.where(log > -torch.inf, log.exp() * (table - log), 0.0).sum(-1)
        for table, log in zip(f, log_policy, strict=True)
    )


def backup(case: Case, v: PerLayerState) -> PerLayerStateAction:
    """``R_β(s,a) + Σ_{s'} P(s'|s,a) v(s')``, and ``R_β`` in the last layer."""
    rewards = case.mdp.regularized_reward
    following = []
    for kernel, value in zip(case.mdp.transitions, v[1:], strict=True):
        successors, probability = kernel.edges()
        following.append((probability * value[..., successors]).sum(-1))
    return (*(reward + after for reward, after in zip(rewards, following, strict=False)), rewards[-1])


def successor_variance(case: Case, v: PerLayerState) -> PerLayerStateAction:
    """``Var[v(s_{h+1}) | s_h, a_h]``, 0 in the last layer."""
    spread = []
    for kernel, value in zip(case.mdp.transitions, v[1:], strict=True):
        successors, probability = kernel.edges()
        reached = value[..., successors]
        mean = (probability * reached).sum(-1, keepdim=True)
        spread.append((probability * (reached - mean) ** 2).sum(-1))
    return (*spread, torch.zeros_like(case.mdp.reference[-1]))


# -- along trajectories --------------------------------------------------------------------------------------------


def sum_over_states(case: Case, v: PerLayerState, *, first: int = 0) -> PerTrajectory:
    """``Σ_{h ≥ first} v_h(s_h)`` of every trajectory; layers count from 0."""
    states = case.listed.states
    total = torch.zeros(len(states), dtype=torch.float64)
    for h in range(first, case.mdp.horizon):
        total = total + v[h][..., states[:, h]]
    return total


def residual(case: Case, logits: PerLayerStateAction) -> PerTrajectory:
    """``f_θ(τ) = Σ_h [logit_θ(s_h,a_h) - R_β(s_h,a_h) - V_θ(s_{h+1})]``, the definition."""
    listed = case.listed
    later_values = sum_over_states(case, values(logits), first=1)
    return listed.sum_along(logits) - listed.sum_along(case.mdp.regularized_reward) - later_values


def return_in_beta(case: Case) -> PerTrajectory:
    """``r(τ)/β``."""
    return case.listed.sum_along(case.mdp.reward) / case.mdp.beta


def existing(case: Case, tables: PerLayerStateAction) -> Float[Tensor, "... cells"]:
    """The entries of all existing actions side by side; the others are ``-inf`` by convention on every side."""
    return side_by_side([table[..., valid] for table, valid in zip(tables, case.mdp.valid, strict=True)])


# -- over trajectories ---------------------------------------------------------------------------------------------


def expectation(log_law: PerTrajectory, amounts: PerTrajectory) -> Float[Tensor, "..."]:
    """``Σ_τ P(τ) X(τ)``; a trajectory of probability 0 adds nothing, whatever its ``X``."""
    possible = log_law > -torch.inf
    return torch.where(possible, log_law.exp() * torch.where(possible, amounts, 0.0), 0.0).sum(-1)


def mean_by_start(case: Case, log_law: PerTrajectory, amounts: PerTrajectory) -> StateTable:
    """``E[X | s_1]`` for every first state of positive probability, 0 for the others."""
    start = case.listed.states[:, 0]
    weighted = log_law.exp() * amounts
    total = weighted.new_zeros(*weighted.shape[:-1], len(case.mdp.initial)).index_add(-1, start, weighted)
    return torch.where(case.mdp.initial > 0, total / case.mdp.initial, 0.0)


def log_sum_by_start(case: Case, exponents: PerTrajectory) -> StateTable:
    """``log Σ_{τ from s_1} exp X(τ)``, ``-inf`` for a first state of probability 0."""
    start, states = case.listed.states[:, 0], len(case.mdp.initial)
    batch = exponents.shape[:-1]
    index = start.expand(*batch, len(start))
    top = exponents.new_full((*batch, states), -torch.inf).scatter_reduce(-1, index, exponents, "amax")
    total = exponents.new_zeros(*batch, states).index_add(-1, start, (exponents - top[..., start]).exp())
    return torch.where(total > 0, top, 0.0) + total.log()


# -- quadratic forms over trajectories -----------------------------------------------------------------------------


@lru_cache(maxsize=1)
def visited(case: Case) -> tuple[Int[Tensor, "trajectories horizon"], Int[Tensor, " pairs"]]:
    """The pairs ``(h, s, a)`` that some trajectory has, numbered: which ones each trajectory has, and all of them."""
    sizes = torch.tensor([table.numel() for table in case.mdp.reference])
    widths = torch.tensor([table.shape[-1] for table in case.mdp.reference])
    cells = sizes.cumsum(0) - sizes + case.listed.states * widths + case.listed.actions
    found, number = cells.unique(return_inverse=True)
    return number, found


def second_moments(case: Case, law: PerTrajectory) -> Float[Tensor, "... pairs pairs"]:
    """``E[φφᵀ]`` over the visited pairs: how likely a trajectory has both."""
    number, found = visited(case)
    both = (number.unsqueeze(-1) * len(found) + number.unsqueeze(-2)).flatten()
    weight = law.unsqueeze(-1).expand(*law.shape, case.mdp.horizon**2).flatten(-2)
    total = law.new_zeros(*law.shape[:-1], len(found) ** 2).index_add(-1, both, weight)
    return total.unflatten(-1, (len(found), len(found)))


def largest_mean_square(
    case: Case, log_pi: PerLayerStateAction, log_mu: PerLayerStateAction
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """``vᵀ M⁺ v``, ``v = E_π φ``, ``M = E_μ[φφᵀ]``, and the condition number of ``M`` scaled to unit diagonal, off its null space."""
    root, values, vectors = _whitened(case, log_mu)
    number, found = visited(case)
    law = case.listed.log_law(log_pi).exp()
    weight = law.unsqueeze(-1).expand(*law.shape, case.mdp.horizon).flatten(-2)
    v = law.new_zeros(*law.shape[:-1], len(found)).index_add(-1, number.flatten(), weight) / root
    along = (vectors.transpose(-1, -2) @ v.unsqueeze(-1)).squeeze(-1)
    return (along.square() / values).sum(-1), _condition(values)


def largest_second_moment(
    case: Case, log_pi: PerLayerStateAction, log_mu: PerLayerStateAction
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """The largest ``λ`` with ``M_π f = λ M_μ f``, off the null space of ``M_μ``, and the condition number as above."""
    root, values, vectors = _whitened(case, log_mu)
    matrix = second_moments(case, case.listed.log_law(log_pi).exp())
    whitening = vectors / (root.unsqueeze(-1) * values.sqrt().unsqueeze(-2))
    inner = whitening.transpose(-1, -2) @ matrix @ whitening
    return torch.linalg.eigvalsh(inner)[..., -1], _condition(values)


def _whitened(case: Case, log_mu: PerLayerStateAction) -> tuple[Tensor, Tensor, Tensor]:
    """Roots of the masses under μ; eigenvalues, those of the null space ``inf``, and eigenvectors of ``M`` with unit diagonal."""
    matrix = second_moments(case, case.listed.log_law(log_mu).exp())
    root = matrix.diagonal(dim1=-2, dim2=-1).sqrt()
    values, vectors = torch.linalg.eigh(matrix / (root.unsqueeze(-1) * root.unsqueeze(-2)))
    return root, torch.where(values > 1e-11, values, torch.inf), vectors


def _condition(values: Tensor) -> Tensor:
    return torch.where(values < torch.inf, values, 0.0).amax(-1) / values.amin(-1)


# -- how large the terms are (see ``comparison``) ------------------------------------------------------------------


def magnitude(case: Case, pairs: Sequence[PerLayerStateAction], states: Sequence[PerLayerState] = ()) -> PerTrajectory:
    """``1 + Σ_h Σ |table_h|`` along every trajectory, over tables of pairs and of states; ``log 0`` does not count."""

    def absolute(layer: Tensor) -> Tensor:
        return torch.where(layer.isinf(), 0.0, layer.abs())

    total = torch.ones(len(case.listed.states), dtype=torch.float64)
    for tables in pairs:
        total = total + case.listed.sum_along(tuple(absolute(layer) for layer in tables))
    for values_of_states in states:
        total = total + sum_over_states(case, tuple(absolute(layer) for layer in values_of_states))
    return total


def size(log_law: PerTrajectory, magnitudes: PerTrajectory) -> Float[Tensor, "..."]:
    """``E[(1 + |log P(τ)|) X(τ)]``: what an expectation of terms of size ``X`` is relative to."""
    possible = torch.where(log_law > -torch.inf, log_law, 0.0)
    return expectation(log_law, (1 + possible.abs()) * magnitudes)
