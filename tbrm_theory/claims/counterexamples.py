"""C3: C1's assumptions are needed. Two problems on which TBRM has a strict local minimum that is not the global one.

Both are committed in the instance format, minima included, in the folder ``counterexamples``: one has stochastic transitions and
free logits, the other is a tree, realisable, with two-dimensional linear logits. The first problem of each claim is the file's own;
the later ones perturb it, and Newton's method follows the minimum.

Gradients and losses are ``population_loss`` on ``parametrisations``; minima are found, and Hessians written out, by
``derivatives``, which shares no code with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from tbrm_theory import population
from tbrm_theory.claims.cases import Case, case_of
from tbrm_theory.claims.comparison import Comparison
from tbrm_theory.claims.derivatives import ListedLoss, flat, tables
from tbrm_theory.claims.registry import claim
from tbrm_theory.instance import Instance
from tbrm_theory.json_fields import read_json
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.parametrisations import Linear
from tbrm_theory.random_tables import seeded
from tbrm_theory.shapes import PerLayerStateAction
from tbrm_theory.transitions import DenseTransition

__all__ = ["LEAST_CURVATURE", "Counterexample", "linear_logits", "newton", "stochastic_transitions"]

FOLDER = Path(__file__).parent / "counterexamples"
PERTURBATION = {"stochastic": 0.001, "linear": 0.1}
"""Standard deviations: of rewards and of logits of transitions and data, where the loss is 0.0065 above ``L(θ*)``; of features."""
LEAST_CURVATURE = 0.05
"""No eigenvalue of the Hessian modulo the gauge is smaller, in either problem and its perturbations."""
RADIUS = 1e-3
"""Of the sphere around a minimum on which the loss must have grown."""


@dataclass(frozen=True, eq=False)
class Counterexample:
    """A problem with its data, and a local minimum that is not the global one."""

    case: Case
    log_behaviour: PerLayerStateAction
    loss: ListedLoss
    features: Float[Tensor, "pairs parameters"]
    """The derivative of the logits in the parameters; the identity for free logits."""
    spurious: Float[Tensor, " parameters"]
    better: Float[Tensor, " parameters"]
    """The other minimum; the realisable optimum ``θ*`` of the linear problem."""

    def population_loss(self, theta: Float[Tensor, "... parameters"]) -> Float[Tensor, "..."]:
        logits = Linear(self.case.mdp, self.features).logits(theta)
        return population.population_loss(self.case.mdp, logits, self.log_behaviour)

    @property
    def hessian(self) -> Float[Tensor, "parameters parameters"]:
        """At the local minimum, written out."""
        return self.features.T @ self.loss.hessian(self.features @ self.spurious) @ self.features

    @property
    def curved(self) -> Float[Tensor, "parameters directions"]:
        """An orthonormal basis of the parameters modulo the gauge, that is, modulo constants on the states of later layers."""
        whose = self.loss.state * (self.loss.layer > 0)
        gauge = torch.stack([(whose == state).to(torch.float64) for state in whose[whose > 0].unique()], -1)
        unseen = torch.linalg.lstsq(self.features, gauge).solution
        free = unseen[:, (self.features @ unseen - gauge).norm(dim=0) < 1e-9]  # gauge directions that the features have
        basis = torch.linalg.svd(free).U[:, free.shape[-1] :]
        return basis

    @property
    def size(self) -> Tensor:
        """The size of the squared terms of the loss, for its rounding."""
        theta = torch.stack([self.spurious, self.better]) @ self.features.T
        return (1 + theta.abs().amax() + self.loss.reward.abs().amax()).square() * self.case.mdp.horizon**2


def newton(
    loss: ListedLoss, features: Float[Tensor, "pairs parameters"], theta: Float[Tensor, "... parameters"]
) -> Float[Tensor, "... parameters"]:
    """The stationary points that Newton's method reaches from nearby, never moving along the gauge."""
    for _ in range(20):
        logits = theta @ features.T
        gradient = loss.gradient(logits) @ features
        hessian = features.T @ loss.hessian(logits) @ features
        inverse = torch.linalg.pinv(hessian, hermitian=True, rtol=1e-9)
        step = (inverse @ gradient.unsqueeze(-1)).squeeze(-1)
        theta = theta - step
        if step.abs().max() < 1e-9:  # the next would be of its square
            break
    return theta


