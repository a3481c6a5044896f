"""Second-order and exact minimisers of the TBRM loss.

*Gauss-Newton.* With ``f = φᵀ u(θ)`` the Gauss-Newton matrix of ``E f²`` is ``A = Jᵀ Dᵀ M D J``: ``J`` is the derivative of the
logits in ``θ``, ``M`` the moment matrix of the data, and ``D`` the derivative of ``u`` in the logits, which is the identity in the
first layer and ``I - 1 π_θᵀ`` on each state later (``u_1 = logit - R_β``, ``u_h = log π_θ - R_β``). ``D`` and ``M`` never need the
trajectories again, so one iteration costs the same for a hundred trajectories and for all of them. Directions that change nothing
(I8) are left where they are by the damping.

*Tables, deterministic transitions.* Steps are then taken in the coordinates of I14, additive functions ``Σ_h g_h``, in which ``f``
is linear: ``D = I``, and every start is a few damped steps from the minimum. Scaled by the mass of the pairs, ``M`` has all its
nonzero eigenvalues in ``[1, H]`` for Markov data, however rare a pair is: by I11 the function is also the sum of its orthogonal
increments, one function of a pair for each layer, so ``g`` of least norm has ``Σ_h E g_h² <= E (Σ_h g_h)²``; ``H`` is
Cauchy-Schwarz. That is why conjugate gradients need few products.

The same least-squares problem, solved once by a sparse direct route, is :func:`least_squares_plan`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import scipy.sparse
import scipy.sparse.linalg
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from tbrm_theory.dynamic_programming import soft_policy
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.objectives import Objective, SampleObjective
from tbrm_theory.occupancy import flatten_tables, unflatten_tables
from tbrm_theory.parametrisations import Parametrisation, Tabular
from tbrm_theory.population import soft_plan
from tbrm_theory.shapes import PerLayerStateAction
from tbrm_theory.tables import check_finite

__all__ = ["DENSE_LIMIT", "Minimum", "lbfgs", "least_squares_plan", "levenberg_marquardt"]

DENSE_LIMIT = 400
"""Above this many parameters or pairs the Gauss-Newton system is solved by conjugate gradients, without a matrix."""

_SMALLEST_DAMPING, _LARGEST_DAMPING = 1e-10, 1e10
_LOOSEST, _TIGHTEST = 1e-2, 1e-6  # where conjugate gradients stop, relative to the gradient
_ROUNDING = torch.finfo(torch.float64).eps
_MOST_PRODUCTS = 1000  # in one solution by conjugate gradients
_LIMIT_REACHED = 1  # SciPy's status of a run that ended at a limit on iterations or on evaluations
_LARGEST_STEP = 1e50  # beyond it there is nothing but a failure
_ENTRIES_AT_ONCE = 1 << 22  # of the matrices of several seeds, and of the rows that a diagonal is made of

Seeds = Float[Tensor, " seeds"]
Parameters = Float[Tensor, "seeds parameters"]
Pairs = Float[Tensor, "*batch pairs"]


@dataclass(frozen=True, eq=False)
class Minimum:
    """Where a minimiser stopped, for each seed."""

    theta: Parameters
    loss: Seeds
    converged: Bool[Tensor, " seeds"]
    """The loss is not above the tolerance, or no step decreases it any more beyond rounding."""
    iterations: int


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

    The damping is Marquardt's, a multiple of the diagonal, and each seed has its own. Up to ``DENSE_LIMIT`` the system is
    factorised; above, it is solved by conjugate gradients on products that cost one backward and one forward sweep, no more exactly
    than the gradient at hand deserves.

    Args:
        theta: ``(seeds, D)``.
        tolerance: a seed stops when its loss is not above it, or when a step promises no more than rounding.
        after_step: called with the iteration, the parameters and the losses.

    Raises:
        InvalidInputError: starting points of another size, or not finite.
    """
    if theta.dim() != 2 or theta.shape[-1] != parametrisation.size:
        expected = f"expected shape (seeds, {parametrisation.size})"
        raise InvalidInputError("theta", f"{expected}, found {tuple(theta.shape)}")
    check_finite(theta, "theta")
    metric = _Metric(objective, parametrisation)
    theta, damping = theta.detach().clone(), theta.new_full((len(theta),), 1e-2)
    rejections = torch.zeros_like(damping)
    loss, gradient = _loss_and_gradient(objective, parametrisation, theta)
    scale = gradient.norm(dim=-1).clamp(min=torch.finfo(torch.float64).tiny)
    stopped, iteration = loss <= tolerance, 0
    while iteration < iterations and not bool(stopped.all()):
        iteration += 1
        going = (~stopped).nonzero().squeeze(-1)
        precision = (gradient[going].norm(dim=-1) / scale[going]).clamp(min=_TIGHTEST, max=_LOOSEST)
        step = _damped_step(metric, theta[going], gradient[going], damping[going], precision)
        predicted = -(gradient[going] * step).sum(-1)
        solved = step.any(-1) | ~gradient[going].any(-1)
        trial = parametrisation.moved(theta[going], step)
        trial_loss, trial_gradient = _loss_and_gradient(objective, parametrisation, trial)
        better = trial_loss < loss[going]
        gain = (loss[going] - trial_loss) / predicted
        accepted = going[better]
        theta[accepted], gradient[accepted] = trial[better], trial_gradient[better]
        loss[accepted] = trial_loss[better]
        rejections[going] = torch.where(better, 0.0, rejections[going] + 1)
        factor = torch.where(better, _after_success(gain), 10.0 * rejections[going])
        damping[going] = (damping[going] * factor).clamp(min=_SMALLEST_DAMPING)
        stopped |= (damping > _LARGEST_DAMPING) | (loss <= tolerance)
        stopped[going] |= solved & (predicted <= _ROUNDING * loss[going])
        if after_step is not None:
            after_step(iteration, theta.clone(), loss.clone())
    return Minimum(theta, loss, stopped, iteration)


