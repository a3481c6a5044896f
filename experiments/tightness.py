"""How tight is every inequality, and are the false ones refuted? The adversarial searches of `tbrm falsify`, all of them.

For each claim and horizon: the largest left/right found, certified from below in exact arithmetic, with the seed that finds it again.
The searches of true claims must prove no violation and come as close to equality as the theory says they can: B5 to what a bandit
attains at max|f| = 20, the others to 1. The searches of false claims must prove one.

A run that was interrupted or killed goes on where it stopped when the same code is asked for the same settings. The run folder also
gets `tightness.md`, the table for a README, and `worst/CLAIM-H.json`, every worst instance. summary.json: `searches` (how many),
`tightest` (claim to largest left/right), `refuted` (false claims with a proved violation), `unexpected` (violated though true, not
refuted though false, or short of its target), `verdict`, `seconds` (of all searches in the table together). Exit status 1 if anything
is unexpected; 2 on bad input; 130 on Ctrl-C.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from tbrm_theory.claims.falsification import falsify
from tbrm_theory.claims.falsify_command import finding_as_json
from tbrm_theory.claims.search_targets import TARGETS, Target, select_targets
from tbrm_theory.claims.terminal import one_thread
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.json_fields import write_json
from tbrm_theory.program import run_program
from tbrm_theory.results import Run, plain_json

EXPECTED = {
    "B1": 0.9999,
    "B2.a": 0.999,
    "B2.b": 0.99,
    "B3": 0.99,
    "B5.a": 0.949,
    "B5.b": 0.974,
    "B7": 0.999,
    "C1": 0.999,
}
"""What left/right must at least be at every horizon. A bandit's limit in B5 is 0.949999998 for part a and 0.975 for part b."""


@dataclass(frozen=True)
class Config:
    """Settings of the experiment."""

    claims: tuple[str, ...] = ()
    """Only these claims; all that `tbrm falsify --list` names if not given."""
    steps: int = 600
    """Gradient steps of each search."""
    restarts: int = 64
    """Candidates searched together."""
    seeds: int = 1
    """Searches of each claim with different seeds; the best one counts."""
    seed: int = 0
    """The first of them."""
    results: Path = Path("results")
    """Folder to write to; this run is in tightness/ there, the newest one behind the link tightness/latest."""

    def __post_init__(self) -> None:
        for name in ("steps", "restarts", "seeds"):
            if getattr(self, name) < 1:
                raise InvalidInputError(name, f"expected at least 1, found {getattr(self, name)}")
        if self.seed < 0:
            raise InvalidInputError("seed", f"expected a seed, which is not negative, found {self.seed}")
        for claim in self.claims:
            select_targets(claim)


def rows_of(target: Target, seed: int, config: Config) -> list[dict[str, Any]]:
    """One row for each horizon of a target."""
    findings = falsify(target, steps=config.steps, restarts=config.restarts, seed=seed)
    rows = [{"claim": target.id} | finding_as_json(target, finding) for finding in findings]
    for row in rows:
        row["unexpected"] = unexpected(row)
    return rows


def unexpected(row: dict[str, Any]) -> str | None:
    """What is wrong with a row, if anything."""
    if row["expected_to_hold"]:
        if row["violated"]:
            return "violated"
        if not row["confirmed_exactly"]:
            return "undecided"
        return "not as tight as it can be" if row["best_ratio"] < EXPECTED[row["claim"]] else None
    return None if row["violated"] else "not refuted"


