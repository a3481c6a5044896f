"""I12, I13, B1-B3: how much larger a mean or a second moment can be under a policy than under the data.

One side is ``coverage``, from logarithms of occupancies by sweeps. The other lists trajectories: moment matrices as sums over
them, occupancies by counting, suprema as quotients of quadratic forms.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tbrm_theory import coverage, policy_class
from tbrm_theory.claims import by_hand
from tbrm_theory.claims.cases import DRAWS, Case, case_of
from tbrm_theory.claims.comparison import Comparison
from tbrm_theory.claims.registry import claim
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.shapes import PerLayerStateAction
from tbrm_theory.transitions import DeterministicTransition

__all__ = ["MOST_PAIRS", "few_pairs", "few_trajectories", "sharp_family", "tree"]

MOST_LISTED = 500
MOST_PAIRS, MOST_VISITED = 400, 150
"""Pairs of a problem, and of its trajectories, whose moment matrices are decomposed hundreds of times."""


# -- assumptions and the other side ----------------------------------------------------------------------------------


def tree(case: Case) -> str | None:
    """Every state behind the first layer is entered by one pair only, for certain: a state is its whole history."""
    if not case.mdp.is_deterministic:
        return "stochastic transitions"
    for valid, kernel in zip(case.mdp.valid, case.mdp.transitions, strict=False):
        successors, probability = kernel.edges()
        entered = successors[valid.unsqueeze(-1) & (probability > 0)]
        if len(entered.unique()) < len(entered):
            return "states merge"
    return None


def few_pairs(case: Case) -> str | None:
    """Small moment matrices: few pairs in all, for the package's, and few visited ones, for those by hand."""
    if sum(table.numel() for table in case.mdp.reference) > MOST_PAIRS:
        return f"more than {MOST_PAIRS} pairs"
    return None if len(by_hand.visited(case)[1]) <= MOST_VISITED else f"more than {MOST_VISITED} pairs visited"


def few_trajectories(case: Case) -> str | None:
    """Data that are a law on all trajectories, or a row of a dense matrix for each."""
    return None if len(case.listed.states) <= MOST_LISTED else f"more than {MOST_LISTED} trajectories"


def _law(case: Case, log_policy: PerLayerStateAction) -> Tensor:
    return case.listed.log_law(log_policy).exp()


def _coefficients(case: Case, left: Tensor, right: Tensor, condition: Tensor | float = 1.0) -> Comparison:
    """Two coefficients of (π, μ). Each is a sum of positive terms that are quotients of probabilities of trajectories.

    ``condition`` is that of a moment matrix scaled to unit diagonal; at most ``H`` for Markov data on deterministic transitions (the
    proof is in ``optimisers``).
    """
    logs = [case.listed.log_law(log) for log in (case.other_policy, case.log_behaviour)]
    largest = [torch.where(log > -torch.inf, log.abs(), 0.0).amax(-1) for log in logs]
    scale = right.abs() * (1 + 2 * (largest[0] + largest[1])) * condition
    return Comparison(left, right, scale, 2 * case.sweep + case.listing)


# -- I12 -------------------------------------------------------------------------------------------------------------


@claim("I12.a", source="own", requires=[few_pairs])
def sharp_change_of_measure(case: Case) -> Comparison:
    """Markov μ: κ = sup_f (E_π Σf)²/E_μ(Σf)² = 1 + Σ_h E_μ[w_h² χ²(π_h ‖ μ_h)]

    Left: the closed form, in log space. Right: ``vᵀ M⁺ v`` with ``M`` and ``v`` summed over all trajectories, the null
    space of ``M`` cut off after scaling to unit diagonal. *Proof.* ``w = d^π/d^μ``; I11 with ``δ_h(s,a) = E_μ[Δ_h|s,a]``,
    for which ``E_{a~μ} δ_h = 0``, gives ``E_π Σf = E f̄(s_1) + Σ_h E_μ[(w_h(s,a) - w_h(s)) δ_h]``. Cauchy-Schwarz in each
    layer, then over layers, bounds its square by ``E_μ(Σf)²`` times ``1 + Σ_h E_μ(w_h(s,a) - w_h(s))²``, which is the
    right side since ``w_h(s,a) = w_h(s) π/μ``. It is attained (I12.b). ∎
    """
    left = coverage.kappa_closed_form(case.mdp, case.other_policy, case.log_behaviour)
    right, condition = by_hand.largest_mean_square(case, case.other_policy, case.log_behaviour)
    return _coefficients(case, left, right, condition)


