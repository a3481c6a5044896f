"""Transition noise biases TBRM, and a control variate takes the bias away: four panels from one table.

Reads the table `transition_noise.json` in `--data`; writes `transition_noise.pdf` and `.png` to `--out`. With `--results`, the table
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

FLOOR = 1e-16
"""Where a regret that is 0 up to rounding is drawn."""
COLOURS = {
    "chain": "#4477aa",
    "combination-lock": "#ee6677",
    "deterministic-dag": "#228833",
    "token-tree": "#ccbb44",
}
METHODS = {
    "tbrm": ("TBRM", "#4477aa", "-o"),
    "brm": ("BRM, sampled residual", "#ee6677", "-s"),
    "learned": ("TBRM, control variate, learned kernel", "#ccbb44", "-^"),
    "corrected": ("TBRM, control variate = two fresh samples", "#228833", "-v"),
}


def extract(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is drawn of every cell, to four digits."""
    kept = ("family", "noise", "regret", "loss", "noise_floor", "worst_luck", "reference_regret")
    return [rounded({key: cell[key] for key in kept}, 4) for cell in cells]


def draw(rows: list[dict[str, Any]]) -> Figure:
    """The figure; every plotted number comes from ``rows``."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    _regrets(axes[0, 0], rows)
    _floors(axes[0, 1], rows)
    _methods(axes[1, 0], [row for row in rows if row["family"] == "combination-lock"] or rows)
    _saddles(axes[1, 1], rows)
    return figure


def _by_family(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    noisy = [row for row in rows if row["noise"] > 0]
    return {name: [row for row in noisy if row["family"] == name] for name in dict.fromkeys(r["family"] for r in noisy)}


def _regrets(axis: Axes, rows: list[dict[str, Any]]) -> None:
    for family, mine in _by_family(rows).items():
        noise = [row["noise"] for row in mine]
        axis.loglog(noise, [row["regret"]["tbrm"] for row in mine], "-o", ms=3, color=COLOURS[family], label=family)
    ends = [1e-5, 1e-2]
    axis.loglog(ends, [50 * x**2 for x in ends], "k--", lw=1, label="slope 2")
    axis.set(xlabel="transition noise ε", ylabel="exact regret of TBRM's minimiser")
    axis.set_title("(a) exact at ε = 0, regret of order ε²")
    axis.legend(fontsize=8)


def _floors(axis: Axes, rows: list[dict[str, Any]]) -> None:
    for family, mine in _by_family(rows).items():
        noise = [row["noise"] for row in mine]
        axis.loglog(noise, [row["noise_floor"] for row in mine], ":", color=COLOURS[family])
        axis.loglog(noise, [row["loss"]["tbrm"] for row in mine], "-o", ms=3, color=COLOURS[family], label=family)
    axis.plot([], [], "k:", label="noise floor L(θ*) (I7)")
    axis.set(xlabel="transition noise ε", ylabel="population loss")
    axis.set_title("(b) the minimum lies below the loss of the optimum")
    axis.legend(fontsize=8)


def _methods(axis: Axes, rows: list[dict[str, Any]]) -> None:
    noisy = [row for row in rows if row["noise"] > 0]
    for name, (label, colour, style) in METHODS.items():
        regret = [max(row["regret"][name], FLOOR) for row in noisy]
        axis.loglog([row["noise"] for row in noisy], regret, style, ms=3, color=colour, label=label)
    reference = [row["reference_regret"] for row in noisy]
    axis.loglog([row["noise"] for row in noisy], reference, "k:", lw=1, label="reference policy")
    axis.set(xlabel="transition noise ε", ylabel="exact regret (0 drawn at 1e-16)")
    axis.set_title("(c) four losses on the combination lock, uniform data")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(0.0, 0.3))


def _saddles(axis: Axes, rows: list[dict[str, Any]]) -> None:
    for family, mine in _by_family(rows).items():
        luck = [row["worst_luck"] for row in mine]
        regret = [max(row["regret"]["optimal data"], FLOOR) for row in mine]
        axis.semilogy(luck, regret, "o", ms=4, color=COLOURS[family], alpha=0.8, label=family)
    axis.axvline(1.0, color="black", ls="--", lw=1, label="X2.b: from here on a saddle")
    axis.set(xlabel="mean bad luck before a state, worst state (units of β)", ylabel="exact regret (0 drawn at 1e-16)")
    axis.set_title("(d) TBRM on the optimum's own data, started beside it")
    axis.legend(fontsize=8, loc="center right")


def main(options: Options) -> int:
    return write_figure("transition_noise", options, extract, draw)


if __name__ == "__main__":
    sys.exit(run_program("fig_transition_noise", lambda: main(tyro.cli(Options, description=__doc__))))
