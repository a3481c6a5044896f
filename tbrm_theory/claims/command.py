"""``tbrm verify``: claims over families as a table for people, a JSON file for programs, and an exit status.

Status 0: every claim holds on all that was tried; 1: one is violated; 2: none is violated, and one was never exercised.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import joblib
import rich.box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from tbrm_theory.claims.registry import Claim, select
from tbrm_theory.claims.terminal import console, one_thread
from tbrm_theory.claims.verification import Outcome, Verdict, Worst, by_number, verify
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.families import FAMILIES
from tbrm_theory.instance import Instance
from tbrm_theory.json_fields import write_json
from tbrm_theory.results import plain_json

__all__ = ["verify_command"]

_WORTH_PROCESSES = 1000  # comparisons: fewer are done before other processes have started
_PIPED_WIDTH = 190  # one line for each claim
_COLOURS = {Verdict.HOLDS: "green", Verdict.VIOLATED: "bold red", Verdict.NOT_EXERCISED: "yellow"}


def verify_command(
    claims: Sequence[str] = (),
    families: Sequence[str] = (),
    instances: int = 200,
    seed: int = 0,
    file: Path | None = None,
    json: Path | None = None,
) -> int:
    """Check claims, print one line for each, and return the exit status.

    Args:
        claims: ids, a number standing for all its parts; none for all claims.
        families: names; none for all families.
        file: an instance file to try the claims on, instead of families.
        json: file to write the outcomes to, atomically.

    Raises:
        InvalidInputError: an unknown claim or family, a number of instances below 1, no folder for the JSON file, a malformed
            instance file, or one together with families.
    """
    chosen = select(claims or None)
    instance = None
    if file is not None:
        if families:
            raise InvalidInputError("families", "expected none together with a file")
        instance = (str(file), Instance.load(file))
        chosen = chosen if claims else [claim for claim in chosen if claim.problem is None]
    if json is not None and not json.resolve().parent.is_dir():
        raise InvalidInputError("json", f"no folder {json.resolve().parent}")
    if json is not None and json.is_dir():
        raise InvalidInputError("json", f"expected a file to write, found the folder {json}")
    with one_thread(), _progress() as progress:
        task = progress.add_task("checking claims", total=None)
        outcomes = verify(
            chosen,
            families or None,
            instances,
            seed,
            file=instance,
            workers=joblib.cpu_count() if instances * len(chosen) > _WORTH_PROCESSES else 1,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    try:
        if json is not None:
            write_json(json, outcomes_as_json(chosen, outcomes))
    finally:  # a file that cannot be written does not cost the table, too
        _print(chosen, outcomes)
    return exit_status(outcomes.values())


def exit_status(outcomes: Iterable[Outcome]) -> int:
    verdicts = {outcome.verdict for outcome in outcomes}
    if Verdict.VIOLATED in verdicts:
        return 1
    return 2 if Verdict.NOT_EXERCISED in verdicts else 0


def outcomes_as_json(claims: Sequence[Claim], outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """``{claim id: {verdict, instances, skipped, worst_error, …, seed, seconds}}``, for every number and every part.

    ``worst_error`` is relative to the size of the terms, ``bound`` what rounding explains, ``worst_ratio`` the largest left/right
    of an inequality; ``family`` and ``seed`` reproduce that case. What does not apply is null.
    """
    everything = by_number(claims, outcomes) | outcomes
    document = {}
    for claim_id in sorted(everything, key=_in_order):
        outcome, worst = everything[claim_id], everything[claim_id].worst
        document[claim_id] = {
            "verdict": str(outcome.verdict),
            "instances": outcome.instances,
            "skipped": outcome.skipped.total(),
            "skip_reasons": dict(outcome.skipped),
            "worst_error": worst.error if worst else None,
            "bound": worst.bound if worst else None,
            "worst_ratio": worst.ratio if worst else None,
            "family": worst.family if worst else None,
            "seed": worst.seed if worst else None,
            "seconds": round(outcome.seconds, 3),
        }
    result: dict[str, Any] = plain_json(document)
    return result


def _in_order(claim_id: str) -> tuple[str, int, str]:
    """``I2`` before ``I2.a`` before ``I10``."""
    number, _, part = claim_id.partition(".")
    return number[0], int(number[1:]), part


# -- for people ----------------------------------------------------------------------------------------------------


def _print(chosen: Sequence[Claim], outcomes: dict[str, Outcome]) -> None:
    output = console(_PIPED_WIDTH)
    output.print(_table(chosen, outcomes))
    for claim in chosen:
        _explain(output, claim, outcomes[claim.id])


def _table(claims: Sequence[Claim], outcomes: dict[str, Outcome]) -> Table:
    seconds = sum(outcome.seconds for outcome in outcomes.values())
    title = (
        f"{len(claims)} claims, {seconds:.0f} s; errors relative to the size of the terms, bounds from float64 rounding; "
        "l/r: the largest left/right of an inequality"
    )
    table = Table(title=title, title_justify="left", title_style="bold", box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("claim", "statement", "instances", "skipped", "worst error", "bound", "where", "verdict"):
        right = column in ("instances", "worst error", "bound")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for claim in claims:
        outcome = outcomes[claim.id]
        worst = outcome.worst
        cells = [
            claim.id,
            claim.statement,
            str(outcome.instances),
            ", ".join(f"{count} {reason}" for reason, count in outcome.skipped.items()),
            _how_close(worst) if worst else "",
            f"{worst.bound:.1e}" if worst else "",
            f"{worst.family} {worst.seed}" if worst else "",
        ]
        verdict = Text(str(outcome.verdict), style=_COLOURS[outcome.verdict])
        table.add_row(*(Text(cell) for cell in cells), verdict)
    return table


def _how_close(worst: Worst) -> str:
    """The error, or the ratio of an inequality without one, which says how much slack is left."""
    return f"{worst.error:.1e}" if worst.error or worst.ratio is None else f"l/r {worst.ratio:.4g}"


def _explain(output: Console, claim: Claim, outcome: Outcome) -> None:
    worst = outcome.worst
    if outcome.verdict is Verdict.VIOLATED and worst is not None:
        kind = "families" if worst.family in FAMILIES else "file"
        where = f" --{kind} {worst.family}" if claim.problem is None else ""
        again = f"tbrm verify --claims {claim.id}{where} --seed {worst.seed} --instances 1"
        found = (
            f"{claim.id} is violated on {outcome.violations} of {outcome.instances} instances; see one with: {again}"
        )
        output.print(Text(found, style="bold red"))
    elif outcome.verdict is Verdict.NOT_EXERCISED:
        output.print(Text(f"{claim.id} was never exercised: no problem here is within its assumptions"))


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on a terminal's standard error, nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        yield progress