@claim("I12.b", source="own")
def best_test_function(case: Case) -> Comparison:
    """Markov μ: E_π Σf = E_μ(Σf)² = κ at f_h = w_h(s,a) - w_h(s), f_1 plus 1

    Left: both expectations of ``optimal_test_function`` over all trajectories. Right: the closed form. *Proof.* The
    terms ``w_h(s,a) - w_h(s)`` have mean 0 given ``s`` under ``μ``, hence are orthogonal increments; the means of their
    squares sum to ``κ - 1``, and so do their means under ``π``. ∎
    """
    f = coverage.optimal_test_function(case.mdp, case.other_policy, case.log_behaviour)
    f = tuple(torch.where(valid, table, 0.0) for valid, table in zip(case.mdp.valid, f, strict=True))
    total = case.listed.sum_along(f)
    size = case.listed.sum_along(tuple(table.abs() for table in f))
    laws = [case.listed.log_law(log) for log in (case.other_policy, case.log_behaviour)]
    left = [by_hand.expectation(laws[0], total), by_hand.expectation(laws[1], total.square())]
    right = coverage.kappa_closed_form(case.mdp, case.other_policy, case.log_behaviour)
    scale = [by_hand.size(laws[0], size), by_hand.size(laws[1], size.square())]
    return Comparison(torch.stack(left), right, torch.stack(scale) + right, 2 * case.sweep + case.listing)


@claim("I12.c", source="own")
def kappa_from_divergences(case: Case) -> Comparison:
    """Markov μ: κ = 1 + Σ_h [χ²(d^π_h(s,a) ‖ d^μ_h(s,a)) - χ²(d^π_h(s) ‖ d^μ_h(s))]

    Left: the closed form. Right: χ² of occupancies that are counted over all trajectories. *Proof.* ``E_μ(w_h(s,a) - w_h(s))²
    = E_μ w_h(s,a)² - E_μ w_h(s)²``, since ``w_h(s)`` is the conditional mean of ``w_h(s,a)``. ∎
    """
    pairs, states = _divergences(case)
    left = coverage.kappa_closed_form(case.mdp, case.other_policy, case.log_behaviour)
    comparison = _coefficients(case, left, 1 + (pairs - states).sum(0))
    return Comparison(left, comparison.right, comparison.scale + pairs.sum(0) + states.sum(0), comparison.operations)


@claim("I12.d", source="own")
def kappa_is_a_supremum(case: Case) -> Comparison:
    """Markov μ: (E_π Σf)² ≤ κ E_μ(Σf)² for every f

    Left: the square over all trajectories, ``f`` random. Right: ``κ`` in closed form times the second moment over all trajectories.
    """
    laws = [case.listed.log_law(log) for log in (case.other_policy, case.log_behaviour)]
    total = case.listed.sum_along(case.additive)
    left = by_hand.expectation(laws[0], total).square()
    square = by_hand.expectation(laws[1], total.square())
    right = coverage.kappa_closed_form(case.mdp, case.other_policy, case.log_behaviour) * square
    return Comparison(left, right, left + right, case.sweep + 4 * case.listing, "at most")


def _divergences(case: Case) -> tuple[Tensor, Tensor]:
    """``χ²`` of pairs and of states, one row for each layer, from laws on trajectories: sums of ``(p - q)²/q``."""
    laws = [_law(case, log) for log in (case.other_policy, case.log_behaviour)]
    pairs: list[Tensor] = []
    states: list[Tensor] = []
    for h, table in enumerate(case.mdp.reference):
        pair = case.listed.states[:, h] * table.shape[-1] + case.listed.actions[:, h]
        for index, size, found in ((pair, table.numel(), pairs), (case.listed.states[:, h], len(table), states)):
            p, q = (law.new_zeros(*law.shape[:-1], size).index_add(-1, index, law) for law in laws)
            found.append(torch.where(q > 0, (p - q).square() / q, 0.0).sum(-1))
    return torch.stack(pairs), torch.stack(states)


# -- I13 -------------------------------------------------------------------------------------------------------------


