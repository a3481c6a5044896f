"""I1-I11 on generated problems: the package against the enumeration of ``reference.py``, gradients against finite differences.

Each identity is also a claim with two sides of its own (``claims``); the last tests check all of them on the same problems,
extreme temperatures included.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, event, given, settings, target
from hypothesis import strategies as st
from torch import Tensor

from tbrm_theory import dynamic_programming as dp
from tbrm_theory import losses, population
from tbrm_theory.behaviours import HistoryBehaviour, MarkovBehaviour, MixtureBehaviour
from tbrm_theory.claims import CLAIMS
from tbrm_theory.claims.cases import case_of
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.occupancy import flatten_tables, moment_product
from tbrm_theory.scores import table_scores
from tbrm_theory.trajectories import TrajectoryBatch
from tbrm_theory.transitions import DeterministicTransition, SparseTransition
from tests import reference as rf
from tests import strategies
from tests.convert import plain

pytestmark = pytest.mark.slow

approx = pytest.approx
ALL_BETAS = strategies.ORDINARY_BETAS + strategies.EXTREME_BETAS
HALF_AS_MANY = settings(max_examples=settings().max_examples // 2)  # of the dearest tests
DETERMINISTIC = strategies.problems(kinds=("deterministic",))


def rows(mdp: RegularizedMDP, tables: tuple[Tensor, ...]) -> Any:
    """Tables as nested lists, in the shape that ``plain`` gives the problem."""
    return [mdp.rows(h, table) for h, table in enumerate(tables)]


def probabilities(mdp: RegularizedMDP, log_policy: tuple[Tensor, ...]) -> Any:
    return rows(mdp, tuple(log.exp() for log in log_policy))


def scores_on(mdp: RegularizedMDP, logits: tuple[Tensor, ...], taken: list[rf.Trajectory]) -> losses.TrajectoryScores:
    states, actions = (
        torch.tensor([[step[i] for step in trajectory] for trajectory in taken], dtype=torch.int64) for i in (0, 1)
    )
    batch = TrajectoryBatch(states, actions, torch.ones_like(states, dtype=torch.bool))
    return table_scores(dp.admissible_logits(mdp, logits), mdp.log_reference, mdp.reward, batch)


def tbrm(mdp: RegularizedMDP, logits: tuple[Tensor, ...], taken: list[rf.Trajectory]) -> list[float]:
    """``f_θ(τ)`` by the package's loss."""
    return losses.tbrm_residual(scores_on(mdp, logits, taken), beta=mdp.beta).tolist()


