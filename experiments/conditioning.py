"""Why is BRM slow, and why does it get worse first, with outcome reward? (theory.md X7; [Y] App. H.3)

Two parts.

* `condition`: condition numbers of the Gauss-Newton matrices of TBRM and BRM at uniform logits and data, plain and scaled to a
  unit diagonal (what an optimiser with a step size for each parameter sees): one state per layer, binary trees, combination
  locks;
* `train`: the delayed sum, H choices of which each right one is worth β, paid at the end only; the state counts them. So every
  layer matters alike, and the horizon is a number to turn. Exact population losses, Adam, and plain gradient descent (step
  1/λ_max on half the loss), from the reference policy with logits `log π_ref + c(s)`, c normal with standard deviation
  `spread`: calibrated (V = 0) for spread 0, otherwise raw as a language model's; data of π_ref, or of the current policy.
  Recorded: the steps until the regret is a tenth of the first, the worst regret on the way, and the steps until the first
  layer's policy has gone a tenth of its way.

What comes out. (1) Plain condition numbers blame both losses on trees; a unit diagonal takes away TBRM's dependence on H and
leaves BRM's H². (2) That slows plain gradient descent on BRM, where the reward moves one layer a step (X7.d). But from calibrated
logits BRM with Adam never gets worse, and on data of π_ref it is about as fast as TBRM; on data of the current policy TBRM's
steps stop growing with H, BRM's do not. So conditioning and propagation are slowness, no collapse. (3) From raw logits BRM gets
worse first, the more so the larger the spread, and does not recover in time; TBRM hardly notices. BRM takes `c(s_h) - c(s_{h+1})`
for a reward in every step, of which TBRM sees `c(s_1)` alone (I8): the same problem, policy, data and optimiser, and only the
gauge changed. That a language model's V_ref(s) is raw in this sense is what makes it a candidate for [Y] App. H.3; nothing here
is a run of a language model.

summary.json: `condition` (by family and H: TBRM, BRM, both scaled), `exponents` (slope of BRM's against H on one state per layer,
H ≥ 4, with a 95 % interval; TBRM's do not depend on H), `steps_exponents` (slope of the steps to a tenth against H, calibrated,
data of π_ref, if at least three horizons get there), `steps`, `worst` (worst regret over the first), `first_layer` (all by kind
of run and horizon; -1 is never), `unexpected`, `verdict`, `seconds`. Exit status 1 if one state per layer, H = 10, is not 1.0 and
175, or the tree, H = 7, not 64 and 321; BRM's exponents leave [1.7, 2.3]; at the longest horizon gradient descent on BRM is not
slower than on TBRM, or Adam on BRM takes more than twice TBRM's steps or gets worse, from calibrated logits and data of π_ref; or
with Adam and the largest spread BRM's regret does not grow by a fifth, or TBRM's grows at all by more than a twentieth.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # Ctrl-C while packages load, which some of them do not survive
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import torch
import tyro
from rich.table import Table
from torch import Tensor

import tbrm_theory as tt
from tbrm_theory.conditioning import spectrum
from tbrm_theory.dynamic_programming import soft_policy
from tbrm_theory.execution import Execution
from tbrm_theory.experiment import run_experiment
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.program import run_program
from tbrm_theory.statistics import log_log_slope
from tbrm_theory.training import exact_regret
from tbrm_theory.transitions import DeterministicTransition

LOSSES = ("tbrm", "brm")
DATA = ("reference", "own")
OPTIMISERS = ("adam", "gd")
HORIZONS = {"one-state": (2, 3, 4, 6, 8, 10, 14, 20, 28), "deterministic-tree": tuple(range(2, 9))}
HORIZONS["combination-lock"] = (2, 3, 4, 6, 8, 10, 14, 20)
TENTH = 0.1


@dataclass(frozen=True)
class Config:
    """Settings of the experiment."""

    horizons: tuple[int, ...] = (2, 4, 8, 16)
    """Of the part `train`; at least three."""
    steps: int = 700
    """At most so many; fewer once every run of a loss is where it should be."""
    learning_rate: float = 0.03
    """Adam's."""
    spreads: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 4.0)
    """Standard deviations of the raw values c(s), rising from 0."""
    seed: int = 0
    results: Path = Path("results")
    execution: tyro.conf.OmitArgPrefixes[Execution] = field(default_factory=Execution)


