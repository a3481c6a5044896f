"""κ and TBRM's regret as the data go from Markov to a mixture of policies drawn once per episode (X1).

* flips: theory.md's example, ½(0,0) + ½(1,1) against π = (0,1), every action flipped with probability p from 0 (mixture of
  deterministic policies) to ½ (Markov). κ in rationals, from the moment matrix and by the formula, beside Lemma 1's right side 3,
  Cor. 6's 4 and the bound 1/Σ(w_i/κ_i); the exact minimiser of TBRM (Levenberg-Marquardt from random starts) and of BRM (L-BFGS,
  from TBRM's minimiser and from random starts); the regret after outcomes with noise; and how far B5 with Lemma 1's right side in
  place of κ fails at the worst multiple F of the unseen f = (1,-1), (-1,1).
* shares: a share of the episodes is from a mixture, the rest from the Markov policy with the same occupancies, so that Lemma 1's
  right side stays while κ moves. Mixed are deterministic policies (`one-state`, H = 4), or two opposed ones with full support,
  softmax(±3z) with z normal (`deterministic-dag`, H = 4, two states per layer).
* random mixtures: how often κ exceeds Lemma 1's and Cor. 6's right sides, and κ's share of 1/Σ(w_i/κ_i). The sampling law:
  `deterministic-dag` with S states (a single one at S = 1), 2 actions, uniform successors and Dirichlet(1) first states; K components
  and π with every row Dirichlet(a, a), independent; equal weights.

summary.json: `kappa_at_1_64` (as a fraction), `flip_0` (loss, regret of TBRM, regret of BRM started from there), `flips_exact`
(flips at which TBRM's minimiser is optimal to 1e-10), `largest_error` (κ against rationals, over the condition number),
`bound_fails_by` (largest regret/B5-with-Lemma-1 over p > 0, and its p), `lemma1_fails`, `corollary6_fails` (share of random mixtures,
with Wilson's 95 % interval, by setting), `tightness` (quartiles of κ/bound, and the largest), `unexpected`, `verdict`, `seconds`.
Exit status 1 if something is unexpected.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # Ctrl-C while packages load, which some of them do not survive
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import numpy as np
import torch
import tyro
from rich.table import Table
from torch import Tensor

import tbrm_theory as tt
from tbrm_theory import coverage
from tbrm_theory.behaviours import Behaviour, MixtureBehaviour
from tbrm_theory.claims.exact_moments import exact_kappa
from tbrm_theory.claims.mixture_data import MixtureProblem, flipped, flipped_kappa, harmonic_bound
from tbrm_theory.dynamic_programming import soft_policy, solve
from tbrm_theory.execution import Execution
from tbrm_theory.experiment import run_experiment
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.moments import moment_form
from tbrm_theory.named_behaviours import replay_of_deterministic
from tbrm_theory.objectives import PopulationObjective, SampleObjective
from tbrm_theory.occupancy import enumerate_trajectories, log_occupancy
from tbrm_theory.optimisers import lbfgs, least_squares_plan, levenberg_marquardt
from tbrm_theory.parametrisations import Tabular
from tbrm_theory.population import population_loss, soft_plan
from tbrm_theory.program import run_program
from tbrm_theory.random_tables import seeded
from tbrm_theory.shapes import PerLayerStateAction
from tbrm_theory.statistics import binomial_interval
from tbrm_theory.tables import safe_log
from tbrm_theory.training import exact_regret
from tbrm_theory.trajectories import trajectory_return

EXACT, WRONG, ZERO_LOSS = 1e-10, 1e-3, 1e-20
MULTIPLES = torch.linspace(0.25, 16, 64, dtype=torch.float64)
"""The F of f_θ = F·(1,-1), F·(-1,1), and of the rewards against it."""


@dataclass(frozen=True)
class Config:
    """Settings of the experiment."""

    halvings: int = 20
    """Flip probabilities ½, ¼, …, 2^-this, and 0."""
    seeds: int = 3
    """Starting points of each minimisation; also problems of each kind of share."""
    seed: int = 0
    shares: int = 5
    """Shares of the mixture, from 0 to 1."""
    episodes: int = 1000
    """In a noisy data set."""
    noise: float = 0.5
    """Standard deviation of an outcome's noise, in reward units."""
    data_sets: int = 20
    mixtures: int = 400
    """Random mixtures of each setting."""
    results: Path = Path("results")
    execution: tyro.conf.OmitArgPrefixes[Execution] = field(default_factory=Execution)


