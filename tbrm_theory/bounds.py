"""Right-hand sides of the regret bounds of theory.md §2, in reward units."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tbrm_theory.behaviours import Behaviour
from tbrm_theory.coverage import Data, data_behaviour, kappa, kappa_excess
from tbrm_theory.dynamic_programming import (
    Solution,
    admissible_logits,
    bellman_operator,
    check_policy,
    soft_policy,
    solve,
)
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.occupancy import enumerate_trajectories, occupancy
from tbrm_theory.population import additive_moments, forbidden, population_loss, residual_terms, soft_plan
from tbrm_theory.shapes import PerLayerStateAction, Scalars
from tbrm_theory.tables import ROW_SUM_TOLERANCE

__all__ = [
    "centred_loss",
    "corollary4",
    "path_policy",
    "support_bound",
    "support_problem",
    "theorem2",
    "theorem2_centred",
]


def corollary4(mdp: RegularizedMDP, logits: PerLayerStateAction, *, solution: Solution | None = None) -> Scalars:
    """``β{ E_{π*} Σ_h (T_β Q_θ - Q_θ) + E_{π_θ} Σ_h (Q_θ - T_β Q_θ) }`` ([Y] Cor. 4; theory.md B4), ``(…)``.

    At least ``J_β(π*) - J_β(π_θ)``, whatever the transitions; the slack is ``β KL(P_{π*} ‖ P_{π_θ})``.

    Args:
        logits: ``Q_θ``, one table for each layer; those of non-existent actions are ignored.
        solution: ``solve(mdp)``, when the caller has it already.

    Raises:
        InvalidInputError: wrong number of layers or shape, or a logit of an existing action not finite.
    """
    q = admissible_logits(mdp, logits)
    optimal = occupancy(mdp, (solution or solve(mdp)).log_policy).state_action
    softmax = occupancy(mdp, tuple(soft_policy(table) for table in q)).state_action
    layers = []
    for valid, backed_up, own, star, theta in zip(
        mdp.valid, bellman_operator(mdp, q), q, optimal, softmax, strict=True
    ):
        gap = torch.where(valid, backed_up, 0.0) - torch.where(valid, own, 0.0)
        layers.append((star * gap).sum((-2, -1)) - (theta * gap).sum((-2, -1)))
    return mdp.beta * torch.stack(torch.broadcast_tensors(*layers)).sum(0)


def theorem2(
    mdp: RegularizedMDP, logits: PerLayerStateAction, mu: Data, *, solution: Solution | None = None
) -> Scalars:
    """``β(√κ(π*,μ) + √κ(π_θ,μ)) √L_μ(θ)`` ([Y] Thm 2 with the sharp κ; theory.md B5), ``(…)``.

    At least ``J_β(π*) - J_β(π_θ)`` on deterministic transitions, for any data: as a supremum κ needs no Markov data.

    Returns:
        ``inf`` as soon as one κ is, whatever the loss.

    Raises:
        InvalidInputError: stochastic transitions, for which the bound is not claimed; malformed logits or data.
    """
    roots = [coefficient.sqrt() for coefficient in _of_both(kappa, mdp, logits, mu, solution)]
    loss = population_loss(mdp, logits, data_behaviour(mdp, mu))
    return _product(mdp, roots, loss)


def theorem2_centred(
    mdp: RegularizedMDP, logits: PerLayerStateAction, mu: Data, *, solution: Solution | None = None
) -> Scalars:
    """``β(√(κ(π*,μ) - 1) + √(κ(π_θ,μ) - 1)) √E_μ Var_μ(f_θ|s_1)`` (own; theory.md B5), ``(…)``: never more than ``theorem2``.

    *Proof.* Two policies see the same first states, so ``c(s_1) = E_μ[f|s_1]`` can be taken off ``f`` in ``E_{π_θ} f - E_{π*} f``, the
    left side of B4. For ``g = f - c`` and any number ``t``, ``κ ≥ (E_π g + t)²/(E_μ g² + t²)``, since ``E_μ g = 0``; the best ``t``
    gives ``κ ≥ 1 + (E_π g)²/E_μ g²``. ∎
    """
    roots = [excess.sqrt() for excess in _of_both(kappa_excess, mdp, logits, mu, solution)]
    return _product(mdp, roots, centred_loss(mdp, logits, mu))


def centred_loss(mdp: RegularizedMDP, logits: PerLayerStateAction, mu: Data) -> Scalars:
    """``E_μ Var_μ(f_θ(τ) | s_1)``, ``(…)``: TBRM's loss with the best value of every first state.

    Returns:
        ``inf`` if the data take actions that do not exist.
    """
    behaviour: Behaviour = data_behaviour(mdp, mu)
    terms = residual_terms(mdp, logits)
    if behaviour.components is None:
        listed = enumerate_trajectories(mdp)
        law, f, start = behaviour.log_law(mdp, listed).exp(), listed.sum_along(terms), listed.states[:, 0]
        mass = law.new_zeros(*law.shape[:-1], len(mdp.initial)).index_add(-1, start, law)
        weighted = law * f
        total = f.new_zeros(*weighted.shape[:-1], len(mdp.initial)).index_add(-1, start, weighted)
        mean = torch.where(mass > 0, total / torch.where(mass > 0, mass, 1.0), 0.0)
        centred = (law * (f - mean[..., start]).square()).sum(-1)
        return torch.where((law.sum(-1) - 1).abs() > ROW_SUM_TOLERANCE * mdp.horizon, torch.inf, centred)
    taken = [(weight, policy) for weight, policy in behaviour.components if weight > 0]
    outside = [forbidden(mdp, occupancy(mdp, policy)) for _, policy in taken]
    parts = [(weight, additive_moments(mdp, terms, policy)) for weight, policy in taken]
    mean = sum((weight * part.mean for weight, part in parts), torch.zeros_like(mdp.initial))
    spread = [weight * (part.variance + (part.mean - mean).square()) for weight, part in parts]
    centred = (mdp.initial * sum(spread, torch.zeros_like(mdp.initial))).sum(-1)
    return torch.where(torch.stack(torch.broadcast_tensors(*outside)).any(0), torch.inf, centred)


def support_problem(mdp: RegularizedMDP, log_mu: PerLayerStateAction) -> RegularizedMDP:
    """The problem whose actions are those that ``μ`` takes; every policy on them has the ``J_β`` that it has in ``mdp`` (own).

    ``π_ref`` is conditioned on those actions, and the logarithm of what it had there is added to the reward, in units of ``β``: so
    ``R_β`` stays. States that ``μ`` never reaches, but gives actions in, stay too.

    Raises:
        InvalidInputError: ``μ`` is no policy of this problem, or takes actions that do not exist.
    """
    check_policy(mdp, log_mu, "log_mu")
    if any(bool(((log > -torch.inf) & ~valid).any()) for log, valid in zip(log_mu, mdp.valid, strict=True)):
        raise InvalidInputError("log_mu", "expected only actions that exist")
    kept = [torch.where(log > -torch.inf, reference, 0.0) for log, reference in zip(log_mu, mdp.reference, strict=True)]
    share = [table.sum(-1, keepdim=True) for table in kept]
    beta = mdp.beta[..., None, None]
    return RegularizedMDP(
        beta=mdp.beta,
        initial=mdp.initial,
        reward=[reward + beta * total.log() for reward, total in zip(mdp.reward, share, strict=True)],
        reference=[table / total for table, total in zip(kept, share, strict=True)],
        transitions=mdp.transitions,
    )


def support_bound(mdp: RegularizedMDP, logits: PerLayerStateAction, log_mu: PerLayerStateAction) -> Scalars:
    """What masking to the data's support costs, and Theorem 2 on it (own; O3), ``(…)``: finite where ``μ`` omits actions.

    With ``E`` the trajectories on the support of ``μ``, and ``π_θ`` and the ``V_θ`` in ``f_θ`` over its actions alone,
    ``J_β(π*) - J_β(π_θ) ≤ β E_ρ log 1/P_{π*}(E|s_1) + β(√(κ(π*_E,μ) - 1) + √(κ(π_θ,μ) - 1)) √E_μ Var_μ(f_θ|s_1)``,
    ``π*_E`` the optimum given ``E``. The first term is what the missing actions are worth; Theorem 2 itself is infinite there.
    *Proof.* ``support_problem`` keeps every ``J_β``, its optimum has the law ``P_{π*}(·|E)`` and the objective
    ``J_β(π*) + β E_ρ log P_{π*}(E|s_1)`` (I2, the Gibbs form), and the rest is B5 in it. ∎

    Raises:
        InvalidInputError: stochastic transitions; malformed logits or policy.
    """
    _check_deterministic(mdp)
    inner = support_problem(mdp, log_mu)
    lost = solve(mdp).objective - solve(inner).objective
    return lost.clamp(min=0) + theorem2_centred(inner, logits, log_mu)


def path_policy(
    mdp: RegularizedMDP, logits: PerLayerStateAction, t: torch.Tensor, *, solution: Solution | None = None
) -> PerLayerStateAction:
    """``log π_t`` of the path from ``π*`` (t = 0) to ``π_θ`` (t = 1): ``P_t(τ|s_1) ∝ P_{π*}(τ|s_1) e^{t f_θ(τ)}`` (theory.md B7).

    On deterministic transitions ``log π* + t u`` is additive, so its soft plan has this law (I14).

    Args:
        t: shape ``(…)``, which becomes the batch in front of that of ``logits``.
    """
    _check_deterministic(mdp)
    star = (solution or solve(mdp)).log_policy
    terms = residual_terms(mdp, logits)
    steps = t.reshape(*t.shape, *(1 for _ in terms[0].shape))
    tilted = tuple(
        torch.where(valid, torch.where(valid, log, 0.0) + steps * u, 0.0)
        for valid, log, u in zip(mdp.valid, star, terms, strict=True)
    )
    return tuple(soft_policy(table) for table in soft_plan(mdp, tilted))


def _of_both(
    coefficient: Callable[[RegularizedMDP, PerLayerStateAction, Data], Scalars],
    mdp: RegularizedMDP,
    logits: PerLayerStateAction,
    mu: Data,
    solution: Solution | None,
) -> tuple[Scalars, Scalars]:
    """A coefficient of ``(π*,μ)`` and of ``(π_θ,μ)``, with the data looked at once."""
    _check_deterministic(mdp)
    policy = tuple(soft_policy(table) for table in admissible_logits(mdp, logits))
    star = (solution or solve(mdp)).log_policy
    pairs = [torch.stack(torch.broadcast_tensors(*tables)) for tables in zip(star, policy, strict=True)]
    both = coefficient(mdp, tuple(pairs), mu)
    return both[0], both[1]


def _product(mdp: RegularizedMDP, roots: Sequence[Scalars], loss: Scalars) -> Scalars:
    coefficient = roots[0] + roots[1]
    finite = (coefficient < torch.inf) & (loss < torch.inf)
    return torch.where(finite, mdp.beta * coefficient * loss.sqrt(), torch.inf)


def _check_deterministic(mdp: RegularizedMDP) -> None:
    if not mdp.is_deterministic:
        raise InvalidInputError("mdp", "expected deterministic transitions")
