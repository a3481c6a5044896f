"""I8-I11: what TBRM's loss leaves undetermined, its gradient, pairs of responses, and its split into martingale differences.

One side is ``losses`` or ``population``, or autograd through them; the other is ``by_hand``, or autograd through the solver.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from tbrm_theory import dynamic_programming, population
from tbrm_theory.claims import by_hand
from tbrm_theory.claims.cases import Case
from tbrm_theory.claims.comparison import Comparison
from tbrm_theory.claims.registry import claim
from tbrm_theory.claims.residual_identities import leaves, residuals, squares, tbrm, terms
from tbrm_theory.occupancy import flatten_tables, moment_product
from tbrm_theory.shapes import PerLayerState, PerLayerStateAction

__all__: list[str] = []


# -- I8 ------------------------------------------------------------------------------------------------------------


def two_layers(case: Case) -> str | None:
    return None if case.mdp.horizon > 1 else "only one layer"


@claim("I8.a", source="own", requires=[two_layers])
def gauge_of_later_layers(case: Case) -> Comparison:
    """c(s) on the logits of layers h ≥ 2 leaves f_θ unchanged

    Left: ``tbrm_residual`` with ``c``. Right: the definition without. *Proof.* By I5 ``f_θ`` depends on a later layer
    through ``log π_θ`` alone, in which ``c`` cancels. ∎
    """
    moved = _moved(case, _later(case))
    return residuals(case, tbrm(case, moved), by_hand.residual(case, case.logits), moved)


@claim("I8.b", source="own")
def gauge_of_the_first_layer(case: Case) -> Comparison:
    """c(s) on the logits of layer 1 shifts f_θ by c(s_1)

    Left: ``tbrm_residual`` with ``c``. Right: the definition without, plus ``c(s_1)``. *Proof.* ``V_θ(s_1)`` moves by
    ``c(s_1)`` and ``log π_θ`` not at all (I5). ∎
    """
    moved = _moved(case, _first(case))
    shift = case.gauge[0][..., case.listed.states[:, 0]]
    return residuals(case, tbrm(case, moved), by_hand.residual(case, case.logits) + shift, moved)


@claim("I8.c", source="own")
def gauge_is_quadratic_in_brm(case: Case) -> Comparison:
    """BRM(θ+c) + BRM(θ-c) - 2 BRM(θ) = 2 E_μ Σ_h [c(s_h) - c(s_{h+1})]²

    for c in layer 1, and for c in later layers. Left: ``population_loss`` of BRM. Right: the sum over all
    trajectories, ``c = 0`` after the last layer. *Proof.* ``c`` moves a step's residual by ``c(s_h) - c(s_{h+1})``:
    the losses differ by a linear term, odd in ``c``, and by this square. ∎
    """
    base = _brm(case, case.logits)
    changes = [_brm(case, _moved(case, c)) + _brm(case, _moved(case, _negative(c))) - 2 * base for c in _gauges(case)]
    return _brm_comparison(case, torch.stack(changes), 2 * _curvature(case))


@claim("I8.d", source="own")
def gauge_changes_brm(case: Case) -> Comparison:
    """BRM changes: max |BRM(θ±c) - BRM(θ)| ≥ E_μ Σ_h [c(s_h) - c(s_{h+1})]² > 0

    Left: the sum over all trajectories, for c in layer 1 and for c in later ones. Right: ``population_loss`` of BRM.
    *Proof.* Of two numbers with sum ``2b > 0`` (I8.c) one is at least ``b``. ∎
    """
    base = _brm(case, case.logits)
    changes = [
        torch.stack([(_brm(case, _moved(case, signed)) - base).abs() for signed in (c, _negative(c))]).amax(0)
        for c in _gauges(case)
    ]
    comparison = _brm_comparison(case, _curvature(case), torch.stack(changes))
    return Comparison(comparison.left, comparison.right, comparison.scale, comparison.operations, "at most")


def _first(case: Case) -> PerLayerState:
    return (case.gauge[0], *(torch.zeros_like(c) for c in case.gauge[1:]))


def _later(case: Case) -> PerLayerState:
    return (torch.zeros_like(case.gauge[0]), *case.gauge[1:])


def _gauges(case: Case) -> list[PerLayerState]:
    return [_first(case), _later(case)] if case.mdp.horizon > 1 else [_first(case)]


def _negative(c: PerLayerState) -> PerLayerState:
    return tuple(-layer for layer in c)


def _moved(case: Case, c: PerLayerState) -> PerLayerStateAction:
    return tuple(table + layer.unsqueeze(-1) for table, layer in zip(case.logits, c, strict=True))


def _brm(case: Case, logits: PerLayerStateAction) -> Tensor:
    return population.population_loss(case.mdp, logits, case.log_behaviour, loss="brm")


def _curvature(case: Case) -> Tensor:
    """``E_μ Σ_h [c(s_h) - c(s_{h+1})]²`` for each gauge."""
    states, log_law = case.listed.states, case.listed.log_law(case.log_behaviour)
    result = []
    for c in _gauges(case):
        along = [layer[..., states[:, h]] for h, layer in enumerate(c)] + [
            torch.zeros(len(states), dtype=torch.float64)
        ]
        steps = [(here - after).square() for here, after in pairwise(along)]
        result.append(by_hand.expectation(log_law, torch.stack(steps).sum(0)))
    return torch.stack(result)


def _brm_comparison(case: Case, left: Tensor, right: Tensor) -> Comparison:
    size = terms(case, case.logits) + by_hand.magnitude(case, [], [case.gauge])
    scale = 4 * by_hand.size(case.listed.log_law(case.log_behaviour), size.square())
    return Comparison(left, right, scale, 2 * case.sweep + case.listing)


# -- I9 ------------------------------------------------------------------------------------------------------------


@claim("I9", source="own, after arXiv 1704.06440")
def on_policy_gradient(case: Case) -> Comparison:
    """∇½E f_θ² = -(1/β) ∇J_β(π_θ) + E[f_θ ∇V_θ(s_1)], τ ~ π_θ held fixed

    Left: autograd of the mean of ``tbrm_residual²`` over all trajectories, their law a constant. Right: autograd
    through ``objective``, the exact forward sweep, and of ``V_θ(s_1)``. *Proof.* With ``g = f_θ - V_θ(s_1) = log
    π_θ/π_ref - r/β`` (I5) and ``∇f_θ = ∇V_θ(s_1) + ∇log π_θ(τ)``, the left side is ``E[f ∇V_θ] + E[g ∇log π_θ] +
    E[V_θ(s_1) ∇log π_θ]``. The last term is 0, scores having mean 0 given ``s_1``. And ``-J_β/β = E g``, whose
    gradient is ``E[g ∇log π_θ] + E[∇log π_θ] = E[g ∇log π_θ]``. ∎
    """
    logits = leaves(case, case.logits)
    log_law = case.listed.log_law(case.soft_policy)
    weighted = by_hand.expectation(log_law, tbrm(case, logits).square())
    left = torch.autograd.grad(0.5 * weighted.sum(), logits)

    admissible = dynamic_programming.admissible_logits(case.mdp, logits)
    policy = tuple(dynamic_programming.soft_policy(table) for table in admissible)
    f = by_hand.residual(case, case.logits)
    value = by_hand.log_sum_exp(admissible[0])[..., case.listed.states[:, 0]]
    surrogate = (
        by_hand.expectation(log_law, f * value) - dynamic_programming.objective(case.mdp, policy) / case.mdp.beta
    )
    right = torch.autograd.grad(surrogate.sum(), logits)
    scale = 2 * by_hand.size(log_law, terms(case, case.logits) + by_hand.magnitude(case, [case.soft_policy]))
    operations = 4 * case.sweep + 2 * case.listing
    return Comparison(by_hand.existing(case, left), by_hand.existing(case, right), scale.unsqueeze(-1), operations)


# -- I10 -----------------------------------------------------------------------------------------------------------


def pairs_exist(case: Case) -> str | None:
    starts = len(case.listed.states[:, 0].unique())
    return None if len(case.listed.states) > starts else "one response to each prompt"


@claim("I10.a", source="[Y] App. E", requires=[pairs_exist])
def pairing(case: Case) -> Comparison:
    """two responses to one prompt: f_θ(τ) - f_θ(τ') without V_θ

    ``f_θ(τ) - f_θ(τ') = log π_θ/π_ref(τ) - log π_θ/π_ref(τ') - (r(τ) - r(τ'))/β``. Left: ``tbrm_residual``. Right: by
    hand, without ``V_θ(s_1)``. Every trajectory is paired with the first from its start.
    """
    f, other = tbrm(case, case.logits), _partner(case)
    log_theta = case.listed.sum_along(case.logits) - by_hand.sum_over_states(case, by_hand.values(case.logits))
    ratio = log_theta - case.listed.sum_along(case.mdp.log_reference) - by_hand.return_in_beta(case)
    return _pairs(case, f - f[..., other], ratio - ratio[..., other], case.logits)


@claim("I10.b", source="own", requires=[pairs_exist])
def pairing_is_free_of_the_value(case: Case) -> Comparison:
    """f_θ(τ) - f_θ(τ') is unchanged by c(s_1) on the logits of layer 1

    which moves ``V_θ(s_1)``. Left: ``tbrm_residual`` with ``c``. Right: the definition without. *Proof.* I8.b; ``τ``
    and ``τ'`` share ``s_1``. ∎
    """
    moved, other = _moved(case, _first(case)), _partner(case)
    left, right = tbrm(case, moved), by_hand.residual(case, case.logits)
    return _pairs(case, left - left[..., other], right - right[..., other], moved)


def _partner(case: Case) -> Tensor:
    """For every trajectory the first one listed from the same first state."""
    start = case.listed.states[:, 0]
    order = torch.arange(len(start))
    first = torch.full((len(case.mdp.initial),), len(start)).scatter_reduce(0, start, order, "amin")
    return first[start]


def _pairs(case: Case, left: Tensor, right: Tensor, logits: PerLayerStateAction) -> Comparison:
    size = terms(case, logits)
    return Comparison(left, right, size + size[..., _partner(case)], 2 * case.sweep)


# -- I11 -----------------------------------------------------------------------------------------------------------


@claim("I11.a", source="[Y] Eq. 9")
def martingale_split(case: Case) -> Comparison:
    """Markov μ: E_μ(Σ_h f)² = E f̄(s_1)² + Σ_h E_μ Δ_h²

    with ``Δ_h = f + f̄(s_{h+1}) - f̄(s_h)``, ``f̄`` the conditional mean of what follows. Left: the sum over all
    trajectories, ``f`` random. Right: ``additive_moments``, which sweeps back the conditional mean and the variance
    as sums of squares.
    """
    moments = population.additive_moments(case.mdp, case.additive, case.log_behaviour)
    right = (case.mdp.initial * (moments.mean.square() + moments.variance)).sum(-1)
    return _second_moment(case, right)


@claim("I11.b", source="[Y] Eq. 9")
def second_moment_by_sweeps(case: Case) -> Comparison:
    """Markov μ: E_μ(Σ_h f)² = fᵀ M f, M f by two sweeps

    where ``M f = E_μ[(Σ_h f) φ]``. Left: the sum over all trajectories. Right: ``moment_product``.
    """
    product = moment_product(case.mdp, case.log_behaviour, case.additive)
    return _second_moment(case, (flatten_tables(case.additive) * flatten_tables(product)).sum(-1))


@claim("I11.c", source="[Y] Eqs. 4, 9")
def loss_without_enumeration(case: Case) -> Comparison:
    """Markov μ: L_μ(θ) = E_μ f_θ² without listing trajectories

    Left: ``tbrm_residual²`` over all trajectories. Right: ``population_loss``.
    """
    log_law = case.listed.log_law(case.log_behaviour)
    left = by_hand.expectation(log_law, tbrm(case, case.logits).square())
    right = population.population_loss(case.mdp, case.logits, case.log_behaviour)
    return squares(case, left, right, log_law, case.logits)


def _second_moment(case: Case, right: Tensor) -> Comparison:
    log_law = case.listed.log_law(case.log_behaviour)
    left = by_hand.expectation(log_law, case.listed.sum_along(case.additive).square())
    scale = by_hand.size(log_law, by_hand.magnitude(case, [case.additive]).square())
    return Comparison(left, right, scale, 2 * case.sweep + case.listing)
