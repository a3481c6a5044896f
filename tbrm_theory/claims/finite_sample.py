"""B6: finite samples. Each instance is a problem with a finite class and a size N, and 10,000 data sets of that size.

A data set is its counts over the listed trajectories, a multinomial draw, so nothing is sampled step by step. The claim is that a
bound fails on a share of at most ``δ`` of data sets; what is compared with ``δ`` is the lower end of the exact binomial interval for
that share, at the suite's rate of false alarms.

The classes are such that the bounds are nearly attained. On a tree every function of the trajectory is the residual of some logits
(I14), so among the members are spikes, ``f = B`` on one trajectory that the data may not hold, and shifts of either sign, which noise
imitates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tbrm_theory import bounds, losses, population
from tbrm_theory.claims.cases import Case, case_of
from tbrm_theory.claims.comparison import Comparison
from tbrm_theory.claims.registry import claim
from tbrm_theory.dynamic_programming import soft_policy
from tbrm_theory.families import make
from tbrm_theory.random_tables import seeded
from tbrm_theory.shapes import PerLayerStateAction
from tbrm_theory.statistics import CHECK_FAILURE_RATE, binomial_interval

__all__ = ["DATA_SETS", "DELTA", "Trial", "share_of_failures", "trial"]

DATA_SETS = 10_000
DELTA = 0.1
"""The probability of failure that the bounds are asked for; large, so that failures are counted and not merely absent."""
SHAPES = ((1, 4), (2, 2), (2, 3), (3, 2))
"""Horizon and actions of the trees."""

DataSets = Float[Tensor, "data_sets members"]


@dataclass(frozen=True, eq=False)
class Trial:
    """A problem, a class with the optimum as its first member, and many data sets of one size."""

    case: Case
    count: int
    """``N``, trajectories in a data set."""
    logits: PerLayerStateAction
    """Of the members, ``(members, S_h, A_h)``."""
    noise: float
    """Returns are observed with ``ξ = ± noise``, a fair coin; in units of β."""
    residual_bound: float
    """``B``, no smaller than any ``|f|``, noise included."""
    loss: Float[Tensor, " members"]
    """``E_μ f̄²``."""
    empirical_loss: DataSets
    """``L_D``, of returns without noise."""
    empirical_excess: DataSets
    """``L_D`` less that of the optimum, of noisy returns."""

    @property
    def size(self) -> int:
        """``|Θ|``."""
        return len(self.loss)


@lru_cache(maxsize=256)
def trial(seed: int, noisy: bool) -> Trial:
    """A random tree, and a class near the boundary of what ``N`` trajectories tell apart."""
    horizon, actions = SHAPES[seed % len(SHAPES)]
    mdp = make("deterministic-tree", seed=seed, horizon=horizon, actions=actions, roots=1)
    case = case_of(mdp, "B6", seed)
    generator = seeded(seed)
    log_behaviour = tuple(soft_policy(table[1]) for table in case.log_behaviour)
    law = case.listed.log_law(log_behaviour).exp()
    trajectories = len(law)
    sharpness = 0.5 + torch.rand((), generator=generator, dtype=torch.float64).item()
    exponent = math.log((trajectories + 1) / DELTA)
    if noisy:
        count = int(10 ** (1 + 2 * torch.rand((), generator=generator).item()))
        noise = 0.5 + torch.rand((), generator=generator, dtype=torch.float64).item()
        height = noise * math.sqrt(8 * exponent / count) * sharpness
        signs = torch.randint(2, (trajectories, trajectories), generator=generator).to(torch.float64)
        shape = height * (2 * signs - 1)
    else:
        rarest = law.min().item()
        count, noise = max(2, round(sharpness * exponent / rarest)), 0.0
        shape = torch.diag(torch.randn(trajectories, generator=generator, dtype=torch.float64))
    members = torch.cat([torch.zeros(1, trajectories, dtype=torch.float64), shape])
    logits = _with_residual(case, members)
    f = losses.tbrm_residual(case.scores(logits), beta=mdp.beta)
    loss = population.population_loss(mdp, logits, log_behaviour)
    generator_of_counts = np.random.default_rng(seed)
    if noisy:
        halves = generator_of_counts.multinomial(count, torch.cat([law, law]).numpy() / (2 * law.sum().item()), DATA_SETS)
        up, down = (torch.from_numpy(half.astype(float)) for half in np.split(halves, 2, axis=1))
    else:
        up = torch.from_numpy(generator_of_counts.multinomial(count, law.numpy() / law.sum().item(), DATA_SETS).astype(float))
        down = torch.zeros_like(up)
    empirical = (up + down) @ f.square().T / count
    excess = empirical - 2 * noise * (up - down) @ f.T / count
    return Trial(case, count, logits, noise, f.abs().max().item() + noise, loss, empirical, excess)


def _with_residual(case: Case, f: Float[Tensor, "members trajectories"]) -> PerLayerStateAction:
    """Logits with these residuals: the soft plan of ``R_β`` plus ``f`` at the last pair of a trajectory, which names it."""
    *earlier, last = (torch.where(valid, reward, 0.0) for valid, reward in zip(case.mdp.valid, case.mdp.regularized_reward, strict=True))
    place = case.listed.states[:, -1] * last.shape[-1] + case.listed.actions[:, -1]
    added = last.new_zeros(len(f), last.numel()).index_copy(-1, place, f).unflatten(-1, last.shape)
    return population.soft_plan(case.mdp, (*(table.expand(len(f), -1, -1) for table in earlier), last + added))


def share_of_failures(failed: Bool[Tensor, "data_sets members"]) -> Comparison:
    """The lower end of the interval for the probability that some member fails, against ``δ``."""
    failures = int(failed.any(-1).sum())
    low = binomial_interval(failures, len(failed), confidence=1 - CHECK_FAILURE_RATE, method="exact").low
    left, right = torch.tensor([low], dtype=torch.float64), torch.tensor([DELTA], dtype=torch.float64)
    return Comparison(left, right, torch.ones_like(left), 1, "at most")


def _setting(drawn: Trial) -> dict[str, float | int]:
    return {"residual_bound": drawn.residual_bound, "class_size": drawn.size, "count": drawn.count, "delta": DELTA}


def _noise_free(seed: int) -> Case:
    return trial(seed, False).case


def _noisy(seed: int) -> Case:
    return trial(seed, True).case


@claim("B6.a", source="[Y] Thm. 2", problem=_noise_free)
def loss_from_a_sample(case: Case) -> Comparison:
    """P(some θ: L_μ > 2 L_D + 2B² log(|Θ|/δ)/N) ≤ δ

    Left: the share of data sets on which some member fails, ``L_μ`` by ``population_loss``, ``L_D`` by counts. Right:
    ``δ = 0.1``. Proof: :func:`~tbrm_theory.bounds.theorem2_finite_sample`.
    """
    drawn = trial(case.seed, False)
    return share_of_failures(drawn.loss > bounds.theorem2_finite_sample(drawn.empirical_loss, **_setting(drawn)))


@claim("B6.b", source="[Y] Thm. 2", problem=_noise_free)
def loss_from_a_sample_with_a_net(case: Case) -> Comparison:
    """ε-net: P(some θ: L_μ > 2 L_D + 2B² log(N_ε/δ)/N + 12 B H L_Θ ε) ≤ δ

    An infinite class, ``logit_θ = Q* + θψ`` with ``|θ| ≤ 1``, ``|ψ| ≤ L_Θ = 1``, so ``N_ε = ⌈1/ε⌉``. Both sides as in
    B6.a, at 101 values of θ. Proof: :func:`~tbrm_theory.bounds.theorem2_net`.
    """
    drawn, mdp = trial(case.seed, False), case.mdp
    theta, epsilon = torch.linspace(-1, 1, 101, dtype=torch.float64), 1 / (10 * mdp.horizon * drawn.count)
    psi = [torch.tanh(table[1]) for table in case.additive]
    logits = tuple(q + theta[:, None, None] * table for q, table in zip(case.solution.q, psi, strict=True))
    f = losses.tbrm_residual(case.scores(logits), beta=mdp.beta)
    log_behaviour = tuple(soft_policy(table[1]) for table in case.log_behaviour)
    spikes = drawn.empirical_loss.new_tensor(np.eye(f.shape[-1]))
    counts = np.random.default_rng(case.seed).multinomial(
        drawn.count, _law(case, log_behaviour), len(drawn.empirical_loss)
    )
    empirical = torch.from_numpy(counts / drawn.count) @ spikes @ f.square().T
    setting = _setting(drawn) | {"residual_bound": f.abs().max().item() + 2 * mdp.horizon * 0.01}
    del setting["class_size"]
    bound = bounds.theorem2_net(
        empirical, **setting, net_size=math.ceil(1 / epsilon), horizon=mdp.horizon, lipschitz=1.0, epsilon=epsilon
    )
    return share_of_failures(population.population_loss(mdp, logits, log_behaviour) > bound)
