"""O6: the constant of the regret's 1/N law under noisy returns, and the best data on trees. O7: verifiers that err.

One side of O6 is ``noise_cost``, the other differentiates the exact regret along what each trajectory's noise does to the fit,
or lists trajectories; nothing is drawn. In O7 one side fits outcomes as a verifier that errs reports them, the other solves the
problem at another temperature.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from tbrm_theory import dynamic_programming, noise_cost, population
from tbrm_theory.claims import by_hand
from tbrm_theory.claims.cases import Case, case_of
from tbrm_theory.claims.comparison import Comparison
from tbrm_theory.claims.convergence import data_laws, small_problem
from tbrm_theory.claims.derivatives import ListedLoss, tables
from tbrm_theory.claims.registry import claim
from tbrm_theory.families import make
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.random_tables import seeded
from tbrm_theory.shapes import PerLayerStateAction

__all__ = ["outcome_problem", "small_tree"]

INSTANCES = 40
"""Problems of each claim here: some twenty milliseconds each."""


# -- O6 --------------------------------------------------------------------------------------------------------------


@claim("O6.a", source="own", problem=small_problem, problems=INSTANCES)
def constant_of_the_noisy_rate(case: Case) -> Comparison:
    """deterministic, noisy returns: lim N E[regret] = (σ²/2β) tr(M⁺ E_ρ Cov_{P_π*}(φ|s_1)), σ² the variance of a return

    Left: ``noise_cost``, by sweeps. Right: half the sum over trajectories of ``μ(τ) ∂²regret`` along ``M⁺φ(τ)``, which is how far the
    fit moves with the noise of ``τ``: autograd twice through ``regret`` of the soft plan. *Proof.* ``noise_cost``'s docstring. ∎
    """
    policy = tuple(table[0] for table in case.log_behaviour)
    law = case.listed.log_law(policy).exp()
    loss = ListedLoss.of(case.mdp, case.listed, law)
    left = noise_cost.noise_cost(case.mdp, policy, noise_variance=1.0, solution=case.solution)
    inverse = torch.linalg.pinv(loss.moments, hermitian=True, rtol=1e-12)
    moves = loss.visits @ inverse / case.mdp.beta
    step = torch.zeros(len(law), dtype=torch.float64, requires_grad=True)
    plan = population.soft_plan(case.mdp, tables(case.mdp, loss.reward + step.unsqueeze(-1) * moves))
    log_policy = tuple(dynamic_programming.soft_policy(table) for table in plan)
    regret = dynamic_programming.regret(case.mdp, log_policy, solution=case.solution)
    (slope,) = torch.autograd.grad(regret.sum(), step, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), step)
    right = (law * bend).sum() / 2
    eigenvalues = torch.linalg.eigvalsh(loss.moments)
    condition = eigenvalues.max() / eigenvalues[eigenvalues > 1e-9].min()
    size = by_hand.magnitude(case, [case.solution.q], [case.solution.v]).amax()
    largest = (moves @ loss.visits.T).abs().amax(-1)
    scale = case.mdp.beta * (law * largest.square()).sum() * condition * size
    return Comparison(left, right, scale, 4 * case.sweep + case.listing)


@lru_cache(maxsize=4)
def small_tree(seed: int) -> Case:
    """A tree of at most 18 trajectories, from one or two first states, some of them with a single trajectory."""
    horizon, actions, roots = ((3, 2, 1), (2, 3, 2), (1, 5, 2), (2, 2, 2), (3, 2, 2))[seed % 5]
    options = {"horizon": horizon, "actions": actions, "roots": roots, "missing": 0.4 * (seed % 2)}
    return case_of(make("deterministic-tree", seed=seed, **options), "O6", seed)


def _least_on_tree(case: Case) -> Tensor:
    """``1/(2β) Σ_{s_1} (Σ_τ √(P(1-P)))²`` over listed trajectories."""
    log_law = case.listed.log_law(case.solution.log_policy)
    start = case.listed.states[:, 0]
    p = (log_law - case.mdp.initial.log()[start]).exp()
    same = start.unsqueeze(-1) == start
    others = (torch.where(same, p, 0.0) - torch.diag(p)).sum(-1)
    roots = torch.zeros_like(case.mdp.initial).index_add(0, start, (p * others).sqrt())
    return roots.square().sum() / (2 * case.mdp.beta)


@claim("O6.b", source="own", problem=small_tree, problems=INSTANCES)
def best_data_on_a_tree(case: Case) -> Comparison:
    """token trees: data with μ(τ|s_1) ∝ √(P(1-P)), P = P_π*(τ|s_1), have lim N E[regret] = (σ²/2β) Σ_{s_1} (Σ_τ √(P(1-P)))²

    Left: ``noise_cost`` of ``best_data_on_tree``. Right: over listed trajectories, ``1 - P`` as the sum of the others.
    """
    best = noise_cost.best_data_on_tree(case.mdp, solution=case.solution)
    left = noise_cost.noise_cost(case.mdp, best, noise_variance=1.0, solution=case.solution)
    return Comparison(left, _least_on_tree(case), *_rounding(case, left))


@claim("O6.c", source="own", problem=small_tree, problems=INSTANCES)
def no_data_are_better_on_a_tree(case: Case) -> Comparison:
    """… and no data have less

    Left: as the right of O6.b. Right: ``noise_cost`` of random data, and of the optimum's own. *Proof.* Cauchy-Schwarz. ∎
    """
    both = [tuple(table[0] for table in case.log_behaviour), case.solution.log_policy]
    data = tuple(torch.stack(layers) for layers in zip(*both, strict=True))
    right = noise_cost.noise_cost(case.mdp, data, noise_variance=1.0, solution=case.solution)
    operations = _rounding(case, right)[1]
    return Comparison(_least_on_tree(case), right, *(_rounding(case, right)[0], operations), "at most")


def _rounding(case: Case, cost: Tensor) -> tuple[Tensor, int]:
    """The scale, and the operations, of a cost on a tree: probabilities inherit the error of their logarithms."""
    size = by_hand.magnitude(case, [case.solution.q], [case.solution.v]).amax()
    return size * (1 + cost), 4 * case.sweep + 2 * case.listing


# -- O7 --------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def outcome_problem(seed: int) -> Case:
    """The graph of a ``small_problem`` with rewards of 0 or 1 for the last action alone."""
    mdp = small_problem(seed).mdp
    *earlier, last = mdp.reward
    outcome = torch.randint(2, last.shape, generator=seeded(seed)).to(torch.float64)
    reward = [*(torch.zeros_like(table) for table in earlier), outcome]
    return case_of(_with(mdp, mdp.beta, reward), "O7", seed)


def _with(mdp: RegularizedMDP, beta: Tensor, reward: list[Tensor]) -> RegularizedMDP:
    return RegularizedMDP(
        beta=beta, initial=mdp.initial, reward=reward, reference=mdp.reference, transitions=mdp.transitions
    )


@lru_cache(maxsize=4)
def _verifiers(case: Case) -> Tensor:
    """Probabilities ``(a, b)`` to take a 0 for 1 and a 1 for 0, of two verifiers with the same sum."""
    total, *shares = torch.rand(3, generator=seeded(case.seed), dtype=torch.float64).tolist()
    return torch.tensor([[0.95 * total * share, 0.95 * total * (1 - share)] for share in shares], dtype=torch.float64)


@lru_cache(maxsize=8)
def _fit(case: Case, a: float, b: float) -> PerLayerStateAction:
    """The minimiser of TBRM's population loss when a verifier reports the outcomes: every trajectory with either report (I14)."""
    loss = ListedLoss.of(case.mdp, case.listed, data_laws(case)[case.seed % 3, 0])
    outcome = case.listed.sum_along(case.mdp.reward)
    one = torch.where(outcome > 0.5, outcome.new_tensor(1 - b), outcome.new_tensor(a))
    weights = torch.cat([loss.weights * (1 - one), loss.weights * one])
    noise = torch.cat([-outcome, 1 - outcome]) / case.mdp.beta
    root, scale = weights.sqrt().unsqueeze(-1), torch.where(loss.mass > 0, loss.mass, 1.0).rsqrt()
    design = root * loss.visits.repeat(2, 1) * scale
    error = torch.linalg.lstsq(design, root * noise.unsqueeze(-1), driver="gelsd").solution.squeeze(-1)
    return population.soft_plan(case.mdp, tables(case.mdp, loss.reward + scale * error))


