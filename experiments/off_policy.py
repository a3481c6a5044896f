"""How far from the optimum may the data be? Regret of TBRM against policy, age, number and truthfulness of the data, B5 beside it.

Four parts on problems small enough to know the optimum; transitions deterministic, logits tabular:

* `mixing`: Adam on the exact loss for a fixed number of updates; Markov data, in every step the reference with probability 1 - |x|,
  else the optimum (x > 0) or the anti-optimum (x < 0), so that x runs from one to the other;
* `replay`: fresh trajectories of π_θ go into a first-in-first-out buffer of the last `age` batches; for one fresh batch K updates,
  each on as many trajectories drawn from the buffer;
* `samples`: the empirical minimiser (I14) on N trajectories, returns exact or off by `noise` to either side. Without noise it is
  exact once the data identify the policy (C4). With noise N·E[regret] tends to a constant, computed (O6, `noise_cost`). Beside it
  B6's noisy bound with a net of all additive functions |f̄| ≤ b, put into Theorem 2 (B5) and into the fast rate (B7);
* `verifier`: outcomes of 0 and 1 reported wrongly with probabilities a and b. The exact minimiser of the exact loss is the optimum
  at temperature β/(1-a-b), so that its regret depends on a + b alone. That needs all of O7: transitions deterministic, logits
  tabular, data that identify the policy, errors that depend on the outcome alone, the population's loss. Beyond a + b = 1 rewards
  are avoided.

Everywhere `certificate` is B5's right side with the exact L_μ and κ(π_θ,μ) of the very logits; in `replay` with X1's bound for κ of
the mixture of policies in the buffer. Its ratio to the regret is given as least, median and largest over the runs whose regret is
above 1e-12; the others are counted as `exact`, with their largest certificate. A part's median is the median of the medians of its
cells (in `mixing` at each number of updates, in `samples` at each N), not that of all its runs.

summary.json: `certificates` (by part: `runs`, `exact`, `exact_certificate`, `ratio`), `slopes` (of `samples` with noise: exponent
and interval over the N at which all data sets identify the policy; null if they are fewer than three), `over_constant` (N·mean
regret over the constant at the largest N, and its standard error), `not_identified` (cells without, and the share of their data sets
that do not identify the policy), `best_data` (on trees: the constant over that of the best data), `identified_regret` (largest
regret without noise on data that identify the policy), `b6_over_regret` (at the largest N, by Theorem 2 and by the fast rate),
`mixing` (by problem, updates and x, median regret over the start's), `replay` (by problem, K and age, samples until the median
regret is 1 % of the start's; null if never), `verifier_error` (largest difference from the regret at O7's temperature),
`verifier_spread` (largest difference between reports with the same a + b: of regret, certificate, and the certificate with f_θ
centred), `unexpected`, `verdict`, `seconds`. Exit status 1 if a certificate or B6's bound is below the regret, data that identify
the policy do not give it without noise, a slope's interval is outside [-1.25, -0.8], a regret at the largest N is further
from its constant than 5 % of it and four standard errors, these counted as 15 % at most, or O7's regret does not come out.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # Ctrl-C while packages load, which some of them do not survive
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import numpy as np
import torch
import tyro
from off_policy_report import beside, summarise, views
from torch import Tensor

import tbrm_theory as tt
from tbrm_theory import bounds, coverage
from tbrm_theory.behaviours import MixtureBehaviour
from tbrm_theory.claims.derivatives import ListedLoss, tables
from tbrm_theory.dynamic_programming import Solution, admissible_logits, soft_policy
from tbrm_theory.execution import Execution
from tbrm_theory.experiment import run_experiment
from tbrm_theory.losses import tbrm_loss
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.named_behaviours import anti_optimal, epsilon_optimal
from tbrm_theory.noise_cost import best_data_on_tree, noise_cost
from tbrm_theory.objectives import SampleObjective
from tbrm_theory.occupancy import enumerate_trajectories
from tbrm_theory.optimisers import least_squares_plan
from tbrm_theory.parametrisations import Tabular
from tbrm_theory.policy_class import largest_c_inf
from tbrm_theory.population import population_loss, residual_terms, soft_plan
from tbrm_theory.program import run_program
from tbrm_theory.random_tables import seeded
from tbrm_theory.scores import table_scores
from tbrm_theory.shapes import PerLayerStateAction
from tbrm_theory.statistics import log_log_slope
from tbrm_theory.tables import safe_log
from tbrm_theory.training import exact_regret
from tbrm_theory.trajectories import TrajectoryBatch, sample_trajectories

PROBLEMS: dict[str, dict[str, Any]] = {
    "token-tree": {"horizon": 3, "vocabulary": 3, "correct": 0.2, "beta": 0.3},
    "deterministic-dag": {"horizon": 4, "states": 3, "actions": 2, "reference": "dirichlet"},
    "combination-lock": {"horizon": 5},
}
OUTCOMES = ("token-tree", "combination-lock")
"""Those whose return is 0 or 1."""
ANTI_STRENGTH = {"mixing": 6.0, "samples": 1.0}
"""Of the anti-optimum: in `samples` all trajectories are to be seen."""
DELTA = 0.1


@dataclass(frozen=True)
class Config:
    """Settings of the experiment."""

    distance: tuple[float, ...] = (-1.0, -0.99, -0.9, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
    """x of `mixing`."""
    updates: tuple[int, ...] = (30, 100, 300, 1000)
    """At which the regret is recorded; the last one ends the run."""
    ages: tuple[int, ...] = (1, 4, 16, 64)
    reuse: tuple[int, ...] = (1, 2, 4, 8)
    """K."""
    batches: int = 128
    batch_size: int = 32
    learning_rate: float = 0.05
    seeds: int = 8
    """Starts of `mixing` and `replay`."""
    sizes: tuple[int, ...] = tuple(2**k for k in range(4, 19, 2))
    """N."""
    data_sets: int = 300
    noise: float = 0.5
    errors: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    """a and b."""
    seed: int = 0
    execution: tyro.conf.OmitArgPrefixes[Execution] = field(default_factory=Execution)
    results: Path = Path("results")

    def __post_init__(self) -> None:
        for name in ("updates", "ages", "reuse", "sizes"):
            if min(getattr(self, name), default=0) < 1:
                raise tt.InvalidInputError(name, "expected at least one number, none below 1")
        for name, least in (("batches", 1), ("batch_size", 1), ("seeds", 1), ("data_sets", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise tt.InvalidInputError(name, f"expected at least {least}, found {getattr(self, name)}")
        if not self.distance or max(map(abs, self.distance)) > 1:
            raise tt.InvalidInputError("distance", "expected numbers between -1 and 1")
        if not self.errors or not all(0 <= error < 1 for error in self.errors):
            raise tt.InvalidInputError("errors", "expected probabilities below 1")
        for name in ("noise", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise tt.InvalidInputError(name, f"expected a positive number, found {getattr(self, name)}")


def quartiles(values: Tensor) -> list[float]:
    """Of the last dimension."""
    return torch.quantile(values, torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype)).tolist()


# -- training --------------------------------------------------------------------------------------------------------


def mixing(family: str, config: Config) -> dict[str, Any]:
    mdp = tt.make(family, seed=config.seed, **PROBLEMS[family])
    solution, tabular = tt.solve(mdp), Tabular(mdp)
    anti = anti_optimal(mdp, strength=ANTI_STRENGTH["mixing"]).log_policy
    points = []
    for x in config.distance:
        share = safe_log(torch.tensor([1 - abs(x), abs(x)], dtype=torch.float64))
        away = tuple(torch.logaddexp(share[0] + r, share[1] + m) for r, m in zip(mdp.log_reference, anti, strict=True))
        points.append(epsilon_optimal(mdp, epsilon=x).log_policy if x >= 0 else away)
    mu = tuple(torch.stack(layers).repeat_interleave(config.seeds, 0) for layers in zip(*points, strict=True))
    start = tabular.initial(config.seeds, seeded(config.seed)).repeat(len(points), 1)
    theta = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([theta], lr=config.learning_rate)
    found = {"regret": {}, "certificate": {}, "beside": {}}  # type: dict[str, dict[str, Any]]
    for update in range(1, max(config.updates) + 1):
        optimiser.zero_grad()
        population_loss(mdp, tabular.logits(theta), mu).sum().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if update in config.updates:
            logits = tabular.logits(theta.detach())
            regret = exact_regret(mdp, logits, solution).reshape(len(points), -1)
            certificate = bounds.theorem2(mdp, logits, mu, solution=solution).reshape(len(points), -1)
            found["regret"][str(update)] = [quartiles(row) for row in regret]
            found["certificate"][str(update)] = certificate.median(-1).values.tolist()
            found["beside"][str(update)] = beside(regret, certificate)
    first = exact_regret(mdp, tabular.logits(start), solution).median().item()
    return {"family": family, "distance": list(config.distance), "start": first} | found


def replay(family: str, reuse: int, config: Config) -> dict[str, Any]:
    """All ages and seeds are rows of one run."""
    mdp = tt.make(family, seed=config.seed, **PROBLEMS[family])
    solution, tabular, generator = tt.solve(mdp), Tabular(mdp), seeded(config.seed)
    theta = tabular.initial(config.seeds, generator).repeat(len(config.ages), 1).requires_grad_()
    oldest = torch.tensor(config.ages).repeat_interleave(config.seeds)
    optimiser = torch.optim.Adam([theta], lr=config.learning_rate)
    policies: list[PerLayerStateAction] = []
    states, actions = (torch.zeros(len(theta), 0, mdp.horizon, dtype=torch.int64) for _ in range(2))
    curve = [exact_regret(mdp, tabular.logits(theta.detach()), solution)]
    for batch in range(1, config.batches + 1):
        policies.append(tuple(soft_policy(q) for q in admissible_logits(mdp, tabular.logits(theta.detach()))))
        fresh = sample_trajectories(mdp, policies[-1], config.batch_size, generator)
        states, actions = torch.cat([states, fresh.states], 1), torch.cat([actions, fresh.actions], 1)
        held = oldest.clamp(max=batch) * config.batch_size
        for _ in range(reuse):
            uniform = torch.rand(len(theta), config.batch_size, generator=generator, dtype=torch.float64)
            index = states.shape[1] - 1 - (uniform * held.unsqueeze(-1)).long()
            index = index.unsqueeze(-1).expand(-1, -1, mdp.horizon)
            mask = torch.ones(index.shape, dtype=torch.bool)
            data = TrajectoryBatch(states.gather(1, index), actions.gather(1, index), mask)
            q = admissible_logits(mdp, tabular.logits(theta))
            optimiser.zero_grad()
            scores = table_scores(q, mdp.log_reference, mdp.reward, data)
            tbrm_loss(scores, beta=mdp.beta).sum().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        curve.append(exact_regret(mdp, tabular.logits(theta.detach()), solution))
    regret = torch.stack(curve, -1).reshape(len(config.ages), config.seeds, -1)
    middle = regret.median(1).values
    logits = tabular.logits(theta.detach())
    certificate = torch.stack(
        [
            _replay_certificate(mdp, logits, policies[-age:], solution)[row * config.seeds : (row + 1) * config.seeds]
            for row, age in enumerate(config.ages)
        ]
    )
    return {
        "family": family,
        "reuse": reuse,
        "ages": list(config.ages),
        "samples": [batch * config.batch_size for batch in range(config.batches + 1)],
        "regret": middle.tolist(),
        "reached": [samples_to_one_percent(curve, config.batch_size) for curve in middle.tolist()],
        "certificate": certificate.median(-1).values.tolist(),
        "beside": beside(regret[..., -1], certificate),
    }


def samples_to_one_percent(curve: list[float], batch_size: int) -> int | None:
    """Fresh trajectories until the regret is 1 % of the start's, of which there are as many for each entry; None if it never is."""
    return next((batch * batch_size for batch, regret in enumerate(curve) if regret <= 0.01 * curve[0]), None)


