"""Moment matrices of trajectory laws as quadratic forms: what is in their range, and suprema of quotients (theory.md I12, B3).

``M = E_μ[φφᵀ]`` with the indicator features ``φ(τ) = Σ_h e_(h,s_h,a_h)`` gives ``E_μ[(Σ_h f_h)²] = fᵀ M f``. It is singular, since
a constant can be moved between layers (I8), and its entries span hundreds of orders of magnitude. Two measures keep it honest:

* it is scaled to unit diagonal, from logarithms, before anything is computed with it;
* its range is decided on the *support* alone. The null space of ``M`` is the set of additive functions that vanish on every trajectory
  of positive probability, whatever that probability is; so the rank is read off the matrix of a behaviour with the same support
  that spreads its mass evenly, where nothing is nearly singular.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.linalg
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tbrm_theory.behaviours import Behaviour
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.occupancy import Enumeration, enumerate_trajectories, flatten_tables, log_moment_matrix
from tbrm_theory.shapes import PerLayerStateAction, Scalars
from tbrm_theory.transitions import DeterministicTransition, Transition

__all__ = ["MOST_PAIRS", "MomentForm", "largest_mean_square", "largest_second_moment", "moment_form"]

MOST_PAIRS = 3000
"""A dense matrix with more rows than this is refused."""
_RANK = 1e-9
"""Eigenvalues of the evenly spread matrix below this are zeros; those that are not are orders of magnitude larger."""
_ROUNDING = 1e-11
"""A sum that cancels to less than this share of its terms is zero."""

Matrix = Float[Tensor, "... pairs pairs"]
Doubles: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class MomentForm:
    """``fᵀ M f`` of one law, in logarithms, beside the matrix of a law with the same support and even mass."""

    log_matrix: Matrix
    """``log M``; ``-inf`` exactly where no trajectory has both pairs."""
    even_mass: Callable[[], Matrix]
    """Makes :attr:`log_even`, which not every question needs."""
    markov: bool
    """Whether the law is that of one Markov policy: then whatever lives on its pairs is in range (I12)."""

    @cached_property
    def log_even(self) -> Matrix:
        """``log M`` for even mass."""
        return self.even_mass()

    @cached_property
    def log_mass(self) -> Float[Tensor, "... pairs"]:
        """``log d^μ(h,s,a)``, the diagonal."""
        return self.log_matrix.diagonal(dim1=-2, dim2=-1)

    @cached_property
    def covered(self) -> Bool[Tensor, "... pairs"]:
        return self.log_mass > -torch.inf

    @cached_property
    def scaled(self) -> Matrix:
        """``M`` with unit diagonal on the covered pairs, 0 elsewhere."""
        return scaled_by(self.log_matrix, self.log_mass)

    @cached_property
    def even(self) -> Matrix:
        return scaled_by(self.log_even, self.log_even.diagonal(dim1=-2, dim2=-1)).detach()

    @cached_property
    def rank(self) -> Int[Tensor, "..."]:
        return (torch.linalg.eigvalsh(self.even) > _RANK).sum(-1)

    @cached_property
    def null_functions(self) -> Matrix:
        """A basis of the null space: a column is 1 on one dependent pair and rests on independent ones; others are 0."""
        root = (0.5 * self.log_even.diagonal(dim1=-2, dim2=-1)).exp()
        rows = (
            zip(self.even.flatten(0, -3), root.flatten(0, -2), strict=True) if root.dim() > 1 else [(self.even, root)]
        )
        found = [_null_functions(*(table.numpy(force=True) for table in row)) for row in rows]
        return torch.from_numpy(np.stack(found)).to(root.device).reshape(self.even.shape)

    @cached_property
    def spectrum(self) -> tuple[Float[Tensor, "... pairs"], Matrix]:
        """Eigenvalues of the scaled matrix, those outside the range ``inf``, and eigenvectors; no gradient."""
        values, vectors = torch.linalg.eigh(self.scaled.detach())
        pairs = values.shape[-1]
        inside = torch.arange(pairs, device=values.device) >= pairs - self.rank.unsqueeze(-1)
        smallest = torch.finfo(values.dtype).eps  # what is in range is positive, however it was rounded
        return torch.where(inside, values.clamp(min=smallest), torch.inf), vectors

    @cached_property
    def condition(self) -> Scalars:
        """The largest eigenvalue in range over the smallest: how much rounding is amplified."""
        values = self.spectrum[0]
        return torch.where(values < torch.inf, values, 0.0).amax(-1) / values.amin(-1)


def moment_form(mdp: RegularizedMDP, behaviour: Behaviour) -> MomentForm:
    """The moment matrix of any behaviour: of its Markov components if it has some, else from every trajectory.

    Raises:
        InvalidInputError: more than :data:`MOST_PAIRS` pairs, or no components and too many trajectories to list.
    """
    pairs = sum(table.shape[-2:].numel() for table in mdp.reference)
    if pairs > MOST_PAIRS:
        raise InvalidInputError(
            "mdp", f"expected at most {MOST_PAIRS} pairs (h, s, a) for a moment matrix, found {pairs}"
        )
    if behaviour.components is None:
        listed = enumerate_trajectories(mdp)
        law = behaviour.log_law(mdp, listed)
        even = torch.where(law > -torch.inf, torch.zeros_like(law), -torch.inf)
        return MomentForm(_log_moments(mdp, listed, law), lambda: _log_moments(mdp, listed, even), markov=False)
    parts = [(weight, policy) for weight, policy in behaviour.components if weight > 0]

    def even_mass() -> Matrix:
        evenly = _evenly(mdp)
        return _mixed([(1 / len(parts), log_moment_matrix(evenly, _even_policy(policy))) for _, policy in parts])

    exact = _mixed([(weight, log_moment_matrix(mdp, policy)) for weight, policy in parts])
    return MomentForm(exact, even_mass, markov=len(parts) == 1)


def largest_mean_square(form: MomentForm, log_mean: PerLayerStateAction) -> Scalars:
    """``sup_f (v·f)² / fᵀMf = vᵀ M⁺ v``, with ``v = E_π φ`` given as ``log d^π`` for each layer; ``inf`` if ``v`` is not in range.

    The gradient is that of the quotient at the best ``f``, held fixed.
    """
    log_v = flatten_tables(log_mean)
    finite = _in_range(form, log_v)
    exponent = torch.where(form.covered & (log_v > -torch.inf), log_v - 0.5 * form.log_mass, -torch.inf)
    top = exponent.detach().amax(-1, keepdim=True)
    v = (exponent - torch.where(top > -torch.inf, top, 0.0)).exp()
    values, vectors = form.spectrum
    best = vectors @ ((vectors.transpose(-1, -2) @ v.detach().unsqueeze(-1)) / values.unsqueeze(-1))
    mean = (v.unsqueeze(-2) @ best).squeeze((-2, -1))
    square = (best.transpose(-1, -2) @ form.scaled @ best).squeeze((-2, -1))
    return torch.where(finite, mean.square() / square * (2 * top.squeeze(-1)).exp(), torch.inf)


def largest_second_moment(data: MomentForm, target: MomentForm) -> Scalars:
    """``sup_f fᵀM_πf / fᵀM_μf``, ``inf`` if some ``f`` vanishes under μ but not under π.

    The gradient is that of the quotient at the best ``f``, held fixed.
    """
    finite = _covers(data, target)
    exponent = target.log_matrix - 0.5 * (data.log_mass.unsqueeze(-1) + data.log_mass.unsqueeze(-2))
    both = data.covered.unsqueeze(-1) & data.covered.unsqueeze(-2)
    exponent = torch.where(both & (target.log_matrix > -torch.inf), exponent, -torch.inf)
    top = exponent.detach().amax((-2, -1), keepdim=True)
    matrix = (exponent - torch.where(top > -torch.inf, top, 0.0)).exp()
    values, vectors = data.spectrum
    whitening = vectors / values.sqrt().unsqueeze(-2)
    inner = whitening.transpose(-1, -2) @ matrix.detach() @ whitening
    best = whitening @ torch.linalg.eigh(inner)[1][..., -1:]
    over, under = ((best.transpose(-1, -2) @ form @ best).squeeze((-2, -1)) for form in (matrix, data.scaled))
    return torch.where(finite, over / under * top.squeeze((-2, -1)).exp(), torch.inf)


def scaled_by(log_matrix: Matrix, log_mass: Float[Tensor, "... pairs"]) -> Matrix:
    """``exp(log_matrix)`` divided by the roots of the masses of both pairs, 0 where either has none."""
    there = log_mass > -torch.inf
    half = 0.5 * torch.where(there, log_mass, 0.0)
    both = there.unsqueeze(-1) & there.unsqueeze(-2) & (log_matrix > -torch.inf)
    exponent = torch.where(both, log_matrix, 0.0) - half.unsqueeze(-1) - half.unsqueeze(-2)
    return torch.where(both, exponent.exp(), 0.0)


# -- ranges ----------------------------------------------------------------------------------------------------------


def _in_range(form: MomentForm, log_v: Float[Tensor, "... pairs"]) -> Bool[Tensor, "..."]:
    """Whether ``v = exp log_v`` is in the range of ``M``.

    Each function of a basis of the null space is tried against the size of its own terms, so that what is rare is not drowned
    by what is frequent.
    """
    batch = torch.broadcast_shapes(form.covered.shape[:-1], log_v.shape[:-1])
    inside = ~((log_v > -torch.inf) & ~form.covered).any(-1).expand(batch)
    if form.markov or not bool(inside.any()):
        return inside
    v, null = log_v.detach().exp().unsqueeze(-2), form.null_functions
    gap, terms = (v @ null).abs(), v @ null.abs()
    return inside & (gap <= _ROUNDING * terms).all(-1).squeeze(-1)


def _null_functions(even: Doubles, root: Doubles) -> Doubles:
    """Of one evenly spread matrix with unit diagonal, and the roots of its masses: one column for each dependent pair."""
    found = np.zeros_like(even)
    covered = np.flatnonzero(root > 0)
    matrix = even[np.ix_(covered, covered)]
    _, triangle, order = scipy.linalg.qr(matrix, pivoting=True)
    rank = int((np.abs(np.diag(triangle)) > _RANK).sum())
    independent, dependent = order[:rank], order[rank:]
    if len(dependent):
        block = matrix[np.ix_(independent, independent)]
        weights = scipy.linalg.solve(block, matrix[np.ix_(independent, dependent)], assume_a="pos")
        independent, dependent = covered[independent], covered[dependent]
        weights *= root[dependent] / root[independent][:, None]
        weights[np.abs(weights) < _RANK] = 0.0
        found[np.ix_(independent, dependent)] = -weights
        found[dependent, dependent] = 1.0
    return found


def _covers(data: MomentForm, target: MomentForm) -> Bool[Tensor, "..."]:
    """Whether every ``f`` that vanishes on the data's trajectories vanishes on the target's: decided on the supports."""
    inside = ~(target.covered & ~data.covered).any(-1)
    if data.markov:
        return inside
    values, vectors = torch.linalg.eigh(data.even)
    null = torch.where((values <= _RANK).unsqueeze(-2), vectors, 0.0)
    mass = data.log_even.diagonal(dim1=-2, dim2=-1)
    seen = scaled_by(target.log_even, mass).detach() @ null  # f = null / √mass
    return inside & (seen.flatten(-2).abs().amax(-1) <= _RANK)


# -- building --------------------------------------------------------------------------------------------------------


def _mixed(parts: list[tuple[float, Matrix]]) -> Matrix:
    """``log Σ_i w_i M_i``."""
    logs = torch.stack(torch.broadcast_tensors(*(np.log(weight) + matrix for weight, matrix in parts)))
    if len(logs) == 1:
        return logs[0]
    top = logs.detach().amax(0)
    shift = torch.where(top > -torch.inf, top, 0.0)
    total = (logs - shift).exp().sum(0)
    return torch.where(total > 0, torch.where(total > 0, total, 1.0).log() + shift, -torch.inf)


def _log_moments(mdp: RegularizedMDP, listed: Enumeration, log_law: Float[Tensor, "... trajectories"]) -> Matrix:
    """``log M`` of a law on listed trajectories, largest probability taken out."""
    sizes = [table.shape[-2:].numel() for table in mdp.reference]
    start = torch.tensor([0, *np.cumsum(sizes)[:-1]], device=log_law.device)
    actions = torch.tensor([table.shape[-1] for table in mdp.reference], device=log_law.device)
    pair = start + listed.states * actions + listed.actions
    cell = (pair.unsqueeze(-1) * sum(sizes) + pair.unsqueeze(-2)).flatten(-2)  # (trajectories, H²)
    into = cell.flatten().expand(*log_law.shape[:-1], -1)
    logs = log_law.unsqueeze(-1).expand(*log_law.shape, cell.shape[-1]).flatten(-2)
    top = log_law.new_full((*log_law.shape[:-1], sum(sizes) ** 2), -torch.inf).scatter_reduce(-1, into, logs, "amax")
    shift = torch.where(top > -torch.inf, top, 0.0)
    total = torch.zeros_like(top).scatter_add(-1, into, (logs - shift.gather(-1, into)).exp())
    return (total.log() + shift).unflatten(-1, (sum(sizes), sum(sizes)))


def _even_policy(log_policy: PerLayerStateAction) -> PerLayerStateAction:
    """Uniform on what the policy takes."""
    taken = [log > -torch.inf for log in log_policy]
    return tuple(
        torch.where(table, -table.sum(-1, keepdim=True).to(torch.float64).log(), -torch.inf) for table in taken
    )


def _evenly(mdp: RegularizedMDP) -> RegularizedMDP:
    """The problem whose starts and successors are uniform on those that are possible."""

    def even(probability: Tensor) -> Tensor:
        possible = (probability > 0).to(torch.float64)
        return possible / possible.sum(-1, keepdim=True).clamp(min=1)

    def evened(kernel: Transition) -> Transition:
        if isinstance(kernel, DeterministicTransition):
            return kernel
        return replace(kernel, probability=even(kernel.probability))

    return RegularizedMDP(
        beta=mdp.beta,
        initial=even(mdp.initial),
        reward=mdp.reward,
        reference=mdp.reference,
        transitions=[evened(kernel) for kernel in mdp.transitions],
    )
