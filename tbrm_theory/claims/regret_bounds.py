"""B4, B5, B7: from residuals to regret.

One side is ``bounds``, ``coverage`` and ``population``, by sweeps; the other lists trajectories: regrets as divergences of laws on
trajectories, residuals by their definition.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from tbrm_theory import bounds, coverage, population
from tbrm_theory.behaviours import Behaviour, FixedDataset, HistoryBehaviour, MarkovBehaviour, MixtureBehaviour
from tbrm_theory.claims import by_hand
from tbrm_theory.claims.cases import Case, case_of
from tbrm_theory.claims.comparison import Comparison
from tbrm_theory.claims.identities import deterministic
from tbrm_theory.claims.measure_change import MOST_PAIRS, few_pairs, few_trajectories, tree
from tbrm_theory.claims.registry import claim
from tbrm_theory.claims.residual_identities import terms
from tbrm_theory.mdp import RegularizedMDP

__all__ = ["bandit_of_theorem_2", "regret_by_hand"]


def regret_by_hand(case: Case) -> Tensor:
    """``β KL(P_{π_θ} ‖ P_{π*})`` over all trajectories (I3)."""
    log_law = case.listed.log_law(case.soft_policy)
    gap = case.listed.sum_along(case.soft_policy) - case.listed.sum_along(case.solution.log_policy)
    return case.mdp.beta * by_hand.expectation(log_law, gap)


def _size(case: Case) -> Tensor:
    """Of a regret and of a bound on it: the largest residual, value and logarithm of a trajectory."""
    optimal = by_hand.magnitude(case, [case.solution.q, case.solution.log_policy, case.soft_policy], [case.solution.v])
    return case.mdp.beta * (terms(case, case.logits) + optimal).amax(-1)


def _bound(case: Case, right: Tensor, left: Tensor | None = None, *, may_be_infinite: bool = False) -> Comparison:
    """A regret against what it is at most. An infinite bound says nothing, and fails unless the data omit something."""
    left = regret_by_hand(case) if left is None else left
    scale = _size(case) + torch.where(right < torch.inf, right, 0.0)
    if not may_be_infinite:
        right = torch.where(right < torch.inf, right, -torch.inf)
    return Comparison(left, right, scale, 4 * case.sweep + 4 * case.listing, "at most")


# -- B4 --------------------------------------------------------------------------------------------------------------


@claim("B4.a", source="own")
def corollary_4_is_an_equality(case: Case) -> Comparison:
    """β{E_{π*} Σ(T_β Q_θ - Q_θ) + E_{π_θ} Σ(Q_θ - T_β Q_θ)} = J* - J(π_θ) + β KL(P_{π*} ‖ P_{π_θ})

    Left: ``corollary4``, by sweeps. Right: both divergences over all trajectories. *Proof.* I4 for ``f = Q_θ``,
    ``π† = π*``, ``π = π_θ``: its last term is ``E_{π*} Σ [E_{π*}(Q_θ - log π*) - V_θ] = -E_{π*} Σ KL(π* ‖ π_θ)``, since
    ``Q_θ = V_θ + log π_θ``. ∎
    """
    star = case.solution.log_policy
    log_law = case.listed.log_law(star)
    gap = case.listed.sum_along(star) - case.listed.sum_along(case.soft_policy)
    right = regret_by_hand(case) + case.mdp.beta * by_hand.expectation(log_law, gap)
    left = bounds.corollary4(case.mdp, case.logits)
    return Comparison(left, right, case.mdp.horizon * _size(case), 4 * case.sweep + 2 * case.listing)


@claim("B4.b", source="[Y] Cor. 4")
def corollary_4(case: Case) -> Comparison:
    """J* - J(π_θ) ≤ β{E_{π*} Σ(T_β Q_θ - Q_θ) + E_{π_θ} Σ(Q_θ - T_β Q_θ)}

    Left: the regret over all trajectories. Right: ``corollary4``.
    """
    comparison = _bound(case, bounds.corollary4(case.mdp, case.logits))
    return replace(comparison, scale=case.mdp.horizon * comparison.scale)


# -- B5 --------------------------------------------------------------------------------------------------------------


@claim("B5.a", source="[Y] Thm 2", requires=[deterministic])
def theorem_2(case: Case) -> Comparison:
    """deterministic, Markov μ: J* - J(π_θ) ≤ β(√κ(π*,μ) + √κ(π_θ,μ)) √L_μ(θ)

    Left: the regret over all trajectories. Right: ``theorem2``. *Proof.* B4: the right side of Cor. 4 is
    ``β(E_{π_θ} f - E_{π*} f)`` on deterministic transitions, and each mean is at most ``√(κ L)``. ∎
    """
    return _bound(case, bounds.theorem2(case.mdp, case.logits, case.log_behaviour))


@claim("B5.b", source="own", requires=[deterministic])
def theorem_2_centred(case: Case) -> Comparison:
    """… and L_μ(θ) may be E Var_μ(f|s_1), with κ - 1 in place of κ

    Left: the regret over all trajectories. Right: ``theorem2_centred``, whose docstring has the proof.
    """
    return _bound(case, bounds.theorem2_centred(case.mdp, case.logits, case.log_behaviour))


@claim("B5.c", source="own", requires=[deterministic, few_pairs, few_trajectories])
def theorem_2_for_any_data(case: Case) -> Comparison:
    """… and with the exact κ it holds for data that are not Markov

    Left: the regret. Right: ``theorem2`` for a mixture drawn once per episode, data with a memory, and a file of
    trajectories, by turns. *Proof.* κ is a supremum over ``f``, whatever ``μ`` is. ∎
    """
    one, data = replace(case, logits=tuple(table[:1] for table in case.logits)), other_data(case)
    omits = bool((data.log_law(case.mdp, case.listed) == -torch.inf).any())
    return _bound(one, bounds.theorem2(case.mdp, one.logits, data), may_be_infinite=omits)


def other_data(case: Case) -> Behaviour:
    """Data that are no Markov policy's, of a kind that the seed picks."""
    first, second = ([table[i] for table in case.log_behaviour] for i in range(2))
    if case.seed % 3 == 0:
        return MixtureBehaviour((0.3, 0.7), (tuple(first), tuple(second)))
    if case.seed % 3 == 1:
        return HistoryBehaviour(tuple(first), repeat=0.4)
    generator = torch.Generator().manual_seed(case.seed)
    return FixedDataset(MarkovBehaviour(tuple(first)).sample(case.mdp, 3 * len(case.listed.states), generator))


