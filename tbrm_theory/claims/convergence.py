"""C1, C2: on deterministic transitions the tabular loss has no stationary point but its minimum, and that minimum is the optimum.

One side is the loss that is trained with, or autograd through it, or ``least_squares_plan``; the other is ``derivatives``, written
out, or a dense least-squares fit. Every kind of data is tried: Markov, a mixture drawn once for each episode, history-dependent,
Markov with actions left out, and a small sample.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from tbrm_theory import dynamic_programming, population
from tbrm_theory.behaviours import HistoryBehaviour, MixtureBehaviour
from tbrm_theory.claims import by_hand
from tbrm_theory.claims.cases import DRAWS, Case, case_of
from tbrm_theory.claims.comparison import Comparison
from tbrm_theory.claims.derivatives import ListedLoss, flat, tables
from tbrm_theory.claims.identities import deterministic
from tbrm_theory.claims.registry import claim
from tbrm_theory.claims.residual_identities import residuals, tbrm, terms
from tbrm_theory.families import make
from tbrm_theory.objectives import SampleObjective
from tbrm_theory.optimisers import least_squares_plan
from tbrm_theory.random_tables import seeded

__all__ = ["data_laws", "small_problem", "stationary_points"]

_SMALL = (
    ("deterministic-dag", {"horizon": 3, "states": 2, "actions": 2, "reference": "dirichlet"}),
    ("deterministic-tree", {"horizon": 3, "actions": 2, "roots": 1}),
    ("one-state", {"horizon": 3, "actions": 2, "reference": "dirichlet"}),
    ("deterministic-tree", {"horizon": 2, "actions": 3, "roots": 2}),
    ("deterministic-dag", {"horizon": 2, "states": 3, "actions": 2, "missing": 0.3}),
)


@lru_cache(maxsize=4)
def small_problem(seed: int) -> Case:
    """A tree or a problem with merging states, of at most 24 trajectories."""
    family, options = _SMALL[seed % len(_SMALL)]
    return case_of(make(family, seed=seed, **options), "C1", seed)


@lru_cache(maxsize=4)
def data_laws(case: Case) -> Float[Tensor, "kinds draws trajectories"]:
    """Laws on the listed trajectories, one row for each kind of data."""
    listed, mdp = case.listed, case.mdp
    generator = seeded(case.seed)
    sample = torch.randint(len(listed.states), (DRAWS, 1 + case.seed % 7), generator=generator)
    counts = torch.zeros(DRAWS, len(listed.states), dtype=torch.float64)
    counts = counts.scatter_add(-1, sample, torch.ones_like(sample, dtype=torch.float64))
    laws = [
        listed.log_law(case.log_behaviour).exp(),
        MixtureBehaviour((0.3, 0.7), (case.log_behaviour, case.other_policy)).log_law(mdp, listed).exp(),
        HistoryBehaviour(case.log_policy, 0.6).log_law(mdp, listed).exp(),
        listed.log_law(case.other_policy).exp(),
        counts / sample.shape[-1],
    ]
    return torch.stack(laws)


# -- C1 --------------------------------------------------------------------------------------------------------------


@claim("C1.a", source="own", requires=[deterministic])
def gradient_domination(case: Case) -> Comparison:
    """deterministic, any data: L ≤ (H/2) max|u| ‖∇L‖₁

    with the maximum over pairs that have data. Left: ``tbrm_residual``, squared, under each kind of data. Right:
    ``derivatives``. *Proof.* ``G = ½∇L`` is ``e_1`` in layer 1 and ``e_h(s,a) - π_θ(a|s) e_h(s)`` later, where
    ``e_h(s,a) = E[f 1{s_h=s, a_h=a}]`` and ``e_h(s)`` sums ``e_{h-1}`` over the pairs that lead to s. So ``‖e_h‖₁ ≤
    ‖G_h‖₁ + ‖e_{h-1}‖₁ ≤ ‖G‖₁``, and since ``f = Σ_h u_h``, ``L = Σ_h ⟨u_h, e_h⟩ ≤ H max|u| ‖G‖₁``. ∎ In particular
    ``∇L = 0 ⇒ L = 0``.
    """
    laws = data_laws(case)
    left = (laws * tbrm(case, case.logits).square()).sum(-1)
    loss, theta = ListedLoss.of(case.mdp, case.listed, laws), flat(case.mdp, case.logits)
    largest = torch.where(loss.mass > 0, loss.terms(theta).abs(), 0.0).amax(-1)
    right = case.mdp.horizon / 2 * largest * loss.gradient(theta).abs().sum(-1)
    size = terms(case, case.logits)
    scale = (laws * size.square()).sum(-1) + case.mdp.horizon * largest * (laws * size).sum(-1)
    return Comparison(left, right, scale, 2 * case.sweep + case.listing, "at most")


@claim("C1.b", source="own", requires=[deterministic])
def gradient_by_flows(case: Case) -> Comparison:
    """deterministic, any data: ½∇L = e_h(s,a) - π_θ(a|s) e_h(s)

    without the second term in layer 1, ``e_h(s)`` as the sum of ``e_{h-1}`` over the pairs that lead to s. Left:
    autograd through ``tbrm_residual``. Right: ``e`` by sums over trajectories, pushed along the edges. *Proof.*
    ``∂f/∂logit_h(s,a) = 1{s_h=s}(1{a_h=a} - π_θ(a|s))`` by I5, and ``1{s_h=s, a_h=a}`` in layer 1; a state that follows
    for sure is visited when a pair that leads to it is. ∎
    """
    laws, mdp = data_laws(case), case.mdp
    leaf = tuple(
        torch.where(valid, table, 0.0).expand(len(laws), *table.shape).clone().requires_grad_()
        for table, valid in zip(case.logits, mdp.valid, strict=True)
    )
    loss = (laws * tbrm(case, leaf).square()).sum()
    gradient = torch.autograd.grad(loss, leaf, allow_unused=True, materialize_grads=True)
    e = ListedLoss.of(mdp, case.listed, laws).collected_residual(flat(mdp, case.logits))
    right, start, arriving = [], 0, None
    for h, (valid, table) in enumerate(zip(mdp.valid, case.logits, strict=True)):
        count = int(valid.sum())
        own = torch.zeros(*e.shape[:-1], *valid.shape, dtype=torch.float64)
        own[..., valid] = e[..., start : start + count]
        start += count
        right.append(2 * own if arriving is None else 2 * (own - torch.softmax(table, -1) * arriving.unsqueeze(-1)))
        if h < mdp.horizon - 1:
            arriving = mdp.transitions[h].push(own)
    scale = 2 * (laws * terms(case, case.logits)).sum(-1, keepdim=True)
    left, flows = by_hand.existing(case, gradient), by_hand.existing(case, tuple(right))
    return Comparison(left, flows, scale, 2 * case.sweep + case.listing)


def _bandit(seed: int) -> Case:
    return case_of(make("deterministic-tree", seed=seed, horizon=1, actions=4, roots=3), "C1", seed)


@claim("C1.c", source="own", problem=_bandit)
def domination_is_attained(case: Case) -> Comparison:
    """H = 1 and |u| constant: L = ½ max|u| ‖∇L‖₁

    Left: ``population_loss``. Right: autograd through it. *Proof.* ``u = f`` there, so ``L = Σ μ u²`` and ``∇L = 2μu``. ∎
    """
    signs = torch.sign(case.additive[0])
    [reward], height = case.mdp.regularized_reward, 1 + case.additive[0][:, :1, :1].abs()
    logits = (reward + height * signs).requires_grad_()
    left = population.population_loss(case.mdp, (logits,), case.log_behaviour)
    (gradient,) = torch.autograd.grad(left.sum(), logits)
    right = 0.5 * height[:, 0, 0] * gradient.abs().sum((-2, -1))
    scale = terms(case, (logits.detach(),)).amax(-1).square()
    return Comparison(left.detach(), right, scale, 2 * case.sweep + case.listing)


@claim("C1.d", source="own", problem=small_problem)
def gradient_domination_with_noise(case: Case) -> Comparison:
    """deterministic, any data, any returns: L - min L ≤ (H/2) max|u - u*| ‖∇L‖₁

    ``u*`` any least-squares fit of the returns by additive functions. So a stationary point is a global minimum. Left:
    the loss of a ``SampleObjective`` with random returns, less that of ``least_squares_plan``. Right: ``derivatives``
    and a dense fit. *Proof.* Every additive function is ``f + `` returns for some θ (I14), so at the minimum the
    residual is orthogonal to all of them, and ``L - min L = E(Σ(u - u*))² = Σ⟨u - u*, e⟩``; then as C1.a. ∎
    """
    law = data_laws(case)[case.seed % 5, 0]
    noise = 3 * torch.randn(law.shape, generator=seeded(case.seed), dtype=torch.float64)
    observed = by_hand.return_in_beta(case) + noise
    objective = SampleObjective(case.mdp, case.trajectories, law, observed * case.mdp.beta)
    left = objective.loss(case.logits) - objective.loss(least_squares_plan(objective))
    loss = ListedLoss.of(case.mdp, case.listed, law).observing(noise)
    theta = flat(case.mdp, case.logits)
    root = law.sqrt().unsqueeze(-1)
    fit = torch.linalg.lstsq(root * loss.visits, root * noise.unsqueeze(-1), driver="gelsd").solution.squeeze(-1)
    largest = torch.where(loss.mass > 0, (loss.terms(theta) - fit).abs(), 0.0).amax(-1)
    right = case.mdp.horizon / 2 * largest * loss.gradient(theta).abs().sum(-1)
    size = terms(case, case.logits) + noise.abs()
    scale = (law * size.square()).sum(-1) + case.mdp.horizon * largest * (law * size).sum(-1)
    return Comparison(left, right, scale, 2 * case.sweep + case.listing, "at most")


# -- C2 --------------------------------------------------------------------------------------------------------------


@claim("C2.a", source="own", requires=[deterministic])
def optimum_has_no_loss(case: Case) -> Comparison:
    """deterministic: π_θ = π* and V_θ = V* in layer 1 ⇒ f_θ = 0 on every trajectory

    θ is ``Q*`` with random constants on the states of later layers. Left: ``tbrm_residual``. Right: 0. *Proof.* I6. ∎
    """
    first, *later = case.solution.q
    moved = (first.expand(DRAWS, -1, -1), *(q + c.unsqueeze(-1) for q, c in zip(later, case.gauge[1:], strict=True)))
    f = tbrm(case, moved)
    return residuals(case, f, torch.zeros_like(f), moved)


@claim("C2.b", source="own", requires=[deterministic])
def loss_bounds_the_distance(case: Case) -> Comparison:
    """deterministic, μ > 0: |log π_θ/π*| ≤ 2√(L/min μ), |V_θ - V*| ≤ √(L/min μ)

    on every reachable pair and first state, so ``L = 0`` only at the optimum, and away from it ``L > 0``. Tried far from
    the optimum and beside it. Left: ``soft_policy`` and ``soft_value``, less those of ``solve``. Right: ``derivatives``.
    *Proof.* ``|f| ≤ F := √(L/min μ)`` on every trajectory, and by I6 ``P_θ(τ|s_1) = P_*(τ|s_1) e^{f - (V_θ - V*)(s_1)}``.
    Summing, ``e^{V_θ - V*} = E_* e^f ∈ [e^{-F}, e^F]``. ``π_θ(a|s)`` is the ratio of the masses of the trajectories
    through ``(s,a)`` and through ``s`` that share a path to s; both are those of ``P_*`` times means of ``e^f``. ∎
    """
    near = tuple(
        q + 1e-3 * torch.where(valid, table, 0.0)
        for q, valid, table in zip(case.solution.q, case.mdp.valid, case.additive, strict=True)
    )
    logits = tuple(torch.cat(pair) for pair in zip(case.logits, near, strict=True))
    law = case.listed.log_law(case.log_behaviour)[0].exp()
    farthest = torch.sqrt(ListedLoss.of(case.mdp, case.listed, law).value(flat(case.mdp, logits)) / law.min())
    policy = tuple(
        torch.where(valid, dynamic_programming.soft_policy(table) - star, 0.0)
        for valid, table, star in zip(case.mdp.valid, logits, case.solution.log_policy, strict=True)
    )
    steps = torch.stack(
        [table[..., case.listed.states[:, h], case.listed.actions[:, h]] for h, table in enumerate(policy)]
    )
    value = (dynamic_programming.soft_value(logits[0]) - case.solution.v[0])[..., case.listed.states[:, 0]]
    left = torch.stack([steps.abs().amax((0, -1)), value.abs().amax(-1)])
    size = (terms(case, logits) + by_hand.magnitude(case, [case.solution.q], [case.solution.v])).amax(-1)
    return Comparison(left, torch.stack([2 * farthest, farthest]), size / law.min().sqrt(), 4 * case.sweep, "at most")


STARTS = 16
"""Random starting points of a search for stationary points."""
AT_REST = 1e-12
"""A point with a smaller gradient counts as stationary."""


def stationary_points(
    loss: ListedLoss, theta: Float[Tensor, "... pairs"], *, iterations: int = 40
) -> Float[Tensor, "... pairs"]:
    """Where damped Gauss-Newton steps on ``‖∇L‖²`` lead: to saddles and maxima as readily as to minima."""
    damping = theta.new_full((*theta.shape[:-1], 1), 1e-2)
    gradient = loss.gradient(theta)
    square = gradient.square().sum(-1, keepdim=True)
    for _ in range(iterations):
        if square.max() < AT_REST**2:
            break
        hessian = loss.hessian(theta)
        normal = hessian.mT @ hessian + torch.diag_embed((damping * square.sqrt()).expand(theta.shape) + 1e-14)
        step = torch.linalg.solve(normal, (hessian.mT @ gradient.unsqueeze(-1))).squeeze(-1)
        tried = loss.gradient(theta - step)
        better = tried.square().sum(-1, keepdim=True) < square
        theta, gradient = torch.where(better, theta - step, theta), torch.where(better, tried, gradient)
        square = gradient.square().sum(-1, keepdim=True)
        damping = (damping * torch.where(better, 0.3, 4.0)).clamp(1e-8, 1e8)
    return theta


@claim("C1.e", source="own", problem=small_problem)
def every_stationary_point_found_has_no_loss(case: Case) -> Comparison:
    """deterministic, any data: of 16 random starts all that reach ∇L = 0 reach L = 0

    The search is for stationary points of any kind, from logits of standard deviation 3, and stops at ``‖∇L‖ ≤ 1e-12``.
    Left: ``√L`` there, by ``tbrm_residual``; 0 where the search stopped elsewhere. Right: what so small a gradient
    allows, ``1e-11 H √P/(2√λ)``, with ``λ`` the least positive eigenvalue of the moment matrix (O1.a). Proof: C1.a.
    """
    law = data_laws(case)[case.seed % 5, 0]
    loss = ListedLoss.of(case.mdp, case.listed, law)
    starts = 3 * torch.randn(STARTS, len(loss.state), generator=seeded(case.seed), dtype=torch.float64)
    found = stationary_points(loss, starts)
    logits = tables(case.mdp, found)
    at_rest = loss.gradient(found).norm(dim=-1) < 10 * AT_REST
    left = torch.where(at_rest, (law * tbrm(case, logits).square()).sum(-1).sqrt(), 0.0)
    eigenvalues = torch.linalg.eigvalsh(loss.moments)
    least = eigenvalues[eigenvalues > 1e-9].min()
    right = (5 * AT_REST * case.mdp.horizon * len(loss.state) ** 0.5 / least.sqrt()).expand(left.shape)
    return Comparison(left, right, terms(case, logits).amax(-1), 2 * case.sweep + case.listing, "at most")
