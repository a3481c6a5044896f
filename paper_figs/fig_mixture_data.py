"""Data that mix policies from episode to episode (X1): four panels from one table.

Reads the table `mixture_data.json` in `--data`; writes `mixture_data.pdf` and `.png` to `--out`. With `--results`, the table is first
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
from tbrm_theory.statistics import binomial_interval

ZERO_FLIP, FLOOR, CEILING = 2.0**-22, 1e-34, 1e9
"""Where a flip probability of 0, an exact zero and an infinity are drawn."""


def extract(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every number of every row, to five digits; of several starts the largest, of data sets the mean; of the rest the lists."""

    def one(key: str, value: Any) -> Any:
        if key == "noisy_regret":
            return sum(value) / len(value)
        return max(value) if key in ("loss", "regret", "brm_loss", "brm_regret", "brm_at_tbrm") else value

    return [rounded({key: one(key, value) for key, value in cell.items() if key != "theta"}, 5) for cell in cells]


def draw(rows: list[dict[str, Any]]) -> Figure:
    """The figure; every plotted number comes from ``rows``."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 9), layout="constrained")
    flips = sorted((row for row in rows if row["kind"] == "flip"), key=lambda row: row["flip"])
    _kappa(axes[0, 0], flips)
    _regret(axes[0, 1], flips)
    _shares(axes[1, 0], [row for row in rows if row["kind"] == "share"])
    _random(axes[1, 1], [row for row in rows if row["kind"] == "random mixtures"])
    return figure


def shown(value: Any) -> float:
    """An infinity at the ceiling, a zero at the floor."""
    return CEILING if value == "inf" else max(float(value), FLOOR)


def _kappa(axis: Axes, rows: list[dict[str, Any]]) -> None:
    positive = [row for row in rows if row["flip"] > 0]
    x = [row["flip"] for row in positive]
    for key, style, colour, label in (
        ("kappa", "-", "#4477aa", "κ, exact: 1 + 1/(2p(1-p))"),
        ("kappa_solved", ".", "#4477aa", "κ, linear solve"),
        ("harmonic", "--", "#66ccee", "1/Σ(w_i/κ_i)"),
        ("corollary6", "-", "#ccbb44", "Cor. 6"),
        ("lemma1", "-", "#ee6677", "Lemma 1"),
    ):
        axis.loglog(x, [row[key] for row in positive], style, color=colour, label=label)
    for row in positive:
        if row["flip"] == 1 / 64:
            axis.annotate("2111/63", (row["flip"], row["kappa"]), textcoords="offset points", xytext=(6, 6))
    twin = axis.twinx()
    twin.semilogx(x, [row["bound_fails_by"] for row in positive], ":", color="#aa3377")
    twin.axhline(1, color="#aa3377", lw=0.5)
    twin.set_yscale("log")
    twin.set_ylabel("regret / (B5 with Lemma 1 for κ), largest found (dotted)", color="#aa3377")
    axis.set(xlabel="flip probability p (0: mixture, ½: Markov)", ylabel="coefficient")
    axis.set_title("(a) ½(0,0) + ½(1,1) with flips, π = (0,1)")
    axis.legend(fontsize=7, loc="upper right")


def _regret(axis: Axes, rows: list[dict[str, Any]]) -> None:
    x = [max(row["flip"], ZERO_FLIP) for row in rows]
    for key, marker, colour, label in (
        ("loss", "s", "#bbbbbb", "TBRM's loss at its minimiser"),
        ("regret", "o", "#4477aa", "regret, TBRM's minimiser"),
        ("brm_regret", "x", "#228833", "regret, BRM, also started there"),
        ("noisy_regret", "^", "#ee6677", "mean regret, TBRM, 1,000 noisy episodes"),
    ):
        axis.loglog(x, [shown(row[key]) for row in rows], marker, color=colour, ms=4, ls="-", lw=0.6, label=label)
    axis.annotate("p = 0", (ZERO_FLIP, shown(rows[0]["regret"])), textcoords="offset points", xytext=(8, -3))
    axis.set(xlabel="flip probability p (leftmost point: 0)", ylabel="value", ylim=(FLOOR / 3, 30))
    axis.set_title("(b) wrong at zero loss at p = 0 only")
    axis.legend(fontsize=7, loc="center right")


def _shares(axis: Axes, rows: list[dict[str, Any]]) -> None:
    for components, colour in (("deterministic", "#ee6677"), ("opposed", "#4477aa")):
        mine = [row for row in rows if row["components"] == components]
        for seed in sorted({row["seed"] for row in mine}):
            curve = [row for row in mine if row["seed"] == seed]
            x = [row["share"] for row in curve]
            note = " (∞ at 1)" if components == "deterministic" else ""
            label = f"κ/Lemma 1, {components}{note}" if seed == min(row["seed"] for row in mine) else None
            ratio = [np.nan if row["kappa"] == "inf" else row["kappa"] / row["lemma1"] for row in curve]
            axis.semilogy(x, ratio, "o-", color=colour, ms=4, label=label)
            relative = [row["noisy_regret"] / curve[0]["noisy_regret"] for row in curve]
            axis.semilogy(x, relative, "^:", color=colour, ms=3, lw=0.8)
    axis.plot([], [], "k^:", ms=3, label="mean noisy regret / that at share 0")
    axis.axhline(1, color="black", lw=0.5)
    axis.set(xlabel="share of episodes from the mixture", ylabel="ratio")
    axis.set_title("(c) same occupancies: Lemma 1 stays, κ does not")
    axis.legend(fontsize=7)


def _random(axis: Axes, rows: list[dict[str, Any]]) -> None:
    names = [row["cell"] for row in rows]
    for offset, key, colour, label in (
        (-0.2, "lemma1_fails", "#ee6677", "κ > Lemma 1"),
        (0.2, "corollary6_fails", "#ccbb44", "κ > Cor. 6"),
    ):
        shares = [row[key] / row["mixtures"] for row in rows]
        intervals = [binomial_interval(row[key], row["mixtures"]) for row in rows]
        below = [max(share - low, 0.0) for share, (low, _) in zip(shares, intervals, strict=True)]
        above = [max(high - share, 0.0) for share, (_, high) in zip(shares, intervals, strict=True)]
        position = np.arange(len(rows)) + offset
        axis.barh(position, shares, 0.4, color=colour, xerr=[below, above], label=label, error_kw={"lw": 0.8})
    axis.set_yticks(range(len(rows)), names, fontsize=7)
    axis.invert_yaxis()
    axis.set(xlabel="share of random mixtures", title="(d) random mixtures: where the bounds fail", xlim=(0, 1))
    axis.legend(fontsize=7)


def main(options: Options) -> int:
    return write_figure("mixture_data", options, extract, draw)


if __name__ == "__main__":
    sys.exit(run_program("fig_mixture_data", lambda: main(tyro.cli(Options, description=__doc__))))
