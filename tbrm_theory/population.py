"""Exact population losses, without enumeration (theory.md §0, I7, I11).

The TBRM residual is additive along a trajectory, ``f = Σ_h u_h(s_h,a_h)`` with ``u_1 = logit - R_β`` and
``u_h = log π_θ - R_β`` later. So for Markov data one backward sweep of the conditional mean and variance of ``Σ_{k≥h} u_k`` gives
``E_μ f²`` as a sum of squares: the raw second moment would cancel near 1e-17 and go negative. A mixture's loss is the weighted sum
over its components; other behaviour is enumerated. Everything is differentiable in the logits and batched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tbrm_theory.behaviours import Behaviour, MarkovBehaviour
from tbrm_theory.dynamic_programming import admissible_logits, check_policy, soft_policy, soft_value, solve
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.losses import brm_residual, tbrm_residual
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.occupancy import Enumeration, Occupancy, enumerate_trajectories, occupancy, tables_on_support
from tbrm_theory.scores import table_scores
from tbrm_theory.shapes import PerLayerStateAction, Scalars, StateTable
from tbrm_theory.tables import ROW_SUM_TOLERANCE, check_layers, check_shapes
from tbrm_theory.trajectories import TrajectoryBatch

__all__ = [
    "LOSSES",
    "AdditiveMoments",
    "additive_moments",
    "forbidden",
    "noise_floor",
    "population_loss",
    "residual_terms",
    "soft_plan",
]

LOSSES = ("tbrm", "brm")


def residual_terms(mdp: RegularizedMDP, logits: PerLayerStateAction) -> PerLayerStateAction:
    """``u_h(s,a)`` with ``f_θ(τ) = Σ_h u_h(s_h,a_h)`` (theory.md §0, additivity); 0 where the action does not exist."""
    q = admissible_logits(mdp, logits)
    own = (q[0], *(soft_policy(table) for table in q[1:]))
    return tuple(
        torch.where(valid, torch.where(valid, table, 0.0) - torch.where(valid, reward, 0.0), 0.0)
        for valid, table, reward in zip(mdp.valid, own, mdp.regularized_reward, strict=True)
    )


def soft_plan(mdp: RegularizedMDP, g: PerLayerStateAction) -> PerLayerStateAction:
    """The logits with ``V_θ(s_1) + log π_θ(τ) = Σ_h g_h(s_h,a_h)`` on deterministic transitions (I14).

    They are the soft backward pass of ``g``: ``g_h + E V_{h+1}`` with ``V_h = logsumexp``, and ``-inf`` for actions that do not
    exist, whatever ``g`` holds there.
    """
    check_shapes(g, mdp.reference, "g")
    g = tuple(torch.where(valid, table, -torch.inf) for valid, table in zip(mdp.valid, g, strict=True))
    check_layers(g, mdp.reference, "g")
    logits: list[Tensor] = [g[-1]]
    for h in reversed(range(mdp.horizon - 1)):
        logits.append(g[h] + mdp.transitions[h].expect(soft_value(logits[-1])))
    return tuple(reversed(logits))


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
    tables = tables_on_support(mdp, tables, log_policy, "tables")

    def over_actions(log: Tensor, pair_mean: Tensor, pair_variance: Tensor) -> tuple[Tensor, Tensor]:
        probability = log.exp()
        mean = (probability * pair_mean).sum(-1)
        variance = (probability * ((pair_mean - mean.unsqueeze(-1)).square() + pair_variance)).sum(-1)
        return mean, variance

    mean, variance = over_actions(log_policy[-1], tables[-1], torch.zeros_like(tables[-1]))
    for h in reversed(range(mdp.horizon - 1)):
        kernel = mdp.transitions[h]
        pair_mean, pair_variance = tables[h] + kernel.expect(mean), kernel.expect(variance) + kernel.variance(mean)
        mean, variance = over_actions(log_policy[h], pair_mean, pair_variance)
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
        InvalidInputError: an unknown loss, or a behaviour neither Markov nor a mixture whose trajectories are too many to list.
    """
    if loss not in LOSSES:
        raise InvalidInputError("loss", f"expected one of {', '.join(LOSSES)}, found {loss!r}")
    if isinstance(behaviour, tuple):
        behaviour = MarkovBehaviour(behaviour)
    if behaviour.components is None:
        listed = enumerate_trajectories(mdp)
        return _listed_mean(mdp, behaviour, listed, _listed_squares(mdp, logits, listed, loss))
    squares = _markov_tbrm if loss == "tbrm" else _markov_brm
    return _mixed(mdp, behaviour, lambda log_policy, d: squares(mdp, logits, log_policy, d))


