"""TBRMTrainer brings a transformer to the exact optimum of its own token tree: one panel for each way to get data.

Reads the table `exact_cpu.json` in `--data`; writes `exact_cpu.pdf` and `.png` to `--out`. With `--results`, the table is first
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

BLUE, GREY = "#4477aa", "#888888"
PANELS = {
    "on-policy": ("(a) on-policy", "table, responses of its own"),
    "off-policy": ("(b) off-policy: the reference's responses", "table, the reference's exact law"),
    "replay": ("(c) replay, K = 2", "table, replay"),
}
TARGET = 0.02


def extract(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The exact regret of every run over that of the reference; the facts about the tree."""
    tree = next(cell for cell in cells if cell["cell"] == "tree")
    facts = ("cell", "vocabulary", "horizon", "prompts", "parameters", "pairs", "initial_regret", "optimum", "kappa")
    rows = [rounded({key: tree[key] for key in facts}, 5)]
    for cell in cells:
        if "regret" in cell:
            share = [regret / tree["initial_regret"] for regret in cell["regret"]]
            rows.append({"cell": cell["cell"], "step": cell["step"], "share": rounded(share, 4)})
    return rows


def draw(rows: list[dict[str, Any]]) -> Figure:
    """The figure; every plotted number comes from ``rows``."""
    by_cell = {row["cell"]: row for row in rows}
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), sharey=True, layout="constrained")
    for axis, (phase, (title, beside)) in zip(axes, PANELS.items(), strict=True):
        _panel(axis, title, by_cell[phase], by_cell[f"table/{phase}"], beside)
    axes[0].set_ylabel("exact regret, share of the reference's")
    tree = by_cell["tree"]
    figure.suptitle(
        f"Llama of {tree['parameters']:,} weights, TBRMTrainer, n = 1; {tree['prompts']} prompts, vocabulary"
        f" {tree['vocabulary']}, horizon {tree['horizon']}: a tree of {tree['pairs']:,} state-action pairs",
        fontsize=10,
    )
    return figure


def _panel(axis: Axes, title: str, row: dict[str, Any], table: dict[str, Any], beside: str) -> None:
    axis.semilogy(table["step"], table["share"], color=GREY, ls="--", marker="s", ms=3, label=beside)
    axis.semilogy(row["step"], row["share"], color=BLUE, marker="o", ms=3.5, label="transformer")
    axis.axhline(TARGET, color="black", ls=":", lw=1, label="2 %")
    last = row["share"][-1]
    axis.annotate(
        f"{last:.2%}", (row["step"][-1], last), textcoords="offset points", xytext=(4, -15), ha="right", fontsize=9
    )
    axis.set(xlabel="update", title=title)
    axis.legend(fontsize=8, loc="lower left")


def main(options: Options) -> int:
    return write_figure("exact_cpu", options, extract, draw)


if __name__ == "__main__":
    sys.exit(run_program("fig_exact_cpu", lambda: main(tyro.cli(Options, description=__doc__))))
