"""Where TBRM has local minima that are not global: against noise and reward, and against the number of shared parameters.

Reads the table `spurious_minima.json` in `--data`; writes `spurious_minima.pdf` and `.png` to `--out`. With `--results`, the table is
first extracted from that run's `metrics.jsonl`, and the instances that the run found are gathered in `spurious_minima_instances.json`
beside it. Runs no experiment.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tbrm_theory.statistics import binomial_interval

HERE = Path(__file__).parent
TRAJECTORIES = 9
"""Of the problems of the class map: residuals that parameters can move."""
LINES = {
    (True, "uniform"): ("realisable, uniform data", "#4477aa", "o"),
    (True, "uneven"): ("realisable, uneven data", "#66ccee", "s"),
    (False, "uniform"): ("not realisable, uniform data", "#ee6677", "^"),
    (False, "uneven"): ("not realisable, uneven data", "#aa3377", "v"),
}


@dataclass(frozen=True)
class Options:
    """Where to read and write."""

    results: Path | None = None
    """A run folder of experiments/spurious_minima.py, to extract the tables from."""
    data: Path = HERE / "data"
    out: Path = HERE / "out"


def extract(results: Path) -> list[dict[str, Any]]:
    """The rows of the run, rounded, with the 95 % interval of every share of problems."""
    rows = []
    for line in (results / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["map"] == "class":
            found = round(row["problems"] * row["problem_count"])
            row["interval"] = [round(end, 4) for end in binomial_interval(found, row["problem_count"])]
        rows.append({key: _rounded(value) for key, value in row.items()})
    return rows


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def instances(results: Path) -> list[dict[str, Any]]:
    """What the run saved, with its names."""
    paths = sorted((results / "instances").glob("*.json"))
    return [{"name": path.stem} | json.loads(path.read_text(encoding="utf-8")) for path in paths]


def draw(rows: list[dict[str, Any]]) -> Figure:
    """The figure; every plotted number comes from ``rows``."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    _noise(figure, axes[0, 0], [row for row in rows if row["map"] == "noise"])
    classes = [row for row in rows if row["map"] == "class"]
    titles = {"linear": "(b) linear in random features", "low-rank": "(c) low rank", "network": "(d) tanh network"}
    for axis, (kind, title) in zip(axes.flat[1:], titles.items(), strict=True):
        _classes(axis, title, [row for row in classes if row["kind"] == kind])
    return figure


def _noise(figure: Figure, axis: Axes, rows: list[dict[str, Any]]) -> None:
    share = np.array([row["share"] for row in rows])
    image = axis.pcolormesh(rows[0]["size"], [row["noise"] for row in rows], share, cmap="viridis", vmin=0, vmax=1)
    figure.colorbar(image, ax=axis, label="starts that end at the worse minimum")
    axis.plot(
        [1.5], [1.0], "*", color="white", ms=13, mec="black", clip_on=False, label="the instance of C3", ls="none"
    )
    axis.set(xlabel="reward size G", ylabel="transition noise (0: deterministic, 1: a coin)")
    axis.set_title("(a) free logits, stochastic transitions (C3)")
    axis.legend(loc="lower right", fontsize=8)


def _classes(axis: Axes, title: str, rows: list[dict[str, Any]]) -> None:
    for (realisable, data), (label, colour, marker) in LINES.items():
        mine = [row for row in rows if row["realisable"] == realisable and row["data"] == data]
        x = [row["parameters"] for row in mine]
        share = np.array([row["problems"] for row in mine])
        low, high = np.array([row["interval"] for row in mine]).T
        errors = np.stack([share - low, high - share]).clip(
            min=0
        )  # rounding may put an end on the wrong side of 0 or 1
        axis.errorbar(
            x, share, errors, color=colour, marker=marker, ms=5, lw=1.3, elinewidth=0.7, capsize=2, label=label
        )
    axis.axvline(TRAJECTORIES, color="black", ls=":", lw=1, label="as many parameters as trajectories")
    axis.set(xlabel="parameters D", ylabel="problems with a spurious minimum", ylim=(-0.03, 1.0), title=title)
    axis.legend(fontsize=8)


def main(options: Options) -> None:
    table = options.data / "spurious_minima.json"
    if options.results is not None:
        options.data.mkdir(parents=True, exist_ok=True)
        for path, rows in ((table, extract(options.results)), (_instances(options), instances(options.results))):
            lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
            path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    figure = draw(json.loads(table.read_text(encoding="utf-8")))
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "spurious_minima.pdf", metadata={"CreationDate": None})
    figure.savefig(options.out / "spurious_minima.png", dpi=130)
    print(f"{options.out / 'spurious_minima.png'}")


def _instances(options: Options) -> Path:
    return options.data / "spurious_minima_instances.json"


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
