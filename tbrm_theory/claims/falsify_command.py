"""``tbrm falsify``: the worst instance that an adversarial search finds, as tables, a JSON file and an instance file.

Status 0: no violation was proved; 1: one was; bad input raises. A float64 ratio above 1 that exact arithmetic does not confirm is no
violation.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.box
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table
from rich.text import Text

from tbrm_theory.claims.falsification import Finding, falsify
from tbrm_theory.claims.search_space import Shape
from tbrm_theory.claims.search_targets import TARGETS, Target, select_targets
from tbrm_theory.claims.terminal import console, one_thread
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.instance import Instance
from tbrm_theory.json_fields import write_json
from tbrm_theory.results import plain_json
from tbrm_theory.transitions import DeterministicTransition

__all__ = ["falsify_command", "finding_as_json", "print_targets", "worst"]

_PIPED_WIDTH = 160
_Found = tuple[Target, Finding]


def falsify_command(
    claim: str,
    steps: int = 600,
    restarts: int = 64,
    seed: int = 0,
    json: Path | None = None,
    save: Path | None = None,
) -> int:
    """Search for a violation of a claim, print what was found, and return the exit status.

    Args:
        claim: id of a target, a number standing for all its parts.
        steps: gradient steps of each search.
        restarts: candidates searched together.
        json: file for the outcome, atomically.
        save: file for the worst instance alone.

    Raises:
        InvalidInputError: an unknown claim, steps or restarts below 1, a negative seed, no folder for a file, or a folder in its
            place.
    """
    targets = select_targets(claim)
    for name, number, least in (("steps", steps, 1), ("restarts", restarts, 1), ("seed", seed, 0)):
        if number < least:
            raise InvalidInputError(name, f"expected at least {least}, found {number}")
    for name, path in (("json", json), ("save", save)):
        if path is not None and not path.resolve().parent.is_dir():
            raise InvalidInputError(name, f"no folder {path.resolve().parent}")
        if path is not None and path.is_dir():
            raise InvalidInputError(name, f"expected a file to write, found the folder {path}")
    found = search(targets, steps=steps, restarts=restarts, seed=seed)
    target, finding = worst(found)
    try:
        if json is not None:
            write_json(json, outcome_as_json(claim, found))
        if save is not None:
            finding.instance.save(save)
    finally:  # a file that cannot be written does not cost the tables, too
        _print(found, target, finding)
    return 1 if any(finding.violated for _, finding in found) else 0


def search(targets: Sequence[Target], *, steps: int, restarts: int, seed: int) -> list[_Found]:
    """Every target at every horizon, with a bar on a terminal's standard error."""
    found: list[_Found] = []
    hidden = not sys.stderr.isatty()
    with one_thread(), Progress(console=Console(stderr=True), transient=True, disable=hidden) as progress:
        for target in targets:
            bars = {shape: progress.add_task(f"{target.id} H={shape.horizon}", total=steps) for shape in target.shapes}

            def report(shape: Shape, done: int, bars: dict[Shape, TaskID] = bars) -> None:
                progress.update(bars[shape], completed=done)

            findings = falsify(target, steps=steps, restarts=restarts, seed=seed, progress=report)
            found += [(target, finding) for finding in findings]
    return found


def worst(found: Sequence[_Found]) -> _Found:
    """A proved violation before anything else, then the largest ratio."""
    return max(found, key=lambda pair: (pair[1].violated, pair[1].ratio))


# -- for programs --------------------------------------------------------------------------------------------------


def outcome_as_json(claim: str, found: Sequence[_Found]) -> dict[str, Any]:
    """``{claim, best_ratio, violated, confirmed_exactly, seconds, instance}`` of the worst finding, and ``searches``, all of them.

    ``best_ratio`` is a lower bound of left/right certified in exact arithmetic, ``violated`` whether left > right was proved,
    ``confirmed_exactly`` whether exact arithmetic decided it either way, ``seconds`` the time of all searches.
    """
    target, finding = worst(found)
    document = {
        "claim": claim,
        **finding_as_json(target, finding),
        "seconds": round(sum(one.seconds for _, one in found), 3),
        "searches": [
            {"claim": one.id} | {key: entry for key, entry in finding_as_json(one, its).items() if key != "instance"}
            for one, its in found
        ],
    }
    result: dict[str, Any] = plain_json(document)
    return result


