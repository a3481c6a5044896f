"""How κ, Lemma 1's bound and C_∞ grow with the horizon: where merging states helps, and where it does not (X4).

In every state that the target visits it differs from the data by a χ² of ``c``. Four kinds of problems, H = 1 to 60:

* tree: a state is its whole prefix, κ = (1+c)^H (tables up to H = 10, beyond that the formula);
* lock: two merged states per layer, the wrong one absorbing, κ = (1+c)^H all the same;
* one state per layer: κ = 1 + Hc;
* leaky lock: the wrong state leads back with some probability, κ = 1 + c Σ_h 1/g_h, exponential at first and then linear.

κ is computed in closed form (I12), from the moment matrix where it has at most 60 pairs, and by the formula.

summary.json: `largest_error_closed`, `largest_error_solved` (relative, against the formula; the second divided by the condition
number), `bits_per_step` (slope of log2 κ in H over log2(1+c): 1 for trees and locks), `exponent` (slope of log(κ - 1) in log H: 1 for
one state, and for leaky locks over the last third of the horizons), `lemma1_over_kappa` and `corollary6_over_kappa` (at the longest
horizon), `unexpected`, `verdict`, `seconds`. Exit status 1 if an error exceeds 1e-11 or a slope is off.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # Ctrl-C while packages load, which some of them do not survive
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import numpy as np
import tyro
from rich.table import Table

from tbrm_theory import coverage
from tbrm_theory.behaviours import MarkovBehaviour
from tbrm_theory.claims.coverage_growth import (
    CoveragePair,
    leaky_lock,
    leaky_lock_masses,
    lemma1_of_products,
    lock,
    one_state,
    step,
    tree,
)
from tbrm_theory.execution import Execution
from tbrm_theory.experiment import run_experiment
from tbrm_theory.moments import moment_form
from tbrm_theory.program import run_program
from tbrm_theory.statistics import log_log_slope

LARGEST_TREE, MOST_PAIRS, ERROR = 10, 60, 1e-11
EVERY, FURTHER = 12, 4
"""Every horizon up to 12, every fourth from there on."""


@dataclass(frozen=True)
class Config:
    """Settings of the experiment."""

    longest: int = 60
    """The longest horizon."""
    chi_squares: tuple[float, ...] = (1.0, 0.1)
    """c, from 0 to 1."""
    ways_back: tuple[float, ...] = (0.5, 0.1, 0.01, 0.001)
    """Leaky locks, at the first c."""
    results: Path = Path("results")
    execution: tyro.conf.OmitArgPrefixes[Execution] = field(default_factory=Execution)


@dataclass(frozen=True)
class Cell:
    """A kind of problem with its c, over all horizons."""

    kind: str
    c: float
    way_back: float | None = None

    @property
    def name(self) -> str:
        return f"{self.kind} c={self.c:g}" + ("" if self.way_back is None else f" way back {self.way_back:g}")

    def pair(self, horizon: int) -> CoveragePair | None:
        """The problem; None if it is too large for tables."""
        right = 1 / (1 + self.c)
        if self.way_back is not None:
            return leaky_lock(horizon, self.way_back, right=right)
        if self.kind == "lock":
            return lock(horizon, right=right)
        if self.kind == "one state":
            return one_state(horizon, step(self.c))
        return tree(horizon, step(self.c)) if horizon <= LARGEST_TREE else None

    def formulas(self, horizon: int) -> tuple[float, float, float]:
        """κ, Lemma 1's right side, C_∞."""
        c = self.c
        if self.way_back is not None:
            masses = leaky_lock_masses(horizon, self.way_back, 1 / (1 + c))
            return (
                1 + c * sum(1 / g for g in masses),
                1 + sum((1 + c) / g - 1 for g in masses),
                (1 + c) / min(masses),
            )
        if self.kind == "one state":
            return 1 + horizon * c, 1 + horizon * c, 1 + c**0.5
        ratio = 1 + c if self.kind == "lock" else 1 + c**0.5
        return (1 + c) ** horizon, lemma1_of_products(horizon, c), ratio**horizon


def cells(config: Config) -> Iterator[Cell]:
    for c in config.chi_squares:
        for kind in ("tree", "lock", "one state"):
            yield Cell(kind, c)
    for way_back in config.ways_back:
        yield Cell("leaky lock", config.chi_squares[0], way_back)


