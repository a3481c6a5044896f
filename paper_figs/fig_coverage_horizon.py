"""κ, Lemma 1 and C_∞ against the horizon (X4): three panels from one table.

Reads the table `coverage_horizon.json` in `--data`; writes `coverage_horizon.pdf` and `.png` to `--out`. With `--results`, the table
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

COLOURS = {"tree": "#4477aa", "lock": "#ee6677", "one state": "#228833"}
LEAKS = ("#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
KEPT = (
    "cell",
    "kind",
    "c",
    "way_back",
    "horizon",
    "kappa",
    "lemma1",
    "c_inf",
    "corollary6",
    "closed",
    "solved",
    "slope",
)


def extract(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is drawn of every problem, to six digits."""
    return [rounded({key: cell[key] for key in KEPT}, 6) for cell in cells]


def draw(rows: list[dict[str, Any]]) -> Figure:
    """The figure; every plotted number comes from ``rows``."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
    steps = [row for row in rows if row["kind"] != "leaky lock"]
    chi_squares = list(dict.fromkeys(row["c"] for row in steps))
    _growth(axes[0], steps, chi_squares)
    _slack(axes[1], [row for row in steps if row["c"] == min(chi_squares)])
    _leaks(axes[2], [row for row in rows if row["kind"] == "leaky lock"])
    return figure


def _growth(axis: Axes, rows: list[dict[str, Any]], chi_squares: list[float]) -> None:
    for row in rows:
        style = "-" if row["c"] == chi_squares[0] else "--"
        width = 5 if row["kind"] == "tree" else 1.6  # the lock lies on the tree
        alpha = 0.35 if row["kind"] == "tree" else 1.0
        label = f"{row['kind']}, c = {row['c']:g}"
        axis.semilogy(
            row["horizon"], row["kappa"], style, color=COLOURS[row["kind"]], lw=width, alpha=alpha, label=label
        )
        for key, marker, size in (("closed", ".", 5), ("solved", "x", 6)):
            points = [(h, value) for h, value in zip(row["horizon"], row[key], strict=True) if value is not None]
            axis.semilogy(*zip(*points, strict=True), marker, color=COLOURS[row["kind"]], ms=size)
    axis.plot([], [], "k.", label="computed: closed form I12")
    axis.plot([], [], "kx", label="computed: linear solve")
    axis.set(xlabel="horizon H", ylabel="κ(π, μ)", title="(a) κ = (1+c)^H on trees and locks, 1 + Hc on one state")
    axis.legend(fontsize=7)


def _slack(axis: Axes, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        for key, style, name in (("lemma1", "-", "Lemma 1"), ("corollary6", "--", "H·C_∞ (Cor. 6)")):
            ratio = [bound / kappa for bound, kappa in zip(row[key], row["kappa"], strict=True)]
            wide = {"lw": 5, "alpha": 0.35} if row["kind"] == "tree" else {}  # the lock lies on the tree
            axis.semilogy(
                row["horizon"], ratio, style, color=COLOURS[row["kind"]], label=f"{row['kind']}, {name}", **wide
            )
    title = f"(b) how far the bounds are above κ, c = {rows[0]['c']:g}"
    axis.set(xlabel="horizon H", ylabel="bound / κ", title=title)
    axis.legend(fontsize=7)


def _leaks(axis: Axes, rows: list[dict[str, Any]]) -> None:
    horizon = rows[0]["horizon"]
    axis.loglog(
        horizon, [(1 + rows[0]["c"]) ** h for h in horizon], ":", color=COLOURS["lock"], label="no way back: (1+c)^H"
    )
    for row, colour in zip(rows, LEAKS, strict=False):
        label = f"way back {row['way_back']:g}: slope {row['slope']:.2f}"
        axis.loglog(row["horizon"], row["kappa"], color=colour, label=label)
    axis.loglog(
        horizon, [1 + rows[0]["c"] * h for h in horizon], ":", color=COLOURS["one state"], label="one state: 1 + Hc"
    )
    axis.set(xlabel="horizon H", ylabel="κ(π, μ)", ylim=(1.5, 10 * max(max(row["kappa"]) for row in rows)))
    axis.set_title(f"(c) locks with a way back, c = {rows[0]['c']:g}")
    axis.legend(fontsize=7)


def main(options: Options) -> int:
    return write_figure("coverage_horizon", options, extract, draw)


if __name__ == "__main__":
    sys.exit(run_program("fig_coverage_horizon", lambda: main(tyro.cli(Options, description=__doc__))))
