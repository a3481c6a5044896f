"""What TBRM learns, and what it misses, where the data omit actions or hardly ever take them (X3).

* holes: problems of several families with data that omit a third of the actions. κ(π*,μ) is infinite, and the minimisers of the loss
  (Levenberg-Marquardt from random starts) are wrong at zero loss; beside them the best policy that keeps to the data.
* weights: one state per layer, three actions, of which the data omit one. Its share under the reference goes from 1e-6 to 0.9, its
  reward is below, between or above the others'. κ is infinite throughout; the regret is not: of the best policy within the data (β
  log 1/P_{π*}(no omitted action), X3.c), of minimisers started at the reference (Levenberg-Marquardt in additive coordinates, which
  must end where the omitted action is worth 0; L-BFGS in logits), the largest over random starts, and the supremum over all
  policies at zero loss, β Σ_h max(log 1/p, log 1/(1-p)) with p the share of the omitted action under π*.
* masses: the same problem, the data take that action with probability m, from 0.3 down to 1e-12, and 0. κ, the condition number of
  the moment matrix as it is and scaled to unit diagonal, steps and regret of the minimiser (Levenberg-Marquardt; L-BFGS), the regret
  after N episodes without noise, and B5's right side at a fixed error of ½ on that action's values.

summary.json: `zero_loss_at_regret` (cells of `holes`, and how many are wrong at zero loss), `least_regret_at_infinite_kappa`,
`largest_regret_at_infinite_kappa` (of minimisers started at the reference, over `weights`), `kappa_exponent` (slope of log κ in log m
for m ≤ 1e-3: -1), `bound_at_fixed_error` (B5's right side for the least m > 0, for the largest, and the regret at that error),
`condition_exponent` (of the matrix as it is), `largest_scaled_condition`, `exact_down_to` (least m at which Levenberg-Marquardt's
regret is below 1e-10), `exact_down_to_lbfgs`, `unexpected`, `verdict`, `seconds`. Exit status 1 if something is unexpected.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
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
from tbrm_theory.behaviours import MarkovBehaviour
from tbrm_theory.claims.uncovered_actions import covered_optimum, omitted_actions
from tbrm_theory.dynamic_programming import Solution, soft_policy, solve
from tbrm_theory.execution import Execution
from tbrm_theory.experiment import run_experiment
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.moments import moment_form
from tbrm_theory.named_behaviours import with_holes
from tbrm_theory.objectives import PopulationObjective, SampleObjective
from tbrm_theory.optimisers import Minimum, lbfgs, least_squares_plan, levenberg_marquardt
from tbrm_theory.parametrisations import Tabular
from tbrm_theory.population import population_loss, soft_plan
from tbrm_theory.program import run_program
from tbrm_theory.random_tables import seeded
from tbrm_theory.statistics import log_log_slope
from tbrm_theory.tables import safe_log
from tbrm_theory.training import exact_regret
from tbrm_theory.trajectories import sample_trajectories

ZERO_LOSS, WRONG, EXACT, FIXED_ERROR = 1e-20, 1e-3, 1e-10, 0.5
HORIZON, BETA = 4, 0.2
REWARDS = {"worse": -0.5, "between": 0.5, "better": 1.5}
"""Of the omitted action; the others have 0.2 and 0.8."""
WEIGHTS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1 / 3, 0.9)
"""Of the omitted action under the reference."""
MASSES = (0.3, 0.1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-8, 1e-10, 1e-12, 0.0)
"""Of the rare action under μ."""
FAMILIES: dict[str, dict[str, Any]] = {
    "one-state": {"actions": 3},
    "deterministic-dag": {"states": 4},
    "combination-lock": {"horizon": 4},
    "token-tree": {"horizon": 3},
    "shortest-path": {},
}


@dataclass(frozen=True)
class Config:
    """Settings of the experiment."""

    seeds: int = 3
    """Starting points of each minimisation, and problems of each family with holes."""
    seed: int = 0
    episodes: int = 1000
    """N."""
    data_sets: int = 20
    """Of N episodes, for each m."""
    iterations: int = 200
    """At most so many Levenberg-Marquardt steps."""
    results: Path = Path("results")
    execution: tyro.conf.OmitArgPrefixes[Execution] = field(default_factory=Execution)


# -- holes -----------------------------------------------------------------------------------------------------------


def run_holes(config: Config, family: str, seed: int) -> dict[str, Any]:
    mdp = tt.make(family, seed=seed, **FAMILIES[family])
    solution, data = solve(mdp), with_holes(mdp, seed, share=0.3)
    ended = _levenberg_marquardt(config, mdp, data, _random_starts(config, mdp))
    return {
        "kappa": coverage.kappa(mdp, solution.log_policy, data).item(),
        "loss": ended.loss.tolist(),
        "regret": _regrets(mdp, ended.theta, solution),
        "covered_regret": tt.regret(mdp, covered_optimum(mdp, data), solution=solution).item(),
        "reference_regret": tt.regret(mdp, mdp.log_reference, solution=solution).item(),
    }


# -- one action, omitted or rare -------------------------------------------------------------------------------------


def problem(reference_weight: float, reward: float) -> RegularizedMDP:
    """One state per layer, actions worth 0.2, 0.8 and ``reward``, the last with this share under the reference."""
    rest = (1 - reference_weight) / 2
    return RegularizedMDP(
        beta=BETA,
        initial=torch.ones(1),
        reward=[torch.tensor([[0.2, 0.8, reward]])] * HORIZON,
        reference=[torch.tensor([[rest, rest, reference_weight]], dtype=torch.float64)] * HORIZON,
        transitions=tt.make("one-state", horizon=HORIZON, actions=3).transitions,
    )


def rarely(mass: float) -> MarkovBehaviour:
    """The last action with this probability, the others alike."""
    row = safe_log(torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)) + math.log1p(-mass)
    row[0, 2] = math.log(mass) if mass > 0 else -torch.inf
    return MarkovBehaviour((row,) * HORIZON)


def run_weight(config: Config, name: str, weight: float) -> dict[str, Any]:
    mdp, data = problem(weight, REWARDS[name]), rarely(0.0)
    solution, tabular = solve(mdp), Tabular(mdp)
    omitted = omitted_actions(mdp, data)
    at_reference = tabular.parameters(mdp.log_reference).unsqueeze(0)
    ended = {
        "from_reference": _levenberg_marquardt(config, mdp, data, at_reference),
        "from_reference_lbfgs": lbfgs(PopulationObjective(mdp, data), tabular, at_reference),
        "random": _levenberg_marquardt(config, mdp, data, _random_starts(config, mdp)),
    }
    shares = [log[0].exp() for log in solution.log_policy]
    worst = [-min(share[2].log().item(), share[:2].sum().log().item()) for share in shares]
    as_worthless = soft_plan(
        mdp,
        tuple(
            torch.where(gone > 0, log, reward)
            for gone, log, reward in zip(omitted, mdp.log_reference, mdp.regularized_reward, strict=True)
        ),
    )
    return {
        "reward": name,
        "reference_weight": weight,
        "optimal_weight": solution.log_policy[0][0, 2].exp().item(),
        "kappa": coverage.kappa(mdp, solution.log_policy, data).item(),
        "covered_regret": tt.regret(mdp, covered_optimum(mdp, data), solution=solution).item(),
        "supremum": mdp.beta.item() * sum(worst),
        "worthless_regret": exact_regret(mdp, as_worthless, solution).item(),
        "loss": [loss for found in ended.values() for loss in found.loss.tolist()],
        **{f"regret_{key}": _regrets(mdp, found.theta, solution) for key, found in ended.items()},
    }


def run_mass(config: Config, mass: float) -> dict[str, Any]:
    mdp, data = problem(1 / 3, REWARDS["between"]), rarely(mass)
    solution, tabular = solve(mdp), Tabular(mdp)
    start, objective = _random_starts(config, mdp), PopulationObjective(mdp, data)
    ended = _levenberg_marquardt(config, mdp, data, start)
    by_logits = lbfgs(objective, tabular, start, iterations=300)
    error = tuple(FIXED_ERROR * torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64) for _ in range(HORIZON))
    wrong = soft_plan(mdp, tuple(r + e for r, e in zip(mdp.regularized_reward, error, strict=True)))
    policy = tuple(soft_policy(table) for table in wrong)
    kappas = [coverage.kappa(mdp, log, data).item() for log in (solution.log_policy, policy)]
    loss = population_loss(mdp, wrong, data).item()
    bound = math.inf if math.inf in kappas else BETA * (math.sqrt(kappas[0]) + math.sqrt(kappas[1])) * math.sqrt(loss)
    spectrum = torch.linalg.eigvalsh(objective.moment_matrix())
    rank = 2 * HORIZON + 1 if mass > 0 else HORIZON + 1  # 1 + Σ_h (actions taken - 1)
    return {
        "mass": mass,
        "kappa": kappas[0],
        "condition": (spectrum[-1] / spectrum[-rank].clamp(min=torch.finfo(torch.float64).tiny)).item(),
        "scaled_condition": moment_form(mdp, data).condition.item(),
        "steps": ended.iterations,
        "loss": ended.loss.tolist(),
        "regret": _regrets(mdp, ended.theta, solution),
        "regret_lbfgs": _regrets(mdp, by_logits.theta, solution),
        "regret_of_samples": _sampled(config, mdp, data, solution),
        "fixed_error_regret": tt.regret(mdp, policy, solution=solution).item(),
        "fixed_error_bound": bound,
    }


def _sampled(config: Config, mdp: RegularizedMDP, data: MarkovBehaviour, solution: Solution) -> list[float]:
    """Regrets of the exact minimisers on data sets without noise; what was never seen is taken to be worth 0."""
    regrets = []
    for i in range(config.data_sets):
        batch = sample_trajectories(mdp, data.log_policy, config.episodes, seeded(1000 * config.seed + i))
        logits = least_squares_plan(SampleObjective(mdp, batch))
        regrets.append(exact_regret(mdp, logits, solution).item())
    return regrets


def _random_starts(config: Config, mdp: RegularizedMDP) -> Tensor:
    return Tabular(mdp).initial(config.seeds, seeded(config.seed))


def _levenberg_marquardt(config: Config, mdp: RegularizedMDP, data: MarkovBehaviour, start: Tensor) -> Minimum:
    return levenberg_marquardt(PopulationObjective(mdp, data), Tabular(mdp), start, iterations=config.iterations)


def _regrets(mdp: RegularizedMDP, theta: Tensor, solution: Solution) -> list[float]:
    return exact_regret(mdp, Tabular(mdp).logits(theta), solution).tolist()


# -- verdicts --------------------------------------------------------------------------------------------------------


def verdict(row: dict[str, Any]) -> str:
    """What X3 says of the row, and whether it came about."""
    infinite, zero = row["kappa"] == math.inf, max(row["loss"]) < ZERO_LOSS
    match row["kind"]:
        case "holes":
            return "wrong at zero loss" if infinite and zero and max(row["regret"]) > WRONG else "UNEXPECTED"
        case "weights":
            gap = abs(row["regret_from_reference"][0] - row["worthless_regret"])
            below = max(max(row[key]) for key in row if key.startswith("regret_")) <= row["supremum"]
            same = gap <= 1e-8 * (1 + row["worthless_regret"])
            return "as predicted" if infinite and zero and same and below else "UNEXPECTED"
        case _:
            if row["mass"] == 0:
                return "vacuous" if infinite and row["fixed_error_bound"] == math.inf else "UNEXPECTED"
            holds = row["fixed_error_regret"] <= row["fixed_error_bound"] < 10 * row["fixed_error_regret"] + 1
            return "bound holds" if holds and not infinite else "UNEXPECTED"


def summarise(rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The headline numbers; keys are explained in ``--help``."""
    holes, weights, masses = ([row for row in rows if row["kind"] == kind] for kind in ("holes", "weights", "masses"))
    regrets = [row["regret_from_reference"][0] for row in weights]
    positive = sorted((row for row in masses if row["mass"] > 0), key=lambda row: row["mass"])
    rare = [row for row in positive if row["mass"] <= 1e-3]
    bad = [row["cell"] for row in rows if row["verdict"].isupper()]

    def exponent(key: str) -> float:
        return log_log_slope([row["mass"] for row in rare], [row[key] for row in rare]).slope

    return {
        "zero_loss_at_regret": f"{sum(row['verdict'] == 'wrong at zero loss' for row in holes)} of {len(holes)}",
        "least_regret_at_infinite_kappa": min(regrets),
        "largest_regret_at_infinite_kappa": max(regrets),
        "kappa_exponent": exponent("kappa"),
        "bound_at_fixed_error": [
            positive[0]["fixed_error_bound"],
            positive[-1]["fixed_error_bound"],
            positive[0]["fixed_error_regret"],
        ],
        "condition_exponent": exponent("condition"),
        "largest_scaled_condition": max(row["scaled_condition"] for row in positive),
        "exact_down_to": min((row["mass"] for row in positive if max(row["regret"]) < EXACT), default=None),
        "exact_down_to_lbfgs": min((row["mass"] for row in positive if max(row["regret_lbfgs"]) < EXACT), default=None),
        "unexpected": bad,
        "verdict": "as predicted" if not bad else "NOT as predicted",
        "seconds": round(seconds, 1),
    }


