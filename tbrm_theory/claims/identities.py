"""I1-I4: Bellman equations, the Gibbs form of the optimum, regret as a divergence, the performance difference.

One side is the solver (``dynamic_programming``), the other is ``by_hand``: backups over the edges of the kernels, and sums over
listed trajectories.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tbrm_theory import dynamic_programming
from tbrm_theory.claims import by_hand
from tbrm_theory.claims.cases import Case
from tbrm_theory.claims.comparison import Comparison, Relation
from tbrm_theory.claims.registry import claim
from tbrm_theory.shapes import PerLayerState, PerLayerStateAction

__all__ = ["deterministic", "stochastic"]


# -- assumptions ---------------------------------------------------------------------------------------------------


def deterministic(case: Case) -> str | None:
    return None if case.mdp.is_deterministic else "stochastic transitions"


def stochastic(case: Case) -> str | None:
    return None if deterministic(case) else "deterministic transitions"


# -- I1 ------------------------------------------------------------------------------------------------------------


@claim("I1.a", source="[Y] §2")
def optimal_bellman_equation(case: Case) -> Comparison:
    """Q* = T_β Q*

    Left: ``solve``. Right: one backup of its ``q`` over the edges, with a log-sum-exp of its own.
    """
    q = case.solution.q
    return _tables(case, q, by_hand.backup(case, by_hand.values(q)))


@claim("I1.b", source="[Y] §2")
def policy_bellman_equation(case: Case) -> Comparison:
    """Q^π = T^π_β Q^π

    Left: ``evaluate``, for a policy that leaves out actions. Right: one backup of its ``q`` over the edges.
    """
    q = dynamic_programming.evaluate(case.mdp, case.other_policy).q
    return _tables(case, q, by_hand.backup(case, by_hand.entropic_values(q, case.other_policy)), case.other_policy)


@claim("I1.c", source="[Y] §2")
def monotone_operator(case: Case) -> Comparison:
    """T_β is monotone: Q ≤ Q' gives T_β Q ≤ T_β Q'

    ``Q`` is random, ``Q' = Q + |f|`` with ``f`` random. ``bellman_operator`` on one side, the backup by hand on the
    other, both ways round.
    """
    larger = tuple(table + f.abs() for table, f in zip(case.logits, case.additive, strict=True))

    def both(q: PerLayerStateAction) -> tuple[PerLayerStateAction, PerLayerStateAction]:
        return dynamic_programming.bellman_operator(case.mdp, q), by_hand.backup(case, by_hand.values(q))

    (ours, by_sums), (ours_of_larger, by_sums_of_larger) = both(case.logits), both(larger)
    left = tuple(torch.stack(torch.broadcast_tensors(*pair)) for pair in zip(ours, by_sums, strict=True))
    right = tuple(
        torch.stack(torch.broadcast_tensors(*pair)) for pair in zip(by_sums_of_larger, ours_of_larger, strict=True)
    )
    return _tables(case, left, right, larger, relation="at most")


@claim("I1.d", source="[Y] §2")
def constants_pass_through(case: Case) -> Comparison:
    """T_β(Q + c) = T_β Q + c for h < H, and (T_β Q)_H = R_β

    whatever ``Q`` is. Left: ``bellman_operator`` on random ``Q + c``. Right: the backup of ``Q`` by hand, with ``c``
    added.
    """
    c = case.gauge[0][..., :1, None]  # one number for each draw
    left = dynamic_programming.bellman_operator(case.mdp, tuple(table + c for table in case.logits))
    *earlier, last = by_hand.backup(case, by_hand.values(case.logits))
    right = (*(table + c for table in earlier), last)
    return _tables(case, left, right, case.logits, tuple(c.expand_as(table) for table in case.logits))


def _tables(
    case: Case,
    left: PerLayerStateAction,
    right: PerLayerStateAction,
    *terms: PerLayerStateAction,
    relation: Relation = "equal",
) -> Comparison:
    """Two tables after one backup each; the terms are the largest entries of everything in it."""
    involved = (left, right, case.mdp.regularized_reward, *terms)
    largest = torch.stack([_largest(tables) for tables in involved]).sum()
    cells = torch.broadcast_tensors(by_hand.existing(case, left), by_hand.existing(case, right))
    return Comparison(cells[0], cells[1], 1 + largest, 2 * case.sweep, relation)


def _largest(tables: PerLayerStateAction) -> Tensor:
    return torch.stack([torch.where(table.isinf(), 0.0, table).abs().max() for table in tables]).max()


# -- I2 ------------------------------------------------------------------------------------------------------------


@claim("I2.a", source="[Y] §2")
def optimal_objective(case: Case) -> Comparison:
    """J_β(π*) = β E_ρ V*(s_1)

    Left: the objective of ``solve``, a sum over first states. Right: ``E_{π*}[r(τ)] - β KL(P_{π*} ‖ P_ref)`` over all
    trajectories.
    """
    log_star = case.solution.log_policy
    scale = case.mdp.beta * (_objective_size(case, log_star) + case.solution.scale)
    return Comparison(case.solution.objective, _objective(case, log_star), scale, case.sweep + case.listing)


@claim("I2.b", source="[Y] §2", requires=[deterministic])
def gibbs_value(case: Case) -> Comparison:
    """deterministic: V*(s_1) = log Σ_{τ from s_1} exp Σ_h R_β

    Left: ``solve``. Right: the log-sum-exp over all trajectories of each first state.
    """
    return _first_values(case, case.listed.sum_along(case.mdp.regularized_reward))


@claim("I2.c", source="[Y] §2", requires=[deterministic])
def gibbs_policy(case: Case) -> Comparison:
    """deterministic: P_{π*}(τ|s_1) ∝ exp Σ_h R_β

    Left: ``log π*(τ)`` of ``solve``. Right: ``Σ R_β`` less its log-sum-exp over all trajectories of the first state.
    """
    weights = case.listed.sum_along(case.mdp.regularized_reward)
    right = weights - by_hand.log_sum_by_start(case, weights)[case.listed.states[:, 0]]
    scale = by_hand.magnitude(case, [case.mdp.regularized_reward, case.solution.q], [case.solution.v])
    return Comparison(case.listed.sum_along(case.solution.log_policy), right, scale, case.sweep + case.listing)


@claim("I2.d", source="[Y] §2", requires=[deterministic])
def gibbs_value_of_outcomes(case: Case) -> Comparison:
    """deterministic: V*(x) = log E_{y~π_ref} exp(r(x,y)/β)

    where ``r(x,y)`` is the return of a whole trajectory. Left: ``solve``. Right: the log-mean-exp of the returns of
    all trajectories under the reference.
    """
    return _first_values(case, case.listed.sum_along(case.mdp.log_reference) + by_hand.return_in_beta(case))


def _first_values(case: Case, exponents: Tensor) -> Comparison:
    started = case.mdp.initial > 0
    right = by_hand.log_sum_by_start(case, exponents)
    reward = tuple(table / case.mdp.beta for table in case.mdp.reward)
    scale = by_hand.magnitude(case, [reward, case.mdp.log_reference, case.solution.q]).max()
    return Comparison(case.solution.v[0][started], right[started], scale, case.sweep + case.listing)


# -- I3 ------------------------------------------------------------------------------------------------------------


@claim("I3.a", source="[Y] §2")
def regret_is_the_difference_of_objectives(case: Case) -> Comparison:
    """J_β(π*) - J_β(π) = β E_π Σ_h KL(π(·|s_h) ‖ π*(·|s_h))

    Left: both objectives over all trajectories. Right: ``regret``, by a forward sweep, for a policy that leaves out
    actions.
    """
    log_star = case.solution.log_policy
    left = _objective(case, log_star) - _objective(case, case.other_policy)
    return _regret(case, left, case.other_policy)


@claim("I3.b", source="[Y] §2")
def regret_is_a_divergence_of_laws(case: Case) -> Comparison:
    """J_β(π*) - J_β(π) = β KL(P_π ‖ P_{π*})

    Left: the divergence over all trajectories. Right: ``regret``.
    """
    log_law = case.listed.log_law(case.log_policy)
    log_ratio = case.listed.sum_along(case.log_policy) - case.listed.sum_along(case.solution.log_policy)
    return _regret(case, case.mdp.beta * by_hand.expectation(log_law, log_ratio), case.log_policy)


def _regret(case: Case, left: Tensor, log_policy: PerLayerStateAction) -> Comparison:
    """Against ``regret``; the size of a regret is that of the objectives and of ``Q*``, whose rounding is in ``log π*``."""
    right = dynamic_programming.regret(case.mdp, log_policy, solution=case.solution)
    size = _objective_size(case, log_policy) + _objective_size(case, case.solution.log_policy)
    scale = case.mdp.beta * (size + case.mdp.horizon * case.solution.scale)
    return Comparison(left, right, scale, case.sweep + 2 * case.listing)


def _objective(case: Case, log_policy: PerLayerStateAction) -> Tensor:
    """``E_π[r(τ) - β log π(τ)/π_ref(τ)]`` over all trajectories."""
    listed, log_law = case.listed, case.listed.log_law(log_policy)
    log_ratio = listed.sum_along(log_policy) - listed.sum_along(case.mdp.log_reference)
    return case.mdp.beta * by_hand.expectation(log_law, by_hand.return_in_beta(case) - log_ratio)


def _objective_size(case: Case, log_policy: PerLayerStateAction) -> Tensor:
    reward = tuple(table / case.mdp.beta for table in case.mdp.reward)
    terms = by_hand.magnitude(case, [reward, log_policy, case.mdp.log_reference])
    return by_hand.size(case.listed.log_law(log_policy), terms)


# -- I4 ------------------------------------------------------------------------------------------------------------


@claim("I4.a", source="[Y] Lemma 3")
def performance_difference(case: Case) -> Comparison:
    """J_β(π†) - J_β(π) from Bellman errors and advantages of any f

    ``J_β(π†) - J_β(π) = β { E_{π†} Σ_h [T^π_β f - f] + E_π Σ_h [f - T^π_β f] + E_{π†} Σ_h [E_{π†}(f - log π†) - E_π(f
    - log π)](s_h) }``. Left: two objectives by forward sweeps. Right: sums over all trajectories, with ``T^π_β f``
    over the edges, ``f`` random.
    """
    return _difference(case, case.additive)


@claim("I4.b", source="[Y] Lemma 3")
def classical_performance_difference(case: Case) -> Comparison:
    """J_β(π†) - J_β(π) from the advantages of Q^π alone

    ``J_β(π†) - J_β(π) = β E_{π†} Σ_h [E_{π†}(Q^π - log π†) - E_π(Q^π - log π)](s_h)``: I4 for ``f = Q^π`` of
    ``evaluate``, where the Bellman errors vanish.
    """
    return _difference(case, dynamic_programming.evaluate(case.mdp, case.log_policy).q, bellman_errors=False)


def _difference(case: Case, f: PerLayerStateAction, *, bellman_errors: bool = True) -> Comparison:
    dagger, policy, listed = case.other_policy, case.log_policy, case.listed
    v_dagger, v = by_hand.entropic_values(f, dagger), by_hand.entropic_values(f, policy)
    advantage: PerLayerState = tuple(theirs - ours for theirs, ours in zip(v_dagger, v, strict=True))
    law_dagger, law = listed.log_law(dagger), listed.log_law(policy)
    right = by_hand.expectation(law_dagger, by_hand.sum_over_states(case, advantage))
    backed_up = by_hand.backup(case, v)
    if bellman_errors:
        error = listed.sum_along(backed_up) - listed.sum_along(f)
        right = right + by_hand.expectation(law_dagger, error) - by_hand.expectation(law, error)
    objectives = [dynamic_programming.objective(case.mdp, log) for log in (dagger, policy)]
    reward = tuple(table / case.mdp.beta for table in case.mdp.reward)
    tables = [f, backed_up, reward, case.mdp.log_reference, policy, dagger]
    terms = by_hand.magnitude(case, tables, [v_dagger, v])
    scale = case.mdp.beta * (by_hand.size(law_dagger, terms) + by_hand.size(law, terms))
    return Comparison(objectives[0] - objectives[1], case.mdp.beta * right, scale, 2 * case.sweep + 2 * case.listing)
