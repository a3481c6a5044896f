"""What conditioning explains of BRM's trouble with outcome reward, and what the gauge does: four panels from one table.

Reads the table `conditioning.json` in `--data`; writes `conditioning.pdf` and `.png` to `--out`. With `--results`, the table is first
extracted from that run's `metrics.jsonl`. Runs no experiment.
"""

from __future__ import annotations

import sys
from typing import Any

import matplotlib.pyplot as plt
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from table_figure import Options, rounded, write_figure

from tbrm_theory.program import run_program

COLOURS = {"tbrm": "#4477aa", "brm": "#ee6677"}
NAMES = {"tbrm": "TBRM", "brm": "BRM"}
MARKERS = {"one-state": "o", "deterministic-tree": "s", "combination-lock": "^"}
PLACES = {
    "one-state": "one state per layer",
    "deterministic-tree": "binary tree",
    "combination-lock": "combination lock",
}
SHADES = {0.0: 0.35, 0.5: 0.5, 1.0: 0.65, 2.0: 0.8, 4.0: 1.0}


def extract(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All condition numbers; of the runs what is drawn: Adam's worst regrets, and curves at the longest horizon, every tenth step."""
    longest = max(cell["horizon"] for cell in cells if "runs" in cell)
    rows = []
    for cell in cells:
        if cell.get("optimiser") == "gd":
            continue
        for run in cell.get("runs", {}).values():
            curve = run.pop("curve")
            if cell["horizon"] == longest:
                run["curve"] = curve[::10]
        rows.append(rounded(cell, 6))
    return rows


def draw(rows: list[dict[str, Any]]) -> Figure:
    """The figure; every plotted number comes from ``rows``."""
    figure, axes = plt.subplots(2, 2, figsize=(11.5, 8.5), layout="constrained")
    conditions = [row for row in rows if "condition" in row]
    _conditions(axes[0, 0], conditions, "", "(a) condition numbers, plain")
    _conditions(axes[0, 1], conditions, ", scaled", "(b) condition numbers, unit diagonal")
    runs = [row for row in rows if "runs" in row]
    longest = max(row["horizon"] for row in runs)
    _curves(axes[1, 0], [row for row in runs if row["horizon"] == longest and row["optimiser"] == "adam"], longest)
    _worst(axes[1, 1], [row for row in runs if row["optimiser"] == "adam"])
    return figure


def _conditions(axis: Axes, rows: list[dict[str, Any]], which: str, title: str) -> None:
    for family, marker in MARKERS.items():
        for loss, colour in COLOURS.items():
            mine = [row for row in rows if row["family"] == family]
            x, y = [row["horizon"] for row in mine], [row["condition"][loss + which] for row in mine]
            axis.loglog(x, y, marker=marker, ms=4, lw=1, color=colour, label=f"{NAMES[loss]}, {PLACES[family]}")
    axis.set(xlabel="horizon H", ylabel="condition number", title=title)
    axis.set_xticks([2, 4, 8, 16, 28], ["2", "4", "8", "16", "28"])
    axis.minorticks_off()
    axis.legend(fontsize=7)


def _curves(axis: Axes, rows: list[dict[str, Any]], horizon: int) -> None:
    for row in rows:
        for name, run in row["runs"].items():
            spread, data = name.removeprefix("spread ").split(", ")
            if data == "reference" and float(spread) in (0.0, 1.0, 4.0):
                steps = [10 * i for i in range(len(run["curve"]))]
                shade = SHADES[float(spread)]
                label = f"{NAMES[row['loss']]}, spread {spread}"
                axis.semilogy(
                    steps, run["curve"], color=COLOURS[row["loss"]], alpha=shade, lw=1 + 1.5 * shade, label=label
                )
    axis.axhline(1.0, color="black", lw=0.8, ls=":")
    axis.set(xlabel="Adam step", ylabel="exact regret / first regret")
    axis.set_title(f"(c) delayed sum, H = {horizon}, from log π_ref + c(s)")
    axis.legend(fontsize=7)


def _worst(axis: Axes, rows: list[dict[str, Any]]) -> None:
    for row in sorted(rows, key=lambda row: row["horizon"]):
        points = {
            float(n.split()[1].rstrip(",")): r["worst"] for n, r in row["runs"].items() if n.endswith("reference")
        }
        marker = {2: "o", 4: "s", 8: "^", 16: "D"}.get(row["horizon"], "x")
        label = f"{NAMES[row['loss']]}, H = {row['horizon']}"
        axis.plot(
            list(points), list(points.values()), marker=marker, ms=4, color=COLOURS[row["loss"]], lw=1, label=label
        )
    axis.axhline(1.0, color="black", lw=0.8, ls=":")
    axis.set(xlabel="spread of the reference's values V_ref(s)", ylabel="worst regret on the way / first regret")
    axis.set_title("(d) Adam: BRM pays for raw logits, TBRM hardly")
    axis.legend(fontsize=7)


def main(options: Options) -> int:
    return write_figure("conditioning", options, extract, draw)


if __name__ == "__main__":
    sys.exit(run_program("fig_conditioning", lambda: main(tyro.cli(Options, description=__doc__))))
