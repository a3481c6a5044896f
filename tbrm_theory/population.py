"""Exact population losses, without enumeration (theory.md §0, I7, I11).

The TBRM residual is additive along a trajectory, ``f = Σ_h u_h(s_h,a_h)`` with ``u_1 = logit - R_β`` and
``u_h = log π_θ - R_β`` later. So for Markov data one backward sweep of the conditional mean and variance of ``Σ_{k≥h} u_k`` gives
``E_μ f²`` as a sum of squares: the raw second moment would cancel near 1e-17 and go negative. A mixture's loss is the weighted sum
over its components. Everything is differentiable in the logits and batched.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tbrm_theory.behaviours import Behaviour, MarkovBehaviour
from tbrm_theory.dynamic_programming import admissible_logits, check_policy, soft_policy, soft_value, solve
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.occupancy import Occupancy, occupancy
from tbrm_theory.shapes import PerLayerStateAction, Scalars, StateTable

__all__ = ["AdditiveMoments", "additive_moments", "noise_floor", "population_loss", "residual_terms"]

LOSSES = ("tbrm", "brm")


def residual_terms(mdp: RegularizedMDP, logits: PerLayerStateAction) -> PerLayerStateAction:
    """``u_h(s,a)`` with ``f_θ(τ) = Σ_h u_h(s_h,a_h)`` (theory.md §0, additivity); 0 where the action does not exist."""
    q = admissible_logits(mdp, logits)
    own = (q[0], *(soft_policy(table) for table in q[1:]))
    return tuple(
        torch.where(valid, torch.where(valid, table, 0.0) - torch.where(valid, reward, 0.0), 0.0)
        for valid, table, reward in zip(mdp.valid, own, mdp.regularized_reward, strict=True)
    )


@dataclass(frozen=True, eq=False)
class AdditiveMoments:
    """``E_μ[Σ_h u_h | s_1]`` and ``Var_μ(Σ_h u_h | s_1)``, each ``(…, S_0)``."""

    mean: StateTable
    variance: StateTable


def additive_moments(
    mdp: RegularizedMDP, tables: PerLayerStateAction, log_policy: PerLayerStateAction
) -> AdditiveMoments:
    """Mean and variance of ``Σ_h u_h(s_h,a_h)`` from each first state under Markov ``μ``, by total variance (I11).

    Backwards over layers: ``m_h(s) = E_{a,s'}[u_h + m_{h+1}(s')]`` and
    ``v_h(s) = E_{a,s'}[(u_h + m_{h+1}(s') - m_h(s))² + v_{h+1}(s')]``.
    """
    mean = variance = tables[-1].new_zeros(())  # nothing follows the last layer
    for h in range(mdp.horizon - 1, -1, -1):
        probability, pair_mean = log_policy[h].exp(), tables[h]
        pair_variance = torch.zeros_like(pair_mean)
        if h < mdp.horizon - 1:
            kernel = mdp.transitions[h]
            pair_mean = pair_mean + kernel.expect(mean)
            pair_variance = kernel.expect(variance) + kernel.variance(mean)
        mean = (probability * pair_mean).sum(-1)
        variance = (probability * ((pair_mean - mean.unsqueeze(-1)).square() + pair_variance)).sum(-1)
    return AdditiveMoments(mean, variance)


def population_loss(
    mdp: RegularizedMDP,
    logits: PerLayerStateAction,
    behaviour: Behaviour | PerLayerStateAction,
    *,
    loss: str = "tbrm",
) -> Scalars:
    """``L_μ(θ) = E_{τ~μ} f_θ(τ)²`` (``"tbrm"``, [Y] Eq. 4) or ``E_μ Σ_h residual_h²`` (``"brm"``, [Y] Eq. 3), ``(…)``.

    Args:
        behaviour: a behaviour, or the tables ``log μ`` of a Markov policy.
        loss: for ``"brm"`` the *sampled* residual is squared: its next state is drawn, not averaged over.

    Returns:
        ``inf`` if the behaviour takes actions that do not exist.

    Raises:
        InvalidInputError: an unknown loss, or a behaviour whose tables are no policies of this problem.
    """
    if loss not in LOSSES:
        raise InvalidInputError("loss", f"expected one of {', '.join(LOSSES)}, found {loss!r}")
    if isinstance(behaviour, tuple):
        behaviour = MarkovBehaviour(behaviour)
    markov_loss = _markov_tbrm if loss == "tbrm" else _markov_brm
    terms = []
    for weight, log_policy in behaviour.components:
        check_policy(mdp, log_policy, "behaviour")
        if weight > 0:
            d = occupancy(mdp, log_policy)
            value = markov_loss(mdp, logits, log_policy, d)
            terms.append(weight * torch.where(_forbidden(mdp, d), torch.inf, value))
    return torch.stack(torch.broadcast_tensors(*terms)).sum(0)


def noise_floor(mdp: RegularizedMDP, behaviour: Behaviour | PerLayerStateAction) -> Scalars:
    """``L_μ(θ*) = Σ_h E_μ Var(V*(s_{h+1}) | s_h,a_h)``, TBRM's loss at the optimum (I7); 0 if deterministic."""
    if isinstance(behaviour, tuple):
        behaviour = MarkovBehaviour(behaviour)
    v = solve(mdp).v
    total = torch.zeros_like(mdp.beta)
    for weight, log_policy in behaviour.components:
        d = occupancy(mdp, log_policy).state_action
        for kernel, mass, value in zip(mdp.transitions, d, v[1:], strict=False):
            total = total + weight * (mass * kernel.variance(value)).sum((-2, -1))
    return total


def _forbidden(mdp: RegularizedMDP, d: Occupancy) -> Tensor:
    """Whether actions that do not exist are ever taken, ``(…)``."""
    layers = [((mass > 0) & ~valid).flatten(-2).any(-1) for mass, valid in zip(d.state_action, mdp.valid, strict=True)]
    return torch.stack(torch.broadcast_tensors(*layers)).any(0)


def _markov_tbrm(
    mdp: RegularizedMDP, logits: PerLayerStateAction, log_policy: PerLayerStateAction, d: Occupancy
) -> Tensor:
    moments = additive_moments(mdp, residual_terms(mdp, logits), log_policy)
    return (mdp.initial * (moments.mean.square() + moments.variance)).sum(-1)


def _markov_brm(
    mdp: RegularizedMDP, logits: PerLayerStateAction, log_policy: PerLayerStateAction, d: Occupancy
) -> Tensor:
    """``Σ_h E_μ[(logit - R_β - E V(s'))² + Var V(s')]``: bias and noise of the sampled residual."""
    q = admissible_logits(mdp, logits)
    total = torch.zeros_like(mdp.beta)
    for h, (table, valid, reward) in enumerate(zip(q, mdp.valid, mdp.regularized_reward, strict=True)):
        residual = torch.where(valid, table, 0.0) - torch.where(valid, reward, 0.0)
        spread = torch.zeros_like(residual)
        if h < mdp.horizon - 1:
            value = soft_value(q[h + 1])
            residual = residual - mdp.transitions[h].expect(value)
            spread = mdp.transitions[h].variance(value)
        mass = torch.where(valid, d.state_action[h], 0.0)
        total = total + (mass * (residual.square() + spread)).sum((-2, -1))
    return total