def _replay_certificate(
    mdp: RegularizedMDP, logits: PerLayerStateAction, policies: Sequence[PerLayerStateAction], solution: Solution
) -> Tensor:
    """B5 with ``κ ≤ 1/Σ_i w_i/κ_i`` of a mixture of policies (X1), alike in weight."""
    own = tuple(soft_policy(q) for q in admissible_logits(mdp, logits))
    star = tuple(table.expand_as(like) for table, like in zip(solution.log_policy, own, strict=True))
    roots = [
        torch.stack([1 / coverage.kappa(mdp, target, mu) for mu in policies]).mean(0).rsqrt() for target in (star, own)
    ]
    mixture = MixtureBehaviour((1 / len(policies),) * len(policies), tuple(policies))
    return mdp.beta * (roots[0] + roots[1]) * population_loss(mdp, logits, mixture).sqrt()


# -- samples ---------------------------------------------------------------------------------------------------------


def samples(family: str, data: str, noise: float, config: Config) -> dict[str, Any]:
    mdp = tt.make(family, seed=config.seed, **PROBLEMS[family])
    solution, listed = tt.solve(mdp), enumerate_trajectories(mdp)
    mu = data_laws(mdp, solution)[data]
    law = listed.log_law(mu).exp()
    loss = ListedLoss.of(mdp, listed, law)
    rank = int(torch.linalg.matrix_rank(loss.visits))
    draws = np.random.default_rng(config.seed)
    rows: dict[str, list[Any]] = {name: [] for name in ("identified", "mean", "error", "largest", "inside", "beside")}
    rows |= {"identified_regret": [], "theorem2": [], "fast": []}
    for size in config.sizes:
        counts = draws.multinomial(size, (law / law.sum()).numpy(), config.data_sets)
        up = draws.binomial(counts, 0.5)
        shift = torch.from_numpy(noise * np.where(counts > 0, (2 * up - counts) / np.maximum(counts, 1), 0.0))
        weights = torch.from_numpy(counts / size)
        seen = torch.linalg.matrix_rank((weights > 0).to(torch.float64).unsqueeze(-1) * loss.visits)
        logits = fitted(mdp, loss.under(weights), shift / mdp.beta)
        regret = exact_regret(mdp, logits, solution)
        certificate = bounds.theorem2(mdp, logits, mu, solution=solution)
        rows["identified"].append(int((seen == rank).sum()))
        rows["mean"].append(regret.mean().item())
        rows["error"].append(regret.std().item() / math.sqrt(config.data_sets))
        rows["largest"].append(regret.max().item())
        rows["identified_regret"].append(regret[seen == rank].max().item() if (seen == rank).any() else None)
        rows["beside"].append(beside(regret, certificate))
        half_range = 2 * noise / mdp.beta.item()
        residual = (listed.sum_along(residual_terms(mdp, logits))).abs().amax(-1)
        rows["inside"].append(int((residual <= half_range).sum()))
        if noise > 0:
            excess = noisy_bound(half_range, noise / mdp.beta.item(), rank, size)
            worst, beta, horizon = largest_c_inf(mdp, mu), mdp.beta.item(), mdp.horizon
            rows["theorem2"].append(2 * beta * math.sqrt((1 + horizon * (worst - 1)) * excess))
            rows["fast"].append(beta / 2 * horizon * worst * excess)
    cost = noise_cost(mdp, mu, noise_variance=noise**2, solution=solution).item()
    fit = zip(config.sizes, rows["mean"], rows["identified"], strict=True)
    points = [(size, mean) for size, mean, count in fit if count == config.data_sets]
    slope = None
    if noise > 0 and len(points) >= 3:
        found = log_log_slope(*(list(column) for column in zip(*points, strict=True)))
        slope = [found.slope, *found.interval]
    names = {"family": family, "data": data, "noise": noise, "sizes": list(config.sizes)}
    return names | {"data_sets": config.data_sets, "constant": cost, "slope": slope} | rows