def best_of_seeds(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The row with the largest certified left/right of every claim and horizon; a proved violation comes first."""
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        key = (row["claim"], row["horizon"])
        if key not in best or _rank(row) > _rank(best[key]):
            best[key] = row
    return list(best.values())


def _rank(row: dict[str, Any]) -> tuple[bool, float]:
    return row["violated"], float(row["best_ratio"])


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The headline numbers; keys are explained in ``--help``."""
    bad = [f"{row['claim']} at H = {row['horizon']}: {row['unexpected']}" for row in rows if row["unexpected"]]
    tightest: dict[str, float] = {}
    for row in rows:
        if row["expected_to_hold"]:
            tightest[row["claim"]] = max(tightest.get(row["claim"], 0.0), row["best_ratio"])
    return {
        "searches": len(rows),
        "tightest": tightest,
        "refuted": [row["claim"] for row in rows if not row["expected_to_hold"] and row["violated"]],
        "unexpected": bad,
        "verdict": "as predicted" if not bad else "NOT as predicted",
        "seconds": round(sum(row["seconds"] for row in rows), 1),
    }


_COLUMNS = ("claim", "statement", "H", "left/right", "seed", "exact verdict", "s")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """The texts of a row of either table."""
    verdict = {(True, True): "violated", (False, True): "holds"}.get((row["violated"], row["confirmed_exactly"]))
    ratio, seconds = f"{float(row['best_ratio']):.7g}", f"{row['seconds']:.0f}"
    how = f"{verdict or 'undecided'} ({row['arithmetic']})"
    return row["claim"], row["statement"], str(row["horizon"]), ratio, str(row["seed"]), how, seconds


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The largest left/right of every claim with its horizon (of equals to six digits the longest) and seed, as text."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["claim"] not in best or _tightness(row) > _tightness(best[row["claim"]]):
            best[row["claim"]] = row
    lines = ["| " + " | ".join(_COLUMNS[:-1]) + " |", "|" + "---|" * len(_COLUMNS[:-1])]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells(row)[:-1]) + " |" for row in best.values()]
    return "\n".join(lines) + "\n"


def _tightness(row: dict[str, Any]) -> tuple[float, int]:
    ratio = float(row["best_ratio"])
    return (ratio if math.isinf(ratio) else round(ratio, 6)), row["horizon"]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    view = Table(*_COLUMNS)
    for row in rows:
        view.add_row(*(Text(cell) for cell in cells(row)), style="red" if row["unexpected"] else None)
    return view


def main(config: Config) -> int:
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    targets = [target for claim in config.claims for target in select_targets(claim)] or list(TARGETS.values())
    recorded = {key: value for key, value in asdict(config).items() if key != "results"}
    run = Run.open("tightness", recorded, root=config.results)
    done = {(row["claim"], row["seed"]) for row in run.rows()}
    wanted = [(target, config.seed + turn) for target in targets for turn in range(config.seeds)]
    try:
        with one_thread(), Progress(console=console, transient=True) as progress:
            task = progress.add_task("searches", total=len(wanted), completed=len(done))
            for target, seed in wanted:
                if (target.id, seed) not in done:
                    progress.update(task, description=target.id)
                    run.record({"claim": target.id, "seed": seed, "rows": rows_of(target, seed, config)})
                    progress.advance(task)
    except KeyboardInterrupt:
        console.print(Text(f"interrupted; the same command goes on from {run.folder}"), soft_wrap=True)
        return 130
    rows = best_of_seeds([row for record in run.rows() for row in record["rows"]])
    (run.folder / "tightness.md").write_text(markdown(rows), encoding="utf-8")
    (run.folder / "worst").mkdir(exist_ok=True)
    for row in rows:
        write_json(run.folder / "worst" / f"{row['claim']}-{row['horizon']}.json", plain_json(row["instance"]))
    summary = summarise(rows)
    run.finish(summary)  # before anything is printed, to a disk that may be full or a reader who may have gone
    console.print(table(rows))
    for key, value in summary.items():
        console.print(Text(f"{key}: {value}"), soft_wrap=True)
    console.print(Text(f"results: {run.folder}"), soft_wrap=True)
    return 0 if not summary["unexpected"] else 1


if __name__ == "__main__":
    sys.exit(run_program("tightness", lambda: main(tyro.cli(Config, description=__doc__))))
