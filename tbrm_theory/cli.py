"""The command ``tbrm``: each subcommand is a typed function in :data:`COMMANDS`; it prints, returns a status.

Status 0: done; 1: a check failed; 2: bad input, said in one line on stderr, or bad usage; 130: interrupted (``program``).
What a command computes comes from the other modules; here it is only laid out.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tbrm_theory.dynamic_programming import Solution
from tbrm_theory.dynamic_programming import solve as solve_exactly
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.evaluation import evaluate_instance
from tbrm_theory.instance import Instance
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.program import run_program

__all__ = ["COMMANDS", "main"]

_Case = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CASE.json")]
_Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
_Loaded = TypeVar("_Loaded", Instance, RegularizedMDP)

_MOST_ROWS = 60  # of a table for people; the JSON object has all


# -- subcommands -------------------------------------------------------------------------------------------


def evaluate(case: _Case, /, *, json: _Flag = False) -> int:
    """Every exact quantity of an instance file: the optimum, policies, losses and bounds.

    Everything is in reward units, V* and Q* too, but the losses: these are in units of beta squared.

    Args:
        case: Instance file, as described in the README.
        json: Print one JSON object on standard output and nothing else; infinities are strings, NaN never occurs.
    """
    instance = _load(Instance.load, case)
    result = evaluate_instance(instance)
    if json:
        print(_one_line_of_json(result))
    else:
        _print_evaluation(_console(), case, instance.mdp, result)
    return 0


def solve(case: _Case, /) -> int:
    """The optimum of an instance file, and how it is certified.

    Prints the objective, V* (in reward units) of the states an episode can start in, the optimal policy of
    small layers, and the two residuals of the certificate: Bellman's, and the gap to the objective of the
    policy found. Exit status 1 if they are larger than rounding explains.

    Args:
        case: Instance file; only its problem is read, not its policies, mixtures and logits.
    """
    solution = solve_exactly(_load(RegularizedMDP.load, case))
    _print_solution(_console(), case, solution)
    return 0 if solution.certified else 1


def families() -> int:
    """The named families of problems, for tbrm_theory.make(NAME, seed=0, OPTION=...), with their options."""
    from tbrm_theory.families import FAMILIES  # imports gymnasium, which only this command needs

    table = _table("Families of problems", "name", "transitions", "summary", "options and defaults")
    for name, family in FAMILIES.items():
        options = ", ".join(f"{option.name}={option.default!r}" for option in family.options.values())
        kind = "deterministic" if family.deterministic else "stochastic"
        _row(table, name, kind, family.summary.replace("``", ""), options or "none")
    _console().print(table)
    return 0


def verify(
    *,
    claims: tuple[str, ...] = (),
    families: tuple[str, ...] = (),
    instances: int = 200,
    seed: int = 0,
    file: Path | None = None,
    json: Path | None = None,
) -> int:
    """Check the claims of the theory on problems of every family: two sides by independent code, one line for each claim.

    An error is relative to the size of the terms, and a claim holds if it is at most what float64 rounding explains.
    Exit status 0: all claims hold; 1: one is violated; 2: one was never exercised, since every problem was outside its
    assumptions.

    Args:
        claims: Ids such as I3, or I7.b for a part; all claims if not given.
        families: Names as listed by "tbrm families"; all of them if not given.
        instances: Problems for each claim.
        seed: First seed; "--families NAME --seed SEED --instances 1" repeats what the table names.
        file: Instance file to try the claims on instead of families, with its own policies and logits; claims about problems
            of their own are then left out.
        json: File to write the outcome of every claim to.
    """
    from tbrm_theory.claims.command import verify_command  # imports gymnasium, like families

    return verify_command(claims, families, instances, seed, file, json)


def falsify(
    claim: Annotated[str, tyro.conf.Positional] = "",
    /,
    *,
    steps: int = 600,
    restarts: int = 64,
    seed: int = 0,
    json: Path | None = None,
    save: Path | None = None,
    list: _Flag = False,
) -> int:
    """Search adversarially for an instance that violates a claim: gradient ascent on left/right of an inequality.

    The worst instance is decided in exact arithmetic, and only then called a violation. Exit status 0: no violation was proved; 1: one
    was, as it must be for the claims that are false on purpose.

    Args:
        claim: Id such as B3, or B5.a for a part; --list names all.
        steps: Gradient steps at each horizon.
        restarts: Candidates searched together.
        seed: Same seed, same instances.
        json: File to write the outcome to, worst instance included.
        save: File to write the worst instance to.
        list: Name the claims and stop.
    """
    from tbrm_theory.claims.falsify_command import falsify_command, print_targets

    if list:
        print_targets()
        return 0
    return falsify_command(claim, steps, restarts, seed, json, save)


COMMANDS: dict[str, Callable[..., int]] = {
    "evaluate": evaluate,
    "solve": solve,
    "families": families,
    "verify": verify,
    "falsify": falsify,
}
"""Subcommands by name, in the order of ``tbrm --help``. A new one is a function above and a line here."""


# -- running one -------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``tbrm`` and return its exit status.

    Raises:
        SystemExit: after ``--help`` (status 0), or on arguments that no subcommand takes (status 2).
    """

    def command() -> int:
        status: int = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="tbrm",
            description="Exact checks of Trajectory Bellman Residual Minimization on finite problems.",
            args=arguments,
        )
        return status

    return run_program("tbrm", command)


def _load(load: Callable[[Path], _Loaded], case: Path) -> _Loaded:
    try:
        return load(case)
    except InvalidInputError as error:
        if error.where == str(case):
            raise
        raise InvalidInputError(str(case), str(error)) from error