@claim("I13", source="own", requires=[tree])
def trees_shift_trajectories(case: Case) -> Comparison:
    """token trees: κ(π,μ) = 1 + χ²(P_π ‖ P_μ)

    Left: the closed form of I12. Right: ``Σ_τ P_π(τ)²/P_μ(τ)``. *Proof.* A state is entered by one pair, for certain, so
    ``χ²(d_{h+1}(s)) = χ²(d_h(s,a))`` and the sum of I12 telescopes to ``χ²`` of the last pair, which is the whole
    trajectory (the first states have the same law). ∎
    """
    left = coverage.kappa_closed_form(case.mdp, case.other_policy, case.log_behaviour)
    pi, mu = (case.listed.log_law(log) for log in (case.other_policy, case.log_behaviour))
    return _coefficients(case, left, (2 * pi - mu).exp().sum(-1))


# -- B1, B2 ----------------------------------------------------------------------------------------------------------


@claim("B1.a", source="[Y] Lemma 1")
def lemma_1(case: Case) -> Comparison:
    """Markov μ: κ ≤ 1 + Σ_h χ²(d^π_h(s,a) ‖ d^μ_h(s,a))

    Left: the closed form. Right: χ² of counted occupancies. *Proof.* I12.c; χ² of states is not negative. ∎
    """
    left = coverage.kappa_closed_form(case.mdp, case.other_policy, case.log_behaviour)
    return _at_most(case, left, 1 + _divergences(case)[0].sum(0))


@claim("B1.b", source="own")
def gap_of_lemma_1(case: Case) -> Comparison:
    """Markov μ: the gap of Lemma 1 is Σ_h χ²(d^π_h(s) ‖ d^μ_h(s))

    Left: ``lemma1`` less the closed form of ``κ``. Right: χ² of the states, counted. *Proof.* I12.c. ∎
    """
    kappa = coverage.kappa_closed_form(case.mdp, case.other_policy, case.log_behaviour)
    lemma1 = coverage.lemma1(case.mdp, case.other_policy, case.log_behaviour)
    comparison = _coefficients(case, lemma1 - kappa, lemma1 + kappa)
    return Comparison(lemma1 - kappa, _divergences(case)[1].sum(0), comparison.scale, comparison.operations)


@claim("B2.a", source="own")
def sharper_corollary_6(case: Case) -> Comparison:
    """Markov μ: 1 + Σ_h χ²(d^π_h(s,a) ‖ d^μ_h(s,a)) ≤ 1 + H (C_∞ - 1)

    Left: ``lemma1``. Right: the largest ratio of counted occupancies. *Proof.* ``Σ p²/q ≤ C_∞ Σ p``, so each ``χ² ≤ C_∞ - 1``. ∎
    """
    left = coverage.lemma1(case.mdp, case.other_policy, case.log_behaviour)
    return _at_most(case, left, 1 + case.mdp.horizon * (_largest_ratio(case) - 1))


@claim("B2.b", source="[Y] Cor. 6")
def corollary_6(case: Case) -> Comparison:
    """Markov μ: 1 + Σ_h χ²(d^π_h(s,a) ‖ d^μ_h(s,a)) ≤ H C_∞

    Left: ``lemma1``. Right: the largest ratio of counted occupancies. *Proof.* B2.a, and ``C_∞ ≥ 1``. ∎
    """
    left = coverage.lemma1(case.mdp, case.other_policy, case.log_behaviour)
    return _at_most(case, left, case.mdp.horizon * _largest_ratio(case))


@claim("B2.c", source="own", requires=[tree])
def corollary_6_on_trees(case: Case) -> Comparison:
    """token trees: κ ≤ C_∞

    Left: the closed form. Right: the largest ratio of counted occupancies. *Proof.* I13: ``Σ_τ P_π²/P_μ ≤ max_τ P_π/P_μ``. ∎
    """
    left = coverage.kappa_closed_form(case.mdp, case.other_policy, case.log_behaviour)
    return _at_most(case, left, _largest_ratio(case))


