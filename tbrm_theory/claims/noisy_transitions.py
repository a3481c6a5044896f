"""X2: what stochastic transitions do to TBRM's minimiser.

The problems of X2.c and X2.d are :func:`lottery`: built backwards from a wrong policy, so that it is a stationary
point in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tbrm_theory import control_variate, dynamic_programming, population
from tbrm_theory.claims import by_hand
from tbrm_theory.claims.cases import Case, case_of, cases_in_turn
from tbrm_theory.claims.comparison import Comparison
from tbrm_theory.claims.identities import stochastic
from tbrm_theory.claims.registry import claim
from tbrm_theory.claims.residual_identities import leaves, squares, terms, values_differ
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.random_tables import draw_simplex, seeded
from tbrm_theory.shapes import PerLayerState, PerLayerStateAction
from tbrm_theory.transitions import DenseTransition

__all__ = ["Lottery", "carried_noise", "lottery", "mean_next"]

_MOST_PAIRS = 40  # of a Hessian
_NOISY = ("dense-random", "garnet", "chain", "frozen-lake", "cliff-walking")
"""The families that have stochastic transitions, some of the time."""


# -- X2 ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Lottery:
    """A draw of one of several states, one choice in each, and a wrong policy that is stationary all the same."""

    mdp: RegularizedMDP
    logits: PerLayerStateAction
    luck: Tensor
    """``m(s)``, the mean residual in each state of the second layer; its mean over states is 0."""


def lottery(seed: int) -> Lottery:
    """Wrong policies π and lucks m drawn at random, rewards made to fit.

    Data are the reference's, ``μ = π_ref``. The first layer has one action of reward 0, and ``V_θ(s_1) = 0``. With
    ``R_β(s,a) = log π(a|s) - π(a|s) m(s)/μ(a|s)`` the residual is ``f = π m/μ``.
    """
    generator = seeded(seed)
    states, actions = (int(torch.randint(2, 5, (), generator=generator)) for _ in range(2))
    chance = draw_simplex((states,), generator)
    policy, reference = (draw_simplex((states, actions), generator) for _ in range(2))
    policy, reference = (0.9 * table + 0.1 / actions for table in (policy, reference))
    luck = 0.3 * torch.randn(states, generator=generator, dtype=torch.float64)
    luck = luck - (chance * luck).sum()
    beta = 0.1 + torch.rand((), generator=generator, dtype=torch.float64).item()
    scaled = policy.log() - policy * luck.unsqueeze(-1) / reference
    mdp = RegularizedMDP(
        beta=beta,
        initial=torch.ones(1),
        reward=[torch.zeros(1, 1), beta * (scaled - reference.log())],
        reference=[torch.ones(1, 1), reference],
        transitions=[DenseTransition(chance.expand(1, 1, -1))],
    )
    return Lottery(mdp, (torch.zeros(1, 1, dtype=torch.float64), policy.log()), luck)


def _lottery_case(seed: int) -> Case:
    made = lottery(seed)
    case = case_of(made.mdp, "X2", seed)
    return replace(case, log_behaviour=made.mdp.log_reference, logits=made.logits)


def downhill(case: Case) -> str | None:
    """θ* is not stationary."""
    slope = torch.stack([table.abs().amax((-2, -1)) for table in _slope_at_the_optimum(case)]).amax(0)
    return None if bool((slope > 1e-6).all()) else "stationary at θ*"


def _noisy(seed: int) -> Case:
    usable = (stochastic, values_differ, downhill)
    return next(c for c in cases_in_turn(seed, _NOISY) if not (c.too_large or any(why(c) for why in usable)))


def _small_noisy(seed: int) -> Case:
    usable = (stochastic, small_enough_for_a_hessian)
    return next(c for c in cases_in_turn(seed, _NOISY) if not any(why(c) for why in usable))


STEPS = 12
"""Step lengths that are tried; beyond them what the slope promises would drown in rounding."""


@claim("X2.a", source="own", requires=[stochastic, values_differ, downhill], problem=_noisy, problems=200)
def optimum_is_no_minimum(case: Case) -> Comparison:
    """stochastic: min L_μ ≤ L_μ(θ*) - t‖∇L_μ(θ*)‖²/4 < L_μ(θ*) for some t > 0

    so TBRM's minimiser lies below the noise floor of I7 and is another policy. Left: the loss after a step ``-t ∇L``
    from θ*, over all trajectories. Right: ``noise_floor`` less what half of the slope promises, the gradient by
    I7.e's formula; the first of ``t = 1, ½, ¼, …`` that will do. *Proof.* A differentiable function falls by at least
    a quarter of ``t‖∇‖²`` along ``-∇`` for small t, and I7.e says where ``∇L_μ(θ*) ≠ 0``: luck before a choice, and
    ``μ ≠ π*`` there. ∎
    """
    log_law, slope = case.listed.log_law(case.log_behaviour), _slope_at_the_optimum(case)
    square = torch.stack([table.square().sum((-2, -1)) for table in slope]).sum(0)
    floor = population.noise_floor(case.mdp, case.log_behaviour)
    left, right, step = torch.zeros_like(square), torch.zeros_like(square), torch.ones_like(square)
    pending = torch.ones_like(square, dtype=torch.bool)
    for _ in range(STEPS):
        moved = tuple(q - step[:, None, None] * table for q, table in zip(case.solution.q, slope, strict=True))
        loss = by_hand.expectation(log_law, by_hand.residual(case, moved).square())
        left, right = torch.where(pending, loss, left), torch.where(pending, floor - step * square / 4, right)
        pending = pending & (left > right)
        if not bool(pending.any()):
            break
        step = torch.where(pending, step / 2, step)
    bound = squares(case, left, right, log_law, case.solution.q)
    return Comparison(left, right, bound.scale, bound.operations, "at most")


def _slope_at_the_optimum(case: Case) -> PerLayerStateAction:
    """``∇L_μ(θ*) = 2 d^μ_h(s) b_h(s) [μ_h(a|s) - π*_h(a|s)]`` (I7.e), ``d b`` by sums over all trajectories."""
    carried = carried_noise(case)
    return tuple(
        2 * before.unsqueeze(-1) * (log_mu.exp() - log_star.exp())
        for (before, _), log_mu, log_star in zip(carried, case.log_behaviour, case.solution.log_policy, strict=True)
    )


def carried_noise(case: Case) -> list[tuple[Tensor, Tensor]]:
    """``E_μ[Σ_{k<h} n_k 1{s_h=s}]`` and ``E_μ[n_{h-1} 1{s_h=s}]`` of every layer, ``n_k = E[V*(s')|s_k,a_k] - V*(s_{k+1})``."""
    log_law, states = case.listed.log_law(case.log_behaviour), case.listed.states
    noise = last = torch.zeros(len(states), dtype=torch.float64)
    found = []
    for h in range(case.mdp.horizon):

        def at_state(amount: Tensor, h: int = h) -> Tensor:
            weighted = log_law.exp() * amount
            size = case.log_behaviour[h].shape[-2]
            return weighted.new_zeros(*weighted.shape[:-1], size).index_add(-1, states[:, h], weighted)

        found.append((at_state(noise), at_state(last)))
        if h < case.mdp.horizon - 1:
            last = mean_next(case, case.solution.v, h) - case.solution.v[h + 1][states[:, h + 1]]
            noise = noise + last
    return found


def mean_next(case: Case, v: PerLayerState, h: int) -> Tensor:
    """``E[v(s_{h+1})|s_h,a_h]`` on every trajectory, over the edges of the kernel."""
    successors, probability = case.mdp.transitions[h].edges()
    mean = (probability * v[h + 1][..., successors]).sum(-1)
    return mean[..., case.listed.states[:, h], case.listed.actions[:, h]]


def small_enough_for_a_hessian(case: Case) -> str | None:
    pairs = sum(table.numel() for table in case.mdp.reference)
    return None if pairs <= _MOST_PAIRS else f"more than {_MOST_PAIRS} pairs"


@claim("X2.b", source="own", requires=[stochastic, small_enough_for_a_hessian], problem=_small_noisy, problems=100)
def optimum_may_be_a_saddle(case: Case) -> Comparison:
    """stochastic, data of π*: ½∇²L(θ*) is d_h(s)(1 - b_h(s))(diag π* - π*π*ᵀ) on each state of h ≥ 2

    ``d_1(s) diag π*`` in layer 1, and 0 between states; ``b_h(s)`` is the mean bad luck on the way to s, I7.e's
    ``b``. So θ*, stationary on its own data, is a minimum only if ``b_h(s) ≤ 1`` at all states with a choice, β in
    reward units, and a saddle if one exceeds 1. Left: autograd, twice, through ``population_loss``. Right:
    ``noise_before`` and occupancies by sums over all trajectories. *Proof.* ``½∇²L = E[∇f ∇fᵀ] + E[f ∇²f]``. The
    first is X7.a's. A visit to ``s_h``, ``h ≥ 2``, adds ``-(diag π - π πᵀ)`` to ``∇²f``, that of ``-V_θ(s_h)``;
    nothing else bends. Its factor is ``E[f 1{s_h=s}] = d b``, as noise from ``h`` on has mean 0. ∎
    """
    data = case.solution.log_policy
    pairs = [table.numel() for table in case.mdp.reference]
    copies = [torch.where(valid, q, 0.0) for q, valid in zip(case.solution.q, case.mdp.valid, strict=True)]
    own = tuple(table.expand(sum(pairs), *table.shape).clone().requires_grad_() for table in copies)
    loss = population.population_loss(case.mdp, own, data)
    slopes = torch.autograd.grad(loss.sum(), own, create_graph=True)
    entry = torch.cat([slope.flatten(1) for slope in slopes], dim=-1).diagonal().sum()  # of copy i the i-th
    left = torch.cat([row.flatten(1) for row in torch.autograd.grad(entry, own)], dim=-1) / 2
    law = case.listed.log_law(data).exp()
    blocks = []
    for h, (before, log) in enumerate(zip(control_variate.noise_before(case.mdp, data), data, strict=True)):
        mass = torch.zeros(len(before), dtype=torch.float64).index_add(0, case.listed.states[:, h], law)
        for weight, row in zip(mass - before, log.exp(), strict=True):
            blocks.append(weight * (torch.diag(row) - (torch.outer(row, row) if h else 0.0)))
    size = by_hand.size(case.listed.log_law(data), terms(case, case.solution.q))
    return Comparison(left, torch.block_diag(*blocks), size, 6 * case.sweep + 2 * case.listing)


@claim("X2.c", source="own", problem=_lottery_case, problems=100)
def luck_is_taken_for_skill(case: Case) -> Comparison:
    """a wrong policy is stationary: log π/π* = π m/μ + c(s), m(s) the luck of state s

    where the mean of ``m`` over states is 0: for uniform μ, π is flatter than π* in a lucky state (``m < 0``), steeper in
    an unlucky one. Left: autograd through ``population_loss``. Right: 0. *Proof.* ``½∂L/∂logit(s,a) = e(s,a) - π(a|s) e(s)``
    with ``e(s,a) = P(s) μ f = P(s) π m`` and ``e(s) = P(s) m``, which is 0; and in the first layer ``½∂L = Σ_s P(s)
    m(s) = 0``. ∎
    """
    logits = leaves(case, case.logits)
    loss = population.population_loss(case.mdp, logits, case.log_behaviour)
    left = by_hand.existing(case, torch.autograd.grad(loss.sum(), logits))
    log_law = case.listed.log_law(case.log_behaviour)
    scale = 2 * by_hand.size(log_law, terms(case, case.logits) + by_hand.magnitude(case, [case.solution.q]))
    return Comparison(left, torch.zeros_like(left), scale, 2 * case.sweep + case.listing)


@claim("X2.d", source="own", problem=_lottery_case, problems=100)
def price_of_luck(case: Case) -> Comparison:
    """the regret of X2.c's policy is β Σ_s P(s) {m Σ_a π²/μ + log Σ_a π exp(-π m/μ)} > 0

    Left: ``regret``. Right: the formula, with nothing but π, m and μ. *Proof.* X2.c's ``log π/π*`` in I3. ∎
    """
    luck, policy, data = lottery(case.seed).luck, case.logits[1].exp(), case.mdp.reference[1]
    chance = case.mdp.transitions[0].edges()[1][0, 0]
    tilt = policy * luck.unsqueeze(-1) / data
    by_state = (policy * tilt).sum(-1) + (policy * (-tilt).exp()).sum(-1).log()
    right = case.mdp.beta * (chance * by_state).sum()
    left = dynamic_programming.regret(case.mdp, tuple(torch.log_softmax(q, -1) for q in case.logits))
    size = by_hand.size(case.listed.log_law(case.mdp.log_reference), terms(case, case.logits))
    worth = case.mdp.beta * (1 + tilt.abs().max().exp()) * (size + case.solution.scale)
    return Comparison(left, right, worth, 2 * case.sweep + case.listing)
