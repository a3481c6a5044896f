"""What noisy returns cost: the constant of the regret's 1/N law, and the data on which it is least (own; theory.md I14, C4; O6).

``N`` trajectories are drawn from ``μ`` and their returns observed with independent noise of mean 0 and one variance, whatever the
trajectory. The empirical minimiser of TBRM is the soft plan of a least-squares fit (I14), whose error, an additive function
``e = Σ_h e_h(s_h,a_h)``, has the covariance ``variance/(β² N) · M⁺``, ``M = E_μ[φφᵀ]``, to first order. To second order in ``e`` the
regret is ``(β/2) E_ρ Var_{P_{π*}}(e|s_1)`` (B7), so that

    ``N · E[regret] → variance/(2β) · tr(M⁺ W)``,  ``W = E_ρ Cov_{P_{π*}}(φ|s_1)``:

half of ``β`` times the Hessian of the divergence, weighted by the covariance of the fit. Where the data do not identify the policy
the regret does not fall at all.
"""

from __future__ import annotations

import math

import torch

from tbrm_theory.behaviours import MarkovBehaviour
from tbrm_theory.coverage import Data, data_behaviour
from tbrm_theory.dynamic_programming import Solution, soft_policy, solve
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.moments import largest_second_moment, moment_form
from tbrm_theory.occupancy import flatten_tables, log_occupancy, unflatten_tables
from tbrm_theory.population import additive_moments, soft_plan
from tbrm_theory.shapes import PerLayerStateAction, Scalars, StateActionTable

__all__ = ["best_data_on_tree", "noise_cost"]


def noise_cost(mdp: RegularizedMDP, mu: Data, *, noise_variance: float, solution: Solution | None = None) -> Scalars:
    """``lim N · E[regret]`` of the empirical minimiser on ``N`` noisy returns (module docstring), in reward units, ``(…)``.

    With ``K Kᵀ = M⁺`` it is the sum, over the columns of ``K``, of the variances of additive functions under ``π*``.

    Args:
        mu: the law of the data, Markov or not.
        noise_variance: of an observed return, in squared reward units.
        solution: ``solve(mdp)``, when the caller has it already.

    Returns:
        ``inf`` where the data do not identify the policy, or where the number is beyond float64.

    Raises:
        InvalidInputError: stochastic transitions, a negative or infinite variance, or as :func:`~tbrm_theory.moments.moment_form`.
    """
    _check_deterministic(mdp)
    if not 0 <= noise_variance < math.inf:
        raise InvalidInputError("noise_variance", f"expected a number that is not negative, found {noise_variance}")
    star = (solution or solve(mdp)).log_policy
    form = moment_form(mdp, data_behaviour(mdp, mu))
    visited = flatten_tables(log_occupancy(mdp, star).state_action) > -torch.inf
    identified = ~(visited & ~form.covered).any(-1)
    if not form.markov:
        identified = largest_second_moment(form, moment_form(mdp, MarkovBehaviour(star))) < torch.inf
    values, vectors = form.spectrum  # of D^-½ M D^-½
    root = torch.where(form.covered, (-0.5 * form.log_mass).exp(), 0.0)
    columns = root.unsqueeze(-1) * vectors / values.sqrt().unsqueeze(-2)
    variance = additive_moments(mdp, unflatten_tables(mdp, columns.movedim(-1, 0)), star).variance
    total = (mdp.initial * variance).sum(-1).sum(0)
    cost = noise_variance / (2 * mdp.beta) * total
    return torch.where(identified & cost.isfinite(), cost, torch.inf)


def best_data_on_tree(mdp: RegularizedMDP, *, solution: Solution | None = None) -> PerLayerStateAction:
    """``log μ`` of the data with the least :func:`noise_cost` on a tree: ``μ(τ|s_1) ∝ √(P_{π*}(τ|s_1) (1 - P_{π*}(τ|s_1)))``.

    *Proof.* On a tree every function of the trajectory is additive and ``M`` is diagonal in them, so the cost is
    ``variance/(2β) · Σ_{s_1} Σ_τ P(1-P)/μ(τ|s_1)`` with ``P = P_{π*}(τ|s_1)``; by Cauchy-Schwarz that is at least
    ``variance/(2β) · Σ_{s_1} (Σ_τ √(P(1-P)))²``, and equal at this ``μ``. ∎ So rare trajectories are drawn oftener than by the
    optimum, and where only two have any weight, both alike. In states that cannot be reached any data serve.

    Raises:
        InvalidInputError: a problem that is no tree: stochastic transitions, or a state that can be reached by two pairs, even if no
            choice follows; a batch of problems.
    """
    _check_deterministic(mdp)
    if mdp.batch_shape:
        raise InvalidInputError("mdp", f"expected one problem, found a batch of shape {tuple(mdp.batch_shape)}")
    log_law, log_rest = _tree_law(mdp, (solution or solve(mdp)).log_policy)
    weighted = (log_law > -torch.inf) & (log_rest > -torch.inf)  # not so if it is all there is
    last = torch.where(weighted, 0.5 * (log_law + log_rest), 0.0)
    plan = soft_plan(mdp, (*(torch.zeros_like(table) for table in mdp.reference[:-1]), last))
    return tuple(soft_policy(table) for table in plan)


def _tree_law(mdp: RegularizedMDP, log_policy: PerLayerStateAction) -> tuple[StateActionTable, StateActionTable]:
    """``log P(τ|s_1)`` and ``log(1 - P(τ|s_1))`` of the trajectory that ends in each pair of the last layer; ``-inf`` if none does.

    The second is the sum, over the steps, of the probability to come so far and do something else: nothing cancels.
    """
    reached = mdp.initial > 0
    law = torch.where(reached, 0.0, -torch.inf).to(torch.float64)
    rest = torch.full_like(law, -torch.inf)
    for h, log in enumerate(log_policy):
        itself = torch.eye(log.shape[-1], dtype=torch.bool, device=log.device)
        others = torch.where(itself, -torch.inf, log.unsqueeze(-2)).logsumexp(-1)
        pair_law = law.unsqueeze(-1) + log
        pair_rest = torch.logaddexp(rest.unsqueeze(-1), law.unsqueeze(-1) + others)
        if h == mdp.horizon - 1:
            break
        taken = reached.unsqueeze(-1) & mdp.valid[h]
        successors, probability = mdp.transitions[h].edges()
        into = successors.gather(-1, probability.argmax(-1, keepdim=True)).squeeze(-1)[taken]
        arrivals = torch.bincount(into, minlength=mdp.transitions[h].shape[-1])
        if bool((arrivals > 1).any()):
            where = f"transitions[{h}]"
            raise InvalidInputError(where, f"expected a tree, found {int(arrivals.max())} pairs that lead to one state")
        reached = arrivals > 0
        law, rest = (
            torch.full_like(arrivals, -torch.inf, dtype=torch.float64).index_copy(0, into, table[taken])
            for table in (pair_law, pair_rest)
        )
    return pair_law, pair_rest


def _check_deterministic(mdp: RegularizedMDP) -> None:
    if not mdp.is_deterministic:
        raise InvalidInputError("mdp", "expected deterministic transitions")
