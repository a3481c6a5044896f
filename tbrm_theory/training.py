"""Stochastic-gradient training of a parametrisation with one of the losses, judged by the exact regret.

Four sources of data, as in theory.md §0: ``population`` (the exact expectation under a behaviour), ``offline`` (a fixed set of
trajectories), ``online`` (fresh trajectories of ``π_θ`` each step) and ``replay`` (fresh ones go into a first-in-first-out
buffer, and each step draws from the buffer). Independent seeds are the leading batch dimension of ``theta``: they share nothing but
the code, and a run of ten seeds is one run.

A checkpoint is one safetensors file, written atomically. A run that was interrupted or killed goes on from it to the same numbers,
bit for bit: parameters, Adam's moments, the generator, the replay buffer and the history are all in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from tbrm_theory.dynamic_programming import Solution, admissible_logits, regret, soft_policy, solve
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.json_fields import replacement
from tbrm_theory.losses import brm_loss, tbrm_loss
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.objectives import Objective
from tbrm_theory.parametrisations import Parametrisation
from tbrm_theory.scores import table_scores
from tbrm_theory.shapes import PerLayerStateAction
from tbrm_theory.trajectories import TrajectoryBatch, sample_trajectories

__all__ = ["FitConfig", "History", "exact_regret", "fit"]

MODES = ("population", "offline", "online", "replay")
LOSSES = {"tbrm": tbrm_loss, "brm": brm_loss}


@dataclass(frozen=True)
class FitConfig:
    """How to train. ``population`` and ``offline`` take their data from the objective given to :func:`fit`."""

    mode: Literal["population", "offline", "online", "replay"] = "population"
    loss: Literal["tbrm", "brm"] = "tbrm"
    steps: int = 1000
    learning_rate: float = 0.05
    seeds: int = 4
    seed: int = 0
    batch_size: int = 64
    """Fresh trajectories for each step and seed (online, replay)."""
    replay_capacity: int = 1024
    """Trajectories that each seed's buffer holds (replay)."""
    evaluations: int = 50
    """How often the exact regret is computed, evenly over the run and at both ends."""
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        for name in ("steps", "seeds", "batch_size", "replay_capacity", "evaluations", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InvalidInputError(name, f"expected at least 1, found {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise InvalidInputError("learning_rate", f"expected a positive number, found {self.learning_rate}")
        for name, known in (("mode", MODES), ("loss", LOSSES)):
            if getattr(self, name) not in known:
                raise InvalidInputError(name, f"expected one of {', '.join(known)}, found {getattr(self, name)!r}")


@dataclass
class History:
    """One row for each evaluation: the step, and for each seed the loss and the exact regret in reward units."""

    step: list[int] = field(default_factory=list)
    loss: list[list[float]] = field(default_factory=list)
    regret: list[list[float]] = field(default_factory=list)

    def append(self, step: int, loss: Tensor, regrets: Tensor) -> None:
        self.step.append(step)
        self.loss.append(loss.tolist())
        self.regret.append(regrets.tolist())


@dataclass
class _State:
    """Everything that a run needs to go on."""

    step: int
    theta: Tensor
    optimiser: torch.optim.Adam
    generator: torch.Generator
    buffer: _Buffer | None
    history: History


def exact_regret(mdp: RegularizedMDP, logits: PerLayerStateAction, solution: Solution) -> Float[Tensor, "..."]:
    """Regret of ``π_θ = softmax(logits)`` in reward units (I3)."""
    policy = tuple(soft_policy(table) for table in admissible_logits(mdp, logits))
    return regret(mdp, policy, solution=solution)


def fit(
    mdp: RegularizedMDP,
    parametrisation: Parametrisation,
    config: FitConfig,
    *,
    objective: Objective | None = None,
    checkpoint: Path | None = None,
    after_evaluation: Callable[[History], None] | None = None,
) -> tuple[Float[Tensor, "seeds parameters"], History]:
    """Train all seeds at once with Adam; returns the parameters and the history.

    Args:
        objective: the data of the modes ``population`` and ``offline``.
        checkpoint: file to resume from if it exists, and to write every ``checkpoint_every`` steps.
        after_evaluation: called with the history so far, for progress displays.

    Raises:
        InvalidInputError: no objective where one is needed, or a checkpoint that is corrupt or of another run: with other settings,
            or on another problem, other data or another parametrisation, on which it would go on to wrong numbers.
        OSError: the checkpoint cannot be written; the last one stays as it was.
    """
    if config.mode in ("population", "offline") and objective is None:
        raise InvalidInputError("objective", f"missing; the mode {config.mode!r} needs it")
    solution = solve(mdp)
    state = _start(mdp, parametrisation, config)
    if checkpoint is not None and checkpoint.exists():
        first = _loss(mdp, parametrisation, config, objective, state).detach()
        regrets = exact_regret(mdp, parametrisation.logits(state.theta.detach()), solution)
        _restore(state, checkpoint, config, {"loss": first.tolist(), "regret": regrets.tolist()})
    evaluate_at = {round(i * config.steps / config.evaluations) for i in range(config.evaluations + 1)}
    while state.step <= config.steps:
        loss = _loss(mdp, parametrisation, config, objective, state)
        if state.step in evaluate_at:
            logits = parametrisation.logits(state.theta.detach())
            state.history.append(state.step, loss.detach(), exact_regret(mdp, logits, solution))
            if after_evaluation is not None:
                after_evaluation(state.history)
        if state.step < config.steps:
            state.optimiser.zero_grad()
            loss.sum().backward()
            state.optimiser.step()
        state.step += 1
        if checkpoint is not None and (state.step % config.checkpoint_every == 0 or state.step > config.steps):
            _save(state, checkpoint, config)
    return state.theta.detach(), state.history


def _start(mdp: RegularizedMDP, parametrisation: Parametrisation, config: FitConfig) -> _State:
    generator = torch.Generator(mdp.initial.device).manual_seed(config.seed)
    theta = parametrisation.initial(config.seeds, generator).requires_grad_()
    optimiser = torch.optim.Adam([theta], lr=config.learning_rate)
    buffer = _Buffer(config.seeds, config.replay_capacity, mdp) if config.mode == "replay" else None
    return _State(0, theta, optimiser, generator, buffer, History())


def _loss(
    mdp: RegularizedMDP,
    parametrisation: Parametrisation,
    config: FitConfig,
    objective: Objective | None,
    state: _State,
) -> Float[Tensor, " seeds"]:
    """The loss of every seed at the current parameters, on the data of this step."""
    logits = parametrisation.logits(state.theta)
    if objective is not None and config.mode in ("population", "offline"):
        return objective.loss(logits, config.loss)
    q = admissible_logits(mdp, logits)
    policy = tuple(soft_policy(table).detach() for table in q)
    batch = sample_trajectories(mdp, policy, config.batch_size, state.generator)
    if state.buffer is not None:
        state.buffer.add(batch)
        batch = state.buffer.draw(config.batch_size, state.generator)
    scores = table_scores(q, mdp.log_reference, mdp.reward, batch)
    return LOSSES[config.loss](scores, beta=mdp.beta)


class _Buffer:
    """First in, first out; one row of trajectories for each seed."""

    def __init__(self, seeds: int, capacity: int, mdp: RegularizedMDP) -> None:
        shape, device = (seeds, capacity, mdp.horizon), mdp.initial.device
        self.states = torch.zeros(shape, dtype=torch.int64, device=device)
        self.actions = torch.zeros(shape, dtype=torch.int64, device=device)
        self.mask = torch.zeros(shape, dtype=torch.bool, device=device)
        self.written = 0

    def add(self, batch: TrajectoryBatch) -> None:
        count, capacity = batch.states.shape[-2], self.states.shape[-2]
        place = (self.written + torch.arange(count, device=self.states.device)) % capacity
        for own, new in ((self.states, batch.states), (self.actions, batch.actions), (self.mask, batch.mask)):
            own[:, place[-capacity:]] = new[:, -capacity:]
        self.written += count

    def draw(self, count: int, generator: torch.Generator) -> TrajectoryBatch:
        filled = min(self.written, self.states.shape[-2])
        index = torch.randint(
            filled, (len(self.states), count, 1), generator=generator, device=self.states.device
        ).expand(-1, -1, self.states.shape[-1])
        return TrajectoryBatch(*(table.gather(1, index) for table in (self.states, self.actions, self.mask)))


# -- checkpoints ----------------------------------------------------------------------------------------------------


def _save(state: _State, path: Path, config: FitConfig) -> None:
    tensors = {"theta": state.theta.detach(), "generator": state.generator.get_state()}
    for name, value in state.optimiser.state.get(state.theta, {}).items():
        tensors[f"adam.{name}"] = value
    if state.buffer is not None:
        tensors |= {f"buffer.{name}": getattr(state.buffer, name) for name in ("states", "actions", "mask")}
    record = {
        "config": asdict(config),
        "step": state.step,
        "written": state.buffer.written if state.buffer else 0,
        "history": asdict(state.history),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacement(path, binary=True) as file:
        file.write(safetensors.torch.save(tensors, metadata={"run": json.dumps(record)}))


def _restore(state: _State, path: Path, config: FitConfig, first_row: dict[str, list[float]]) -> None:
    """Put the checkpoint in place of ``state``; ``first_row`` is what this run begins with, and that one must have begun with."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()["run"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        if tensors["theta"].shape != state.theta.shape:
            expected = f"expected parameters of shape {tuple(state.theta.shape)}"
            raise ValueError(f"{expected}, found {tuple(tensors['theta'].shape)}")
        changed = sorted(k for k, v in asdict(config).items() if record["config"].get(k) != v)
        same = all(_close(record["history"][name][0], values) for name, values in first_row.items())
        if not changed and same:
            _replace(state, record, tensors)
    except OSError:
        raise
    except Exception as error:  # whatever a broken file makes of the steps above
        raise InvalidInputError(str(path), f"not a checkpoint of a training run ({error!r})") from error
    if changed:
        raise InvalidInputError(str(path), f"the checkpoint of a run with other settings: {', '.join(changed)}")
    if not same:
        expected = (
            "expected a run that began with this loss and regret; its problem, data or parametrisation is another"
        )
        raise InvalidInputError(str(path), expected)


def _close(found: list[float], expected: list[float]) -> bool:
    return len(found) == len(expected) and all(
        math.isclose(x, y, rel_tol=1e-9, abs_tol=1e-12) for x, y in zip(found, expected, strict=True)
    )


def _replace(state: _State, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    if not all(bool(table.isfinite().all()) for table in tensors.values() if table.is_floating_point()):
        raise ValueError("a number that is not finite")
    with torch.no_grad():
        state.theta.copy_(tensors["theta"])
    moments = {name.removeprefix("adam."): value for name, value in tensors.items() if name.startswith("adam.")}
    if moments:  # Adam counts its steps on the CPU, wherever the parameters are
        place = state.theta.device
        moments = {name: value if name == "step" else value.to(place) for name, value in moments.items()}
        state.optimiser.state[state.theta] = moments
    state.generator.set_state(tensors["generator"])
    if state.buffer is not None:
        for name in ("states", "actions", "mask"):
            getattr(state.buffer, name).copy_(tensors[f"buffer.{name}"])
        state.buffer.written = int(record["written"])
    state.step, state.history = int(record["step"]), History(**record["history"])