def _one_action_of_mass(seed: int) -> Case:
    """One state per layer, π on an action of μ-mass 1/C: the problem on which B2.a is an equality; H and C from the seed."""
    generator = torch.Generator().manual_seed(seed)
    horizon = int(torch.randint(1, 9, (), generator=generator))
    mass = 0.02 + 0.96 * torch.rand((), generator=generator, dtype=torch.float64)
    ones = torch.ones(1, 1, dtype=torch.int64)
    mdp = RegularizedMDP(
        beta=1.0,
        initial=torch.ones(1, dtype=torch.float64),
        reward=[torch.zeros(1, 2)] * horizon,
        reference=[torch.full((1, 2), 0.5)] * horizon,
        transitions=[DeterministicTransition(0 * ones.expand(1, 2), 1)] * (horizon - 1),
    )
    return replace(
        case_of(mdp, "one action", seed),
        other_policy=(torch.tensor([[0.0, -torch.inf]], dtype=torch.float64),) * horizon,
        log_behaviour=(torch.stack([mass.log(), (1 - mass).log()]).unsqueeze(0),) * horizon,
    )


@claim("B2.d", source="own", problem=_one_action_of_mass)
def corollary_6_is_attained(case: Case) -> Comparison:
    """κ = 1 + H (C_∞ - 1) with one state per layer and π on an action of μ-mass 1/C

    so the sharper form of Cor. 6 is best possible. Left: ``kappa_linear_solve``. Right: the formula.
    """
    ratio = (-case.log_behaviour[0][..., 0, 0]).exp()
    left = coverage.kappa_linear_solve(case.mdp, case.other_policy, case.log_behaviour)
    return _coefficients(case, left, 1 + case.mdp.horizon * (ratio - 1))


@claim("B2.e", source="own", requires=[few_pairs])
def worst_policy_for_the_data(case: Case) -> Comparison:
    """C_∞(π,μ) ≤ max_π C_∞(π,μ) = max_{h,s,a} max_π d^π_h(s)/d^μ_h(s,a)

    Left: the largest ratio of counted occupancies, of a policy that leaves out actions. Right: ``largest_c_inf``, by dynamic
    programming. *Proof.* A policy that goes to ``s`` as often as possible may take ``a`` there for certain. ∎
    """
    draws = [tuple(table[i] for table in case.log_behaviour) for i in range(DRAWS)]
    worst = [policy_class.largest_c_inf(case.mdp, mu) for mu in draws]
    return _at_most(case, _largest_ratio(case), torch.tensor(worst, dtype=torch.float64))


def _largest_ratio(case: Case) -> Tensor:
    """``C_∞`` from occupancies counted over all trajectories."""
    laws = [_law(case, log) for log in (case.other_policy, case.log_behaviour)]
    layers = []
    for h, table in enumerate(case.mdp.reference):
        pair = case.listed.states[:, h] * table.shape[-1] + case.listed.actions[:, h]
        p, q = (law.new_zeros(*law.shape[:-1], table.numel()).index_add(-1, pair, law) for law in laws)
        layers.append(torch.where(p > 0, p / q, 0.0).amax(-1))
    return torch.stack(layers).amax(0)


def _at_most(case: Case, left: Tensor, right: Tensor, condition: Tensor | float = 1.0) -> Comparison:
    both = _coefficients(case, left, right, condition)
    return Comparison(left, right, both.scale, both.operations, "at most")


# -- B3 --------------------------------------------------------------------------------------------------------------


@claim("B3.a", source="own", requires=[few_pairs])
def second_moment_bound(case: Case) -> Comparison:
    """Markov μ: Λ = sup_f E_π(Σf)²/E_μ(Σf)² ≤ H C_∞

    Left: the largest generalised eigenvalue of moment matrices summed over all trajectories. Right: ``c_inf``. *Proof.* Write I11 as
    ``Σf = [f_1 + f̄(s_2)] + Σ_{h≥2} Δ_h``: ``H`` terms, orthogonal under ``μ``, each a function of ``(s_h, a_h, s_{h+1})``, whose law
    under ``π`` has density at most ``C_∞``. By Cauchy-Schwarz ``E_π(Σf)² ≤ H Σ E_π(·)² ≤ H C_∞ Σ E_μ(·)² = H C_∞ E_μ(Σf)²``. ∎
    """
    left, condition = by_hand.largest_second_moment(case, case.other_policy, case.log_behaviour)
    right = case.mdp.horizon * coverage.c_inf(case.mdp, case.other_policy, case.log_behaviour)
    return _at_most(case, left, right, condition)


