"""X7: how an outcome reward reaches the layers under BRM and under TBRM, and how the two losses are conditioned.

The calibrated start is ``logit = log π_ref``, so that ``V_θ = 0`` and ``π_θ = π_ref``. Problems with outcome reward
are those of the families with all rewards but the last layer's taken away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from tbrm_theory import conditioning, population
from tbrm_theory.claims import by_hand
from tbrm_theory.claims.cases import Case, case_of, cases_in_turn
from tbrm_theory.claims.comparison import Comparison
from tbrm_theory.claims.registry import claim
from tbrm_theory.claims.residual_identities import leaves
from tbrm_theory.families import make
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.shapes import PerLayerStateAction

__all__ = ["one_state_condition", "with_outcome_reward"]

_MOST_PAIRS = 120
_STEPS = 3  # of gradient descent


def with_outcome_reward(mdp: RegularizedMDP, last: Callable[[Tensor], Tensor] = lambda table: table) -> RegularizedMDP:
    """The problem with reward 0 in all layers but the last, whose rewards are ``last`` of its own."""
    *earlier, end = mdp.reward
    return RegularizedMDP(
        beta=mdp.beta,
        initial=mdp.initial,
        reward=[*(torch.zeros_like(table) for table in earlier), last(end)],
        reference=mdp.reference,
        transitions=mdp.transitions,
    )


def one_state_condition(horizon: int) -> float:
    """``[sin((2H-1)φ)/sin φ]²`` with ``φ = π/(4H+2)``, BRM's condition number in X7.b: some ``1.62 H²``."""
    angle = torch.tensor(torch.pi / (4 * horizon + 2), dtype=torch.float64)
    return float((((2 * horizon - 1) * angle).sin() / angle.sin()).square())


# -- conditioning --------------------------------------------------------------------------------------------------


def few_pairs(case: Case) -> str | None:
    """The matrices are dense."""
    pairs = sum(table.numel() for table in case.mdp.reference)
    return None if pairs <= _MOST_PAIRS else f"more than {_MOST_PAIRS} pairs"


@claim("X7.a", source="own", requires=[few_pairs])
def on_policy_gauss_newton(case: Case) -> Comparison:
    """any transitions, μ = π_θ: TBRM's Gauss-Newton matrix is block diagonal, d_h(s)(diag π - π πᵀ) on each state of h ≥ 2

    and ``d_1(s) diag π`` in layer 1: the Fisher information of the policy, so that its Gauss-Newton step is a natural
    policy gradient there; the layers do not see each other. Left: ``gauss_newton_matrix``, from moment matrices.
    Right: occupancies by sums over all trajectories. *Proof.* ``∇f = e_(s_1,a_1) + Σ_{h≥2} ∇log π_θ(a_h|s_h)``; on
    policy every later term has mean 0 given what came before, so all are uncorrelated, each with its own Fisher
    information. ∎
    """
    log_law, left, right = case.listed.log_law(case.soft_policy), [], []
    pairs = [table.shape for table in case.mdp.reference]
    for draw in range(len(log_law)):
        logits, policy = (tuple(t[draw] for t in tables) for tables in (case.logits, case.soft_policy))
        left.append(conditioning.gauss_newton_matrix(case.mdp, logits, policy))
        blocks = []
        for h, (shape, log) in enumerate(zip(pairs, policy, strict=True)):
            mass = torch.zeros(shape[0], dtype=torch.float64).index_add(
                0, case.listed.states[:, h], log_law[draw].exp()
            )
            for weight, row in zip(mass, log.exp(), strict=True):
                blocks.append(weight * (torch.diag(row) - (row.unsqueeze(-1) * row if h else 0.0)))
        right.append(torch.block_diag(*blocks))
    size = by_hand.size(log_law, torch.ones_like(log_law))
    return Comparison(torch.stack(left), torch.stack(right), size[:, None, None], 4 * case.sweep + case.listing)


def _one_state(seed: int) -> Case:
    horizon, actions = 1 + seed % 24, 2 + seed // 24
    return case_of(make("one-state", horizon=horizon, actions=actions), "X7", seed)


def _tree(seed: int) -> Case:
    options = [("deterministic-tree", h, a) for a, most in ((2, 7), (3, 4), (4, 3)) for h in range(2, most + 1)]
    options += [("combination-lock", h, a) for a in (2, 3, 4) for h in range(2, 11)]
    family, horizon, actions = options[seed % len(options)]
    return case_of(make(family, horizon=horizon, actions=actions), "X7", seed)


