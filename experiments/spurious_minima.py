"""How often does TBRM have local minima that are not global, where C1 does not exclude them (theory.md C3)?

Two maps, from many random starts at once:

* noise: C3's problem with free logits, between deterministic transitions (noise 0: an action leads to its own state) and a coin
  (noise 1), against the size G of the rewards ``((-G, -G-¼), (G, G))``; uniform data. One row for each noise.
* class: a tree with two steps and three actions, so 12 logits and 9 trajectories, and logits from fewer parameters: linear on random
  features, low rank (one factor for the states, one for the actions), a tanh network with one hidden layer on random features of the
  state. Realisable (``Q*`` is in the class) or not; uniform or uneven data (``Dirichlet(0.3)`` on the trajectories). Logits, those of
  ``Q*`` and of the starts, have standard deviation 3. One row for each class and number of parameters.

A start ends at a *spurious minimum* if its gradient vanishes, no eigenvalue of its Hessian is negative, and its loss exceeds that of
the best start of the same problem (of the optimum, where realisable) by more than 0.001. It is *unfinished* if the gradient does not
vanish: the loss of some classes falls for ever towards infinity. Of every class with spurious minima the most frequent one is saved
in the run folder, `instances/NAME.json`: `instance` (the format of tbrm evaluate, data and logits included), `loss`, `best_loss`,
`parameters`, `fixed` (features).

A run that was interrupted goes on where it stopped. summary.json: `onset_at_coin` (the least G of the grid with a spurious minimum at
noise 1), `least_noise` (the least noise with one, at any G), `largest_share` (of starts, over the noise map), `share_of_problems`
(with a spurious minimum, by class, `KIND D PARAMETERS, realisable or not, data`), `unfinished` (share of all starts, by kind),
`unexpected` (predictions that failed), `verdict`, `seconds`. Predictions: none at noise 0 (C1); at noise 1 none for G ≤ 1.25 and some
at 1.5 (C3); some for two linear parameters, realisable (C3); none for nine or more linear ones, whose 9 residuals can move
independently, so that C1's argument goes through. Exit status 1 if one fails.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from shared_parameters import ACTIONS, MARGIN, SPREAD, Class, SharedLoss, gauss_newton, judged, newton_descent
from torch import Tensor

import tbrm_theory as tt
from tbrm_theory.claims.counterexamples import realised
from tbrm_theory.claims.derivatives import ListedLoss, tables
from tbrm_theory.instance import Instance
from tbrm_theory.json_fields import write_json
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.occupancy import enumerate_trajectories
from tbrm_theory.program import run_program
from tbrm_theory.results import Run
from tbrm_theory.transitions import DenseTransition

SIZES = {"linear": (1, 2, 3, 4, 6, 7, 8, 9, 10, 12), "low-rank": (1, 2, 3), "network": (1, 2, 3, 4, 6, 8)}
"""Parameters; ranks; hidden units."""


@dataclass(frozen=True)
class Config:
    """Settings of the experiment."""

    grid: int = 25
    """Levels of noise from 0 to 1, and sizes of the reward from 0 to 3: multiples of 0.125 with 25."""
    starts: int = 24
    """Of each problem."""
    problems: int = 60
    """Random problems of each class."""
    iterations: int = 60
    seed: int = 0
    results: Path = Path("results")


# -- the noise map ---------------------------------------------------------------------------------------------------


def coin_problem(noise: float) -> RegularizedMDP:
    """C3's problem without rewards: action a leads to state a, with probability ``noise/2`` to the other one."""
    half = torch.full((2, 2), 0.5, dtype=torch.float64)
    own = 1 - noise / 2
    return RegularizedMDP(
        beta=1.0,
        initial=torch.ones(1),
        reward=[torch.zeros(1, 2), torch.zeros(2, 2)],
        reference=[half[:1], half],
        transitions=[DenseTransition(torch.tensor([[[own, 1 - own], [1 - own, own]]], dtype=torch.float64))],
    )


def noise_row(noise: float, config: Config) -> dict[str, Any]:
    """Shares of starts at a spurious minimum, and its excess loss, for every G."""
    mdp = coin_problem(noise)
    listed = enumerate_trajectories(mdp)
    loss = ListedLoss.of(mdp, listed, listed.log_law(mdp.log_reference).exp())
    sizes = torch.linspace(0, 3, config.grid, dtype=torch.float64)
    reward = sizes[:, None] * torch.tensor([0, 0, -1, -1, 1, 1]) + torch.tensor([0, 0, 0, -0.25, 0, 0]) - math.log(2)
    loss = replace(loss, reward=reward.unsqueeze(1))
    generator = torch.Generator().manual_seed(config.seed + round(1000 * noise))
    starts = torch.randn(config.grid, config.starts, len(loss.state), generator=generator, dtype=torch.float64)
    theta = newton_descent(loss, SPREAD * starts, config.iterations)
    value = loss.value(theta)
    spurious, unfinished = judged(loss, theta, value.amin(-1, keepdim=True))
    excess = torch.where(spurious, value - value.amin(-1, keepdim=True), 0.0).amax(-1)
    return {
        "row": f"noise {noise:.4f}",
        "map": "noise",
        "noise": noise,
        "size": sizes.tolist(),
        "share": spurious.double().mean(-1).tolist(),
        "excess": excess.tolist(),
        "unfinished": unfinished.double().mean().item(),
    }


