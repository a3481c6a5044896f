"""What experiments have in common: rows recorded as they come, a summary at the end, an exit status that follows from it.

Above it lies :func:`tbrm_theory.program.run_program`, which turns errors into an exit status; below it
:class:`tbrm_theory.results.Run`, the folder, and :class:`tbrm_theory.execution.Execution`, which makes the rows here or elsewhere.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from tbrm_theory.execution import Execution
from tbrm_theory.results import Run

__all__ = ["run_experiment"]

Row = dict[str, Any]


def run_experiment(
    name: str,
    config: Any,
    cells: Mapping[str, Callable[[], Row]],
    summarise: Callable[[list[Row], float], Row],
    tables: Callable[[list[Row], Row], Iterable[Table]],
    *,
    in_tables: Collection[str] = (),
    execution: Execution = Execution(),  # noqa: B008 - frozen
) -> int:
    """Record the row of every cell that is not recorded yet, write and print the summary, and return the exit status.

    Args:
        name: the experiment, and the folder of its runs in ``config.results``.
        config: a dataclass of settings; all but ``results`` and ``execution`` say which run is taken up again.
        cells: what makes each row, by the name that is recorded with it as ``cell``.
        summarise: the summary, from the rows in the order of ``cells`` and as :meth:`Run.rows` gives them (infinities are
            strings), and the seconds that this took; its list ``unexpected`` decides the exit status.
        tables: what is printed, from the rows and the summary.
        in_tables: keys of the summary that are not printed once more.
        execution: where cells are made, and how many at a time.

    Returns:
        0: as predicted; 1: something was ``unexpected``; 130: interrupted by Ctrl-C, all finished rows kept.
    """
    started = time.perf_counter()
    console = Console(width=None if sys.stdout.isatty() else 200)

    def say(line: str) -> None:
        console.print(Text(line), soft_wrap=True)

    settings = {key: value for key, value in asdict(config).items() if key not in ("results", "execution")}
    run = Run.open(name, settings, root=config.results)
    done = {row["cell"] for row in run.rows()}
    try:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("cells", total=len(cells), completed=len(done))
            missing = {cell: make for cell, make in cells.items() if cell not in done}
            with contextlib.closing(execution.rows(missing)) as finished:
                for cell, row in finished:
                    run.record({"cell": cell} | row)
                    progress.update(task, advance=1, description=cell)
        rows = run.arranged(cells)
        summary = summarise(rows, time.perf_counter() - started)
    except KeyboardInterrupt:
        say(f"interrupted; the same command goes on from {run.folder}")
        return 130
    run.finish(summary)  # before anything is printed, to a disk that may be full or a reader who may have gone
    for table in tables(rows, summary):
        console.print(table)
    for key, value in summary.items():
        if key not in in_tables:
            say(f"{key}: {value}")
    say(f"results: {run.folder}")
    return 1 if summary["unexpected"] else 0
