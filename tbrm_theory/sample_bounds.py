"""What a finite sample says about the population loss (theory.md B6).

``N`` independent trajectories, a class ``Θ`` fixed before the data, ``|f_θ| ≤ B``, all in units of β; ``δ`` is the probability of
failure and ``ℓ = log(|Θ|/δ)``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tbrm_theory.errors import InvalidInputError

__all__ = [
    "NOISY_CONSTANT",
    "TILT",
    "finite_sample_loss",
    "finite_sample_noisy",
    "theorem2_finite_sample",
    "theorem2_net",
    "theorem2_noisy",
]

TILT = 1.5936242600400403
"""``s > 0`` with ``s = 2 (1 - e^{-s})``, for which :func:`finite_sample_loss` has the factor 2 of [Y]."""
NOISY_CONSTANT = 1 / (1 - math.exp(-1 / 8))
"""8.51 in the place of ``28/3``; see :func:`finite_sample_noisy`."""


def theorem2_finite_sample(
    empirical_loss: Tensor, *, residual_bound: float, class_size: int, count: int, delta: float
) -> Tensor:
    """``L_μ(θ) ≤ 2 L_D(θ) + 2 B² log(|Θ|/δ)/N`` for all θ, with probability ``1-δ`` ([Y] Thm. 2; theory.md B6), ``(…)``.

    *Proof.* ``X = f²`` is in ``[0, B²]``, so ``E X² ≤ B² L``, and for independent non-negative variables ``P(L - L_D ≥ t) ≤
    exp(-N t²/(2 E X²))``. With the union bound ``L ≤ L_D + √(L · 2 B² ℓ/N) ≤ L_D + L/2 + B² ℓ/N``, ``ℓ = log(|Θ|/δ)``. ∎

    Raises:
        InvalidInputError: no data or class, a bound that is not positive, or ``delta`` outside ``(0, 1)``.
    """
    return 2 * empirical_loss + 2 * _per_trajectory(residual_bound, class_size, count, delta)


def theorem2_net(
    empirical_loss: Tensor,
    *,
    residual_bound: float,
    net_size: int,
    count: int,
    delta: float,
    horizon: int,
    lipschitz: float,
    epsilon: float,
) -> Tensor:
    """``L_μ(θ) ≤ 2 L_D(θ) + 2 B² log(N_ε/δ)/N + 12 B H L_Θ ε`` for all θ of an infinite class ([Y] Thm. 2, Lemma 7; B6), ``(…)``.

    *Proof.* ``f`` is a sum of ``H`` logits less ``H-1`` values, each ``L_Θ``-Lipschitz in θ: ``|f_θ - f_θ'| ≤ 2 H L_Θ ε`` for the
    nearest θ' of the net, hence ``|f_θ² - f_θ'²| ≤ 4 B H L_Θ ε``; once for ``L``, twice for ``2 L_D``. ∎

    Args:
        net_size: ``N_ε``, how many members of the class leave no other further than ``epsilon`` away.
        lipschitz: ``L_Θ``, of every logit in θ.

    Raises:
        InvalidInputError: as :func:`theorem2_finite_sample`, or a negative horizon, ``lipschitz`` or ``epsilon``.
    """
    for name, number in (("horizon", horizon), ("lipschitz", lipschitz), ("epsilon", epsilon)):
        if not number >= 0:
            raise InvalidInputError(name, f"expected no negative number, found {number}")
    net = theorem2_finite_sample(
        empirical_loss, residual_bound=residual_bound, class_size=net_size, count=count, delta=delta
    )
    return net + 12 * residual_bound * horizon * lipschitz * epsilon


def theorem2_noisy(*, residual_bound: float, class_size: int, count: int, delta: float) -> float:
    """``E_μ f̄² ≤ (28/3) B² log(|Θ|/δ)/N`` for an empirical minimiser on noisy returns, realisable, with probability ``1-δ`` (B6).

    ``f = f̄ - ξ`` is the residual of the observed return, ``E[ξ|τ] = 0``; ``|f| ≤ B`` for all of the class, noise included.
    *Proof.* ``Z = f² - ξ² = f̄² - 2 f̄ ξ`` is the excess over θ*, whose ``f̄`` is 0; ``E Z = E f̄² =: v``, and ``Z² = f̄² (f - ξ)² ≤
    4 B² f̄²``. A minimiser has mean excess at most 0, and ``v - Z ≤ 2 B²``, so by Bernstein's inequality ``v ≤ √(8 B² v ℓ/N) +
    2 B² ℓ/(3N) ≤ v/2 + 4 B² ℓ/N + (2/3) B² ℓ/N``. ∎

    Raises:
        InvalidInputError: as :func:`theorem2_finite_sample`.
    """
    return 28 / 3 * _per_trajectory(residual_bound, class_size, count, delta)


def finite_sample_loss(
    empirical_loss: Tensor,
    *,
    residual_bound: float,
    class_size: int,
    count: int,
    delta: float,
    tilt: float = TILT,
) -> Tensor:
    """(own) ``L_μ(θ) ≤ (s L_D(θ) + B² log(|Θ|/δ)/N)/(1 - e^{-s})`` for all θ, with probability ``1-δ``, ``(…)``.

    At ``s = TILT`` it is ``2 L_D + 1.255 B² ℓ/N``. As ``s → ∞``, for members that fit all data, it is ``B² ℓ/N``, half of [Y]'s, and
    no smaller constant serves: a spike ``f = B`` on a set of probability ``ℓ/N`` is not seen with probability ``→ e^{-ℓ}``.

    *Proof.* Convexity on ``[0, B²]``: ``E e^{-s X/B²} ≤ 1 - (1 - e^{-s}) L/B² ≤ exp(-(1 - e^{-s}) L/B²)``. By Markov's inequality
    ``s L_D < (1 - e^{-s}) L - B² ℓ/N`` has probability at most ``e^{-ℓ}``; union bound. ∎

    Args:
        tilt: ``s``, positive, fixed before the data; ``inf`` for a bound that is infinite where ``L_D > 0``.

    Raises:
        InvalidInputError: as :func:`theorem2_finite_sample`, or ``tilt`` not positive.
    """
    if not tilt > 0:
        raise InvalidInputError("tilt", f"expected a positive number, found {tilt}")
    deviation = _per_trajectory(residual_bound, class_size, count, delta)
    if tilt == math.inf:
        return torch.where(empirical_loss == 0, deviation, empirical_loss * torch.inf)  # NaN stays NaN
    return (tilt * empirical_loss + deviation) / -math.expm1(-tilt)


def finite_sample_noisy(*, residual_bound: float, class_size: int, count: int, delta: float) -> float:
    """(own) ``E_μ f̄² ≤ 8.51 B² log(|Θ|/δ)/N`` in the setting of :func:`theorem2_noisy`.

    No constant below 8 serves: for small ``f̄`` and ``ξ = ±B`` the mean excess is normal, with variance ``4 B² v/N``.

    *Proof.* Given τ, ``ξ`` lies in an interval of length ``2B``, and ``|f̄| = |E[f|τ]| ≤ B``. Hoeffding's lemma: ``E[e^{-λZ}|τ] ≤
    exp(-λ f̄² + 2 λ² f̄² B²)``, at ``λ = 1/(4B²)`` that is ``exp(-f̄²/(8B²))``, and by convexity its mean is at most
    ``1 - (1 - e^{-1/8}) v/B²``. So the mean excess of N trajectories is 0 or less with probability at most
    ``exp(-N (1 - e^{-1/8}) v/B²)``; union bound. ∎

    Raises:
        InvalidInputError: as :func:`theorem2_finite_sample`.
    """
    return NOISY_CONSTANT * _per_trajectory(residual_bound, class_size, count, delta)


def _per_trajectory(residual_bound: float, class_size: int, count: int, delta: float) -> float:
    """``B² log(|Θ|/δ)/N``, in units of β²."""
    if not 0 < residual_bound < math.inf:
        raise InvalidInputError("residual_bound", f"expected a positive number, found {residual_bound}")
    for name, number in (("class_size", class_size), ("count", count)):
        if not number >= 1:
            raise InvalidInputError(name, f"expected at least 1, found {number}")
    if not 0 < delta < 1:
        raise InvalidInputError("delta", f"expected a number between 0 and 1, found {delta}")
    return residual_bound * residual_bound * (math.log(class_size) - math.log(delta)) / count
