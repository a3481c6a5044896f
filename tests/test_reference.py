"""The brute-force reference against numbers worked out by hand, so that it never certifies itself.

Every expected value below is arithmetic on paper, shown where it is not obvious, or a number of theory.md.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest

from tests import reference as rf
from tests.reference import PlainMDP

approx, log = pytest.approx, math.log
exact: Any = Fraction  # tables are declared as floats; these exact entries flow through the same products
THIRD, HALF, QUARTER = exact(1, 3), exact(1, 2), exact(1, 4)


# --- Problems -----------------------------------------------------------------------------------------------


def bandit(reward: list[float]) -> PlainMDP:
    """One state, β = 1, uniform reference."""
    return PlainMDP(1.0, [1.0], [[reward]], [[[1 / len(reward)] * len(reward)]], [])


def corridor(horizon: int) -> PlainMDP:
    """One state and two actions in every layer, no reward."""
    return PlainMDP(
        1.0, [1], [[[0.0, 0.0]]] * horizon, [[[HALF, HALF]]] * horizon, [[[{0: 1}, {0: 1}]]] * (horizon - 1)
    )


def two_steps() -> PlainMDP:
    """β = 2; action 0 leads to A (two actions), action 1 to B (one action; B's second one does not exist).

    exp R_β is (1/2, 3/2) in layer 0, (1, 3/4) in A and 2 in B. The third state is unreachable.
    """
    return PlainMDP(
        beta=2.0,
        initial=[1.0],
        reward=[[[0.0, 2 * log(3)]], [[2 * log(4), 0.0], [2 * log(2), 99.0], [0.0, 0.0]]],
        reference=[[[0.5, 0.5]], [[0.25, 0.75], [1.0, 0.0], [0.0, 1.0]]],
        successors=[[[{0: 1.0}, {1: 1.0}]]],
    )


TAKE_A0 = [[[0.5, 0.5]], [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]]
THETA = [[[log(2), log(2)]], [[0.0, log(3)], [0.0, 55.0], [8.0, 0.0]]]
A0, A1, B0 = ((0, 0), (0, 0)), ((0, 0), (0, 1)), ((0, 1), (1, 0))


def gamble() -> PlainMDP:
    """Noise in two layers: V* of layer 1 is (1, 5), and of layer 2 is (0, 2); only layer 0 has a choice.

    State x = 0 of layer 1 flips a fair coin, state y = 1 always goes to the better end.
    """
    return PlainMDP(
        beta=1.0,
        initial=[1.0],
        reward=[[[0.0, 0.0]], [[0.0], [3.0]], [[0.0], [2.0]]],
        reference=[[[0.5, 0.5]], [[1.0], [1.0]], [[1.0], [1.0]]],
        successors=[[[{0: 0.75, 1: 0.25}, {0: 0.5, 1: 0.5}]], [[{0: 0.5, 1: 0.5}], [{0: 0.0, 1: 1.0}]]],
    )


def coin(gap: float) -> PlainMDP:
    """C3: a fair coin picks the state of layer 1 whatever the action."""
    fair = {0: 0.5, 1: 0.5}
    reward = [[[0.0, 0.0]], [[-gap, -gap - 0.25], [gap, gap]]]
    return PlainMDP(1.0, [1.0], reward, [[[0.5, 0.5]], [[0.5, 0.5]] * 2], [[[fair, fair]]])


def short_and_long() -> PlainMDP:
    """Responses `stop`, `go right` and `go wrong`, with exp(r/β) = 1, 4 and 1; after `stop` only padding."""
    return PlainMDP(
        beta=0.5,
        initial=[1],
        reward=[[[0.0, 0.0]], [[0.5 * log(4), 0.0], [0.0]]],
        reference=[[[exact(3, 4), QUARTER]], [[exact(2, 3), THIRD], [1]]],
        successors=[[[{0: 1}, {1: 1}]]],
    )


def lock(horizon: int) -> PlainMDP:
    """X4: state 0 is still right, state 1 wrong for ever; action 0 is the right one."""
    start, later = [[{0: 1.0}, {1: 1.0}]], [[{0: 1.0}, {1: 1.0}], [{1: 1.0}, {1: 1.0}]]
    return PlainMDP(
        beta=1.0,
        initial=[1],
        reward=[[[0.0, 0.0]] * (1 if h == 0 else 2) for h in range(horizon)],
        reference=[[[HALF, HALF]] * (1 if h == 0 else 2) for h in range(horizon)],
        successors=[start if h == 0 else later for h in range(horizon - 1)],
    )


# --- Trajectories and laws ----------------------------------------------------------------------------------


def test_trajectories_are_the_feasible_ones_with_their_dynamics_probability() -> None:
    assert rf.trajectories(two_steps()) == {A0: 1.0, A1: 1.0, B0: 1.0}
    x, y = (0, 0), (1, 0)
    assert rf.trajectories(gamble()) == {
        ((0, 0), x, (0, 0)): 0.375,
        ((0, 0), x, (1, 0)): 0.375,
        ((0, 0), y, (1, 0)): 0.25,
        ((0, 1), x, (0, 0)): 0.25,
        ((0, 1), x, (1, 0)): 0.25,
        ((0, 1), y, (1, 0)): 0.5,
    }


def test_starting_states_of_probability_zero_start_nothing() -> None:
    mdp = PlainMDP(1.0, [0.25, 0.0, 0.75], [[[0.0]] * 3], [[[1.0]] * 3], [])
    assert rf.trajectories(mdp) == {((0, 0),): 0.25, ((2, 0),): 0.75}


def test_policy_law_and_probability() -> None:
    mdp, policy = two_steps(), [[[0.2, 0.8]], [[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]]
    assert rf.trajectory_law(mdp, policy) == approx({A0: 0.1, A1: 0.1, B0: 0.8})
    assert rf.policy_probability(mdp, policy, A1) == approx(0.1)
    assert rf.policy_probability(mdp, policy, ((0, 1), (0, 0))) == 0
    assert A1 not in rf.trajectory_law(mdp, TAKE_A0)
    noisy = [[[0.2, 0.8]], [[1.0]] * 2, [[1.0]] * 2]
    assert rf.policy_probability(gamble(), noisy, ((0, 1), (0, 0), (1, 0))) == approx(0.8 * 0.5 * 0.5)


def test_mixture_is_drawn_once_per_episode() -> None:
    mdp, same = corridor(2), [(HALF, [[[1, 0]]] * 2), (HALF, [[[0, 1]]] * 2), (0, [[[HALF, HALF]]] * 2)]
    assert rf.mixture_law(mdp, same) == {((0, 0), (0, 0)): HALF, ((0, 1), (0, 1)): HALF}


def test_history_law_sees_the_history() -> None:
    def repeat_the_first_action(history: rf.Trajectory, s: int) -> list[float]:
        return [0.25, 0.75] if not history else [float(history[0][1] == a) for a in (0, 1)]

    law = rf.history_law(corridor(3), repeat_the_first_action)
    assert law == {((0, 0),) * 3: 0.25, ((0, 1),) * 3: 0.75}


def test_occupancies_of_a_non_markov_law() -> None:
    law: rf.Law = {
        ((0, 0), (0, 0), (0, 0)): 0.5,
        ((0, 1), (1, 0), (1, 0)): 0.3,
        ((0, 1), (0, 0), (1, 0)): 0.2,
    }
    mdp = gamble()
    assert rf.occupancy_state(mdp, law) == [[1.0], approx([0.7, 0.3]), approx([0.5, 0.5])]
    assert rf.occupancy_state_action(mdp, law)[0] == [approx([0.5, 0.5])]
    assert rf.occupancy_state_action(mdp, law)[1] == [[approx(0.7)], [approx(0.3)]]


# --- Objective and optimum ----------------------------------------------------------------------------------


def test_two_step_optimum_by_hand() -> None:
    """V*(A) = log 7/4, V*(B) = log 2, V* = log(1/2·7/4 + 3/2·2) = log 31/8."""
    mdp = two_steps()
    values = [[log(31 / 8)], [log(7 / 4), log(2), 0.0]]
    assert rf.optimal_values(mdp) == [approx(row) for row in values]
    assert [[rf.gibbs_value(mdp, h, s) for s in range(len(row))] for h, row in enumerate(values)] == [
        approx(row) for row in values
    ]
    q_star, policy = rf.optimal_q(mdp), rf.optimal_policy(mdp)
    assert q_star[0][0] == approx([log(7 / 8), log(3)])
    assert q_star[1][1] == [approx(log(2)), -math.inf]
    assert policy[0][0] == approx([7 / 31, 24 / 31])
    assert policy[1] == [approx([4 / 7, 3 / 7]), [1.0, 0.0], [0.0, 1.0]]
    assert rf.objective(mdp, policy) == approx(2 * log(31 / 8))


def test_two_step_objective_regret_and_kl_by_hand() -> None:
    """E r = (1/2)·2 log 4 + (1/2)(2 log 3 + 2 log 2) = log 24; KL to the reference = (1/2) log 4; β = 2."""
    mdp = two_steps()
    assert rf.kl_to_reference(mdp, TAKE_A0) == approx(log(2))
    assert rf.objective(mdp, TAKE_A0) == approx(log(24) - 2 * log(2))
    assert rf.regret(mdp, TAKE_A0) == approx(2 * log(31 / 8) - log(6))
    law, law_optimal = rf.trajectory_law(mdp, TAKE_A0), rf.trajectory_law(mdp, rf.optimal_policy(mdp))
    # P_{π*} = (4, 3, 24)/31 on (A0, A1, B0), P_π = (1/2, 0, 1/2).
    assert rf.kl_trajectories(law, law_optimal) == approx(0.5 * log(31 / 8) + 0.5 * log(31 / 48))
    assert rf.kl_trajectories(law_optimal, law) == math.inf
    assert rf.kl_trajectories({A0: 1.0, A1: 0.0}, {A0: 0.5, B0: 0.5}) == approx(log(2))  # 0 log 0 = 0


def test_two_step_policy_values_by_hand() -> None:
    """After action 0: R_β(A,0) − log 1 = 0. After action 1: log 2."""
    q = rf.policy_q(two_steps(), TAKE_A0)
    assert q[0][0] == approx([-log(2), log(3)])
    assert q[1] == [approx([0.0, log(3 / 4)], abs=1e-15), [approx(log(2)), -math.inf], [-math.inf, 0.0]]


def test_policy_values_after_a_coin_by_hand() -> None:
    mdp, policy = coin(1.5), [[[0.3, 0.7]], [[0.25, 0.75], [0.5, 0.5]]]
    entropy = 0.25 * log(4) + 0.75 * log(4 / 3)
    value = 0.5 * (-1.5 - 0.75 * 0.25 - log(2) + entropy) + 0.5 * 1.5
    assert rf.policy_q(mdp, policy)[0][0] == approx([value - log(2)] * 2)
    kl = 0.3 * log(0.6) + 0.7 * log(1.4) + 0.5 * (log(2) - entropy)
    assert rf.objective(mdp, policy) == approx(-0.5 * 0.75 * 0.25 - kl)


def test_missing_actions_cost_everything_where_they_are_reached() -> None:
    mdp = two_steps()
    reached = [[[0.5, 0.5]], [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]]
    avoided = [[[1.0, 0.0]], [[1.0, 0.0], [0.5, 0.5], [0.5, 0.5]]]
    assert rf.objective(mdp, reached) == -math.inf
    assert rf.kl_to_reference(mdp, reached) == rf.regret(mdp, reached) == math.inf
    assert rf.policy_q(mdp, reached)[0][0] == [approx(-log(2)), -math.inf]
    assert rf.objective(mdp, avoided) == approx(2 * log(4) - 2 * (log(2) + log(4)))
    never_started = PlainMDP(1.0, [1.0, 0.0], [[[3.0, 0.0]] * 2], [[[1.0, 0.0]] * 2], [])
    assert rf.objective(never_started, [[[1.0, 0.0], [0.0, 1.0]]]) == 3.0


def test_the_gibbs_form_refuses_chance() -> None:
    with pytest.raises(ValueError, match="deterministic"):
        rf.gibbs_value(gamble(), 0, 0)


def test_values_survive_large_rewards() -> None:
    mdp = PlainMDP(0.002, [1.0], [[[2.0, 2.0]]], [[[0.5, 0.5]]], [])
    assert rf.optimal_value(mdp, 0, 0) == approx(1000.0)


@pytest.mark.parametrize("scale", [0.0, 1.0, -3.0])
def test_performance_difference_holds_for_any_reference_function(scale: float) -> None:
    """I4 against the objectives found above, 2 log(31/8) and log 6, in both directions."""
    mdp = two_steps()
    f_table = rf.tabulate(mdp.reward, lambda h, s, a: scale * (1 + h - 2 * s + 3 * a * a + h * s * a))
    optimal, gap = rf.optimal_policy(mdp), 2 * log(31 / 8) - log(6)
    assert rf.performance_difference(mdp, f_table, optimal, TAKE_A0) == approx(gap)
    if scale:  # π† = TAKE_A0 never tries A1, so the terms of I4 differ in kind between the directions
        assert rf.performance_difference(mdp, f_table, TAKE_A0, optimal) == approx(-gap)


# --- Residuals and losses -----------------------------------------------------------------------------------


def test_two_step_residuals_by_hand() -> None:
    """V_θ: log 4, log 4, 0. Steps, A1: log 2 − log 1/2 − log 4, log 3 − log 3/4; B0: log 4/3, −log 2."""
    mdp = two_steps()
    assert rf.soft_value(mdp, THETA) == [approx([log(4)]), approx([log(4), 0.0, 0.0])]
    assert rf.softmax_policy(mdp, THETA)[1] == [approx([0.25, 0.75]), [1.0, 0.0], [0.0, 1.0]]
    expected = {A0: 0.0, A1: log(4), B0: log(4 / 3) - log(2)}
    for trajectory, value in expected.items():
        assert rf.residual(mdp, THETA, trajectory) == approx(value, abs=1e-15)
        assert rf.residual_telescoped(mdp, THETA, trajectory) == approx(value, abs=1e-15)


def test_two_step_losses_by_hand() -> None:
    mdp = two_steps()
    law = rf.trajectory_law(mdp, mdp.reference)
    assert law == {A0: 0.125, A1: 0.375, B0: 0.5}
    assert rf.tbrm_loss(mdp, THETA, law) == approx(0.375 * log(4) ** 2 + 0.5 * log(2 / 3) ** 2)
    assert rf.brm_loss(mdp, THETA, law) == approx(0.375 * log(4) ** 2 + 0.5 * (log(4 / 3) ** 2 + log(2) ** 2))


def test_corollary4_by_hand() -> None:
    """T_β Q − Q is (0, log 3/4) in layer 0, (0, −log 4) in A, log 2 in B; their sums are `excess`."""
    optimal, own = (4 / 31, 3 / 31, 24 / 31), (1 / 8, 3 / 8, 1 / 2)
    excess = (0.0, -log(4), log(3 / 2))
    expected = 2 * sum((p - q) * e for p, q, e in zip(optimal, own, excess, strict=True))
    assert rf.corollary4(two_steps(), THETA) == approx(expected)


def test_corollary4_of_a_bandit_by_hand() -> None:
    """R_β = (10, 0) and θ = 0: Σ_a (π*(a) − 1/2)·R_β(a)."""
    assert rf.corollary4(bandit([10 + log(2), log(2)]), [[[0.0, 0.0]]]) == approx(10 / (1 + math.exp(-10)) - 5)


def frozen_value_loss(mdp: PlainMDP, logits: rf.Table, frozen: float, law: rf.Law) -> float:
    def residual(trajectory: rf.Trajectory) -> float:
        return rf.residual_telescoped(mdp, logits, trajectory) - rf.state_value(mdp, logits, 0, 0) + frozen

    return rf.expectation(law, lambda trajectory: residual(trajectory) ** 2)


@pytest.mark.parametrize(
    ("reward", "stays", "moves", "tbrm"),
    [([10 + log(2), log(2)], 50.0, 86.618354, 0.0), ([10.0, 0.0], 43.55, 74.20, log(2) ** 2)],
    ids=["reference folded in", "uniform reference"],
)
def test_x5_bandit_of_appendix_f(reward: list[float], stays: float, moves: float, tbrm: float) -> None:
    mdp, zero, right = bandit(reward), [[[0.0, 0.0]]], [[[10.0, 0.0]]]
    law = rf.trajectory_law(mdp, mdp.reference)
    tolerance = 5e-7 if stays == 50.0 else 5e-3  # the digits that theory.md prints
    assert frozen_value_loss(mdp, zero, log(2), law) == approx(stays, abs=tolerance)
    assert frozen_value_loss(mdp, right, log(2), law) == approx(moves, abs=tolerance)
    assert rf.tbrm_loss(mdp, right, law) == approx(tbrm, abs=1e-14)


def test_c3_loss_of_the_optimum_is_the_noise_floor() -> None:
    """V* of layer 1 is G and log (e^−G + e^−(G+1/4))/2; a fair coin between them has variance (gap/2)²."""
    mdp = coin(1.5)
    law = rf.trajectory_law(mdp, mdp.reference)
    gap = 3 - log((1 + math.exp(-0.25)) / 2)
    assert rf.tbrm_loss(mdp, rf.optimal_q(mdp), law) == approx(gap**2 / 4) == approx(2.429246, abs=5e-7)
    assert rf.noise_floor(mdp, law) == approx(gap**2 / 4)


def test_i7_noise_floor_by_hand() -> None:
    """Layer 0: variances 16·(3/16) = 3 and 16·(1/4) = 4. Layer 1: 1 in x, 0 in y.

    With μ = (1/3, 2/3): 3/3 + 4·2/3 + P(x), and P(x) = 1/3·3/4 + 2/3·1/2 = 7/12. Together 17/4.
    """
    mdp = gamble()
    law = rf.trajectory_law(mdp, [[[1 / 3, 2 / 3]], [[1.0], [1.0]], [[1.0], [1.0]]])
    assert rf.optimal_values(mdp) == [
        approx([log(0.5 * math.exp(2) + 0.5 * math.exp(3))]),
        [1.0, 5.0],
        [0.0, 2.0],
    ]
    assert rf.noise_floor(mdp, law) == approx(17 / 4)
    assert rf.tbrm_loss(mdp, rf.optimal_q(mdp), law) == approx(17 / 4)


def test_i11_martingale_split_by_hand() -> None:
    """Σf is 2 through A (probability 1/4), 2 or 4 through B (3/8 each): E = 1 + 3/2 + 6 = 17/2.

    f̄ is 11/4 at the start, −2 in A, 2 in B; Δ is −3/4 and 1/4 in layer 0, ±1 in B: 121/16 + 3/16 + 3/4.
    """
    mdp = PlainMDP(
        1.0,
        [1.0],
        [[[0.0] * 2], [[0.0], [0.0] * 2]],
        [[[0.5] * 2], [[1.0], [0.5] * 2]],
        [[[{0: 1.0}, {1: 1.0}]]],
    )
    f_table, policy = [[[4.0, 1.0]], [[-2.0], [1.0, 3.0]]], [[[0.25, 0.75]], [[1.0], [0.5, 0.5]]]
    left, right = rf.martingale_split(mdp, f_table, policy)
    assert left == approx(17 / 2)
    assert right == approx(121 / 16 + 3 / 16 + 3 / 4)


def test_finite_differences_by_hand() -> None:
    """TBRM on a bandit: ∂L/∂θ(a) = 2 μ(a)(θ(a) − R_β(a)). And ∇V_θ = π_θ."""
    mdp, logits = bandit([10 + log(2), log(2)]), [[[4.0, 1.0]]]
    law: rf.Law = {((0, 0),): 0.25, ((0, 1),): 0.75}
    assert rf.finite_difference(lambda x: rf.tbrm_loss(mdp, x, law), logits)[0][0] == approx([-3.0, 1.5])
    slopes = rf.finite_difference(lambda x: rf.state_value(two_steps(), x, 1, 0), THETA)
    assert slopes == [[approx([0, 0])], [approx([0.25, 0.75]), approx([0, 0]), approx([0, 0])]]


def test_a_response_that_ended_adds_nothing() -> None:
    """V* = log E_ref exp(r/β) = log(1/4·1 + 1/2·4 + 1/4·1) = log 5/2, P_{π*} = (1/10, 8/10, 1/10)."""
    mdp = short_and_long()
    stop, right, wrong = ((0, 1), (1, 0)), ((0, 0), (0, 0)), ((0, 0), (0, 1))
    assert rf.optimal_value(mdp, 0, 0) == approx(log(5 / 2)) == approx(rf.gibbs_value(mdp, 0, 0))
    law = rf.trajectory_law(mdp, rf.optimal_policy(mdp))
    assert law == approx({stop: 0.1, right: 0.8, wrong: 0.1})
    for padding in (0.0, 7.0):
        logits = [[[0.0, log(3)]], [[1.0, 2.0], [padding]]]
        assert rf.residual(mdp, logits, stop) == approx(log(12))  # log 3 − log 1/4
        assert rf.residual_telescoped(mdp, logits, stop) == approx(log(12))
        assert rf.brm_loss(mdp, logits, {stop: 1.0}) == approx((log(12) - padding) ** 2 + padding**2)


# --- Coverage -----------------------------------------------------------------------------------------------


def test_coverage_of_ragged_responses_by_hand() -> None:
    """Trajectory laws (1, 8, 1)/10 and (1, 2, 1)/4: 1 + χ² = 0.04 + 1.28 + 0.04; layer 0 alone: 1.12."""
    mdp = short_and_long()
    policy = [[[exact(9, 10), exact(1, 10)]], [[exact(8, 9), exact(1, 9)], [1]]]
    law_pi, law_mu = rf.trajectory_law(mdp, policy), rf.trajectory_law(mdp, mdp.reference)
    state_action, state = rf.chi_square_occupancy(mdp, law_pi, law_mu)
    assert state_action == approx([0.12, 0.36])
    assert state == approx([0.0, 0.12])
    assert rf.lemma1(mdp, law_pi, law_mu) == approx(1.48)
    assert rf.c_infinity(mdp, law_pi, law_mu) == approx(1.6)
    assert rf.kappa_by_sup(law_pi, law_mu) == exact(136, 100)
    assert rf.second_moment_at_most(law_pi, law_mu, exact(8, 5))  # on trees Λ = C_∞
    assert not rf.second_moment_at_most(law_pi, law_mu, exact(8, 5) - exact(1, 10**12))


def test_uncovered_actions_make_every_coefficient_infinite() -> None:
    mdp = corridor(2)
    law_pi, law_mu = rf.trajectory_law(mdp, mdp.reference), rf.trajectory_law(mdp, [[[1, 0]], [[HALF, HALF]]])
    assert rf.lemma1(mdp, law_pi, law_mu) == rf.c_infinity(mdp, law_pi, law_mu) == math.inf
    assert rf.kappa_by_sup(law_pi, law_mu) == math.inf
    assert not rf.second_moment_at_most(law_pi, law_mu, 1e300)
    # The other way round 0/0 = 0 and nothing is infinite: χ² of layer 0 is 1, and 2 bounds every ratio.
    assert rf.lemma1(mdp, law_mu, law_pi) == rf.c_infinity(mdp, law_mu, law_pi) == 2
    assert rf.kappa_by_sup(law_mu, law_pi) == 2


def test_pairs_that_neither_law_visits_do_not_count() -> None:
    """0/0 = 0: A1 and missing actions have no mass. Both layers: (1, 0) against (1/2, 1/2)."""
    mdp, left = two_steps(), [[[1.0, 0.0]], TAKE_A0[1]]
    law_pi, law_mu = rf.trajectory_law(mdp, left), rf.trajectory_law(mdp, TAKE_A0)
    assert rf.chi_square_occupancy(mdp, law_pi, law_mu) == ([1.0, 1.0], [0.0, 1.0])
    assert rf.c_infinity(mdp, law_pi, law_mu) == rf.kappa_by_sup(law_pi, law_mu) == 2
    assert rf.c_infinity(mdp, {A0: 0.5, B0: 0.0}, {A0: 1.0}) == 0.5


def test_moments_by_hand() -> None:
    law: rf.Law = {((0, 0), (0, 0)): exact(2, 3), ((0, 0), (0, 1)): THIRD}
    mean, matrix = rf.moments(law, rf.visited_pairs(law))
    assert mean == [1, exact(2, 3), THIRD]
    assert matrix == [[1, exact(2, 3), THIRD], [exact(2, 3), exact(2, 3), 0], [THIRD, 0, THIRD]]


def x1_target() -> rf.Law:
    return rf.trajectory_law(corridor(2), [[[1, 0]], [[0, 1]]])


def test_x1_replay_of_two_policies_has_infinite_kappa() -> None:
    mdp = corridor(2)
    law_mu = rf.mixture_law(mdp, [(HALF, [[[1, 0]], [[1, 0]]]), (HALF, [[[0, 1]], [[0, 1]]])])
    assert rf.lemma1(mdp, x1_target(), law_mu) == 3
    assert 2 * rf.c_infinity(mdp, x1_target(), law_mu) == 4
    assert rf.kappa_by_sup(x1_target(), law_mu) == math.inf


def test_x1_flipped_mixture_exceeds_lemma1_and_corollary6() -> None:
    mdp, keep, flip = corridor(2), exact(63, 64), exact(1, 64)
    law_mu = rf.mixture_law(mdp, [(HALF, [[[keep, flip]]] * 2), (HALF, [[[flip, keep]]] * 2)])
    assert sum(law_mu.values()) == 1
    assert rf.kappa_by_sup(x1_target(), law_mu) == exact(2111, 63)
    assert rf.lemma1(mdp, x1_target(), law_mu) == approx(3)
    assert 2 * rf.c_infinity(mdp, x1_target(), law_mu) == approx(4)


@pytest.mark.parametrize("horizon", [1, 2, 3, 4])
def test_x4_merging_helps_a_corridor_but_not_a_lock(horizon: int) -> None:
    """Uniform data, π always right: κ = 1 + H in one state per layer, 2^H in the lock."""
    always_right = [[[1.0, 0.0]]] * horizon
    easy = corridor(horizon)
    laws = rf.trajectory_law(easy, always_right), rf.trajectory_law(easy, easy.reference)
    assert rf.kappa_by_sup(*laws) == rf.lemma1(easy, *laws) == 1 + horizon
    hard = lock(horizon)
    law_pi = rf.trajectory_law(hard, [[[1, 0]] * len(layer) for layer in hard.reward])
    law_mu = rf.trajectory_law(hard, [[[0.5, 0.5]] * len(layer) for layer in hard.reward])
    assert rf.kappa_by_sup(law_pi, law_mu) == 2**horizon


@pytest.mark.parametrize("horizon", [2, 3])
@pytest.mark.parametrize("g", [exact(1, 10), exact(1, 1000)])
def test_b3_sharp_family(horizon: int, g: Fraction) -> None:
    """Λ = C(H − (H−1)g) exactly, with C = 2; the actions are gA, gB and bad."""
    c = exact(2)
    bad, g_b = 1 - 1 / c, g * (1 - 1 / c) / (1 - g)
    g_a = 1 / c - g_b
    stay, enter = [[{0: 1.0}], [{1: 1.0}, {1: 1.0}]], [[{0: 1.0}, {1: 1.0}, {1: 1.0}]]
    mdp = PlainMDP(
        beta=1.0,
        initial=[1],
        reward=[[[0.0] * 3]] + [[[0.0], [0.0] * 2]] * (horizon - 1),
        reference=[[[THIRD] * 3]] + [[[1], [HALF, HALF]]] * (horizon - 1),
        successors=[enter] + [stay] * (horizon - 2),
    )
    law_mu = rf.trajectory_law(mdp, [[[g_a, g_b, bad]]] + [[[1], [g, 1 - g]]] * (horizon - 1))
    law_pi = rf.trajectory_law(mdp, [[[c * g_a, c * g_b, 0]]] + [[[1], [1, 0]]] * (horizon - 1))
    assert sum(law_mu.values()) == sum(law_pi.values()) == 1
    assert rf.c_infinity(mdp, law_pi, law_mu) == approx(2)
    sharp = c * (horizon - (horizon - 1) * g)
    assert rf.second_moment_at_most(law_pi, law_mu, sharp)
    assert not rf.second_moment_at_most(law_pi, law_mu, sharp - exact(1, 10**12))
