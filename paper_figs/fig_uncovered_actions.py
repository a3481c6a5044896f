"""Data that omit actions, or hardly ever take them (X3): three panels from one table.

Reads the table `uncovered_actions.json` in `--data`; writes `uncovered_actions.pdf` and `.png` to `--out`. With `--results`, the table
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
COLOURS = {"worse": "#4477aa", "between": "#ccbb44", "better": "#ee6677"}


def extract(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every number of every row, to five digits; of several starts the largest, of data sets the mean."""

    def one(key: str, value: Any) -> Any:
        if key == "regret_of_samples":
            return sum(value) / len(value)
        return max(value) if isinstance(value, list) else value

    return [rounded({key: one(key, value) for key, value in cell.items()}, 5) for cell in cells]


def draw(rows: list[dict[str, Any]]) -> Figure:
    """The figure; every plotted number comes from ``rows``."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    _holes(axes[0], [row for row in rows if row["kind"] == "holes"])
    _weights(axes[1], [row for row in rows if row["kind"] == "weights"])
    _masses(axes[2], [row for row in rows if row["kind"] == "masses" and row["mass"] > 0])
    return figure


def _holes(axis: Axes, rows: list[dict[str, Any]]) -> None:
    families = list(dict.fromkeys(row["cell"].partition(" seed")[0] for row in rows))
    place = [families.index(row["cell"].partition(" seed")[0]) for row in rows]
    seeds = [int(row["cell"].rpartition(" ")[2]) for row in rows]
    x = [at + 0.2 * (seed - min(seeds)) - 0.2 for at, seed in zip(place, seeds, strict=True)]
    for key, marker, colour, label in (
        ("regret", "o", "#ee6677", "TBRM, zero loss, worst of random starts"),
        ("covered_regret", "_", "black", "best policy within the data"),
        ("reference_regret", "x", "#4477aa", "π_ref"),
    ):
        axis.semilogy(x, [row[key] for row in rows], marker, color=colour, ms=8, label=label)
    axis.set_xticks(range(len(families)), families, fontsize=7, rotation=12)
    axis.set(ylabel="exact regret", title=f"(a) κ = ∞: wrong at loss ≤ {max(row['loss'] for row in rows):.0e}")
    axis.legend(fontsize=7, loc="lower left")


def _weights(axis: Axes, rows: list[dict[str, Any]]) -> None:
    for reward, colour in COLOURS.items():
        mine = [row for row in rows if row["reward"] == reward]
        x = [row["reference_weight"] for row in mine]
        axis.loglog(x, [row["supremum"] for row in mine], ":", color=colour, lw=1)
        axis.loglog(x, [row["regret_random"] for row in mine], "--", color=colour, lw=1)
        axis.loglog(
            x, [row["regret_from_reference"] for row in mine], "o-", color=colour, ms=4, label=f"omitted one {reward}"
        )
        axis.loglog(x, [row["covered_regret"] for row in mine], "_", color=colour, ms=12)
    for style, name in (
        ("ko-", "TBRM from π_ref"),
        ("k--", "TBRM, worst of random starts"),
        ("k:", "supremum at zero loss"),
        ("k_", "best policy within the data"),
    ):
        axis.loglog([], [], style, ms=6, lw=1, label=name)
    axis.set(xlabel="share of the omitted action under π_ref", ylabel="exact regret")
    axis.set_title("(b) κ = ∞ throughout, the regret is not")
    axis.legend(fontsize=7, loc="lower right")


def _masses(axis: Axes, rows: list[dict[str, Any]]) -> None:
    x = [row["mass"] for row in rows]
    for key, colour, style, label in (
        ("kappa", "#4477aa", "o-", "κ(π*, μ)"),
        ("condition", "#66ccee", "s--", "condition number of M"),
        ("scaled_condition", "#228833", "-", "the same, scaled to unit diagonal"),
        ("fixed_error_bound", "#aa3377", "o-", "B5's right side at an error ½"),
        ("fixed_error_regret", "#aa3377", ":", "regret at that error"),
        ("regret_of_samples", "#ccbb44", "^-", "regret after 1,000 episodes"),
        ("regret", "black", "x-", "regret, Levenberg–Marquardt"),
        ("regret_lbfgs", "#ee6677", "x-", "regret, 300 L-BFGS steps"),
    ):
        axis.loglog(x, [max(row[key], FLOOR) for row in rows], style, color=colour, ms=4, lw=1.2, label=label)
    axis.invert_xaxis()
    axis.set(xlabel="μ(action) = m", ylabel="value", title="(c) an action that becomes rare")
    axis.legend(fontsize=7, loc="center right", bbox_to_anchor=(1.0, 0.38))


def main(options: Options) -> int:
    return write_figure("uncovered_actions", options, extract, draw)


if __name__ == "__main__":
    sys.exit(run_program("fig_uncovered_actions", lambda: main(tyro.cli(Options, description=__doc__))))