# -- the class map ---------------------------------------------------------------------------------------------------


@cache
def tree() -> tuple[RegularizedMDP, ListedLoss]:
    """The graph of all problems of the class map, and the loss on it without rewards, under uniform data."""
    mdp = tt.make("deterministic-tree", horizon=2, actions=ACTIONS, roots=1, beta=1.0)
    listed = enumerate_trajectories(mdp)
    loss = ListedLoss.of(mdp, listed, torch.full((len(listed.states),), 1 / len(listed.states), dtype=torch.float64))
    return mdp, replace(loss, reward=torch.zeros_like(loss.reward), noise=torch.zeros_like(loss.weights))


def class_row(which: Class, realisable: bool, data: str, config: Config, folder: Path) -> dict[str, Any]:
    """Shares of problems and of starts with a spurious minimum; saves the most frequent one."""
    _, free = tree()
    generator = torch.Generator().manual_seed(config.seed)
    fixed = which.fixed(config.problems, generator)
    optimal = torch.func.vmap(which.logits)(which.draw(config.problems, generator), fixed)
    if not realisable:
        optimal = SPREAD * torch.randn(optimal.shape, generator=generator, dtype=torch.float64)
    weights = free.weights.expand(config.problems, -1)
    if data == "uneven":
        weights = uneven(config.problems, weights.shape[-1], config.seed)
    problem = torch.arange(config.problems).repeat_interleave(config.starts)
    loss = SharedLoss(which, fixed, replace(free, reward=free.terms(optimal), weights=weights)).rows(problem)
    theta = gauss_newton(loss, which.draw(len(problem), generator), config.iterations)

    def best() -> Tensor:
        """The least loss of the problem, for every row."""
        if realisable:
            return torch.zeros_like(theta[:, 0])
        return loss.value(theta).unflatten(0, (config.problems, -1)).amin(-1)[problem]

    higher = (loss.value(theta) > best() + MARGIN).nonzero().squeeze(-1)
    spurious, unfinished = torch.zeros_like(problem, dtype=torch.bool), torch.zeros_like(problem, dtype=torch.bool)
    if len(higher):
        theta[higher] = newton_descent(loss.rows(higher), theta[higher], config.iterations // 2)
        spurious[higher], unfinished[higher] = judged(loss.rows(higher), theta[higher], best()[higher])
    name = which.name(realisable, data)
    excess = torch.where(spurious, loss.value(theta) - best(), 0.0)
    by_problem = spurious.unflatten(0, (config.problems, -1))
    if bool(spurious.any()):
        most = by_problem.sum(-1).argmax()
        row = torch.where(spurious & (problem == most), excess, -1.0).argmax()
        save(folder / "instances" / f"{name}.json", loss, theta, row, optimal[most], best()[row].item())
    return {
        "row": name,
        "map": "class",
        "kind": which.kind,
        "parameters": which.parameters,
        "realisable": realisable,
        "data": data,
        "problem_count": config.problems,
        "problems": by_problem.any(-1).double().mean().item(),
        "starts": spurious.double().mean().item(),
        "unfinished": unfinished.double().mean().item(),
        "largest_excess": excess.max().item(),
    }


def uneven(problems: int, trajectories: int, seed: int) -> Tensor:
    """``Dirichlet(0.3)`` laws on the trajectories, from Gamma variables."""
    gamma = np.random.default_rng(seed).gamma(0.3, size=(problems, trajectories))
    return torch.from_numpy(gamma / gamma.sum(-1, keepdims=True))


def save(path: Path, loss: SharedLoss, theta: Tensor, row: Tensor, optimal: Tensor, best: float) -> None:
    """One spurious minimum with its problem, data and logits. On a tree any law is that of a Markov policy."""
    mdp, _ = tree()
    mdp = realised(mdp, tables(mdp, optimal))
    listed = enumerate_trajectories(mdp)
    weights = loss.free.weights[row]
    later = torch.zeros(mdp.reference[1].shape, dtype=torch.float64)
    later = later.index_put((listed.states[:, 1], listed.actions[:, 1]), weights)
    first = torch.zeros(mdp.reference[0].shape, dtype=torch.float64)
    first = first.index_put((listed.states[:, 0], listed.actions[:, 0]), weights, accumulate=True)
    policy = (first, later / later.sum(-1, keepdim=True))
    logits = loss.logits(theta)[row]
    instance = Instance.from_probabilities(
        mdp, {"data": policy}, {}, {"spurious": tables(mdp, logits), "optimal": tables(mdp, optimal)}
    )
    path.parent.mkdir(exist_ok=True)
    document = {
        "instance": instance.to_document(),
        "parameters": theta[row].tolist(),
        "fixed": loss.fixed[row].tolist(),
        "loss": loss.value(theta)[row].item(),
        "best_loss": best,
    }
    write_json(path, document)


# -- the run -----------------------------------------------------------------------------------------------------------


def rows_to_run(config: Config, folder: Path) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Every row's name and what makes it, in the order in which they run."""
    for noise in torch.linspace(0, 1, config.grid, dtype=torch.float64).tolist():
        yield f"noise {noise:.4f}", partial(noise_row, noise, config)
    for kind, sizes in SIZES.items():
        for which, realisable, data in product(
            (Class(kind, size) for size in sizes), (True, False), ("uniform", "uneven")
        ):
            yield which.name(realisable, data), partial(class_row, which, realisable, data, config, folder)


def summarise(rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The headline numbers; keys are explained in ``--help``."""
    noise = {row["noise"]: row for row in rows if row["map"] == "noise"}
    classes = {row["row"]: row for row in rows if row["map"] == "class"}
    at_coin = dict(zip(noise[1.0]["size"], noise[1.0]["share"], strict=True))
    predictions = {
        "none without noise": max(noise[0.0]["share"]) == 0,
        "none at a coin up to G = 1.25": all(share == 0 for size, share in at_coin.items() if size <= 1.25),
        "some at a coin and G = 1.5": at_coin.get(1.5, 1.0) > 0,
        "none for nine or more linear parameters": all(
            row["problems"] == 0 for row in classes.values() if row["kind"] == "linear" and row["parameters"] >= 9
        ),
        "some for two linear parameters, realisable": classes["linear D 2, realisable, uneven"]["problems"] > 0,
    }
    unexpected = [name for name, holds in predictions.items() if not holds]
    kinds = list(SIZES)
    return {
        "onset_at_coin": min((size for size, share in at_coin.items() if share > 0), default=None),
        "least_noise": min((level for level, row in noise.items() if max(row["share"]) > 0), default=None),
        "largest_share": max(max(row["share"]) for row in noise.values()),
        "share_of_problems": {name: row["problems"] for name, row in classes.items()},
        "unfinished": {
            kind: sum(row["unfinished"] for row in classes.values() if row["kind"] == kind)
            / sum(row["kind"] == kind for row in classes.values())
            for kind in kinds
        },
        "unexpected": unexpected,
        "verdict": "as predicted" if not unexpected else "NOT as predicted",
        "seconds": round(seconds, 1),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """One line a class: the share of problems with a spurious minimum, and of starts that end there."""
    view = Table("class", "parameters", "", "data", "problems", "starts", "unfinished", "largest excess")
    for row in rows:
        if row["map"] == "class":
            numbers = [f"{row[key]:.3f}" for key in ("problems", "starts", "unfinished", "largest_excess")]
            fit = "realisable" if row["realisable"] else "not realisable"
            view.add_row(row["kind"], str(row["parameters"]), fit, row["data"], *numbers)
    return view


def main(config: Config) -> int:
    started = time.perf_counter()
    console = Console(width=None if sys.stdout.isatty() else 160)
    recorded = {key: value for key, value in asdict(config).items() if key != "results"}
    run = Run.open("spurious_minima", recorded, root=config.results)
    wanted = list(rows_to_run(config, run.folder))
    done = {row["row"] for row in run.rows()}
    try:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("rows", total=len(wanted), completed=len(done))
            for name, make in wanted:
                if name not in done:
                    progress.update(task, description=name)
                    run.record(make())
                    progress.advance(task)
    except KeyboardInterrupt:
        console.print(f"interrupted; the same command goes on from {run.folder}")
        return 130
    rows = run.rows()
    summary = summarise(rows, time.perf_counter() - started)
    run.finish(summary)
    console.print(table(rows))
    for key, value in summary.items():
        if key == "share_of_problems":
            continue  # the table has it
        console.print(f"{key}: {value}", highlight=False)
    console.print(f"results: {run.folder}", highlight=False)
    return 0 if not summary["unexpected"] else 1


if __name__ == "__main__":
    torch.set_num_threads(1)  # the tensors are tiny: several threads would wait for each other
    sys.exit(run_program("spurious_minima", lambda: main(tyro.cli(Config, description=__doc__))))
