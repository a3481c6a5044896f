"""The iterative variant of TBRM stays where it is while TBRM moves: the two-armed bandit of [Y] App. F (theory.md X5).

Logits `(t, 0)`, advantage `a`: `R_β = (a, 0)`, uniform data, so that `t = a` is the optimum. The iterative variant freezes
`V = log(1 + e^t)` at the current logits, takes the best logits of a finite class under the frozen value, and begins again, until
nothing moves. Three parts:

* `paper`: the class {(0,0), (10,0)}, and the same with `r/β = (10,0)` and a uniform reference, scored by both;
* `threshold`: the class {(0,0), (a,0)} over `a`: from which advantage on the start is kept (1.88308…, X5.c);
* `basin`: the class {(i a/K, 0), i = 0 … K} over `a` and `K`, started at `(0,0)`: where both variants end. Over all `t` the iterative
  one has the single fixed point `a`, where the slope `(t-a)(1-σ(t))` of the frozen loss vanishes; but the slope also dies out like
  `e^-t`, so a class of spacing δ holds it near `t = log(2a/δ)`, and to get to `a` it must be exponentially fine.

summary.json: `scores` (the paper's six numbers, computed), `threshold` (bisected), `trapped_share` (of the `basin` cells, those that
end off the optimum), `kept_share` (those that never leave the start), `largest_regret_share` (as a share of the regret of the start),
`reached` (by advantage, the `t/a` at which the finest class holds the iterative variant), `tbrm_regret` (largest of TBRM over all
cells), `unexpected`, `verdict`, `seconds`. Exit status 1 if a number of the paper does not come out, the threshold is off by more than
1e-9, TBRM ends anywhere but at the optimum, or the coarsest class holds the start exactly where the threshold does not say so.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # Ctrl-C while packages load, which some of them do not survive
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import torch
import tyro
from rich.table import Table
from torch import Tensor

import tbrm_theory as tt
from tbrm_theory.claims.starting_points import THRESHOLD, bandit_scores
from tbrm_theory.execution import Execution
from tbrm_theory.experiment import run_experiment
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.program import run_program
from tbrm_theory.training import exact_regret

PRINTED = {
    "iterative (0,0)": (50.0, 0.05),
    "iterative (10,0)": (86.618354, 5e-7),
    "TBRM (10,0)": (0.0, 5e-7),
    "unfolded iterative (0,0)": (43.55, 5e-3),
    "unfolded iterative (10,0)": (74.20, 5e-3),
    "unfolded TBRM (10,0)": (0.48, 5e-3),
}
"""The paper's numbers and half a unit of their last digit."""
LANDSCAPE = [round(0.1 * i, 1) for i in range(-20, 141)]
"""The `t` at which both losses of the paper's bandit are recorded, for the figure."""
EXACT = 1e-12


@dataclass(frozen=True)
class Config:
    """Settings of the experiment."""

    advantages: tuple[float, ...] = (0.5, 1.0, 1.5, 1.8, 1.9, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0, 20.0, 30.0)
    steps: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256, 512, 1024)
    """The numbers K of steps between the start and the optimum; 1 is the paper's class."""
    results: Path = Path("results")
    execution: tyro.conf.OmitArgPrefixes[Execution] = field(default_factory=Execution)


def line(points: Tensor) -> tuple[Tensor]:
    """The logits ``(t, 0)``."""
    return (torch.stack([points, torch.zeros_like(points)], dim=-1).unsqueeze(-2),)


def iterate(mdp: RegularizedMDP, points: Tensor, start: int) -> list[int]:
    """The indices that the iterative variant visits until it stays, ties kept."""
    path = [start]
    while len(path) <= 10 * len(points):
        (current,) = line(points[path[-1]])
        scores = bandit_scores(mdp, line(points), "tbrm-iterative", current)
        best = int(scores.argmin())
        if scores[best] >= scores[path[-1]]:
            return path
        path.append(best)
    raise RuntimeError(f"the iterative variant visits {path[-4:]} in turn")


def paper() -> dict[str, Any]:
    logits = line(torch.tensor([0.0, 10.0], dtype=torch.float64))
    scores = {}
    for prefix, folded in (("", True), ("unfolded ", False)):
        mdp = tt.make("two-armed-bandit", advantage=10.0, folded=folded)
        frozen, free = (bandit_scores(mdp, logits, loss).tolist() for loss in ("tbrm-iterative", "tbrm"))
        scores |= {f"{prefix}iterative (0,0)": frozen[0], f"{prefix}iterative (10,0)": frozen[1]}
        scores[f"{prefix}TBRM (10,0)"] = free[1]
    mdp, points = tt.make("two-armed-bandit", advantage=10.0), torch.tensor(LANDSCAPE, dtype=torch.float64)
    landscape = {loss: bandit_scores(mdp, line(points), loss).tolist() for loss in ("tbrm-iterative", "tbrm")}
    return {"scores": scores, "points": LANDSCAPE, "landscape": landscape}


