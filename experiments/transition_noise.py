"""How wrong does TBRM get as transitions get noisier, and what takes the bias away? (theory.md X2, I7; O2)

Every deterministic problem is mixed with noise: with probability ε the next state is drawn uniformly from the states of its layer
that can be reached, whatever the action; at ε = 1 actions lead nowhere. For each ε the exact population minimisers, on uniform
data, and their exact regrets:

* `tbrm`: the trajectory residual of [Y] Eq. 4, the better of two starts (the optimum, and logits 0);
* `brm`: the sampled per-step residual of [Y] Eq. 3, started at the optimum;
* `corrected`: TBRM with the control variate V_θ(s') - E[V_θ(s')|s,a] in every step, which has the same population loss as two
  fresh next states for each pair (double sampling), started at logits 0, far from the optimum (O2);
* `learned`: the same with a kernel estimated from `--episodes` trajectories; its minimiser is the plan of that model (O2.e);
* `optimal data`: `tbrm` on data of the optimum itself, started beside it. There θ* stays stationary, but it is a minimum only as
  long as the mean bad luck on the way to any state, recorded as `worst_luck`, is below 1 (X2.b); then it is left.

Subtracting the variance E ΣVar V_θ(s') instead is no remedy: its slope at θ* is not 0 (O2.f), which `variance_slope` records, and
along I8's gauge it falls without bound.

summary.json: `deterministic_regret` (largest regret of TBRM at ε = 0), `corrected_regret` (largest of the corrected loss),
`largest_bias`, `brm_largest_bias`, `learned_largest_bias` (by family, the largest regret as a share of the reference policy's),
`above_floor` (cells at which TBRM's least loss is above the noise floor), `regret_exponent` and `floor_exponent` (by family, the
slope b of regret ~ ε^b and floor ~ ε^b for ε ≤ 1e-4, with a 95 % interval), `saddles` (cells at which θ* on its own data is left)
and `saddles_predicted` (those with bad luck above 1), `variance_slope` (least slope of the variance-subtracted loss at θ* for ε ≥
0.1), `unexpected`, `verdict`, `seconds`. Exit status 1 if TBRM is wrong at ε = 0, above the floor, or right at ε = 0.3; if the
corrected loss is wrong anywhere; if θ* on its own data is left or kept against X2.b; or if the exponent is not 2 within 0.1, as
first-order perturbation says: the slope at θ* is of order ε, and a regret is quadratic in what moves.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # Ctrl-C while packages load, which some of them do not survive
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import numpy as np
import scipy.optimize
import torch
import tyro
from rich.table import Table
from torch import Tensor

import tbrm_theory as tt
from tbrm_theory.control_variate import corrected_loss, noise_before
from tbrm_theory.dynamic_programming import soft_value
from tbrm_theory.execution import Execution
from tbrm_theory.experiment import run_experiment
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.named_behaviours import uniform
from tbrm_theory.occupancy import occupancy
from tbrm_theory.parametrisations import Tabular
from tbrm_theory.population import noise_floor
from tbrm_theory.program import run_program
from tbrm_theory.shapes import PerLayerStateAction
from tbrm_theory.statistics import log_log_slope
from tbrm_theory.training import exact_regret
from tbrm_theory.transitions import DenseTransition

FAMILIES: dict[str, dict[str, Any]] = {
    "chain": {"horizon": 4, "states": 4},
    "combination-lock": {"horizon": 4},
    "deterministic-dag": {"horizon": 3, "states": 3, "actions": 2},
    "token-tree": {"horizon": 3, "vocabulary": 2},
}
METHODS = ("tbrm", "brm", "corrected", "learned", "optimal data")
EXACT, WRONG = 1e-9, 1e-6  # regrets: below the one a policy is right, above the other it is wrong
SMALL_NOISE = 1e-4


@dataclass(frozen=True)
class Config:
    """Settings of the experiment."""

    noise: tuple[float, ...] = (0.0, 1e-5, 3e-5, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1.0)
    """The probabilities ε; 0, 0.3 and three up to 1e-4 are needed for the verdict."""
    families: tuple[str, ...] = tuple(FAMILIES)
    episodes: int = 10_000
    """Trajectories that the learned kernel is estimated from."""
    seed: int = 0
    results: Path = Path("results")
    execution: tyro.conf.OmitArgPrefixes[Execution] = field(default_factory=Execution)


def noisy(mdp: RegularizedMDP, noise: float) -> RegularizedMDP:
    """The problem in which, with probability ``noise``, every state of the next layer that can be reached is as likely as another."""
    kernels = []
    for kernel, mass in zip(mdp.transitions, occupancy(mdp, mdp.log_reference).state[1:], strict=True):
        reached = (mass > 0).double()
        successors, probability = kernel.edges()
        table = torch.zeros(kernel.shape, dtype=torch.float64).scatter_add(-1, successors, probability)
        kernels.append(DenseTransition((1 - noise) * table + noise * reached / reached.sum()))
    return with_kernels(mdp, kernels)


def with_kernels(mdp: RegularizedMDP, kernels: list[DenseTransition]) -> RegularizedMDP:
    return RegularizedMDP(
        beta=mdp.beta, initial=mdp.initial, reward=mdp.reward, reference=mdp.reference, transitions=kernels
    )


def minimise(mdp: RegularizedMDP, loss: Callable[[PerLayerStateAction], Tensor], start: PerLayerStateAction) -> Any:
    """The logits at a local minimum, and the loss there: Newton steps in a trust region, with exact derivatives."""
    tabular = Tabular(mdp, loss="brm")

    def value(theta: Tensor) -> Tensor:
        return loss(tabular.logits(theta))

    def gradient(point: Any) -> Any:
        leaf = torch.from_numpy(point).requires_grad_()
        return torch.autograd.grad(value(leaf), leaf)[0].numpy()

    def hessian(point: Any) -> Any:
        copies = torch.from_numpy(point).repeat(len(point), 1).requires_grad_()  # copy i is for row i
        (slope,) = torch.autograd.grad(value(copies).sum(), copies, create_graph=True)
        return torch.autograd.grad(slope.diagonal().sum(), copies)[0].numpy()

    found = scipy.optimize.minimize(
        lambda point: value(torch.from_numpy(point)).item(),
        tabular.parameters(start).numpy(),
        jac=gradient,
        hess=hessian,
        method="trust-exact",
        options={"gtol": 1e-11, "maxiter": 60},
    )
    return tabular.logits(torch.from_numpy(found.x)), float(found.fun)


def learned_kernels(mdp: RegularizedMDP, data: PerLayerStateAction, episodes: int, seed: int) -> list[DenseTransition]:
    """Frequencies of next states in ``episodes`` visits shared out as ``d^μ`` says, one pseudo-count for each layer."""
    generator = torch.Generator().manual_seed(seed)
    kernels = []
    for kernel, mass in zip(mdp.transitions, occupancy(mdp, data).state_action, strict=False):
        successors, probability = kernel.edges()
        following = kernel.shape[-1]
        counts = torch.full(kernel.shape, 1 / following, dtype=torch.float64)
        for (s, a), share in np.ndenumerate(mass.numpy()):
            visits = round(episodes * float(share))
            if visits:
                drawn = torch.multinomial(probability[s, a], visits, replacement=True, generator=generator)
                counts[s, a] += torch.bincount(successors[s, a][drawn], minlength=following)
        kernels.append(DenseTransition(counts / counts.sum(-1, keepdim=True)))
    return kernels


def variance_slope(mdp: RegularizedMDP, optimum: PerLayerStateAction, data: PerLayerStateAction) -> float:
    """The norm of the slope at θ* of TBRM's loss less ``E_μ Σ_h Var(V_θ(s_{h+1})|s_h,a_h)``."""
    tabular = Tabular(mdp, loss="brm")
    theta = tabular.parameters(optimum).requires_grad_()
    logits = tabular.logits(theta)
    loss = tt.population_loss(mdp, logits, data)
    for h, kernel in enumerate(mdp.transitions):
        loss = loss - (occupancy(mdp, data).state_action[h] * kernel.variance(soft_value(logits[h + 1]))).sum()
    return float(torch.autograd.grad(loss, theta)[0].norm())