@claim("B3.b", source="own", requires=[few_pairs])
def second_moment_is_an_eigenvalue(case: Case) -> Comparison:
    """Λ is the largest generalised eigenvalue of M_π and M_μ

    Left: ``second_moment``, from logarithms by sweeps. Right: matrices summed over all trajectories.
    """
    right, condition = by_hand.largest_second_moment(case, case.other_policy, case.log_behaviour)
    left = coverage.second_moment(case.mdp, case.other_policy, case.log_behaviour)
    return _coefficients(case, left, right, condition)


@claim("B3.c", source="own", requires=[tree, few_pairs])
def second_moment_on_trees(case: Case) -> Comparison:
    """token trees: Λ = C_∞

    Left: ``second_moment``. Right: the largest ratio of counted occupancies. *Proof.* Every function of a trajectory is additive on a
    tree, in particular the indicator of the trajectory with the largest ratio. ∎
    """
    left = coverage.second_moment(case.mdp, case.other_policy, case.log_behaviour)
    return _coefficients(case, left, _largest_ratio(case), float(case.mdp.horizon))


def sharp_family(
    horizon: int, ratio: float, g: float
) -> tuple[RegularizedMDP, PerLayerStateAction, PerLayerStateAction]:
    """theory.md B3's problem with its ``log π`` and ``log μ``, on which ``Λ = C(H - (H-1)g)``.

    Layer 1 has the actions ``gA, gB, bad``; ``gA`` leads to ``A``, the other two to ``B``, and both are absorbing. ``A``
    has one action; ``B`` has two, the first of μ-mass ``g`` and π-mass 1.

    Args:
        ratio: ``C_∞ > 1``.
        g: between 0 and ``1/C``.
    """
    bad = 1 - 1 / ratio
    mu_b = g * bad / (1 - g)
    mu_a = 1 / ratio - mu_b

    def table(rows: list[list[float]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.float64)

    first, later = table([[1 / 3] * 3]), table([[1.0, 0.0], [0.5, 0.5]])
    mdp = RegularizedMDP(
        beta=1.0,
        initial=table([[1.0]])[0],
        reward=[torch.zeros(1, 3), *[torch.zeros(2, 2)] * (horizon - 1)],
        reference=[first, *[later] * (horizon - 1)],
        transitions=[
            DeterministicTransition(torch.tensor([[0, 1, 1]]), 2),
            *[DeterministicTransition(torch.tensor([[0, 0], [1, 1]]), 2)] * (horizon - 2),
        ][: horizon - 1],
    )
    pi = (table([[ratio * mu_a, ratio * mu_b, 0.0]]), *[table([[1.0, 0.0], [1.0, 0.0]])] * (horizon - 1))
    mu = (table([[mu_a, mu_b, bad]]), *[table([[1.0, 0.0], [g, 1 - g]])] * (horizon - 1))
    return mdp, tuple(layer.log() for layer in pi), tuple(layer.log() for layer in mu)


def _sharp_problem(seed: int) -> Case:
    generator = torch.Generator().manual_seed(seed)
    horizon = int(torch.randint(2, 9, (), generator=generator))
    uniform = torch.rand(2, generator=generator, dtype=torch.float64)
    ratio = 1 + 10 ** (2 * uniform[0].item() - 1)
    g = 10 ** (-6 * uniform[1].item()) / (ratio + 1)
    mdp, pi, mu = sharp_family(horizon, ratio, g)
    return replace(case_of(mdp, "sharp family", seed), other_policy=pi, log_behaviour=mu)


@claim("B3.d", source="own", problem=_sharp_problem)
def second_moment_bound_is_sharp(case: Case) -> Comparison:
    """Λ = C (H - (H-1) g) on a family of deterministic problems, hence no constant below H C_∞ serves

    Left: ``second_moment``. Right: the formula, ``C`` and ``g`` read off the policies, which is attained: under ``π`` all
    of the mass lies on the trajectories ``gA, A, …`` and ``gB, B, first, first, …``; the best ``f`` is the same number on
    both in total, and cancels under ``μ`` as far as additive functions can.
    """
    ratio = (case.other_policy[0][..., 0, 0] - case.log_behaviour[0][..., 0, 0]).exp()
    g = case.log_behaviour[1][..., 1, 0].exp()
    horizon = case.mdp.horizon
    left = coverage.second_moment(case.mdp, case.other_policy, case.log_behaviour)
    return _coefficients(case, left, ratio * (horizon - (horizon - 1) * g), float(horizon))