# -- flips -----------------------------------------------------------------------------------------------------------


def run_flip(config: Config, halvings: int | None) -> dict[str, Any]:
    flip = Fraction(0) if halvings is None else Fraction(1, 2**halvings)
    problem = flipped(2, float(flip), seed=config.seed)
    mdp, target, data = problem.mdp, problem.log_policy, problem.behaviour
    exact = _kappa_in_rationals(flip)
    solved = coverage.kappa(mdp, target, data).item()
    row = {
        "flip": float(flip),
        "kappa": float(exact),
        "fraction": str(exact),
        "kappa_formula": float(flipped_kappa(2, flip)),
        "kappa_solved": solved,
        "condition": moment_form(mdp, data).condition.item(),
        "lemma1": coverage.lemma1(mdp, target, data).item(),
        "corollary6": 2 * coverage.c_inf(mdp, target, data).item(),
        "harmonic": harmonic_bound(mdp, target, data).item(),
        "bound_fails_by": _bound_fails_by(problem),
    }
    row |= _minimised(config, mdp, data) | {"noisy_regret": _noisy_regrets(config, mdp, data)}
    return row | _minimised_by_brm(config, mdp, data, torch.tensor(row["theta"], dtype=torch.float64))


def _kappa_in_rationals(flip: Fraction) -> Fraction | float:
    listed = enumerate_trajectories(flipped(2, float(flip)).mdp)

    def law(*zero: Fraction) -> list[Fraction]:
        return [
            math.prod((p if a == 0 else 1 - p for p, a in zip(zero, actions, strict=True)), start=Fraction(1))
            for actions in listed.actions.tolist()
        ]

    halves = zip(law(1 - flip, 1 - flip), law(flip, flip), strict=True)
    return exact_kappa(listed, law(Fraction(1), Fraction(0)), [(p + q) / 2 for p, q in halves])


def _minimised(config: Config, mdp: RegularizedMDP, data: Behaviour) -> dict[str, Any]:
    """TBRM's minimisers from random starts: losses, regrets, steps, parameters."""
    tabular = Tabular(mdp, loss="brm")  # all the parameters that BRM sees, to start it from there
    start = tabular.initial(config.seeds, seeded(config.seed))
    ended = levenberg_marquardt(PopulationObjective(mdp, data), tabular, start)
    regret = exact_regret(mdp, tabular.logits(ended.theta), solve(mdp))
    return {
        "loss": ended.loss.tolist(),
        "regret": regret.tolist(),
        "steps": ended.iterations,
        "theta": ended.theta.tolist(),
    }


def _minimised_by_brm(config: Config, mdp: RegularizedMDP, data: Behaviour, theta: Tensor) -> dict[str, Any]:
    """BRM at TBRM's minimisers, and its own minimisers from there and from the same random starts."""
    tabular, objective = Tabular(mdp, loss="brm"), PopulationObjective(mdp, data)
    start = torch.cat([theta, tabular.initial(config.seeds, seeded(config.seed))])
    ended = lbfgs(objective, tabular, start, loss="brm")
    return {
        "brm_at_tbrm": objective.loss(tabular.logits(theta), "brm").tolist(),
        "brm_loss": ended.loss.tolist(),
        "brm_regret": exact_regret(mdp, tabular.logits(ended.theta), solve(mdp)).tolist(),
    }