def tables(rows: list[dict[str, Any]]) -> list[Table]:
    """One table for each part; of several starts or data sets the largest, of sampled data the mean."""
    columns: dict[str, tuple[str, ...]] = {
        "holes": ("kappa", "loss", "regret", "covered_regret", "reference_regret"),
        "weights": (
            "optimal_weight", "kappa", "loss", "covered_regret", "regret_from_reference", "regret_from_reference_lbfgs",
            "regret_random", "supremum",
        ),
        "masses": (
            "kappa", "condition", "scaled_condition", "steps", "regret", "regret_lbfgs", "regret_of_samples",
            "fixed_error_regret", "fixed_error_bound",
        ),
    }  # fmt: skip
    views = []
    for kind, names in columns.items():
        view = Table(kind, *(name.replace("_", " ") for name in names), "verdict")
        for row in (row for row in rows if row["kind"] == kind):
            style = "red" if row["verdict"].isupper() else None
            values = (
                np.mean(row[name]) if name == "regret_of_samples" else np.max(np.array(row[name])) for name in names
            )
            view.add_row(row["cell"], *(f"{value:.3g}" for value in values), row["verdict"], style=style)
        views.append(view)
    return views


def cells(config: Config) -> dict[str, tuple[str, Any]]:
    """Every row by name: its kind, and how to make it."""
    wanted: dict[str, tuple[str, Any]] = {}
    for family in FAMILIES:
        for seed in range(config.seed, config.seed + config.seeds):
            wanted[f"{family} seed {seed}"] = ("holes", (run_holes, family, seed))
    for reward in REWARDS:
        for weight in WEIGHTS:
            wanted[f"{reward}, reference {weight:.3g}"] = ("weights", (run_weight, reward, weight))
    for mass in MASSES:
        wanted[f"m = {mass:.3g}"] = ("masses", (run_mass, mass))
    return wanted


def made(config: Config, kind: str, make_row: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    row = {"kind": kind} | make_row(config, *arguments)
    return row | {"verdict": verdict(row)}


def main(config: Config) -> int:
    return run_experiment(
        "uncovered_actions",
        config,
        {name: partial(made, config, kind, *cell) for name, (kind, cell) in cells(config).items()},
        lambda rows, seconds: summarise(_with_infinities(rows), seconds),
        lambda rows, _: tables(_with_infinities(rows)),
        execution=config.execution,
    )


def _with_infinities(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: math.inf if value == "inf" else value for key, value in row.items()} for row in rows]


if __name__ == "__main__":
    sys.exit(run_program("uncovered_actions", lambda: main(tyro.cli(Config, description=__doc__))))
