"""X3: data that omit actions. κ is infinite, zero loss does not identify the optimum, and what that costs.

One side is ``coverage``, ``population`` and ``dynamic_programming``; the other is sums over listed trajectories (``by_hand``),
rational arithmetic over them (``exact_moments``), or a closed form.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tbrm_theory import coverage, dynamic_programming, population
from tbrm_theory.behaviours import MarkovBehaviour
from tbrm_theory.claims import by_hand
from tbrm_theory.claims.cases import Case, case_of
from tbrm_theory.claims.comparison import Comparison
from tbrm_theory.claims.exact_moments import exact_kappa, in_rationals
from tbrm_theory.claims.identities import deterministic
from tbrm_theory.claims.mixture_data import INSTANCES, gibbs_regret, planned, unseen_change
from tbrm_theory.claims.registry import claim
from tbrm_theory.families import make
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.moments import moment_form
from tbrm_theory.named_behaviours import with_holes
from tbrm_theory.random_tables import seeded
from tbrm_theory.shapes import PerLayerStateAction

__all__ = ["covered_optimum", "omitted_actions", "rare_arm"]


def omitted_actions(mdp: RegularizedMDP, data: MarkovBehaviour) -> PerLayerStateAction:
    """1 for every existing action of probability 0 under the data's policy, 0 for the others."""
    return tuple(
        (valid & (log == -math.inf)).to(torch.float64) for valid, log in zip(mdp.valid, data.log_policy, strict=True)
    )


def covered_optimum(mdp: RegularizedMDP, data: MarkovBehaviour) -> PerLayerStateAction:
    """``log π`` of the best policy that takes no omitted action: the soft plan of ``R_β``, ``-inf`` on omitted actions."""
    rewards = (
        torch.where(omitted > 0, -torch.inf, reward)
        for omitted, reward in zip(omitted_actions(mdp, data), mdp.regularized_reward, strict=True)
    )
    return tuple(dynamic_programming.soft_policy(table) for table in population.soft_plan(mdp, tuple(rewards)))


def _with_holes(seed: int) -> Case:
    """Small problems with merging and with branching paths, deterministic ones and every third stochastic."""
    return _small(("deterministic-dag", "deterministic-tree", "garnet")[seed % 3], seed)


def _deterministic_with_holes(seed: int) -> Case:
    return _small(("deterministic-dag", "deterministic-tree")[seed % 2], seed)


def _small(family: str, seed: int) -> Case:
    sizes = {"roots": 2} if family == "deterministic-tree" else {"states": 2}
    return case_of(make(family, seed=seed, horizon=2 + seed % 2, actions=2, reference="dirichlet", **sizes), "X3", seed)


def _data(case: Case) -> MarkovBehaviour:
    return with_holes(case.mdp, case.seed, share=0.3)


def _push(case: Case) -> Tensor:
    """By how much the omitted actions' values are off: up and down, 1 to 3, ``(2, 1, 1)``."""
    size = 1 + 2 * torch.rand((), generator=seeded(case.seed), dtype=torch.float64)
    return torch.stack([size, -size])[:, None, None]


@claim("X3.a", source="own", problem=_with_holes, problems=INSTANCES)
def infinite_kappa(case: Case) -> Comparison:
    """μ omits an action that π reaches: κ(π,μ) = ∞; π within the support of μ: κ < ∞

    Two π with full support and the covered optimum. Left: the closed form and the linear solve of ``coverage``.
    Right: ``exact_kappa`` over all trajectories. *Proof.* The indicator of that action is 0 on the data and not under
    π. Within the support every ``w_h(s,a)`` of I12 is finite. ∎
    """
    data = _data(case)
    covered = covered_optimum(case.mdp, data)
    policies = tuple(torch.cat([full, one.unsqueeze(0)]) for full, one in zip(case.log_policy, covered, strict=True))
    closed = coverage.kappa_closed_form(case.mdp, policies, data.log_policy)
    solved = coverage.kappa_linear_solve(case.mdp, policies, data)
    law = in_rationals(case.listed.log_law(data.log_policy).exp())
    right = [
        float(exact_kappa(case.listed, in_rationals(target), law)) for target in case.listed.log_law(policies).exp()
    ]
    exact = torch.tensor(right, dtype=torch.float64)
    size = by_hand.magnitude(case, [case.log_policy, data.log_policy]).max()
    condition = moment_form(case.mdp, data).condition
    scale = torch.where(exact < torch.inf, exact, 1.0) * size * condition
    return Comparison(torch.stack([closed, solved]), exact, scale, case.sweep + case.listing)