def _noisy_regrets(config: Config, mdp: RegularizedMDP, data: Behaviour) -> list[float]:
    """Regrets of the exact minimisers on data sets whose outcomes have noise; the same seeds for all data."""
    solution, regrets = solve(mdp), []
    for i in range(config.data_sets):
        generator = seeded(1000 * config.seed + i)
        batch = data.sample(mdp, config.episodes, generator)
        noise = config.noise * torch.randn(config.episodes, generator=generator, dtype=torch.float64)
        objective = SampleObjective(mdp, batch, observed_return=trajectory_return(mdp, batch) + noise)
        regrets.append(exact_regret(mdp, least_squares_plan(objective), solution).item())
    return regrets


def _bound_fails_by(problem: MixtureProblem) -> float:
    """The largest regret/(B5 with Lemma 1's right side for κ), over F in π_θ ∝ e^(3/2·f) and π* ∝ e^(-F f)."""
    mdp, f = problem.mdp, problem.unseen
    contrary = RegularizedMDP(
        beta=1.0,
        initial=mdp.initial,
        reward=[-MULTIPLES[:, None, None] * table for table in f],
        reference=mdp.reference,
        transitions=mdp.transitions,
    )
    goal = tuple(1.5 * table + log for table, log in zip(f, mdp.log_reference, strict=True))
    logits = soft_plan(contrary, goal)
    logits = tuple(table.expand(len(MULTIPLES), *table.shape[-2:]) for table in logits)
    policies = (solve(contrary).log_policy, tuple(soft_policy(table) for table in logits))
    loss = population_loss(contrary, logits, problem.behaviour)
    roots = [coverage.lemma1(mdp, policy, problem.behaviour).sqrt() for policy in policies]
    bound = (roots[0] + roots[1]) * loss.sqrt()
    return torch.where(bound > 0, tt.regret(contrary, policies[1]) / bound, torch.inf).max().item()


# -- shares ----------------------------------------------------------------------------------------------------------


def run_share(config: Config, kind: str, seed: int, share: float) -> dict[str, Any]:
    if kind == "deterministic":
        mdp = tt.make("one-state", seed=seed, horizon=4)
        mixture = replay_of_deterministic(mdp, seed=seed)
    else:
        mdp = tt.make("deterministic-dag", seed=seed, horizon=4, states=2, actions=2)
        generator = seeded(seed)
        z = [torch.randn(table.shape, generator=generator, dtype=torch.float64) for table in mdp.reference]
        mixture = MixtureBehaviour((0.5, 0.5), tuple(tuple(soft_policy(sign * x) for x in z) for sign in (3, -3)))
    data = between(mdp, mixture, share)
    target = solve(mdp).log_policy
    row = {
        "components": kind,
        "seed": seed,
        "share": share,
        "kappa": coverage.kappa(mdp, target, data).item(),
        "lemma1": coverage.lemma1(mdp, target, data).item(),
        "harmonic": harmonic_bound(mdp, target, data).item(),
        "noisy_regret": _noisy_regrets(config, mdp, data),
    }
    return row | _minimised(config, mdp, data)


def between(mdp: RegularizedMDP, mixture: MixtureBehaviour, share: float) -> MixtureBehaviour:
    """An episode is from the mixture with probability ``share``, else from the Markov policy with the same occupancies."""
    markov = same_occupancies(mdp, mixture)
    parts = [(1 - share, markov), *((share * weight, policy) for weight, policy in mixture.components)]
    parts = [part for part in parts if part[0] > 0]
    return MixtureBehaviour(tuple(weight for weight, _ in parts), tuple(policy for _, policy in parts))


def same_occupancies(mdp: RegularizedMDP, mixture: MixtureBehaviour) -> PerLayerStateAction:
    """``log Σ_i w_i d_i(s,a) / Σ_i w_i d_i(s)``; uniform on the valid actions of states that no component reaches."""
    masses = [
        [weight * table.exp() for table in log_occupancy(mdp, policy).state_action]
        for weight, policy in mixture.components
    ]
    tables = []
    for valid, *layers in zip(mdp.valid, *masses, strict=True):
        mass = torch.stack(layers).sum(0)
        total = mass.sum(-1, keepdim=True)
        uniform = valid.to(torch.float64) / valid.sum(-1, keepdim=True)
        tables.append(safe_log(torch.where(total > 0, mass / torch.where(total > 0, total, 1.0), uniform)))
    return tuple(tables)


