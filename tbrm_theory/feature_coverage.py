"""How well data cover a policy for a class of residuals that are linear in features: κ and Λ restricted to it (own; O5).

Reward models ``R_β + Σ_i w_i ψ_i(h,s,a)`` and their soft plans ``θ_w`` (``population.soft_plan``) have the residual
``f_θ(τ) = w·Ψ(τ)``, ``Ψ(τ) = Σ_h ψ(h,s_h,a_h)``, on deterministic transitions. All that the bounds ask of the data is then

* ``κ_Ψ(π,μ) = sup_w (w·E_π Ψ)² / E_μ[(w·Ψ)²]``, at most κ;
* ``Λ_Ψ(π,μ) = sup_w E_π[(w·Ψ)²] / E_μ[(w·Ψ)²]``, at most Λ:

covariances of ``k`` features in the place of all pairs. They stay finite where μ omits actions, as long as what it does see determines
``w``. Markov data; sweeps alone, so of any size.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tbrm_theory.dynamic_programming import check_policy
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.occupancy import moment_product, occupancy
from tbrm_theory.population import soft_plan
from tbrm_theory.shapes import PerLayerStateAction, Scalars

__all__ = ["Features", "class_kappa", "class_logits", "class_second_moment", "feature_moments"]

Features = PerLayerStateAction
"""``ψ``, one table ``(k, S_h, A_h)`` for each layer."""
_SINGULAR = 1e-10
"""Eigenvalues of the covariance with unit diagonal below this are zeros."""


def class_logits(mdp: RegularizedMDP, features: Features, weights: Float[Tensor, "... k"]) -> PerLayerStateAction:
    """``θ_w``: the soft plan of ``R_β + w·ψ``, ``(…, S_h, A_h)``."""
    return soft_plan(
        mdp,
        tuple(
            torch.where(valid, reward, 0.0) + torch.einsum("...k,ksa->...sa", weights, table)
            for valid, reward, table in zip(mdp.valid, mdp.regularized_reward, features, strict=True)
        ),
    )


def feature_moments(
    mdp: RegularizedMDP, log_policy: PerLayerStateAction, features: Features
) -> tuple[Float[Tensor, " k"], Float[Tensor, "k k"]]:
    """``E_π Ψ`` and ``E_π[ΨΨᵀ]`` of one Markov policy, by two sweeps for each feature.

    Raises:
        InvalidInputError: features of another shape, a batch, or tables that are no policy.
    """
    check_policy(mdp, log_policy, "log_policy")
    if mdp.batch_shape or any(table.dim() != 2 for table in log_policy):
        raise InvalidInputError("log_policy", "expected one problem and one policy, found a batch")
    for h, (table, reference) in enumerate(zip(features, mdp.reference, strict=True)):
        if table.dim() != 3 or table.shape[1:] != reference.shape:
            expected = f"expected (k, {', '.join(map(str, reference.shape))})"
            raise InvalidInputError(f"features[{h}]", f"{expected}, found {tuple(table.shape)}")
    existing = tuple(torch.where(valid, table, 0.0) for valid, table in zip(mdp.valid, features, strict=True))
    d = occupancy(mdp, log_policy).state_action
    mean = torch.stack([torch.einsum("ksa,sa->k", table, mass) for table, mass in zip(existing, d, strict=True)])
    carried = moment_product(mdp, log_policy, existing)
    square = torch.stack([torch.einsum("ksa,lsa->kl", *tables) for tables in zip(existing, carried, strict=True)])
    return mean.sum(0), square.sum(0)


def class_kappa(
    mdp: RegularizedMDP, log_pi: PerLayerStateAction, log_mu: PerLayerStateAction, features: Features
) -> Scalars:
    """``κ_Ψ(π,μ)``, ``inf`` if the class holds an ``f`` that vanishes on the data and not in the mean of ``π``."""
    scale, values, vectors = _whitened(mdp, log_mu, features)
    mean = feature_moments(mdp, log_pi, features)[0] / scale
    along = vectors.mT @ mean
    inside = values > _SINGULAR
    outside = torch.where(inside, 0.0, along).abs().amax() > _SINGULAR * mean.abs().amax()
    return torch.where(outside, torch.inf, torch.where(inside, along.square() / values, 0.0).sum())


def class_second_moment(
    mdp: RegularizedMDP, log_pi: PerLayerStateAction, log_mu: PerLayerStateAction, features: Features
) -> Scalars:
    """``Λ_Ψ(π,μ)``, ``inf`` if the class holds an ``f`` that vanishes on the data and not under ``π``."""
    scale, values, vectors = _whitened(mdp, log_mu, features)
    square = vectors.mT @ (feature_moments(mdp, log_pi, features)[1] / torch.outer(scale, scale)) @ vectors
    inside = values > _SINGULAR
    outside = torch.where(inside, 0.0, square.diagonal()).amax() > _SINGULAR * square.diagonal().amax()
    root = torch.where(inside, values.rsqrt(), 0.0)
    return torch.where(outside, torch.inf, torch.linalg.eigvalsh(square * torch.outer(root, root))[-1])


def _whitened(
    mdp: RegularizedMDP, log_mu: PerLayerStateAction, features: Features
) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"], Float[Tensor, "k k"]]:
    """Roots of ``E_μ ψ_i²``, then eigenvalues and eigenvectors of the covariance with unit diagonal."""
    square = feature_moments(mdp, log_mu, features)[1]
    scale = torch.where(square.diagonal() > 0, square.diagonal(), 1.0).sqrt()
    return scale, *torch.linalg.eigh(square / torch.outer(scale, scale))
