"""The family of theory.md §5 side by side: every loss trained on-policy on six problems whose exact optimum is known.

Each method starts at the reference policy with `V = 0` (logits `log π_ref`), draws the same number of prompts for every update, `n`
= 1 or 4 rollouts for each (at `n` = 4 an update costs four times the samples), and takes one Adam step on them. Tuning is fair:
every method has the same number of grid points, learning rates over the same range, by themselves or fewer of them times three
values of the one coefficient that the method has (`coefficient` in a row: the rate of log Z, the critic or the value model as a
multiple of the policy's; updates between refreshes of a frozen copy; rollouts of the reference for A*-PO, which count as samples;
the factor on β in GRPO's penalty). Finals are compared at equal updates, so that those rollouts, and three more for each prompt at
`n` = 4, are free there. The winner has the lowest interquartile mean, over the tuning seeds, of the final regret; other
seeds are reported by the same number.

Losses that are mathematically one method are trained once, and a cell checks that they give the same curves at equal settings.

summary.json, all regrets as shares of the initial one (the reference policy's): `final` (by n, problem and method: interquartile
mean and both ends of the 95 % bootstrap interval over seeds), `overall` (by n and method: the same over all problems, resampled
within problems), `samples_to_one_percent` (by n, problem and method: trajectories until the interquartile mean is at most 1 % for
the first time; null if never), `winners` (learning rate and coefficient), `winners_at_edge` (those whose learning rate is the
lowest or highest of the grid), `winners_at_edge_share`, `coefficients_at_edge` (the same of the coefficients), `no_better` (those that
end no better than the reference policy), `same_as` (which methods are one, and the largest difference of their curves), `consumption`
(Table 2 of [Y], measured: regression or policy gradient, single rollout, single model, trajectory reward, models, backward passes),
`unexpected`, `verdict`, `seconds`.

Exit status 1 if methods that are one give different curves or were not compared, if a loss consumes other scores than it declares,
or if a tuned method ends no better than the reference policy. DAPO is excepted, which has no KL penalty; and, on the lake, where a
reward is rare, the one-step losses, by which news of it goes back one step for each update that sees it.
"""

from __future__ import annotations

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

import tbrm_theory as tt
from tbrm_theory.aggregates import interquartile_mean, stratified_interval
from tbrm_theory.consumption import consumption
from tbrm_theory.execution import Execution
from tbrm_theory.experiment import run_experiment
from tbrm_theory.family_training import Curves, Plan, Point, train
from tbrm_theory.gymnasium_import import from_gymnasium
from tbrm_theory.losses import LOSSES
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.program import run_program


def frozen_lake() -> RegularizedMDP:
    """The 8×8 map without slipping. The reference leans down and right and arrives in 0.5 % of episodes, a uniform one in 0.001 %."""
    reference = torch.tensor([0.1, 0.4, 0.4, 0.1], dtype=torch.float64)
    options = {"map_name": "8x8", "is_slippery": False}
    return from_gymnasium("FrozenLake-v1", horizon=18, beta=0.1, reference=reference, **options)


PROBLEMS: dict[str, Callable[[], RegularizedMDP]] = {
    "modular-arithmetic": partial(tt.make, "modular-arithmetic"),
    "balanced-brackets": partial(tt.make, "balanced-brackets", pairs=2),
    "shortest-path": partial(tt.make, "shortest-path", nodes=4, seed=1),
    "frozen-lake": frozen_lake,
    "combination-lock": partial(tt.make, "combination-lock"),
    "merged-dag": partial(tt.make, "deterministic-dag"),
}