@claim("X7.b", source="own", problem=_one_state, problems=24 * 4)
def conditions_with_one_state(case: Case) -> Comparison:
    """one state per layer, all uniform: TBRM's condition number is 1, BRM's [sin((2H-1)φ)/sin φ]², φ = π/(4H+2)

    1.0 and 175.09 at H = 10, whatever A. Left: eigenvalues of ``gauss_newton_matrix``. Right: the formulas. *Proof.*
    TBRM: X7.a; ``1/A`` times a projection in each layer. BRM: on vectors of mean 0 in a layer ``1/A``. On layers'
    means ``ℓ_h``, of norm ``A ℓ²``, it is ``Σ_h (ℓ_h - ℓ_{h+1})²``, ``ℓ_{H+1} = 0``: ``1/A`` times the Laplacian of a
    path with one free and one fixed end, eigenvalues ``4 sin²((2k-1)φ)``, which for ``H ≥ 2`` enclose 1. ∎ An
    eigenvalue is as exact as the largest one; hence the condition number in the scale.
    """
    expected = torch.tensor([1.0, one_state_condition(case.mdp.horizon)], dtype=torch.float64)
    operations = 20 * sum(table.numel() for table in case.mdp.reference)
    return Comparison(_conditions(case, scaled=False), expected, expected.square(), operations)


@claim("X7.c", source="own", problem=_tree, problems=11 + 27)
def conditions_on_trees(case: Case) -> Comparison:
    """uniform trees and combination locks: TBRM's condition number is A^(H-1), but A/(A-1) ≤ 2 with a unit diagonal

    so a step size for each parameter removes all of its dependence on H. Left: eigenvalues of
    ``gauss_newton_matrix``. Right: the formulas. *Proof.* X7.a: the blocks are ``d(s)/A`` times a projection of trace
    ``A-1``, ``d(s)`` from ``A^(1-H)`` to 1; with a unit diagonal the first block is the identity and the later ones
    ``A/(A-1)`` times the projection. ∎
    """
    actions, horizon = case.mdp.reference[0].shape[-1], case.mdp.horizon
    plain, unit = (_conditions(case, scaled=scaled)[0] for scaled in (False, True))
    expected = torch.tensor([actions ** (horizon - 1.0), actions / (actions - 1)], dtype=torch.float64)
    operations = 20 * sum(table.numel() for table in case.mdp.reference)
    return Comparison(torch.stack([plain, unit]), expected, expected.square(), operations)


def _conditions(case: Case, *, scaled: bool) -> Tensor:
    """The condition numbers of TBRM and BRM at logits 0 on uniform data."""
    zero = tuple(torch.zeros_like(table) for table in case.mdp.reference)
    found = []
    for loss in population.LOSSES:
        eigenvalues = conditioning.spectrum(case.mdp, zero, case.mdp.log_reference, loss=loss, scaled=scaled)
        found.append(eigenvalues[-1] / eigenvalues[0])
    return torch.stack(found)


# -- how the reward travels ----------------------------------------------------------------------------------------


def _two_layers(seed: int) -> Case:
    return next(case for case in cases_in_turn(seed) if case.mdp.horizon > 1)


def _outcome(seed: int) -> Case:
    case = _two_layers(seed)
    return replace(case, mdp=with_outcome_reward(case.mdp))


def _constant(seed: int) -> Case:
    case = _two_layers(seed)
    size = case.mdp.beta.item() * (1 + seed % 5)
    return replace(case, mdp=with_outcome_reward(case.mdp, lambda table: torch.full_like(table, size)))


@claim("X7.d", source="own", problem=_outcome, problems=50)
def brm_moves_one_layer_a_step(case: Case) -> Comparison:
    """outcome reward, calibrated start: k gradient steps on BRM leave the logits of layers h ≤ H-k where they are

    so the first layer learns nothing in ``H-1`` steps, whatever the step size. Left: how far they moved in 1, 2, 3
    steps by autograd through ``population_loss``. Right: 0. *Proof.* The residual of a step is ``logit - R_β -
    V_θ(s')``: while layers ``≤ h`` have their ``log π_ref`` and layer ``h+1`` its ``V_θ = 0``, that of layer h is 0.
    A logit's slope comes from the residuals of its own layer and of the one before it; by induction only one more
    layer has one after each step. ∎
    """
    return _unmoved(case, case.log_behaviour, "brm", lambda steps: range(case.mdp.horizon - steps))


