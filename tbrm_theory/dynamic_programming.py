"""Exact soft dynamic programming (theory.md §0; I1, I2, I3).

``q`` and ``v`` are in units of ``beta``: ``R_β = r/β + log π_ref``, ``V_Q(s) = logsumexp_a Q(s,a)``, ``V = 0`` after the last
layer. Objectives and regrets are in reward units. Values of non-existent actions are ``-inf``. One backward sweep over the
layers serves any number of leading batch dimensions, which broadcast between the problem and the policy or ``q``; autograd runs
through everything.

A policy is a tuple of tables ``log π``, ``(…, S_h, A_h)``. One with mass on an action that does not exist, in a state that it
reaches, has objective ``-inf`` and regret ``inf``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.occupancy import occupancy
from tbrm_theory.shapes import (
    NextStateTable,
    PerLayerState,
    PerLayerStateAction,
    Scalars,
    StateActionTable,
    StateTable,
)
from tbrm_theory.tables import (
    ROW_SUM_TOLERANCE,
    check_finite,
    check_layers,
    check_shapes,
    first_index,
    per_distinct_layer,
)
from tbrm_theory.transitions import Transition

__all__ = [
    "Evaluation",
    "Solution",
    "admissible_logits",
    "bellman_operator",
    "check_policy",
    "evaluate",
    "kl_to_reference",
    "objective",
    "policy_bellman_operator",
    "policy_kl",
    "regret",
    "regret_by_subtraction",
    "relative_entropy",
    "soft_policy",
    "soft_value",
    "solve",
]


# -- one layer -------------------------------------------------------------------------------------------------


def soft_value(q: StateActionTable) -> StateTable:
    """``V_Q(s) = log Σ_a exp Q(s,a)``."""
    return torch.logsumexp(q, dim=-1)


def soft_policy(q: StateActionTable) -> StateActionTable:
    """``log π_Q = Q - V_Q``."""
    return torch.log_softmax(q, dim=-1)


def _policy_value(q: StateActionTable, log_policy: StateActionTable) -> StateTable:
    """``E_{a~π}[Q(s,a) - log π(a|s)]``; an action of probability 0 adds nothing, whatever its ``Q``."""
    taken = log_policy > -torch.inf
    gain = torch.where(taken, q - torch.where(taken, log_policy, 0.0), 0.0)
    probability = log_policy.exp()
    return torch.where(probability > 0, probability * gain, 0.0).sum(-1)


def _expect(transition: Transition, value: NextStateTable) -> StateActionTable:
    """``E[value(s') | s, a]`` where values may be ``-inf``: such a successor counts as soon as it is possible."""
    if not bool(torch.isneginf(value).any()):
        return transition.expect(value)
    lost = torch.isneginf(value)
    finite = transition.expect(torch.where(lost, 0.0, value))
    return torch.where(transition.expect(lost.to(value.dtype)) > 0, -torch.inf, finite)


_BREGMAN_SERIES = tuple((n - 1) / math.factorial(n) for n in range(11, 1, -1))
"""``x eˣ - eˣ + 1 = Σ_{n≥2} xⁿ (n-1)/n!``, highest power first; 1e-16 relative for ``|x| ≤ 0.05``."""


def relative_entropy(log_p: StateActionTable, log_q: StateActionTable) -> StateTable:
    """``KL(p ‖ q)`` over the last dimension, as a sum of terms none of which is negative.

    ``Σ p log(p/q) = Σ [p log(p/q) - p + q]`` for distributions; with ``x = log(p/q)`` a term is ``q (x eˣ - eˣ + 1)``, near
    ``p = q`` thus ``q x²/2``. So a divergence of 1e-30 keeps its digits, where the plain sum stops at 1e-16.
    """
    in_p, in_q = log_p > -torch.inf, log_q > -torch.inf
    both = in_p & in_q
    p, q = log_p.exp(), log_q.exp()
    x = torch.where(both, log_p, 0.0) - torch.where(both, log_q, 0.0)
    near = x.abs() < 0.05
    small = torch.where(near, x, 0.0)
    series = torch.zeros_like(x)
    for coefficient in _BREGMAN_SERIES:
        series = series * small + coefficient
    terms = torch.where(near, q * small.square() * series, p * x - p + q)
    alone = torch.where(in_p & (p > 0), torch.inf, torch.where(in_q, q, 0.0))
    return torch.where(both, terms, alone).sum(-1)


# -- checks on what comes from outside -------------------------------------------------------------------------


def check_policy(mdp: RegularizedMDP, log_policy: PerLayerStateAction, where: str = "policy") -> None:
    """Refuse anything but one normalised table ``log π`` for each layer.

    Raises:
        InvalidInputError: wrong number of layers or shape, NaN, or a row whose probabilities do not sum to 1 within 1e-9.
    """
    check_layers(log_policy, mdp.reference, where)
    seen: set[int] = set()
    for h, table in enumerate(log_policy):
        if id(table) in seen:
            continue
        seen.add(id(table))
        total = torch.logsumexp(table, dim=-1)
        wrong = ~(total.abs() <= ROW_SUM_TOLERANCE)  # written so that NaN is wrong too
        if bool(wrong.any()):
            raise InvalidInputError(
                f"{where}[{h}]{first_index(wrong)}",
                f"expected log-probabilities of a distribution, found the sum {total[wrong][0].exp().item()!r}",
            )


def admissible_logits(mdp: RegularizedMDP, logits: PerLayerStateAction, where: str = "logits") -> PerLayerStateAction:
    """The logits with ``-inf`` in place of those of non-existent actions, whatever stood there.

    Raises:
        InvalidInputError: wrong number of layers or shape, or a logit of an existing action that is not finite.
    """
    check_shapes(logits, mdp.reference, where)
    names = {id(table): f"{where}[{h}]" for h, table in reversed(list(enumerate(logits)))}

    def admit(table: Tensor, valid: Tensor) -> Tensor:
        check_finite(torch.where(valid, table, 0.0), names[id(table)])
        return torch.where(valid, table, -torch.inf)

    return per_distinct_layer(admit, logits, mdp.valid)


# -- Bellman operators -----------------------------------------------------------------------------------------


def bellman_operator(mdp: RegularizedMDP, q: PerLayerStateAction) -> PerLayerStateAction:
    """``(T_β Q)(s,a) = R_β(s,a) + E_{s'} V_Q(s')``, every layer from ``q`` at once (theory.md §0).

    ``Q`` of actions that do not exist is ignored, except that NaN is refused.
    """
    check_layers(q, mdp.reference, "q")
    return _backup(
        mdp, [soft_value(torch.where(valid, table, -torch.inf)) for valid, table in zip(mdp.valid, q, strict=True)]
    )


def policy_bellman_operator(
    mdp: RegularizedMDP, log_policy: PerLayerStateAction, q: PerLayerStateAction
) -> PerLayerStateAction:
    """``(T^π_β Q)(s,a) = R_β(s,a) + E_{s'} E_{a'~π}[Q(s',a') - log π(a'|s')]`` (theory.md §0)."""
    check_policy(mdp, log_policy)
    check_layers(q, mdp.reference, "q")
    return _backup(mdp, [_policy_value(table, log) for table, log in zip(q, log_policy, strict=True)])


def _backup(mdp: RegularizedMDP, v: list[Tensor]) -> PerLayerStateAction:
    following = [_expect(kernel, value) for kernel, value in zip(mdp.transitions, v[1:], strict=True)]
    return (
        *(r + expected for r, expected in zip(mdp.regularized_reward, following, strict=False)),
        mdp.regularized_reward[-1],
    )


# -- the optimum -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Solution:
    """``Q* = T_β Q*``, ``V*``, ``π*`` and ``J_β(π*) = β E_ρ V*(s_1)`` (I1, I2), and how far they can be trusted."""

    mdp: RegularizedMDP
    q: PerLayerStateAction
    v: PerLayerState
    log_policy: PerLayerStateAction
    objective: Scalars

    @cached_property
    def scale(self) -> Scalars:
        """The largest ``|Q*|``: float64 errors of values are relative to it (``r/β`` reaches 1e16)."""
        finite = [torch.where(q > -torch.inf, q, 0.0).abs().amax((-2, -1)) for q in self.q]
        return torch.stack(torch.broadcast_tensors(*finite)).amax(0).clamp(min=1.0)

    @cached_property
    def bellman_residual(self) -> Scalars:
        """``max |Q - T_β Q|`` over existing actions, as a fraction of ``scale``."""
        backed_up = bellman_operator(self.mdp, self.q)
        gaps = [
            torch.where(valid, torch.where(valid, new - old, 0.0), 0.0).abs().amax((-2, -1))
            for valid, new, old in zip(self.mdp.valid, backed_up, self.q, strict=True)
        ]
        return torch.stack(torch.broadcast_tensors(*gaps)).amax(0) / self.scale

    @cached_property
    def duality_gap(self) -> Scalars:
        """``|β E_ρ V* - J_β(π*)|`` with ``J_β`` from a forward sweep over occupancies, as a fraction of ``β · scale``."""
        gap = (self.objective - objective(self.mdp, self.log_policy)).abs()
        return gap / (self.mdp.beta * self.scale)

    @property
    def certified(self) -> bool:
        """Both residuals are what float64 rounding over ``H`` layers explains."""
        bound = 16 * self.mdp.horizon * torch.finfo(torch.float64).eps
        return bool((self.bellman_residual <= bound).all()) and bool((self.duality_gap <= bound).all())


def solve(mdp: RegularizedMDP) -> Solution:
    """The exact KL-regularised optimum by backward induction, for every problem of the batch at once (I1, I2)."""
    q: list[Tensor] = [mdp.regularized_reward[-1]]
    v: list[Tensor] = [soft_value(q[0])]
    for reward, transition in zip(reversed(mdp.regularized_reward[:-1]), reversed(mdp.transitions), strict=True):
        q.append(reward + transition.expect(v[-1]))
        v.append(soft_value(q[-1]))
    q.reverse()
    v.reverse()
    return Solution(
        mdp=mdp,
        q=tuple(q),
        v=tuple(v),
        log_policy=tuple(soft_policy(table) for table in q),  # Q - V would lose the policy where |Q| reaches 1e16
        objective=mdp.beta * (mdp.initial * v[0]).sum(-1),
    )


# -- a policy --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Evaluation:
    """``Q^π = T^π_β Q^π``, ``V^π`` and ``β E_ρ V^π(s_1)``."""

    q: PerLayerStateAction
    v: PerLayerState
    objective: Scalars


def evaluate(mdp: RegularizedMDP, log_policy: PerLayerStateAction) -> Evaluation:
    """``Q^π`` by backward induction (I1); ``-inf`` wherever a non-existent action may follow."""
    check_policy(mdp, log_policy)
    q: list[Tensor] = [mdp.regularized_reward[-1]]
    v: list[Tensor] = [_policy_value(q[0], log_policy[-1])]
    for h in range(mdp.horizon - 2, -1, -1):
        q.append(mdp.regularized_reward[h] + _expect(mdp.transitions[h], v[-1]))
        v.append(_policy_value(q[-1], log_policy[h]))
    q.reverse()
    v.reverse()
    reached = mdp.initial > 0
    initial_value = torch.where(reached, mdp.initial * torch.where(reached, v[0], 0.0), 0.0).sum(-1)
    return Evaluation(tuple(q), tuple(v), mdp.beta * initial_value)


def objective(mdp: RegularizedMDP, log_policy: PerLayerStateAction) -> Scalars:
    """``J_β(π) = E_π[r(τ)] - β KL(P_π ‖ P_ref)`` in reward units, by a forward sweep over occupancies."""
    check_policy(mdp, log_policy)
    d = occupancy(mdp, log_policy)
    returns = [(mass * reward).sum((-2, -1)) for mass, reward in zip(d.state_action, mdp.reward, strict=True)]
    return torch.stack(torch.broadcast_tensors(*returns)).sum(0) - mdp.beta * kl_to_reference(mdp, log_policy)


def kl_to_reference(mdp: RegularizedMDP, log_policy: PerLayerStateAction) -> Scalars:
    """``KL(P_π ‖ P_ref) = E_π Σ_h KL(π(·|s_h) ‖ π_ref(·|s_h))``, in nats; ``inf`` with mass on non-existent actions."""
    return policy_kl(mdp, log_policy, mdp.log_reference)


def policy_kl(mdp: RegularizedMDP, log_p: PerLayerStateAction, log_q: PerLayerStateAction) -> Scalars:
    """``KL(P_p ‖ P_q)`` between the trajectory laws of two policies, in nats: ``E_p Σ_h KL(p(·|s_h) ‖ q(·|s_h))``."""
    check_policy(mdp, log_p)
    check_policy(mdp, log_q)
    total = []
    for mass, p, q in zip(occupancy(mdp, log_p).state, log_p, log_q, strict=True):
        divergence = relative_entropy(p, q)
        reached = mass > 0
        total.append(torch.where(reached, mass * torch.where(reached, divergence, 0.0), 0.0).sum(-1))
    return torch.stack(torch.broadcast_tensors(*total)).sum(0)


def regret(mdp: RegularizedMDP, log_policy: PerLayerStateAction, *, solution: Solution | None = None) -> Scalars:
    """``J_β(π*) - J_β(π) = β E_π Σ_h KL(π(·|s_h) ‖ π*(·|s_h))`` in reward units (I3): never negative, and exact near 0.

    Args:
        solution: ``solve(mdp)``, when the caller has it already.
    """
    return mdp.beta * policy_kl(mdp, log_policy, (solution or solve(mdp)).log_policy)


def regret_by_subtraction(mdp: RegularizedMDP, log_policy: PerLayerStateAction) -> Scalars:
    """``J_β(π*) - J_β(π)`` as the difference it is; keeps only the digits above the rounding of the objectives."""
    return solve(mdp).objective - objective(mdp, log_policy)