def data_laws(mdp: RegularizedMDP, solution: Solution) -> dict[str, PerLayerStateAction]:
    """Off-policy data, and those that are best, where that is known."""
    found = {
        "reference": mdp.log_reference,
        "anti-optimum": anti_optimal(mdp, strength=ANTI_STRENGTH["samples"]).log_policy,
        "half optimum": epsilon_optimal(mdp, epsilon=0.5).log_policy,
    }
    try:
        return found | {"best": best_data_on_tree(mdp, solution=solution)}
    except tt.InvalidInputError:
        return found


def fitted(mdp: RegularizedMDP, loss: ListedLoss, shift: Tensor) -> PerLayerStateAction:
    """``least_squares_plan`` of many data sets at once, by their moment matrices; ``shift`` is the mean noise of each trajectory."""
    mass = loss.mass
    scale = torch.where(mass > 0, torch.where(mass > 0, mass, 1.0).rsqrt(), 0.0)
    matrix = loss.moments * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    target = loss.visits @ loss.reward + shift
    right = scale * ((loss.weights * target) @ loss.visits)
    fit = torch.linalg.pinv(matrix, hermitian=True, rtol=1e-10) @ right.unsqueeze(-1)
    return soft_plan(mdp, tables(mdp, scale * fit.squeeze(-1)))


