"""What a loss consumes, found by changing its input: the columns of Table 2 of [Y], computed.

A field of the scores is consumed if the value or a gradient changes with it; a model is trained if a gradient reaches it. A loss is a
regression if, with next to no KL penalty, it is convex along every change of ``log π_θ`` whatever the rewards are; a policy gradient
bends the way its advantage points, or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tbrm_theory.losses import LOSSES, Loss, TrajectoryScores

__all__ = ["Consumption", "consumed", "consumption"]

POLICY_FIELDS = ("log_policy", "initial_value", "first_logit", "value", "entropy")
SECOND_MODEL_FIELDS = ("critic", "log_partition", "baseline")
FROZEN_COPY_FIELDS = ("frozen_initial_value", "frozen_value")
_GROUPS, _GROUP_SIZE, _STEPS, _TRIES = 2, 3, 4, 6


@dataclass(frozen=True)
class Consumption:
    """One row of the table."""

    fields: frozenset[str]
    """The fields of the scores that the value or a gradient depends on."""
    regression: bool
    """Whether the loss is a regression; a policy gradient otherwise."""
    single_rollout: bool
    """Whether an update needs but one rollout of a prompt; those made before training, of the reference, are in ``models``."""
    trajectory_reward: bool
    """Whether the return of the whole trajectory is enough."""
    models: tuple[str, ...]
    """Whose forward pass is needed: the policy, the reference, a second model, a frozen copy, rollouts of the reference."""
    backward_passes: int
    """The models that a gradient reaches."""

    @property
    def single_model(self) -> bool:
        """Whether there is nothing besides the policy and the reference."""
        return set(self.models) <= {"policy", "reference"}


def consumption(name: str) -> Consumption:
    """Measure one of the losses on random scores."""
    loss, generator = LOSSES[name], torch.Generator().manual_seed(0)
    fields, trained = consumed(loss), _trained(loss, _random_scores(generator))
    second = bool(fields & set(SECOND_MODEL_FIELDS))
    models = {
        "policy": True,
        "reference": "log_reference" in fields,
        "second model": second and bool(trained & set(SECOND_MODEL_FIELDS)),
        "reference rollouts": second and not trained & set(SECOND_MODEL_FIELDS),
        "frozen copy": bool(fields & set(FROZEN_COPY_FIELDS)),
    }
    return Consumption(
        fields=fields,
        regression=all(_curvature(loss, _random_scores(generator), generator) > 0 for _ in range(_TRIES)),
        single_rollout=not loss.needs_group,
        trajectory_reward="reward" not in fields,
        models=tuple(model for model, used in models.items() if used),
        backward_passes=int(bool(trained & set(POLICY_FIELDS))) + int(bool(trained & set(SECOND_MODEL_FIELDS))),
    )


def consumed(loss: Loss) -> frozenset[str]:
    """The fields of the scores that the value or a gradient depends on."""
    generator = torch.Generator().manual_seed(0)
    scores = _random_scores(generator)
    return frozenset(field for field in scores.given() if _depends_on(loss, scores, field, generator))


def _random_scores(generator: torch.Generator) -> TrajectoryScores:
    """All fields, of trajectories of unequal length; returns of either sign that outweigh everything else, since any may occur."""
    count = _GROUPS * _GROUP_SIZE

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    length = torch.randint(2, _STEPS + 1, (count,), generator=generator)
    log_policy = -normal(count, _STEPS).exp()
    return TrajectoryScores(
        log_policy=log_policy,
        log_reference=-normal(count, _STEPS).exp(),
        mask=torch.arange(_STEPS) < length.unsqueeze(-1),
        initial_value=normal(count),
        trajectory_return=10 * normal(count),
        first_logit=normal(count),
        value=normal(count, _STEPS),
        reward=10 * normal(count, _STEPS),
        reference_initial_value=normal(count),
        frozen_initial_value=normal(count),
        behaviour_log_policy=log_policy.clone(),
        log_partition=normal(count),
        baseline=normal(count),
        critic=normal(count, _STEPS),
        frozen_value=normal(count, _STEPS),
        entropy=normal(count, _STEPS),
    )


def _value(loss: Loss, scores: TrajectoryScores, beta: float = 0.5) -> Tensor:
    group = {"group_size": _GROUP_SIZE} if loss.needs_group else {}
    return loss.function(scores, beta=beta, **group)


def _gradients(loss: Loss, scores: TrajectoryScores) -> dict[str, Tensor]:
    """The gradient with respect to every field that may be trained; zero where none arrives."""
    names = (*POLICY_FIELDS, *SECOND_MODEL_FIELDS)
    leaves = {name: table.detach().requires_grad_() for name, table in scores.given().items() if name in names}
    value = _value(loss, replace(scores, **leaves))
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def _trained(loss: Loss, scores: TrajectoryScores) -> frozenset[str]:
    return frozenset(name for name, gradient in _gradients(loss, scores).items() if bool((gradient != 0).any()))


def _depends_on(loss: Loss, scores: TrajectoryScores, field: str, generator: torch.Generator) -> bool:
    table = scores.given()[field]
    if field == "mask":
        changed = table.clone()
        changed[:, 1:] = False
    else:
        changed = table + 0.1 * torch.rand(table.shape, generator=generator, dtype=table.dtype)
    other = replace(scores, **{field: changed})
    if not torch.equal(_value(loss, scores), _value(loss, other)):
        return True
    before, after = _gradients(loss, scores), _gradients(loss, other)
    return any(not torch.equal(before[name], after[name]) for name in before)


def _curvature(loss: Loss, scores: TrajectoryScores, generator: torch.Generator) -> float:
    """The second derivative along a random change of ``log π_θ``."""
    direction = torch.randn(scores.log_policy.shape, generator=generator, dtype=torch.float64)
    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    value = _value(loss, replace(scores, log_policy=scores.log_policy + step * direction), beta=1e-3)
    (slope,) = torch.autograd.grad(value, step, create_graph=True)
    if not slope.requires_grad:
        return 0.0
    return float(torch.autograd.grad(slope, step, allow_unused=True, materialize_grads=True)[0])