# -- random mixtures ---------------------------------------------------------------------------------------------------

SETTINGS: tuple[tuple[int, int, int, float], ...] = tuple(
    (horizon, states, components, concentration)
    for concentration in (1.0, 0.3, 0.1)
    for horizon, states, components in ((2, 1, 2), (4, 1, 2), (4, 1, 4), (4, 3, 2), (4, 3, 4))
)
"""H, S, K and a of the sampling law."""


def run_mixtures(config: Config, horizon: int, states: int, components: int, concentration: float) -> dict[str, Any]:
    n = config.mixtures
    mdp = tt.make("deterministic-dag", seed=config.seed, horizon=horizon, states=states, actions=2, batch=n)
    generator = np.random.default_rng([config.seed, horizon, states, components, round(100 * concentration)])

    def policy() -> PerLayerStateAction:
        rows = (generator.dirichlet([concentration] * 2, size=(n, states)) for _ in range(horizon))
        least = 1e-12  # a probability below is drawn at a = 0.1, and would be 0 in float64 now and then
        return tuple(safe_log(torch.from_numpy((1 - 2 * least) * row + least)) for row in rows)

    target = policy()
    data = MixtureBehaviour((1 / components,) * components, tuple(policy() for _ in range(components)))
    kappa = coverage.kappa(mdp, target, data)
    lemma1, c_inf = coverage.lemma1(mdp, target, data), coverage.c_inf(mdp, target, data)
    tightness = kappa / harmonic_bound(mdp, target, data)
    return {
        "horizon": horizon,
        "states": states,
        "components": components,
        "concentration": concentration,
        "mixtures": n,
        "lemma1_fails": int((kappa > lemma1 * (1 + 1e-9)).sum()),
        "corollary6_fails": int((kappa > horizon * c_inf * (1 + 1e-9)).sum()),
        "bound_fails": int((tightness > 1 + 1e-6).sum()),
        "kappa_over_lemma1": torch.quantile(kappa / lemma1, torch.tensor([0.25, 0.5, 0.75, 1.0]).double()).tolist(),
        "tightness": torch.quantile(tightness, torch.tensor([0.25, 0.5, 0.75, 1.0]).double()).tolist(),
    }


# -- verdicts --------------------------------------------------------------------------------------------------------


def verdict(row: dict[str, Any]) -> str:
    """What X1 says of the row, and whether it came about."""
    match row["kind"]:
        case "flip":
            infinite = row["flip"] == 0
            brm = max(row["brm_regret"]) < 1e-6 and (not infinite or min(row["brm_at_tbrm"]) > WRONG)
            exact = row["kappa"] == row["kappa_formula"]
            if infinite:
                as_said = max(row["loss"]) < ZERO_LOSS and min(row["regret"]) > WRONG
            else:
                as_said = max(row["regret"]) < EXACT and row["kappa"] <= row["harmonic"] * (1 + 1e-12)
            return "as predicted" if as_said and brm and exact else "UNEXPECTED"
        case "share":
            if row["kappa"] == math.inf or row["kappa"] == "inf":
                wrong = max(row["loss"]) < ZERO_LOSS and max(row["regret"]) > WRONG
                return "wrong at zero loss" if wrong else "UNEXPECTED"
            fine = max(row["regret"]) < EXACT and row["kappa"] <= row["harmonic"] * (1 + 1e-9)
            return "exact" if fine else "UNEXPECTED"
        case _:
            return "counted" if row["bound_fails"] == 0 else "UNEXPECTED"