RARE = 1e-7
"""``K``, and ``√m/K``, of the bandit below."""


def bandit_of_theorem_2(largest: float) -> Case:
    """Two arms, ``β = 1``, ``f = (F, 0)``, ``π*(1) ∝ K e^{-F}``, ``μ(1) ∝ m``, with ``K = √m/K = 1e-7``; ``F`` is given (B5)."""
    both = torch.tensor([[np.log(RARE) - largest, 0.0], [4 * np.log(RARE), 0.0]], dtype=torch.float64)
    log_star, log_mu = torch.log_softmax(both, dim=-1).unsqueeze(1)
    mdp = RegularizedMDP(
        beta=1.0,
        initial=torch.ones(1),
        reward=[log_star - np.log(0.5)],  # so that R_β = log π* and V* = 0
        reference=[torch.full((1, 2), 0.5)],
        transitions=[],
    )
    f = torch.tensor([[largest, 0.0]], dtype=torch.float64)
    return replace(case_of(mdp, "bandit", 0), logits=(log_star + f,), log_behaviour=(log_mu,))


def _bandit(seed: int) -> Case:
    return replace(bandit_of_theorem_2(2 + 0.5 * (seed % 200)), seed=seed)


@claim("B5.d", source="own", problem=_bandit)
def theorem_2_is_sharp(case: Case) -> Comparison:
    """no smaller constant serves in Theorem 2: on a bandit left/right ≥ 1 - 1/F - (K + √m/K + e^{-F})

    with ``F = max|f|`` from 2 to 100. Left: that number. Right: the regret over all trajectories, over ``theorem2``.
    *Proof.* With ``p = π_θ(1) ≈ K`` the regret is ``pF - log Z``, ``Z = 1 + K(1 - e^{-F})`` up to ``K²``, hence
    ``K(F - 1)``; in the bound ``√(κ(π_θ) L) = pF`` and ``√(κ(π*) L)`` is smaller by the factor ``max(e^{-F}, √m/K)``. ∎
    """
    largest = by_hand.residual(case, case.logits).amax(-1)
    left = 1 - 1 / largest - (2 * RARE + (-largest).exp())
    regret = regret_by_hand(case)
    right = regret / bounds.theorem2(case.mdp, case.logits, case.log_behaviour)
    return Comparison(left, right, _size(case) / regret, 4 * case.sweep + 4 * case.listing, "at most")


