"""Both sides of the inequalities that are searched, batched and differentiable.

The left side of a supremum over additive functions ``f`` (``κ``, ``Λ``) is evaluated at one ``f``, found by linear algebra without
gradients: it is then a lower bound whatever rounding did to ``f``, and by the envelope theorem its gradient is that of the supremum.
``E (Σf)²`` is always a sum of squares (I11), so neither side cancels.

For Markov ``μ`` and deterministic transitions an additive function is one of the first pair and, in later layers, functions of
the pair with ``E_μ[f_h | s_h] = 0``: a basis of these that is orthonormal under ``μ`` needs no inverse, however small its
probabilities are.

A maximum (``C_∞``, ``max|u|``) has a ``sharpness``: that of ``log x`` is then ``logsumexp(sharpness · log x)/sharpness``, an upper
bound with a gradient in every cell, by which a search can balance them; None is the maximum itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tbrm_theory.claims.search_space import Data
from tbrm_theory.dynamic_programming import soft_policy
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.occupancy import flatten_tables, moment_matrix, moment_product, occupancy, unflatten_tables
from tbrm_theory.population import additive_moments, residual_terms, soft_plan
from tbrm_theory.shapes import PerLayerStateAction, Scalars
from tbrm_theory.tables import safe_log

__all__ = [
    "c_inf",
    "chi_squares",
    "gradient_domination",
    "kappa_formula",
    "largest_residual",
    "maximum",
    "mean",
    "mixture_kappa",
    "path_laws",
    "second_moment",
    "square_mean",
]

_JITTER = 1e-12
"""Added to the unit diagonal of a mixture's moment matrix: a null direction then has a large quotient instead of none."""


def _total(layers: list[Tensor]) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*layers)).sum(0)


def maximum(log_values: Tensor, sharpness: float | None) -> Tensor:
    """Of the last dimension; see the module."""
    return log_values.amax(-1) if sharpness is None else torch.logsumexp(sharpness * log_values, -1) / sharpness


def _over(numerator: Tensor, denominator: Tensor) -> Tensor:
    """``0/0 = 0``."""
    zero = numerator == 0
    return torch.where(zero, 0.0, numerator / torch.where(zero, 1.0, denominator))


def _mixed(mdp: RegularizedMDP, data: Data) -> PerLayerStateAction:
    """``d^μ_h(s,a)`` of a policy or a mixture."""
    parts = [
        [weight[..., None, None] * layer for layer in occupancy(mdp, log_mu).state_action] for weight, log_mu in data
    ]
    return tuple(_total(list(layers)) for layers in zip(*parts, strict=True))


# -- shift of occupancies ------------------------------------------------------------------------------------------


def chi_squares(mdp: RegularizedMDP, log_pi: PerLayerStateAction, data: Data) -> list[Scalars]:
    """``χ²(d^π_h(s,a) ‖ d^μ_h(s,a))`` of every layer, without the cancellation of ``Σ p²/q - 1``."""
    pairs = zip(occupancy(mdp, log_pi).state_action, _mixed(mdp, data), strict=True)
    return [_over((p - q).square(), q).sum((-2, -1)) for p, q in pairs]


def kappa_formula(mdp: RegularizedMDP, log_pi: PerLayerStateAction, data: Data) -> Scalars:
    """I12's right side minus 1, ``Σ_h E_{s~d^μ}[w_h(s)² χ²(π(·|s) ‖ μ(·|s))]``, with ``μ(a|s) = d^μ(s,a)/d^μ(s)``."""
    layers = []
    for p, q in zip(occupancy(mdp, log_pi).state_action, _mixed(mdp, data), strict=True):
        p_state, q_state = p.sum(-1, keepdim=True), q.sum(-1, keepdim=True)
        gap = (_over(p, p_state) - _over(q, q_state)).square()
        divergence = _over(gap, _over(q, q_state)).sum(-1, keepdim=True)
        layers.append((_over(p_state.square(), q_state) * divergence).sum((-2, -1)))
    return _total(layers)


