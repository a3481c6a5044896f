"""Started at the reference model, TBRM moves where there is nothing to learn, ReVal rests: three panels from one table.

Reads the table `calibrated_start.json` in `--data`; writes `calibrated_start.pdf` and `.png` to `--out`. With `--results`, the table
is first extracted from that run's `metrics.jsonl`. Runs no experiment.
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

FLOOR = 1e-34
"""Where an exact zero is drawn."""
COLOURS = {"tbrm": "#4477aa", "reval": "#ee6677"}
NAMES = {"tbrm": "TBRM", "reval": "ReVal"}
STYLES = {"reference": "-", "uniform": "--"}


def extract(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that are drawn, to four digits."""
    return [rounded(cell, 4) for cell in cells if not cell["cell"].startswith("minimiser")]


def draw(rows: list[dict[str, Any]]) -> Figure:
    """The figure; every plotted number comes from ``rows``."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.3), layout="constrained")
    curves = [row for row in rows if row["cell"].startswith("curve")]
    _curves(axes[0], [row for row in curves if not row["reward"]], "kl")
    axes[0].set(xlabel="gradient step", ylabel="KL(π_θ ‖ π_ref)", title="(a) no reward: nothing to learn")
    axes[0].set_yscale("log")
    _curves(axes[1], [row for row in curves if row["reward"]], "regret")
    axes[1].set(xlabel="gradient step", ylabel="exact regret", title="(b) outcome reward")
    _levels(axes[2], [row for row in rows if row["cell"].startswith("level")])
    return figure


def _curves(axis: Axes, rows: list[dict[str, Any]], what: str) -> None:
    for row in rows:
        values = [max(value, FLOOR) for value in row[what]]
        label = f"{NAMES[row['method']]}, data of {'π_ref' if row['data'] == 'reference' else 'the uniform policy'}"
        axis.plot(values, STYLES[row["data"]], color=COLOURS[row["method"]], label=label)
    axis.legend(fontsize=8)


def _levels(axis: Axes, rows: list[dict[str, Any]]) -> None:
    rows = sorted(rows, key=lambda row: row["value"])
    values = [row["value"] for row in rows]
    axis.plot(
        values, [row["start_loss"]["tbrm"] for row in rows], "o", color=COLOURS["tbrm"], label="TBRM's first loss"
    )
    axis.plot(values, [value**2 for value in values], ":", color="black", label="V_ref²")
    axis.plot(values, [row["peak_kl"]["tbrm"] for row in rows], "-s", ms=4, color="#228833", label="TBRM's largest KL")
    axis.plot(values, [row["start_loss"]["reval"] for row in rows], "x", color=COLOURS["reval"], label="ReVal's: 0, 0")
    axis.set_yscale("symlog", linthresh=1e-4)
    axis.set(xlabel="V_ref(s_1)", ylabel="loss, or KL(π_θ ‖ π_ref)", title="(c) no reward, by the reference's level")
    axis.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 0.08))


def main(options: Options) -> int:
    return write_figure("calibrated_start", options, extract, draw)


if __name__ == "__main__":
    sys.exit(run_program("fig_calibrated_start", lambda: main(tyro.cli(Options, description=__doc__))))