# -- B7 --------------------------------------------------------------------------------------------------------------

PANEL, NODES = 2.0, 12
"""Gauss-Legendre nodes on panels of [0, 1] that are so short that ``t (max f - min f)`` changes by at most ``PANEL``.

``log E e^{t f}`` is analytic as far as ``π / (max f - min f)`` from the real axis, π panels' half-widths away, so 12 nodes leave a
relative error below ``(π + √(π² + 1))^{-24} < 1e-19``.
"""
MOST_PANELS = 20
"""Beyond this a case is refused, to save time."""


def moderate_residuals(case: Case) -> str | None:
    """Few nodes, and small tables at each."""
    if sum(table.numel() for table in case.mdp.reference) > MOST_PAIRS:
        return f"more than {MOST_PAIRS} pairs"
    return None if _spread(case) <= PANEL * MOST_PANELS else f"residuals further than {PANEL * MOST_PANELS:g} apart"


def _spread(case: Case) -> float:
    f = by_hand.residual(case, case.logits)
    return (f.amax(-1) - f.amin(-1)).max().item()


@lru_cache(maxsize=1)
def _path(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes ``t`` and weights of the quadrature on [0, 1], and ``E Var_{P_t}(f|s_1)`` at each, by sweeps: ``(nodes, draws)``."""
    panels = max(1, int(np.ceil(_spread(case) / PANEL)))
    x, w = np.polynomial.legendre.leggauss(NODES)
    nodes = (np.arange(panels)[:, None] + (x + 1) / 2) / panels
    t, weights = torch.tensor(nodes.flatten()), torch.tensor(np.tile(w / 2 / panels, panels))
    path = bounds.path_policy(case.mdp, case.logits, t, solution=case.solution)
    moments = population.additive_moments(case.mdp, population.residual_terms(case.mdp, case.logits), path)
    return t, weights, (case.mdp.initial * moments.variance).sum(-1)


@claim("B7.a", source="own", requires=[deterministic, moderate_residuals])
def regret_along_the_path(case: Case) -> Comparison:
    """deterministic: J* - J(π_θ) = β ∫_0^1 t E Var_{P_t}(f_θ|s_1) dt

    along ``P_t ∝ P_{π*} e^{t f_θ}``. Left: the regret over all trajectories. Right: ``additive_moments`` under
    ``path_policy`` at Gauss-Legendre nodes. *Proof.* ``K(t) = KL(P_t ‖ P_{π*}) = t E_t f - log E_{π*} e^{t f}`` given
    ``s_1`` has ``K'(t) = t Var_{P_t}(f)``, the derivative of ``E_t f`` being the variance; ``K(0) = 0``, and ``β E_ρ K(1)``
    is the regret (I3, I6). ∎
    """
    t, weights, variance = _path(case)
    right = case.mdp.beta * ((weights * t).unsqueeze(-1) * variance).sum(0)
    scale = _size(case) * (1 + terms(case, case.logits).amax(-1))
    return Comparison(regret_by_hand(case), right, scale, 4 * case.sweep + case.listing + len(t))


@claim("B7.b", source="own", requires=[deterministic, moderate_residuals])
def fast_rate_of_variances(case: Case) -> Comparison:
    """deterministic: J* - J(π_θ) ≤ (β/2) sup_t E Var_{P_t}(f_θ|s_1)

    Left: the regret over all trajectories. Right: the largest variance at the nodes of B7.a, whose weights ``w t`` sum to
    1/2. *Proof.* B7.a. ∎
    """
    _, _, variance = _path(case)
    scale = terms(case, case.logits).amax(-1)
    comparison = _bound(case, case.mdp.beta / 2 * variance.amax(0))
    return replace(comparison, scale=comparison.scale * (1 + scale))


@claim("B7.c", source="own", requires=[deterministic, few_pairs])
def variances_by_the_second_moment(case: Case) -> Comparison:
    """deterministic: E Var_{P_t}(f_θ|s_1) ≤ Λ(π_t,μ) E Var_μ(f_θ|s_1) for t in [0, 1], any μ

    Left: the variance by sweeps at t = 0, ¼, …, 1. Right: ``second_moment`` times the variance over all trajectories. *Proof.* With
    ``c(s_1) = E_μ[f|s_1]``, ``E Var_{P_t}(f|s_1) ≤ E_{P_t}(f - c)² ≤ Λ E_μ(f - c)²``, since ``f - c`` is additive. ∎
    """
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    path = bounds.path_policy(case.mdp, case.logits, t, solution=case.solution)
    moments = population.additive_moments(case.mdp, population.residual_terms(case.mdp, case.logits), path)
    left = (case.mdp.initial * moments.variance).sum(-1)
    log_law, f = case.listed.log_law(case.log_behaviour), by_hand.residual(case, case.logits)
    mean = by_hand.mean_by_start(case, log_law, f)[..., case.listed.states[:, 0]]
    variance = by_hand.expectation(log_law, (f - mean).square())
    right = coverage.second_moment(case.mdp, path, case.log_behaviour) * variance
    scale = right * case.mdp.horizon + terms(case, case.logits).amax(-1).square()  # H: the condition of M_μ
    return Comparison(left, right, scale, 4 * case.sweep + 2 * case.listing, "at most")


@claim("B7.d", source="own", requires=[deterministic, moderate_residuals])
def fast_rate(case: Case) -> Comparison:
    """deterministic, Markov μ: J* - J(π_θ) ≤ (β/2) H sup_t C_∞(π_t,μ) L_μ(θ)

    linear in the loss where Theorem 2 has its root. Left: the regret over all trajectories. Right: ``c_inf`` at the nodes
    of B7.a times ``population_loss``. *Proof.* B7.b, B7.c, B3. ∎
    """
    return _bound(case, case.mdp.horizon * _fast(case))


@claim("B7.e", source="own", requires=[tree, moderate_residuals])
def fast_rate_on_trees(case: Case) -> Comparison:
    """token trees: J* - J(π_θ) ≤ (β/2) sup_t C_∞(π_t,μ) L_μ(θ), without H

    Sides as in B7.d. *Proof.* B7.b, B7.c, and ``Λ = C_∞`` (B3). ∎
    """
    return _bound(case, _fast(case))


def _fast(case: Case) -> Tensor:
    t, _, _ = _path(case)
    path = bounds.path_policy(case.mdp, case.logits, t, solution=case.solution)
    worst = coverage.c_inf(case.mdp, path, case.log_behaviour).amax(0)
    return case.mdp.beta / 2 * worst * population.population_loss(case.mdp, case.logits, case.log_behaviour)
