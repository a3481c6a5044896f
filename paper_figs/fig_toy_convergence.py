"""TBRM reaches the exact optimum off-policy, and fails where the theory says so: four panels from one table.

Reads the table `toy_convergence.json` in `--data`; writes `toy_convergence.pdf` and `.png` to `--out`. With `--results`, the table is
first extracted from that run's `metrics.jsonl`. Runs no experiment.
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

FLOOR = 1e-34
"""Where an exact zero is drawn."""

COLOURS = {
    "positive": "#4477aa",
    "slow positive": "#66ccee",
    "unidentifying mixture": "#ee6677",
    "uncovered actions": "#aa3377",
    "stochastic transitions": "#ccbb44",
}
MODES = {
    ("population", "tbrm"): ("TBRM, population", "#4477aa"),
    ("population", "brm"): ("BRM, population", "#ee6677"),
    ("offline", "tbrm"): ("TBRM, 4,096 offline", "#228833"),
    ("online", "tbrm"): ("TBRM, online", "#ccbb44"),
    ("replay", "tbrm"): ("TBRM, replay", "#aa3377"),
}


def extract(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The part of every cell that is drawn: median, least and largest regret over seeds, last loss, noise floor."""
    rows = []
    for cell in cells:
        regrets = np.array(cell["regret_curve"])
        kept = {key: cell[key] for key in ("cell", "kind", "family", "behaviour", "mode", "loss", "step", "verdict")}
        over_seeds = {
            name: summary(regrets, axis=1).tolist()
            for name, summary in (("median", np.median), ("least", np.min), ("largest", np.max))
        }
        ends = rounded({"regret": over_seeds, "final_loss": max(cell["loss_curve"][-1])}, 4)
        rows.append(kept | ends | {"noise_floor": cell.get("noise_floor")})
    return rows


def draw(rows: list[dict[str, Any]]) -> Figure:
    """The figure; every plotted number comes from ``rows``."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    curves = [row for row in rows if row["kind"] == "curve"]
    _second_order(axes[0, 0], [row for row in rows if row["kind"] == "positive" and row["mode"] == "population"])
    _plane(axes[0, 1], [row for row in rows if row["kind"] != "curve"])
    families = sorted({row["family"] for row in curves})
    for axis, letter, family in zip(axes[1], "cd", families[-2:], strict=False):
        _curves(axis, f"({letter}) {family}", [row for row in curves if row["family"] == family])
    return figure


def _second_order(axis: Axes, rows: list[dict[str, Any]]) -> None:
    families = sorted({row["family"] for row in rows})
    palette = dict(zip(families, plt.get_cmap("tab20").colors, strict=False))  # type: ignore[attr-defined]
    seen = set()
    for row in rows:
        label = row["family"] if row["family"] not in seen else None
        seen.add(row["family"])
        largest = np.maximum(row["regret"]["largest"], FLOOR)
        axis.semilogy(row["step"], largest, color=palette[row["family"]], lw=1, alpha=0.8, label=label)
    axis.axhline(1e-10, color="black", ls="--", lw=1)
    axis.set(xlabel="Levenberg–Marquardt step, in I14's coordinates", ylabel="exact regret (largest seed)")
    axis.set_title(f"(a) {len(rows)} deterministic problems × full-support Markov data")
    axis.legend(fontsize=6.5, ncol=2, loc="upper right")


def _plane(axis: Axes, rows: list[dict[str, Any]]) -> None:
    for kind, colour in COLOURS.items():
        mine = [row for row in rows if row["kind"] == kind]
        x = [max(row["final_loss"], FLOOR) for row in mine]
        y = [max(row["regret"]["largest"][-1], FLOOR) for row in mine]
        axis.loglog(x, y, "o", color=colour, ms=5, alpha=0.8, label=kind)
    floors = [row["noise_floor"] for row in rows if row["kind"] == "stochastic transitions"]
    for i, floor in enumerate(floors):
        label = "L(θ*), the noise floor (I7)" if i == 0 else None
        axis.axvline(floor, color=COLOURS["stochastic transitions"], ls=":", lw=1, label=label)
    axis.axhline(1e-10, color="black", ls="--", lw=1)
    axis.set(xlabel="final loss", ylabel="final regret (largest seed)")
    axis.set_title("(b) zero loss, zero regret? Only if the data identify it")
    axis.legend(fontsize=7, loc="center right")


def _curves(axis: Axes, title: str, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        label, colour = MODES[row["mode"], row["loss"]]
        regret = {name: np.maximum(values, FLOOR) for name, values in row["regret"].items()}
        axis.semilogy(row["step"], regret["median"], color=colour, label=label)
        axis.fill_between(row["step"], regret["least"], regret["largest"], color=colour, alpha=0.2, lw=0)
    axis.set(xlabel="Adam step", ylabel="exact regret (median, range of seeds)", title=title)
    axis.legend(fontsize=7)


def main(options: Options) -> int:
    return write_figure("toy_convergence", options, extract, draw)


if __name__ == "__main__":
    sys.exit(run_program("fig_toy_convergence", lambda: main(tyro.cli(Options, description=__doc__))))
