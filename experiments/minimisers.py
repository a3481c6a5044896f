"""Which losses have the optimal policy as a minimiser, or rest there, and on which data: computed, not asserted.

Every loss of the family (theory.md §5) on six kinds of data: Markov with full support; a mixture of policies on
merged states that does not identify the optimum (X1); data that omit actions (X3); on-policy; and the first and the
last of these on stochastic transitions (X2). All trajectories, or all pairs of them, are listed, so the expected
update is exact. From three starts (the reference, a random one, the optimum with its values) the flow of the expected
update is followed until it rests (`tbrm_theory.fixed_points`). What a method holds is held: the law of on-policy
data, old log-probabilities, frozen values (a loss that freezes values rests where an update frozen there vanishes).
Groups have two rollouts. `ratio 1` takes all data for the policy's own, as trainers without correction do.

Each cell of the table has one of these verdicts over its problems:

* `optimum`: from every start the flow ends at the optimal policy;
* `among others`: it rests at the optimal policy, but from other starts it ends at rest at another one;
* `elsewhere`: it does not rest at the optimal policy, and from every start it ends at rest at another one;
* `nowhere`: it does not rest at the optimal policy, and from some start no rest was found: a clipped update jumps, or a probability
  goes to 0.

That it does not rest at the optimal policy is seen, not concluded from a solver that found nothing: from there the flow went to
another policy. Else the cell is `unclear`, as it is where a point of rest is neither the optimal policy nor clear of it.

Predicted are the first two, and that the verdict is one of the last two for all others: `PREDICTED`, with the theorems.

A row of metrics.jsonl has for each start `regret` (over that of the reference), `rests`, `residual` (largest entry of
the update over the largest at the starts), `least_eigenvalue` (of its Jacobian, over the largest; negative beyond
rounding: a saddle), `asymmetry` (of the Jacobian; 0: as at a minimum of a function, else the fixed point of a field),
`steps`; and its `verdict` and `batches`, the number of trajectories or pairs listed.

summary.json: `verdicts` and `regrets` (by loss and kind of data; the latter the largest from the reference,
relative), `wrong` (cells that came out otherwise), `largest_regret_at_optimum` (over all cells with the verdict
`optimum`), `largest_residual` and `least_eigenvalue` (over all points of rest), `minimisers` and `fixed_points` (how
many of these have a symmetric Jacobian, and how many not), `unexpected`, `verdict`, `seconds`. Exit status 1 if a
cell is not as predicted, or a point of rest is a saddle.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # Ctrl-C while packages load, which some of them do not survive
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import torch
import tyro
from rich.table import Table

import tbrm_theory as tt
from tbrm_theory.behaviours import Components
from tbrm_theory.execution import Execution
from tbrm_theory.expected_updates import ExpectedUpdate
from tbrm_theory.experiment import run_experiment
from tbrm_theory.fixed_points import rest
from tbrm_theory.losses import LOSSES
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.named_behaviours import random_markov
from tbrm_theory.program import run_program
from tbrm_theory.random_tables import seeded

OPTIMUM, AMONG, ELSEWHERE, NOWHERE = "optimum", "among others", "elsewhere", "nowhere"
EXACT, OFF = 1e-16, 1e-10
"""A relative regret below the first is the optimum's, one above the second another policy's; between them lies nothing."""
SYMMETRIC = 1e-6
"""An asymmetry below this is no more than the error of differences."""
SADDLE = -1e-6
"""A relative eigenvalue below this is no rounding."""
STARTS = ("reference", "random", "optimum")

VARIANTS: dict[str, dict[str, Any]] = {name: {"loss": name} for name in LOSSES} | {
    "rloo, ratio 1": {"loss": "rloo", "ratio_one": True},
    "ppo, ratio 1, no entropy": {"loss": "ppo", "ratio_one": True, "options": {"entropy_coefficient": 0.0}},
}
"""The rows of the table."""

KINDS = ("full support", "mixture", "uncovered", "on-policy", "noise", "noise, on-policy")
"""The columns."""
_YES, _MANY, _NO = OPTIMUM, AMONG, "no"
_SAME_SQUARE = (
    _YES,
    _MANY,
    _MANY,
    _YES,
    _NO,
    _YES,
)  # C1, C2; X1, X3: not identified; X2: bias off-policy only (I9, F4)
_PER_STEP = (_YES, _YES, _MANY, _YES, _NO, _NO)  # X1 does not fool a square per step; noise does, on-policy too (F4)
_TARGETS_FROZEN = (_YES, _YES, _MANY, _YES, _YES, _YES)  # the mean of the target is all that counts (F7)
_VALUE_FROZEN = (
    _MANY,
    _MANY,
    _MANY,
    _YES,
    _NO,
    _YES,
)  # any V is kept, except where its coefficient has mean 0 (F6, F4)
_NEVER = (_NO,) * 6
PREDICTED: dict[str, tuple[str, ...]] = {
    "tbrm": _SAME_SQUARE,
    "tbrm-first-logit": _SAME_SQUARE,
    "tbrm-iterative": _VALUE_FROZEN,
    "reval": _SAME_SQUARE,
    "brm": _PER_STEP,
    "sql-one-step": (_MANY,) * 6,  # at Q* the residual has mean 0 given (s,a), and nothing trains V
    "sql-multi-step": _VALUE_FROZEN,
    "sql-one-step-q": _TARGETS_FROZEN,
    "sql-multi-step-q": _TARGETS_FROZEN,
    "pcl-one-step": _PER_STEP,
    "pcl-multi-step": (_YES, _YES, _MANY, _YES, _NO, _YES),
    "trajectory-balance": _SAME_SQUARE,
    "vargrad": _SAME_SQUARE,
    "kimi": _NEVER,  # F4: a mean over the group knows the rollout that it is taken from
    "dro": _SAME_SQUARE,
    "a-star-po": _SAME_SQUARE,
    "pairwise": _SAME_SQUARE,
    "dpo": (_YES, _MANY, _MANY, _YES, _NO, _NO),  # the label is not linear in the return
    "reinforce": (_NO, _NO, _NO, _YES, _NO, _YES),  # I9; off-policy the baseline 0 is a wrong V
    "rloo": (_NO, _NO, _NO, _YES, _NO, _YES),  # F5, I9; off-policy its KL is that of the data
    "grpo": _NEVER,  # F4: another divergence, and a group mean that includes the rollout
    "dr-grpo": _NEVER,
    "dapo": _NEVER,  # no divergence at all
    "ppo": _NEVER,  # the entropy bonus on-policy, the clip and the KL of the data off-policy
    "rloo, ratio 1": _SAME_SQUARE,  # F5
    "ppo, ratio 1, no entropy": _TARGETS_FROZEN,  # F7
}
"""For each kind of data whether the loss ends at the optimum, at it among others, or at others."""


@dataclass(frozen=True)
class Config:
    """Settings of the experiment."""

    losses: tuple[str, ...] = tuple(VARIANTS)
    """Rows of the table."""
    problems: int = 2
    """For each kind of data."""
    seed: int = 0
    execution: tyro.conf.OmitArgPrefixes[Execution] = field(default_factory=Execution)
    results: Path = Path("results")


# -- problems --------------------------------------------------------------------------------------------------------


def only(mdp: RegularizedMDP, taken: Callable[[int], tuple[int, ...]]) -> tuple[torch.Tensor, ...]:
    """``log`` of the policy that is uniform on the actions ``taken(h)`` of layer ``h``, in every state."""
    tables = []
    for h, reference in enumerate(mdp.reference):
        table = torch.full_like(reference, -torch.inf)
        table[..., list(taken(h))] = 0.0
        tables.append(torch.log_softmax(table, dim=-1))
    return tuple(tables)


def problem(kind: str, number: int, seed: int) -> tuple[RegularizedMDP, Components | None]:
    """A problem small enough to list all pairs of trajectories, and the policies that draw its data; None for the own."""
    made: dict[str, Any] = {"seed": seed + number, "beta": 0.5, "reference": "dirichlet"}
    if kind == "mixture":
        if number % 2 == 0:
            mdp = tt.make("one-state", horizon=2, actions=2, **made)
            return mdp, [(0.5, only(mdp, lambda h: (0,))), (0.5, only(mdp, lambda h: (1,)))]
        mdp = tt.make("one-state", horizon=2, actions=3, **made)
        return mdp, [(0.6, only(mdp, lambda h: (0, 1))), (0.4, only(mdp, lambda h: (2,)))]
    if kind == "uncovered":
        if number % 2 == 0:
            mdp = tt.make("one-state", horizon=1, actions=4, **made)
        else:
            mdp = tt.make("token-tree", horizon=2, vocabulary=4, rewards="step", **made)
        return mdp, [(1.0, only(mdp, lambda h: (0, 1)))]
    if kind in ("full support", "on-policy"):
        if number % 2 == 0:
            mdp = tt.make("deterministic-dag", horizon=2, states=2, actions=2, **made)
        else:
            mdp = tt.make("token-tree", horizon=2, vocabulary=2, prompts=2, rewards="step", **made)
    else:
        mdp = tt.make("dense-random", horizon=2, states=2, actions=2, **made)
    return mdp, None if kind.endswith("on-policy") else random_markov(mdp, seed + number).components


# -- cells -----------------------------------------------------------------------------------------------------------


def cell(row: str, kind: str, number: int, seed: int) -> dict[str, Any]:
    """Where the loss ends from each start."""
    mdp, data = problem(kind, number, seed)
    update = ExpectedUpdate(mdp, data=data, **VARIANTS[row])
    nothing = tuple(torch.zeros_like(value) for value in update.solution.v)
    reference = update.row(mdp.log_reference, nothing)
    noise = torch.randn(reference.shape, generator=seeded(seed + number), dtype=torch.float64)
    found = rest(update, torch.stack([reference, reference + noise, update.optimum]), steps=100)
    regret = tt.regret(mdp, update.log_policy(found.point), solution=update.solution)
    scale = tt.regret(mdp, mdp.log_reference, solution=update.solution)
    made = {
        "loss": row,
        "kind": kind,
        "problem": number,
        "batches": update.batch_count,
        "regret": dict(zip(STARTS, (regret / scale).tolist(), strict=True)),
        "rests": dict(zip(STARTS, found.converged.tolist(), strict=True)),
        "residual": dict(zip(STARTS, found.residual.tolist(), strict=True)),
        "least_eigenvalue": dict(zip(STARTS, found.least_eigenvalue.tolist(), strict=True)),
        "asymmetry": dict(zip(STARTS, found.asymmetry.tolist(), strict=True)),
        "steps": dict(zip(STARTS, found.steps.tolist(), strict=True)),
    }
    return made | {"verdict": verdict(made)}


def verdict(row: dict[str, Any]) -> str:
    """Of one problem; ``unclear`` where a regret is neither the optimum's nor another policy's, or the optimum was not left."""
    regret, rests = row["regret"], row["rests"]
    if any(rests[start] and EXACT < regret[start] < OFF for start in STARTS):
        return "unclear"
    right = {start: rests[start] and regret[start] <= EXACT for start in STARTS}
    if all(right.values()):
        return OPTIMUM
    if right["optimum"]:
        return AMONG if all(rests.values()) else "unclear"
    left = row["steps"]["optimum"] > 0 and regret["optimum"] >= OFF
    if any(right.values()) or not left:
        return "unclear"
    return ELSEWHERE if all(rests.values()) else NOWHERE


def worst(verdicts: list[str]) -> str:
    """Of several problems; those with and without rest at the optimum do not mix."""
    found = set(verdicts)
    for pair, both in (({OPTIMUM, AMONG}, AMONG), ({ELSEWHERE, NOWHERE}, NOWHERE)):
        if found <= pair:
            return both if len(found) == 2 else found.pop()
    return "unclear"


# -- summary ---------------------------------------------------------------------------------------------------------


def as_predicted(row: str, kind: str, found: str) -> bool:
    predicted = PREDICTED[row][KINDS.index(kind)]
    return found in (ELSEWHERE, NOWHERE) if predicted == _NO else found == predicted


def summarise(rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The headline numbers; keys are explained in ``--help``."""
    names = list(dict.fromkeys(row["loss"] for row in rows))
    cells = {
        (name, kind): [r for r in rows if (r["loss"], r["kind"]) == (name, kind)] for name in names for kind in KINDS
    }
    verdicts = {key: worst([row["verdict"] for row in group]) for key, group in cells.items()}
    at_rest = [(row, start) for row in rows for start in STARTS if row["rests"][start]]
    saddles = [
        f"{row['cell']} from {start}: saddle" for row, start in at_rest if row["least_eigenvalue"][start] < SADDLE
    ]
    wrong = [
        f"{name} | {kind}: {found}" for (name, kind), found in verdicts.items() if not as_predicted(name, kind, found)
    ]
    exact = [row for key, group in cells.items() if verdicts[key] == OPTIMUM for row in group]
    symmetric = sum(row["asymmetry"][start] < SYMMETRIC for row, start in at_rest)
    bad = wrong + saddles
    return {
        "verdicts": _by_loss(names, verdicts),
        "regrets": _by_loss(names, {key: max(r["regret"]["reference"] for r in group) for key, group in cells.items()}),
        "wrong": wrong,
        "largest_regret_at_optimum": max((max(row["regret"].values()) for row in exact), default=0.0),
        "largest_residual": max(row["residual"][start] for row, start in at_rest),
        "least_eigenvalue": min(row["least_eigenvalue"][start] for row, start in at_rest),
        "minimisers": symmetric,
        "fixed_points": len(at_rest) - symmetric,
        "unexpected": bad,
        "verdict": "as predicted" if not bad else "NOT as predicted",
        "seconds": round(seconds, 1),
    }


