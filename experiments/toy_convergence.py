"""Does TBRM reach the exact KL-regularised optimum from arbitrary off-policy data, and fail where the theory says it must?

Every cell is a family of problems × a behaviour × a way to use the data, run from several random starting points at once and judged
by the exact regret:

* positive cells: deterministic family × full-support Markov behaviour × the population loss (Levenberg-Marquardt steps in the
  additive coordinates of I14), or × a data set that lists every trajectory (one sparse least-squares solve); each must end below
  1e-10 in reward units (C1, C2, I14);
* slow positives: full-support mixtures, whose change of measure exceeds Lemma 1's bound (X1) but is finite;
* negative controls, which must fail: mixtures of deterministic policies on merged states (X1) and uncovered actions (X3) reach
  loss < 1e-20 at regret > 1e-3; stochastic transitions end at or below the noise floor of the optimum, not at 0 (I7, X2);
* curves: Adam on population (TBRM beside BRM), offline, online and replay data, with their own target.

A run that was interrupted or killed goes on where it stopped when the same code is asked for the same settings. summary.json:
`positive_cells` (how many are exact), `positive_max_regret` (the largest final regret among them), `conditioning_limited` (cells at
which float64 stops short, with figure and reason), `negative_controls`, `negative_controls_as_predicted`, `curves`,
`curves_on_target` (counts), `unexpected` (cells that went against the theory), `verdict`, `seconds` (of all cells together). Exit
status 1 if a positive cell fails, a control does not, or a curve misses its target; 2 on bad input or a full disk; 130 on Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # Ctrl-C while packages load, which some of them do not survive
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import torch
import tyro
from rich.table import Table
from torch import Tensor

import tbrm_theory as tt
from tbrm_theory.behaviours import MarkovBehaviour
from tbrm_theory.dynamic_programming import Solution
from tbrm_theory.execution import Execution
from tbrm_theory.experiment import run_experiment
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.named_behaviours import BEHAVIOURS
from tbrm_theory.objectives import Objective, PopulationObjective, SampleObjective
from tbrm_theory.occupancy import enumerate_trajectories, flatten_tables
from tbrm_theory.optimisers import least_squares_plan, levenberg_marquardt
from tbrm_theory.parametrisations import Tabular
from tbrm_theory.population import noise_floor
from tbrm_theory.program import run_program
from tbrm_theory.training import FitConfig, exact_regret, fit
from tbrm_theory.trajectories import TrajectoryBatch, sample_trajectories

POSITIVE_REGRET, WRONG_REGRET, ZERO_LOSS = 1e-10, 1e-3, 1e-20
CURVE_TARGET = {"population": 0.01, "offline": 0.01, "online": 0.5, "replay": 0.5}
"""Share of the reference policy's regret below which the median seed of an Adam curve must end.