@lru_cache(maxsize=4)
def _fit_rounding(case: Case) -> tuple[Tensor, int]:
    """A fit that leaves a residual is as well conditioned as the moment matrix, pairs scaled by their data."""
    loss = ListedLoss.of(case.mdp, case.listed, data_laws(case)[case.seed % 3, 0])
    seen = loss.mass > 0
    mass = loss.mass[seen]
    matrix = loss.moments[seen][:, seen] / (mass * mass.unsqueeze(-1)).sqrt()
    values = torch.linalg.eigvalsh(matrix)
    condition = values.max() / values[values > 1e-9].min()
    size = by_hand.magnitude(case, [case.solution.q], [case.solution.v]).amax() + 1 / case.mdp.beta
    return size * condition / mass.min().sqrt(), 4 * case.listing


@claim("O7.a", source="own", problem=outcome_problem, problems=INSTANCES)
def verifier_that_errs(case: Case) -> Comparison:
    """deterministic, outcomes 0/1 reported wrongly with probabilities a, b: TBRM finds the optimum at temperature β/(1-a-b)

    and ``V_θ(s_1)`` is ``a/β`` more than its value, if ``a + b < 1``, errors depend on the outcome alone, and the population's data
    (Markov, a mixture or history-dependent) identify the policy. Left: ``soft_plan`` of a least-squares fit to all trajectories with
    either report, for two verifiers with the same ``a + b``. Right: ``solve`` at the other temperature. *Proof.* Given the trajectory
    a report has the mean ``a + (1-a-b) r``, an additive function, so that is what is fitted (I14); its soft plan is the optimum for
    the reward ``(1-a-b) r`` at ``β``. ∎ So the policy depends on ``a + b`` alone.
    """
    states, actions = case.listed.states, case.listed.actions

    def seen(log_policy: PerLayerStateAction, v: Tensor) -> Tensor:
        steps = [table[states[:, h], actions[:, h]] for h, table in enumerate(log_policy)]
        return torch.stack([*steps, v[states[:, 0]]])

    left, right = [], []
    for a, b in _verifiers(case).tolist():
        logits = _fit(case, a, b)
        value = dynamic_programming.soft_value(logits[0]) - a / case.mdp.beta
        left.append(seen(tuple(dynamic_programming.soft_policy(table) for table in logits), value))
        tempered = dynamic_programming.solve(_with(case.mdp, case.mdp.beta / (1 - a - b), list(case.mdp.reward)))
        right.append(seen(tempered.log_policy, tempered.v[0]))
    return Comparison(torch.stack(left), torch.stack(right), *_fit_rounding(case))