def _regret_is_no_rounding(case: Case) -> str | None:
    return None if float(gibbs_regret(case, _pushed(case)).min()) > 1e-6 else "omitted actions that do not matter"


def _pushed(case: Case) -> PerLayerStateAction:
    return tuple(_push(case) * table for table in omitted_actions(case.mdp, _data(case)))


@claim(
    "X3.b",
    source="own",
    requires=[deterministic, _regret_is_no_rounding],
    problem=_deterministic_with_holes,
    problems=INSTANCES,
)
def zero_loss_at_a_wrong_policy(case: Case) -> Comparison:
    """μ omits actions: L_μ(θ) = 0 with the omitted values off by ±t, and the regret is not 0

    deterministic transitions. BRM's loss is 0 there too, unlike in X1.c. See :func:`unseen_change` for
    the sides.
    """
    return unseen_change(case, _data(case), _pushed(case), ["tbrm", "brm"])


@claim("X3.c", source="own", requires=[deterministic], problem=_deterministic_with_holes)
def price_of_keeping_to_the_data(case: Case) -> Comparison:
    """the best policy within the data's support: regret = β E_ρ log 1/P_{π*}(no omitted action | s_1)

    deterministic transitions. κ(π*,μ) = ∞ whatever this is, 0 or large: what is omitted costs little where π* rarely
    takes it. Left: ``regret``. Right: two log-sum-exps over trajectories for each first state. *Proof.* That policy is
    P_{π*} given the trajectories without omitted actions; KL(P(·|E) ‖ P) = -log P(E), and I3. ∎
    """
    data = _data(case)
    left = dynamic_programming.regret(case.mdp, covered_optimum(case.mdp, data), solution=case.solution)
    weights = case.listed.sum_along(case.mdp.regularized_reward)
    inside = case.listed.sum_along(omitted_actions(case.mdp, data)) == 0
    right = _log_share(case, weights, inside)
    scale = case.mdp.beta * by_hand.magnitude(case, [case.mdp.regularized_reward, case.solution.q]).max()
    return Comparison(left / case.mdp.beta, right, scale / case.mdp.beta, case.sweep + case.listing)


def _log_share(case: Case, weights: Tensor, inside: Tensor) -> Tensor:
    """``E_ρ log 1/P(E | s_1)`` with ``P ∝ exp weights``."""
    all_of_it = by_hand.log_sum_by_start(case, weights)
    part = by_hand.log_sum_by_start(case, torch.where(inside, weights, -torch.inf))
    started = case.mdp.initial > 0
    return (case.mdp.initial * (all_of_it - part))[started].sum()


