"""Gauss-Newton against the Jacobian of the residuals; convergence from anywhere (C1, C2), and where theory.md says not (C3, X1-X3)."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tbrm_theory import optimisers
from tbrm_theory.behaviours import Behaviour, HistoryBehaviour, MarkovBehaviour, MixtureBehaviour
from tbrm_theory.dynamic_programming import soft_policy, solve
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.families import make
from tbrm_theory.losses import tbrm_residual
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.named_behaviours import BEHAVIOURS, with_holes
from tbrm_theory.objectives import Objective, PopulationObjective, SampleObjective
from tbrm_theory.occupancy import occupancy
from tbrm_theory.optimisers import conjugate_gradients, least_squares_plan, levenberg_marquardt
from tbrm_theory.parametrisations import Linear, Network, Parametrisation, Tabular, linear_features
from tbrm_theory.population import noise_floor
from tbrm_theory.scores import table_scores
from tbrm_theory.training import exact_regret
from tbrm_theory.trajectories import TrajectoryBatch, concatenate, sample_trajectories
from tbrm_theory.transitions import DenseTransition
from tests.convert import plain
from tests.drawn import KINDS, as_tuples, parametrisation, random_policy, random_problem, short_answers

DENSE, MATRIX_FREE = 10_000, 0
routes = pytest.mark.parametrize("route", [DENSE, MATRIX_FREE], ids=["dense", "matrix-free"])
every_kind = pytest.mark.parametrize("kind", KINDS)
every_sort = pytest.mark.parametrize("sort", ["tabular", "linear", "network"])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def regrets(mdp: RegularizedMDP, map_: Parametrisation, theta: Tensor) -> Tensor:
    return exact_regret(mdp, map_.logits(theta), solve(mdp))


# -- the Gauss-Newton matrix ---------------------------------------------------------------------------------------------


def objectives(mdp: RegularizedMDP) -> dict[str, tuple[Objective, SampleObjective]]:
    """Each sort of data, and the trajectories with weights that say the same."""
    markov = MarkovBehaviour(random_policy(mdp, 1))
    mixture = MixtureBehaviour((0.3, 0.7), (random_policy(mdp, 1), random_policy(mdp, 2)))
    batch = sample_trajectories(mdp, mdp.log_reference, 25, generator(3))
    weights = torch.rand(25, generator=generator(4), dtype=torch.float64)
    noise = torch.randn(25, generator=generator(5), dtype=torch.float64)
    sample = SampleObjective(mdp, batch, weights / weights.sum(), noise)
    return {
        "markov": (PopulationObjective(mdp, markov), SampleObjective.enumerated(mdp, markov)),
        "mixture": (PopulationObjective(mdp, mixture), SampleObjective.enumerated(mdp, mixture)),
        "sample": (sample, sample),
    }


def gauss_newton(listed: SampleObjective, map_: Parametrisation, theta: Tensor) -> tuple[Tensor, Tensor]:
    """``Jᵀ W J`` and ``Jᵀ W f`` with ``J`` the Jacobian, by autograd, of the residuals of the listed trajectories in a step."""
    mdp = listed.mdp

    def residuals(step: Tensor) -> Tensor:
        logits = map_.logits(map_.moved(theta, step))
        scores = table_scores(
            logits, mdp.log_reference, mdp.reward, listed.trajectories, trajectory_return=listed.returns
        )
        return tbrm_residual(scores, beta=mdp.beta)

    zero = torch.zeros_like(theta)
    jacobian, weights = torch.func.jacrev(residuals)(zero), listed.trajectory_weights
    return jacobian.T @ (weights.unsqueeze(-1) * jacobian), jacobian.T @ (weights * residuals(zero))


@every_kind
@every_sort
@pytest.mark.parametrize("data", ["markov", "mixture", "sample"])
def test_the_gauss_newton_matrix_is_that_of_the_residuals(
    kind: str, sort: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a matrix, as a product, by its diagonal, and the gradient with it, for two seeds at once."""
    monkeypatch.setattr(optimisers, "DENSE_LIMIT", DENSE)
    mdp = random_problem(kind)
    map_ = parametrisation(sort, mdp)
    objective, listed = objectives(mdp)[data]
    theta, direction = map_.initial(2, generator()), map_.initial(2, generator(1))
    metric = optimisers._Metric(objective, map_)
    policy = metric.policy(theta)
    matrix, product = metric.dense(theta, policy), metric.product(theta, policy, direction)
    diagonal = metric.diagonal(theta, policy)
    loss, gradient = optimisers._loss_and_gradient(objective, map_, theta)
    torch.testing.assert_close(loss, objective.loss(map_.logits(theta)), rtol=1e-12, atol=0.0)
    for i in range(2):
        expected, expected_gradient = gauss_newton(listed, map_, theta[i])
        close: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12 * expected.abs().max().item()}
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(matrix[i], expected, **close)
        torch.testing.assert_close(product[i], expected @ direction[i], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(diagonal[i], expected.diagonal(), **close)
        torch.testing.assert_close(gradient[i], expected_gradient, rtol=1e-10, atol=1e-11)


@every_sort
def test_the_diagonal_does_not_depend_on_how_much_fits_at_once(sort: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mdp = random_problem("dense")
    map_ = parametrisation(sort, mdp)
    theta = map_.initial(3, generator())
    metric = optimisers._Metric(objectives(mdp)["markov"][0], map_)
    whole = metric.diagonal(theta, metric.policy(theta))
    monkeypatch.setattr(optimisers, "_ENTRIES_AT_ONCE", 1)
    torch.testing.assert_close(metric.diagonal(theta, metric.policy(theta)), whole, rtol=1e-13, atol=1e-15)


def test_a_nearly_deterministic_policy_does_not_spoil_the_diagonal() -> None:
    """Data and π_θ agree on action 0: its entry is d(s, 0)·(1 − π)², where 1 − 2π + π² would have lost its digits."""
    mdp = random_problem("dense")
    table = Tabular(mdp)
    first = [torch.where(valid, -12.0 * torch.arange(valid.shape[-1]).double(), -math.inf) for valid in mdp.valid]
    theta = table.parameters(tuple(torch.where(v, q, 0.0) for v, q in zip(mdp.valid, first, strict=True))).unsqueeze(0)
    only = tuple(torch.where(q == q.amax(-1, keepdim=True), 0.0, -math.inf) for q in first)
    objective = PopulationObjective(mdp, MarkovBehaviour(only))
    metric = optimisers._Metric(objective, table)
    diagonal = torch.zeros_like(metric.mass)
    diagonal[table.free] = metric.diagonal(theta, metric.policy(theta))[0]
    (*_, last), rest = occupancy(mdp, only).state_action, 1 / (1 + math.exp(12.0))
    assert mdp.valid[-1].all()
    expected = last[:, 0] * rest**2
    assert expected.max() > 0
    torch.testing.assert_close(diagonal[-4::2], expected, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(diagonal[-3::2], expected, rtol=1e-9, atol=0.0)
    dense = metric.dense(theta, metric.policy(theta))[0].diagonal()
    torch.testing.assert_close(dense, diagonal[table.free], rtol=1e-9, atol=0.0)


# -- the condition of the linear problem ---------------------------------------------------------------------------------


def spectrum(objective: Objective, table: Tabular) -> Tensor:
    """Eigenvalues of the moment matrix over the free pairs, scaled to have 1 on its diagonal."""
    matrix = objective.moment_matrix()[table.free][:, table.free]
    root = matrix.diagonal().rsqrt()
    return torch.linalg.eigvalsh(matrix * root * root.unsqueeze(-1))


@pytest.mark.parametrize(
    "family", ["deterministic-dag", "chain", "combination-lock", "deterministic-tree", "frozen-lake"]
)
def test_markov_data_make_a_condition_of_at_most_the_horizon(family: str) -> None:
    """Deterministic transitions: the nonzero eigenvalues lie in [1, H], however rare a pair is (I11, Cauchy-Schwarz)."""
    mdp = make(family, horizon=5)
    table = Tabular(mdp)
    for name in ("uniform", "anti-optimal", "random-markov"):
        behaviour = BEHAVIOURS[name].make(mdp, 0)
        eigenvalues = spectrum(PopulationObjective(mdp, behaviour), table)
        nonzero = eigenvalues[eigenvalues > 1e-6]
        assert (eigenvalues[eigenvalues <= 1e-6].abs() < 1e-12).all()
        assert nonzero.min() > 1 - 1e-10
        assert nonzero.max() < 5 + 1e-10


def test_a_mixture_can_make_any_condition() -> None:
    """X1 again: that bound needs Markov data. Two nearly deterministic policies, one state in each layer."""
    mdp = make("one-state", horizon=2, actions=2)
    flip = 1e-3
    copies = [
        tuple(torch.tensor([[1 - flip, flip][::sign]], dtype=torch.float64).log() for _ in range(2)) for sign in (1, -1)
    ]
    eigenvalues = spectrum(PopulationObjective(mdp, MixtureBehaviour((0.5, 0.5), tuple(copies))), Tabular(mdp))
    assert 0 < eigenvalues[eigenvalues > 1e-6].min() < 0.01


# -- convergence ---------------------------------------------------------------------------------------------------------


FAMILIES: dict[str, dict[str, Any]] = {
    "two-armed-bandit": {},
    "one-state": {},
    "combination-lock": {},
    "deterministic-dag": {"missing": 0.2, "ragged": True},
    "chain": {"horizon": 6},
    "deterministic-tree": {"reference": "dirichlet"},
    "balanced-brackets": {"pairs": 2},
    "frozen-lake": {"horizon": 7},
    "cliff-walking": {"horizon": 5},
}
SMALL = ("two-armed-bandit", "combination-lock", "deterministic-dag")
CELLS = [(family, MATRIX_FREE) for family in FAMILIES] + [(family, DENSE) for family in SMALL]


@pytest.mark.parametrize(("family", "route"), CELLS)
def test_tables_reach_the_optimum_from_anywhere_on_any_full_support_data(
    family: str, route: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C1, C2: deterministic transitions, three random starts, every behaviour with full support; mixtures too."""
    monkeypatch.setattr(optimisers, "DENSE_LIMIT", route)
    mdp = make(family, **FAMILIES[family])
    table = Tabular(mdp)
    start = table.initial(3, generator(), scale=2.0)
    assert (regrets(mdp, table, start) > 1e-3).all()
    tried = 0
    for named in BEHAVIOURS.values():
        behaviour = named.make(mdp, 0)
        if named.full_support and behaviour.components is not None:
            found = levenberg_marquardt(PopulationObjective(mdp, behaviour), table, start)
            assert found.converged.all()
            assert (found.loss < 1e-20).all(), named.name
            assert (regrets(mdp, table, found.theta) < 1e-12).all(), named.name
            tried += 1
    assert tried >= 6


def reference(mdp: RegularizedMDP) -> MarkovBehaviour:
    return MarkovBehaviour(mdp.log_reference)


@routes
def test_history_dependent_data_serve_as_well(route: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """C1 asks nothing of the law; C2 only that every trajectory has a chance."""
    monkeypatch.setattr(optimisers, "DENSE_LIMIT", route)
    mdp = random_problem("deterministic")
    table = Tabular(mdp)
    objective = SampleObjective.enumerated(mdp, HistoryBehaviour(random_policy(mdp, 1), 0.7))
    found = levenberg_marquardt(objective, table, table.initial(3, generator()))
    assert (found.loss < 1e-20).all()
    assert (regrets(mdp, table, found.theta) < 1e-12).all()


def test_both_routes_find_the_same() -> None:
    """Where the data do not decide, both move no farther from the start than the data ask."""
    mdp = make("deterministic-dag")
    table, behaviour = Tabular(mdp), with_holes(make("deterministic-dag"), 0)
    start = table.initial(2, generator())
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for route in (DENSE, MATRIX_FREE):
            patch.setattr(optimisers, "DENSE_LIMIT", route)
            found.append(levenberg_marquardt(PopulationObjective(mdp, behaviour), table, start))
    policies = [
        torch.cat([soft_policy(layer).exp().flatten(1) for layer in table.logits(one.theta)], dim=1) for one in found
    ]
    torch.testing.assert_close(policies[0], policies[1], rtol=0.0, atol=1e-6)
    assert (regrets(mdp, table, found[0].theta) > 1e-3).all()


def test_a_large_problem_needs_no_matrix() -> None:
    """FrozenLake 8×8 over 20 steps: 2,804 logits, from random starts, in a handful of iterations."""
    mdp = make("frozen-lake", size=8, horizon=20)
    table = Tabular(mdp)
    assert table.size > optimisers.DENSE_LIMIT
    start = table.initial(2, generator())
    assert (regrets(mdp, table, start) > 0.1).all()
    found = levenberg_marquardt(PopulationObjective(mdp, BEHAVIOURS["anti-optimal"].make(mdp, 0)), table, start)
    assert found.iterations <= 10
    assert (regrets(mdp, table, found.theta) < 1e-12).all()


@routes
@every_kind
def test_linear_logits_reach_the_optimum_where_they_hold_it(
    kind: str, route: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started nearby; noise in the transitions leaves at most the floor of I7."""
    monkeypatch.setattr(optimisers, "DENSE_LIMIT", route)
    mdp = random_problem(kind)
    map_ = parametrisation("linear", mdp)
    start = torch.tensor([[1.0, 0, 0, 0, 0]], dtype=torch.float64) + map_.initial(3, generator(), scale=0.1)
    behaviour = MarkovBehaviour(random_policy(mdp, 1))
    found = levenberg_marquardt(PopulationObjective(mdp, behaviour), map_, start)
    assert found.converged.all()
    if kind == "deterministic":
        assert (found.loss < 1e-20).all()
        assert (regrets(mdp, map_, found.theta) < 1e-12).all()
    else:
        assert (found.loss < noise_floor(mdp, behaviour)).all()
        assert (found.loss > 1e-3).all()
        assert (regrets(mdp, map_, found.theta) > 1e-6).all()


def test_linear_logits_that_do_not_hold_the_optimum_stop_short() -> None:
    mdp = random_problem("deterministic")
    map_ = Linear(mdp, linear_features(mdp, 4, generator(), realisable=False))
    found = levenberg_marquardt(PopulationObjective(mdp, reference(mdp)), map_, map_.initial(3, generator()))
    assert found.converged.all()
    assert (found.loss > 1e-3).all()
    _, gradient = optimisers._loss_and_gradient(PopulationObjective(mdp, reference(mdp)), map_, found.theta)
    assert gradient.abs().max() < 1e-5  # a stationary point, and no zero of the loss


@routes
def test_a_network_fits_a_small_problem(route: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From some of the starts; with shared parameters there are local minima (C3)."""
    monkeypatch.setattr(optimisers, "DENSE_LIMIT", route)
    mdp = short_answers()
    map_ = Network(mdp, generator(), features=6, width=6)
    start = map_.initial(3, generator(), scale=0.5)
    found = levenberg_marquardt(PopulationObjective(mdp, reference(mdp)), map_, start, iterations=60)
    fitted = found.loss < 1e-20
    assert fitted.any()
    assert (regrets(mdp, map_, found.theta)[fitted] < 1e-12).all()


def test_stochastic_transitions_have_two_minima_below_the_optimum() -> None:
    """C3: two strict local minima at G = 1.5, neither of them at θ*, whose loss is I7's floor."""
    g = 1.5
    uniform = torch.full((1, 2), 0.5, dtype=torch.float64)
    mdp = RegularizedMDP(
        beta=1.0,
        initial=torch.ones(1),
        reward=[torch.zeros(1, 2), torch.tensor([[-g, -g - 0.25], [g, g]], dtype=torch.float64)],
        reference=[uniform, uniform.expand(2, 2)],
        transitions=[DenseTransition(torch.full((1, 2, 2), 0.5, dtype=torch.float64))],
    )
    table = Tabular(mdp)
    found = levenberg_marquardt(
        PopulationObjective(mdp, reference(mdp)), table, table.initial(8, generator(), scale=2.0), iterations=400
    )
    assert found.converged.all()
    near = [(found.loss - expected).abs() < 1e-6 for expected in (2.179489, 2.435764)]
    assert (near[0] | near[1]).all()
    assert near[0].any()
    assert near[1].any()
    assert noise_floor(mdp, reference(mdp)).item() == pytest.approx(2.429246, abs=1e-6)
    assert (regrets(mdp, table, found.theta) > 1e-3).all()


# -- data that do not decide (X1, X3) ------------------------------------------------------------------------------------


def check_wrong_at_zero_loss(mdp: RegularizedMDP, behaviour: Behaviour) -> None:
    table = Tabular(mdp)
    start = table.initial(4, generator(1), scale=3.0)
    found = levenberg_marquardt(PopulationObjective(mdp, behaviour), table, start)
    assert (found.loss < 1e-20).all()
    assert (regrets(mdp, table, found.theta) > 1e-3).all()
    assert regrets(mdp, table, found.theta).std() > 1e-3  # and the start decides where


@pytest.mark.parametrize(
    ("family", "route"), [cell for cell in CELLS if cell[0] in ("deterministic-dag", "frozen-lake")]
)
def test_uncovered_actions_leave_the_policy_open(family: str, route: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """X3: zero loss at a wrong policy."""
    monkeypatch.setattr(optimisers, "DENSE_LIMIT", route)
    mdp = make(family, **FAMILIES[family])
    check_wrong_at_zero_loss(mdp, with_holes(mdp, 0))


@routes
def test_a_mixture_of_deterministic_policies_leaves_the_policy_open(
    route: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """X1: ½(0,0) + ½(1,1) covers every pair, and yet its data say nothing about (0,1). Markov data of the same mass do."""
    monkeypatch.setattr(optimisers, "DENSE_LIMIT", route)
    mdp = make("one-state", horizon=2, actions=2)
    never = torch.tensor([[0.0, -math.inf]], dtype=torch.float64)
    always = never.flip(-1)
    replay = MixtureBehaviour((0.5, 0.5), ((never, never), (always, always)))
    mass = PopulationObjective(mdp, replay).pair_mass()
    assert mass.tolist() == [0.5] * 4
    check_wrong_at_zero_loss(mdp, replay)
    markov = PopulationObjective(mdp, BEHAVIOURS["uniform"].make(mdp, 0))
    assert markov.pair_mass().tolist() == pytest.approx([0.5] * 4)
    table = Tabular(mdp)
    found = levenberg_marquardt(markov, table, table.initial(4, generator()))
    assert (regrets(mdp, table, found.theta) < 1e-12).all()


# -- I14 -----------------------------------------------------------------------------------------------------------------


def independent_minimum(objective: SampleObjective) -> float:
    """The least mean square of y/β + log π_ref over additive functions, by NumPy's dense SVD from plain lists."""
    problem = plain(objective.mdp)
    trajectories = as_tuples(objective.trajectories.states, objective.trajectories.actions)
    pairs = {pair: i for i, pair in enumerate(sorted({(h, *p) for tau in trajectories for h, p in enumerate(tau)}))}
    design, target = np.zeros((len(trajectories), len(pairs))), np.zeros(len(trajectories))
    for row, (tau, y) in enumerate(zip(trajectories, objective.returns.tolist(), strict=True)):
        for h, pair in enumerate(tau):
            design[row, pairs[h, *pair]] = 1
        logs = math.fsum(math.log(problem.reference[h][s][a]) for h, (s, a) in enumerate(tau))
        target[row] = y / problem.beta + logs
    root = np.sqrt(objective.trajectory_weights.numpy())
    fit = np.linalg.lstsq(root[:, None] * design, root * target, rcond=1e-12)[0]
    return float(((root * (design @ fit - target)) ** 2).sum())


def noisy_samples(mdp: RegularizedMDP, weighted: bool) -> SampleObjective:
    batch = sample_trajectories(mdp, mdp.log_reference, 60, generator())
    exact = SampleObjective(mdp, batch)
    noise = torch.randn(60, generator=generator(1), dtype=torch.float64)
    weights = torch.rand(60, generator=generator(2), dtype=torch.float64) if weighted else torch.ones(60).double()
    return SampleObjective(mdp, batch, weights / weights.sum(), exact.returns + noise)


@routes
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("problem", ["merging", "short answers"])
def test_the_least_squares_plan_is_the_global_minimum_for_noisy_returns(
    problem: str, weighted: bool, route: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I14, C1: its loss is that of linear least squares, and every start of Levenberg-Marquardt ends there too."""
    monkeypatch.setattr(optimisers, "DENSE_LIMIT", route)
    mdp = random_problem("deterministic") if problem == "merging" else short_answers()
    objective = noisy_samples(mdp, weighted)
    assert problem == "merging" or not objective.trajectories.mask.all()
    expected = independent_minimum(objective)
    assert expected > 0.1
    plan = objective.loss(least_squares_plan(objective)).item()
    assert plan == pytest.approx(expected, rel=1e-12)
    table = Tabular(mdp)
    found = levenberg_marquardt(objective, table, table.initial(3, generator()))
    assert found.converged.all()
    assert found.loss.tolist() == pytest.approx([expected] * 3, rel=1e-12)


@pytest.mark.parametrize("family", ["chain", "deterministic-dag", "deterministic-tree", "one-state"])
def test_the_plan_of_exact_returns_is_optimal_on_data_that_cover_everything(family: str) -> None:
    mdp = make(family, horizon=4)
    objective = SampleObjective.enumerated(mdp, MarkovBehaviour(random_policy(mdp, 1)))
    plan = least_squares_plan(objective)
    assert objective.loss(plan).item() < 1e-24
    assert exact_regret(mdp, plan, solve(mdp)).item() < 1e-12
    once = SampleObjective(mdp, objective.trajectories)  # every trajectory once, all alike
    assert exact_regret(mdp, least_squares_plan(once), solve(mdp)).item() < 1e-12


def test_the_plan_believes_that_what_it_has_not_seen_is_worth_nothing() -> None:
    """Zero loss and a wrong policy; g = 0 on pairs without data, so logit = V(next) there."""
    mdp = make("deterministic-dag")
    holes = with_holes(mdp, 0)
    objective = SampleObjective.enumerated(mdp, holes)
    plan = least_squares_plan(objective)
    assert objective.loss(plan).item() < 1e-20
    assert exact_regret(mdp, plan, solve(mdp)).item() > 1e-3
    unseen = occupancy(mdp, holes.log_policy).state_action[-1] == 0
    assert unseen.any()
    assert not plan[-1][unseen].any()


def test_the_plan_of_a_sample_is_what_its_returns_say() -> None:
    """A bandit: the logit of an arm is the mean of its returns over β, plus log π_ref."""
    mdp = make("two-armed-bandit", advantage=1.0, beta=0.5)
    arms = torch.tensor([[0], [1], [1], [0]])
    batch = TrajectoryBatch(torch.zeros_like(arms), arms, torch.ones_like(arms, dtype=torch.bool))
    returns = torch.tensor([1.0, 2.0, 5.0, 2.0], dtype=torch.float64)
    (plan,) = least_squares_plan(SampleObjective(mdp, batch, observed_return=returns))
    expected = [1.5 / 0.5 + math.log(0.5), 3.5 / 0.5 + math.log(0.5)]
    assert plan[0].tolist() == pytest.approx(expected, rel=1e-13)


def test_the_plan_weighs_pairs_by_their_share_of_the_data() -> None:
    """What the data leave open: g_1 + g_2 = t on two trajectories, and of these the least E[g_1² + g_2²], by hand."""
    mdp = make("one-state", horizon=2, actions=2, beta=0.5)
    second = torch.tensor([0, 0, 0, 1])
    actions = torch.stack([torch.zeros_like(second), second], dim=-1)
    batch = TrajectoryBatch(torch.zeros_like(actions), actions, torch.ones_like(actions, dtype=torch.bool))
    returns = torch.tensor([1.0, 1.0, 1.0, 4.0], dtype=torch.float64)
    plan = least_squares_plan(SampleObjective(mdp, batch, observed_return=returns))
    often, rarely = (y / 0.5 + 2 * math.log(0.5) for y in (1.0, 4.0))
    first = (0.75 * often + 0.25 * rarely) / 2
    assert plan[1][0].tolist() == pytest.approx([often - first, rarely - first], rel=1e-12)


def test_the_plan_does_not_run_past_the_minimum() -> None:
    """Two returns, 0 and 1, make so simple a target that lsmr reaches the minimum in three steps; without a stop at rounding it
    went on from there, for three of these rates to a gradient of 0.05, and called it converged. By hand: E[y|τ] is additive, so what
    is left is Var(y|τ).
    """
    mdp = make("modular-arithmetic", modulus=3)
    uniform = SampleObjective.enumerated(mdp, BEHAVIOURS["uniform"].make(mdp, 0))
    twice = concatenate([uniform.trajectories, uniform.trajectories])
    truth, law = uniform.returns, uniform.trajectory_weights
    for wrong in torch.linspace(0, 0.6, 61, dtype=torch.float64):
        said = truth * (1 - wrong) + (1 - truth) * wrong
        weights, verdict = torch.cat([law * (1 - said), law * said]), torch.cat([0 * truth, 0 * truth + 1])
        objective = SampleObjective(mdp, twice, weights, verdict)
        least = (wrong * (1 - wrong) / mdp.beta.square()).item()
        assert objective.loss(least_squares_plan(objective)).item() == pytest.approx(least, rel=1e-12, abs=1e-24)


def test_a_plan_needs_deterministic_transitions() -> None:
    mdp = random_problem("dense")
    with pytest.raises(InvalidInputError, match=r"^mdp: expected deterministic transitions"):
        least_squares_plan(SampleObjective.enumerated(mdp, reference(mdp)))


# -- the algorithm -------------------------------------------------------------------------------------------------------


@routes
def test_a_seed_does_not_see_the_others(route: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone or in a batch, one of which is done before it begins: the same minimum. The starts are left as they were."""
    monkeypatch.setattr(optimisers, "DENSE_LIMIT", route)
    mdp = random_problem("deterministic")
    table = Tabular(mdp)
    objective = noisy_samples(mdp, weighted=True)
    start = table.initial(3, generator())
    start[0] = levenberg_marquardt(objective, table, start[:1]).theta
    before = start.clone()
    together = levenberg_marquardt(objective, table, start)
    assert torch.equal(start, before)
    for i in range(3):
        alone = levenberg_marquardt(objective, table, start[i : i + 1])
        torch.testing.assert_close(together.theta[i], alone.theta[0], rtol=1e-6, atol=1e-6)
    assert (together.theta[1] - together.theta[2]).abs().max() > 1e-3  # gauge and chance: no common place


@routes
def test_a_seed_that_stopped_stays_stopped(route: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch takes as many iterations as its slowest seed: one that is done is neither forgotten nor started again."""
    monkeypatch.setattr(optimisers, "DENSE_LIMIT", route)
    mdp = random_problem("dense", 1)
    table, batch = Tabular(mdp), sample_trajectories(mdp, mdp.log_reference, 60, generator(1))
    noise = torch.randn(60, generator=generator(1), dtype=torch.float64)
    objective = SampleObjective(mdp, batch, observed_return=SampleObjective(mdp, batch).returns + noise)
    start = table.initial(6, generator(1), scale=2.0)
    alone = [levenberg_marquardt(objective, table, seed.unsqueeze(0)).iterations for seed in start]
    assert len(set(alone)) > 1
    together = levenberg_marquardt(objective, table, start, iterations=max(alone) + 3)
    assert together.converged.all()
    assert together.iterations <= max(alone) + 2


def test_a_system_that_cannot_be_solved_is_no_convergence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is lost, the damping rises, and the next one is tried."""
    monkeypatch.setattr(optimisers, "DENSE_LIMIT", DENSE)
    factorise, calls = torch.linalg.cholesky_ex, []

    def fails_at_first(matrix: Tensor) -> Any:
        factor, info = factorise(matrix)
        calls.append(info)
        failed = len(calls) <= 2
        return (factor * math.nan if failed else factor), info + failed

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fails_at_first)
    mdp = random_problem("deterministic")
    table, behaviour = Tabular(mdp), MarkovBehaviour(random_policy(mdp, 1))
    found = levenberg_marquardt(PopulationObjective(mdp, behaviour), table, table.initial(2, generator()))
    assert len(calls) > 2
    assert (found.loss < 1e-20).all()


def test_every_iteration_lowers_the_loss_or_changes_nothing() -> None:
    """What is reported after each step is what has been reached: the loss belongs to the parameters, and never rises."""
    mdp = random_problem("dense")
    table, objective = Tabular(mdp), PopulationObjective(mdp, reference(mdp))
    seen: list[tuple[Tensor, Tensor]] = []

    def record(iteration: int, theta: Tensor, loss: Tensor) -> None:
        assert iteration == len(seen) + 1
        torch.testing.assert_close(objective.loss(table.logits(theta)), loss, rtol=1e-12, atol=1e-14)
        seen.append((theta, loss))

    found = levenberg_marquardt(objective, table, table.initial(4, generator(), scale=3.0), after_step=record)
    assert found.iterations == len(seen) >= 5
    for (theta, loss), (later_theta, later_loss) in pairwise(seen):
        assert (later_loss <= loss).all()
        same = later_loss == loss
        assert torch.equal(theta[same], later_theta[same])
    assert torch.equal(seen[-1][0], found.theta)
    assert torch.equal(seen[-1][1], found.loss)


def test_it_stops_when_told() -> None:
    mdp = random_problem("deterministic")
    table, objective = Tabular(mdp), PopulationObjective(mdp, reference(mdp))
    start = table.initial(2, generator())
    loss = objective.loss(table.logits(start))
    at_once = levenberg_marquardt(objective, table, start, tolerance=loss.max().item())
    assert (at_once.iterations, at_once.converged.tolist()) == (0, [True, True])
    assert torch.equal(at_once.theta, start)
    early = levenberg_marquardt(objective, table, start, iterations=1)
    assert (early.iterations, early.converged.tolist()) == (1, [False, False])
    coarse = levenberg_marquardt(objective, table, start, tolerance=1e-3)
    assert (coarse.loss <= 1e-3).all()
    assert coarse.iterations < levenberg_marquardt(objective, table, start).iterations


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1000.0])
@routes
def test_far_starts_are_no_harder(scale: float, route: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saturated policies, too: the coordinates of the steps have no softmax in them."""
    monkeypatch.setattr(optimisers, "DENSE_LIMIT", route)
    mdp = random_problem("deterministic")
    table = Tabular(mdp)
    found = levenberg_marquardt(
        PopulationObjective(mdp, MarkovBehaviour(random_policy(mdp, 1))),
        table,
        table.initial(3, generator(), scale=scale),
    )
    assert (found.loss < 1e-20).all()
    assert (regrets(mdp, table, found.theta) < 1e-12).all()


@routes
def test_nothing_is_moved_where_there_are_no_data(route: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least-squares problem says nothing about pairs without data, and a step moves no ``g`` there."""
    monkeypatch.setattr(optimisers, "DENSE_LIMIT", route)
    mdp = random_problem("deterministic")
    table = Tabular(mdp)
    objective = SampleObjective(mdp, sample_trajectories(mdp, mdp.log_reference, 1, generator()))
    start, ones = table.initial(2, generator()), torch.ones(2, dtype=torch.float64)
    _, gradient = optimisers._loss_and_gradient(objective, table, start)
    step = optimisers._damped_step(optimisers._Metric(objective, table), start, gradient, 1e-2 * ones, 1e-6 * ones)
    seen = objective.pair_mass()[table.free] > 0
    assert not seen.all()
    assert not step[:, ~seen].any()
    assert step[:, seen].all()


def test_starting_points_are_checked() -> None:
    mdp = random_problem("dense")
    table, objective = Tabular(mdp), PopulationObjective(mdp, reference(mdp))
    with pytest.raises(InvalidInputError, match=rf"^theta: expected shape \(seeds, {table.size}\)"):
        levenberg_marquardt(objective, table, torch.zeros(2, table.size + 1, dtype=torch.float64))
    start = table.initial(2, generator())
    start[1, 3] = math.nan
    with pytest.raises(InvalidInputError, match=r"^theta\[1\]\[3\]: expected a finite number"):
        levenberg_marquardt(objective, table, start)


def test_conjugate_gradients_solve_each_system_to_its_precision() -> None:
    root = torch.randn(3, 40, 40, generator=generator(), dtype=torch.float64)
    matrix = root @ root.mT + 10 * torch.eye(40)
    target = torch.randn(3, 40, generator=generator(1), dtype=torch.float64)
    target[1] = 0.0  # done before it begins
    precision = torch.tensor([1e-2, 1e-2, 1e-10], dtype=torch.float64)

    def multiply(x: Tensor) -> Tensor:
        return (matrix @ x.unsqueeze(-1)).squeeze(-1)

    x = conjugate_gradients(multiply, target, precision, most_products=100)
    assert torch.isfinite(x).all()
    assert not x[1].any()
    error = (multiply(x) - target).norm(dim=-1)
    assert (error <= 1.01 * precision * target.norm(dim=-1)).all()
    assert error[0] > 1e-8  # no more work than asked for
    exact = torch.linalg.solve(matrix[2], target[2])
    torch.testing.assert_close(x[2], exact, rtol=1e-6, atol=1e-7)
    rough = conjugate_gradients(multiply, target, precision, most_products=1)
    assert (multiply(rough) - target)[2].norm() > 1e-3