def c_inf(mdp: RegularizedMDP, log_pi: PerLayerStateAction, data: Data, sharpness: float | None = None) -> Scalars:
    """``C_∞ = max d^π_h(s,a)/d^μ_h(s,a)`` over the pairs that π reaches."""
    p, q = flatten_tables(occupancy(mdp, log_pi).state_action), flatten_tables(_mixed(mdp, data))
    reached = p > 0
    ratios = torch.where(reached, safe_log(p) - torch.where(reached, safe_log(q), 0.0), -torch.inf)
    return maximum(ratios, sharpness).exp()


# -- suprema over additive functions -------------------------------------------------------------------------------


def square_mean(mdp: RegularizedMDP, tables: PerLayerStateAction, data: Data) -> Scalars:
    """``E_μ[(Σ_h f_h)²]``."""
    parts = []
    for weight, log_mu in data:
        moments = additive_moments(mdp, tables, log_mu)
        parts.append(weight * (mdp.initial * (moments.mean.square() + moments.variance)).sum(-1))
    return _total(parts)


def mean(mdp: RegularizedMDP, tables: PerLayerStateAction, log_pi: PerLayerStateAction) -> Scalars:
    """``E_π Σ_h f_h``."""
    return (mdp.initial * additive_moments(mdp, tables, log_pi).mean).sum(-1)


def second_moment(mdp: RegularizedMDP, log_pi: PerLayerStateAction, log_mu: PerLayerStateAction) -> Scalars:
    """``Λ(π,μ) = sup_f E_π[(Σf)²]/E_μ[(Σf)²]`` for Markov ``μ`` and deterministic transitions (B3)."""
    with torch.no_grad():
        basis = _orthonormal(mdp, log_mu)
        form = basis.mT @ moment_matrix(mdp, log_pi) @ basis
        form = torch.nan_to_num((form + form.mT) / 2)
        best = torch.linalg.eigh(form).eigenvectors[..., -1:]
        f = unflatten_tables(mdp, (basis @ best).squeeze(-1))
    one = torch.ones((), dtype=torch.float64)
    return square_mean(mdp, f, [(one, log_pi)]) / square_mean(mdp, f, [(one, log_mu)])


def _orthonormal(mdp: RegularizedMDP, log_mu: PerLayerStateAction) -> Tensor:
    """``(…, pairs, functions)``: the basis of the module's second paragraph. States that μ does not reach have none."""
    d = occupancy(mdp, log_mu)
    blocks = []
    for h, (mass, log) in enumerate(zip(d.state, log_mu, strict=True)):
        root = (log / 2).exp()
        columns = torch.diag_embed(1 / root)  # for the first layer: indicators of the actions
        if h > 0:
            # The reflection that takes the first axis to -√μ; its other columns are orthogonal to √μ.
            axis = torch.zeros_like(root)
            axis[..., 0] = 1
            w = axis + root
            reflection = (
                torch.eye(root.shape[-1], dtype=root.dtype)
                - 2 * w.unsqueeze(-1) * w.unsqueeze(-2) / (w.square().sum(-1)[..., None, None])
            )
            columns = reflection[..., 1:] / root.unsqueeze(-1)
        scale = torch.where(mass > 0, torch.where(mass > 0, mass, 1.0).rsqrt(), 0.0)
        columns = columns * scale[..., None, None]  # (…, S, A, K)
        states = torch.eye(columns.shape[-3], dtype=root.dtype)
        block = columns.unsqueeze(-2) * states[:, None, :, None]  # (…, S, A, S, K)
        blocks.append(block.flatten(-2).flatten(-3, -2))
    batch = torch.broadcast_shapes(*(block.shape[:-2] for block in blocks))
    rows, width, left = [], sum(block.shape[-1] for block in blocks), 0
    for block in blocks:
        pad = (left, width - left - block.shape[-1])
        rows.append(torch.nn.functional.pad(block.expand(*batch, *block.shape[-2:]), pad))
        left += block.shape[-1]
    return torch.cat(rows, dim=-2)


