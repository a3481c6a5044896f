"""Language models trained by each method of a file: accuracy on held-out problems, and what an update costs by part.

Reads the table `llm_run.json` in `--data`; writes `llm_run.pdf` and `.png` to `--out`. With `--results`, the table is first extracted
from that run's `metrics.jsonl`. Runs no experiment.
"""

from __future__ import annotations

import sys
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from table_figure import Options, rounded, write_figure

from tbrm_theory.llm.part_timer import PARTS
from tbrm_theory.program import run_program

COLOURS = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#ee8866", "#888888")


def extract(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every run: its curve and its costs."""
    kept = ("name", "seed", "curve", "seconds_per_step", "peak_bytes", "models_held")
    return [rounded({key: cell[key] for key in kept}, 4) for cell in cells if "curve" in cell]


def draw(rows: list[dict[str, Any]]) -> Figure:
    """The figure; every plotted number comes from ``rows``."""
    methods = list(dict.fromkeys(row["name"] for row in rows))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(methods)}
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    for axis, (column, what) in zip(axes, enumerate(("update", "responses drawn")), strict=False):
        for name in methods:
            _curve(axis, [row for row in rows if row["name"] == name], column, colours[name])
        axis.set(xlabel=what, ylabel="share of held-out problems answered right")
    axes[0].legend(fontsize=8)
    _costs(axes[2], rows, methods)
    return figure


def _curve(axis: Axes, runs: list[dict[str, Any]], column: int, colour: str) -> None:
    """The mean over seeds, and the band from the lowest to the highest."""
    across = [point[column] for point in runs[0]["curve"]]
    accuracy = np.array([[point[-1] for point in run["curve"]] for run in runs])
    axis.plot(across, accuracy.mean(0), color=colour, label=runs[0]["name"])
    axis.fill_between(across, accuracy.min(0), accuracy.max(0), color=colour, alpha=0.15, lw=0)


def _costs(axis: Axes, rows: list[dict[str, Any]], methods: list[str]) -> None:
    left = np.zeros(len(methods))
    for part, colour in zip(PARTS, COLOURS, strict=False):
        means = [np.mean([row["seconds_per_step"][part] for row in rows if row["name"] == name]) for name in methods]
        if any(means):
            axis.barh(methods, means, left=left, color=colour, label=part.replace("_", " "))
        left += means
    axis.invert_yaxis()
    axis.set(xlabel="seconds of an update")
    axis.legend(fontsize=8)


def main(options: Options) -> int:
    return write_figure("llm_run", options, extract, draw)


if __name__ == "__main__":
    sys.exit(run_program("fig_llm_run", lambda: main(tyro.cli(Options, description=__doc__))))