def summarise(rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The headline numbers; keys are explained in ``--help``."""
    flips = [row for row in rows if row["kind"] == "flip"]
    counts = [row for row in rows if row["kind"] == "random mixtures"]
    zero = next((row for row in flips if row["flip"] == 0), None)
    positive = [row for row in flips if row["flip"] > 0]
    bad = [row["cell"] for row in rows if row["verdict"].isupper()]

    def share(row: dict[str, Any], key: str) -> dict[str, Any]:
        return {
            "share": row[key] / row["mixtures"],
            "interval": list(binomial_interval(row[key], row["mixtures"])),
        }

    return {
        "kappa_at_1_64": next((row["fraction"] for row in flips if row["flip"] == 1 / 64), None),
        "flip_0": zero and {"loss": max(zero["loss"]), "regret": zero["regret"], "brm_regret": max(zero["brm_regret"])},
        "flips_exact": f"{sum(max(row['regret']) < EXACT for row in positive)} of {len(positive)}",
        "largest_error": max(abs(row["kappa_solved"] / row["kappa"] - 1) / row["condition"] for row in positive),
        "bound_fails_by": max((row["bound_fails_by"], row["flip"]) for row in positive),
        "lemma1_fails": {row["cell"]: share(row, "lemma1_fails") for row in counts},
        "corollary6_fails": {row["cell"]: share(row, "corollary6_fails") for row in counts},
        "tightness": {row["cell"]: row["tightness"] for row in counts},
        "unexpected": bad,
        "verdict": "as predicted" if not bad else "NOT as predicted",
        "seconds": round(seconds, 1),
    }


def tables(rows: list[dict[str, Any]]) -> list[Table]:
    """One table for each part."""

    def table(*columns: str) -> Table:
        return Table(*columns, "verdict")

    def number(value: Any) -> str:
        return "-" if math.isnan(value) else f"{float(value):.3g}"

    first = table("data", "κ", "Lemma 1", "1/Σ(w/κ)", "regret TBRM", "loss", "regret BRM", "noisy regret")
    last = table("random mixtures", "κ > Lemma 1", "κ > Cor. 6", "κ/bound quartiles, largest")
    for row in rows:
        style = "red" if row["verdict"].isupper() else None
        if row["kind"] == "random mixtures":
            fails = (f"{row[key] / row['mixtures']:.3f}" for key in ("lemma1_fails", "corollary6_fails"))
            last.add_row(row["cell"], *fails, " ".join(map(number, row["tightness"])), row["verdict"], style=style)
        else:
            worst = [max(row.get(key, [math.nan])) for key in ("regret", "loss", "brm_regret")]
            numbers = [*(row[key] for key in ("kappa", "lemma1", "harmonic")), *worst, np.mean(row["noisy_regret"])]
            first.add_row(row["cell"], *map(number, numbers), row["verdict"], style=style)
    return [first, last]


def cells(config: Config) -> dict[str, tuple[str, Any]]:
    """Every row by name: its kind, and how to make it."""
    wanted: dict[str, tuple[str, Any]] = {}
    for halvings in (None, *range(config.halvings, 0, -1)):
        name = "flip 0" if halvings is None else f"flip 2^-{halvings}"
        wanted[name] = ("flip", partial(run_flip, config, halvings))
    for kind in ("deterministic", "opposed"):
        for seed in range(config.seed, config.seed + config.seeds):
            for share in np.linspace(0, 1, config.shares).tolist():
                wanted[f"{kind} seed {seed} share {share:g}"] = ("share", partial(run_share, config, kind, seed, share))
    for setting in SETTINGS:
        name = "H={} S={} K={} a={:g}".format(*setting)
        wanted[name] = ("random mixtures", partial(run_mixtures, config, *setting))
    return wanted


def made(kind: str, make_row: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    row = {"kind": kind} | make_row()
    return row | {"verdict": verdict(row)}


def main(config: Config) -> int:
    return run_experiment(
        "mixture_data",
        config,
        {name: partial(made, *cell) for name, cell in cells(config).items()},
        lambda rows, seconds: summarise(_with_infinities(rows), seconds),
        lambda rows, _: tables(_with_infinities(rows)),
        in_tables=("lemma1_fails", "corollary6_fails", "tightness"),
        execution=config.execution,
    )


def _with_infinities(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: math.inf if value == "inf" and key != "fraction" else value for key, value in row.items()} for row in rows
    ]


if __name__ == "__main__":
    sys.exit(run_program("mixture_data", lambda: main(tyro.cli(Config, description=__doc__))))
