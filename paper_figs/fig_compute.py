"""What one update of each method costs, in units of TBRM's: operations and memory, from one table.

Reads the table `compute.json` in `--data`; writes `compute.pdf` and `.png` to `--out`. With `--results`, the table is first extracted
from that run's `metrics.jsonl`. Runs no experiment.
"""

from __future__ import annotations

import sys
from typing import Any

import matplotlib.pyplot as plt
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from table_figure import Options, write_figure

from tbrm_theory.program import run_program

BLUE, RED, GREY = "#4477aa", "#ee6677", "#bbbbbb"


def extract(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every method the smallest number of rollouts that it is defined for."""
    smallest: dict[str, dict[str, Any]] = {}
    for cell in sorted((cell for cell in cells if "refused" not in cell), key=lambda cell: cell["rollouts"]):
        smallest.setdefault(cell["method"], cell)
    methods = dict.fromkeys(cell["method"] for cell in cells)
    keys = ("method", "rollouts", "evaluations", "tokens", "backward", "operations", "held", "saved", "saved_in_turn")
    return [{key: smallest[method][key] for key in keys} for method in methods]


def draw(rows: list[dict[str, Any]]) -> Figure:
    """The figure; every plotted number comes from ``rows``."""
    tbrm = next(row for row in rows if row["method"] == "tbrm")
    figure, axes = plt.subplots(1, 2, figsize=(12, 6.5), layout="constrained", sharey=True)
    _operations(axes[0], rows, tbrm)
    _memory(axes[1], rows, tbrm)
    axes[0].set_yticks(range(len(rows)), [f"{row['method']}, n = {row['rollouts']}" for row in rows], fontsize=8)
    axes[0].invert_yaxis()
    return figure


def _operations(axis: Axes, rows: list[dict[str, Any]], tbrm: dict[str, Any]) -> None:
    relative = [row["operations"] / tbrm["operations"] for row in rows]
    axis.barh(range(len(rows)), relative, color=BLUE)
    for y, (row, length) in enumerate(zip(rows, relative, strict=True)):
        models = [name for name in row["evaluations"] if name not in ("policy", "reference")]
        label = f"{sum(row['evaluations'].values())} forward, {sum(row['backward'].values())} backward"
        axis.text(length + 0.02, y, ", ".join([label, *models]), va="center", fontsize=7)
    axis.axvline(1, color="black", lw=0.8)
    axis.set(xlabel="operations of an update / TBRM's", xlim=(0, 2.6))
    axis.set_title("(a) operations, at equal tokens")


def _memory(axis: Axes, rows: list[dict[str, Any]], tbrm: dict[str, Any]) -> None:
    total = tbrm["held"] + tbrm["saved"]
    held, in_turn, saved = ([row[key] / total for row in rows] for key in ("held", "saved_in_turn", "saved"))
    together = [a - b for a, b in zip(saved, in_turn, strict=True)]
    begin = [a + b for a, b in zip(held, in_turn, strict=True)]
    places = range(len(rows))
    axis.barh(places, held, color=BLUE, label="parameters, gradients, Adam's moments")
    axis.barh(places, in_turn, left=held, color=RED, label="kept for the backward pass")
    axis.barh(places, together, left=begin, color=GREY, label="more, if all models are updated at once")
    axis.axvline(1, color="black", lw=0.8)
    ppo = next(row for row in rows if row["method"] == "ppo")
    axis.plot([1.5], [rows.index(ppo)], "k|", ms=14, mew=2, label="PPO's, if TBRM needed 33.3 % less ([Y])")
    axis.set(xlabel="bytes / TBRM's")
    axis.set_title("(b) memory of an update")
    axis.legend(fontsize=7, loc="upper right")


def main(options: Options) -> int:
    return write_figure("compute", options, extract, draw)


if __name__ == "__main__":
    sys.exit(run_program("fig_compute", lambda: main(tyro.cli(Options, description=__doc__))))