def worst_luck(mdp: RegularizedMDP, optimum: PerLayerStateAction) -> float:
    """``max b_h(s)`` of X2.b over states that the optimum reaches."""
    masses = occupancy(mdp, optimum).state
    lucks = [before / mass for before, mass in zip(noise_before(mdp, optimum), masses, strict=True)]
    return max(luck[mass > 0].max().item() for luck, mass in zip(lucks, masses, strict=True))


def run_cell(family: str, noise: float, config: Config) -> dict[str, Any]:
    """The regrets and losses of every method at one noise level."""
    started = time.perf_counter()
    mdp = noisy(tt.make(family, seed=config.seed, **FAMILIES[family]), noise)
    solution, data = tt.solve(mdp), uniform(mdp).log_policy
    nought = tuple(torch.zeros_like(table) for table in mdp.reference)
    beside = tuple(q + 0.01 * torch.sin(torch.arange(q.numel())).reshape(q.shape) for q in solution.q)
    tbrm = [minimise(mdp, lambda q: tt.population_loss(mdp, q, data), start) for start in (solution.q, nought)]
    learned = with_kernels(mdp, learned_kernels(mdp, data, config.episodes, config.seed))
    found = {
        "tbrm": min(tbrm, key=lambda pair: pair[1]),
        "brm": minimise(mdp, lambda q: tt.population_loss(mdp, q, data, loss="brm"), solution.q),
        "corrected": minimise(mdp, lambda q: corrected_loss(mdp, q, data), nought),
        "learned": (tt.solve(learned).q, 0.0),
        "optimal data": minimise(mdp, lambda q: tt.population_loss(mdp, q, solution.log_policy), beside),
    }
    return {
        "family": family,
        "noise": noise,
        "regret": {name: exact_regret(mdp, logits, solution).item() for name, (logits, _) in found.items()},
        "loss": {name: loss for name, (_, loss) in found.items()},
        "noise_floor": noise_floor(mdp, data).item(),
        "reference_regret": tt.regret(mdp, mdp.log_reference).item(),
        "worst_luck": worst_luck(mdp, solution.log_policy),
        "variance_slope": variance_slope(mdp, solution.q, data),
        "seconds": round(time.perf_counter() - started, 2),
    }


