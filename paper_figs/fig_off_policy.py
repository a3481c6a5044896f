"""How far from the optimum the data may be: policy, age and reuse, number, truthfulness; four panels from one table.

Reads the table `off_policy.json` in `--data`; writes `off_policy.pdf` and `.png` to `--out`. With `--results`, the table is first
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

COLOURS = {"token-tree": "#4477aa", "deterministic-dag": "#228833", "combination-lock": "#ee6677"}
DATA_COLOURS = {"best": "#228833", "half optimum": "#4477aa", "reference": "black", "anti-optimum": "#ee6677"}
REUSE_COLOURS = ("#bbbbbb", "#ccbb44", "#228833", "#4477aa", "#aa3377", "#ee6677")
FLOOR = 1e-16
SHOWN = "token-tree"
"""The problem of panels (b) and (c)."""
Row = dict[str, Any]


def extract(cells: list[Row]) -> list[Row]:
    """What is drawn, and of the problems that are not, what is said of them; to five digits."""
    rows = []
    for cell in cells:
        part, shown = cell["cell"].partition("/")[0], cell["family"] == SHOWN
        row = {key: cell[key] for key in ("cell", "family")}
        if part == "mixing":
            last = max(cell["regret"], key=int)
            row |= {"updates": int(last), "distance": cell["distance"], "start": cell["start"]}
            row |= {"regret": cell["regret"][last], "certificate": cell["certificate"][last]}
        elif part == "replay":
            keys = ("reuse", "ages", "reached", *(("samples", "regret", "certificate") if shown else ()))
            row |= {key: cell[key] for key in keys}
        elif part == "samples" and (shown or cell["noise"] > 0):
            drawn = ("sizes", "mean", "error", "constant", "theorem2", "fast")
            row |= {key: cell[key] for key in ("data", "noise", "slope", *(drawn if shown else ()))}
            row["over_constant"] = _over_constant(cell)
        elif part == "verifier":
            row["reports"] = cell["reports"]
        else:
            continue
        rows.append(rounded(row, 5))
    return rows


def _over_constant(cell: Row) -> list[float] | None:
    """``N · mean regret`` at the largest ``N`` over the constant, and its standard error; as in the run's summary."""
    if cell["noise"] == 0 or cell["identified"][-1] < cell["data_sets"]:
        return None
    return [cell["sizes"][-1] * cell[key][-1] / cell["constant"] for key in ("mean", "error")]


def draw(rows: list[Row]) -> Figure:
    """The figure; every plotted number comes from ``rows``."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        part = row["cell"].partition("/")[0]
        if part in ("mixing", "verifier") or row["family"] == SHOWN:
            parts.setdefault(part, []).append(row)
    figure, axes = plt.subplots(2, 2, figsize=(13, 9.5), layout="constrained")
    _mixing(axes[0, 0], parts["mixing"])
    _replay(axes[0, 1], parts["replay"])
    _samples(axes[1, 0], parts["samples"])
    _verifier(axes[1, 1], parts["verifier"])
    return figure


def _mixing(axis: Axes, rows: list[Row]) -> None:
    for row in rows:
        colour, start = COLOURS[row["family"]], row["start"]
        low, middle, high = (
            [max(value / start, FLOOR) for value in column] for column in zip(*row["regret"], strict=True)
        )
        axis.plot(row["distance"], middle, "o-", color=colour, ms=3, label=row["family"])
        axis.fill_between(row["distance"], low, high, color=colour, alpha=0.2, lw=0)
        certificate = [max(float(value) / start, FLOOR) for value in row["certificate"]]
        axis.plot(row["distance"], certificate, ":", color=colour, lw=1.2)
    axis.plot([], [], ":", color="black", label="certificate B5")
    axis.set(yscale="log", ylabel="regret / regret of the start")
    axis.set_xlabel("data: anti-optimum (-1) … reference (0) … optimum (1), mixed in every step")
    axis.set_title(f"(a) after {rows[0]['updates']} updates on the exact loss")
    axis.legend(fontsize=8)


def _replay(axis: Axes, rows: list[Row]) -> None:
    for row, colour in zip(rows, REUSE_COLOURS, strict=False):
        for index, style in ((0, "--"), (-1, "-")):
            regret = [max(value, FLOOR) for value in row["regret"][index]]
            axis.plot(row["samples"], regret, style, color=colour, lw=1.4)
        certificate = max(float(row["certificate"][-1]), FLOOR)
        axis.plot(row["samples"][-1], certificate, "v", color=colour, ms=6, clip_on=False)
        axis.plot([], [], color=colour, label=f"K = {row['reuse']}")
    ages = rows[0]["ages"]
    axis.plot([], [], color="black", label=f"buffer of {ages[-1]} batches")
    axis.plot([], [], "--", color="black", label=f"of {ages[0]}")
    axis.plot([], [], "v", color="black", label=f"certificate at the end, {ages[-1]} batches")
    axis.set(yscale="log", xlabel="fresh trajectories", ylabel="median regret")
    axis.set_title(f"(b) K updates for each fresh batch, {SHOWN}")
    axis.legend(fontsize=8)


def _samples(axis: Axes, rows: list[Row]) -> None:
    for row in rows:
        colour, sizes = DATA_COLOURS[row["data"]], row["sizes"]
        if row["noise"] > 0:
            axis.errorbar(sizes, row["mean"], yerr=row["error"], fmt="o", color=colour, ms=4, label=row["data"])
            axis.plot(sizes, [row["constant"] / size for size in sizes], color=colour, lw=1)
        else:
            axis.plot(sizes, [max(value, FLOOR) for value in row["mean"]], "x--", color=colour, ms=4, lw=0.8)
        if row["noise"] > 0 and row["data"] == "reference":
            axis.plot(sizes, row["fast"], "-.", color="grey", label="B6 in B7, reference")
            axis.plot(sizes, row["theorem2"], ":", color="grey", label="B6 in Theorem 2, reference")
    axis.plot([], [], color="black", lw=1, label="constant of O6 over N")
    axis.plot([], [], "x--", color="black", lw=0.8, label="without noise")
    axis.set(xscale="log", yscale="log", xlabel="trajectories N", ylabel="mean regret of the empirical minimiser")
    axis.set_title(f"(c) noisy returns: 1/N; exact ones: exact once identified, {SHOWN}")
    axis.legend(fontsize=8, loc=(0.52, 0.08))


def _verifier(axis: Axes, rows: list[Row]) -> None:
    for row in rows:
        colour = COLOURS[row["family"]]
        total = [report["a"] + report["b"] for report in row["reports"]]
        for key, mark, name in (
            ("regret", "o", "regret"),
            ("certificate", "_", "B5"),
            ("centred", "x", "B5, f centred"),
        ):
            values = [max(float(report[key]), FLOOR) for report in row["reports"]]
            axis.plot(
                total, values, mark, color=colour, ms=5 if key == "regret" else 7, label=f"{row['family']}: {name}"
            )
    axis.axvline(1, color="grey", lw=0.8)
    axis.set(
        yscale="log", ylim=(1e-4, None), xlabel="a + b, wrong 0s and wrong 1s of the verifier", ylabel="reward units"
    )
    axis.set_title("(d) the exact minimiser: regret is a function of a + b, 0 at 0")
    axis.legend(fontsize=8, loc="lower right")


def main(options: Options) -> int:
    return write_figure("off_policy", options, extract, draw)


if __name__ == "__main__":
    sys.exit(run_program("fig_off_policy", lambda: main(tyro.cli(Options, description=__doc__))))