def threshold() -> dict[str, Any]:
    """Both scores over the advantage, and by bisection where they cross."""

    def scores(advantage: float) -> list[float]:
        logits = line(torch.tensor([0.0, advantage], dtype=torch.float64))
        return bandit_scores(tt.make("two-armed-bandit", advantage=advantage), logits, "tbrm-iterative").tolist()

    low, high = 1.0, 5.0
    for _ in range(60):
        kept, moved = scores((low + high) / 2)
        low, high = ((low + high) / 2, high) if kept > moved else (low, (low + high) / 2)
    grid = [0.1 * i for i in range(1, 61)]
    kept_curve, moved_curve = zip(*map(scores, grid), strict=True)
    return {
        "threshold": low,
        "advantage": grid,
        "kept": list(kept_curve),
        "moved": list(moved_curve),
    }


def basin(advantage: float, steps: int) -> dict[str, Any]:
    """Where both variants end in a class of ``steps`` equal steps."""
    mdp = tt.make("two-armed-bandit", advantage=advantage)
    points = torch.linspace(0, advantage, steps + 1, dtype=torch.float64)
    solution = tt.solve(mdp)
    path = iterate(mdp, points, 0)
    best = int(bandit_scores(mdp, line(points), "tbrm").argmin())
    regrets = exact_regret(mdp, line(points[[0, path[-1], best]]), solution).tolist()
    return {
        "advantage": advantage,
        "steps": steps,
        "path": [points[i].item() for i in path],
        "start_regret": regrets[0],
        "regret": regrets[1],
        "tbrm_regret": regrets[2],
    }


def summarise(rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The headline numbers; keys are explained in ``--help``."""
    by_cell = {row["cell"]: row for row in rows}
    scores, found = by_cell["paper"]["scores"], by_cell["threshold"]["threshold"]
    cells = [row for row in rows if row["cell"].startswith("basin")]
    trapped = [row for row in cells if row["regret"] > EXACT]
    finest = max(row["steps"] for row in cells)
    reached = {f"{row['advantage']:g}": row["path"][-1] / row["advantage"] for row in cells if row["steps"] == finest}
    kept = [row["cell"] for row in cells if len(row["path"]) == 1]
    bad = [name for name, (printed, half) in PRINTED.items() if not abs(scores[name] - printed) <= half]
    if abs(found - THRESHOLD) > 1e-9:
        bad.append(f"threshold {found}")
    bad += [row["cell"] for row in cells if row["tbrm_regret"] > EXACT]
    bad += [r["cell"] for r in cells if r["steps"] == 1 and (r["cell"] in kept) != (r["advantage"] >= THRESHOLD)]
    return {
        "scores": scores,
        "threshold": found,
        "trapped_share": len(trapped) / len(cells),
        "kept_share": len(kept) / len(cells),
        "largest_regret_share": max((row["regret"] / row["start_regret"] for row in trapped), default=0.0),
        "reached": reached,
        "tbrm_regret": max(row["tbrm_regret"] for row in cells),
        "unexpected": bad,
        "verdict": "as predicted" if not bad else "NOT as predicted",
        "seconds": round(seconds, 1),
    }


def table(summary: dict[str, Any]) -> Table:
    """The paper's numbers beside those computed."""
    view = Table("logits, loss", "printed", "computed")
    for name, (printed, _) in PRINTED.items():
        view.add_row(name, f"{printed:g}", f"{summary['scores'][name]:.6f}")
    view.add_row("threshold of the advantage", f"{THRESHOLD:.12f}", f"{summary['threshold']:.12f}")
    return view


def main(config: Config) -> int:
    if not config.advantages or min(config.advantages) <= 0 or min(config.steps, default=0) < 1:
        raise tt.InvalidInputError("advantages", "expected positive numbers, and at least one step")
    made: dict[str, Any] = {"paper": paper, "threshold": threshold}
    for advantage, steps in product(config.advantages, config.steps):
        made[f"basin/{advantage:g}/{steps}"] = partial(basin, advantage, steps)
    return run_experiment(
        "frozen_value", config, made, summarise, lambda _, summary: [table(summary)], execution=config.execution
    )


if __name__ == "__main__":
    sys.exit(run_program("frozen_value", lambda: main(tyro.cli(Config, description=__doc__))))