def unexpected(row: dict[str, Any]) -> list[str]:
    """What went against the theory in one cell."""
    regret, noise = row["regret"], row["noise"]
    checks = {
        "TBRM wrong without noise": noise == 0 and regret["tbrm"] > EXACT,
        "TBRM right with noise": noise == 0.3 and regret["tbrm"] < WRONG,
        "TBRM above the floor": row["loss"]["tbrm"] > row["noise_floor"] + 1e-12,
        "the optimum's own data": (regret["optimal data"] > EXACT) != (row["worst_luck"] > 1),
        "corrected wrong": regret["corrected"] > EXACT,
    }
    return [f"{row['cell']}: {what}" for what, wrong in checks.items() if wrong]


def summarise(rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The headline numbers; keys are explained in ``--help``."""
    bad = [what for row in rows for what in unexpected(row)]
    exponents: dict[str, dict[str, Any]] = {"regret": {}, "floor": {}}
    for family in dict.fromkeys(row["family"] for row in rows):
        small = [row for row in rows if row["family"] == family and 0 < row["noise"] <= SMALL_NOISE]
        noise = [row["noise"] for row in small]
        curves = {"regret": [row["regret"]["tbrm"] for row in small], "floor": [row["noise_floor"] for row in small]}
        for name, curve in curves.items():
            slope = log_log_slope(noise, curve)
            exponents[name][family] = [slope.slope, *slope.interval]
        if abs(exponents["regret"][family][0] - 2) > 0.1:
            bad.append(f"{family}: exponent {exponents['regret'][family][0]:.3f}")

    def largest_bias(method: str) -> dict[str, float]:
        shares: dict[str, float] = {}
        for row in rows:
            share = row["regret"][method] / row["reference_regret"]
            shares[row["family"]] = max(share, shares.get(row["family"], 0.0))
        return shares

    return {
        "deterministic_regret": max(row["regret"]["tbrm"] for row in rows if row["noise"] == 0),
        "corrected_regret": max(row["regret"]["corrected"] for row in rows),
        "largest_bias": largest_bias("tbrm"),
        "brm_largest_bias": largest_bias("brm"),
        "learned_largest_bias": largest_bias("learned"),
        "above_floor": sum(row["loss"]["tbrm"] > row["noise_floor"] + 1e-12 for row in rows),
        "regret_exponent": exponents["regret"],
        "floor_exponent": exponents["floor"],
        "saddles": sum(row["regret"]["optimal data"] > EXACT for row in rows),
        "saddles_predicted": sum(row["worst_luck"] > 1 for row in rows),
        "variance_slope": min((row["variance_slope"] for row in rows if row["noise"] >= 0.1), default=None),
        "unexpected": bad,
        "verdict": "as predicted" if not bad else "NOT as predicted",
        "seconds": round(seconds, 1),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """One line a cell; regrets in reward units."""
    view = Table("family", "ε", *(f"regret {name}" for name in METHODS), "worst luck", "loss tbrm", "noise floor", "s")
    for row in rows:
        regrets = (f"{row['regret'][name]:.1e}" for name in METHODS)
        losses = (f"{row['worst_luck']:.2f}", f"{row['loss']['tbrm']:.4f}", f"{row['noise_floor']:.4f}")
        view.add_row(row["family"], f"{row['noise']:g}", *regrets, *losses, f"{row['seconds']:.1f}")
    return view


def main(config: Config) -> int:
    unknown = [family for family in config.families if family not in FAMILIES]
    if unknown or not config.families:
        raise tt.InvalidInputError("families", f"expected some of {', '.join(FAMILIES)}, found {', '.join(unknown)}")
    wanted = product(config.families, config.noise)
    made = {f"{family}/{noise}": partial(run_cell, family, noise, config) for family, noise in wanted}
    return run_experiment(
        "transition_noise", config, made, summarise, lambda rows, _: [table(rows)], execution=config.execution
    )


if __name__ == "__main__":
    sys.exit(run_program("transition_noise", lambda: main(tyro.cli(Config, description=__doc__))))
