"""The family trained on-policy on six problems: regret against samples for n = 1 and n = 4, and where every method ends.

Reads the table `family.json` in `--data`; writes `family.pdf` and `.png` to `--out`. With `--results`, the table is first extracted
from that run's `metrics.jsonl`. Runs no experiment.
"""

from __future__ import annotations

import sys
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from table_figure import Options, rounded, write_figure

from tbrm_theory.aggregates import interquartile_mean, stratified_interval
from tbrm_theory.program import run_program

STYLES = {
    "tbrm": ("TBRM = ReVal = Algorithm 1", "#4477aa", "-"),
    "brm": ("BRM", "#66ccee", "-"),
    "trajectory-balance": ("TB = DRO", "#228833", "-"),
    "pcl-multi-step": ("PCL, multi-step", "#228833", ":"),
    "vargrad": ("VarGrad = RLOO = pair-wise", "#ccbb44", "-"),
    "a-star-po": ("A*-PO", "#ee8866", "-"),
    "reinforce": ("REINFORCE", "#aa3377", ":"),
    "ppo": ("PPO", "#ee6677", "-"),
    "grpo": ("GRPO", "#aa3377", "-"),
}
"""The methods that have a colour; the others are thin and grey."""
LOWEST = 1e-6
"""Shares below are drawn there: 1e-4 %."""


def extract(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every curve, and the aggregate of each method over all problems."""
    runs = [cell for cell in cells if cell["cell"].startswith("tuned/")]
    rows = []
    for run in runs:
        kept = {key: run[key] for key in ("problem", "n", "method", "coefficient", "winner", "at_edge")}
        kept |= {key: run[key] for key in ("samples_to_one_percent", "updates", "samples", "share")}
        rows.append(rounded(kept | {"interval": [run["low"][-1], run["high"][-1]]}, 3))
    for n, method in dict.fromkeys((run["n"], run["method"]) for run in runs):
        finals = np.array([run["finals"] for run in runs if (run["n"], run["method"]) == (n, method)])
        low, high = stratified_interval(finals, seed=0)
        middle = float(interquartile_mean(finals))
        summary = {"problem": "all", "n": n, "method": method, "share": [middle], "interval": [float(low), float(high)]}
        rows.append(rounded(summary, 3))
    return rows


def draw(rows: list[dict[str, Any]]) -> Figure:
    """The figure; every plotted number comes from ``rows``."""
    sizes = sorted({row["n"] for row in rows})
    problems = list(dict.fromkeys(row["problem"] for row in rows if row["problem"] != "all"))
    figure = plt.figure(figsize=(3.3 * len(problems), 3.4 * len(sizes) + 7.5), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(3.4 * len(sizes), 7))
    upper, lower = halves
    axes = upper.subplots(len(sizes), len(problems), squeeze=False, sharey=True)
    for i, n in enumerate(sizes):
        for j, problem in enumerate(problems):
            _curves(axes[i, j], [row for row in rows if (row["n"], row["problem"]) == (n, problem)])
            axes[i, j].set_title(f"{problem}, n = {n}", fontsize=10)
        axes[i, 0].set_ylabel("regret / initial regret")
    handles = {line.get_label(): line for line in axes[-1, 0].get_lines() if not str(line.get_label()).startswith("_")}
    upper.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize=9)
    for n, axis in zip(sizes, lower.subplots(1, len(sizes), squeeze=False)[0], strict=True):
        _finals(axis, [row for row in rows if row["n"] == n], [*problems, "all"])
        axis.set_title(f"final regret, % of the initial one, n = {n}", fontsize=10)
    return figure


def _curves(axis: Axes, rows: list[dict[str, Any]]) -> None:
    for row in sorted(rows, key=lambda row: row["method"] in STYLES):
        label, colour, dashes = STYLES.get(row["method"], ("the other methods", "#bbbbbb", "-"))
        width = 1.6 if row["method"] in STYLES else 0.7
        shown = np.maximum(row["share"], LOWEST)
        axis.plot(row["samples"], shown, color=colour, ls=dashes, lw=width, label=label)
    axis.set(yscale="log", ylim=(LOWEST / 1.5, 2), xlabel="samples")
    axis.axhline(0.01, color="black", lw=0.6, ls=":")
    each = max((row["samples"][-1] - row["samples"][0]) / row["updates"][-1] for row in rows)
    second = axis.secondary_xaxis("top", functions=(lambda x: x / each, lambda x: x * each))
    second.set_xlabel("updates", fontsize=8)
    second.tick_params(labelsize=7)
    axis.tick_params(labelsize=8)


def _finals(axis: Axes, rows: list[dict[str, Any]], problems: list[str]) -> None:
    by_cell = {(row["method"], row["problem"]): row["share"][-1] for row in rows}
    methods = sorted({row["method"] for row in rows}, key=lambda method: by_cell[method, "all"])
    table = 100 * np.array([[by_cell[method, problem] for problem in problems] for method in methods])
    axis.imshow(np.maximum(table, 100 * LOWEST), norm=LogNorm(1e-3, 100), cmap="viridis_r", aspect="auto")
    best = table.min(0)
    for i, j in np.ndindex(table.shape):
        dark, bold = table[i, j] > 3, table[i, j] == best[j]
        style: dict[str, Any] = {
            "color": "white" if dark else "black",
            "fontsize": 8,
            "fontweight": "bold" if bold else "normal",
        }
        axis.text(j, i, f"{table[i, j]:.2g}", ha="center", va="center", **style)
    axis.set_xticks(range(len(problems)), [problem.replace("-", "\n") for problem in problems], fontsize=8)
    axis.set_yticks(range(len(methods)), methods, fontsize=8)


def main(options: Options) -> int:
    return write_figure("family", options, extract, draw)


if __name__ == "__main__":
    sys.exit(run_program("fig_family", lambda: main(tyro.cli(Options, description=__doc__))))
