"""O5: linear classes need little of the data: κ and Λ restricted to their residuals.

One side is ``feature_coverage``, by sweeps; the other lists trajectories.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tbrm_theory import bounds, coverage, feature_coverage, population
from tbrm_theory.claims import by_hand
from tbrm_theory.claims.cases import Case
from tbrm_theory.claims.comparison import Comparison
from tbrm_theory.claims.identities import deterministic
from tbrm_theory.claims.own import holes
from tbrm_theory.claims.registry import claim
from tbrm_theory.claims.residual_identities import residuals, tbrm
from tbrm_theory.dynamic_programming import soft_policy
from tbrm_theory.random_tables import seeded
from tbrm_theory.shapes import PerLayerStateAction

__all__ = ["LinearClass", "linear_class"]

FEATURES = 2


@dataclass(frozen=True, eq=False)
class Data:
    """What one policy's data see of the class, over all trajectories."""

    second: Tensor
    """``E_μ[ΨΨᵀ]``."""
    condition: Tensor
    """How much rounding is amplified: by the eigenvalues of ``second`` with unit diagonal, off its null space, and by how far the
    terms of ``Ψ`` cancel."""


@dataclass(frozen=True, eq=False)
class LinearClass:
    """Random features and weights, and data that omit actions."""

    features: feature_coverage.Features
    weights: Tensor
    logits: PerLayerStateAction
    log_mu: PerLayerStateAction
    of_trajectory: Tensor
    """``Ψ(τ)``, ``(k, trajectories)``."""
    data: Data


def _data(case: Case, log_mu: PerLayerStateAction, features: feature_coverage.Features) -> Data:
    law = case.listed.log_law(log_mu).exp()
    of_trajectory = case.listed.sum_along(features)
    second = (law * of_trajectory) @ of_trajectory.mT
    root = torch.where(second.diagonal() > 0, second.diagonal(), 1.0).sqrt()
    values = torch.linalg.eigvalsh(second / torch.outer(root, root))
    terms = (law * case.listed.sum_along(tuple(table.abs() for table in features)).square()).sum(-1)
    inside = values[values > 1e-10]
    smallest = inside.amin() if len(inside) == len(values) else torch.zeros(())
    return Data(second, (terms / root.square()).amax() / smallest)


def linear_class(case: Case) -> LinearClass:
    generator = seeded(case.seed)
    features = tuple(
        torch.where(valid, torch.randn(FEATURES, *valid.shape, generator=generator, dtype=torch.float64), 0.0)
        for valid in case.mdp.valid
    )
    weights = torch.randn(FEATURES, generator=generator, dtype=torch.float64)
    log_mu = tuple(log[1] for log in case.other_policy)
    of_trajectory = case.listed.sum_along(features)
    logits = feature_coverage.class_logits(case.mdp, features, weights)
    return LinearClass(features, weights, logits, log_mu, of_trajectory, _data(case, log_mu, features))


def identified(case: Case) -> str | None:
    """The data see every direction of the class, well enough for float64."""
    if len(case.listed.states) < FEATURES:
        return "fewer trajectories than features"
    return None if linear_class(case).data.condition < 1e6 else "the data do not determine the weights"


def seen_in_full(case: Case) -> str | None:
    """The same of data with full support."""
    features, mu = linear_class(case).features, tuple(table[0] for table in case.log_behaviour)
    return None if _data(case, mu, features).condition < 1e6 else "the trajectories do not determine the weights"


@claim("O5.a", source="own", requires=[deterministic])
def residual_of_a_linear_class(case: Case) -> Comparison:
    """deterministic, θ_w the soft plan of R_β + w·ψ: f_θ(τ) = w·Ψ(τ)

    Left: ``tbrm_residual``. Right: the features along every trajectory. *Proof.* I14.a: ``V_θ(s_1) + log π_θ(τ) = Σ_h (R_β + w·ψ)``. ∎
    """
    chosen = linear_class(case)
    return residuals(case, tbrm(case, chosen.logits), chosen.weights @ chosen.of_trajectory, chosen.logits)


@claim("O5.b", source="own", requires=[holes, identified])
def kappa_of_a_linear_class(case: Case) -> Comparison:
    """κ_Ψ = (E_π Ψ)ᵀ (E_μ ΨΨᵀ)⁻¹ E_π Ψ, finite where μ omits actions and κ = ∞

    Left: ``class_kappa``, by sweeps, for the reference policy. Right: a solve with expectations over all trajectories. *Proof.*
    Cauchy-Schwarz in the inner product ``E_μ[(w·Ψ)(w'·Ψ)]``. ∎
    """
    chosen = linear_class(case)
    left = feature_coverage.class_kappa(case.mdp, case.mdp.log_reference, chosen.log_mu, chosen.features)
    law = case.listed.log_law(case.mdp.log_reference)
    mean = by_hand.expectation(law, chosen.of_trajectory)
    right = mean @ torch.linalg.solve(chosen.data.second, mean)
    terms = case.listed.sum_along(tuple(table.abs() for table in chosen.features))
    size = by_hand.size(law, terms) / chosen.data.second.diagonal().sqrt()
    scale = size.square().sum() * chosen.data.condition
    return Comparison(left, right, scale, 2 * case.sweep + case.listing)


