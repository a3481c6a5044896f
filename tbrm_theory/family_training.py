"""On-policy training of tabular logits with any loss of the family, hundreds of settings in one run, judged by the exact regret.

An update draws ``prompts`` first states from ``ρ`` and ``group_size`` rollouts of the current ``π_θ`` for each, computes the loss
once and takes one step of Adam: nothing is used twice. Logits start as ``log π_ref``, so that ``V_θ = 0`` and ``π_θ = π_ref`` at
the start (the calibrated one of X6); an offset in their place would be a handicap of those losses alone that read ``V_θ``. What a
loss trains besides the policy (``log Z``, the value model, the critic) starts at 0, which is the same number, and has a learning
rate of its own.

The first two dimensions of everything are the points of a grid and the seeds. A seed's random numbers are its own and the same at all
points, so a point's curves do not depend on what else is trained beside it, and points are compared on the same luck.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tbrm_theory.dynamic_programming import solve
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.laid_out import LaidOut, Rollouts, lay_out, read
from tbrm_theory.losses import LOSSES, TrajectoryScores
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.training import exact_regret

__all__ = ["Curves", "Plan", "Point", "train", "trained_besides"]

OF_REFERENCE = 1 << 31
"""Added to a seed for rollouts of the reference: numbers that training does not go on with. torch reads 32 bits of a seed."""


@dataclass(frozen=True)
class Point:
    """One setting of a method."""

    learning_rate: float
    companion_rate: float = 1.0
    """The learning rate of what is trained besides the policy, as a multiple of ``learning_rate``."""
    refresh: int = 1
    """After how many updates the frozen parameters are set to the current ones."""
    reference_rollouts: int = 16
    """Rollouts of ``π_ref`` from each first state before training, for a baseline that needs them (A*-PO)."""
    temperature: float = 1.0
    """The β that the loss is given, as a multiple of the problem's: GRPO divides rewards by their spread, so its penalty weighs
    otherwise."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "companion_rate", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidInputError(name, f"expected a positive number, found {getattr(self, name)}")
        for name in ("refresh", "reference_rollouts"):
            if getattr(self, name) < 1:
                raise InvalidInputError(name, f"expected at least 1, found {getattr(self, name)}")