def _by_loss(names: list[str], found: dict[tuple[str, str], Any]) -> dict[str, dict[str, Any]]:
    return {name: {kind: found[name, kind] for kind in KINDS} for name in names}


def table(summary: dict[str, Any]) -> Table:
    """Verdicts with the regret from the reference start."""
    view = Table("loss", *KINDS)
    for name, verdicts in summary["verdicts"].items():
        regrets = summary["regrets"][name]
        view.add_row(name, *(f"{found} {regrets[kind]:.0e}" for kind, found in verdicts.items()))
    return view


def main(config: Config) -> int:
    unknown = [name for name in config.losses if name not in VARIANTS]
    if unknown or not config.losses:
        raise tt.InvalidInputError("losses", f"expected some of {', '.join(VARIANTS)}, found {unknown}")
    if config.problems < 1:
        raise tt.InvalidInputError("problems", f"expected at least 1, found {config.problems}")
    made = {
        f"{row}/{kind}/{number}": partial(cell, row, kind, number, config.seed)
        for row in config.losses
        for kind in KINDS
        for number in range(config.problems)
    }
    shown = ("verdicts", "regrets")
    return run_experiment(
        "minimisers", config, made, summarise, lambda _, s: [table(s)], in_tables=shown, execution=config.execution
    )


if __name__ == "__main__":
    sys.exit(run_program("minimisers", lambda: main(tyro.cli(Config, description=__doc__))))
