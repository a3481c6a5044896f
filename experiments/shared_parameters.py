"""Logits that share parameters (linear, low rank, a tanh network), TBRM's loss as a function of these, and where its descent ends.

The problems are trees with two steps and three actions: 12 logits, 9 trajectories. Every row of parameters is a start of some problem.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from tbrm_theory.claims.derivatives import ListedLoss

__all__ = ["ACTIONS", "MARGIN", "SPREAD", "Class", "SharedLoss", "gauss_newton", "judged", "newton_descent"]

MARGIN = 1e-3
"""A loss this much above the best one is another one."""
VANISHING = 1e-7
"""A gradient of this size, relative to the loss, has vanished."""
FLAT = 1e-6
"""An eigenvalue this far below 0, relative to the largest, is rounding."""
SPREAD = 3.0
"""Standard deviation of logits."""
ACTIONS, STATES, FEATURES = 3, 4, 3


class Loss(Protocol):
    """A loss of many rows of parameters at once, ``(…, D)``."""

    def value(self, theta: Tensor) -> Tensor: ...

    def gradient(self, theta: Tensor) -> Tensor: ...

    def hessian(self, theta: Tensor) -> Tensor: ...


def newton_descent(loss: Loss, theta: Tensor, iterations: int) -> Tensor:
    """Damped Newton steps with the absolute eigenvalues of the Hessian, which lead away from saddles."""
    damping = torch.ones_like(theta[..., :1])
    value = loss.value(theta)
    for _ in range(iterations):
        eigenvalues, vectors = torch.linalg.eigh(loss.hessian(theta))
        gradient = (vectors.mT @ loss.gradient(theta).unsqueeze(-1)).squeeze(-1)
        step = (vectors @ (gradient / (eigenvalues.abs() + damping)).unsqueeze(-1)).squeeze(-1)
        theta, value, damping = _step_if_better(loss, theta, step, value, damping)
    return theta


def _step_if_better(
    loss: Loss, theta: Tensor, step: Tensor, value: Tensor, damping: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows whose loss does not rise take the step and damp the next one less; the others stay and damp it more."""
    tried = loss.value(theta - step)
    better = tried <= value
    theta = torch.where(better.unsqueeze(-1), theta - step, theta)
    damping = (damping * torch.where(better.unsqueeze(-1), 0.3, 4.0)).clamp(1e-10, 1e6)
    return theta, torch.where(better, tried, value), damping


def judged(loss: Loss, theta: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows are at a spurious minimum, and which are unfinished."""
    value = loss.value(theta)
    eigenvalues = torch.linalg.eigvalsh(loss.hessian(theta))
    higher = value > best + MARGIN
    still = loss.gradient(theta).norm(dim=-1) <= VANISHING * (1 + value)
    convex = eigenvalues[..., 0] >= -FLAT * eigenvalues[..., -1].clamp(min=1)
    return higher & still & convex, higher & ~still


@dataclass(frozen=True)
class Class:
    """A way to make logits from parameters."""

    kind: str
    size: int
    """Of :data:`SIZES`."""

    @property
    def parameters(self) -> int:
        return self.size * {"linear": 1, "low-rank": STATES + ACTIONS, "network": FEATURES + ACTIONS}[self.kind]

    def name(self, realisable: bool, data: str) -> str:
        return f"{self.kind} D {self.parameters}, {'realisable' if realisable else 'not realisable'}, {data}"

    def fixed(self, problems: int, generator: torch.Generator) -> Tensor:
        """What is random about a problem's class and not learned: features of pairs, of states, or nothing."""
        shape = {"linear": (STATES * ACTIONS, self.size), "low-rank": (0,), "network": (STATES, FEATURES)}[self.kind]
        return torch.randn(problems, *shape, generator=generator, dtype=torch.float64)

    def draw(self, rows: int, generator: torch.Generator) -> Tensor:
        """Parameters whose logits have a standard deviation of about :data:`SPREAD`."""
        theta = torch.randn(rows, self.parameters, generator=generator, dtype=torch.float64)
        if self.kind == "linear":
            return theta * SPREAD / self.size**0.5
        if self.kind == "low-rank":
            return theta * SPREAD**0.5 / self.size**0.25
        inner, outer = theta.split([FEATURES * self.size, ACTIONS * self.size], -1)
        return torch.cat([inner, 1.5 * SPREAD / self.size**0.5 * outer], -1)

    def logits(self, theta: Tensor, fixed: Tensor) -> Tensor:
        """``(D,) → (pairs,)``."""
        if self.kind == "linear":
            return fixed @ theta
        if self.kind == "low-rank":
            left, right = theta.split([STATES * self.size, ACTIONS * self.size])
        else:
            inner, right = theta.split([FEATURES * self.size, ACTIONS * self.size])
            left = torch.tanh(fixed @ inner.unflatten(0, (FEATURES, self.size))).flatten()
        return (left.unflatten(0, (STATES, self.size)) @ right.unflatten(0, (self.size, ACTIONS))).flatten()


@dataclass(frozen=True, eq=False)
class SharedLoss:
    """The loss as a function of the parameters of a class; every row is a start of some problem."""

    which: Class
    fixed: Tensor
    free: ListedLoss
    """Of the logits; reward and weights by rows."""

    def rows(self, index: Tensor) -> SharedLoss:
        free = replace(self.free, reward=self.free.reward[index], weights=self.free.weights[index])
        return SharedLoss(self.which, self.fixed[index], free)

    def logits(self, theta: Tensor) -> Tensor:
        return torch.func.vmap(self.which.logits)(theta, self.fixed)

    def jacobian(self, theta: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.jacrev(self.which.logits))(theta, self.fixed)

    def value(self, theta: Tensor) -> Tensor:
        return self.free.value(self.logits(theta))

    def gradient(self, theta: Tensor) -> Tensor:
        return (self.jacobian(theta).mT @ self.free.gradient(self.logits(theta)).unsqueeze(-1)).squeeze(-1)

    def hessian(self, theta: Tensor) -> Tensor:
        jacobian, logits = self.jacobian(theta), self.logits(theta)
        own = jacobian.mT @ self.free.hessian(logits) @ jacobian
        if self.which.kind == "linear":
            return own

        def weighed(theta: Tensor, fixed: Tensor, weight: Tensor) -> Tensor:
            return (weight * self.which.logits(theta, fixed)).sum()

        return own + torch.func.vmap(torch.func.hessian(weighed))(theta, self.fixed, self.free.gradient(logits))


def gauss_newton(loss: SharedLoss, theta: Tensor, iterations: int) -> Tensor:
    """Damped Gauss-Newton steps, in the 9 trajectories rather than the parameters."""
    root = loss.free.weights.sqrt()
    damping = torch.ones_like(theta[:, :1])
    value = loss.value(theta)
    for _ in range(iterations):
        logits = loss.logits(theta)
        derivative = root.unsqueeze(-1) * (loss.free.residual_derivative(logits) @ loss.jacobian(theta))
        metric = derivative @ derivative.mT
        scale = metric.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True) + 1e-30
        metric = metric + torch.diag_embed((damping * scale + 1e-14).expand_as(root))
        target = (root * loss.free.residual(logits)).unsqueeze(-1)
        step = (derivative.mT @ torch.linalg.solve(metric, target)).squeeze(-1)
        theta, value, damping = _step_if_better(loss, theta, step, value, damping)
    return theta