def noisy_bound(half_range: float, noise: float, dimension: int, count: int) -> float:
    """``E_μ f̄²`` of the minimiser among all additive ``|f̄| ≤ b`` is at most this with probability ``1 - δ`` (B6, with a net).

    ``|f| ≤ B = b + noise``; a maximal set of functions ``η = b/N`` apart is a net, of at most ``(1 + 2b/η)^d`` in ``d`` dimensions.
    *Proof.* The member next to the minimiser has a mean excess of at most ``2Bη`` where B6's minimiser has one of at most 0, so that
    Bernstein's inequality gives ``(28/3) B² ℓ/N + 4Bη`` for it, and ``2Bη`` more for the minimiser. ∎
    """
    largest = half_range + noise
    log_net = dimension * math.log1p(2 * count) + math.log(1 / DELTA)
    return 28 / 3 * largest**2 * log_net / count + 6 * largest * half_range / count


# -- verifiers -------------------------------------------------------------------------------------------------------


def verifier(family: str, config: Config) -> dict[str, Any]:
    """Every trajectory with either report, weighted by the law of the reference's data and the verifier's errors."""
    mdp = tt.make(family, seed=config.seed, **PROBLEMS[family])
    solution, listed = tt.solve(mdp), enumerate_trajectories(mdp)
    law = listed.log_law(mdp.log_reference).exp()
    outcome = listed.sum_along(mdp.reward)
    states, actions = (table.repeat(2, 1) for table in (listed.states, listed.actions))
    both = TrajectoryBatch(states, actions, torch.ones_like(states, dtype=torch.bool))
    reports = torch.cat([torch.zeros_like(law), torch.ones_like(law)])
    rows = []
    for a in config.errors:
        for b in config.errors:
            one = a + (1 - b - a) * outcome
            weights = torch.cat([law * (1 - one), law * one])
            logits = least_squares_plan(SampleObjective(mdp, both, weights / weights.sum(), reports))
            arguments = (mdp, logits, mdp.log_reference)
            rows.append(
                {
                    "a": a,
                    "b": b,
                    "regret": exact_regret(mdp, logits, solution).item(),
                    "tempered": _tempered_regret(mdp, 1 - a - b, solution),
                    "certificate": bounds.theorem2(*arguments, solution=solution).item(),
                    "centred": bounds.theorem2_centred(*arguments, solution=solution).item(),
                }
            )
    pair = (torch.tensor([row[key] for row in rows], dtype=torch.float64) for key in ("regret", "certificate"))
    return {"family": family, "reports": rows, "beside": beside(*pair)}


