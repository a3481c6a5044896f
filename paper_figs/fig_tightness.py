"""How close an adversarial search comes to equality in each inequality, and by how much it refutes the false ones: two panels.

Reads the table `tightness.json` in `--data`; writes `tightness.pdf` and `.png` to `--out`. With `--results`, the table is first
extracted from that run of experiments/tightness.py, and its worst instances are copied to `worst/` in `--data`. Runs no search.
"""

from __future__ import annotations

import shutil
import sys
from typing import Any

import matplotlib.pyplot as plt
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from table_figure import Options, write_figure

from tbrm_theory.json_fields import read_json
from tbrm_theory.program import run_program

FLOOR = 1e-11
"""Where equality is drawn."""
CEILING = 1e7
"""Where an infinite ratio is drawn."""
COLOURS = {1: "#4477aa", 2: "#ee6677", 3: "#228833", 4: "#ccbb44", 5: "#aa3377"}
"""By horizon."""
LIMITS = {"B5.a": 0.949999998, "B5.b": 0.975}
"""What a bandit attains at max|f| = 20 in the limit."""


def extract(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best row of every claim and horizon, without its instance."""
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for row in (row for cell in cells for row in cell["rows"]):
        key = (row["claim"], row["horizon"])
        if key not in best or rank(row) > rank(best[key]):
            best[key] = row
    return [{key: value for key, value in row.items() if key != "instance"} for row in best.values()]


def rank(row: dict[str, Any]) -> tuple[bool, float]:
    return row["violated"], float(row["best_ratio"])


def draw(rows: list[dict[str, Any]]) -> Figure:
    """The figure; every plotted number comes from ``rows``."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    _gaps(axes[0], [row for row in rows if row["expected_to_hold"]])
    _excesses(axes[1], [row for row in rows if not row["expected_to_hold"]])
    return figure


def _gaps(axis: Axes, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(row["claim"] for row in rows))
    for horizon, colour in COLOURS.items():
        mine = [row for row in rows if row["horizon"] == horizon]
        y = [names.index(row["claim"]) + 0.12 * (horizon - 3) for row in mine]
        x = [max(1 - float(row["best_ratio"]), FLOOR) for row in mine]
        axis.semilogx(x, y, "o", color=colour, ms=6, label=f"H = {horizon}")
    for i, (claim, limit) in enumerate(LIMITS.items()):
        if claim in names:
            place = names.index(claim)
            label = "a bandit's limit, max|f| = 20" if i == 0 else None
            axis.plot([1 - limit] * 2, [place - 0.4, place + 0.1], color="black", lw=1, label=label)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlim(FLOOR / 3, 0.3)
    axis.set(xlabel="1 - left/right of the worst instance found", title="(a) true: how far from equality")
    axis.text(FLOOR, 1.01, "equality", fontsize=7, ha="center", va="bottom", transform=axis.get_xaxis_transform())
    axis.grid(axis="x", lw=0.3)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(0.02, 0.35))


def _excesses(axis: Axes, rows: list[dict[str, Any]]) -> None:
    for place, row in enumerate(rows):
        ratio = float(row["best_ratio"])
        axis.semilogx([min(ratio, CEILING)], [place], "o" if ratio < CEILING else ">", color="#ee6677", ms=7)
        shown = "infinite" if ratio == float("inf") else f"{ratio:.3g}"
        right = ratio < 1e5
        axis.annotate(
            shown, (min(ratio, CEILING), place), xytext=(9 if right else -9, 0), textcoords="offset points",
            fontsize=8, va="center", ha="left" if right else "right",
        )  # fmt: skip
    axis.axvline(1, color="black", ls="--", lw=1)
    axis.set_yticks(range(len(rows)), [row["claim"] for row in rows])
    axis.invert_yaxis()
    axis.set_xlim(0.5, 3 * CEILING)
    axis.set(xlabel="left/right of the worst instance found", title="(b) false: refuted beyond the dashed line")
    axis.grid(axis="x", lw=0.3)


def main(options: Options) -> int:
    status = write_figure("tightness", options, extract, draw)
    if options.results is not None:
        instances = options.data / "worst"
        instances.mkdir(exist_ok=True)
        for row in read_json(options.data / "tightness.json").value:
            shutil.copy(options.results / "worst" / f"{row['claim']}-{row['horizon']}.json", instances)
    return status


if __name__ == "__main__":
    sys.exit(run_program("fig_tightness", lambda: main(tyro.cli(Options, description=__doc__))))
