"""O3: what holds where the data omit actions, so that κ(π*,μ) = ∞ and Theorem 2 says nothing. O4: what a sample says of the regret.

One side is ``bounds`` and ``sample_bounds``; the other lists trajectories, or draws data sets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tbrm_theory import bounds, dynamic_programming, policy_class, sample_bounds
from tbrm_theory.claims import by_hand
from tbrm_theory.claims.cases import Case
from tbrm_theory.claims.comparison import EPSILON, Comparison
from tbrm_theory.claims.contrasts import noise_free_contrast, noise_free_contrast_case
from tbrm_theory.claims.finite_sample import failures
from tbrm_theory.claims.identities import deterministic
from tbrm_theory.claims.registry import claim
from tbrm_theory.shapes import PerLayerStateAction

__all__ = ["holes"]


def holes(case: Case) -> str | None:
    """The data leave out actions (theory.md X3)."""
    missing = [(log[1] == -torch.inf) & valid for log, valid in zip(case.other_policy, case.mdp.valid, strict=True)]
    return None if any(bool(table.any()) for table in missing) else "no action is left out"


def _on_support(case: Case) -> tuple[PerLayerStateAction, PerLayerStateAction, Tensor, Tensor]:
    """Data μ with holes, the policy that is the softmax over its actions, its regret, and ``E_ρ log 1/P_{π*}(E|s_1)``."""
    mu = tuple(log[1] for log in case.other_policy)
    masked = tuple(torch.where(log > -torch.inf, q, -torch.inf) for log, q in zip(mu, case.logits, strict=True))
    values = by_hand.values(masked)
    policy = tuple(q - v.unsqueeze(-1) for q, v in zip(masked, values, strict=True))
    listed, star = case.listed, case.solution.log_policy
    covered = listed.log_law(mu) > -torch.inf
    log_star = listed.sum_along(star)
    outside = by_hand.log_sum_by_start(case, torch.where(covered, log_star, -torch.inf))
    lost = -torch.where(case.mdp.initial > 0, case.mdp.initial * outside, 0.0).sum()
    return mu, policy, _inner_divergence(case, policy, star, outside), case.mdp.beta * lost


def _inner_divergence(case: Case, policy: PerLayerStateAction, star: PerLayerStateAction, outside: Tensor) -> Tensor:
    """``β KL(P_{π_θ} ‖ P_{π*}(·|E))`` over all trajectories."""
    log_law = case.listed.log_law(policy)
    conditional = case.listed.sum_along(star) - outside[case.listed.states[:, 0]]
    gap = torch.where(log_law > -torch.inf, case.listed.sum_along(policy), 0.0) - conditional
    return case.mdp.beta * by_hand.expectation(log_law, gap)


def _size(case: Case) -> Tensor:
    tables = [case.solution.q, case.solution.log_policy, case.mdp.log_reference, case.logits]
    reward = tuple(table / case.mdp.beta for table in case.mdp.reward)
    terms = by_hand.magnitude(case, [*tables, reward], [case.solution.v, by_hand.values(case.logits)])
    return case.mdp.beta * terms.amax(-1)


@claim("O3.a", source="own", requires=[deterministic, holes])
def regret_on_the_support(case: Case) -> Comparison:
    """π_θ on E, what μ covers: J* - J(π_θ) = β E_ρ log 1/P_{π*}(E|s_1) + β KL(P_{π_θ} ‖ P_{π*}(·|E))

    Left: ``regret``, by a sweep. Right: both terms over all trajectories. *Proof.* ``log P_{π*}(τ|s_1) = log P_{π*}(τ|E,s_1) +
    log P_{π*}(E|s_1)`` on ``E``; take the mean of ``β log P_{π_θ}/P_{π*}`` under ``π_θ`` (I3). ∎
    """
    _, policy, inner, lost = _on_support(case)
    left = dynamic_programming.regret(case.mdp, policy, solution=case.solution)
    return Comparison(left, lost + inner, case.mdp.horizon * _size(case), 4 * case.sweep + 2 * case.listing)


@claim("O3.b", source="own", requires=[deterministic, holes])
def theorem_2_on_the_support(case: Case) -> Comparison:
    """… and is at most β E_ρ log 1/P_{π*}(E|s_1) + β(√(κ(π*_E,μ) - 1) + √(κ(π_θ,μ) - 1)) √E Var_μ(f_θ|s_1)

    which is finite. Left: both terms of O3.a over all trajectories. Right: ``support_bound``, whose docstring has the proof.
    """
    mu, _, inner, lost = _on_support(case)
    bound = bounds.support_bound(case.mdp, case.logits, mu)
    right = torch.where(bound < torch.inf, bound, -torch.inf)  # an infinite one fails
    scale = case.mdp.horizon * (_size(case) + bound)
    return Comparison(lost + inner, right, scale, 8 * case.sweep + 2 * case.listing, "at most")


# -- O4 --------------------------------------------------------------------------------------------------------------


@claim("O4", source="own", problem=noise_free_contrast_case)
def regret_from_a_sample(case: Case) -> Comparison:
    """token trees: P(some θ with L_D = 0: J* - J(π_θ) > (β/4) max_π C_∞(π,μ) B² log(|Θ|/δ)/N) ≤ δ

    a rate of 1/N where Theorem 2 with B6 has 1/√N, and no smaller constant serves. Left: how often some member of a class that fits
    all N trajectories exceeds it, its regret by ``regret``. Right: ``δ``. *Proof.* By B7 the regret is at most ``(β/2) sup_t E
    Var_{P_t}(f|s_1)``. Given ``s_1`` a variance is at most ``(max f - min f)²/4 ≤ (max² + min²)/2``, and two of the trajectories from
    ``s_1`` have ``max² + min² ≤ E_μ[f²|s_1]/min μ(τ|s_1)``. On a tree ``1/min μ(τ|s_1)`` is ``max_π C_∞(π,μ)``, so the regret is at
    most ``(β/4) max C_∞ L_μ(θ)``; B6.d bounds ``L_μ(θ)``. The problems tried attain it up to the order of ``B²``. ∎
    """
    trial = noise_free_contrast(case.seed)
    policies = tuple(torch.log_softmax(table, dim=-1) for table in trial.logits)
    regret = dynamic_programming.regret(case.mdp, policies, solution=case.solution)
    rounding = (EPSILON * case.sweep * (1 + case.solution.scale.item())) ** 2
    empirical = torch.where(trial.empirical_loss <= rounding, 0.0, trial.empirical_loss)
    loss = sample_bounds.finite_sample_loss(empirical, **trial.setting, tilt=torch.inf)
    worst = policy_class.largest_c_inf(case.mdp, trial.log_behaviour)
    return failures(regret > case.mdp.beta / 4 * worst * loss)
