"""Seconds and memory of TBRM's loss at the head, against the vocabulary: two panels from one table.

Reads the table `lm_head.json` in `--data`; writes `lm_head.pdf` and `.png` to `--out`. With `--results`, the table is first extracted
from that run's `metrics.jsonl`. Runs no experiment.
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

WAYS = {
    "naive": ("#ee6677", "log_softmax of all logits in float32"),
    "chunked": ("#4477aa", "in chunks, computed again (token_scores)"),
    "fused": ("#228833", "TRL's fused head, which holds no logits"),
}
KEPT = ("vocabulary", "positions", "dtype", "device", "threads", "logits_bytes", "seconds", "bytes")


def extract(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is drawn of every vocabulary, seconds to four digits."""
    return [rounded({key: cell[key] for key in KEPT}, 4) for cell in cells]


def draw(rows: list[dict[str, Any]]) -> Figure:
    """The figure; every plotted number comes from ``rows``."""
    rows = sorted(rows, key=lambda row: row["vocabulary"])
    words = [row["vocabulary"] for row in rows]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for way, (colour, label) in WAYS.items():
        axes[0].plot(words, [row["seconds"][way] for row in rows], "o-", color=colour, label=label)
        axes[1].plot(words, [row["bytes"][way] / 2**20 for row in rows], "o-", color=colour, label=label)
    logits = [row["logits_bytes"] / 2**20 for row in rows]
    axes[1].plot(words, logits, "--", color="#bbbbbb", label=f"the logits alone, {rows[0]['dtype']}")
    first = rows[0]
    where = f"{first['positions']} positions, {first['dtype']}, {first['device']}, threads: {first['threads']}"
    _finish(axes[0], words, "seconds", f"(a) loss and gradients: {where}")
    _finish(axes[1], words, "MiB held at once, beside the model", "(b) memory of the same")
    return figure


def _finish(axis: Axes, words: list[int], ylabel: str, title: str) -> None:
    axis.set(xscale="log", yscale="log", xlabel="words in the vocabulary", ylabel=ylabel)
    axis.set_xticks(words, [f"{number:,}" for number in words])
    axis.set_xticks([], minor=True)
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=8)


def main(options: Options) -> int:
    return write_figure("lm_head", options, extract, draw)


if __name__ == "__main__":
    sys.exit(run_program("fig_lm_head", lambda: main(tyro.cli(Options, description=__doc__))))