@claim("X3.d", source="own", requires=[deterministic], problem=_deterministic_with_holes, problems=INSTANCES)
def worst_zero_loss_policies(case: Case) -> Comparison:
    """omitted values off by t: the regret grows with |t|, to β E_ρ log 1/P_{π*}(N least or most | s_1)

    ``N(τ)`` is the number of omitted actions on τ, least for ``t < 0``, most for ``t > 0``. So the loss being 0 says
    nothing better than that limit. Left: ``regret`` at t/2, then at t. Right: the regret at t over all trajectories,
    then the limit. *Proof.* By B7 its derivative in t is ``β t E_ρ Var_{P_t}(N|s_1)``, with the sign of t; as
    ``t → ±∞``, ``P_t ∝ P_{π*} e^{tN}`` tends to P_{π*} given the extreme N, as in X3.c. ∎
    """
    f, started = _pushed(case), case.mdp.initial > 0
    halved = tuple(table / 2 for table in f)
    regrets = []
    for change in (halved, f):
        policy = tuple(dynamic_programming.soft_policy(table) for table in planned(case, change))
        regrets.append(dynamic_programming.regret(case.mdp, policy, solution=case.solution) / case.mdp.beta)
    weights = case.listed.sum_along(case.mdp.regularized_reward)
    count = case.listed.sum_along(omitted_actions(case.mdp, _data(case)))
    start = case.listed.states[:, 0]
    limits = []
    for sign in (1.0, -1.0):
        most = torch.full(started.shape, -torch.inf, dtype=torch.float64)
        most = most.scatter_reduce(0, start, sign * count, "amax")
        limits.append(_log_share(case, weights, sign * count == most[start]))
    right = torch.stack([gibbs_regret(case, f), torch.stack(limits)])
    scale = by_hand.magnitude(case, [case.mdp.regularized_reward, case.solution.q, f]).max()
    return Comparison(torch.stack(regrets), right, scale, case.sweep + 2 * case.listing, "at most")


# -- an action that becomes rare -------------------------------------------------------------------------------------


def rare_arm(mass: float, optimum: float, *, beta: float = 1.0) -> tuple[RegularizedMDP, MarkovBehaviour]:
    """Two arms: μ takes the first with probability ``mass``, π* with probability ``optimum``; uniform reference."""
    star = torch.tensor([[optimum, 1 - optimum]], dtype=torch.float64)
    mdp = RegularizedMDP(
        beta=beta,
        initial=torch.ones(1),
        reward=[beta * (star / 0.5).log()],
        reference=[torch.full((1, 2), 0.5)],
        transitions=[],
    )
    data = torch.tensor([[math.log(mass), math.log1p(-mass)]], dtype=torch.float64)
    return mdp, MarkovBehaviour((data,))


def _arms(seed: int) -> tuple[float, float]:
    """μ's share of the arm, down to 1e-100, and π*'s, from 0.05 to 0.95."""
    u = torch.rand(2, generator=seeded(seed), dtype=torch.float64).tolist()
    return 10.0 ** (-100 * u[0] if seed % 2 else -6 * u[0] - 0.5), 0.05 + 0.9 * u[1]


@claim("X3.e", source="own", problem=lambda seed: case_of(rare_arm(*_arms(seed))[0], "X3", seed))
def bound_at_a_rare_action(case: Case) -> Comparison:
    """μ(a) = m → 0: κ ~ π(a)²/m → ∞, yet B5 at an error t on a tends to β|t|(π*(a) + π_θ(a))

    and is ``β|t| Σ_π √(π(a)² + m(1 - π(a))²/(1-m))``: vacuous at m = 0, but not near it. Left: ``coverage.kappa`` and
    ``population_loss``. Right: this form. *Proof.* ``H = 1``: ``κ = π(a)²/m + (1-π(a))²/(1-m)`` and ``L_μ = m t²``. ∎
    """
    mass, optimum = _arms(case.seed)
    mdp, data = rare_arm(mass, optimum)
    t = _push(case)
    logits = (mdp.regularized_reward[0] + t * torch.tensor([[1.0, 0.0]], dtype=torch.float64),)
    policy = (dynamic_programming.soft_policy(logits[0]),)
    kappas = [coverage.kappa(mdp, log, data.log_policy) for log in (case.solution.log_policy, policy)]
    left = (kappas[0].sqrt() + kappas[1].sqrt()) * population.population_loss(mdp, logits, data).sqrt()
    odds = t.flatten().exp() * optimum / (1 - optimum)
    taken = [torch.tensor(optimum, dtype=torch.float64), odds / (1 + odds)]
    right = [(p.square() + mass * (1 - p).square() / (1 - mass)).sqrt() for p in taken]
    bound = t.flatten().abs() * (right[0] + right[1])
    return Comparison(left, bound, (1 + abs(math.log(mass))) * (1 + bound), case.sweep + case.listing)