def softmax(mdp: RegularizedMDP, logits: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(dp.soft_policy(table) for table in dp.admissible_logits(mdp, logits))


# -- I1-I4 -----------------------------------------------------------------------------------------------------------


@given(st.data(), strategies.problems())
def test_i1_operator_is_monotone_and_lets_constants_pass(data: st.DataObject, mdp: RegularizedMDP) -> None:
    """Against the backup of the reference, entry by entry, for ``Q``, a larger ``Q`` and ``Q + c``."""
    q = dp.admissible_logits(mdp, data.draw(strategies.tables_of(mdp)))
    more = data.draw(strategies.tables_of(mdp, st.sampled_from([0.0, 0.5, 2.0])))
    c = data.draw(st.sampled_from([-3.0, 0.25, 10.0]))
    reference = plain(mdp)

    def by_hand(tables: tuple[Tensor, ...]) -> list[float]:
        values = rf.soft_value(reference, rows(mdp, tables))
        backed_up = rf.backup(reference, lambda h, s: values[h][s])
        return [entry for layer in backed_up for row in layer for entry in row]

    def by_package(tables: tuple[Tensor, ...]) -> list[float]:
        return [entry for layer in rows(mdp, dp.bellman_operator(mdp, tables)) for row in layer for entry in row]

    larger = tuple(table + extra for table, extra in zip(q, more, strict=True))
    assert by_package(q) == approx(by_hand(q), rel=1e-13, abs=1e-13)
    assert all(low <= high + 1e-12 for low, high in zip(by_package(q), by_hand(larger), strict=True))
    event(
        f"strictly larger somewhere: {any(low < high for low, high in zip(by_package(q), by_hand(larger), strict=True))}"
    )
    shifted = dp.bellman_operator(mdp, tuple(table + c for table in q))
    expected = rf.backup(reference, lambda h, s: rf.state_value(reference, rows(mdp, q), h, s) + c)
    for ours, theirs in zip(rows(mdp, shifted), expected, strict=True):
        for ours_row, theirs_row in zip(ours, theirs, strict=True):
            assert ours_row == approx(theirs_row, rel=1e-13, abs=1e-12)


@given(DETERMINISTIC)
def test_i2_gibbs_form_of_value_and_policy(mdp: RegularizedMDP) -> None:
    solution, reference = dp.solve(mdp), plain(mdp)
    for h, value in enumerate(solution.v):
        assert value.tolist() == approx([rf.gibbs_value(reference, h, s) for s in range(len(value))], abs=1e-11)
    law, weights = rf.trajectory_law(reference, probabilities(mdp, solution.log_policy)), {}
    event(f"trajectories: {min(len(law), 20)}")
    for tau in rf.trajectories(reference):
        reward = math.fsum(rf.soft_reward(reference, h, s, a) for h, (s, a) in enumerate(tau))
        start = tau[0][0]
        weights[tau] = reference.initial[start] * math.exp(reward - rf.gibbs_value(reference, 0, start))
    assert {tau: law.get(tau, 0.0) for tau in weights} == approx(weights, rel=1e-10, abs=1e-300)


@given(st.data(), strategies.problems())
def test_i3_regret_is_the_difference_and_the_divergence_of_laws(data: st.DataObject, mdp: RegularizedMDP) -> None:
    log_policy = data.draw(strategies.log_policies(mdp))
    reference, policy = plain(mdp), probabilities(mdp, log_policy)
    regret = dp.regret(mdp, log_policy).item()
    target(regret, label="regret")
    left_out = [bool((log[valid] == -math.inf).any()) for log, valid in zip(log_policy, mdp.valid, strict=True)]
    event(f"an action of probability 0: {any(left_out)}")
    size = mdp.beta.item() + sum(table.abs().max().item() for table in mdp.reward)
    assert regret == approx(rf.regret(reference, policy), rel=1e-12, abs=1e-12 * size)
    star = rf.trajectory_law(reference, rf.optimal_policy(reference))
    divergence = rf.kl_trajectories(rf.trajectory_law(reference, policy), star)
    assert regret == approx(reference.beta * divergence, rel=1e-11, abs=1e-12 * size)
    assert dp.regret_by_subtraction(mdp, log_policy).item() == approx(regret, abs=1e-12 * size)


@given(st.data(), strategies.problems())
def test_i4_performance_difference_for_any_reference_function(data: st.DataObject, mdp: RegularizedMDP) -> None:
    dagger, policy = (data.draw(strategies.log_policies(mdp)) for _ in range(2))
    f = data.draw(strategies.tables_of(mdp))
    difference = (dp.objective(mdp, dagger) - dp.objective(mdp, policy)).item()
    event(f"a difference: {abs(difference) > 1e-3}")
    tables = probabilities(mdp, dagger), probabilities(mdp, policy)
    size = mdp.horizon * mdp.beta.item() * 10 + sum(table.abs().max().item() for table in mdp.reward)
    assert difference == approx(rf.performance_difference(plain(mdp), rows(mdp, f), *tables), abs=1e-12 * size)
    q = rows(mdp, dp.evaluate(mdp, policy).q)
    finite = [[[max(entry, -1e300) for entry in row] for row in layer] for layer in q]
    assert difference == approx(rf.performance_difference(plain(mdp), finite, *tables), abs=1e-11 * size)


# -- I5-I8 -----------------------------------------------------------------------------------------------------------


@given(st.data(), strategies.problems(betas=ALL_BETAS))
def test_i5_every_form_of_the_residual_is_its_definition(data: st.DataObject, mdp: RegularizedMDP) -> None:
    logits = data.draw(strategies.tables_of(mdp))
    reference, table = plain(mdp), rows(mdp, logits)
    taken = list(rf.trajectories(reference))
    expected = [rf.residual(reference, table, tau) for tau in taken]
    size = 50 + mdp.horizon * max((r / mdp.beta).abs().max().item() for r in mdp.reward)
    target(float(len(taken)), label="trajectories")
    scores = scores_on(mdp, logits, taken)
    assert losses.tbrm_residual(scores, beta=mdp.beta).tolist() == approx(expected, abs=1e-14 * size)
    assert losses.first_logit_residual(scores, beta=mdp.beta).tolist() == approx(expected, abs=1e-14 * size)
    steps = losses.brm_residual(scores, beta=mdp.beta)
    assert steps.sum(-1).tolist() == approx(expected, abs=1e-14 * size)
    for found, tau in zip(steps.tolist(), taken, strict=True):
        assert found == approx(rf.step_residuals(reference, table, tau), abs=1e-14 * size)
    terms = rows(mdp, population.residual_terms(mdp, logits))
    assert [rf.table_sum(terms, tau) for tau in taken] == approx(expected, abs=1e-14 * size)


@given(st.data(), DETERMINISTIC)
def test_i6_residual_is_a_log_ratio_to_the_optimum(data: st.DataObject, mdp: RegularizedMDP) -> None:
    logits, log_mu = data.draw(strategies.tables_of(mdp)), data.draw(strategies.log_policies(mdp, holes=False))
    reference, table = plain(mdp), rows(mdp, logits)
    theta, star = rf.softmax_policy(reference, table), rf.optimal_policy(reference)
    taken = list(rf.trajectories(reference))

    def log_ratio(tau: rf.Trajectory) -> float:
        return math.log(rf.action_probability(theta, tau) / rf.action_probability(star, tau))

    def offset(tau: rf.Trajectory) -> float:
        start = tau[0][0]
        return rf.state_value(reference, table, 0, start) - rf.optimal_value(reference, 0, start)

    residuals = tbrm(mdp, logits, taken)
    assert residuals == approx([offset(tau) + log_ratio(tau) for tau in taken], abs=1e-10)
    moments = population.additive_moments(mdp, population.residual_terms(mdp, logits), log_mu)
    law = rf.trajectory_law(reference, probabilities(mdp, log_mu))
    for s, mass in enumerate(reference.initial):
        if mass > 0:
            given_s = {tau: p / mass for tau, p in law.items() if tau[0][0] == s}
            mean = rf.expectation(given_s, log_ratio)
            spread = rf.expectation(given_s, lambda tau, mean=mean: (log_ratio(tau) - mean) ** 2)  # type: ignore[misc]
            assert moments.variance[s].item() == approx(spread, rel=1e-9, abs=1e-10)


@given(DETERMINISTIC)
def test_i7_the_optimum_has_no_residual_when_nothing_is_random(mdp: RegularizedMDP) -> None:
    solution, taken = dp.solve(mdp), list(rf.trajectories(plain(mdp)))
    residuals = tbrm(mdp, solution.q, taken)
    assert residuals == approx([0.0] * len(taken), abs=1e-13 * (1 + solution.scale.item()))
    everything_else = tuple(torch.where(valid, q, 0.0) + 1.0 for valid, q in zip(mdp.valid, solution.q, strict=True))
    assert tbrm(mdp, everything_else, taken) == approx([1.0] * len(taken), abs=1e-12 * (1 + solution.scale.item()))


@given(st.data(), strategies.problems(kinds=("sparse", "dense"), min_horizon=2))
def test_i7_the_loss_of_the_optimum_is_the_noise_whoever_acts(data: st.DataObject, mdp: RegularizedMDP) -> None:
    first, second = (data.draw(strategies.log_policies(mdp)) for _ in range(2))
    reference, solution = plain(mdp), dp.solve(mdp)
    policies = [probabilities(mdp, log) for log in (first, second)]

    def repeats(history: rf.Trajectory, s: int) -> list[float]:
        """Half the time the action of the step before, if there is such an action here."""
        fresh, exists = policies[0][len(history)][s], reference.reference[len(history)][s]
        if not history or history[-1][1] >= len(exists) or exists[history[-1][1]] == 0:
            return list(fresh)
        return [0.5 * p + 0.5 * (a == history[-1][1]) for a, p in enumerate(fresh)]

    size = (1 + solution.scale.item()) ** 2
    for behaviour, law in (
        (MarkovBehaviour(first), rf.trajectory_law(reference, policies[0])),
        (
            MixtureBehaviour((0.25, 0.75), (first, second)),
            rf.mixture_law(reference, [(0.25, policies[0]), (0.75, policies[1])]),
        ),
        (HistoryBehaviour(first, repeat=0.5), rf.history_law(reference, repeats)),
    ):
        floor = rf.noise_floor(reference, law)
        event(f"floor is positive: {floor > 1e-9}")
        target(floor, label=f"noise floor of {type(behaviour).__name__}")
        assert population.population_loss(mdp, solution.q, behaviour).item() == approx(floor, abs=1e-13 * size)
        assert population.noise_floor(mdp, behaviour).item() == approx(floor, abs=1e-13 * size)
        assert rf.tbrm_loss(
            reference, rows(mdp, tuple(torch.where(v, q, 0.0) for v, q in zip(mdp.valid, solution.q, strict=True))), law
        ) == approx(floor, abs=1e-12 * size)


def gamble() -> RegularizedMDP:
    """A safe action and a gamble: the value of what follows is 0 or 2, β = 1."""
    return RegularizedMDP(
        beta=1.0,
        initial=torch.ones(1),
        reward=[torch.zeros(1, 2), torch.tensor([[0.0], [2.0]])],
        reference=[torch.full((1, 2), 0.5), torch.ones(2, 1)],
        transitions=[SparseTransition(torch.tensor([[[0, 1], [0, 1]]]), torch.tensor([[[1.0, 0.0], [0.5, 0.5]]]), 2)],
    )


def test_i7_noise_floor_and_its_pull_away_from_the_optimum_by_hand() -> None:
    """Var = 1 for the gamble, so L(θ*) = μ(gamble).

    The noise is only known after the last choice, so θ* is stationary here (b = 0 wherever there is a choice, I7.e).
    """
    mdp = gamble()
    log_mu = (torch.tensor([[0.25, 0.75]], dtype=torch.float64).log(), torch.zeros(2, 1, dtype=torch.float64))
    solution = dp.solve(mdp)
    assert population.noise_floor(mdp, log_mu).item() == approx(0.75)
    logits = tuple(table.clone().requires_grad_() for table in solution.q)
    loss = population.population_loss(mdp, logits, log_mu)
    assert loss.item() == approx(0.75)
    for gradient in torch.autograd.grad(loss, logits):
        assert gradient.abs().max().item() == approx(0.0, abs=1e-15)


def test_i7_the_optimum_is_no_minimiser_of_noisy_data_unless_they_are_its_own() -> None:
    """I7.e by hand: a coin worth ±1 decides the state, then one of two actions of rewards 1 and 0 is taken, β = 1.

    ``b`` is E V* - V*(s) = ∓1 for the good and the bad state, so ∂L/∂logit(s,a) = 2·½·b(s)·(μ - π*)(a|s).
    """
    good = torch.tensor([[1.0, 0.0], [-1.0, -2.0]])
    mdp = RegularizedMDP(
        beta=1.0,
        initial=torch.ones(1),
        reward=[torch.zeros(1, 1), good],
        reference=[torch.ones(1, 1), torch.full((2, 2), 0.5)],
        transitions=[SparseTransition(torch.tensor([[[0, 1]]]), torch.tensor([[[0.5, 0.5]]]), 2)],
    )
    solution, uniform = dp.solve(mdp), torch.full((2, 2), 0.5, dtype=torch.float64)
    logits = tuple(table.clone().requires_grad_() for table in solution.q)
    star = math.e / (1 + math.e)
    for log_mu, expected in (
        (uniform.log(), [[star - 0.5, 0.5 - star], [0.5 - star, star - 0.5]]),
        (solution.log_policy[1], [[0.0, 0.0], [0.0, 0.0]]),
    ):
        loss = population.population_loss(mdp, logits, (torch.zeros(1, 1, dtype=torch.float64), log_mu))
        assert loss.item() == approx(1.0)
        first, second = torch.autograd.grad(loss, logits)
        assert first.item() == approx(0.0, abs=1e-15)
        for found, row in zip(second.tolist(), expected, strict=True):
            assert found == approx(row, abs=1e-15)


@given(st.data(), strategies.problems(min_horizon=2))
def test_i8_what_tbrm_does_not_see_and_brm_does(data: st.DataObject, mdp: RegularizedMDP) -> None:
    """A random gauge c: f_θ moves by c(s_1) and no more; BRM by at least E Σ (c - c')² one way or the other."""
    logits, log_mu = data.draw(strategies.tables_of(mdp)), data.draw(strategies.log_policies(mdp))
    c = [
        torch.tensor(data.draw(st.lists(st.floats(0.5, 2), min_size=len(t), max_size=len(t))), dtype=torch.float64)
        for t in mdp.reward
    ]
    reference, law = plain(mdp), rf.trajectory_law(plain(mdp), probabilities(mdp, log_mu))
    taken = list(rf.trajectories(reference))
    before = [rf.residual(reference, rows(mdp, logits), tau) for tau in taken]
    for name, moved in (("first", [c[0], *[0 * x for x in c[1:]]]), ("later", [0 * c[0], *c[1:]])):

        def shifted(sign: float, moved: list[Tensor] = moved) -> tuple[Tensor, ...]:
            return tuple(table + sign * x.unsqueeze(-1) for table, x in zip(logits, moved, strict=True))

        shift = [moved[0][tau[0][0]].item() for tau in taken]
        assert tbrm(mdp, shifted(1.0), taken) == approx([x + y for x, y in zip(before, shift, strict=True)], abs=1e-12)

        def brm(tables: tuple[Tensor, ...]) -> float:
            found = population.population_loss(mdp, tables, log_mu, loss="brm").item()
            assert found == approx(rf.brm_loss(reference, rows(mdp, tables), law), rel=1e-12)
            return found

        def curvature(tau: rf.Trajectory, moved: list[Tensor] = moved) -> float:
            along = [moved[h][s].item() for h, (s, _) in enumerate(tau)] + [0.0]
            return math.fsum((here - after) ** 2 for here, after in pairwise(along))

        base, least = brm(logits), rf.expectation(law, curvature)
        changes = [brm(shifted(sign)) - base for sign in (1.0, -1.0)]
        assert least > 0.2  # the last step, or the first, moves by c ≥ ½
        assert sum(changes) == approx(2 * least, rel=1e-9, abs=1e-9 * base)
        assert max(map(abs, changes)) >= least * (1 - 1e-9)
        event(f"gauge of {name} layers")


# -- I9 --------------------------------------------------------------------------------------------------------------


@HALF_AS_MANY
@given(st.data(), strategies.problems(max_horizon=2))
def test_i9_on_policy_gradient_by_autograd_and_by_finite_differences(data: st.DataObject, mdp: RegularizedMDP) -> None:
    """``∇½E f² = -(1/β)∇J + E[f ∇V_θ(s_1)]``, the law of τ held fixed: both sides, each by both ways."""
    logits = tuple(table.requires_grad_() for table in data.draw(strategies.tables_of(mdp)))
    reference, table = plain(mdp), rows(mdp, tuple(logit.detach() for logit in logits))
    law = rf.trajectory_law(reference, rf.softmax_policy(reference, table))
    taken = list(law)
    weights = torch.tensor([law[tau] for tau in taken], dtype=torch.float64)

    def gradient(value: Tensor) -> list[list[list[float]]]:
        found = torch.autograd.grad(value, logits, allow_unused=True, materialize_grads=True)
        return rows(mdp, tuple(torch.where(valid, x, 0.0) for valid, x in zip(mdp.valid, found, strict=True)))

    scores = scores_on(mdp, logits, taken)
    f = losses.tbrm_residual(scores, beta=mdp.beta)
    left = gradient(0.5 * (weights * f.square()).sum())
    policy = softmax(mdp, logits)
    surrogate = (weights * f.detach() * scores_on(mdp, logits, taken).initial_value).sum()
    right = gradient(surrogate - dp.objective(mdp, policy) / mdp.beta)

    fixed_law = rf.finite_difference(lambda x: 0.5 * rf.tbrm_loss(reference, x, law), table)
    slope = rf.finite_difference(lambda x: rf.objective(reference, rf.softmax_policy(reference, x)), table)
    of_values = rf.finite_difference(
        lambda x: rf.expectation(
            law, lambda tau: rf.residual(reference, table, tau) * rf.state_value(reference, x, 0, tau[0][0])
        ),
        table,
    )
    pieces = rf.tabulate(table, lambda h, s, a: of_values[h][s][a] - slope[h][s][a] / reference.beta)
    size = 1 + max(abs(x) for x in f.tolist())
    target(max(abs(entry) for layer in left for row in layer for entry in row) / size, label="gradient")
    for ours, theirs, tolerance in (
        (left, right, 1e-12 * size),
        (left, fixed_law, 1e-7 * size),
        (right, pieces, 1e-7 * size),
    ):
        for ours_layer, theirs_layer in zip(ours, theirs, strict=True):
            for ours_row, theirs_row in zip(ours_layer, theirs_layer, strict=True):
                assert ours_row == approx(theirs_row, abs=tolerance)


def test_i9_the_law_must_be_held_fixed() -> None:
    """The interesting case: with the law free the gradient of ½E f² is another one, and here they differ by much."""
    mdp = gamble()
    logits = tuple(
        torch.tensor(layer, dtype=torch.float64, requires_grad=True) for layer in ([[1.0, 0.0]], [[3.0], [-3.0]])
    )
    taken = list(rf.trajectories(plain(mdp)))
    f = losses.tbrm_residual(scores_on(mdp, logits, taken), beta=mdp.beta)
    policy = softmax(mdp, logits)
    choice = torch.tensor([tau[0][1] for tau in taken])
    dynamics = torch.tensor([rf.trajectories(plain(mdp))[tau] for tau in taken], dtype=torch.float64)
    law = dynamics * policy[0][0, choice].exp()
    fixed, free = (
        torch.autograd.grad(0.5 * (weights * f.square()).sum(), logits[0], retain_graph=True)[0]
        for weights in (law.detach(), law)
    )
    assert (fixed - free).abs().max().item() > 0.05


# -- I10-I11 ---------------------------------------------------------------------------------------------------------


@given(st.data(), strategies.problems())
def test_i10_pairs_of_responses_do_not_see_the_value(data: st.DataObject, mdp: RegularizedMDP) -> None:
    logits, c = data.draw(strategies.tables_of(mdp)), data.draw(st.sampled_from([0.5, -3.0]))
    reference = plain(mdp)
    policy = rf.softmax_policy(reference, rows(mdp, logits))
    taken = list(rf.trajectories(reference))
    first_of: dict[int, int] = {}
    partner = [first_of.setdefault(tau[0][0], i) for i, tau in enumerate(taken)]
    event(f"pairs: {min(len(taken) - len(first_of), 5)}")

    def g(tau: rf.Trajectory) -> float:
        ratio = rf.action_probability(policy, tau) / rf.action_probability(reference.reference, tau)
        return math.log(ratio) - rf.table_sum(reference.reward, tau) / reference.beta

    expected = [g(tau) - g(taken[other]) for tau, other in zip(taken, partner, strict=True)]
    for tables in (logits, (logits[0] + c, *logits[1:])):
        f = tbrm(mdp, tables, taken)
        assert [x - f[other] for x, other in zip(f, partner, strict=True)] == approx(expected, abs=1e-11)


@given(st.data(), strategies.problems())
def test_i11_martingale_split_three_ways(data: st.DataObject, mdp: RegularizedMDP) -> None:
    f, log_mu = data.draw(strategies.tables_of(mdp)), data.draw(strategies.log_policies(mdp, holes=False))
    f = tuple(torch.where(valid, table, 0.0) for valid, table in zip(mdp.valid, f, strict=True))
    reference, policy = plain(mdp), probabilities(mdp, log_mu)
    assume(
        all(mass > 0 for layer in rf.occupancy_state(reference, rf.trajectory_law(reference, policy)) for mass in layer)
    )
    left, split = rf.martingale_split(reference, rows(mdp, f), policy)
    event(f"stochastic: {not mdp.is_deterministic}")
    size = (1 + sum(table.abs().max().item() for table in f)) ** 2
    assert split == approx(left, abs=1e-13 * size)
    moments = population.additive_moments(mdp, f, log_mu)
    assert (mdp.initial * (moments.mean.square() + moments.variance)).sum().item() == approx(left, abs=1e-13 * size)
    product = flatten_tables(moment_product(mdp, log_mu, f))
    assert (flatten_tables(f) @ product).item() == approx(left, abs=1e-13 * size)
    logits = data.draw(strategies.tables_of(mdp))
    loss = population.population_loss(mdp, logits, log_mu).item()
    law = rf.trajectory_law(reference, policy)
    assert loss == approx(rf.tbrm_loss(reference, rows(mdp, logits), law), rel=1e-11, abs=1e-11)


def test_i11_fails_for_a_mixture() -> None:
    """X1: one state per layer, μ = ½(0,0) + ½(1,1). Σf = 0 on all data, while the split of its Markov marginals is not."""
    mdp = RegularizedMDP(
        beta=1.0,
        initial=torch.ones(1),
        reward=[torch.zeros(1, 2)] * 2,
        reference=[torch.full((1, 2), 0.5)] * 2,
        transitions=[DeterministicTransition(torch.zeros(1, 2, dtype=torch.int64), 1)],
    )
    f = [[[1.0, -1.0]], [[-1.0, 1.0]]]
    parts = [(0.5, [[[1.0, 0.0]]] * 2), (0.5, [[[0.0, 1.0]]] * 2)]
    law = rf.mixture_law(plain(mdp), parts)
    assert rf.expectation(law, lambda tau: rf.table_sum(f, tau) ** 2) == 0
    tables = tuple(torch.tensor(layer, dtype=torch.float64) for layer in f)
    moments = population.additive_moments(mdp, tables, mdp.log_reference)  # the policy with the mixture's occupancies
    assert (moments.mean.square() + moments.variance).item() == approx(2.0)


# -- the claims themselves -------------------------------------------------------------------------------------------


@HALF_AS_MANY
@given(strategies.problems(betas=ALL_BETAS), st.integers(0, 1000))
def test_every_claim_holds_on_every_problem_it_admits(mdp: RegularizedMDP, seed: int) -> None:
    """Rounding bounds included, at every temperature: an error beyond one would be a violation."""
    case = case_of(mdp, "generated", seed)
    for claim in CLAIMS.values():
        if claim.problem is not None:  # about problems of its own
            continue
        refused = claim.requires(case)
        event(f"{claim.id} {'refused' if refused else 'checked'}")
        if refused is None:
            comparison = claim.check(case)
            assert comparison.holds, (claim.id, comparison.error, comparison.bound)