def delayed_sum(horizon: int) -> RegularizedMDP:
    """β for every right action, action 0, paid at the end; state s of a layer: s right ones so far."""
    kernels = []
    for h in range(horizon - 1):
        count = torch.arange(h + 1)
        kernels.append(DeterministicTransition(torch.stack([count + 1, count], dim=-1), h + 2))
    total = torch.arange(horizon, dtype=torch.float64)
    reward = [torch.zeros(h + 1, 2, dtype=torch.float64) for h in range(horizon - 1)]
    return RegularizedMDP(
        beta=1.0,
        initial=torch.ones(1),
        reward=[*reward, torch.stack([total + 1, total], dim=-1)],
        reference=[torch.full((h + 1, 2), 0.5, dtype=torch.float64) for h in range(horizon)],
        transitions=kernels,
    )


def condition(family: str, horizon: int) -> dict[str, Any]:
    options = {"horizon": horizon, **({} if family == "combination-lock" else {"actions": 2})}
    mdp = tt.make(family, **options)
    zero = tuple(torch.zeros_like(table) for table in mdp.reference)
    numbers = {}
    for loss in LOSSES:
        for scaled in (False, True):
            eigenvalues = spectrum(mdp, zero, mdp.log_reference, loss=loss, scaled=scaled)
            numbers[loss + (", scaled" if scaled else "")] = (eigenvalues[-1] / eigenvalues[0]).item()
    return {"family": family, "horizon": horizon, "condition": numbers}


def train(horizon: int, loss: str, optimiser: str, config: Config) -> dict[str, Any]:
    """All spreads × data at once, one batch of runs that share nothing but the code and the draw of c."""
    mdp, generator = delayed_sum(horizon), torch.Generator().manual_seed(config.seed)
    solution = tt.solve(mdp)
    shape = (len(config.spreads), len(DATA), 1, 1)
    raw = torch.tensor(config.spreads, dtype=torch.float64).reshape(-1, 1, 1, 1)
    own = []
    for log in mdp.log_reference:
        c = torch.randn(len(log), 1, generator=generator, dtype=torch.float64)
        own.append((log + raw * c).expand(*shape[:2], *log.shape).clone().requires_grad_())
    if optimiser == "adam":
        update: torch.optim.Optimizer = torch.optim.Adam(own, lr=config.learning_rate)
    else:
        steepest = spectrum(mdp, mdp.log_reference, mdp.log_reference, loss=loss)[-1].item()
        update = torch.optim.SGD(own, lr=1 / steepest)
    from_reference = torch.tensor([name == "reference" for name in DATA]).reshape(1, -1, 1, 1)
    goal = (solution.log_policy[0] - mdp.log_reference[0]).abs().max()
    regrets, moved = [], torch.full(shape[:2], -1)
    for step in range(config.steps + 1):
        policy = tuple(soft_policy(table.detach()) for table in own)
        data = tuple(torch.where(from_reference, log, new) for log, new in zip(mdp.log_reference, policy, strict=True))
        value = tt.population_loss(mdp, tuple(own), data, loss=loss)
        regrets.append(exact_regret(mdp, policy, solution))
        gone = (policy[0] - mdp.log_reference[0]).abs().amax((-2, -1)) >= TENTH * goal
        moved = torch.where((moved < 0) & gone, step, moved)
        if bool((regrets[-1] <= TENTH * regrets[0]).all()) and bool((moved >= 0).all()):
            break
        update.zero_grad()
        (value.sum() / 2).backward()
        update.step()
    curve = torch.stack(regrets, dim=-1) / regrets[0].unsqueeze(-1)
    return {
        "horizon": horizon,
        "loss": loss,
        "optimiser": optimiser,
        "runs": {
            f"spread {spread:g}, {data}": _run(curve[i, j], int(moved[i, j]))
            for i, spread in enumerate(config.spreads)
            for j, data in enumerate(DATA)
        },
    }


def _run(curve: Tensor, moved: int) -> dict[str, Any]:
    """Of one curve of regrets over the first one; -1 is never."""
    reached = (curve <= TENTH).nonzero()
    return {
        "steps": int(reached[0]) if len(reached) else -1,
        "worst": curve.max().item(),
        "first_layer": moved,
        "curve": [float(f"{value:.4g}") for value in curve.tolist()],
    }


