"""What the figure scripts have in common: from a run's rows to a committed table, from the table to PDF and PNG."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.json_fields import read_json, replacement
from tbrm_theory.results import Run

__all__ = ["Options", "rounded", "write_figure", "write_table"]

HERE = Path(__file__).parent
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Options:
    """Where to read and write."""

    results: Path | None = None
    """A run folder of the experiment, to extract the table from."""
    data: Path = HERE / "data"
    """The folder of the table."""
    out: Path = HERE / "out"
    """The folder of the figure."""


def rounded(value: Any, digits: int) -> Any:
    """JSON data with its fractions to so many digits."""
    if isinstance(value, list):
        return [rounded(entry, digits) for entry in value]
    if isinstance(value, dict):
        return {name: rounded(entry, digits) for name, entry in value.items()}
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def write_table(path: Path, rows: Rows) -> None:
    """A JSON list with one row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    with replacement(path) as file:
        file.write(f"[\n{lines}\n]\n")


def write_figure(name: str, options: Options, extract: Callable[[Rows], Rows], draw: Callable[[Rows], Figure]) -> int:
    """Write ``name.pdf`` and ``name.png`` from the table ``name.json``, itself written first if a run is given.

    Raises:
        InvalidInputError: a folder that holds no run, or a table that is not one of this figure.
    """
    table = options.data / f"{name}.json"
    if options.results is not None:
        recorded = Run(options.results).rows()
        if not recorded:
            raise InvalidInputError(str(options.results), "expected the folder of a run with recorded rows; found none")
        write_table(table, extract(recorded))
    rows = read_json(table).value
    try:
        figure = draw(rows)
    except (KeyError, TypeError) as error:
        raise InvalidInputError(str(table), f"expected a table extracted with --results ({error})") from error
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / f"{name}.pdf", metadata={"CreationDate": None})
    figure.savefig(options.out / f"{name}.png", dpi=130)
    plt.close(figure)
    print(f"{options.out / name}.png")
    return 0
