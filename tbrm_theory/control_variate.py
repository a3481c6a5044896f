"""TBRM with the noise of the next state taken out of its residual (theory.md X2; own).

On stochastic transitions ``f_θ = Σ_h [logit_θ - R_β](s_h,a_h) - V_θ(s_{h+1})`` carries the noise of every next state,
and its square that noise's variance: the minimiser is biased. The control variate ``V_θ(s_{h+1}) -
E[V_θ(s')|s_h,a_h]`` has mean 0 given the past, costs no further samples, and added to every step it leaves

    f^c_θ(τ) = Σ_h [logit_θ(s_h,a_h) - R_β(s_h,a_h) - E[V_θ(s')|s_h,a_h]] = Σ_h (Q_θ - T_β Q_θ)(s_h,a_h),

the sum of the Bellman errors, which at the optimum is 0 on every trajectory. It needs the kernel, known or learned.
The same population loss ``L^c_μ(θ) = E_μ (f^c_θ)²`` is the mean of ``f̃ f̃'``, where ``f̃`` and ``f̃'`` read ``V_θ``
at two *fresh* next states, drawn independently of each other and of the actual one for each pair ``(s_h,a_h)`` on the
trajectory: given ``τ`` they are independent with mean ``f^c_θ(τ)``. One fresh state, with the actual one for the
other, is not enough: the actual one decides what comes after.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tbrm_theory.behaviours import Behaviour, MarkovBehaviour
from tbrm_theory.dynamic_programming import admissible_logits, check_policy, soft_value, solve
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.occupancy import occupancy
from tbrm_theory.population import additive_moments, forbidden
from tbrm_theory.shapes import PerLayerState, PerLayerStateAction, Scalars
from tbrm_theory.transitions import Transition

__all__ = ["bellman_error", "corrected_loss", "noise_before"]


def bellman_error(
    mdp: RegularizedMDP, logits: PerLayerStateAction, transitions: Sequence[Transition] | None = None
) -> PerLayerStateAction:
    """``(Q_θ - T_β Q_θ)(s,a) = logit_θ - R_β - E[V_θ(s')|s,a]`` of every layer; 0 where the action does not exist.

    Args:
        transitions: the kernels that average over ``s'``; the problem's own for None.
    """
    q = admissible_logits(mdp, logits)
    kernels = mdp.transitions if transitions is None else transitions
    errors = []
    for h, (table, valid, reward) in enumerate(zip(q, mdp.valid, mdp.regularized_reward, strict=True)):
        error = torch.where(valid, table, 0.0) - torch.where(valid, reward, 0.0)
        if h < mdp.horizon - 1:
            error = error - torch.where(valid, kernels[h].expect(soft_value(q[h + 1])), 0.0)
        errors.append(error)
    return tuple(errors)


def corrected_loss(
    mdp: RegularizedMDP,
    logits: PerLayerStateAction,
    behaviour: Behaviour | PerLayerStateAction,
    transitions: Sequence[Transition] | None = None,
) -> Scalars:
    """``L^c_μ(θ) = E_μ (f^c_θ)²`` without enumeration, by the sweep of I11, ``(…)``.

    Args:
        behaviour: a Markov policy, as tables ``log μ`` or a behaviour, or a mixture of such policies.
        transitions: the kernels of the control variate, such as learned ones; data always come from the problem's own.

    Returns:
        ``inf`` if the behaviour takes actions that do not exist.

    Raises:
        InvalidInputError: behaviour that is neither Markov nor a mixture.
    """
    if isinstance(behaviour, tuple):
        behaviour = MarkovBehaviour(behaviour)
    if behaviour.components is None:
        raise InvalidInputError("behaviour", "expected a Markov policy or a mixture of them")
    errors = bellman_error(mdp, logits, transitions)
    losses = []
    for weight, log_policy in behaviour.components:
        check_policy(mdp, log_policy, "behaviour")
        if weight == 0:
            continue
        moments = additive_moments(mdp, errors, log_policy)
        loss = (mdp.initial * (moments.mean.square() + moments.variance)).sum(-1)
        losses.append(weight * torch.where(forbidden(mdp, occupancy(mdp, log_policy)), torch.inf, loss))
    return torch.stack(torch.broadcast_tensors(*losses)).sum(0)


def noise_before(mdp: RegularizedMDP, log_policy: PerLayerStateAction) -> PerLayerState:
    """``d^μ_h(s) b_h(s) = E_μ[Σ_{k<h} n_k 1{s_h=s}]`` for Markov ``μ``, ``n_k = E[V*(s')|s_k,a_k] - V*(s_{k+1})``: bad luck so far.

    By one forward sweep. It is what leads TBRM away from the optimum (I7.e, X2). Mass on actions that do not exist goes no further.
    """
    check_policy(mdp, log_policy)
    v = solve(mdp).v
    mass, carried = mdp.initial, torch.zeros_like(mdp.initial)
    found = [carried]
    for h, kernel in enumerate(mdp.transitions):
        policy = torch.where(mdp.valid[h], log_policy[h].exp(), 0.0)
        pairs = mass.unsqueeze(-1) * policy
        mass = kernel.push(pairs)
        carried = kernel.push(carried.unsqueeze(-1) * policy + pairs * kernel.expect(v[h + 1])) - v[h + 1] * mass
        found.append(carried)
    return tuple(found)