def summarise(rows: list[dict[str, Any]], config: Config, seconds: float) -> dict[str, Any]:
    """The headline numbers; keys are explained in ``--help``."""
    conditions = {f"{row['family']}/{row['horizon']}": row["condition"] for row in rows if "condition" in row}
    trained = [row for row in rows if "runs" in row]
    one_state = [row for row in rows if row.get("family") == "one-state" and row["horizon"] >= 4]
    exponents = {}
    for name in ("brm", "brm, scaled"):
        slope = log_log_slope([r["horizon"] for r in one_state], [r["condition"][name] for r in one_state])
        exponents[name] = [slope.slope, *slope.interval]
    bad = [
        f"exponent of {n}: {exponents[n][0]:.2f}" for n in ("brm", "brm, scaled") if not 1.7 <= exponents[n][0] <= 2.3
    ]
    for cell, expected in (("one-state/10", (1.0, 175.09)), ("deterministic-tree/7", (64.0, 321.26))):
        for loss, number in zip(LOSSES, expected, strict=True):
            if abs(conditions[cell][loss] / number - 1) > 1e-4:
                bad.append(f"{cell}: {loss} {conditions[cell][loss]}")

    def by_horizon(run: str, what: str) -> dict[str, dict[str, Any]]:
        return {
            f"{loss}, {optimiser}, {run}": {
                str(row["horizon"]): row["runs"][run][what]
                for row in trained
                if (row["loss"], row["optimiser"]) == (loss, optimiser)
            }
            for loss in LOSSES
            for optimiser in OPTIMISERS
        }

    names = [f"spread {spread:g}, {data}" for spread in config.spreads for data in DATA]
    steps, worst, first_layer = (
        {name: by for run in names for name, by in by_horizon(run, what).items()}
        for what in ("steps", "worst", "first_layer")
    )
    growth, longest = {}, str(max(config.horizons))
    for name in by_horizon("spread 0, reference", "steps"):
        finished = {int(h): count for h, count in steps[name].items() if count > 0}
        if len(finished) >= 3:
            slope = log_log_slope(list(finished), list(finished.values()))
            growth[name] = [slope.slope, *slope.interval]
    calm = {f"{loss}, {o}": f"{loss}, {o}, spread 0, reference" for loss in LOSSES for o in OPTIMISERS}
    count = {run: steps[name][longest] for run, name in calm.items()}
    rough = {loss: worst[f"{loss}, adam, spread {config.spreads[-1]:g}, reference"][longest] for loss in LOSSES}
    adam = count["tbrm, adam"] if count["tbrm, adam"] >= 0 else config.steps
    checks = {
        "gradient descent on BRM is not slower": count["tbrm, gd"] < 0 or 0 <= count["brm, gd"] <= count["tbrm, gd"],
        "Adam on calibrated BRM is slow": not 0 <= count["brm, adam"] <= 2 * adam,
        "calibrated BRM gets worse": worst[calm["brm, adam"]][longest] > 1 + 1e-9,
        "raw BRM does not get worse": rough["brm"] < 1.2,
        "raw TBRM gets worse": rough["tbrm"] > 1.05,
    }
    bad += [what for what, wrong in checks.items() if wrong]
    return {
        "condition": conditions,
        "exponents": exponents,
        "steps_exponents": growth,
        "steps": steps,
        "worst": worst,
        "first_layer": first_layer,
        "unexpected": bad,
        "verdict": "as predicted" if not bad else "NOT as predicted",
        "seconds": round(seconds, 1),
    }


def table(summary: dict[str, Any]) -> Table:
    """One line a kind of run: steps to a tenth of the regret, and the worst regret over the first, by horizon."""
    horizons = list(next(iter(summary["steps"].values())))
    view = Table(
        "loss, optimiser, start, data", *(f"steps, H={h}" for h in horizons), *(f"worst, H={h}" for h in horizons)
    )
    for name, counts in summary["steps"].items():
        worst = (f"{value:.2f}" for value in summary["worst"][name].values())
        view.add_row(name, *(str(count) if count >= 0 else "-" for count in counts.values()), *worst)
    return view


def cells(config: Config) -> dict[str, Any]:
    """Every part of the experiment by name, as a function without arguments."""
    parts: dict[str, Any] = {
        f"condition/{family}/{h}": partial(condition, family, h) for family in HORIZONS for h in HORIZONS[family]
    }
    for horizon in config.horizons:
        for loss in LOSSES:
            for optimiser in OPTIMISERS:
                name = f"train/{horizon}/{loss}/{optimiser}"
                parts[name] = partial(train, horizon, loss, optimiser, config)
    return parts


def main(config: Config) -> int:
    if len(set(config.horizons)) < 3 or min(config.horizons) < 2:
        raise tt.InvalidInputError("horizons", "expected at least three, each at least 2")
    if config.spreads[0] != 0 or len(config.spreads) < 2:
        raise tt.InvalidInputError("spreads", "expected 0 first, and another")
    return run_experiment(
        "conditioning",
        config,
        cells(config),
        lambda rows, seconds: summarise(rows, config, seconds),
        lambda _, summary: [table(summary)],
        in_tables=("condition", "steps", "worst", "first_layer"),
        execution=config.execution,
    )


if __name__ == "__main__":
    sys.exit(run_program("conditioning", lambda: main(tyro.cli(Config, description=__doc__))))
