"""TBRM started at the reference model is not at rest where there is nothing to learn; ReVal is (theory.md X6; [R] Prop. 1).

The reference model's logits are `log π_ref + c(s)`, so its value is `V_ref = c`, as large as it happens to be. Token trees, exact
population losses, plain gradient steps of size 1/H on half the loss from the reference model's logits:

* `curve`: KL(π_θ ‖ π_ref) and the regret after every step, for TBRM and ReVal (`V_θ - V_ref` in place of `V_θ`), without reward
  and with, on data of π_ref and on uniform data;
* `level`: without reward, the loss at the start and the largest KL on the way, for first values `V_ref(s_1)` of different sizes;
* `minimiser`: where Gauss-Newton steps from random logits end without reward: π_ref for both, with V = 0 for TBRM and V = V_ref for
  ReVal.

summary.json: `start_loss_error` (largest relative difference of TBRM's loss at the start from E V_ref²), `reval_start_loss` (largest
of ReVal's), `peak_kl` (largest KL without reward, by method and data), `later_layers_moved` (largest change of log π in layers h ≥ 2
on data of π_ref without reward, TBRM: none, X6.c), `minimiser_kl`, `minimiser_value_error` (largest of both methods), `extra_regret`
(with reward, by data: the area under TBRM's regret curve over that under ReVal's), `unexpected`, `verdict`, `seconds`. Exit status 1
if a loss at the start is not as X6 says, TBRM rests or ReVal moves without reward, or a minimiser is another one.
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
from tbrm_theory.behaviours import MarkovBehaviour
from tbrm_theory.dynamic_programming import kl_to_reference, soft_policy, soft_value
from tbrm_theory.execution import Execution
from tbrm_theory.experiment import run_experiment
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.named_behaviours import uniform
from tbrm_theory.objectives import PopulationObjective
from tbrm_theory.optimisers import levenberg_marquardt
from tbrm_theory.parametrisations import Tabular
from tbrm_theory.program import run_program
from tbrm_theory.shapes import PerLayerStateAction
from tbrm_theory.training import exact_regret

METHODS = ("tbrm", "reval")
DATA = ("reference", "uniform")
MOVED = 1e-3  # a KL above it is a policy that moved
RESTS = 1e-20  # a KL below it is one that did not
NEAR = 1e-9  # of a minimiser, KL and values


@dataclass(frozen=True)
class Config:
    """Settings of the experiment."""

    horizon: int = 3
    vocabulary: int = 4
    prompts: int = 2
    value: float = 3.0
    """V_ref(s_1) of every prompt; later values are drawn, standard normal."""
    values: tuple[float, ...] = (-10.0, -3.0, -1.0, -0.3, -0.1, 0.1, 0.3, 1.0, 3.0, 10.0)
    """Those of the part `level`."""
    steps: int = 200
    seed: int = 0
    results: Path = Path("results")
    execution: tyro.conf.OmitArgPrefixes[Execution] = field(default_factory=Execution)


def problem(config: Config, *, reward: bool) -> RegularizedMDP:
    mdp = tt.make(
        "token-tree",
        seed=config.seed,
        horizon=config.horizon,
        vocabulary=config.vocabulary,
        prompts=config.prompts,
        reference="dirichlet",
    )
    if reward:
        return mdp
    return RegularizedMDP(
        beta=mdp.beta,
        initial=mdp.initial,
        reward=[torch.zeros_like(table) for table in mdp.reward],
        reference=mdp.reference,
        transitions=mdp.transitions,
    )


def reference_logits(mdp: RegularizedMDP, value: float, seed: int) -> PerLayerStateAction:
    """``log π_ref + c(s)``, ``c = value`` in the first layer and random later."""
    generator = torch.Generator().manual_seed(seed)
    offsets = [torch.randn(log.shape[0], 1, generator=generator, dtype=torch.float64) for log in mdp.log_reference]
    offsets[0] = torch.full_like(offsets[0], value)
    return tuple(log + c for log, c in zip(mdp.log_reference, offsets, strict=True))


def behaviour(mdp: RegularizedMDP, data: str) -> PerLayerStateAction:
    return mdp.log_reference if data == "reference" else uniform(mdp).log_policy


def calibrated(logits: PerLayerStateAction, start: PerLayerStateAction, method: str) -> PerLayerStateAction:
    """For ReVal the logits with ``V_ref`` taken off those of layer 1: that turns TBRM's residual into ReVal's (I8.b)."""
    first, *later = logits
    return (first - soft_value(start[0]).unsqueeze(-1), *later) if method == "reval" else logits


def descend(mdp: RegularizedMDP, start: PerLayerStateAction, method: str, data: str, steps: int) -> dict[str, Any]:
    """Plain gradient steps; what the policy does on the way."""
    solution, log_mu = tt.solve(mdp), behaviour(mdp, data)
    logits = start
    curves: dict[str, list[float]] = {"loss": [], "kl": [], "regret": []}
    first_policy = [soft_policy(table) for table in start]
    moved = 0.0
    for step in range(steps + 1):
        own = tuple(table.detach().clone().requires_grad_() for table in logits)
        loss = tt.population_loss(mdp, calibrated(own, start, method), log_mu)
        policy = tuple(soft_policy(table.detach()) for table in own)
        curves["loss"].append(loss.item())
        curves["kl"].append(kl_to_reference(mdp, policy).item())
        curves["regret"].append(exact_regret(mdp, policy, solution).item())
        changes = [(new - old).abs().max().item() for new, old in zip(policy[1:], first_policy[1:], strict=True)]
        moved = max(moved, *changes)
        if step < steps:
            slope = torch.autograd.grad(loss / 2, own)
            logits = tuple(table - change / mdp.horizon for table, change in zip(own, slope, strict=True))
    return curves | {"later_layers_moved": moved}


def minimiser(config: Config, method: str, data: str) -> dict[str, Any]:
    """Where Gauss-Newton steps from random logits end without reward; ReVal's are shifted by V_ref (I8.b)."""
    mdp = problem(config, reward=False)
    tabular, objective = Tabular(mdp), PopulationObjective(mdp, MarkovBehaviour(behaviour(mdp, data)))
    theta = tabular.initial(1, torch.Generator().manual_seed(config.seed))
    found = levenberg_marquardt(objective, tabular, theta)
    logits = tuple(table[0] for table in tabular.logits(found.theta))
    shift = config.value if method == "reval" else 0.0
    value: Tensor = soft_value(logits[0]) + shift
    expected = config.value if method == "reval" else 0.0
    return {
        "kl": kl_to_reference(mdp, tuple(soft_policy(table) for table in logits)).item(),
        "value": value.tolist(),
        "value_error": (value - expected).abs().max().item(),
    }