def _one_line_of_json(result: dict[str, Any]) -> str:
    return json.dumps(result, allow_nan=False)


# -- layout ------------------------------------------------------------------------------------------------


def _console() -> Console:
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=160 if piped else None, highlight=False)


def _table(title: str, *columns: str, numbers: Iterable[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table


def _row(table: Table, *cells: object) -> None:
    """Cells as they are: names from a file are never read as markup."""
    table.add_row(*(Text(_shown(cell)) for cell in cells))


def _shown(cell: object) -> str:
    return f"{cell:.8g}" if isinstance(cell, float) else str(cell)


def _listing(numbers: Iterable[object]) -> str:
    return "  ".join(_shown(number) for number in numbers)


def _describe(mdp: RegularizedMDP) -> str:
    kind = "deterministic" if mdp.is_deterministic else "stochastic"
    pairs = sum(int(valid.sum()) for valid in mdp.valid)
    return f"horizon {mdp.horizon}, {pairs} state-action pairs, {kind} transitions, beta {mdp.beta.item():g}"


def _print_evaluation(console: Console, case: Path, mdp: RegularizedMDP, result: dict[str, Any]) -> None:
    console.print(Text(f"{case}: {_describe(mdp)}"))
    _print_optimum(console, result)
    policies = _table("Policies (reward units; KL in nats)", "policy", *_POLICY, numbers=_POLICY)
    for name, found in result["policies"].items():
        _row(policies, name, *(found[key] for key in _POLICY))
    console.print(policies)
    _print_losses(console, result)
    coverage = _table(
        "Coverage: how well the data behind | cover the policy before", "policy | data", *_COVERAGE, numbers=_COVERAGE
    )
    for name, found in result["coverage"].items():
        _row(coverage, name, *(found[key] for key in _COVERAGE))
    console.print(coverage)


def _print_losses(console: Console, result: dict[str, Any]) -> None:
    if not result["losses"]:
        return
    bounds = _table("Logits (reward units)", "logits", *_LOGITS, numbers=_LOGITS)
    title = "Population losses (units of beta, squared) and the bound of Theorem 2 on the regret (reward units)"
    losses = _table(title, "logits", "behaviour", *_LOSSES, numbers=_LOSSES)
    for name, found in result["losses"].items():
        _row(bounds, name, *(found[key] for key in _LOGITS))
        for behaviour, loss in found["by_behaviour"].items():
            _row(losses, name, behaviour, *(loss[key] for key in _LOSSES))
    console.print(bounds)
    console.print(losses)


_POLICY = ("objective", "regret", "kl_to_reference")
_LOGITS = ("objective", "regret", "corollary4")
_LOSSES = ("tbrm", "brm", "theorem2")
_COVERAGE = ("kappa", "lemma1", "corollary6", "c_inf", "second_moment")


def _print_optimum(console: Console, result: dict[str, Any]) -> None:
    console.print(Text(f"Optimal objective {_shown(result['objective_star'])}"))
    table = _table("Optimum (V* and Q* in reward units)", "layer", "state", "V*", "Q*", "policy", numbers=("V*",))
    rows = [
        (h, s, value, _listing(q), _listing(policy))
        for h, layer in enumerate(zip(result["v_star"], result["q_star"], result["policy_star"], strict=True))
        for s, (value, q, policy) in enumerate(zip(*layer, strict=True))
    ]
    for row in rows[:_MOST_ROWS]:
        _row(table, *row)
    console.print(table)
    if len(rows) > _MOST_ROWS:
        console.print(Text(f"… and {len(rows) - _MOST_ROWS} more states; --json prints all"))


def _print_solution(console: Console, case: Path, solution: Solution) -> None:
    mdp = solution.mdp
    console.print(Text(f"{case}: {_describe(mdp)}"))
    console.print(Text(f"Optimal objective {_shown(solution.objective.item())}"))
    starts = _table("First states (V* in reward units)", "state", "probability", "V*", numbers=("probability", "V*"))
    reached = [s for s, probability in enumerate(mdp.initial.tolist()) if probability > 0]
    for s in reached[:_MOST_ROWS]:
        _row(starts, s, mdp.initial[s].item(), (mdp.beta * solution.v[0][s]).item())
    console.print(starts)
    if len(reached) > _MOST_ROWS:
        console.print(Text(f"… and {len(reached) - _MOST_ROWS} more first states"))
    _print_policy(console, solution)
    certificate = _table("Certificate (relative)", "check", "found", numbers=("found",))
    _row(certificate, "Bellman residual", solution.bellman_residual.item())
    _row(certificate, "duality gap", solution.duality_gap.item())
    _row(certificate, "within float64 rounding", "yes" if solution.certified else "NO")
    console.print(certificate)


def _print_policy(console: Console, solution: Solution) -> None:
    """Whole layers of ``π*``, from the first on, as many as fit; a layer too large to read is left out."""
    table = _table("Optimal policy", "layer", "state", "probabilities")
    left_out = 0
    for h, log_policy in enumerate(solution.log_policy):
        rows = solution.mdp.rows(h, log_policy.exp())
        if table.row_count + len(rows) > _MOST_ROWS:
            left_out += 1
            continue
        for s, probabilities in enumerate(rows):
            _row(table, h, s, _listing(probabilities))
    console.print(table)
    if left_out:
        console.print(Text(f"… {left_out} of {solution.mdp.horizon} layers left out; tbrm evaluate --json has all"))
