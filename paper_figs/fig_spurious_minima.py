"""Where TBRM has local minima that are not global: against noise and reward, and against the number of shared parameters.

Reads the table `spurious_minima.json` in `--data`; writes `spurious_minima.pdf` and `.png` to `--out`. With `--results`, the table is
first extracted from that run's `metrics.jsonl`, and the instances that the run found are gathered in `spurious_minima_instances.json`
beside it. Runs no experiment.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from table_figure import Options, rounded, write_figure, write_table

from tbrm_theory.json_fields import read_json
from tbrm_theory.program import run_program
from tbrm_theory.statistics import binomial_interval

TRAJECTORIES = 9
"""Of the problems of the class map: residuals that parameters can move."""
LINES = {
    (True, "uniform"): ("realisable, uniform data", "#4477aa", "o"),
    (True, "uneven"): ("realisable, uneven data", "#66ccee", "s"),
    (False, "uniform"): ("not realisable, uniform data", "#ee6677", "^"),
    (False, "uneven"): ("not realisable, uneven data", "#aa3377", "v"),
}


def extract(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the run, rounded, with the 95 % interval of every share of problems."""
    rows = []
    for cell in cells:
        if cell["map"] == "class":
            found = round(cell["problems"] * cell["problem_count"])
            cell["interval"] = [round(end, 4) for end in binomial_interval(found, cell["problem_count"])]
        rows.append(rounded(cell, 4))
    return rows


def instances(results: Path) -> list[dict[str, Any]]:
    """What the run saved, with its names."""
    return [{"name": path.stem} | read_json(path).value for path in sorted((results / "instances").glob("*.json"))]


def draw(rows: list[dict[str, Any]]) -> Figure:
    """The figure; every plotted number comes from ``rows``."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    _noise(figure, axes[0, 0], [row for row in rows if row["map"] == "noise"])
    classes = [row for row in rows if row["map"] == "class"]
    titles = {"linear": "(b) linear in random features", "low-rank": "(c) low rank", "network": "(d) tanh network"}
    for axis, (kind, title) in zip(axes.flat[1:], titles.items(), strict=True):
        _classes(axis, title, [row for row in classes if row["kind"] == kind])
    return figure


def _noise(figure: Figure, axis: Axes, rows: list[dict[str, Any]]) -> None:
    share = np.array([row["share"] for row in rows])
    image = axis.pcolormesh(rows[0]["size"], [row["noise"] for row in rows], share, cmap="viridis", vmin=0, vmax=1)
    figure.colorbar(image, ax=axis, label="starts that end at the worse minimum")
    axis.plot(
        [1.5], [1.0], "*", color="white", ms=13, mec="black", clip_on=False, label="the instance of C3", ls="none"
    )
    axis.set(xlabel="reward size G", ylabel="transition noise (0: deterministic, 1: a coin)")
    axis.set_title("(a) free logits, stochastic transitions (C3)")
    axis.legend(loc="lower right", fontsize=8)


def _classes(axis: Axes, title: str, rows: list[dict[str, Any]]) -> None:
    for (realisable, data), (label, colour, marker) in LINES.items():
        mine = [row for row in rows if row["realisable"] == realisable and row["data"] == data]
        x = [row["parameters"] for row in mine]
        share = np.array([row["problems"] for row in mine])
        low, high = np.array([row["interval"] for row in mine]).T
        errors = np.stack([share - low, high - share]).clip(
            min=0
        )  # rounding may put an end on the wrong side of 0 or 1
        axis.errorbar(
            x, share, errors, color=colour, marker=marker, ms=5, lw=1.3, elinewidth=0.7, capsize=2, label=label
        )
    axis.axvline(TRAJECTORIES, color="black", ls=":", lw=1, label="as many parameters as trajectories")
    axis.set(xlabel="parameters D", ylabel="problems with a spurious minimum", ylim=(-0.03, 1.0), title=title)
    axis.legend(fontsize=8)


def main(options: Options) -> int:
    status = write_figure("spurious_minima", options, extract, draw)
    if options.results is not None:
        write_table(options.data / "spurious_minima_instances.json", instances(options.results))
    return status


if __name__ == "__main__":
    sys.exit(run_program("fig_spurious_minima", lambda: main(tyro.cli(Options, description=__doc__))))