def noise_floor(mdp: RegularizedMDP, behaviour: Behaviour | PerLayerStateAction) -> Scalars:
    """``L_μ(θ*) = Σ_h E_μ Var(V*(s_{h+1}) | s_h,a_h)``, TBRM's loss at the optimum (I7); 0 if deterministic, ``(…)``.

    Returns:
        ``inf`` if the behaviour takes actions that do not exist.
    """
    v = solve(mdp).v
    spread = (
        *(kernel.variance(value) for kernel, value in zip(mdp.transitions, v[1:], strict=True)),
        torch.zeros_like(mdp.reward[-1]),
    )
    if isinstance(behaviour, tuple):
        behaviour = MarkovBehaviour(behaviour)
    if behaviour.components is None:
        listed = enumerate_trajectories(mdp)
        return _listed_mean(mdp, behaviour, listed, listed.sum_along(spread))
    return _mixed(mdp, behaviour, lambda _, d: _expected_sum(d, spread))


# -- Markov policies and mixtures of them ----------------------------------------------------------------------


def _mixed(
    mdp: RegularizedMDP, behaviour: Behaviour, expected: Callable[[PerLayerStateAction, Occupancy], Tensor]
) -> Scalars:
    """The weighted sum of ``expected(log_policy, occupancy)`` over the components; ``inf`` with non-existent actions."""
    terms = []
    for weight, log_policy in behaviour.components or []:
        check_policy(mdp, log_policy, "behaviour")
        if weight > 0:
            d = occupancy(mdp, log_policy)
            terms.append(weight * torch.where(forbidden(mdp, d), torch.inf, expected(log_policy, d)))
    return _sum(terms)


def forbidden(mdp: RegularizedMDP, d: Occupancy) -> Bool[Tensor, "..."]:
    """Whether actions that do not exist are ever taken."""
    layers = [((mass > 0) & ~valid).flatten(-2).any(-1) for mass, valid in zip(d.state_action, mdp.valid, strict=True)]
    return torch.stack(torch.broadcast_tensors(*layers)).any(0)


def _sum(terms: list[Tensor]) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*terms)).sum(0)


def _expected_sum(d: Occupancy, tables: PerLayerStateAction) -> Scalars:
    """``E_μ Σ_h g_h(s_h,a_h)``."""
    return _sum([(mass * table).sum((-2, -1)) for mass, table in zip(d.state_action, tables, strict=True)])


def _markov_tbrm(
    mdp: RegularizedMDP, logits: PerLayerStateAction, log_policy: PerLayerStateAction, d: Occupancy
) -> Scalars:
    """``E_ρ[m_1² + v_1]`` (I11)."""
    moments = additive_moments(mdp, residual_terms(mdp, logits), log_policy)
    return (mdp.initial * (moments.mean.square() + moments.variance)).sum(-1)


def _markov_brm(
    mdp: RegularizedMDP, logits: PerLayerStateAction, log_policy: PerLayerStateAction, d: Occupancy
) -> Scalars:
    """``Σ_h E_μ[(logit - R_β - E V(s'))² + Var V(s')]``: bias and noise of the sampled residual."""
    q = admissible_logits(mdp, logits)
    squares = []
    for h, (table, valid, reward) in enumerate(zip(q, mdp.valid, mdp.regularized_reward, strict=True)):
        residual = torch.where(valid, table, 0.0) - torch.where(valid, reward, 0.0)
        if h == mdp.horizon - 1:
            squares.append(residual.square())
        else:
            kernel, value = mdp.transitions[h], soft_value(q[h + 1])
            squares.append((residual - kernel.expect(value)).square() + kernel.variance(value))
    return _expected_sum(d, tuple(squares))


# -- other behaviour, by listing all trajectories --------------------------------------------------------------


def _listed_squares(
    mdp: RegularizedMDP, logits: PerLayerStateAction, listed: Enumeration, loss: str
) -> Float[Tensor, "... trajectories"]:
    batch = TrajectoryBatch(listed.states, listed.actions, torch.ones_like(listed.states, dtype=torch.bool))
    scores = table_scores(admissible_logits(mdp, logits), mdp.log_reference, mdp.reward, batch)
    if loss == "tbrm":
        return tbrm_residual(scores, beta=mdp.beta).square()
    return brm_residual(scores, beta=mdp.beta).square().sum(-1)


def _listed_mean(
    mdp: RegularizedMDP, behaviour: Behaviour, listed: Enumeration, values: Float[Tensor, "... trajectories"]
) -> Scalars:
    """``E_μ`` of what is listed; ``inf`` if ``μ`` also does what is not, that is, takes non-existent actions."""
    law = behaviour.log_law(mdp, listed).exp()
    complete = (law.sum(-1) - 1).abs() <= mdp.horizon * ROW_SUM_TOLERANCE
    return torch.where(complete, (law * values).sum(-1), torch.inf)
