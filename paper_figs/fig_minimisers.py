"""Which losses have the optimal policy as a minimiser, or rest there, on which data: one heat map from one table.

Reads the table `minimisers.json` in `--data`; writes `minimisers.pdf` and `.png` to `--out`. With `--results`, the table is first
extracted from that run's `metrics.jsonl`. Runs no experiment.
"""

from __future__ import annotations

import sys
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from table_figure import Options, rounded, write_figure

from tbrm_theory.program import run_program

COLOURS = {"optimum": "#a8d5ba", "among others": "#f3e2a0", "elsewhere": "#eea08c", "nowhere": "#b9a3c9"}
MEANING = {
    "optimum": "ends at π* from every start",
    "among others": "rests at π*, and elsewhere from other starts",
    "elsewhere": "does not rest at π*, ends elsewhere",
    "nowhere": "does not rest at π*, no rest found",
}
SYMMETRIC = 1e-6


def extract(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each cell over its problems: the verdict, the largest regret from the reference start, how exact, and of what kind."""
    keys = list(dict.fromkeys((cell["loss"], cell["kind"]) for cell in cells))
    rows = []
    for loss, kind in keys:
        group = [cell for cell in cells if (cell["loss"], cell["kind"]) == (loss, kind)]
        at_rest = [(cell, start) for cell in group for start, rests in cell["rests"].items() if rests]
        row = {
            "loss": loss,
            "kind": kind,
            "verdict": max((cell["verdict"] for cell in group), key=list(COLOURS).index),
            "regret": max(cell["regret"]["reference"] for cell in group),
            "regret_from_optimum": max(cell["regret"]["optimum"] for cell in group),
            "residual": max((cell["residual"][start] for cell, start in at_rest), default=None),
            "least_eigenvalue": min((cell["least_eigenvalue"][start] for cell, start in at_rest), default=None),
            "gradient": all(cell["asymmetry"][start] < SYMMETRIC for cell, start in at_rest),
        }
        rows.append(rounded(row, 3))
    return rows


def draw(rows: list[dict[str, Any]]) -> Figure:
    """The figure; every plotted number comes from ``rows``."""
    losses, kinds = (list(dict.fromkeys(row[key] for row in rows)) for key in ("loss", "kind"))
    order = list(COLOURS)
    level = np.full((len(losses), len(kinds)), np.nan)
    figure, axis = plt.subplots(figsize=(11, 0.33 * len(losses) + 2.2), layout="constrained")
    for row in rows:
        place = losses.index(row["loss"]), kinds.index(row["kind"])
        level[place] = order.index(row["verdict"])
        kind = "" if row["verdict"] == "nowhere" else "min  " if row["gradient"] else "rest  "
        axis.text(place[1], place[0], f"{kind}{row['regret']:.0e}", ha="center", va="center", fontsize=8)
    axis.imshow(level, aspect="auto", cmap=ListedColormap(list(COLOURS.values())), vmin=-0.5, vmax=len(order) - 0.5)
    axis.set_xticks(range(len(kinds)), kinds)
    axis.set_yticks(range(len(losses)), losses, fontsize=9)
    axis.set_xticks(np.arange(len(kinds) - 1) + 0.5, minor=True)
    axis.set_yticks(np.arange(len(losses) - 1) + 0.5, minor=True)
    axis.grid(which="minor", color="white", lw=1.5)
    axis.tick_params(which="both", length=0)
    axis.xaxis.tick_top()
    handles = [Patch(color=COLOURS[name], label=MEANING[name]) for name in order]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    axis.set_xlabel(
        "largest regret from the reference start, over that of the reference\n"
        "min: the Jacobian of the update is symmetric and has no negative eigenvalue, as at a minimum; rest: it is not symmetric",
        fontsize=9,
    )
    return figure


def main(options: Options) -> int:
    return write_figure("minimisers", options, extract, draw)


if __name__ == "__main__":
    sys.exit(run_program("fig_minimisers", lambda: main(tyro.cli(Options, description=__doc__))))
