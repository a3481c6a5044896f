"""O2: a residual that stochastic transitions cannot bias, and what of the paper then holds without determinism.

One side is ``control_variate``; the other the definition, by sums over listed trajectories.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tbrm_theory import control_variate, coverage, dynamic_programming, population
from tbrm_theory.behaviours import HistoryBehaviour, MixtureBehaviour
from tbrm_theory.claims import by_hand
from tbrm_theory.claims.cases import Case
from tbrm_theory.claims.comparison import Comparison
from tbrm_theory.claims.identities import stochastic
from tbrm_theory.claims.noisy_transitions import carried_noise, mean_next
from tbrm_theory.claims.registry import claim
from tbrm_theory.claims.residual_identities import leaves, terms
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.random_tables import draw_simplex, seeded
from tbrm_theory.shapes import PerLayerStateAction
from tbrm_theory.transitions import DenseTransition

__all__: list[str] = []


def corrected(case: Case, logits: PerLayerStateAction) -> Tensor:
    """``f_θ(τ) + Σ_h {V_θ(s_{h+1}) - E[V_θ(s')|s_h,a_h]}``: the residual with its control variate, from the definitions."""
    v = by_hand.values(logits)
    total = by_hand.residual(case, logits)
    for h in range(case.mdp.horizon - 1):
        total = total + v[h + 1][..., case.listed.states[:, h + 1]] - mean_next(case, v, h)
    return total


@claim("O2.a", source="own")
def corrected_residual(case: Case) -> Comparison:
    """f^c_θ := f_θ + Σ_h {V_θ(s_{h+1}) - E[V_θ|s_h,a_h]} = Σ_h (Q_θ - T_β Q_θ), and f^c_{θ*} = 0

    on every trajectory, whatever the transitions. Left: ``bellman_error`` of random θ and of θ*, summed. Right: the
    definition, and 0. *Proof.* The two ``V_θ(s_{h+1})`` cancel; ``Q* = T_β Q*``. Given ``s_h, a_h`` the control
    variate has mean 0, so it costs no bias and no sample; it needs the kernel. ∎
    """
    logits = tuple(torch.cat([random, q.unsqueeze(0)]) for random, q in zip(case.logits, case.solution.q, strict=True))
    left = case.listed.sum_along(control_variate.bellman_error(case.mdp, logits))
    right = torch.cat([corrected(case, case.logits), torch.zeros_like(left[:1])])
    return Comparison(left, right, _corrected_terms(case, logits), 2 * case.sweep)


@claim("O2.b", source="own")
def corrected_loss_without_enumeration(case: Case) -> Comparison:
    """Markov μ: L^c_μ(θ) = E_μ (f^c_θ)² by one sweep of variances

    It is also the mean of ``f̃ f̃'`` with two fresh next states for each pair. Left: ``corrected_loss``. Right: the
    sum over all trajectories.
    """
    log_law = case.listed.log_law(case.log_behaviour)
    left = control_variate.corrected_loss(case.mdp, case.logits, case.log_behaviour)
    right = by_hand.expectation(log_law, corrected(case, case.logits).square())
    return _corrected_squares(case, left, right, log_law)


@claim("O2.c", source="own")
def no_spurious_stationary_points(case: Case) -> Comparison:
    """any transitions, any data: L^c ≤ (H/2) max|Q_θ - T_β Q_θ| ‖∇L^c‖_1, so ∇L^c = 0 ⇒ L^c = 0

    C1 with the transitions free. Left: the sum over all trajectories, for Markov, mixed and history-dependent data.
    Right: autograd of it. *Proof.* Let ``e_h(s,a) = E_μ[f^c 1{s_h=s, a_h=a}]``. A logit of layer h is in the Bellman
    error of its own pair and, through ``E[V_θ(s')|·]``, in those of layer h-1: ``½∂L^c/∂logit_h(s,a) = e_h(s,a) -
    π_θ(a|s) Σ P(s|s',a') e_{h-1}(s',a')``. So ``‖e_h‖_1 ≤ ‖½∇_h‖_1 + ‖e_{h-1}‖_1 ≤ ½‖∇‖_1``, and ``L^c = Σ_h ⟨ε_h,
    e_h⟩`` with Bellman errors ``ε_h``, over pairs with data. ∎
    """
    behaviours = (
        MixtureBehaviour((0.25, 0.75), (case.log_policy, case.log_behaviour)),
        HistoryBehaviour(case.log_behaviour, repeat=0.5),
    )
    laws = [case.listed.log_law(case.log_behaviour), *(b.log_law(case.mdp, case.listed) for b in behaviours)]
    log_law = torch.stack(laws)
    logits = leaves(case, case.logits)
    admissible = dynamic_programming.admissible_logits(case.mdp, logits)
    losses = by_hand.expectation(log_law, corrected(case, admissible).square())
    norms = []
    for loss in losses.unbind(0):
        slope = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
        norms.append(torch.stack([torch.nan_to_num(table).abs().sum((-2, -1)) for table in slope]).sum(0))
    errors = control_variate.bellman_error(case.mdp, case.logits)
    largest = torch.stack([table.abs().amax((-2, -1)) for table in errors]).amax(0)
    right = case.mdp.horizon / 2 * largest * torch.stack(norms)
    bound = _corrected_squares(case, losses.detach(), right, log_law)
    scale = bound.scale * (1 + case.mdp.horizon * largest)
    return Comparison(losses.detach(), right, scale, bound.operations, "at most")


@claim("O2.d", source="own")
def theorem_2_without_determinism(case: Case) -> Comparison:
    """any transitions, Markov μ: J_β(π*) - J_β(π_θ) ≤ β(√κ(π*,μ) + √κ(π_θ,μ)) √L^c_μ(θ)

    [Y] Theorem 2 where it does not hold for TBRM itself, with no noise floor. Left: ``regret``. Right: ``kappa`` and
    the corrected loss over all trajectories. *Proof.* B4 holds for all transitions and says that the regret is at
    most ``β(E_{π_θ} f^c - E_{π*} f^c)``, as ``f^c`` is the sum of the Bellman errors (O2.a); each mean is at most
    ``√(κ L^c)`` by the definition of κ, since ``f^c`` is additive. ∎
    """
    log_law = case.listed.log_law(case.log_behaviour)
    left = dynamic_programming.regret(case.mdp, case.soft_policy, solution=case.solution)
    loss = by_hand.expectation(log_law, corrected(case, case.logits).square())
    optimal, own = (
        coverage.kappa(case.mdp, log_pi, case.log_behaviour).sqrt()
        for log_pi in (case.solution.log_policy, case.soft_policy)
    )
    right = case.mdp.beta * (optimal + own) * loss.sqrt()
    size = by_hand.size(log_law, _corrected_terms(case, case.logits))
    scale = case.mdp.beta * (1 + optimal + own) * (size + case.mdp.horizon * case.solution.scale)
    return Comparison(left, right, scale, 4 * case.sweep + case.listing, "at most")


@claim("O2.e", source="own", requires=[stochastic])
def learned_kernel_means_planning(case: Case) -> Comparison:
    """with a learned kernel P̂, f^ĉ = 0 on every trajectory at the optimum of the model P̂

    so the minimiser is the model's plan, wrong by what the model is wrong. Left: ``bellman_error`` under P̂ at
    ``solve`` of the model, summed along the trajectories of the true problem. Right: 0. *Proof.* O2.a in the model;
    ``f^ĉ`` never reads the true kernel, which only decides where the data are. ∎
    """
    model = _model(case)
    logits = dynamic_programming.solve(model).q
    left = case.listed.sum_along(control_variate.bellman_error(case.mdp, logits, model.transitions))
    scale = by_hand.magnitude(case, [logits, case.mdp.regularized_reward], [by_hand.values(logits)])
    return Comparison(left, torch.zeros_like(left), case.mdp.horizon * scale.max(), 2 * case.sweep)


@claim("O2.f", source="own", requires=[stochastic])
def subtracting_the_variance_is_not_enough(case: Case) -> Comparison:
    """∇(L_μ - E_μ Σ_h Var V_θ(s_{h+1}))(θ*) = 2{d b [μ - π*] + π* E_μ[n_{h-1} 1{s_h=s}]}, in general not 0

    not even on data of π* itself, where TBRM is stationary (I7.e). For BRM the subtraction is exact; along a
    trajectory the noise of one step meets the Bellman errors of later ones, and a large gauge (I8) in a later layer
    leaves ``L_μ`` as it is and makes the variance, hence minus the difference, as large as one likes. One fresh next
    state beside the actual one has half this slope. Left: autograd through ``population_loss`` and kernels'
    ``variance``. Right: sums over all trajectories. *Proof.* With ``N = Σ_h n_h``, ``L - E ΣVar = E (f^c)² + 2E[f^c
    N]`` and ``E[f f^c] = E (f^c)² + E[f^c N]``; at θ* the slope is that of the cross term, ``2E[N ∇f^c]``, with
    ``∂f^c/∂logit_h(s,a) = 1{s_h=s, a_h=a} - P(s|s_{h-1},a_{h-1}) π*(a|s)`` and ``E[N P(s|s_{h-1},a_{h-1})] =
    E[Σ_{k<h-1} n_k 1{s_h=s}]``. ∎
    """
    logits = leaves(case, case.solution.q)
    loss = population.population_loss(case.mdp, logits, case.log_behaviour)
    admissible = dynamic_programming.admissible_logits(case.mdp, logits)
    law = case.listed.log_law(case.log_behaviour)
    for h, kernel in enumerate(case.mdp.transitions):
        spread = kernel.variance(dynamic_programming.soft_value(admissible[h + 1]))
        loss = loss - by_hand.expectation(law, spread[..., case.listed.states[:, h], case.listed.actions[:, h]])
    left = by_hand.existing(case, torch.autograd.grad(loss.sum(), logits, allow_unused=True, materialize_grads=True))
    right = []
    tables = zip(carried_noise(case), case.log_behaviour, case.solution.log_policy, strict=True)
    for (before, last), log_mu, log_star in tables:
        mu, star = log_mu.exp(), log_star.exp()
        right.append(2 * (before.unsqueeze(-1) * (mu - star) + star * last.unsqueeze(-1)))
    scale = 4 * by_hand.size(law, terms(case, case.solution.q)).unsqueeze(-1)
    return Comparison(left, by_hand.existing(case, tuple(right)), scale, 3 * case.sweep + 2 * case.listing)


def _model(case: Case) -> RegularizedMDP:
    """The same problem with kernels half way to ones drawn at random; any successor where the action does not exist."""
    generator = seeded(case.seed)
    kernels = []
    for kernel in case.mdp.transitions:
        states, actions, following = kernel.shape
        successors, probability = kernel.edges()
        table = torch.zeros(states, actions, following, dtype=torch.float64).scatter_add(-1, successors, probability)
        drawn = draw_simplex((states, actions, following), generator)
        share = table.sum(-1, keepdim=True) / 2  # 0 where the action does not exist
        kernels.append(DenseTransition(table / 2 + (1 - share) * drawn))
    mdp = case.mdp
    return RegularizedMDP(
        beta=mdp.beta, initial=mdp.initial, reward=mdp.reward, reference=mdp.reference, transitions=kernels
    )


def _corrected_terms(case: Case, logits: PerLayerStateAction) -> Tensor:
    """The absolute terms of ``f^c``, the values of all successors of a pair at their largest."""
    v = by_hand.values(logits)
    largest = torch.stack([torch.where(layer.isinf(), 0.0, layer.abs()).amax(-1) for layer in v]).amax(0)
    return terms(case, logits) + case.mdp.horizon * largest.unsqueeze(-1)


def _corrected_squares(case: Case, left: Tensor, right: Tensor, log_law: Tensor) -> Comparison:
    scale = by_hand.size(log_law, _corrected_terms(case, case.logits).square())
    return Comparison(left, right, scale, 2 * case.sweep + case.listing)