Fixed full-support data identify the optimum. Data of π_θ itself need not: actions that it stops taking are no longer corrected, and no
statement of the theory bounds what is lost there, so online and replay only have to leave the reference policy well behind.
"""
FLOAT64_CONDITION = 1e14
"""Where float64 may stop short: the best covered logit has this many times the data of the worst."""


@dataclass(frozen=True)
class Config:
    """Settings of the experiment."""

    full: bool = False
    """Also the large problems: FrozenLake 16×16 and Taxi."""
    seeds: int = 3
    """Random starting points of each cell, run together."""
    seed: int = 0
    """Of the random problems, behaviours and starting points."""
    iterations: int = 60
    """At most so many Levenberg-Marquardt steps."""
    steps: int = 1500
    """Adam steps of each curve."""
    families: tuple[str, ...] = ()
    """Only these families; all of them if not given."""
    results: Path = Path("results")
    """Folder to write to; this run is in toy_convergence/ there, the newest one behind the link toy_convergence/latest."""
    execution: tyro.conf.OmitArgPrefixes[Execution] = field(default_factory=Execution)

    def __post_init__(self) -> None:
        for name in ("seeds", "iterations", "steps"):
            if getattr(self, name) < 1:
                raise tt.InvalidInputError(name, f"expected at least 1, found {getattr(self, name)}")
        if self.seed < 0:
            raise tt.InvalidInputError("seed", f"expected a seed, which is not negative, found {self.seed}")
        known = sorted({cell.family for cell in cells(self)})
        for family in self.families:
            if family not in known:
                raise tt.InvalidInputError("families", f"expected some of {', '.join(known)}, found {family!r}")


@dataclass(frozen=True)
class Cell:
    """One row of the table: what kind of claim, on which problem, with which data."""

    kind: str
    family: str
    behaviour: str
    mode: str
    options: tuple[tuple[str, Any], ...] = ()
    loss: str = "tbrm"

    @property
    def name(self) -> str:
        size = "".join(f" {key}={value}" for key, value in self.options)
        return f"{self.kind}/{self.family}{size}/{self.behaviour}/{self.mode}/{self.loss}"

    def problem(self, seed: int) -> RegularizedMDP:
        return tt.make(self.family, seed=seed, **dict(self.options))


DETERMINISTIC: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = (
    ("two-armed-bandit", ()),
    ("one-state", ()),
    ("chain", ()),
    ("combination-lock", ()),
    ("deterministic-dag", ()),
    ("deterministic-tree", ()),
    ("token-tree", (("horizon", 4),)),
    ("modular-arithmetic", ()),
    ("balanced-brackets", (("pairs", 2),)),
    ("shortest-path", ()),
    ("frozen-lake", (("size", 4),)),
    ("frozen-lake", (("size", 8), ("horizon", 20))),
    ("cliff-walking", ()),
)
LARGE: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = (("frozen-lake", (("size", 16),)), ("taxi", ()))
LISTED = ("two-armed-bandit", "one-state", "chain", "combination-lock", "deterministic-dag", "deterministic-tree",
          "modular-arithmetic", "shortest-path")  # fmt: skip
CURVES = ("combination-lock", "deterministic-dag", "shortest-path")


def cells(config: Config) -> Iterator[Cell]:
    """All cells in the order in which they run."""
    markov = [name for name, row in BEHAVIOURS.items() if row.markov and row.full_support]
    for family, options in DETERMINISTIC + (LARGE if config.full else ()):
        for behaviour in markov:
            yield Cell("positive", family, behaviour, "population", options)
    for family in LISTED:
        yield Cell("positive", family, "every trajectory once", "offline")
    for family in ("deterministic-dag", "chain"):
        yield Cell("slow positive", family, "replay", "population")
    for family in ("one-state", "deterministic-dag"):
        yield Cell("unidentifying mixture", family, "replay-of-deterministic", "population")
    for family in ("deterministic-dag", "combination-lock", "token-tree"):
        yield Cell("uncovered actions", family, "with-holes", "population")
    for family, options in (("dense-random", ()), ("garnet", ()), ("chain", (("slip", 0.2),))):
        yield Cell("stochastic transitions", family, "reference", "population", options)
    for family in CURVES:
        for mode in ("population", "offline", "online", "replay"):
            yield Cell("curve", family, "reference" if mode in ("population", "offline") else "π_θ", mode)
        yield Cell("curve", family, "reference", "population", loss="brm")


# -- running one cell -------------------------------------------------------------------------------------------


def run_cell(cell: Cell, config: Config) -> dict[str, Any]:
    """The row of one cell; everything random comes from ``config.seed``."""
    started = time.perf_counter()
    mdp = cell.problem(config.seed)
    solution = tt.solve(mdp)
    if cell.kind == "curve":
        row = _curve(cell, config, mdp)
    elif cell.mode == "offline":
        row = _least_squares(mdp, solution)
    else:
        row = _second_order(cell, config, mdp, solution)
    row |= {**asdict(cell), "reference_gap": tt.regret(mdp, mdp.log_reference).item()}
    row["verdict"] = verdict(row)
    row["seconds"] = round(time.perf_counter() - started, 2)
    return row


def _second_order(cell: Cell, config: Config, mdp: RegularizedMDP, solution: Solution) -> dict[str, Any]:
    tabular = Tabular(mdp)
    behaviour = BEHAVIOURS[cell.behaviour].make(mdp, config.seed)
    objective = PopulationObjective(mdp, behaviour)
    theta = tabular.initial(config.seeds, torch.Generator().manual_seed(config.seed))
    if cell.kind == "stochastic transitions":  # from beside the optimum: the loss itself leads away from it
        theta = 0.1 * theta + flatten_tables(solution.q)[tabular.free]
    losses, regrets = [], []

    def keep(_: int, theta: Tensor, loss: Tensor) -> None:
        losses.append(loss.tolist())
        regrets.append(exact_regret(mdp, tabular.logits(theta), solution).tolist())

    keep(0, theta, objective.loss(tabular.logits(theta)))
    levenberg_marquardt(objective, tabular, theta, iterations=config.iterations, after_step=keep)
    mass = objective.pair_mass()[tabular.free]
    return {
        "step": list(range(len(losses))),
        "loss_curve": losses,
        "regret_curve": regrets,
        "logits": tabular.size,
        "noise_floor": noise_floor(mdp, behaviour).item(),
        # A lower bound of the condition number of the Gauss-Newton matrix; infinite where a logit has no data.
        "condition_number": (mass.max() / mass.min()).item(),
    }


def _least_squares(mdp: RegularizedMDP, solution: Solution) -> dict[str, Any]:
    """I14 on the set that holds every trajectory once; there is no starting point, hence one seed."""
    listed = enumerate_trajectories(mdp)
    everything = torch.ones_like(listed.states, dtype=torch.bool)
    objective = SampleObjective(mdp, TrajectoryBatch(listed.states, listed.actions, everything))
    start, end = tuple(torch.zeros_like(table) for table in mdp.reference), least_squares_plan(objective)
    return {
        "step": [0, 1],
        "loss_curve": [[objective.loss(logits).item()] for logits in (start, end)],
        "regret_curve": [[exact_regret(mdp, logits, solution).item()] for logits in (start, end)],
        "trajectories": len(listed.states),
    }


def _curve(cell: Cell, config: Config, mdp: RegularizedMDP) -> dict[str, Any]:
    objective: Objective | None = None
    if cell.mode == "population":
        objective = PopulationObjective(mdp, MarkovBehaviour(mdp.log_reference))
    elif cell.mode == "offline":
        generator = torch.Generator().manual_seed(config.seed)
        objective = SampleObjective(mdp, sample_trajectories(mdp, mdp.log_reference, 4096, generator))
    settings = FitConfig(
        mode=cell.mode,  # type: ignore[arg-type]
        loss=cell.loss,  # type: ignore[arg-type]
        steps=config.steps,
        seeds=config.seeds,
        seed=config.seed,
    )
    _, history = fit(mdp, Tabular(mdp, loss=cell.loss), settings, objective=objective)
    return {"step": history.step, "loss_curve": history.loss, "regret_curve": history.regret}


# -- verdicts ----------------------------------------------------------------------------------------------------


def verdict(row: dict[str, Any]) -> str:
    """What the theory predicts of the cell, and whether it came about."""
    first, last, loss = row["regret_curve"][0], row["regret_curve"][-1], row["loss_curve"][-1]
    match row["kind"]:
        case "positive" | "slow positive":
            if min(first) < WRONG_REGRET:
                return "starts too close"
            if max(last) < POSITIVE_REGRET:
                return "exact"
            limited = row.get("condition_number", 0.0) >= FLOAT64_CONDITION
            return "conditioning limited" if limited else "FAILED"
        case "curve":
            reached = sorted(last)[len(last) // 2] <= CURVE_TARGET[row["mode"]] * row["reference_gap"]
            return "on target" if reached else "MISSED"
        case "stochastic transitions":
            floor = row["noise_floor"]
            fails = max(loss) <= floor and min(loss) > 1e-3 * floor and min(last) > WRONG_REGRET
        case _:
            fails = max(loss) < ZERO_LOSS and min(last) > WRONG_REGRET
    return "fails as predicted" if fails else "DID NOT FAIL"


LEAST_POSITIVE = 20
"""Positive cells of a run on all families: a convergence experiment that loses its cells has not passed."""


def summarise(rows: list[dict[str, Any]], seconds: float, *, least_positive: int = 0) -> dict[str, Any]:
    """The headline numbers; keys are explained in ``--help``."""
    exact = [row for row in rows if row["kind"] == "positive" and row["verdict"] == "exact"]
    controls = [row for row in rows if row["verdict"] in ("fails as predicted", "DID NOT FAIL")]
    curves = [row for row in rows if row["kind"] == "curve"]
    bad = [row["cell"] for row in rows if row["verdict"] in ("FAILED", "DID NOT FAIL", "MISSED")]
    if len(exact) < least_positive:
        bad.append(f"expected at least {least_positive} positive cells, found {len(exact)}")
    return {
        "positive_cells": len(exact),
        "positive_max_regret": max((max(row["regret_curve"][-1]) for row in exact), default=None),
        "conditioning_limited": {
            row["cell"]: {
                "regret": max(row["regret_curve"][-1]),
                "condition_number": row["condition_number"],
                "reason": "the data of the rarest logit are below float64's resolution beside those of the commonest",
            }
            for row in rows
            if row["verdict"] == "conditioning limited"
        },
        "negative_controls": len(controls),
        "negative_controls_as_predicted": sum(row["verdict"] == "fails as predicted" for row in controls),
        "curves": len(curves),
        "curves_on_target": sum(row["verdict"] == "on target" for row in curves),
        "unexpected": bad,
        "verdict": "as predicted" if not bad else "NOT as predicted",
        "seconds": round(seconds, 1),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """One line a cell; regrets are the largest over seeds, in reward units."""
    view = Table("kind", "problem", "data", "loss", "initial regret", "final regret", "final loss", "verdict", "s")
    for row in rows:
        size = " ".join(f"{key}={value}" for key, value in row["options"])
        values = (max(row["regret_curve"][0]), max(row["regret_curve"][-1]), max(row["loss_curve"][-1]))
        data = f"{row['behaviour']}, {row['mode']}"
        cells = (row["kind"], f"{row['family']} {size}", data, row["loss"], *(f"{value:.1e}" for value in values))
        style = "red" if row["verdict"].isupper() else None
        view.add_row(*cells, row["verdict"], f"{row['seconds']:.1f}", style=style)
    return view


def main(config: Config) -> int:
    wanted = [cell for cell in cells(config) if not config.families or cell.family in config.families]
    least = 0 if config.families else LEAST_POSITIVE
    return run_experiment(
        "toy_convergence",
        config,
        {cell.name: partial(run_cell, cell, config) for cell in wanted},
        lambda rows, _: summarise(rows, sum(row["seconds"] for row in rows), least_positive=least),
        lambda rows, _: [table(rows)],
        execution=config.execution,
    )


if __name__ == "__main__":
    sys.exit(run_program("toy_convergence", lambda: main(tyro.cli(Config, description=__doc__))))