@claim("O5.c", source="own", requires=[deterministic, holes, identified])
def theorem_2_of_a_linear_class(case: Case) -> Comparison:
    """deterministic: J* - J(π_θ) ≤ β(√κ_Ψ(π*,μ) + √κ_Ψ(π_θ,μ)) √L_μ(θ), for the soft plans of R_β + w·ψ

    for data that omit actions. Left: the regret over all trajectories. Right: ``class_kappa`` and ``population_loss``. *Proof.* B4:
    the regret is at most ``β(E_{π_θ} f - E_{π*} f)``, and ``f = w·Ψ`` (O5.a), so each mean is at most ``√(κ_Ψ L)``. ∎
    """
    chosen = linear_class(case)
    policy = tuple(soft_policy(table) for table in chosen.logits)
    law = case.listed.log_law(policy)
    gap = case.listed.sum_along(policy) - case.listed.sum_along(case.solution.log_policy)
    left = case.mdp.beta * by_hand.expectation(law, gap)
    roots = [
        feature_coverage.class_kappa(case.mdp, pi, chosen.log_mu, chosen.features).sqrt()
        for pi in (case.solution.log_policy, policy)
    ]
    loss = population.population_loss(case.mdp, chosen.logits, chosen.log_mu)
    right = case.mdp.beta * (roots[0] + roots[1]) * loss.sqrt()
    tables = [case.solution.q, case.solution.log_policy, chosen.logits, policy]
    size = case.mdp.beta * by_hand.magnitude(case, tables, [case.solution.v]).amax()
    finite = torch.where(right < torch.inf, right, -torch.inf)  # an infinite one fails
    return Comparison(left, finite, size + right, 4 * case.sweep + 4 * case.listing, "at most")


@claim("O5.d", source="own", requires=[deterministic, holes, identified])
def variances_of_a_linear_class(case: Case) -> Comparison:
    """deterministic: E Var_{P_t}(f_θ|s_1) ≤ Λ_Ψ(π_t,μ) L_μ(θ), so the regret is at most (β/2) sup_t Λ_Ψ(π_t,μ) L_μ(θ)

    Left: the variance by sweeps at t = 0, ½, 1 along B7's path. Right: ``class_second_moment`` times the loss over all trajectories.
    *Proof.* ``E Var_{P_t}(f|s_1) ≤ E_{P_t} f² ≤ Λ_Ψ E_μ f²``, ``f = w·Ψ``; then B7. ∎
    """
    chosen = linear_class(case)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    path = bounds.path_policy(case.mdp, chosen.logits, t, solution=case.solution)
    terms = population.residual_terms(case.mdp, chosen.logits)
    left = (case.mdp.initial * population.additive_moments(case.mdp, terms, path).variance).sum(-1)
    worst = [
        feature_coverage.class_second_moment(case.mdp, tuple(p[i] for p in path), chosen.log_mu, chosen.features)
        for i in range(len(t))
    ]
    law = case.listed.log_law(chosen.log_mu)
    loss = by_hand.expectation(law, (chosen.weights @ chosen.of_trajectory).square())
    right = torch.stack(worst) * loss
    finite = torch.where(right < torch.inf, right, -torch.inf)
    scale = right * chosen.data.condition + by_hand.magnitude(case, [terms]).amax().square()
    return Comparison(left, finite, scale, 4 * case.sweep + 2 * case.listing, "at most")


@claim("O5.e", source="own", requires=[seen_in_full])
def class_coefficients_are_smaller(case: Case) -> Comparison:
    """κ_Ψ ≤ κ and Λ_Ψ ≤ H C_∞ for Markov μ

    Left: ``class_kappa`` and ``class_second_moment``, for data of full support. Right: ``kappa_closed_form``, and H
    ``c_inf``. *Proof.* The class is a part of the additive functions; B3. ∎
    """
    chosen = linear_class(case)
    pi, mu = (tuple(table[0] for table in tables) for tables in (case.log_policy, case.log_behaviour))
    left = [
        feature_coverage.class_kappa(case.mdp, pi, mu, chosen.features),
        feature_coverage.class_second_moment(case.mdp, pi, mu, chosen.features),
    ]
    right = [coverage.kappa_closed_form(case.mdp, pi, mu), case.mdp.horizon * coverage.c_inf(case.mdp, pi, mu)]
    scale = torch.stack(right) * _data(case, mu, chosen.features).condition
    return Comparison(torch.stack(left), torch.stack(right), scale, 4 * case.sweep + case.listing, "at most")