# -- the two problems ------------------------------------------------------------------------------------------------


@cache
def _instance(name: str) -> Instance:
    return Instance.load(FOLDER / f"{name}.json")


@lru_cache(maxsize=4)
def stochastic_transitions(seed: int) -> Counterexample:
    """Free logits on a coin: the file's problem for seed 0, perturbed for the others."""
    instance = _instance("stochastic_transitions")
    mdp, log_behaviour = instance.mdp, instance.mdp.log_reference
    if seed > 0:
        generator, size = seeded(seed), PERTURBATION["stochastic"]

        def noise(like: Tensor) -> Tensor:
            return size * torch.randn(like.shape, generator=generator, dtype=torch.float64)

        [kernel] = mdp.transitions
        assert isinstance(kernel, DenseTransition)
        moved = torch.softmax(kernel.probability.log() + noise(kernel.probability), -1)
        log_behaviour = tuple(torch.log_softmax(log + noise(log), -1) for log in log_behaviour)
        mdp = RegularizedMDP(
            beta=mdp.beta,
            initial=mdp.initial,
            reward=[table + noise(table) for table in mdp.reward],
            reference=mdp.reference,
            transitions=[DenseTransition(moved)],
        )
    case = case_of(mdp, "C3", seed)
    loss = ListedLoss.of(mdp, case.listed, case.listed.log_law(log_behaviour).exp())
    features = torch.eye(len(loss.state), dtype=torch.float64)
    start = torch.stack([flat(mdp, instance.logits[name]) for name in ("spurious", "lower")])
    spurious, lower = newton(loss, features, start)
    return Counterexample(case, log_behaviour, loss, features, spurious, lower)


@lru_cache(maxsize=4)
def linear_logits(seed: int) -> Counterexample:
    """Realisable linear logits on a tree: the file's problem for seed 0; other features, and the rewards that fit, for the others."""
    instance = _instance("linear_logits")
    document = read_json(FOLDER / "linear_logits_features.json")
    rows = [[cell.number() for cell in row.items()] for row in document["features"].items()]
    features = torch.tensor(rows, dtype=torch.float64)
    optimal, spurious = (
        torch.tensor([cell.number() for cell in document["parameters"][name].items()], dtype=torch.float64)
        for name in ("optimal", "spurious")
    )
    mdp, log_behaviour = instance.mdp, instance.policies["mu"]
    if seed > 0:
        draws = torch.randn(features.shape, generator=seeded(seed), dtype=torch.float64)
        features = features + PERTURBATION["linear"] * draws
        mdp = realised(mdp, tables(mdp, features @ optimal))
    case = case_of(mdp, "C3", seed)
    loss = ListedLoss.of(mdp, case.listed, case.listed.log_law(log_behaviour).exp())
    return Counterexample(case, log_behaviour, loss, features, newton(loss, features, spurious), optimal)


def realised(mdp: RegularizedMDP, q: PerLayerStateAction) -> RegularizedMDP:
    """The problem with the rewards of which ``q`` is ``Q*``: ``R_β = Q - E V_Q``."""
    zero = RegularizedMDP(
        beta=mdp.beta,
        initial=mdp.initial,
        reward=[torch.zeros_like(table) for table in mdp.reward],
        reference=mdp.reference,
        transitions=mdp.transitions,
    )
    following = [
        kernel.expect(torch.logsumexp(table, -1)) for kernel, table in zip(mdp.transitions, q[1:], strict=True)
    ]
    own = (*(table - value for table, value in zip(q, following, strict=False)), q[-1])
    reward = [mdp.beta * (table - log) for table, log in zip(own, zero.log_reference, strict=True)]
    return RegularizedMDP(
        beta=mdp.beta, initial=mdp.initial, reward=reward, reference=mdp.reference, transitions=mdp.transitions
    )


def _stochastic_case(seed: int) -> Case:
    return stochastic_transitions(seed).case


def _linear_case(seed: int) -> Case:
    return linear_logits(seed).case


# -- the claims -------------------------------------------------------------------------------------------------------