REFRESH, COMPANION, ROLLOUTS, TEMPERATURE = "refresh", "companion_rate", "reference_rollouts", "temperature"
COEFFICIENTS: dict[str, tuple[str, tuple[float, ...]] | None] = {
    "tbrm": None,
    "tbrm-iterative": (REFRESH, (1, 5, 25)),
    "brm": None,
    "sql-one-step": (REFRESH, (1, 5, 25)),
    "sql-multi-step": (REFRESH, (1, 5, 25)),
    "sql-one-step-q": (REFRESH, (1, 5, 25)),
    "sql-multi-step-q": None,
    "pcl-one-step": (COMPANION, (1.0, 3.0, 10.0)),
    "pcl-multi-step": (COMPANION, (1.0, 3.0, 10.0)),
    "trajectory-balance": (COMPANION, (1.0, 3.0, 10.0)),
    "a-star-po": (ROLLOUTS, (4, 16, 64)),
    "vargrad": None,
    "kimi": None,
    "dpo": None,
    "reinforce": None,
    "grpo": (TEMPERATURE, (0.03, 0.3, 3.0)),
    "dr-grpo": (TEMPERATURE, (0.1, 0.3, 1.0)),
    "dapo": None,
    "ppo": (COMPANION, (1.0, 3.0, 10.0)),
}
"""The methods, each with the coefficient that is tuned and its values."""
SAME: dict[str, tuple[str, Callable[[float], float]]] = {
    "tbrm-first-logit": ("tbrm", lambda beta: 1.0),
    "reval": ("tbrm", lambda beta: 1.0),
    "dro": ("trajectory-balance", lambda beta: 1.0),
    "rloo": ("vargrad", lambda beta: 2 / beta),
    "pairwise": ("vargrad", lambda beta: 0.5),
}
"""Methods that are another one, and the factor between their gradients: I5; `V_ref = 0` at this start; both train an offset of their
own; (β/2)∇VarGrad; I10."""
ONE_STEP = ("brm", "sql-one-step", "sql-one-step-q", "pcl-one-step")
"""Losses by which news of a reward goes back one step for each update that sees it; on the lake such updates are rare."""
SAME_CURVES = 1e-6
QUARTERS_LEAST = 4  # runs for an interquartile mean


@dataclass(frozen=True)
class Config:
    """Settings of the experiment."""

    quick: bool = False
    """A slice: two problems, six methods, a third of the updates."""
    updates: int = 200
    prompts: int = 16
    """First states for every update."""
    evaluations: int = 25
    rates: tuple[float, float] = (0.01, 1.0)
    """The lowest and the highest learning rate of every grid."""
    rate_count: int = 5
    """Learning rates of a method with a coefficient; three times as many for one without."""
    tuning_seeds: int = 4
    seeds: int = 12
    """Reported seeds, none of them a tuning one."""
    group_sizes: tuple[int, ...] = (1, 4)
    problems: tuple[str, ...] = ()
    """Only these problems; all of them if not given."""
    methods: tuple[str, ...] = ()
    """Only these methods, and those that are the same; all of them if not given."""
    execution: tyro.conf.OmitArgPrefixes[Execution] = field(default_factory=Execution)
    results: Path = Path("results")

    def __post_init__(self) -> None:
        for name, known in (("problems", PROBLEMS), ("methods", COEFFICIENTS)):
            for given in getattr(self, name):
                if given not in known:
                    raise tt.InvalidInputError(name, f"expected some of {', '.join(known)}, found {given!r}")
        for name, least in (("tuning_seeds", QUARTERS_LEAST), ("seeds", QUARTERS_LEAST), ("rate_count", 2)):
            if getattr(self, name) < least:
                raise tt.InvalidInputError(name, f"expected at least {least}, found {getattr(self, name)}")
        if not 0 < self.rates[0] < self.rates[1]:
            raise tt.InvalidInputError("rates", f"expected a lowest and a highest rate, found {self.rates}")

    @property
    def chosen_problems(self) -> tuple[str, ...]:
        return self.problems or (("modular-arithmetic", "combination-lock") if self.quick else tuple(PROBLEMS))

    @property
    def chosen_methods(self) -> tuple[str, ...]:
        few = ("tbrm", "trajectory-balance", "a-star-po", "vargrad", "grpo", "ppo")
        return self.methods or (few if self.quick else tuple(COEFFICIENTS))

    def plan(self, group_size: int, **changes: Any) -> Plan:
        updates = self.updates // 3 if self.quick else self.updates
        settings: dict[str, Any] = {"updates": updates, "evaluations": self.evaluations} | changes
        return Plan(prompts=self.prompts, group_size=group_size, **settings)


