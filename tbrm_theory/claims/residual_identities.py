"""I5-I7: what the trajectory residual is, how far it is from the optimum, and where it vanishes.

One side is ``losses`` on the scores of all trajectories, or ``population`` by its backward sweeps; the other is ``by_hand``: the
definition of the residual, and sums over listed trajectories.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tbrm_theory import losses, population
from tbrm_theory.behaviours import HistoryBehaviour, MixtureBehaviour
from tbrm_theory.claims import by_hand
from tbrm_theory.claims.cases import Case
from tbrm_theory.claims.comparison import EPSILON, Comparison
from tbrm_theory.claims.identities import deterministic, stochastic
from tbrm_theory.claims.registry import claim
from tbrm_theory.shapes import PerLayerStateAction

__all__ = ["leaves", "residuals", "squares", "tbrm", "terms"]


def tbrm(case: Case, logits: PerLayerStateAction) -> Tensor:
    """``f_θ(τ)`` of every trajectory by the loss that is trained with."""
    return losses.tbrm_residual(case.scores(logits), beta=case.mdp.beta)


def terms(case: Case, logits: PerLayerStateAction) -> Tensor:
    """The absolute terms of ``f_θ(τ)``: logits, rewards over β, log-probabilities of the reference, values."""
    reward = tuple(table / case.mdp.beta for table in case.mdp.reward)
    return by_hand.magnitude(case, [logits, reward, case.mdp.log_reference], [by_hand.values(logits)])


def residuals(case: Case, left: Tensor, right: Tensor, logits: PerLayerStateAction) -> Comparison:
    """Two residuals on every trajectory."""
    return Comparison(left, right, terms(case, logits), 2 * case.sweep)


def squares(case: Case, left: Tensor, right: Tensor, log_law: Tensor, logits: PerLayerStateAction) -> Comparison:
    """Two expectations of products of two residuals."""
    scale = by_hand.size(log_law, terms(case, logits).square())
    return Comparison(left, right, scale, 2 * case.sweep + case.listing)


# -- I5 ------------------------------------------------------------------------------------------------------------


@claim("I5.a", source="[Y] Eq. 4")
def telescoping(case: Case) -> Comparison:
    """f_θ(τ) = V_θ(s_1) + log π_θ/π_ref(τ) - r(τ)/β

    Left: ``tbrm_residual``. Right: the definition, ``Σ_h [logit_θ - R_β - V_θ(s_{h+1})]``.
    """
    return residuals(case, tbrm(case, case.logits), by_hand.residual(case, case.logits), case.logits)


@claim("I5.b", source="[Y] Algorithm 1")
def first_logit_form(case: Case) -> Comparison:
    """f_θ(τ) = logit_θ(s_1,a_1) + Σ_{h≥2} log π_θ - log π_ref(τ) - r(τ)/β

    Left: ``first_logit_residual``. Right: the definition.
    """
    left = losses.first_logit_residual(case.scores(case.logits), beta=case.mdp.beta)
    return residuals(case, left, by_hand.residual(case, case.logits), case.logits)


@claim("I5.c", source="[Y] Eqs. 3, 4")
def sum_of_steps(case: Case) -> Comparison:
    """f_θ(τ) is the sum of the step residuals that BRM squares

    Left: ``brm_residual``, summed. Right: the definition.
    """
    left = losses.brm_residual(case.scores(case.logits), beta=case.mdp.beta).sum(-1)
    return residuals(case, left, by_hand.residual(case, case.logits), case.logits)


@claim("I5.d", source="own")
def additivity(case: Case) -> Comparison:
    """f_θ(τ) = Σ_h u_h(s_h,a_h) is additive

    with ``u_1 = logit_θ - R_β`` and ``u_h = log π_θ - R_β`` for ``h ≥ 2``. Left: ``residual_terms``, summed. Right:
    the definition. *Proof.* ``V_θ(s_{h+1})`` of step ``h`` turns the logit of step ``h+1`` into ``log π_θ``; nothing
    follows the last step. ∎
    """
    left = case.listed.sum_along(population.residual_terms(case.mdp, case.logits))
    return residuals(case, left, by_hand.residual(case, case.logits), case.logits)


# -- I6 ------------------------------------------------------------------------------------------------------------


@claim("I6.a", source="own", requires=[deterministic])
def log_ratio_form(case: Case) -> Comparison:
    """deterministic: f_θ(τ) = V_θ(s_1) - V*(s_1) + log π_θ/π*(τ)

    Left: ``tbrm_residual``. Right: values and policies, ``V*`` and ``π*`` from ``solve``. *Proof.* ``f_{θ*} = 0`` on
    every trajectory (I7), so by I5 ``r(τ)/β + log π_ref(τ) = V*(s_1) + log π*(τ)``; put this into I5 for θ. ∎
    """
    v_theta, start = by_hand.values(case.logits)[0], case.listed.states[:, 0]
    right = (v_theta - case.solution.v[0])[..., start] + _log_ratio(case)
    optimal = by_hand.magnitude(case, [case.solution.q], [case.solution.v])
    return Comparison(tbrm(case, case.logits), right, terms(case, case.logits) + optimal, 2 * case.sweep)


@claim("I6.b", source="own", requires=[deterministic])
def log_variance_form(case: Case) -> Comparison:
    """deterministic: min_c E_μ (f_θ + c(s_1))² = E Var_μ[log π_θ/π* | s_1]

    Left: the within-start variance of ``additive_moments``, which is that minimum. Right: the conditional variance of
    the log-ratio over all trajectories. *Proof.* By I6.a ``f_θ`` is the log-ratio plus a function of ``s_1``; of all
    numbers ``c`` the mean is the best, and it leaves the variance. ∎
    """
    moments = population.additive_moments(
        case.mdp, population.residual_terms(case.mdp, case.logits), case.log_behaviour
    )
    log_law, log_ratio = case.listed.log_law(case.log_behaviour), _log_ratio(case)
    mean = by_hand.mean_by_start(case, log_law, log_ratio)[..., case.listed.states[:, 0]]
    right = by_hand.expectation(log_law, (log_ratio - mean).square())
    size = terms(case, case.logits) + by_hand.magnitude(case, [case.solution.q], [case.solution.v])
    scale = by_hand.size(log_law, size.square())
    return Comparison((case.mdp.initial * moments.variance).sum(-1), right, scale, 2 * case.sweep + 2 * case.listing)


def _log_ratio(case: Case) -> Tensor:
    """``log π_θ(τ)/π*(τ)``."""
    log_theta = case.listed.sum_along(case.logits) - by_hand.sum_over_states(case, by_hand.values(case.logits))
    return log_theta - case.listed.sum_along(case.solution.log_policy)


# -- I7 ------------------------------------------------------------------------------------------------------------


def values_differ(case: Case) -> str | None:
    """Some pair that can be reached has a successor worth more than another."""
    spread = case.listed.sum_along(by_hand.successor_variance(case, case.solution.v))
    rounding = EPSILON * case.sweep * case.solution.scale
    return None if bool((spread > rounding**2).any()) else "V* the same at all successors"


@claim("I7.a", source="[Y] §3", requires=[deterministic])
def optimum_has_no_residual(case: Case) -> Comparison:
    """deterministic: f_{θ*}(τ) = 0 on every trajectory

    Left: ``tbrm_residual`` at ``Q*`` of ``solve``. Right: 0.
    """
    left = tbrm(case, case.solution.q)
    return residuals(case, left, torch.zeros_like(left), case.solution.q)


@claim("I7.b", source="own", requires=[stochastic])
def noise_floor(case: Case) -> Comparison:
    """stochastic: L_μ(θ*) = Σ_h E_μ Var(V*(s_{h+1})|s_h,a_h), Markov μ

    Left: ``population_loss`` and ``noise_floor`` by sweeps. Right: the sum over all trajectories, with variances over
    the edges. *Proof.* ``f_{θ*} = Σ_h n_h`` with ``n_h = E[V*(s_{h+1})|s_h,a_h] - V*(s_{h+1})``, of conditional mean
    0 given everything up to ``a_h``. So the ``n_h`` are uncorrelated, and ``E n_h²`` is the variance; μ entered
    nowhere. ∎
    """
    left = [
        population.population_loss(case.mdp, case.solution.q, case.log_behaviour),
        population.noise_floor(case.mdp, case.log_behaviour),
    ]
    log_law = case.listed.log_law(case.log_behaviour)
    return squares(case, torch.stack(left), _floor(case, log_law), log_law, case.solution.q)


@claim("I7.c", source="own", requires=[stochastic])
def noise_floor_of_any_behaviour(case: Case) -> Comparison:
    """stochastic: the same for mixtures and history-dependent μ

    The proof of I7.b asks nothing of μ but that it cannot see the next state.
    """
    behaviours = (
        MixtureBehaviour((0.25, 0.75), (case.log_policy, case.log_behaviour)),
        HistoryBehaviour(case.log_behaviour, repeat=0.5),
    )
    left = [population.population_loss(case.mdp, case.solution.q, behaviour) for behaviour in behaviours]
    log_law = torch.stack([behaviour.log_law(case.mdp, case.listed) for behaviour in behaviours])
    return squares(case, torch.stack(left), _floor(case, log_law), log_law, case.solution.q)


@claim("I7.d", source="own", requires=[stochastic, values_differ])
def noise_floor_is_positive(case: Case) -> Comparison:
    """stochastic: L_μ(θ*) ≥ its largest single term > 0

    Left: the largest ``E_μ[1{s_h=s, a_h=a} Var(V*(s_{h+1})|s,a)]``, over all trajectories; positive where values
    differ. Right: ``population_loss`` at ``Q*``. The floor is a sum of such terms, none negative.
    """
    log_law, listed = case.listed.log_law(case.log_behaviour), case.listed
    single = []
    for h, spread in enumerate(by_hand.successor_variance(case, case.solution.v)):
        pair = listed.states[:, h] * spread.shape[-1] + listed.actions[:, h]
        mass = torch.zeros(*log_law.shape[:-1], spread.numel(), dtype=torch.float64).index_add(-1, pair, log_law.exp())
        single.append((mass * spread.flatten()).amax(-1))
    left = torch.stack(single).amax(0)
    floor = population.population_loss(case.mdp, case.solution.q, case.log_behaviour)
    bound = squares(case, left, floor, log_law, case.solution.q)
    return Comparison(left, floor, bound.scale, bound.operations, "at most")


@claim("I7.e", source="own", requires=[stochastic])
def gradient_at_the_optimum(case: Case) -> Comparison:
    """stochastic: ∇L_μ(θ*) = 2 d^μ_h(s) b_h(s) [μ_h(a|s) - π*_h(a|s)]

    With ``n_k`` of I7.b, ``b_h(s) = E_μ[Σ_{k<h} n_k | s_h = s]``. So θ* is stationary on data from π* itself, and in
    general no minimiser on others: states reached by luck are taken for good ones. Left: autograd through
    ``population_loss``. Right: sums over all trajectories. *Proof.* ``½∂L/∂logit_h(s,a) = e_h(s,a) - π*(a|s) e_h(s)``
    for ``h ≥ 2`` and ``e_1(s,a)`` for ``h = 1``, ``e_h(s,a) = E_μ[f 1{s_h=s, a_h=a}]`` (C1). At θ* the noise from
    ``h`` on has conditional mean 0, and for Markov μ what came before is independent of ``a_h`` given ``s_h``:
    ``e_h(s,a) = d^μ_h(s) μ(a|s) b_h(s)``, and ``b_1 = 0``. ∎
    """
    logits = leaves(case, case.solution.q)
    loss = population.population_loss(case.mdp, logits, case.log_behaviour)
    gradient = torch.autograd.grad(loss.sum(), logits, allow_unused=True, materialize_grads=True)
    left = by_hand.existing(case, gradient)
    log_law, states = case.listed.log_law(case.log_behaviour), case.listed.states
    noise = torch.zeros(len(states), dtype=torch.float64)
    right = []
    expected = by_hand.backup(case, case.solution.v)
    for h, (log_mu, log_star) in enumerate(zip(case.log_behaviour, case.solution.log_policy, strict=True)):
        weighted = log_law.exp() * noise
        carried = weighted.new_zeros(*weighted.shape[:-1], log_mu.shape[-2]).index_add(-1, states[:, h], weighted)
        right.append(2 * carried.unsqueeze(-1) * (log_mu.exp() - log_star.exp()))
        if h < case.mdp.horizon - 1:
            mean = torch.where(case.mdp.valid[h], expected[h] - case.mdp.regularized_reward[h], 0.0)
            noise = noise + mean[states[:, h], case.listed.actions[:, h]] - case.solution.v[h + 1][states[:, h + 1]]
    scale = 2 * by_hand.size(log_law, terms(case, case.solution.q)).unsqueeze(-1)
    return Comparison(left, by_hand.existing(case, tuple(right)), scale, 2 * case.sweep + case.listing)


def _floor(case: Case, log_law: Tensor) -> Tensor:
    return by_hand.expectation(log_law, case.listed.sum_along(by_hand.successor_variance(case, case.solution.v)))


def leaves(case: Case, logits: PerLayerStateAction) -> PerLayerStateAction:
    """Logits of each draw of their own to differentiate by, 0 where the action does not exist."""
    return tuple(
        torch.where(valid, table, 0.0).expand(*case.logits[0].shape[:1], *valid.shape).clone().requires_grad_()
        for table, valid in zip(logits, case.mdp.valid, strict=True)
    )