def _stationary(example: Counterexample) -> Comparison:
    theta = example.spurious.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(example.population_loss(theta), theta)
    scale = example.size * example.features.abs().amax()
    return Comparison(gradient, torch.zeros_like(gradient), scale, 2 * example.case.sweep + example.case.listing)


def _strict(example: Counterexample) -> Comparison:
    basis = example.curved
    curvature = torch.linalg.eigvalsh(basis.T @ example.hessian @ basis)[0]
    directions = torch.randn(64, basis.shape[-1], generator=seeded(0), dtype=torch.float64)
    around = example.spurious + RADIUS * torch.nn.functional.normalize(directions, dim=-1) @ basis.T
    grown = example.population_loss(torch.cat([example.spurious.unsqueeze(0), around]))
    least = torch.cat(
        [curvature.new_tensor([LEAST_CURVATURE]), grown[0] + 0.25 * curvature * RADIUS**2 + 0 * grown[1:]]
    )
    found = torch.cat([curvature.unsqueeze(0), grown[1:]])
    return Comparison(least, found, example.size, 2 * example.case.sweep + example.case.listing, "at most")


@claim("C3.a", source="own", problem=_stochastic_case)
def stochastic_stationary(case: Case) -> Comparison:
    """stochastic transitions: ∇L = 0 at a point of large loss

    Two states are reached with probability ½ whatever is done; the rewards there are far apart. Left: autograd
    through ``population_loss`` at the point that Newton's method finds. Right: 0.
    """
    return _stationary(stochastic_transitions(case.seed))


@claim("C3.b", source="own", problem=_stochastic_case)
def stochastic_strict(case: Case) -> Comparison:
    """stochastic transitions: the Hessian there is positive modulo the gauge

    Left: 0.05, and ``L + ¼ λ ρ²``. Right: the least eigenvalue ``λ`` of the Hessian, written out, on the complement of
    the gauge (I8), and the ``population_loss`` at 64 points of a sphere of radius ``ρ`` there.
    """
    return _strict(stochastic_transitions(case.seed))


@claim("C3.c", source="own", problem=_stochastic_case)
def stochastic_spurious(case: Case) -> Comparison:
    """stochastic transitions: its loss is above that of another minimum, and above L(θ*)

    by at least 0.2 and 0.001. So neither is the minimum global nor does it tell the optimum from others. Left: the
    ``population_loss`` at both, plus these. Right: that at the local minimum.
    """
    example = stochastic_transitions(case.seed)
    at_optimum = population.population_loss(case.mdp, case.solution.q, example.log_behaviour)
    left = torch.stack([example.population_loss(example.better) + 0.2, at_optimum + 0.001])
    right = example.population_loss(example.spurious)
    return Comparison(left, right, example.size, 2 * case.sweep + case.listing, "at most")


@claim("C3.d", source="own", problem=_linear_case)
def linear_stationary(case: Case) -> Comparison:
    """shared parameters: ∇L = 0 at a point of large loss

    Two linear parameters on a binary tree of two steps, ``Q* = Φθ*``, uneven data. Left: autograd through
    ``population_loss`` at the point that Newton's method finds. Right: 0.
    """
    return _stationary(linear_logits(case.seed))


@claim("C3.e", source="own", problem=_linear_case)
def linear_strict(case: Case) -> Comparison:
    """shared parameters: the Hessian there is positive

    As in C3.b; two parameters have no gauge.
    """
    return _strict(linear_logits(case.seed))


@claim("C3.f", source="own", problem=_linear_case)
def linear_spurious(case: Case) -> Comparison:
    """shared parameters: L(θ*) = 0, and the loss there is at least 1

    The problem is realisable, deterministic and covered; only the parameters are shared. Left: ``√L(θ*)``, and 1.
    Right: 0, and the ``population_loss`` at the local minimum.
    """
    example = linear_logits(case.seed)
    loss = example.population_loss(torch.stack([example.better, example.spurious]))
    left, right = (
        torch.stack([loss[0].sqrt(), torch.ones_like(loss[1])]),
        torch.stack([torch.zeros_like(loss[0]), loss[1]]),
    )
    return Comparison(left, right, example.size, 2 * case.sweep + case.listing, "at most")