def grid(method: str, config: Config) -> list[tuple[float, float | None]]:
    """Learning rate and coefficient of every point: equally many for all methods."""
    coefficient = COEFFICIENTS[method]
    values = coefficient[1] if coefficient else (None,)
    rates = np.geomspace(*config.rates, config.rate_count * 3 // len(values))
    return [(float(rate), value) for value in values for rate in rates]


def as_point(method: str, rate: float, value: float | None) -> Point:
    coefficient = COEFFICIENTS[method]
    return Point(rate, **({coefficient[0]: value} if coefficient else {}))  # type: ignore[arg-type]


def shares(curves: Curves) -> np.ndarray[Any, Any]:
    """Regret as a share of the initial one, ``(points, seeds, evaluations)``."""
    return (curves.regret / curves.regret[..., :1]).numpy()


def tuned(problem: str, method: str, group_size: int, config: Config) -> dict[str, Any]:
    """Tune on some seeds, report on others."""
    mdp, points = PROBLEMS[problem](), grid(method, config)
    settings = [as_point(method, *point) for point in points]
    tuning = range(1000, 1000 + config.tuning_seeds)
    ends = shares(train(mdp, method, settings, tuning, config.plan(group_size, evaluations=1)))[..., -1]
    scores = [float(interquartile_mean(row[None])) for row in ends]
    best = int(np.argmin(scores))
    curves = train(mdp, method, [settings[best]], range(config.seeds), config.plan(group_size))
    found = shares(curves)[0]
    low, high = stratified_interval(found[None], seed=0)
    middle = interquartile_mean(found[None])
    reached = np.flatnonzero(middle <= 0.01)
    samples = curves.samples[0].tolist()
    return {
        "problem": problem,
        "n": group_size,
        "method": method,
        "grid": [[*point, score] for point, score in zip(points, scores, strict=True)],
        "coefficient": COEFFICIENTS[method][0] if COEFFICIENTS[method] else None,  # type: ignore[index]
        "winner": list(points[best]),
        "at_edge": points[best][0] in (points[0][0], points[-1][0]),
        "coefficient_at_edge": points[best][1] is not None and points[best][1] in (points[0][1], points[-1][1]),
        "initial_regret": float(curves.regret[0, 0, 0]),
        "updates": curves.updates.tolist(),
        "samples": samples,
        "share": middle.tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
        "finals": found[:, -1].tolist(),
        "samples_to_one_percent": samples[reached[0]] if len(reached) else None,
    }


def compared(problem: str, method: str, group_size: int, config: Config) -> dict[str, Any]:
    """The largest difference between the curves of two methods that are one, at equal settings.

    Over a quarter of the updates, and with a large epsilon in Adam: where the exact gradient is 0, plain Adam makes a full step of
    what rounding left of it, and after a dozen updates such steps decide a draw.
    """
    mdp, (twin, factor) = PROBLEMS[problem](), SAME[method]
    short, points = config.plan(group_size).updates // 4 + 1, [Point(0.03), Point(0.3)]
    plain = config.plan(group_size, updates=short, epsilon=0.1)
    scaled = config.plan(group_size, updates=short, epsilon=0.1, scale=factor(float(mdp.beta)))
    one, other = (shares(train(mdp, loss, points, range(2), plan)) for loss, plan in ((twin, plain), (method, scaled)))
    return {
        "problem": problem,
        "n": group_size,
        "method": method,
        "same_as": twin,
        "difference": float(np.abs(one - other).max()),
        "moved": float(np.abs(one - 1).max()),
    }


def measured() -> dict[str, Any]:
    """What every loss consumes, and where that is not what it declares."""
    rows, wrong = {}, []
    for name, loss in LOSSES.items():
        found = consumption(name)
        rows[name] = {
            "optimisation": "regression" if found.regression else "policy gradient",
            "single_rollout": found.single_rollout,
            "single_model": found.single_model,
            "trajectory_reward": found.trajectory_reward,
            "models": list(found.models),
            "backward_passes": found.backward_passes,
        }
        if found.fields != set(loss.fields):
            wrong.append(name)
    return {"consumption": rows, "undeclared": wrong}


def cells(config: Config) -> dict[str, Callable[[], dict[str, Any]]]:
    """Everything that is run, by name."""
    made: dict[str, Callable[[], dict[str, Any]]] = {"consumption": measured}
    for problem in config.chosen_problems:
        for n in config.group_sizes:
            for method in SAME:
                if SAME[method][0] in config.chosen_methods and possible(method, n):
                    made[f"same/{problem}/{n}/{method}"] = partial(compared, problem, method, n, config)
    for problem in config.chosen_problems:
        for n in config.group_sizes:
            for method in config.chosen_methods:
                if possible(method, n):
                    made[f"tuned/{problem}/{n}/{method}"] = partial(tuned, problem, method, n, config)
    return made


def possible(method: str, group_size: int) -> bool:
    return group_size > 1 or not LOSSES[method].needs_group


def summarise(rows: list[dict[str, Any]], config: Config, seconds: float) -> dict[str, Any]:
    """The headline numbers; keys are explained in ``--help``."""
    by_cell = {row["cell"]: row for row in rows}
    runs = [row for row in rows if row["cell"].startswith("tuned/")]
    same = [row for row in rows if row["cell"].startswith("same/")]
    bad = [f"{cell}: not run" for cell in cells(config) if cell not in by_cell]
    bad += [f"{row['cell']}: {row['difference']:.1e}" for row in same if not row["difference"] <= SAME_CURVES]
    bad += [f"{row['cell']}: nothing moved" for row in same if not row["moved"] > SAME_CURVES]
    bad += [f"{name}: consumes other scores than it declares" for name in by_cell["consumption"]["undeclared"]]
    no_better = [row for row in runs if row["share"][-1] >= 1]
    bad += [f"{row['cell']}: no better than the reference" for row in no_better if must_learn(row)]

    def table(value: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        nested: dict[str, Any] = {}
        for row in runs:
            nested.setdefault(str(row["n"]), {}).setdefault(row["problem"], {})[row["method"]] = value(row)
        return nested

    edge = [row["cell"].removeprefix("tuned/") for row in runs if row["at_edge"]]
    return {
        "final": table(lambda row: [row["share"][-1], row["low"][-1], row["high"][-1]]),
        "overall": overall(runs),
        "samples_to_one_percent": table(lambda row: row["samples_to_one_percent"]),
        "winners": table(lambda row: row["winner"]),
        "winners_at_edge": edge,
        "winners_at_edge_share": len(edge) / len(runs),
        "coefficients_at_edge": [row["cell"].removeprefix("tuned/") for row in runs if row["coefficient_at_edge"]],
        "no_better": [row["cell"].removeprefix("tuned/") for row in no_better],
        "same_as": {
            method: [twin, max((row["difference"] for row in same if row["method"] == method), default=None)]
            for method, (twin, _) in SAME.items()
        },
        "consumption": by_cell["consumption"]["consumption"],
        "unexpected": bad,
        "verdict": "as predicted" if not bad else "NOT as predicted",
        "seconds": round(seconds, 1),
    }


def must_learn(row: dict[str, Any]) -> bool:
    """Whether a tuned method is predicted to end better than the reference policy; DAPO has no KL penalty."""
    return row["method"] != "dapo" and not (row["problem"] == "frozen-lake" and row["method"] in ONE_STEP)


def overall(runs: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Interquartile mean of the final shares over all problems, with its stratified interval, by n and method."""
    found: dict[str, dict[str, list[float]]] = {}
    for n, method in dict.fromkeys((row["n"], row["method"]) for row in runs):
        finals = np.array([row["finals"] for row in runs if (row["n"], row["method"]) == (n, method)])
        low, high = stratified_interval(finals, seed=0)
        found.setdefault(str(n), {})[method] = [float(interquartile_mean(finals)), float(low), float(high)]
    return found


def tables(summary: dict[str, Any]) -> list[Table]:
    """Final regrets in percent of the initial ones, the best overall first, for each n."""
    views = []
    for n, by_method in summary["overall"].items():
        problems = list(summary["final"][n])
        view = Table(f"n = {n}", "all", "95 %", *problems)
        for method, (middle, low, high) in sorted(by_method.items(), key=lambda item: item[1][0]):
            ends = [f"{100 * summary['final'][n][problem][method][0]:.2g}" for problem in problems]
            view.add_row(method, f"{100 * middle:.2g}", f"{100 * low:.2g} … {100 * high:.2g}", *ends)
        views.append(view)
    columns = ("optimisation", "single_rollout", "single_model", "trajectory_reward", "models", "backward_passes")
    view = Table("loss", *columns)
    for name, row in summary["consumption"].items():
        view.add_row(name, *(", ".join(row[c]) if c == "models" else str(row[c]) for c in columns))
    return [*views, view]


def main(config: Config) -> int:
    def finish(rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
        return summarise(rows, config, seconds)

    shown = ("final", "overall", "samples_to_one_percent", "winners", "consumption")
    return run_experiment(
        "family",
        config,
        cells(config),
        finish,
        lambda _, summary: tables(summary),
        in_tables=shown,
        execution=config.execution,
    )


if __name__ == "__main__":
    sys.exit(run_program("family", lambda: main(tyro.cli(Config, description=__doc__))))