def finding_as_json(target: Target, finding: Finding) -> dict[str, Any]:
    """One finding with its instance document."""
    decision = finding.decision
    return {
        "best_ratio": finding.ratio,
        "violated": finding.violated,
        "confirmed_exactly": decision.violated is not None,
        "seconds": round(finding.seconds, 3),
        "decided_as": target.decided_as,
        "statement": target.statement,
        "expected_to_hold": target.true,
        "horizon": finding.horizon,
        "seed": finding.seed,
        "float64_ratio": finding.float64_ratio,
        "left": list(decision.left),
        "right": list(decision.right),
        "arithmetic": decision.exact,
        "digits": decision.digits,
        "instance": finding.instance.to_document(),
    }


# -- for people ----------------------------------------------------------------------------------------------------


def print_targets() -> None:
    """What can be searched for, and whether it is true."""
    table = _table("Claims that tbrm falsify knows", "claim", "is", "statement", "horizons")
    for target in TARGETS.values():
        horizons = ", ".join(str(shape.horizon) for shape in target.shapes)
        _row(table, target.id, "true" if target.true else "false", target.statement, horizons)
    console(_PIPED_WIDTH).print(table)


def _print(found: Sequence[_Found], target: Target, finding: Finding) -> None:
    output = console(_PIPED_WIDTH)
    output.print(_findings_table(found))
    output.print(Text(f"Worst instance, of {target.id} at horizon {finding.horizon}:"))
    output.print(_instance_table(finding.instance))
    output.print(Text(_conclusion(target, finding), style="bold red" if finding.violated else "green"))


def _findings_table(found: Sequence[_Found]) -> Table:
    seconds = sum(finding.seconds for _, finding in found)
    title = f"Largest left/right found, certified from below; {seconds:.0f} s"
    table = _table(title, "claim", "statement", "horizon", "left/right", "in float64", "seed", "exact verdict")
    for target, finding in found:
        verdict = {True: "violated", False: "holds", None: "undecided"}[finding.decision.violated]
        how = f"{verdict} ({finding.decision.exact})"
        ratios = (f"{finding.ratio:.9g}", f"{finding.float64_ratio:.9g}")
        _row(table, target.id, target.statement, finding.horizon, *ratios, finding.seed, how)
    return table


def _instance_table(instance: Instance) -> Table:
    """One line for each layer, state and action."""
    mdp = instance.mdp
    names = [*instance.policies, *instance.logits]
    mixtures = "; ".join(
        f"{name} = " + " + ".join(f"{weight:.4g} {part}" for weight, part in parts)
        for name, parts in instance.mixtures.items()
    )
    title = f"temperature {mdp.beta.item():g}" + (f"; mixture {mixtures}" if mixtures else "")
    table = _table(title, "layer", "state", "action", "reward", "reference", "leads to", *names)
    columns = [*instance.probabilities.values(), *instance.logits.values()]
    for h, reference in enumerate(mdp.reference):
        for s, a in (reference > 0).nonzero().tolist():
            numbers = [column[h][s, a].item() for column in columns]
            given = (mdp.reward[h][s, a].item(), reference[s, a].item())
            shown = [f"{number:.4g}" for number in (*given, *numbers)]
            _row(table, h, s, a, *shown[:2], _leads_to(instance, h, s, a), *shown[2:])
    return table


def _leads_to(instance: Instance, h: int, s: int, a: int) -> str:
    if h == instance.mdp.horizon - 1:
        return ""
    kernel = instance.mdp.transitions[h]
    successors, probabilities = (part[s, a].tolist() for part in kernel.edges())
    if isinstance(kernel, DeterministicTransition):
        return str(successors[0])
    return ", ".join(f"{t}: {p:.4g}" for t, p in zip(successors, probabilities, strict=True))


def _conclusion(target: Target, finding: Finding) -> str:
    if finding.violated:
        known = "as known" if not target.true else "AGAINST the theory"
        return f"{target.id} is violated, {known}: proved in {finding.decision.exact} arithmetic"
    if finding.decision.violated is None:
        return f"{target.id}: exact arithmetic could not decide the worst instance; it is not called a violation"
    return f"{target.id}: no violation found; left/right is at least {finding.ratio:.9g} on the worst instance"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _row(table: Table, *cells: object) -> None:
    table.add_row(*(Text(str(cell)) for cell in cells))