@claim("O7.b", source="own", problem=outcome_problem, problems=INSTANCES)
def regret_of_a_verifier_that_errs(case: Case) -> Comparison:
    """… with regret β E_ρ kl(q_{1-a-b} ‖ q_1), q_λ = p e^{λ/β}/(1 - p + p e^{λ/β}), p what π_ref solves

    Left: ``regret`` of the fit of O7.a. Right: the closed form, ``p(s_1) = P_ref(r = 1|s_1)`` over listed trajectories, ``kl`` between
    two coins. *Proof.* Given the outcome all optima have the law of ``π_ref`` (I2). ∎
    """
    log_law = case.listed.log_law(case.mdp.log_reference)
    outcome = case.listed.sum_along(case.mdp.reward)
    start, beta = case.listed.states[:, 0], case.mdp.beta
    solved, failed = (
        torch.zeros_like(case.mdp.initial).index_add(0, start, torch.where(outcome == r, log_law, -torch.inf).exp())
        for r in (1, 0)
    )

    def coin(trust: float) -> tuple[Tensor, Tensor]:
        odds = solved.log() - failed.log() + trust / beta
        return torch.nn.functional.logsigmoid(odds), torch.nn.functional.logsigmoid(-odds)

    left, right = [], []
    for a, b in _verifiers(case).tolist():
        policy = tuple(dynamic_programming.soft_policy(table) for table in _fit(case, a, b))
        left.append(dynamic_programming.regret(case.mdp, policy, solution=case.solution))
        parts = [
            torch.where(q > -torch.inf, q.exp() * (q - star), 0.0)
            for q, star in zip(coin(1 - a - b), coin(1.0), strict=True)
        ]
        right.append(beta * (case.mdp.initial * torch.stack(parts).nan_to_num().sum(0)).sum())
    scale, operations = _fit_rounding(case)
    return Comparison(torch.stack(left), torch.stack(right), beta * case.mdp.horizon * scale, operations)