def run_cell(cell: Cell, longest: int) -> dict[str, Any]:
    """One column of numbers for each coefficient, over horizons; None where there was nothing to compute."""
    columns: dict[str, list[float | None]] = {name: [] for name in ("closed", "solved", "condition")}
    formulas: dict[str, list[float]] = {name: [] for name in ("kappa", "lemma1", "c_inf", "corollary6")}
    errors = [0.0]
    horizons = [*range(1, min(EVERY, longest) + 1), *range(EVERY + FURTHER, longest + 1, FURTHER)]
    for horizon in horizons:
        kappa, lemma1, c_inf = cell.formulas(horizon)
        for name, value in zip(formulas, (kappa, lemma1, c_inf, horizon * c_inf), strict=True):
            formulas[name].append(value)
        pair, closed, solved, condition = cell.pair(horizon), None, None, None
        if pair is not None:
            target, data = pair.log_policy, pair.log_behaviour
            closed = coverage.kappa(pair.mdp, target, data).item()
            found = (coverage.lemma1(pair.mdp, target, data).item(), coverage.c_inf(pair.mdp, target, data).item())
            errors += [abs(x / y - 1) for x, y in zip((closed, *found), (kappa, lemma1, c_inf), strict=True)]
            if sum(table.numel() for table in pair.mdp.reference) <= MOST_PAIRS:
                behaviour = MarkovBehaviour(data)
                solved = coverage.kappa_linear_solve(pair.mdp, target, behaviour).item()
                condition = moment_form(pair.mdp, behaviour).condition.item()
        for name, value in zip(columns, (closed, solved, condition), strict=True):
            columns[name].append(value)
    solved_errors = [
        abs(x / y - 1) / k
        for x, y, k in zip(columns["solved"], formulas["kappa"], columns["condition"], strict=True)
        if x is not None and k is not None
    ]
    row = {**asdict(cell), "horizon": horizons, **formulas, **columns}
    row |= {"error_closed": max(errors), "error_solved": max(solved_errors, default=0.0)}
    return row | {"slope": slope(row), "verdict": verdict(row)}


def slope(row: dict[str, Any]) -> float:
    """Of log κ in ``H log(1+c)`` for trees and locks; of log(κ-1) in log H else, for leaky locks over the last third."""
    computed = [value if value is not None else kappa for value, kappa in zip(row["closed"], row["kappa"], strict=True)]
    horizon, kappa = np.array(row["horizon"]), np.array(computed)
    if row["kind"] in ("tree", "lock"):
        return float(np.polyfit(horizon, np.log(kappa), 1)[0] / math.log1p(row["c"]))
    last = slice(2 * len(horizon) // 3 if row["kind"] == "leaky lock" else 0, None)
    return log_log_slope(horizon[last], kappa[last] - 1).slope


def verdict(row: dict[str, Any]) -> str:
    """Errors are rounding; slopes are 1, of leaky locks once the horizon is long beside 1/g."""
    if max(row["error_closed"], row["error_solved"]) > ERROR:
        return "WRONG"
    if row["kind"] == "leaky lock":
        steps = math.log2(row["kappa"][-1])  # an exponential would have a slope of several
        return "linear in the end" if slope(row) < min(2.0, steps) else "NOT LINEAR"
    return "as predicted" if abs(slope(row) - 1) < 1e-9 else "WRONG SLOPE"


def summarise(rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The headline numbers; keys are explained in ``--help``."""
    exponential = [row for row in rows if row["kind"] in ("tree", "lock")]
    bad = [row["cell"] for row in rows if row["verdict"].isupper()]
    return {
        "largest_error_closed": max(row["error_closed"] for row in rows),
        "largest_error_solved": max(row["error_solved"] for row in rows),
        "bits_per_step": {row["cell"]: row["slope"] for row in exponential},
        "exponent": {row["cell"]: row["slope"] for row in rows if row not in exponential},
        "lemma1_over_kappa": {row["cell"]: row["lemma1"][-1] / row["kappa"][-1] for row in rows},
        "corollary6_over_kappa": {row["cell"]: row["corollary6"][-1] / row["kappa"][-1] for row in rows},
        "unexpected": bad,
        "verdict": "as predicted" if not bad else "NOT as predicted",
        "seconds": round(seconds, 1),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """One line a kind; coefficients at the longest horizon."""
    view = Table("problem", "H", "κ", "Lemma 1", "C_∞", "H·C_∞", "slope", "error closed", "error solved", "verdict")
    for row in rows:
        last = (f"{row[name][-1]:.4g}" for name in ("kappa", "lemma1", "c_inf", "corollary6"))
        errors = (f"{row[name]:.1e}" for name in ("error_closed", "error_solved"))
        style = "red" if row["verdict"].isupper() else None
        horizon = str(row["horizon"][-1])
        view.add_row(row["cell"], horizon, *last, f"{row['slope']:.4f}", *errors, row["verdict"], style=style)
    return view


def main(config: Config) -> int:
    made = {cell.name: partial(run_cell, cell, config.longest) for cell in cells(config)}
    return run_experiment(
        "coverage_horizon", config, made, summarise, lambda rows, _: [table(rows)], execution=config.execution
    )


if __name__ == "__main__":
    sys.exit(run_program("coverage_horizon", lambda: main(tyro.cli(Config, description=__doc__))))
