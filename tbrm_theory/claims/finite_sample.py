"""B6: finite samples. Each instance is a problem with a finite class and a size N, and 10,000 data sets of that size.

A data set is its counts over the listed trajectories, a multinomial draw; nothing is sampled step by step. The claim is that a bound
fails on a share of at most ``δ`` of the data sets; what is compared with ``δ`` is the lower end of the exact binomial interval for
that share, at the suite's rate of false alarms for a single check.

The classes are such that the bounds are nearly attained. On a tree every function of the trajectory is the residual of some logits
(I14), so that members can be spikes, residuals other than 0 on a single trajectory, which the data may not hold, and patterns of
either sign, which noise imitates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypedDict

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tbrm_theory import losses, population, sample_bounds
from tbrm_theory.claims.cases import Case, case_of
from tbrm_theory.claims.comparison import EPSILON, Comparison
from tbrm_theory.claims.registry import claim
from tbrm_theory.dynamic_programming import soft_policy
from tbrm_theory.families import make
from tbrm_theory.random_tables import seeded
from tbrm_theory.shapes import PerLayerStateAction
from tbrm_theory.statistics import CHECK_FAILURE_RATE, binomial_interval

__all__ = [
    "DATA_SETS",
    "DELTA",
    "Setting",
    "Trial",
    "above_one",
    "draw_counts",
    "failures",
    "members",
    "noise_free",
    "noisy",
    "noisy_case",
]

DATA_SETS = 10_000
DELTA = 0.1
"""The probability of failure that the bounds are asked for; large, so that failures are counted and not merely absent."""
SHAPES = ((2, 2), (1, 5), (2, 3))
"""Horizon and actions of the trees."""
EXPECTED_SIGHTINGS = (0.6, 1.0, 2.115, 3.37)
"""How often a spike is expected in the data, in units of ``ℓ``: too rarely for any bound, and where B6.d, B6.c and B6.a are tightest
(Chernoff's exponents)."""
NOISY_CONSTANTS = (0.5, sample_bounds.NOISY_CONSTANT, 28 / 3)
"""``E f̄²`` of a pattern in units of ``B² ℓ/N``: too small for any bound, and where B6.f and B6.e are tightest."""


class Setting(TypedDict):
    """What the bounds ask for."""

    residual_bound: float
    class_size: int
    count: int
    delta: float


@dataclass(frozen=True, eq=False)
class Trial:
    """A problem, a class with the optimum as its first member, and many data sets of one size.

    ``f̄`` is the residual without noise; the observed return makes it ``f = f̄ - ξ`` with ``ξ = ± noise``, a fair coin.
    """

    case: Case
    log_behaviour: PerLayerStateAction
    logits: PerLayerStateAction
    """``(members, S_h, A_h)``."""
    count: int
    """``N``, trajectories in a data set."""
    noise: float
    """In units of β."""
    plus: Float[Tensor, "data_sets trajectories"]
    """How often each trajectory was observed with noise of positive sign."""
    minus: Float[Tensor, "data_sets trajectories"]

    @cached_property
    def residual(self) -> Float[Tensor, "members trajectories"]:
        """``f̄``."""
        return losses.tbrm_residual(self.case.scores(self.logits), beta=self.case.mdp.beta)

    @cached_property
    def loss(self) -> Float[Tensor, " members"]:
        """``E_μ f̄²``."""
        return population.population_loss(self.case.mdp, self.logits, self.log_behaviour)

    @cached_property
    def empirical_loss(self) -> Float[Tensor, "data_sets members"]:
        """``L_D`` of the returns as observed."""
        above, below = ((self.residual - sign * self.noise).square().T for sign in (1, -1))
        return (self.plus @ above + self.minus @ below) / self.count

    @cached_property
    def minimisers(self) -> Bool[Tensor, "data_sets members"]:
        """Which members fit the data at least as well as the optimum: the minimiser, and those that might be it in its absence."""
        shifted = 2 * self.noise * (self.plus - self.minus) @ self.residual.T
        return (self.plus + self.minus) @ self.residual.square().T <= shifted

    @property
    def setting(self) -> Setting:
        bound = self.residual.abs().max().item() + self.noise
        return {"residual_bound": bound, "class_size": len(self.loss), "count": self.count, "delta": DELTA}


@lru_cache(maxsize=4)
def noise_free(seed: int) -> Trial:
    """Spikes of one height, which the data contain :data:`EXPECTED_SIGHTINGS` times."""
    case, log_behaviour, law = _tree(seed)
    generator = seeded(seed)
    signs = 2 * torch.randint(2, law.shape, generator=generator).to(torch.float64) - 1
    exponent = math.log((len(law) + 1) / DELTA)
    count = math.ceil(EXPECTED_SIGHTINGS[seed // len(SHAPES) % 4] * exponent / law.min().item() * above_one(generator))
    plus = draw_counts(seed, count, law)
    return Trial(case, log_behaviour, members(case, signs.diag()), count, 0.0, plus, torch.zeros_like(plus))


@lru_cache(maxsize=4)
def noisy(seed: int) -> Trial:
    """Patterns of either sign, of the size that :data:`NOISY_CONSTANTS` say."""
    case, log_behaviour, law = _tree(seed)
    generator = seeded(seed)
    signs = 2 * torch.randint(2, (len(law), len(law)), generator=generator).to(torch.float64) - 1
    count = int(10 ** (2 + 4 * torch.rand((), generator=generator).item()))
    constant = NOISY_CONSTANTS[seed // len(SHAPES) % 3] * above_one(generator)
    share = min(
        0.9, math.sqrt(constant * math.log((len(law) + 1) / DELTA) / count)
    )  # of B that f̄ is; noise is the rest
    plus, minus = draw_counts(seed, count, torch.cat([law, law]) / 2).split(len(law), dim=-1)
    return Trial(case, log_behaviour, members(case, share * signs), count, 1 - share, plus, minus)


def _tree(seed: int) -> tuple[Case, PerLayerStateAction, Float[Tensor, " trajectories"]]:
    """A random tree, a behaviour that is nearly or not at all uniform, and its law on the listed trajectories."""
    horizon, actions = SHAPES[seed % len(SHAPES)]
    case = case_of(make("deterministic-tree", seed=seed, horizon=horizon, actions=actions, roots=1), "B6", seed)
    spread = (0.0, 0.1, 0.5)[seed % 4 % 3]
    log_behaviour = tuple(soft_policy(spread * table[1]) for table in case.log_behaviour)
    law = case.listed.log_law(log_behaviour).exp()
    return case, log_behaviour, law / law.sum()


def above_one(generator: torch.Generator) -> float:
    """Up to 5 % more than 1."""
    return 1 + 0.05 * torch.rand((), generator=generator, dtype=torch.float64).item()


def draw_counts(seed: int, count: int, law: Tensor) -> Float[Tensor, "data_sets outcomes"]:
    """The counts of ``count`` independent outcomes, for each data set."""
    return torch.from_numpy(np.random.default_rng(seed).multinomial(count, law.numpy(), DATA_SETS).astype(np.float64))


def members(case: Case, f: Float[Tensor, "members trajectories"]) -> PerLayerStateAction:
    """The optimum, and logits with these residuals: the soft plan of ``R_β`` with ``f`` added at the pair that ends a trajectory."""
    f = torch.cat([torch.zeros_like(f[:1]), f])
    tables = [torch.where(valid, r, 0.0) for valid, r in zip(case.mdp.valid, case.mdp.regularized_reward, strict=True)]
    *earlier, last = (table.expand(len(f), *table.shape) for table in tables)
    end = case.listed.states[:, -1] * last.shape[-1] + case.listed.actions[:, -1]
    added = torch.zeros_like(last).flatten(-2).index_copy(-1, end, f).unflatten(-1, last.shape[-2:])
    return population.soft_plan(case.mdp, (*earlier, last + added))


def failures(failed: Bool[Tensor, "data_sets members"]) -> Comparison:
    """The probability that some member fails is at most ``δ``, as far as the data sets show."""
    count = int(failed.any(-1).sum())
    low = binomial_interval(count, len(failed), confidence=1 - CHECK_FAILURE_RATE, method="exact").low
    left, right = torch.tensor([low], dtype=torch.float64), torch.tensor([DELTA], dtype=torch.float64)
    return Comparison(left, right, torch.ones_like(left), 1, "at most")


def noise_free_case(seed: int) -> Case:
    return noise_free(seed).case


def noisy_case(seed: int) -> Case:
    return noisy(seed).case


@claim("B6.a", source="[Y] Thm. 2", problem=noise_free_case)
def loss_from_a_sample(case: Case) -> Comparison:
    """P(some θ: L_μ > 2 L_D + 2B² log(|Θ|/δ)/N) ≤ δ

    Left: how often some member of the class fails, ``L_μ`` by ``population_loss``, ``L_D`` by counts. Right: ``δ``. Proof:
    :func:`~tbrm_theory.sample_bounds.theorem2_finite_sample`.
    """
    trial = noise_free(case.seed)
    return failures(trial.loss > sample_bounds.theorem2_finite_sample(trial.empirical_loss, **trial.setting))


@claim("B6.b", source="[Y] Thm. 2", problem=noise_free_case)
def loss_from_a_sample_with_a_net(case: Case) -> Comparison:
    """ε-net: P(some θ: L_μ > 2 L_D + 2B² log(N_ε/δ)/N + 12 B H L_Θ ε) ≤ δ

    An infinite class, ``logit_θ = Q* + θψ`` with ``|θ| ≤ 1`` and ``|ψ| ≤ L_Θ``, for which ``N_ε = ⌈1/ε⌉``. Both sides as
    in B6.a, at 11 values of θ; ``B`` holds between them too. Proof: :func:`~tbrm_theory.sample_bounds.theorem2_net`.
    """
    trial, horizon = noise_free(case.seed), case.mdp.horizon
    theta = torch.linspace(-1, 1, 11, dtype=torch.float64)[:, None, None]
    psi = tuple(table[1] for table in case.additive)
    lipschitz = max(table.abs().max().item() for table in psi)
    epsilon = 0.1 / trial.count
    logits = tuple(q + theta * table for q, table in zip(case.solution.q, psi, strict=True))
    infinite = Trial(case, trial.log_behaviour, logits, trial.count, 0.0, trial.plus, trial.minus)
    bound = sample_bounds.theorem2_net(
        infinite.empirical_loss,
        residual_bound=infinite.residual.abs().max().item() + 2 * horizon * lipschitz / 10,
        net_size=math.ceil(1 / epsilon),
        count=trial.count,
        delta=DELTA,
        horizon=horizon,
        lipschitz=lipschitz,
        epsilon=epsilon,
    )
    return failures(infinite.loss > bound)


@claim("B6.c", source="own", problem=noise_free_case)
def sharper_loss_from_a_sample(case: Case) -> Comparison:
    """P(some θ: L_μ > 2 L_D + 1.255 B² log(|Θ|/δ)/N) ≤ δ

    Both sides as in B6.a. Proof: :func:`~tbrm_theory.sample_bounds.finite_sample_loss`.
    """
    trial = noise_free(case.seed)
    return failures(trial.loss > sample_bounds.finite_sample_loss(trial.empirical_loss, **trial.setting))


@claim("B6.d", source="own", problem=noise_free_case)
def loss_of_what_fits_all_data(case: Case) -> Comparison:
    """P(some θ with L_D = 0: L_μ > B² log(|Θ|/δ)/N) ≤ δ

    Half of B6.a's, and the best constant. Both sides as there: N trajectories miss a spike of height B
    with probability ``(1 - L_μ/B²)^N``. Proof:
    :func:`~tbrm_theory.sample_bounds.finite_sample_loss`.
    """
    trial = noise_free(case.seed)
    rounding = (EPSILON * case.sweep * trial.setting["residual_bound"]) ** 2
    empirical = torch.where(trial.empirical_loss <= rounding, 0.0, trial.empirical_loss)
    bound = sample_bounds.finite_sample_loss(empirical, **trial.setting, tilt=math.inf)
    return failures(trial.loss > bound)


@claim("B6.e", source="[Y] Thm. 2", problem=noisy_case)
def noisy_minimiser(case: Case) -> Comparison:
    """noisy returns: P(E_μ f̄² of a minimiser > (28/3) B² log(|Θ|/δ)/N) ≤ δ

    Left: how often a member that fits the noisy data at least as well as the optimum exceeds it, ``E_μ f̄²`` by
    ``population_loss``, the fit by counts. Right: ``δ``. Proof: :func:`~tbrm_theory.sample_bounds.theorem2_noisy`.
    """
    trial = noisy(case.seed)
    return failures(trial.minimisers & (trial.loss > sample_bounds.theorem2_noisy(**trial.setting)))


@claim("B6.f", source="own", problem=noisy_case)
def sharper_noisy_minimiser(case: Case) -> Comparison:
    """noisy returns: P(E_μ f̄² of a minimiser > 8.51 B² log(|Θ|/δ)/N) ≤ δ

    Both sides as in B6.e. Proof: :func:`~tbrm_theory.sample_bounds.finite_sample_noisy`.
    """
    trial = noisy(case.seed)
    return failures(trial.minimisers & (trial.loss > sample_bounds.finite_sample_noisy(**trial.setting)))
