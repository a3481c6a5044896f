"""C4: what the empirical minimiser is, with and without noise in the returns.

Samples are counts over listed trajectories. Without noise one side is ``least_squares_plan``, the other ``solve``; with noise many
data sets are fitted at once by their moment matrices.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tbrm_theory import dynamic_programming, policy_class, population, sample_bounds
from tbrm_theory.claims import by_hand
from tbrm_theory.claims.cases import Case
from tbrm_theory.claims.comparison import Comparison
from tbrm_theory.claims.contrasts import noisy_contrast, noisy_contrast_case
from tbrm_theory.claims.convergence import small_problem
from tbrm_theory.claims.derivatives import ListedLoss, flat, tables
from tbrm_theory.claims.finite_sample import failures
from tbrm_theory.claims.registry import claim
from tbrm_theory.claims.residual_identities import terms
from tbrm_theory.objectives import SampleObjective
from tbrm_theory.optimisers import least_squares_plan
from tbrm_theory.random_tables import seeded
from tbrm_theory.shapes import PerLayerStateAction

__all__ = ["Sample", "identifying_sample", "partial_sample"]


class Sample(NamedTuple):
    """A data set by counts, and what it determines."""

    counts: Float[Tensor, " trajectories"]
    identifies: bool
    """Whether the residual on the data determines every additive function, and so the policy and ``V(s_1)``."""


def _sample(case: Case, count: int) -> Sample:
    """``count`` trajectories of the behaviour."""
    law = case.listed.log_law(case.log_behaviour)[0].exp()
    drawn = torch.multinomial(law, count, replacement=True, generator=seeded(case.seed))
    counts = torch.bincount(drawn, minlength=len(law)).to(torch.float64)
    visits = ListedLoss.of(case.mdp, case.listed, law).visits
    rank = torch.linalg.matrix_rank
    return Sample(counts, bool(rank(visits[counts > 0]) == rank(visits)))


def identifying_sample(case: Case) -> Sample:
    """The smallest of 8, 16, 32, … trajectories that determine the policy."""
    count = 8
    while not (found := _sample(case, count)).identifies:
        count *= 2
    return found


def partial_sample(case: Case) -> Sample:
    """The largest of 8, 4, 2, 1 trajectories that do not."""
    return next(found for count in (8, 4, 2, 1) if not (found := _sample(case, count)).identifies)


def _one_trajectory(case: Case) -> str | None:
    return "only one trajectory" if len(case.listed.states) == 1 else None


@claim("C4.a", source="own", problem=small_problem)
def sample_minimiser_is_exact(case: Case) -> Comparison:
    """deterministic, no noise: the empirical minimiser is exact once the data identify the policy

    Left: ``log π_θ`` and ``V_θ`` of ``least_squares_plan`` on a sample that does, along all trajectories. Right: those
    of ``solve``. *Proof.* ``L_D = 0`` is attained, so ``f = 0`` on the data, hence on all trajectories, whose features
    are combinations of theirs; then C2. ∎ The fit is as well conditioned as the features of the data, each pair scaled
    by its count.
    """
    counts, _ = identifying_sample(case)
    weights = counts / counts.sum()
    loss = ListedLoss.of(case.mdp, case.listed, weights)
    logits = least_squares_plan(SampleObjective(case.mdp, case.trajectories, weights))
    log_policy = tuple(dynamic_programming.soft_policy(table) for table in logits)

    def seen(log_policy: PerLayerStateAction, v: Tensor) -> Tensor:
        states, actions = case.listed.states, case.listed.actions
        steps = [table[states[:, h], actions[:, h]] for h, table in enumerate(log_policy)]
        return torch.stack([*steps, v[states[:, 0]]])

    left = seen(log_policy, dynamic_programming.soft_value(logits[0]))
    right = seen(case.solution.log_policy, case.solution.v[0])
    mass = loss.mass[loss.mass > 0]
    design = (weights.sqrt().unsqueeze(-1) * loss.visits)[:, loss.mass > 0] / mass.sqrt()
    values = torch.linalg.svdvals(design)
    condition = values.max() / values[values > 1e-9].min()
    scale = by_hand.magnitude(case, [case.solution.q], [case.solution.v]).amax() * condition / mass.min().sqrt()
    return Comparison(left, right, scale, case.listing * 4)


@claim("C4.b", source="own", problem=small_problem, requires=[_one_trajectory])
def sample_that_does_not_identify(case: Case) -> Comparison:
    """deterministic, no noise: if the data do not identify it, some θ with L_D = 0 has L_μ ≥ min μ > 0

    Left: ``√L_D``, and ``√min μ``. Right: 0, and ``√L_μ`` by ``population_loss``. *Proof.* There is an additive function
    ``z`` that is 0 on the data and at most 1, and 1 somewhere; θ is the soft plan of ``R_β + z`` (I14), ``f_θ = z``. ∎
    """
    counts, _ = partial_sample(case)
    law = case.listed.log_law(case.log_behaviour)[0].exp()
    visits = ListedLoss.of(case.mdp, case.listed, law).visits
    seen = visits[counts > 0]
    unseen = torch.eye(visits.shape[-1], dtype=torch.float64) - torch.linalg.pinv(seen) @ seen
    functions = visits @ unseen
    place = functions.abs().argmax()
    z = unseen[:, place % functions.shape[-1]] / functions.flatten()[place]
    g = flat(case.mdp, case.mdp.regularized_reward) + z
    logits = population.soft_plan(case.mdp, tables(case.mdp, g))
    empirical = SampleObjective(case.mdp, case.trajectories, counts / counts.sum()).loss(logits)
    everywhere = population.population_loss(case.mdp, logits, tuple(table[0] for table in case.log_behaviour))
    left = torch.stack([empirical.sqrt(), law.min().sqrt()])
    right = torch.stack([torch.zeros_like(empirical), everywhere.sqrt()])
    scale = terms(case, logits).amax() * (1 + visits.shape[-1] * z.abs().amax())
    return Comparison(left, right, scale, 4 * case.sweep + case.listing, "at most")


REPETITIONS = 32
"""Data sets of each size."""
FACTOR = 64
"""How many times larger the larger data sets are; regret is expected to fall by about as much."""


@claim("C4.c", source="own", problem=small_problem)
def regret_falls_with_the_sample(case: Case) -> Comparison:
    """deterministic, noisy returns: the mean regret at 64 N is less than a quarter of that at N

    Left and right: the mean over 32 data sets of the exact ``regret`` of the least-squares fit's soft plan, which is the
    empirical minimiser (I14). N is 16 over the least probability of a trajectory, the noise is normal, of size β. By
    B6 and B7 the regret falls as 1/N, that is to 1/64, so that chance does not decide.
    """
    law = case.listed.log_law(case.log_behaviour)[0].exp()
    loss = ListedLoss.of(case.mdp, case.listed, law)
    count = math.ceil(16 / law.min().item())
    draws = np.random.default_rng(case.seed)
    regrets = []
    for size in (count, FACTOR * count):
        counts = torch.from_numpy(
            draws.multinomial(size, law.numpy() / law.sum().item(), REPETITIONS).astype(np.float64)
        )
        noise = (
            torch.from_numpy(draws.standard_normal(counts.shape)) * counts.clamp(min=1).rsqrt()
        )  # of each mean return
        weighted = loss.under(counts / size)
        fitted = torch.linalg.pinv(weighted.moments, hermitian=True, rtol=1e-12)
        error = (fitted @ ((counts / size * noise) @ loss.visits).unsqueeze(-1)).squeeze(-1)
        plan = population.soft_plan(case.mdp, tables(case.mdp, loss.reward + error))
        policy = tuple(dynamic_programming.soft_policy(table) for table in plan)
        regrets.append(dynamic_programming.regret(case.mdp, policy).mean())
    before, after = regrets
    return Comparison(after, before / 4, case.mdp.beta, 4 * case.sweep, "at most")


@claim("C4.d", source="own", problem=noisy_contrast_case)
def regret_from_a_noisy_sample(case: Case) -> Comparison:
    """token trees, noisy returns: P(regret of a minimiser > (β/4) (28/3) B² log(|Θ|/δ) max_π C_∞(π,μ)/N) ≤ δ

    Left: how often a member that fits the noisy data at least as well as the optimum has a larger exact ``regret``. Right: ``δ``.
    *Proof.* :func:`~tbrm_theory.claims.own.regret_from_a_sample`, with B6.e in place of B6.d.
    """
    trial = noisy_contrast(case.seed)
    policy = tuple(dynamic_programming.soft_policy(table) for table in trial.logits)
    regrets = dynamic_programming.regret(case.mdp, policy, solution=case.solution)
    worst = policy_class.largest_c_inf(case.mdp, trial.log_behaviour)
    return failures(
        trial.minimisers & (regrets > case.mdp.beta / 4 * worst * sample_bounds.theorem2_noisy(**trial.setting))
    )
