"""Second-order and exact minimisers of the TBRM loss.

*Gauss-Newton.* With ``f = φᵀ u(θ)`` the Gauss-Newton matrix of ``E f²`` is ``Jᵀ Dᵀ M D J``: ``J`` is the derivative of the logits
in ``θ``, ``M`` the moment matrix of the data, and ``D`` the derivative of ``u`` in the logits, which is the identity in the first
layer and ``I - 1 π_θᵀ`` on each state later (``u_1 = logit - R_β``, ``u_h = log π_θ - R_β``). ``D`` and ``M`` never need the
trajectories again, so one iteration costs the same for a hundred trajectories and for all of them. Directions that change nothing
(I8) are left where they are by the damping.

*I14.* For tabular logits and deterministic transitions the minimiser is the soft plan of a linear least-squares reward estimate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from tbrm_theory.dynamic_programming import soft_policy, soft_value
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.objectives import Objective, SampleObjective
from tbrm_theory.occupancy import flatten_tables, unflatten_tables
from tbrm_theory.parametrisations import Parametrisation
from tbrm_theory.shapes import PerLayerStateAction

__all__ = ["DENSE_LIMIT", "Minimum", "least_squares_plan", "levenberg_marquardt"]

DENSE_LIMIT = 3000
"""Above this many parameters the Gauss-Newton system is solved by conjugate gradients, without a matrix."""

_SMALLEST_DAMPING, _LARGEST_DAMPING = 1e-10, 1e10

Seeds = Float[Tensor, " seeds"]
Parameters = Float[Tensor, "seeds parameters"]


@dataclass(frozen=True, eq=False)
class Minimum:
    """Where a minimiser stopped, for each seed."""

    theta: Parameters
    loss: Seeds
    converged: Bool[Tensor, " seeds"]
    """The loss is below the tolerance, or no step decreases it any more."""
    iterations: int


class _Metric:
    """``D`` and ``M`` at given logits, applied to vectors over pairs and to parameters."""

    def __init__(self, objective: Objective, parametrisation: Parametrisation) -> None:
        self.objective, self.parametrisation = objective, parametrisation
        reference = objective.mdp.reference
        rows = [table.shape[-2] for table in reference]
        starts = torch.tensor([0, *rows[:-1]]).cumsum(0).tolist()
        self.state: Int[Tensor, " pairs"] = torch.cat(
            [
                (start + torch.arange(table.shape[-2])).repeat_interleave(table.shape[-1])
                for start, table in zip(starts, reference, strict=True)
            ]
        ).to(reference[0].device)
        self.states = sum(rows)
        self.mass = objective.pair_mass()
        self.matrix = objective.moment_matrix() if parametrisation.size <= DENSE_LIMIT else None

    def policy(self, theta: Parameters) -> Float[Tensor, "seeds pairs"]:
        """``π_θ`` over all pairs; 0 in the first layer, where ``D`` is the identity."""
        mdp = self.objective.mdp
        tables = [
            torch.where(valid, soft_policy(torch.where(valid, table, -torch.inf)).exp(), 0.0)
            for table, valid in zip(self.parametrisation.logits(theta), mdp.valid, strict=True)
        ]
        return flatten_tables((torch.zeros_like(tables[0]), *tables[1:]))

    def _state_sum(self, x: Float[Tensor, "*batch pairs"]) -> Float[Tensor, "*batch pairs"]:
        total = x.new_zeros(*x.shape[:-1], self.states).index_add(-1, self.state, x)
        return total.index_select(-1, self.state)

    def product(self, theta: Parameters, policy: Tensor, direction: Parameters) -> Parameters:
        """``Jᵀ Dᵀ M D J v`` by one backward and one forward sweep."""
        change = self.parametrisation.derivative(theta, direction)
        change = change - self._state_sum(policy * change)
        flow = self.objective.moment_product(change)
        return self.parametrisation.adjoint(theta, flow - policy * self._state_sum(flow))

    def dense(self, theta: Parameters, policy: Tensor) -> Float[Tensor, "seeds parameters parameters"]:
        """``Jᵀ Dᵀ M D J``."""
        assert self.matrix is not None
        right = self.matrix - self._state_sum(self.matrix) * policy.unsqueeze(-2)
        columns = right.transpose(-1, -2)  # Dᵀ acts on the other index
        both = columns - self._state_sum(columns) * policy.unsqueeze(-2)
        return self.parametrisation.congruence(theta, both.transpose(-1, -2))

    def diagonal(self, theta: Parameters, policy: Tensor) -> Parameters:
        """The diagonal of ``Dᵀ M D`` at the parameters; pairs of one state exclude each other, so no sweep is needed."""
        pairs = self.mass * (1 - 2 * policy) + policy.square() * self._state_sum(self.mass.expand_as(policy))
        return self.parametrisation.adjoint(theta, pairs)


def levenberg_marquardt(
    objective: Objective,
    parametrisation: Parametrisation,
    theta: Parameters,
    *,
    iterations: int = 200,
    tolerance: float = 1e-28,
    after_step: Callable[[int, Parameters, Seeds], None] | None = None,
) -> Minimum:
    """Minimise the TBRM loss from every starting point of the batch by damped Gauss-Newton steps.

    The damping is Marquardt's, a multiple of the diagonal, and each seed has its own. Up to ``DENSE_LIMIT`` parameters the
    system is factorised; above, it is solved by conjugate gradients on products that cost one backward and one forward sweep.

    Args:
        theta: ``(seeds, D)``.
        tolerance: stop when every loss is below it.
        after_step: called with the iteration, the parameters and the losses.
    """
    metric = _Metric(objective, parametrisation)
    damping = theta.new_full((len(theta),), 1e-2)
    loss, gradient = _loss_and_gradient(objective, parametrisation, theta)
    stalled = torch.zeros_like(loss, dtype=torch.bool)
    iteration = 0
    for iteration in range(1, iterations + 1):
        step = _damped_step(metric, theta, gradient, damping)
        trial = theta + torch.where(stalled.unsqueeze(-1), 0.0, step)
        trial_loss, trial_gradient = _loss_and_gradient(objective, parametrisation, trial)
        better = trial_loss < loss
        theta = torch.where(better.unsqueeze(-1), trial, theta)
        gradient = torch.where(better.unsqueeze(-1), trial_gradient, gradient)
        loss = torch.where(better, trial_loss, loss)
        damping = torch.where(better, damping / 10, damping * 10).clamp(min=_SMALLEST_DAMPING)
        stalled = (damping > _LARGEST_DAMPING) | (loss <= tolerance)
        if after_step is not None:
            after_step(iteration, theta, loss)
        if bool(stalled.all()):
            break
    return Minimum(theta, loss, stalled, iteration)


def _loss_and_gradient(
    objective: Objective, parametrisation: Parametrisation, theta: Parameters
) -> tuple[Seeds, Parameters]:
    """``L`` and ``½∇L``."""
    leaf = theta.detach().requires_grad_()
    loss = objective.loss(parametrisation.logits(leaf))
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient / 2


def _damped_step(metric: _Metric, theta: Parameters, gradient: Parameters, damping: Seeds) -> Parameters:
    """``-(A + λ diag A)⁻¹ g`` in the scaling that makes ``diag A = 1``; parameters without data stay put."""
    policy = metric.policy(theta)
    if metric.matrix is not None:
        matrix = metric.dense(theta, policy)
        scale = _inverse_root(matrix.diagonal(dim1=-2, dim2=-1))
        matrix = matrix * scale.unsqueeze(-1) * scale.unsqueeze(-2)
        matrix.diagonal(dim1=-2, dim2=-1).copy_((1 + damping).unsqueeze(-1).expand_as(scale))
        factor, _ = torch.linalg.cholesky_ex(matrix)
        scaled = torch.cholesky_solve((scale * gradient).unsqueeze(-1), factor).squeeze(-1)
        # A failed factorisation leaves rubbish, which the loss test rejects; NaN must not reach it.
        return torch.where(torch.isfinite(scaled), -scale * scaled, 0.0)
    scale = _inverse_root(metric.diagonal(theta, policy))
    return torch.stack(
        [
            -scale[i]
            * _conjugate_gradients(metric, theta[i : i + 1], policy[i : i + 1], scale[i], gradient[i], damping[i])
            for i in range(len(theta))
        ]
    )


def _inverse_root(diagonal: Tensor) -> Tensor:
    """``d^-½``, and 0 where ``d`` is 0 up to rounding."""
    floor = diagonal.amax(-1, keepdim=True) * 1e-300
    return torch.where(diagonal > floor, diagonal.clamp(min=1e-300).rsqrt(), 0.0)


def _conjugate_gradients(
    metric: _Metric, theta: Parameters, policy: Tensor, scale: Tensor, gradient: Tensor, damping: Tensor
) -> Tensor:
    def multiply(x: NDArray[np.float64]) -> NDArray[np.float64]:
        direction = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64)).to(scale.device)
        product = metric.product(theta, policy, (scale * direction).unsqueeze(0)).squeeze(0)
        return (scale * product + damping * direction).cpu().numpy()

    size = len(scale)
    operator = scipy.sparse.linalg.LinearOperator((size, size), matvec=multiply, dtype=np.float64)
    solution, _ = scipy.sparse.linalg.cg(operator, (scale * gradient).cpu().numpy(), rtol=1e-10, maxiter=2 * size)
    return torch.from_numpy(solution).to(scale.device)


def least_squares_plan(objective: SampleObjective) -> PerLayerStateAction:
    """The exact global minimiser of the tabular TBRM loss on a data set, for any returns (theory.md I14).

    One sparse least-squares fit of ``y/β + log π_ref`` by additive functions ``Σ_h g_h(s_h,a_h)``, the one of least norm, and one
    soft backward sweep of ``g``: logits ``g_h + V_{h+1}(next)``, ``V_h = logsumexp``. Where the data do not identify the reward,
    ``g`` is the least-norm choice and ``π_θ`` is whatever follows from it.

    Raises:
        InvalidInputError: stochastic transitions, for which additive functions and logits do not correspond.
    """
    mdp = objective.mdp
    if not mdp.is_deterministic:
        raise InvalidInputError("mdp", "expected deterministic transitions")
    pairs = objective.features
    logs = np.where(np.isfinite(reference := flatten_tables(mdp.log_reference).cpu().numpy()), reference, 0.0)
    target = objective.returns.cpu().numpy() / mdp.beta.item() + pairs @ logs
    root = np.sqrt(objective._weights.cpu().numpy())
    scale = 1 / np.sqrt(np.maximum(objective.pair_mass().cpu().numpy(), np.finfo(float).tiny))
    design = pairs.multiply(root[:, None]).multiply(scale[None, :]).tocsr()
    fit = scipy.sparse.linalg.lsmr(design, root * target, atol=0.0, btol=0.0, conlim=0.0, maxiter=10 * design.shape[1])
    return soft_plan(mdp, unflatten_tables(mdp, torch.from_numpy(scale * fit[0]).to(mdp.initial.device)))


def soft_plan(mdp: RegularizedMDP, g: PerLayerStateAction) -> PerLayerStateAction:
    """The soft backward pass of an additive function: ``Σ_h g_h = V_θ(s_1) + log π_θ(τ)`` for the returned logits (I14)."""
    logits: list[Tensor] = [torch.where(mdp.valid[-1], g[-1], -torch.inf)]
    for h in range(mdp.horizon - 2, -1, -1):
        following = mdp.transitions[h].expect(soft_value(logits[-1]))
        logits.append(torch.where(mdp.valid[h], g[h] + following, -torch.inf))
    return tuple(reversed(logits))
