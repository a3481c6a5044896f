"""The runs of an LLM file (``run: train``): learning curves on held-out problems, and the cost table of [Y] Fig. 2(b).

Called by ``llm_run.py``. Every run is a process of its own, so that its memory is its own; or ``accelerate launch`` starts several for
one run, and the first alone records. All start from the same pre-trained model, made once, and are judged on the same held-out
problems. What is done is recorded run by run: a later command of the same file and overrides, with ``--only`` for other methods or
without, goes on with what is missing, and the summary is written once all runs of the file are there.

summary.json: `accuracy` (by method: Avg@k at the end, mean over seeds, 95 % bootstrap interval over problems), `accuracy_by_seed`,
`start_accuracy`, `seconds_per_step` (by method and part: rollout, reference, old_log_probs, update, critic, other), `step_seconds`,
`peak_bytes`, `models_held`, `rollouts_per_step`, `ratios` (of TBRM with one rollout: `step/ppo-n1`, `step/grpo-n4`, `memory/ppo-n1`,
beside `paper`: 0.77, 0.32, 0.67; absent where the file lacks a method), `parameters`, `pretraining_steps`, `unexpected`, `verdict`,
`seconds` (of the command that finished). Exit status 1 if the whole interval of a run's end lies below the accuracy it began with;
which method wins is reported and not judged.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list  # type: ignore[import-untyped]
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.execution import in_a_process
from tbrm_theory.llm.part_timer import PARTS
from tbrm_theory.llm.pretraining import found_pretrained
from tbrm_theory.llm.run_arguments import RunArguments
from tbrm_theory.llm.run_files import Run as LanguageRun
from tbrm_theory.llm.run_files import read_file, read_runs, split_command_line
from tbrm_theory.llm.run_training import pretrain_run, starts_from_nothing, train_run
from tbrm_theory.results import Run
from tbrm_theory.statistics import bootstrap_interval

PAPER = {"step/ppo-n1": 0.77, "step/grpo-n4": 0.32, "memory/ppo-n1": 0.67}
"""[Y] Fig. 2(b): TBRM n = 1 steps 1.3 times as fast as PPO n = 1, 3.1 times as fast as GRPO n = 4, in 33.3 % less memory than PPO."""
BASE = "tbrm-n1"
PRETRAINING = "pretraining"

Row = dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    """Make what is missing; 0: nothing went wrong, 1: a run got worse, 130: interrupted, what is done is kept."""
    started = time.perf_counter()
    wanted, whole = read_runs(arguments), read_runs(_without_only(arguments))
    if _processes() > 1:
        _check_processes(wanted)
        if int(os.environ.get("RANK", "0")) > 0:
            return follow(arguments)
    console = Console(width=None if sys.stdout.isatty() else 200)
    line = split_command_line(arguments)
    overrides = [*line.rest, *map(str, line.dotted.items())]
    settings = {"file": read_file(line.config), "overrides": overrides, "processes": _processes()}
    run = Run.open("llm_run", settings, root=Path(wanted[0].arguments.results))
    done = {row["cell"] for row in run.rows()}
    missing = [each.name for each in wanted if each.name not in done]
    first = whole[0].arguments
    found = starts_from_nothing(first) and found_pretrained(_start(first, run.folder), first)
    if missing and starts_from_nothing(first) and not (PRETRAINING in done and found):
        missing.insert(0, PRETRAINING)
    _told_by_the_first([str(run.folder), *missing])
    try:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("runs", total=len(missing))
            for name in missing:
                progress.update(task, description=name)
                run.record({"cell": name} | _made(arguments, name, run.folder))
                progress.advance(task)
    except KeyboardInterrupt:
        console.print(f"interrupted; the same command goes on from {run.folder}", markup=False, soft_wrap=True)
        return 130
    rows = run.rows()
    left = [each.name for each in whole if each.name not in {row["cell"] for row in rows}]
    summary = summarise(rows, time.perf_counter() - started)
    if not left:
        run.finish(summary)
    for table in tables(summary):
        console.print(table)
    if left:
        console.print(f"still to come: {', '.join(left)}", markup=False, soft_wrap=True)
    console.print(f"results: {run.folder}", markup=False, soft_wrap=True)
    return 1 if summary["unexpected"] else 0


def follow(arguments: Sequence[str]) -> int:
    """What the other processes of a launch do: train with the first, in its folder, and record nothing."""
    folder, *names = _told_by_the_first([])
    for name in names:
        make_row(arguments, name, Path(folder))
    return 0


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _check_processes(wanted: list[LanguageRun]) -> None:
    if len(wanted) > 1:
        raise InvalidInputError(
            "--only", "several processes train one run; name one method, and give the file one seed"
        )
    first = wanted[0].arguments
    if starts_from_nothing(first) and not (first.pretrained and found_pretrained(Path(first.pretrained), first)):
        raise InvalidInputError("pretrained", "one process makes the model; expected the folder where it did")


def _told_by_the_first(words: list[str]) -> list[str]:
    """What the first process says, in all of them."""
    if _processes() == 1:
        return words
    (told,) = broadcast_object_list([words])
    return list(told)


def _start(arguments: RunArguments, folder: Path) -> Path:
    """Where the pre-trained model of a file stands, or will stand."""
    return Path(arguments.pretrained) if arguments.pretrained else folder / PRETRAINING


def _without_only(arguments: Sequence[str]) -> list[str]:
    kept, skip = [], False
    for word in arguments:
        if not skip and not word.startswith("--only="):
            skip = word == "--only"
            kept += [] if skip else [word]
        else:
            skip = False
    return kept


def _made(arguments: Sequence[str], name: str, folder: Path) -> Row:
    """The row of one run; a process that dies takes nothing with it."""
    if _processes() > 1:
        return make_row(arguments, name, folder)
    return in_a_process(name, make_row, list(arguments), name, folder)


def make_row(arguments: Sequence[str], name: str, folder: Path) -> Row:
    """What is recorded of one run, or of the pre-training that comes before all."""
    # All of the file's: the first makes the model, whatever `--only` says.
    runs = {run.name: run for run in read_runs(_without_only(arguments))}
    first: LanguageRun = next(iter(runs.values()))
    start = _start(first.arguments, folder)
    if name == PRETRAINING:
        return pretrain_run(first, start)
    return train_run(runs[name], folder / name, start if starts_from_nothing(first.arguments) else None)


# -- summary ---------------------------------------------------------------------------------------------------------------


def summarise(rows: list[Row], seconds: float) -> Row:
    """The headline numbers; keys are explained above."""
    made = {row["cell"]: row for row in rows if row["cell"] != PRETRAINING}
    methods: dict[str, list[Row]] = {}
    for row in made.values():
        methods.setdefault(row["name"], []).append(row)
    by_seed = {name: [row["curve"][-1][-1] for row in found] for name, found in methods.items()}
    parts = {
        name: {part: fmean(row["seconds_per_step"].get(part, 0.0) for row in found) for part in PARTS}
        for name, found in methods.items()
    }
    steps = {name: sum(seconds.values()) for name, seconds in parts.items()}
    peaks = {name: max(row["peak_bytes"] for row in found) for name, found in methods.items()}
    worse = [cell for cell, row in made.items() if _accuracy([row])["high"] < row["curve"][0][-1]]
    return {
        "accuracy": {name: _accuracy(found) for name, found in methods.items()},
        "accuracy_by_seed": by_seed,
        "start_accuracy": {name: fmean(row["curve"][0][-1] for row in found) for name, found in methods.items()},
        "seconds_per_step": parts,
        "step_seconds": steps,
        "peak_bytes": peaks,
        "models_held": {name: found[0]["models_held"] for name, found in methods.items()},
        "rollouts_per_step": {name: _rollouts(found[0]) for name, found in methods.items()},
        "ratios": _ratios(steps, peaks),
        "paper": PAPER,
        "parameters": max((row["parameters"] for row in made.values()), default=0),
        "pretraining_steps": next((row["steps"] for row in rows if row["cell"] == PRETRAINING), 0),
        "unexpected": [f"{cell}: worse than at the start" for cell in worse],
        "verdict": "as predicted" if not worse else "NOT as predicted",
        "seconds": round(seconds, 1),
    }


def _accuracy(found: list[Row]) -> dict[str, float]:
    """Mean over seeds, problems and responses, and the interval over problems."""
    by_problem = np.mean([np.mean(row["rewards"], axis=1) for row in found], axis=0)
    interval = bootstrap_interval(by_problem, seed=0)
    return {"mean": float(by_problem.mean()), "low": interval.low, "high": interval.high}


def _rollouts(row: Row) -> int:
    (first, samples, _), (later, more, _) = row["curve"][0], row["curve"][-1]
    return int((more - samples) / max(later - first, 1))


def _ratios(steps: dict[str, float], peaks: dict[str, int]) -> dict[str, float]:
    ratios = {}
    for key in PAPER:
        kind, other = key.split("/")
        numbers: dict[str, Any] = steps if kind == "step" else peaks
        if BASE in numbers and numbers.get(other):
            ratios[key] = numbers[BASE] / numbers[other]
    return ratios


def tables(summary: Row) -> list[Table]:
    """Accuracy by method, and what a step costs."""
    curves = Table("method", "Avg@k", "95 %", "by seed", "at the start", title="held-out problems")
    for name, found in summary["accuracy"].items():
        seeds = ", ".join(f"{value:.3f}" for value in summary["accuracy_by_seed"][name])
        interval = f"{found['low']:.3f} to {found['high']:.3f}"
        curves.add_row(name, f"{found['mean']:.3f}", interval, seeds, f"{summary['start_accuracy'][name]:.3f}")
    cost = Table("method", *PARTS, "step", "rollouts", "models", "peak MiB", title="seconds of an update")
    for name, parts in summary["seconds_per_step"].items():
        numbers = [*parts.values(), summary["step_seconds"][name]]
        counts = (summary["rollouts_per_step"][name], summary["models_held"][name])
        peak = f"{summary['peak_bytes'][name] / 2**20:.0f}"
        cost.add_row(name, *(f"{value:.3f}" for value in numbers), *map(str, counts), peak)
    ratios = Table(f"{BASE} over", "measured", "paper", title="ratios")
    for key, value in summary["ratios"].items():
        ratios.add_row(key, f"{value:.2f}", f"{PAPER[key]:.2f}")
    return [curves, cost, ratios]