def _tempered_regret(mdp: RegularizedMDP, trust: float, solution: Solution) -> float:
    """Of the optimum at temperature ``β/trust``; without trust it is the reference, below 0 the rewards change sign."""
    reward = [math.copysign(1.0, trust) * table for table in mdp.reward]
    if abs(trust) < 1e-12:
        policy = mdp.log_reference
    else:
        policy = tt.solve(
            RegularizedMDP(
                beta=mdp.beta / abs(trust),
                initial=mdp.initial,
                reward=reward,
                reference=mdp.reference,
                transitions=mdp.transitions,
            )
        ).log_policy
    return tt.regret(mdp, policy, solution=solution).item()


def main(config: Config) -> int:
    made: dict[str, Callable[[], dict[str, Any]]] = {}
    for family, options in PROBLEMS.items():
        made[f"mixing/{family}"] = partial(mixing, family, config)
        for reuse in config.reuse:
            made[f"replay/{family}/K={reuse}"] = partial(replay, family, reuse, config)
        mdp = tt.make(family, seed=config.seed, **options)
        for data in data_laws(mdp, tt.solve(mdp)):
            for noise in (0.0, config.noise):
                made[f"samples/{family}/{data}/{noise:g}"] = partial(samples, family, data, noise, config)
    for family in OUTCOMES:
        made[f"verifier/{family}"] = partial(verifier, family, config)
    return run_experiment(
        "off_policy",
        config,
        made,
        summarise,
        views,
        in_tables=("certificates", "slopes", "over_constant", "b6_over_regret"),
        execution=config.execution,
    )


if __name__ == "__main__":
    sys.exit(run_program("off_policy", lambda: main(tyro.cli(Config, description=__doc__))))