@claim("X7.e", source="own", problem=_outcome, problems=50)
def tbrm_moves_all_layers_at_once(case: Case) -> Comparison:
    """outcome reward, calibrated start: ½∇L = -(1/β){E_μ[r 1{s_h=s,a_h=a}] - π_ref(a|s) E_μ[r 1{s_h=s}]}

    for h ≥ 2, without the last term in layer 1: on data of π_ref the policy gradient in every layer at once (I9),
    however long the way to the reward. Left: autograd through ``population_loss``. Right: sums over all trajectories.
    *Proof.* ``f = -r/β`` at the start (I5), in C1's ``½∇L``. ∎
    """
    logits = leaves(case, case.mdp.log_reference)
    loss = population.population_loss(case.mdp, logits, case.log_behaviour)
    gradient = torch.autograd.grad(loss.sum() / 2, logits, allow_unused=True, materialize_grads=True)
    log_law = case.listed.log_law(case.log_behaviour)
    weighted = -log_law.exp() * by_hand.return_in_beta(case)
    right = []
    for h, reference in enumerate(case.mdp.reference):
        states, actions = reference.shape
        pair = case.listed.states[:, h] * actions + case.listed.actions[:, h]
        e = weighted.new_zeros(len(weighted), states * actions).index_add(-1, pair, weighted)
        e = e.unflatten(-1, (states, actions))
        right.append(e if h == 0 else e - reference * e.sum(-1, keepdim=True))
    scale = by_hand.size(log_law, _terms(case)).unsqueeze(-1)
    left = by_hand.existing(case, gradient)
    return Comparison(left, by_hand.existing(case, tuple(right)), scale, 3 * case.sweep + 2 * case.listing)


@claim("X7.f", source="own", problem=_constant, problems=50)
def constant_reward_moves_the_first_layer_only(case: Case) -> Comparison:
    """the same reward for all, data of π_ref, calibrated start: TBRM never moves a layer h ≥ 2, which are optimal already

    ``π* = π_ref``: nothing is to be learnt but the level, and TBRM needs it in the first layer alone. BRM must raise
    all layers' logits by ``r/β``, frequent actions first, and has a wrong policy in each until it is done
    (``experiments/conditioning.py``). Left: how far TBRM moved later logits in 1, 2, 3 steps by autograd. Right: 0.
    *Proof.* While later layers have ``π_ref``, ``f`` is a function of ``(s_1, a_1)``. So ``e_h(s,a) = μ(a|s) e_h(s) =
    π_θ(a|s) e_h(s)``, and the slope ``e_h(s,a) - π_θ(a|s) e_h(s)`` is 0. ∎
    """
    return _unmoved(case, case.mdp.log_reference, "tbrm", lambda steps: range(1, case.mdp.horizon))


def _terms(case: Case) -> Tensor:
    reward: PerLayerStateAction = tuple(table / case.mdp.beta for table in case.mdp.reward)
    return by_hand.magnitude(case, [reward, case.mdp.log_reference])


def _unmoved(case: Case, log_behaviour: PerLayerStateAction, loss: str, still: Callable[[int], range]) -> Comparison:
    """How far the layers ``still(k)`` are from the start after ``k`` steps of gradient descent, against 0.

    The slope where it is 0 is a sum of roundings of terms as large as the residuals.
    """
    start = [leaf.detach() for leaf in leaves(case, case.mdp.log_reference)]
    logits, moved = [table.clone() for table in start], []
    for step in range(1, _STEPS + 1):
        own = [table.requires_grad_() for table in logits]
        value = population.population_loss(case.mdp, tuple(own), log_behaviour, loss=loss).sum()
        slope = torch.autograd.grad(value, own, allow_unused=True, materialize_grads=True)
        logits = [(table - change / 4).detach() for table, change in zip(own, slope, strict=True)]
        moved += [(logits[h] - start[h]).abs().max() for h in still(step)]
    left = torch.stack([torch.zeros((), dtype=torch.float64), *moved])
    scale = len(case.log_behaviour[0]) * 3.0**_STEPS * _terms(case).max()
    return Comparison(left, torch.zeros_like(left), scale, 3 * case.sweep * _STEPS)
