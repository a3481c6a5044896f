"""A frozen value traps the iterative variant on the two-armed bandit of [Y] App. F, TBRM is free: three panels from one table.

Reads the table `frozen_value.json` in `--data`; writes `frozen_value.pdf` and `.png` to `--out`. With `--results`, the table is first
extracted from that run's `metrics.jsonl`. Runs no experiment.
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

from tbrm_theory.program import run_program

BLUE, RED = "#4477aa", "#ee6677"


def extract(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows to eight digits, of a path its end alone."""
    rows = []
    for cell in cells:
        path = {"reached": cell["path"][-1]} if "path" in cell else {}
        rows.append(rounded({key: value for key, value in cell.items() if key != "path"} | path, 8))
    return rows


def draw(rows: list[dict[str, Any]]) -> Figure:
    """The figure; every plotted number comes from ``rows``."""
    by_cell = {row["cell"]: row for row in rows}
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.3), layout="constrained")
    _landscape(axes[0], by_cell["paper"])
    _threshold(axes[1], by_cell["threshold"])
    _basin(axes[2], [row for row in rows if row["cell"].startswith("basin")])
    return figure


def _landscape(axis: Axes, row: dict[str, Any]) -> None:
    points, scores = row["points"], row["scores"]
    axis.plot(points, row["landscape"]["tbrm-iterative"], color=RED, label="iterative, V frozen at (0,0)")
    axis.plot(points, row["landscape"]["tbrm"], color=BLUE, label="TBRM")
    frozen = [scores["iterative (0,0)"], scores["iterative (10,0)"]]
    axis.plot([0, 10], frozen, "o", color=RED)
    axis.plot([10], [scores["TBRM (10,0)"]], "o", color=BLUE)
    for x, y, label in ((0, frozen[0], f"{frozen[0]:.1f}"), (10, frozen[1], f"{frozen[1]:.6f}"), (10, 0, "0")):
        axis.annotate(label, (x, y), textcoords="offset points", xytext=(6, 6), fontsize=9)
    axis.set(xlabel="t of the logits (t, 0)", ylabel="loss", ylim=(-5, 110))
    axis.set_title("(a) the paper's bandit, advantage 10")
    axis.legend(fontsize=8, loc="upper center")


def _threshold(axis: Axes, row: dict[str, Any]) -> None:
    axis.plot(row["advantage"], row["kept"], color=BLUE, label="stay: (0,0)")
    axis.plot(row["advantage"], row["moved"], color=RED, label="move: (a,0), the optimum")
    axis.axvline(row["threshold"], color="black", ls="--", lw=1, label=f"a = {row['threshold']:.6f}")
    axis.set(xlabel="advantage a", ylabel="loss with V frozen at (0,0)")
    axis.set_title("(b) from a = 1.883 on, staying scores better")
    axis.legend(fontsize=8)


def _basin(axis: Axes, rows: list[dict[str, Any]]) -> None:
    advantages, steps = (sorted({row[key] for row in rows}) for key in ("advantage", "steps"))
    share = np.full((len(steps), len(advantages)), np.nan)
    for row in rows:
        share[steps.index(row["steps"]), advantages.index(row["advantage"])] = row["reached"] / row["advantage"]
    image = axis.imshow(share, origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=1)
    axis.set_xticks(range(len(advantages)), [f"{a:g}" for a in advantages], fontsize=7)
    axis.set_yticks(range(len(steps)), [str(k) for k in steps], fontsize=7)
    axis.set(xlabel="advantage a", ylabel="steps K between (0,0) and (a,0)")
    axis.set_title("(c) where the iterative variant ends, t/a")
    axis.figure.colorbar(image, ax=axis)


def main(options: Options) -> int:
    return write_figure("frozen_value", options, extract, draw)


if __name__ == "__main__":
    sys.exit(run_program("fig_frozen_value", lambda: main(tyro.cli(Options, description=__doc__))))