def mixture_kappa(mdp: RegularizedMDP, log_pi: PerLayerStateAction, data: Data) -> Scalars:
    """``κ(π,μ)`` of any mixture, from below: ``f`` solves ``M_μ f = E_π φ`` after scaling to unit diagonal.

    Where ``M_μ`` is singular the jitter leaves a large number in place of ``∞``.
    """
    with torch.no_grad():
        matrix = _total([weight[..., None, None] * moment_matrix(mdp, log_mu) for weight, log_mu in data])
        target = flatten_tables(occupancy(mdp, log_pi).state_action)
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        scale = torch.where(diagonal > 0, torch.where(diagonal > 0, diagonal, 1.0).rsqrt(), 0.0)
        unit = scale.unsqueeze(-1) * matrix * scale.unsqueeze(-2)
        values, vectors = torch.linalg.eigh((unit + unit.mT) / 2)
        coordinates = (vectors.mT @ (scale * target).unsqueeze(-1)).squeeze(-1) / values.clamp(min=_JITTER)
        f = unflatten_tables(mdp, scale * (vectors @ coordinates.unsqueeze(-1)).squeeze(-1))
    return mean(mdp, f, log_pi).square() / square_mean(mdp, f, data)


# -- losses --------------------------------------------------------------------------------------------------------


def path_laws(mdp: RegularizedMDP, theta: PerLayerStateAction, steps: int) -> PerLayerStateAction:
    """``log π_t`` with ``P_{π_t} ∝ P_{π*} exp(t f_θ)`` (B7) for ``steps`` values of t from 0 to 1, a new first dimension."""
    u = residual_terms(mdp, theta)
    times = torch.linspace(0, 1, steps, dtype=torch.float64)
    times = times.reshape(steps, *[1] * max(layer.dim() for layer in u))
    plan = soft_plan(mdp, tuple(r + times * layer for r, layer in zip(mdp.regularized_reward, u, strict=True)))
    return tuple(soft_policy(table) for table in plan)


def largest_residual(mdp: RegularizedMDP, u: PerLayerStateAction) -> Scalars:
    """``max |Σ_h u_h|`` over the trajectories of deterministic problems, by a backward sweep."""
    most, least = u[-1].amax(-1), u[-1].amin(-1)
    for h in reversed(range(mdp.horizon - 1)):
        most = (u[h] + mdp.transitions[h].expect(most)).amax(-1)
        least = (u[h] + mdp.transitions[h].expect(least)).amin(-1)
    return torch.maximum(most, -least).amax(-1)


def gradient_domination(
    mdp: RegularizedMDP,
    theta: PerLayerStateAction,
    log_mu: PerLayerStateAction,
    sharpness: float | None = None,
) -> tuple[Scalars, Scalars]:
    """``L`` and ``(H/2) max|u| ‖∇L‖₁`` (C1); the maximum over the pairs that μ reaches."""
    u = residual_terms(mdp, theta)
    e = moment_product(mdp, log_mu, u)
    gradient = [e[0].abs().sum((-2, -1))]
    for table, layer in zip(theta[1:], e[1:], strict=True):
        gradient.append((layer - soft_policy(table).exp() * layer.sum(-1, keepdim=True)).abs().sum((-2, -1)))
    d = occupancy(mdp, log_mu).state_action
    sizes = flatten_tables(
        tuple(torch.where(mass > 0, safe_log(x.abs()), -torch.inf) for mass, x in zip(d, u, strict=True))
    )
    loss = square_mean(mdp, u, [(torch.ones((), dtype=torch.float64), log_mu)])
    return loss, mdp.horizon * maximum(sizes, sharpness).exp() * _total(gradient)
