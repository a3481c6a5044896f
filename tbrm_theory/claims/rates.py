"""O1: how fast gradient descent minimises TBRM from anywhere, on any data and any returns (deterministic transitions, tables).

C1's flows give more than the absence of spurious minima: a Polyak-Łojasiewicz inequality with explicit constants, ``‖∇L‖² ≥ (4λ/K²)
(L - min L)``, and a loss that is as smooth as its value is small. So gradient descent with the constant step ``η = 1/(4H - 2 + √L_0)``
converges linearly, whatever the starting point.

* ``λ``: the least positive eigenvalue of the moment matrix ``M = E[φφᵀ]``; for Markov data at least the least mass of a pair (O1.b).
* ``K``: the spectral norm of the triangular matrix ``C_hk = √min(m_{k+1} ⋯ m_h, n_k)``, ``k ≤ h``, where ``n_k`` pairs of layer k
  have data, and at most ``m_h`` pairs with data lead to one state of layer h. On trees ``C`` is all ones, and ``K`` is
  ``1/(2 sin(π/(4H+2))) ≤ (2H+1)/3``, whatever the number of tokens; 1 for H = 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from tbrm_theory.claims import by_hand
from tbrm_theory.claims.cases import Case
from tbrm_theory.claims.comparison import Comparison
from tbrm_theory.claims.convergence import data_laws, small_problem
from tbrm_theory.claims.derivatives import ListedLoss, tables
from tbrm_theory.claims.registry import claim
from tbrm_theory.objectives import SampleObjective
from tbrm_theory.occupancy import moment_matrix
from tbrm_theory.optimisers import least_squares_plan
from tbrm_theory.random_tables import seeded

__all__ = ["Descent", "descent", "flow_constant", "least_eigenvalue"]

STEPS = 30
SCALES = (0.3, 1.0, 3.0, 10.0)
"""Of the starting points, standard deviations of logits."""


def least_eigenvalue(moments: Float[Tensor, "pairs pairs"]) -> Tensor:
    """``λ``, the least positive eigenvalue; those below 1e-9 are rounding."""
    eigenvalues = torch.linalg.eigvalsh(moments)
    return eigenvalues[eigenvalues > 1e-9].min()


def flow_constant(case: Case, loss: ListedLoss) -> float:
    """``K``."""
    existing = tables(case.mdp, (loss.mass > 0).to(torch.float64))
    seen = [torch.where(table > 0, 1.0, 0.0).to(torch.float64) for table in existing]
    merged = [kernel.push(table).max().item() for kernel, table in zip(case.mdp.transitions, seen, strict=False)]
    matrix = torch.zeros(len(seen), len(seen), dtype=torch.float64)
    for k, table in enumerate(seen):
        for h in range(k, len(seen)):
            matrix[h, k] = min(math.prod(merged[k:h]), table.sum().item()) ** 0.5
    return torch.linalg.matrix_norm(matrix, 2).item()


@dataclass(frozen=True, eq=False)
class Descent:
    """Gradient descent on a small problem, from a starting point of each of :data:`SCALES`."""

    case: Case
    loss: ListedLoss
    objective: SampleObjective
    least: Tensor
    """``min L`` by :func:`least_squares_plan`."""
    path: Float[Tensor, "steps starts pairs"]
    step: Float[Tensor, " starts"]
    """``η``."""
    losses: Float[Tensor, "steps starts"]
    """``L`` along the path, by the objective."""
    size: Tensor
    """Of the squared terms."""

    @property
    def operations(self) -> int:
        return 2 * self.case.sweep + self.case.listing


@lru_cache(maxsize=4)
def descent(seed: int, noisy: bool) -> Descent:
    """Data of the kind that the seed says; returns with normal noise, or without."""
    case = small_problem(seed)
    law, generator = data_laws(case)[seed % 5, 0], seeded(seed)
    noise = 2.0 * noisy * torch.randn(law.shape, generator=generator, dtype=torch.float64)
    loss = ListedLoss.of(case.mdp, case.listed, law).observing(noise)
    objective = SampleObjective(
        case.mdp, case.trajectories, law, (by_hand.return_in_beta(case) + noise) * case.mdp.beta
    )
    draws = torch.randn(len(SCALES), len(loss.state), generator=generator, dtype=torch.float64)
    theta = draws * torch.tensor(SCALES, dtype=torch.float64).unsqueeze(-1)
    step = 1 / (4 * case.mdp.horizon - 2 + loss.value(theta).sqrt())
    path = [theta]
    for _ in range(STEPS):
        path.append(path[-1] - step.unsqueeze(-1) * loss.gradient(path[-1]))
    points = torch.stack(path)
    size = (points.abs().amax() + loss.reward.abs().amax() + noise.abs().amax() + 1) * case.mdp.horizon
    losses = objective.loss(tables(case.mdp, points))
    least = objective.loss(least_squares_plan(objective)) if noisy else torch.zeros((), dtype=torch.float64)
    return Descent(case, loss, objective, least, points, step, losses, size.square())


@claim("O1.a", source="own", problem=small_problem)
def gradient_bounds_the_loss(case: Case) -> Comparison:
    """deterministic, any data and returns: (4λ/K²)(L - min L) ≤ ‖∇L‖²

    Left: ``SampleObjective`` and ``least_squares_plan``; ``λ`` by eigenvalues. Right: ``derivatives``. *Proof.* In the
    proof of C1.a the flow ``e_h``, 0 on pairs without data, is the sum over ``k ≤ h`` of what ``G_k`` on pairs with data sends
    through π and such pairs to layer h. That has ℓ1-norm
    at most ``‖G_k‖₁ ≤ √n_k ‖G_k‖₂``; and ``‖π(·|s) x(s)‖₂ ≤ ‖x‖₂``, while merging m pairs multiplies a 2-norm by at most
    ``√m``: ``‖e_h‖₂ ≤ Σ_k C_hk ‖G_k‖₂``, hence ``‖e‖₂ ≤ K ‖G‖₂``. With ``v = u - u*`` as in C1.d, ``e = M v`` and
    ``L - min L = vᵀ M v ≤ ‖M v‖²/λ = ‖e‖²/λ ≤ (K²/λ) ‖∇L‖²/4``. ∎
    """
    run = descent(case.seed, True)
    factor = 4 * least_eigenvalue(run.loss.moments) / flow_constant(case, run.loss) ** 2
    right = run.loss.gradient(run.path).square().sum(-1)
    return Comparison(factor * (run.losses - run.least), right, 4 * run.size, run.operations, "at most")


@claim("O1.b", source="own", problem=small_problem)
def eigenvalues_of_markov_data(case: Case) -> Comparison:
    """deterministic, Markov data: min d_h(s,a) ≤ λ

    over pairs with data. Left: sums over trajectories. Right: eigenvalues of ``moment_matrix``. *Proof.* Let ``D = diag
    d``, ``M = D^½ N D^½``, ``g`` of least norm ``Σ_h E g_h²`` among the additive functions that agree with it on the
    data. By I11 the function is also the sum of its orthogonal increments, ``Δ_h`` a function of ``(s_h,a_h)``, so
    ``Σ_h E g_h² ≤ Σ_h E Δ_h² = E(Σ_h g_h)²``: the positive eigenvalues of N are at least 1. So ``‖M v‖² ≥ min d · wᵀ N² w
    ≥ min d · wᵀ N w = min d · vᵀ M v`` with ``w = D^½ v``. ∎ For other data it fails.
    """
    left, right = [], []
    for log_policy in (case.log_behaviour, case.other_policy):
        law = case.listed.log_law(log_policy).exp()
        mass = ListedLoss.of(case.mdp, case.listed, law).mass
        for draw in range(len(law)):
            matrix = moment_matrix(case.mdp, tuple(table[draw] for table in log_policy))
            exists = torch.cat([valid.flatten() for valid in case.mdp.valid])
            left.append(mass[draw][mass[draw] > 0].min())
            right.append(least_eigenvalue(matrix[exists][:, exists]))
    scale = torch.tensor(float(case.mdp.horizon), dtype=torch.float64)
    return Comparison(torch.stack(left), torch.stack(right), scale, 2 * case.sweep + case.listing, "at most")


@claim("O1.c", source="own", problem=small_problem)
def smoothness(case: Case) -> Comparison:
    """any returns: ‖∇²L‖ ≤ 4H - 2 + √L

    Left: the Hessian written out, its eigenvalues. Right: ``SampleObjective``. *Proof.* ``∇²L = 2E[∇f ∇fᵀ] + 2E[f ∇²f]``.
    ``∇f`` is a unit vector in layer 1 and ``e_a - π``, of length at most √2, in each later one: ``‖∇f‖² ≤ 2H - 1``.
    ``E[f ∇²f]`` is block diagonal over states, a block being ``-E[f 1{s_h=s}] (diag π - ππᵀ)``, of norm at most ``½ E|f|
    ≤ ½√L``. ∎
    """
    run = descent(case.seed, True)
    ends = run.path[[0, -1]]
    left = torch.linalg.eigvalsh(run.loss.hessian(ends)).abs().amax(-1)
    right = 4 * case.mdp.horizon - 2 + run.losses[[0, -1]].sqrt()
    return Comparison(left, right, right, run.operations, "at most")


@claim("O1.d", source="own", problem=small_problem)
def gradient_descent_converges_linearly(case: Case) -> Comparison:
    """gradient descent, any start: L_k - min L ≤ (1 - 2ηλ/K²)^k (L_0 - min L)

    with ``η = 1/(4H - 2 + √L_0)``, 30 steps from four starts. Left: ``SampleObjective`` and ``least_squares_plan``.
    Right: O1.a's constants. *Proof.* While a step stays where ``L ≤ L_0`` the Hessian is at most ``1/η`` (O1.c), so along
    it ``L`` only falls, which keeps it there to its end, and ``L_{k+1} ≤ L_k - (η/2)‖∇L_k‖²``; then O1.a. ∎
    """
    run = descent(case.seed, True)
    rate = 2 * run.step * least_eigenvalue(run.loss.moments) / flow_constant(case, run.loss) ** 2
    steps = torch.arange(1, len(run.losses), dtype=torch.float64).unsqueeze(-1)
    gap = run.losses - run.least
    return Comparison(gap[1:], (1 - rate) ** steps * gap[0], run.size, run.operations, "at most")


@claim("O1.e", source="own", problem=small_problem)
def gradient_descent_whatever_the_conditioning(case: Case) -> Comparison:
    """gradient descent, no noise: 1/L_k ≥ 1/L_0 + 2ηk/(n H² U²)

    ``n`` pairs with data, ``U`` the largest ``|u|`` on them along the way; nothing depends on ``λ``. Left:
    ``L_k/L_0`` by ``SampleObjective``. Right: what the bound says of it. *Proof.* As O1.d, with ``‖∇L‖₂² ≥ ‖∇'L‖₁²/n ≥
    4L²/(n H² U²)``, ``∇'`` the gradient on the n pairs, which is all that C1.a's proof needs of it since ``e_h`` is 0
    elsewhere; and ``1/(L - x) ≥ 1/L + x/L²``. ∎ For gradient flow, twice as fast: ``1/L(t) ≥ 1/L_0 +
    4t/(n H² U²)``.
    """
    run = descent(case.seed, False)
    seen = run.loss.mass > 0
    largest = torch.where(seen, run.loss.terms(run.path).abs(), 0.0).amax((0, -1))
    steps = torch.arange(1, len(run.losses), dtype=torch.float64).unsqueeze(-1)
    slope = 2 * run.step / (seen.sum() * case.mdp.horizon**2 * largest.square())
    right = 1 / (1 + steps * slope * run.losses[0])
    return Comparison(run.losses[1:] / run.losses[0], right, run.size / run.losses[0], run.operations, "at most")