def curve(config: Config, method: str, data: str, reward: bool) -> dict[str, Any]:
    mdp = problem(config, reward=reward)
    start = reference_logits(mdp, config.value, config.seed)
    expected = config.value**2
    found = descend(mdp, start, method, data, config.steps)
    return {"method": method, "data": data, "reward": reward, "expected_start_loss": expected} | found


def level(config: Config, value: float) -> dict[str, Any]:
    mdp = problem(config, reward=False)
    start = reference_logits(mdp, value, config.seed)
    runs = {method: descend(mdp, start, method, "uniform", config.steps) for method in METHODS}
    losses = {method: found["loss"][0] for method, found in runs.items()}
    return {"value": value, "start_loss": losses, "peak_kl": {m: max(found["kl"]) for m, found in runs.items()}}


def cells(config: Config) -> dict[str, Any]:
    """Every part of the experiment by name, as a function without arguments."""
    parts: dict[str, Any] = {}
    for method in METHODS:
        for data in DATA:
            parts[f"minimiser/{method}/{data}"] = partial(minimiser, config, method, data)
            for reward in (False, True):
                name = f"curve/{method}/{data}/{'reward' if reward else 'none'}"
                parts[name] = partial(curve, config, method, data, reward)
    for value in config.values:
        parts[f"level/{value:g}"] = partial(level, config, value)
    return parts


def summarise(rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The headline numbers; keys are explained in ``--help``."""
    curves = {row["cell"].removeprefix("curve/"): row for row in rows if row["cell"].startswith("curve")}
    levels = [row for row in rows if row["cell"].startswith("level")]
    minima = [row for row in rows if row["cell"].startswith("minimiser")]
    quiet = {name: row for name, row in curves.items() if not row["reward"]}
    errors = [abs(row["start_loss"]["tbrm"] / row["value"] ** 2 - 1) for row in levels]
    errors += [abs(r["loss"][0] / r["expected_start_loss"] - 1) for r in quiet.values() if r["method"] == "tbrm"]
    resting = [row["start_loss"]["reval"] for row in levels]
    resting += [row["loss"][0] for row in quiet.values() if row["method"] == "reval"]
    peaks = {name.removesuffix("/none"): max(row["kl"]) for name, row in quiet.items()}
    still = quiet["tbrm/reference/none"]["later_layers_moved"]
    areas = {d: [sum(curves[f"{m}/{d}/reward"]["regret"]) for m in METHODS] for d in DATA}
    checks = {
        "loss at the start": max(errors) > 1e-12 or max(resting) > 1e-24,
        "TBRM rests": min(kl for name, kl in peaks.items() if name.startswith("tbrm")) < MOVED,
        "ReVal moves": max(kl for name, kl in peaks.items() if name.startswith("reval")) > RESTS,
        "later layers move": still > 1e-12,
        "minimisers": max(max(row["kl"], row["value_error"]) for row in minima) > NEAR,
    }
    bad = [what for what, wrong in checks.items() if wrong]
    return {
        "start_loss_error": max(errors),
        "reval_start_loss": max(resting),
        "peak_kl": peaks,
        "later_layers_moved": still,
        "minimiser_kl": max(row["kl"] for row in minima),
        "minimiser_value_error": max(row["value_error"] for row in minima),
        "extra_regret": {data: tbrm / reval for data, (tbrm, reval) in areas.items()},
        "unexpected": bad,
        "verdict": "as predicted" if not bad else "NOT as predicted",
        "seconds": round(seconds, 1),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """One line a curve."""
    view = Table(
        "method", "data", "reward", "loss at the start", "largest KL", "last KL", "first regret", "last regret"
    )
    for row in rows:
        if row["cell"].startswith("curve"):
            numbers = (row["loss"][0], max(row["kl"]), row["kl"][-1], row["regret"][0], row["regret"][-1])
            view.add_row(row["method"], row["data"], str(row["reward"]), *(f"{value:.2e}" for value in numbers))
    return view


def main(config: Config) -> int:
    if config.horizon < 2 or 0.0 in config.values or config.value == 0:
        raise tt.InvalidInputError("values", "expected values other than 0 and at least two layers")
    return run_experiment(
        "calibrated_start", config, cells(config), summarise, lambda rows, _: [table(rows)], execution=config.execution
    )


if __name__ == "__main__":
    sys.exit(run_program("calibrated_start", lambda: main(tyro.cli(Config, description=__doc__))))
