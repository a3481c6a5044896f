"""I14: on deterministic transitions tabular TBRM is linear least squares of returns on additive functions.

One side is ``soft_plan`` and ``least_squares_plan``; the other a dense least-squares fit of all trajectories by NumPy, and the
definition of the residual.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tbrm_theory import objectives, optimisers, population
from tbrm_theory.claims import by_hand
from tbrm_theory.claims.cases import Case
from tbrm_theory.claims.comparison import Comparison
from tbrm_theory.claims.identities import deterministic
from tbrm_theory.claims.measure_change import few_pairs, few_trajectories
from tbrm_theory.claims.registry import claim
from tbrm_theory.claims.residual_identities import terms
from tbrm_theory.shapes import PerLayerStateAction

__all__ = ["NoisyReturns", "noisy_returns"]


@claim("I14.a", source="own", requires=[deterministic])
def plans_are_additive(case: Case) -> Comparison:
    """deterministic: V_θ(s_1) + log π_θ(τ) = Σ_h g_h(s_h,a_h) for θ = the soft plan of g

    Left: value and log-policy of ``soft_plan``, ``g`` random. Right: ``g`` along every trajectory. *Proof.* The logit is
    ``g_h + V_{h+1}(s')``, so ``log π_θ = g_h + V_{h+1}(s_{h+1}) - V_h(s_h)``; the values telescope and ``V`` is 0 after
    the last layer. ∎
    """
    return _additive(case, population.soft_plan(case.mdp, case.additive), case.listed.sum_along(case.additive))


@claim("I14.b", source="own", requires=[deterministic])
def logits_are_plans(case: Case) -> Comparison:
    """deterministic: every V_θ(s_1) + log π_θ(τ) is Σ_h g_h, by g_1 = logit_θ and g_h = log π_θ later

    whose soft plan has the policy of ``θ`` and its first values. Left: value and log-policy of ``soft_plan`` of that
    ``g``. Right: those of ``θ``. *Proof.* I5, and I14.a. ∎
    """
    g = (case.logits[0], *case.soft_policy[1:])
    return _additive(case, population.soft_plan(case.mdp, g), _value_and_policy(case, case.logits))


def _value_and_policy(case: Case, logits: PerLayerStateAction) -> Tensor:
    """``V_θ(s_1) + log π_θ(τ)`` on every trajectory."""
    return case.listed.sum_along(logits) - by_hand.sum_over_states(case, by_hand.values(logits), first=1)


def _additive(case: Case, plan: PerLayerStateAction, right: Tensor) -> Comparison:
    values = by_hand.values(plan)
    scale = by_hand.magnitude(case, [plan, case.logits, case.additive], [values, by_hand.values(case.logits)])
    return Comparison(_value_and_policy(case, plan), right, scale, 4 * case.sweep)


# -- least squares ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class NoisyReturns:
    """Every trajectory with a weight, some with none, and a return that is no sum of rewards."""

    objective: objectives.SampleObjective
    weights: Tensor
    target: Tensor
    """``y/β + log π_ref(τ)``."""


def noisy_returns(case: Case) -> NoisyReturns:
    """Data of a case: partial, weighted, with noise of standard deviation β on every return."""
    generator = torch.Generator().manual_seed(case.seed)
    count = len(case.listed.states)
    noise = torch.randn(count, generator=generator, dtype=torch.float64)
    weights = torch.rand(count, generator=generator, dtype=torch.float64)
    weights = torch.where(weights < 0.3, 0.0, weights)
    weights[0] += 0.1
    weights = weights / weights.sum()
    target = by_hand.return_in_beta(case) + noise
    objective = objectives.SampleObjective(case.mdp, case.trajectories, weights, case.mdp.beta * target)
    return NoisyReturns(objective, weights, target + case.listed.sum_along(case.mdp.log_reference))


@claim("I14.c", source="own", requires=[deterministic, few_pairs, few_trajectories])
def tbrm_is_least_squares(case: Case) -> Comparison:
    """deterministic, any data and returns: min_θ L(θ) = min_g Σ_τ w (y/β + log π_ref - Σ_h g_h)²

    Left: the loss of ``least_squares_plan``. Right: the residual of a dense fit. *Proof.* I14.a and I14.b:
    ``V_θ(s_1) + log π_θ`` ranges over exactly the additive functions. ∎
    """
    data = noisy_returns(case)
    fit = _fit(case, data)
    left = data.objective.loss(optimisers.least_squares_plan(data.objective))
    right = (data.weights * (data.target - fit).square()).sum(-1)
    return Comparison(left, right, _square_size(data), 4 * case.sweep + 2 * case.listing + _operations(case))


@claim("I14.d", source="own", requires=[deterministic, few_pairs, few_trajectories])
def least_squares_is_global(case: Case) -> Comparison:
    """… and it is a global minimum: L(θ) = min L + Σ_τ w (fit - V_θ - log π_θ)² for every θ

    Left: the loss of random ``θ``. Right: the dense fit's, and how far ``θ`` is from it. *Proof.* Pythagoras: the residual
    of the fit is orthogonal to additive functions, and ``V_θ(s_1) + log π_θ`` is one. ∎
    """
    data = noisy_returns(case)
    fit = _fit(case, data)
    least = (data.weights * (data.target - fit).square()).sum(-1)
    gap = fit - _value_and_policy(case, case.logits)
    right = least + (data.weights * gap.square()).sum(-1)
    scale = _square_size(data) + (data.weights * terms(case, case.logits).square()).sum(-1)
    operations = 4 * case.sweep + 2 * case.listing + _operations(case)
    return Comparison(data.objective.loss(case.logits), right, scale, operations)


def _fit(case: Case, data: NoisyReturns) -> Tensor:
    """The additive function closest to the target, on every trajectory."""
    number, found = by_hand.visited(case)
    design = np.zeros((len(case.listed.states), len(found)))
    np.put_along_axis(design, number.numpy(), 1.0, axis=1)
    root = data.weights.sqrt().numpy()
    weighted = root[:, None] * design
    scale = np.sqrt((weighted**2).sum(0))
    scale[scale == 0] = 1.0
    g = np.linalg.lstsq(weighted / scale, root * data.target.numpy(), rcond=1e-11)[0]
    return torch.from_numpy(design @ (g / scale))


def _square_size(data: NoisyReturns) -> Tensor:
    return 1 + (data.weights * data.target.square()).sum(-1)


def _operations(case: Case) -> int:
    """Of a least-squares fit: orthogonal transformations of as many columns as there are pairs, on each side."""
    return 2 * len(by_hand.visited(case)[1]) ** 2