def _after_success(gain: Seeds) -> Seeds:
    """The change of the damping after a step that lowered the loss by this fraction of what the linear model promised."""
    return torch.where(gain > 0.75, 0.1, torch.where(gain < 0.25, 5.0, 1.0))


def lbfgs(
    objective: Objective,
    parametrisation: Parametrisation,
    theta: Parameters,
    *,
    loss: str = "tbrm",
    iterations: int = 5000,
) -> Minimum:
    """Minimise either loss by SciPy's L-BFGS-B, one starting point after the other: its line search would couple them.

    Args:
        theta: ``(seeds, D)``.
        loss: ``"tbrm"`` or ``"brm"``.
    """

    def value_and_gradient(point: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        leaf = torch.from_numpy(point).to(theta.device).unsqueeze(0).requires_grad_()
        value = objective.loss(parametrisation.logits(leaf), loss)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        return value.item(), gradient.squeeze(0).cpu().numpy()

    limits = {"maxiter": iterations, "maxfun": 2 * iterations, "ftol": 0.0, "gtol": 0.0}
    found = [
        scipy.optimize.minimize(value_and_gradient, start, jac=True, method="L-BFGS-B", options=limits)
        for start in theta.detach().cpu().numpy()
    ]
    return Minimum(
        theta=torch.from_numpy(np.stack([result.x for result in found])).to(theta.device),
        loss=theta.new_tensor([result.fun for result in found]),
        converged=torch.tensor([result.status != _LIMIT_REACHED for result in found], device=theta.device),
        iterations=max(result.nit for result in found),
    )


def _loss_and_gradient(
    objective: Objective, parametrisation: Parametrisation, theta: Parameters
) -> tuple[Seeds, Parameters]:
    """``L``, and half its gradient in a step from ``theta``."""
    step = torch.zeros_like(theta, requires_grad=True)
    loss = objective.loss(parametrisation.logits(parametrisation.moved(theta, step)))
    (gradient,) = torch.autograd.grad(loss.sum(), step)
    return loss.detach(), gradient / 2


# -- the Gauss-Newton system -----------------------------------------------------------------------------------


class _Metric:
    """``A = Jᵀ Dᵀ M D J`` of an objective and a parametrisation at any parameters: products, the diagonal, the matrix."""

    def __init__(self, objective: Objective, parametrisation: Parametrisation) -> None:
        self.objective, self.parametrisation = objective, parametrisation
        mdp = objective.mdp
        width = torch.tensor([table.shape[-1] for table in mdp.reference for _ in range(table.shape[-2])])
        self.states = len(width)
        self.state: Int[Tensor, " pairs"] = torch.arange(self.states).repeat_interleave(width).to(mdp.initial.device)
        self.mass = objective.pair_mass()
        self.is_linear = isinstance(parametrisation, Tabular) and mdp.is_deterministic
        pairs = torch.arange(len(self.state), device=self.state.device)
        self.support = parametrisation.free if isinstance(parametrisation, Tabular) else pairs
        """The pairs whose logits change; of one state, all those that exist or none."""
        self.matrix: Float[Tensor, "support support"] | None = None
        if max(parametrisation.size, len(pairs)) <= DENSE_LIMIT:
            self.matrix = objective.moment_matrix()[self.support[:, None], self.support]

    def policy(self, theta: Parameters) -> Float[Tensor, "seeds pairs"]:
        """``π_θ`` over all pairs; 0 where ``D`` is the identity: in the first layer, or everywhere."""
        if self.is_linear:
            return theta.new_zeros(len(theta), len(self.state))
        tables = [
            soft_policy(torch.where(valid, table, -torch.inf)).exp()
            for table, valid in zip(self.parametrisation.logits(theta), self.objective.mdp.valid, strict=True)
        ]
        return flatten_tables((torch.zeros_like(tables[0]), *tables[1:]))

    def _state_sum(self, x: Pairs) -> Pairs:
        """The sum over all pairs of the same state, at every pair."""
        total = x.new_zeros(*x.shape[:-1], self.states).index_add(-1, self.state, x)
        return total.gather(-1, self.state.expand(x.shape))

    def product(self, theta: Parameters, policy: Pairs, direction: Parameters) -> Parameters:
        """``A v`` by one backward and one forward sweep."""
        change = self.parametrisation.derivative(theta, direction)
        flow = self.objective.moment_product(change - self._state_sum(policy * change))
        return self.parametrisation.adjoint(theta, flow - policy * self._state_sum(flow))

    def diagonal(self, theta: Parameters, policy: Pairs) -> Parameters:
        """The diagonal of ``A``; for tables without a product, since the pairs of one state exclude each other."""
        if isinstance(self.parametrisation, Tabular):
            mass = self.mass.expand(policy.shape)
            others = (self._state_sum(mass) - mass).clamp(min=0.0)
            return self.parametrisation.adjoint(theta, mass * (1 - policy).square() + others * policy.square())
        squares = []
        for columns in self.parametrisation.jacobian(theta).split(_at_once(policy.numel()), dim=-1):
            change = columns.mT - self._state_sum(policy.unsqueeze(-2) * columns.mT)
            squares.append((change * self.objective.moment_product(change)).sum(-1))
        return torch.cat(squares, dim=-1)

    def dense(self, theta: Parameters, policy: Pairs) -> Float[Tensor, "seeds parameters parameters"]:
        """``A`` itself; up to ``DENSE_LIMIT``."""
        assert self.matrix is not None
        if self.is_linear:
            return self.matrix.expand(len(theta), -1, -1)
        weight, state = policy[:, self.support].unsqueeze(-1), self.state[self.support]
        a = self.matrix.expand(len(theta), -1, -1)
        for _ in range(2):  # Dᵀ from the left of M, then from the left of (DᵀM)ᵀ
            total = a.new_zeros(len(theta), self.states, a.shape[-1]).index_add(-2, state, a)
            a = (a - weight * total.index_select(-2, state)).mT
        if isinstance(self.parametrisation, Tabular):
            a = a.contiguous()
            a.diagonal(dim1=-2, dim2=-1).copy_(self.diagonal(theta, policy))  # does not cancel
            return a
        jacobian = self.parametrisation.jacobian(theta)
        return jacobian.mT @ a @ jacobian


def _at_once(size: int) -> int:
    """How many pieces of this size are handled at once."""
    return max(1, _ENTRIES_AT_ONCE // size)


def _damped_step(
    metric: _Metric, theta: Parameters, gradient: Parameters, damping: Seeds, precision: Seeds
) -> Parameters:
    """``-(A + λ diag A)⁻¹ g`` in the scaling that makes ``diag A = 1``; parameters without data stay put.

    A system that cannot be solved gives no step, and what is left of the precision is lost on the loss test.
    """
    solve = _by_conjugate_gradients if metric.matrix is None else _by_factorisation
    at_once = len(theta) if metric.matrix is None else _at_once(theta.shape[-1] ** 2)
    batches = zip(*(column.split(at_once) for column in (theta, gradient, damping, precision)), strict=True)
    step = torch.cat([solve(metric, *batch) for batch in batches])
    usable = (step.abs() <= _LARGEST_STEP).all(-1, keepdim=True)  # False where it is NaN, too
    return torch.where(usable, step, 0.0)


def _by_factorisation(
    metric: _Metric, theta: Parameters, gradient: Parameters, damping: Seeds, precision: Seeds
) -> Parameters:
    matrix = metric.dense(theta, metric.policy(theta))
    scale = _inverse_root(matrix.diagonal(dim1=-2, dim2=-1))
    matrix = matrix * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    matrix.diagonal(dim1=-2, dim2=-1).copy_((1 + damping).unsqueeze(-1).expand_as(scale))
    factor, failed = torch.linalg.cholesky_ex(matrix)
    step = -scale * torch.cholesky_solve((scale * gradient).unsqueeze(-1), factor).squeeze(-1)
    return torch.where((failed == 0).unsqueeze(-1), step, 0.0)


def _by_conjugate_gradients(
    metric: _Metric, theta: Parameters, gradient: Parameters, damping: Seeds, precision: Seeds
) -> Parameters:
    policy = metric.policy(theta)
    scale = _inverse_root(metric.diagonal(theta, policy))

    def multiply(x: Parameters) -> Parameters:
        return scale * metric.product(theta, policy, scale * x) + damping.unsqueeze(-1) * x

    return -scale * conjugate_gradients(multiply, scale * gradient, precision, most_products=_MOST_PRODUCTS)


def _inverse_root(diagonal: Tensor) -> Tensor:
    """``d^-½``, and 0 where ``d`` is 0 up to rounding."""
    floor = diagonal.amax(-1, keepdim=True) * 1e-300
    return torch.where(diagonal > floor, diagonal.clamp(min=1e-300).rsqrt(), 0.0)


def conjugate_gradients(
    multiply: Callable[[Parameters], Parameters], target: Parameters, precision: Seeds, *, most_products: int
) -> Parameters:
    """``x`` with ``‖B x - b‖ <= precision · ‖b‖`` for a positive definite ``B``, one system for each seed (Hestenes, Stiefel 1952)."""
    x, residual, direction = torch.zeros_like(target), target, target
    square = target.square().sum(-1)
    goal = precision.square() * square
    for _ in range(most_products):
        unfinished = square > goal
        if not bool(unfinished.any()):
            break
        product = multiply(direction)
        curvature = (direction * product).sum(-1)
        length = torch.where(unfinished & (curvature > 0), square / curvature, 0.0).unsqueeze(-1)
        x, residual = x + length * direction, residual - length * product
        new_square = residual.square().sum(-1)
        ratio = torch.where(square > 0, new_square / square, 0.0).unsqueeze(-1)
        direction, square = residual + ratio * direction, new_square
    return x


# -- the exact minimiser (I14) ---------------------------------------------------------------------------------


_UNFINISHED = (6, 7)  # lsmr's reasons to stop: the condition number, the limit on iterations
_STOPS = (1e-15, 1e-13)  # where lsmr stops, relative to the sizes of the matrix and of what is left; tried in turn
_STATIONARY = 1e-11  # the largest gradient of a solution, relative to the target


def least_squares_plan(objective: SampleObjective) -> PerLayerStateAction:
    """The exact global minimiser of the tabular TBRM loss on a data set, for any returns (theory.md I14).

    One sparse least-squares fit of ``y/β + log π_ref`` by additive functions ``Σ_h g_h(s_h,a_h)``, and one soft backward sweep of
    ``g``. Where the data do not identify the reward, ``g`` is the fit of least norm, each pair weighted by its share of the data;
    it is 0 on pairs without data, and ``π_θ`` is whatever follows from that.

    Raises:
        InvalidInputError: stochastic transitions, for which additive functions and logits do not correspond; data so ill-conditioned
            that the fit stops before it is as good as float64 allows.
    """
    mdp = objective.mdp
    if not mdp.is_deterministic:
        raise InvalidInputError("mdp", "expected deterministic transitions")
    visits = objective.features
    log_reference = flatten_tables(mdp.log_reference).cpu().numpy()
    target = objective.returns.cpu().numpy() / mdp.beta.item() + visits @ np.where(
        np.isfinite(log_reference), log_reference, 0.0
    )
    root = np.sqrt(objective.trajectory_weights.cpu().numpy())
    scale = 1 / np.sqrt(np.maximum(objective.pair_mass().cpu().numpy(), np.finfo(float).tiny))
    design = (scipy.sparse.diags_array(root) @ visits @ scipy.sparse.diags_array(scale)).tocsr()
    fit = _least_squares(design, root * target)
    if fit is None:
        raise InvalidInputError(
            "objective", "expected data on which the fit converges; it is too ill-conditioned for float64"
        )
    return soft_plan(mdp, unflatten_tables(mdp, torch.from_numpy(scale * fit).to(mdp.initial.device)))


def _least_squares(design: scipy.sparse.csr_array, target: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """The solution of least norm; None if there is none to be had.

    What lsmr says of its own success is not enough: once the target is exhausted it goes on with rounding errors, and may take a
    solution far from the minimum for converged. So it is stopped before that, and the gradient is computed.
    """
    for stop in _STOPS:
        fit, reason, *_ = scipy.sparse.linalg.lsmr(
            design, target, atol=stop, btol=stop, conlim=0.0, maxiter=10 * design.shape[1]
        )
        gradient = np.linalg.norm(design.T @ (target - design @ fit))
        if reason not in _UNFINISHED and gradient <= _STATIONARY * np.linalg.norm(target):
            return fit
    return None