@dataclass(frozen=True)
class Plan:
    """How much to train, the same for all points."""

    updates: int = 300
    prompts: int = 16
    """First states drawn for an update."""
    group_size: int = 1
    """Rollouts for each."""
    evaluations: int = 30
    """How often the exact regret is computed, evenly over the run and at both ends."""
    scale: float = 1.0
    """A factor on the loss. Adam does not see it but for its ``epsilon``; with it, losses whose gradients differ by a known factor
    train identically to the last bits."""
    epsilon: float = 1e-8
    """Adam's."""

    def __post_init__(self) -> None:
        for name in ("updates", "prompts", "group_size", "evaluations"):
            if getattr(self, name) < 1:
                raise InvalidInputError(name, f"expected at least 1, found {getattr(self, name)}")
        for name in ("scale", "epsilon"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidInputError(name, f"expected a positive number, found {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class Curves:
    """What came out; regrets in reward units."""

    updates: Int64[Tensor, " evaluations"]
    samples: Int64[Tensor, "points evaluations"]
    """Trajectories drawn until then, those of ``π_ref`` before training included."""
    regret: Float[Tensor, "points seeds evaluations"]


def trained_besides(loss: str) -> tuple[str, ...]:
    """The fields of the scores that a loss trains beside the policy: parameters of their own.

    The baseline of point-wise DAA is trained in DRO and a constant, estimated before training, in A*-PO.
    """
    trained = [name for name in LOSSES[loss].fields if name in ("log_partition", "critic", "baseline")]
    return tuple(name for name in trained if name != "baseline" or loss != "a-star-po")


def train(mdp: RegularizedMDP, loss: str, points: Sequence[Point], seeds: Sequence[int], plan: Plan) -> Curves:
    """Train every point with every seed.

    Raises:
        InvalidInputError: no such loss, no points or seeds, a seed of more than 31 bits, a group of one for a loss that compares
            rollouts, or a batch of problems.
    """
    if loss not in LOSSES:
        raise InvalidInputError("loss", f"expected one of {', '.join(LOSSES)}, found {loss!r}")
    if LOSSES[loss].needs_group and plan.group_size < 2:
        raise InvalidInputError("group_size", f"expected at least 2, for {loss} compares rollouts of one first state")
    if not points or not seeds:
        raise InvalidInputError("points" if not points else "seeds", "expected at least one")
    if not all(0 <= seed < OF_REFERENCE for seed in seeds):
        raise InvalidInputError("seeds", f"expected numbers from 0 to {OF_REFERENCE - 1}, found {list(seeds)}")
    problem, solution = lay_out(mdp), solve(mdp)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    model = _Model(problem, loss, points, seeds)
    adam = _Adam(model.parameters, points, plan.epsilon)
    evaluate_at = sorted({round(i * plan.updates / plan.evaluations) for i in range(plan.evaluations + 1)})
    regrets = []
    for update in range(plan.updates + 1):
        if update in evaluate_at:
            logits = problem.per_layer(model.parameters["logits"].detach())
            regrets.append(exact_regret(mdp, logits, solution))
        if update < plan.updates:
            first, uniform = _draw(problem, plan, generators)
            model.refresh(update)
            value = model.loss(first, uniform, plan.group_size).sum() * plan.scale
            tables = list(model.parameters.values())
            adam.step(torch.autograd.grad(value, tables, allow_unused=True))
    counted = torch.tensor(evaluate_at, device=mdp.initial.device)
    return Curves(
        updates=counted,
        samples=counted * plan.prompts * plan.group_size + model.samples_before.unsqueeze(-1),
        regret=torch.stack(regrets, dim=-1),
    )


def _draw(problem: LaidOut, plan: Plan, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """First states ``(seeds, trajectories)``, those of a group side by side, and the uniform numbers that decide the rest."""

    def uniform(*shape: int) -> Tensor:
        drawn = torch.stack([torch.rand(shape, generator=one, dtype=torch.float64) for one in generators])
        return drawn.to(problem.initial.device)

    first = problem.first_states(uniform(plan.prompts)).repeat_interleave(plan.group_size, dim=-1)
    return first, uniform(plan.prompts * plan.group_size, problem.horizon, problem.draws)


class _Model:
    """The parameters of all points and seeds, and what the loss reads of them."""

    def __init__(self, problem: LaidOut, loss: str, points: Sequence[Point], seeds: Sequence[int]) -> None:
        self._problem, self._loss = problem, LOSSES[loss]
        rows, cells = (len(points), len(seeds)), problem.log_reference.shape[-2]
        firsts, device = len(problem.initial), problem.initial.device
        self.parameters = {"logits": problem.log_reference.repeat(*rows, 1, 1).requires_grad_()}
        for name in trained_besides(loss):
            size = cells if name == "critic" else firsts
            self.parameters[name] = torch.zeros(*rows, size, dtype=torch.float64, device=device, requires_grad=True)
        self._every = torch.tensor([point.refresh for point in points], device=device)
        self._frozen = torch.zeros(*rows, cells, dtype=torch.float64, device=device)
        self.samples_before = torch.zeros(len(points), dtype=torch.int64, device=device)
        self._constant_baseline: Tensor | None = None
        if "baseline" in self._loss.fields and "baseline" not in self.parameters:
            self._constant_baseline, self.samples_before = _reference_values(problem, points, seeds)
        temperatures = torch.tensor([point.temperature for point in points], dtype=torch.float64, device=device)
        self._beta = (problem.mdp.beta * temperatures).unsqueeze(-1)

    def refresh(self, update: int) -> None:
        """Set the frozen parameters of the points whose turn it is to the current ones."""
        if any(name.startswith("frozen") for name in self._loss.fields):
            due = update % self._every == 0
            self._frozen[due] = torch.logsumexp(self.parameters["logits"].detach()[due], dim=-1)

    def loss(self, first: Tensor, uniform: Tensor, group_size: int) -> Float[Tensor, "points seeds"]:
        """The loss of every point and seed on fresh rollouts of its own policy."""
        logits = self.parameters["logits"]
        value = torch.logsumexp(logits, dim=-1)
        log_policy = logits - value.unsqueeze(-1)
        rollouts = self._problem.roll_out(log_policy, first, uniform)
        scores = self._scores(value, log_policy, rollouts)
        group: dict[str, Any] = {"group_size": group_size} if self._loss.needs_group else {}
        return self._loss.function(scores, beta=self._beta, **group)

    def _scores(self, value: Tensor, log_policy: Tensor, rollouts: Rollouts) -> TrajectoryScores:
        """The scores, with the optional fields that the loss names and no others."""
        problem, cell, first = self._problem, rollouts.cell, rollouts.first
        taken = read(log_policy.flatten(-2), rollouts.pair)
        initial_value = value.gather(-1, first)
        given = {
            "first_logit": lambda: initial_value + taken[..., 0],
            "value": lambda: read(value, cell),
            "reward": lambda: problem.reward.take(rollouts.pair),
            "reference_initial_value": lambda: torch.zeros_like(initial_value),  # logsumexp of log π_ref
            "frozen_initial_value": lambda: self._frozen.gather(-1, first),
            "frozen_value": lambda: read(self._frozen, cell),
            "behaviour_log_policy": taken.detach,
            "log_partition": lambda: self.parameters["log_partition"].gather(-1, first),
            "critic": lambda: read(self.parameters["critic"], cell),
            "baseline": lambda: self._baseline(first),
            "entropy": lambda: read(_entropy(log_policy), cell),
        }
        return TrajectoryScores(
            log_policy=taken,
            log_reference=problem.log_reference.take(rollouts.pair),
            mask=rollouts.mask,
            initial_value=initial_value,
            trajectory_return=problem.trajectory_return(rollouts),
            **{name: given[name]() for name in self._loss.fields if name in given},
        )

    def _baseline(self, first: Tensor) -> Tensor:
        table = self.parameters.get("baseline", self._constant_baseline)
        assert table is not None
        return table.gather(-1, first)


def _entropy(log_policy: Float[Tensor, "... cells actions"]) -> Float[Tensor, "... cells"]:
    exists = log_policy > -torch.inf
    return -(log_policy.exp() * torch.where(exists, log_policy, 0.0)).sum(-1)


def _reference_values(
    problem: LaidOut, points: Sequence[Point], seeds: Sequence[int]
) -> tuple[Float[Tensor, "points seeds first_states"], Int64[Tensor, " points"]]:
    """``log mean exp(r/β)`` over rollouts of ``π_ref`` from every first state that occurs, and how many rollouts that took.

    A point that asks for fewer has the first of those of a point that asks for more.
    """
    device, rollouts_of = problem.initial.device, [point.reference_rollouts for point in points]
    states, most = torch.arange(len(problem.initial), device=device), max(rollouts_of)
    returns = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed + OF_REFERENCE)
        shape = (most, len(states), problem.horizon, problem.draws)
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64).to(device)
        rollouts = problem.roll_out(problem.log_reference, states, uniform)
        returns.append(problem.trajectory_return(rollouts) / problem.mdp.beta)
    scaled = torch.stack(returns)  # (seeds, rollouts, states)
    value = [torch.logsumexp(scaled[:, :count], dim=1) - math.log(count) for count in rollouts_of]
    return torch.stack(value), torch.tensor(rollouts_of, device=device) * len(states)


class _Adam:
    """Adam with a learning rate for each point: that of the logits, and a multiple of it for everything else."""

    def __init__(self, parameters: Mapping[str, Tensor], points: Sequence[Point], epsilon: float) -> None:
        place = parameters["logits"].device
        own = torch.tensor([point.learning_rate for point in points], dtype=torch.float64, device=place)
        besides = own * torch.tensor([point.companion_rate for point in points], dtype=torch.float64, device=place)
        self._tables = list(parameters.values())
        self._rates = [
            (own if name == "logits" else besides).reshape(-1, *[1] * (table.dim() - 1))
            for name, table in parameters.items()
        ]
        self._mean = [torch.zeros_like(table) for table in self._tables]
        self._square = [torch.zeros_like(table) for table in self._tables]
        self._steps, self._epsilon = 0, epsilon

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor | None], first: float = 0.9, second: float = 0.999) -> None:
        self._steps += 1
        for table, rate, mean, square, gradient in zip(
            self._tables, self._rates, self._mean, self._square, gradients, strict=True
        ):
            if gradient is None:
                raise InvalidInputError("loss", "reads parameters that it gives no gradient")
            mean.lerp_(gradient, 1 - first)
            square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
            size = square.sqrt().mul_((1 - second**self._steps) ** -0.5).add_(self._epsilon)
            table.sub_(torch.div(mean, size, out=size).mul_(rate / (1 - first**self._steps)))
