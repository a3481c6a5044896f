"""How well data cover a policy: χ², C_∞, κ and the second moment Λ of a change of trajectory measure (theory.md I12, B1-B3).

For additive functions ``Σ_h f_h(s_h,a_h)`` of a trajectory,

* ``κ(π,μ) = sup_f (E_π Σf)² / E_μ[(Σf)²]``  has a closed form for Markov data (:func:`kappa_closed_form`, I12) and is ``vᵀ M⁺ v``
  for all data (:func:`kappa_linear_solve`), with the moment matrix ``M = E_μ[φφᵀ]`` and ``v = E_π φ``;
* ``Λ(π,μ) = sup_f E_π[(Σf)²] / E_μ[(Σf)²]`` is the largest generalised eigenvalue of the two moment matrices (:func:`second_moment`).

Everything starts from logarithms of occupancies, so that a coefficient is ``inf`` where the data lack something, or where it is
beyond the largest double, and not because something underflowed. All functions are batched, and gradients run through them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from tbrm_theory.behaviours import Behaviour, MarkovBehaviour
from tbrm_theory.dynamic_programming import check_policy
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.moments import MomentForm, largest_mean_square, largest_second_moment, moment_form
from tbrm_theory.occupancy import LogOccupancy, enumerate_trajectories, log_occupancy
from tbrm_theory.rigor.coverage import exact_suprema
from tbrm_theory.shapes import PerLayerStateAction, Scalars

__all__ = [
    "ChangeOfMeasure",
    "Data",
    "behaviour_occupancy",
    "c_inf",
    "change_of_measure",
    "chi_square",
    "data_behaviour",
    "kappa",
    "kappa_closed_form",
    "kappa_excess",
    "kappa_linear_solve",
    "lemma1",
    "optimal_test_function",
    "second_moment",
]

MOST_CONDITION = 1e8
"""Moment matrices that are closer to singular are left to rational arithmetic."""

Data: TypeAlias = PerLayerStateAction | Behaviour
"""Tables ``log μ`` of a Markov policy, or any behaviour."""


@dataclass(frozen=True, eq=False)
class ChangeOfMeasure:
    """The coefficients of one pair (π, μ), each of shape ``(…)``, at least 1, ``inf`` where the data do not cover π.

    For data that are not Markov, ``kappa`` and ``second_moment`` are exact, and the other three are the formulas on the data's
    occupancies, no bounds (X1).
    """

    kappa: Scalars
    """``κ(π,μ)``, I12."""
    lemma1: Scalars
    """``1 + Σ_h χ²(d^π_h(s,a) ‖ d^μ_h(s,a))``, [Y] Lemma 1, B1."""
    corollary6: Scalars
    """``H C_∞``, [Y] Cor. 6, B2."""
    c_inf: Scalars
    """``C_∞ = max d^π_h(s,a) / d^μ_h(s,a)``."""
    second_moment: Scalars
    """``Λ(π,μ)``, B3."""


def change_of_measure(mdp: RegularizedMDP, log_pi: PerLayerStateAction, mu: Data) -> ChangeOfMeasure:
    """All coefficients of the target ``π`` and the data ``μ``.

    Args:
        log_pi: tables ``log π``, one for each layer; a batch of policies is possible.
        mu: tables ``log μ`` of Markov data, or a behaviour.

    Raises:
        InvalidInputError: tables that are no policies of this problem, or a problem too large for a moment matrix.
    """
    pi, data = _checked(mdp, log_pi), data_behaviour(mdp, mu)
    d_pi, d_mu = log_occupancy(mdp, pi), behaviour_occupancy(mdp, data)
    ratio = _largest_ratio(d_pi, d_mu)
    return ChangeOfMeasure(
        kappa=kappa(mdp, pi, data),
        lemma1=_lemma1(d_pi, d_mu),
        corollary6=mdp.horizon * ratio,
        c_inf=ratio,
        second_moment=second_moment(mdp, pi, data),
    )


def kappa(mdp: RegularizedMDP, log_pi: PerLayerStateAction, mu: Data) -> Scalars:
    """``κ(π,μ)`` (I12): in closed form for Markov data, from the moment matrix for all others."""
    pi, data = _checked(mdp, log_pi), data_behaviour(mdp, mu)
    parts = data.components
    if parts is not None and len(parts) == 1:
        return kappa_closed_form(mdp, pi, parts[0][1])
    return kappa_linear_solve(mdp, pi, data)


def kappa_excess(mdp: RegularizedMDP, log_pi: PerLayerStateAction, mu: Data) -> Scalars:
    """``κ(π,μ) - 1``, exact to its own size for Markov data, however close π is to μ; at least 0."""
    pi, data = _checked(mdp, log_pi), data_behaviour(mdp, mu)
    parts = data.components
    if parts is not None and len(parts) == 1:
        return _closed_excess(mdp, pi, parts[0][1])
    return (kappa_linear_solve(mdp, pi, data) - 1).clamp(min=0)


def kappa_linear_solve(mdp: RegularizedMDP, log_pi: PerLayerStateAction, mu: Data) -> Scalars:
    """``κ(π,μ) = vᵀ M⁺ v`` (I12), for any data.

    Its relative error is about 2e-16 times the condition number of ``M``. A mixture of policies that all but never cross makes that
    so large that float64 says nothing; then it is found in rational arithmetic, without a gradient.

    Raises:
        InvalidInputError: that happens to data without components, or with batch dimensions.
    """
    pi, data = _checked(mdp, log_pi), data_behaviour(mdp, mu)
    form = moment_form(mdp, data)
    found = largest_mean_square(form, log_occupancy(mdp, pi).state_action)
    return _exactly(mdp, pi, data, found, 0) if _hopeless(form, found) else found


def second_moment(mdp: RegularizedMDP, log_pi: PerLayerStateAction, mu: Data) -> Scalars:
    """``Λ(π,μ)`` (B3), the largest generalised eigenvalue of the moment matrices of ``π`` and ``μ``.

    Its accuracy, and what is done where it is lost, are those of :func:`kappa_linear_solve`.
    """
    pi, data = _checked(mdp, log_pi), data_behaviour(mdp, mu)
    form = moment_form(mdp, data)
    found = largest_second_moment(form, moment_form(mdp, MarkovBehaviour(pi)))
    return _exactly(mdp, pi, data, found, 1) if _hopeless(form, found) else found


def _hopeless(form: MomentForm, found: Scalars) -> bool:
    """Whether a finite coefficient of this matrix has fewer than some eight digits."""
    return bool(((form.condition > MOST_CONDITION) & (found < torch.inf)).any())


def _exactly(mdp: RegularizedMDP, pi: PerLayerStateAction, data: Behaviour, found: Scalars, which: int) -> Scalars:
    """κ (0) or Λ (1) of each target in rational arithmetic, where they are finite."""
    if data.components is None or mdp.batch_shape or any(t.dim() > 2 for _, mu in data.components for t in mu):
        raise InvalidInputError("mu", f"expected data whose moment matrix has a condition below {MOST_CONDITION:g}")
    batch = found.shape
    rows = [table.expand(*batch, *table.shape[-2:]).reshape(-1, *table.shape[-2:]) for table in pi]
    values = [
        exact_suprema(mdp, tuple(table[i] for table in rows), data.components)[which] if bool(finite) else math.inf
        for i, finite in enumerate((found < math.inf).flatten())
    ]
    return torch.tensor(values, dtype=found.dtype, device=found.device).reshape(batch)


def kappa_closed_form(mdp: RegularizedMDP, log_pi: PerLayerStateAction, log_mu: PerLayerStateAction) -> Scalars:
    """``κ = 1 + Σ_h E_{s~d^μ_h}[w_h(s)² χ²(π_h(·|s) ‖ μ_h(·|s))]`` for Markov ``μ`` (I12), ``w_h(s) = d^π_h(s)/d^μ_h(s)``."""
    return 1 + _closed_excess(mdp, log_pi, log_mu)


def _closed_excess(mdp: RegularizedMDP, log_pi: PerLayerStateAction, log_mu: PerLayerStateAction) -> Scalars:
    d_pi, d_mu = log_occupancy(mdp, log_pi).state, log_occupancy(mdp, log_mu).state
    total = torch.zeros((), dtype=torch.float64, device=mdp.initial.device)
    for state_pi, state_mu, pi, mu in zip(d_pi, d_mu, log_pi, log_mu, strict=True):
        weight = (state_pi - 0.5 * state_mu).unsqueeze(-1)
        reached = (state_pi > -torch.inf).unsqueeze(-1)
        total = total + _squared_difference(weight, pi, mu, reached).sum((-2, -1))
    return total


def optimal_test_function(
    mdp: RegularizedMDP, log_pi: PerLayerStateAction, log_mu: PerLayerStateAction
) -> PerLayerStateAction:
    """The ``f`` at which ``κ`` is attained (I12): ``w_h(s,a) - w_h(s)``, and 1 more in the first layer; ``w = d^π/d^μ``.

    Raises:
        InvalidInputError: ``κ`` is infinite, so that nothing attains it.
    """
    if not bool((kappa_closed_form(mdp, log_pi, log_mu) < torch.inf).all()):
        raise InvalidInputError("log_mu", "expected data that cover the policy, found an infinite kappa")
    d_pi, d_mu = log_occupancy(mdp, log_pi), log_occupancy(mdp, log_mu)

    def ratio(target: Tensor, data: Tensor) -> Tensor:
        return torch.where(target > -torch.inf, target - data, -torch.inf).exp()

    f = [
        ratio(*pairs) - ratio(*states).unsqueeze(-1)
        for pairs, states in zip(
            zip(d_pi.state_action, d_mu.state_action, strict=True),
            zip(d_pi.state, d_mu.state, strict=True),
            strict=True,
        )
    ]
    return (1 + f[0], *f[1:])


# -- from occupancies alone ------------------------------------------------------------------------------------------


def chi_square(log_p: Sequence[Tensor], log_q: Sequence[Tensor]) -> tuple[Scalars, ...]:
    """``χ²(p_h ‖ q_h)`` of every layer, from logarithms of occupancies of pairs ``(…, S_h, A_h)``; infinite without coverage."""
    layers = []
    for p, q in zip(log_p, log_q, strict=True):
        none = torch.zeros((), dtype=torch.float64, device=p.device)
        layers.append(_squared_difference(none, p, q, torch.ones_like(none, dtype=torch.bool)).sum((-2, -1)))
    return tuple(layers)


def lemma1(mdp: RegularizedMDP, log_pi: PerLayerStateAction, mu: Data) -> Scalars:
    """``1 + Σ_h χ²(d^π_h(s,a) ‖ d^μ_h(s,a))``: at least ``κ`` for Markov data ([Y] Lemma 1, B1)."""
    return _lemma1(log_occupancy(mdp, _checked(mdp, log_pi)), behaviour_occupancy(mdp, data_behaviour(mdp, mu)))


def c_inf(mdp: RegularizedMDP, log_pi: PerLayerStateAction, mu: Data) -> Scalars:
    """``C_∞ = max_{h,s,a} d^π_h(s,a)/d^μ_h(s,a)`` over the pairs that ``π`` visits."""
    return _largest_ratio(log_occupancy(mdp, _checked(mdp, log_pi)), behaviour_occupancy(mdp, data_behaviour(mdp, mu)))


def behaviour_occupancy(mdp: RegularizedMDP, behaviour: Behaviour) -> LogOccupancy:
    """``log d^μ`` of any behaviour: of its components if it has some, else from every trajectory.

    Raises:
        InvalidInputError: no components, and too many trajectories to list.
    """
    if behaviour.components is not None:
        parts = [(weight, log_occupancy(mdp, policy)) for weight, policy in behaviour.components if weight > 0]
        logs = mdp.initial.new_tensor([weight for weight, _ in parts]).log()

        def mixed(tables: list[Tensor]) -> Tensor:
            shifted = [log + table for log, table in zip(logs, tables, strict=True)]
            return _log_sum(torch.stack(torch.broadcast_tensors(*shifted)))

        layers = range(mdp.horizon)
        return LogOccupancy(
            tuple(mixed([part.state[h] for _, part in parts]) for h in layers),
            tuple(mixed([part.state_action[h] for _, part in parts]) for h in layers),
        )
    listed = enumerate_trajectories(mdp)
    law = behaviour.log_law(mdp, listed).unsqueeze(-2)  # (…, 1, trajectories)
    state, state_action = [], []
    for h, table in enumerate(mdp.reference):
        pair = listed.states[:, h] * table.shape[-1] + listed.actions[:, h]
        here = torch.arange(table.numel(), device=pair.device).unsqueeze(-1) == pair
        state_action.append(_log_sum(torch.where(here, law, -torch.inf), dim=-1).unflatten(-1, table.shape))
        state.append(_log_sum(state_action[-1], dim=-1))
    return LogOccupancy(tuple(state), tuple(state_action))


def _lemma1(d_pi: LogOccupancy, d_mu: LogOccupancy) -> Scalars:
    return 1 + torch.stack(torch.broadcast_tensors(*chi_square(d_pi.state_action, d_mu.state_action))).sum(0)


def _largest_ratio(d_pi: LogOccupancy, d_mu: LogOccupancy) -> Scalars:
    layers = [
        torch.where(p > -torch.inf, p - q, -torch.inf).flatten(-2).amax(-1)
        for p, q in zip(d_pi.state_action, d_mu.state_action, strict=True)
    ]
    return torch.stack(torch.broadcast_tensors(*layers)).amax(0).exp()


def _squared_difference(log_weight: Tensor, log_p: Tensor, log_q: Tensor, counts: Tensor) -> Tensor:
    """``(weight · (p - q))² / q`` where it counts: 0 for 0/0, ``inf`` for a positive ``p`` over 0.

    It is the square of ``weight √q |p/q - 1|``, formed from logarithms: neither ``p - q`` cancels nor does a tiny ``q``
    underflow.
    """
    log_weight, log_p, log_q, counts = torch.broadcast_tensors(log_weight, log_p, log_q, counts)
    uncovered = counts & (log_p > -torch.inf) & ((log_q == -torch.inf) | (log_weight == torch.inf))
    usable = counts & (log_q > -torch.inf) & (log_weight < torch.inf)
    present = usable & (log_p > -torch.inf)
    log_ratio = torch.where(present, log_p, 0.0) - torch.where(present, log_q, 0.0)
    larger = torch.where(usable, log_weight + 0.5 * log_q, 0.0) + log_ratio.clamp(min=0)
    share = torch.where(present, -(-log_ratio.abs()).expm1(), 1.0)  # |p - q| over the larger of both
    root = torch.where(usable & (share > 0), larger.exp() * share, 0.0)
    return torch.where(uncovered, torch.inf, root.square())


def _log_sum(logs: Tensor, dim: int = 0) -> Tensor:
    """``logsumexp`` whose gradient is 0, not NaN, where all entries are ``-inf``."""
    top = logs.detach().amax(dim, keepdim=True)
    shift = torch.where(top > -torch.inf, top, 0.0)
    total = (logs - shift).exp().sum(dim)
    return torch.where(total > 0, torch.where(total > 0, total, 1.0).log() + shift.squeeze(dim), -torch.inf)


# -- arguments -------------------------------------------------------------------------------------------------------


def _checked(mdp: RegularizedMDP, log_pi: PerLayerStateAction) -> PerLayerStateAction:
    check_policy(mdp, log_pi, "log_pi")
    return log_pi


def data_behaviour(mdp: RegularizedMDP, mu: Data) -> Behaviour:
    """``mu`` as a behaviour: tables become Markov data, once they are checked."""
    if isinstance(mu, tuple):
        check_policy(mdp, mu, "mu")
        return MarkovBehaviour(mu)
    for _, log_policy in mu.components or []:
        check_policy(mdp, log_policy, "mu")
    return mu
