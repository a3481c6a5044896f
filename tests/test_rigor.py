"""Exact decisions against the known values of theory.md, at equality, at infinity, and their parts."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from flint import arb, arb_mat, ctx, fmpq, fmpq_mat

from tbrm_theory.dynamic_programming import solve
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.instance import Instance
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.rigor import STATEMENTS, Decision, decide
from tbrm_theory.rigor.coverage import DataMoments, is_positive_semidefinite, top_eigenvalue
from tbrm_theory.rigor.decision import INFINITY, Between, Sides, enclosure, is_infinite, verdict
from tbrm_theory.rigor.fast_rate import largest_second_moment
from tbrm_theory.rigor.problem import ExactProblem, mixed_table, occupancy, rational_moments
from tbrm_theory.rigor.soft import SoftProblem
from tbrm_theory.rigor.stationary import Search, stationary_point
from tbrm_theory.transitions import DenseTransition
from tests.exact_instances import (
    Rows,
    as_floats,
    as_fraction,
    bandit,
    binary_tree,
    deterministic,
    holds,
    instance,
    one_state,
    random_instance,
    sharp,
    tables,
    width,
)

# -- known values of theory.md -------------------------------------------------------------------------------------


ALTERNATING = {"pi": [[[1.0, 0.0]], [[0.0, 1.0]]]}


def test_x1_a_replay_buffer_of_two_deterministic_policies() -> None:
    data = {"mu0": [[[1.0, 0.0]]] * 2, "mu1": [[[0.0, 1.0]]] * 2}
    case = instance(one_state(2), ALTERNATING | data, [(0.5, "mu0"), (0.5, "mu1")])
    decision = decide("false-mixture-lemma1", case)
    assert decision == Decision((math.inf, math.inf), (3.0, 3.0), True, "rational", 0)
    assert decide("false-mixture-i12", case).violated


def test_x1_with_flips() -> None:
    flipped = {"mu0": [[[63 / 64, 1 / 64]]] * 2, "mu1": [[[1 / 64, 63 / 64]]] * 2}
    case = instance(one_state(2), ALTERNATING | flipped, [(0.5, "mu0"), (0.5, "mu1")])
    problem = ExactProblem(case)
    data = DataMoments(problem, problem.behaviour("mu"))
    assert data.kappa(occupancy(problem, problem.policy("pi"))) == fmpq(2111, 63)
    decision = decide("false-mixture-lemma1", case)
    assert decision.violated
    assert decision.right == (3.0, 3.0)
    assert Fraction(decision.left[0]) < Fraction(2111, 63) < Fraction(decision.left[1])
    assert decide("false-mixture-i12", case).violated


@pytest.mark.parametrize("horizon", [1, 2, 5])
def test_x4_trees_and_combination_locks(horizon: int) -> None:
    """κ = 2^H exactly where every token's χ² is 1, and also on two merged states per layer of which one is absorbing."""
    lock = (
        deterministic([[2]] + [[2, 2]] * (horizon - 1), [[[0, 1]]] + [[[0, 1], [1, 1]]] * (horizon - 2))
        if (horizon > 1)
        else one_state(1)
    )
    for mdp in (binary_tree(horizon), lock):
        right = [[[1.0, 0.0]] * len(layer) for layer in mdp.reference]
        uniform = [[[0.5, 0.5]] * len(layer) for layer in mdp.reference]
        decision = decide("I12", instance(mdp, {"pi": right, "mu": uniform}))
        assert decision == Decision((2.0**horizon,) * 2, (2.0**horizon,) * 2, False, "rational", 0)


@pytest.mark.parametrize(("horizon", "c", "g"), [(2, fmpq(2), fmpq(1, 3)), (4, fmpq(7, 5), fmpq(1, 1000))])
def test_b3_is_sharp(horizon: int, c: fmpq, g: fmpq) -> None:
    """Λ = C(H - (H-1)g) to the last digit: bounded by that, and by nothing less."""
    mdp, pi, mu = sharp(horizon, c, g)
    problem = ExactProblem(instance(mdp, {}))
    data, target = DataMoments(problem, [(fmpq(1), mu)]), rational_moments(problem, [(fmpq(1), pi)])
    value = c * (horizon - (horizon - 1) * g)
    assert data.second_moment_at_most(target, value)
    assert not data.second_moment_at_most(target, value - fmpq(1, 10**80))
    with ctx.workprec(300):
        ball = data.second_moment(target)
    low, high = enclosure(ball)
    assert Fraction(low) <= as_fraction(value) <= Fraction(high)
    assert width(enclosure(ball)) < 1e-10


def test_the_plausible_bounds_of_lambda_fall_on_the_sharp_family() -> None:
    mdp, pi, mu = sharp(3, fmpq(2), fmpq(1, 10))
    case = instance(mdp, {"pi": as_floats(pi), "mu": as_floats(mu)})
    assert holds(decide("B3", case))
    for statement, bound in (("false-lambda-one-plus", 4.0), ("false-lambda-small-constant", 5.0)):
        decision = decide(statement, case)
        assert decision.violated
        assert decision.left == pytest.approx((5.6, 5.6), rel=1e-9)
        assert decision.right == pytest.approx((bound, bound), rel=1e-12)


def c3(logits: dict[str, Rows]) -> Instance:
    g, half = 1.5, [[0.5, 0.5]]
    mdp = RegularizedMDP(
        beta=1.0,
        initial=torch.tensor([1.0]),
        reward=tables([[[0.0, 0.0]], [[-g, -g - 0.25], [g, g]]]),
        reference=tables([half, half * 2]),
        transitions=[DenseTransition(torch.full((1, 2, 2), 0.5, dtype=torch.float64))],
    )
    return instance(mdp, {"mu": [half, half * 2]}, logits={name: tables(rows) for name, rows in logits.items()})


LOW_MINIMUM = [[[1.037, -2.625]], [[0.576, 1.628], [-6.656, 0.777]]]
"""From here Newton's method goes to the global minimum of C3."""
HIGH_MINIMUM = [[[3.082, -0.587]], [[-6.536, 1.705], [-3.254, -4.196]]]
SADDLE = [[[-1.952, 1.422]], [[-2.275, -1.931], [-1.938, -0.477]]]


@pytest.mark.parametrize(
    ("start", "loss", "minimum"), [(LOW_MINIMUM, 2.179489, True), (HIGH_MINIMUM, 2.435764, True), (SADDLE, None, False)]
)
def test_c3_has_stationary_points(start: Rows, loss: float | None, minimum: bool) -> None:
    problem = ExactProblem(c3({"theta": start}))
    with ctx.workprec(320):
        point = stationary_point(problem, problem.logits("theta"), problem.behaviour("mu"))
    assert point is not None
    assert point.strict_minimum is minimum
    assert loss is None or float(point.loss) == pytest.approx(loss, abs=5e-7)


def test_c1_needs_deterministic_transitions() -> None:
    """A proved local minimum loses more than θ*, and more than zero."""
    mdp = c3({}).mdp
    case = instance(
        mdp,
        {"mu": [[[0.5, 0.5]], [[0.5, 0.5]] * 2]},
        logits={"theta": tables(HIGH_MINIMUM), "better": solve(mdp).q},
    )
    decision = decide("false-c1-stochastic-global", case)
    assert decision.violated
    assert decision.left == pytest.approx((2.435764,) * 2, abs=5e-7)
    assert decision.right == pytest.approx((2.429246,) * 2, abs=5e-7)
    assert decide("false-c1-stochastic", case).violated
    zero = [[[0.0, 0.0]], [[0.0, 0.0]] * 2]  # loses more than the worse minimum
    assert holds(decide("false-c1-stochastic-global", c3({"theta": HIGH_MINIMUM, "better": zero})))


def test_no_stationary_point_is_no_verdict() -> None:
    """Data on one action: the other logit of a later state runs away, and the gradient has no zero there."""
    case = instance(one_state(2), {"mu": [[[1.0, 0.0]]] * 2}, logits={"theta": tables([[[0.0, 1.0]], [[0.0, 0.5]]])})
    decision = decide("false-c1-stochastic", case)
    assert decision.violated is None
    assert decision.left == (-math.inf, math.inf)


def test_b5_constant_is_best_possible() -> None:
    """The bandit of B5 reaches 0.95 of the right side at F = 20 as K → 0, m/K² → 0; so half the constant is too little."""
    case = bandit(math.log(1e-10) - 20, 20.0, 1e-24)
    for statement in ("B5.a", "B5.b"):
        decision = decide(statement, case)
        assert holds(decision)
        assert 0.93 < decision.left[0] / decision.right[1] < 0.951
    assert decide("false-b5-half", case).violated


def test_b7_constant_is_best_possible() -> None:
    """A small centred residual on the optimum's own data: the regret is half of its second moment, to first order."""
    f = 1e-3
    logits = torch.tensor([[f, -f]], dtype=torch.float64) - math.log(2)
    case = instance(one_state(1), {"mu": [[[0.5, 0.5]]]}, logits={"theta": (logits,)})
    decision = decide("B7", case)
    assert holds(decision)
    assert decision.left[0] / decision.right[1] > 0.99
    assert decide("false-b7-half", case).violated


def test_largest_shift_is_no_bound_of_kappa() -> None:
    case = instance(one_state(2), {"pi": [[[1.0, 0.0]]] * 2, "mu": [[[0.5, 0.5]]] * 2})
    assert decide("false-kappa-max-chi", case) == Decision((3.0, 3.0), (2.0, 2.0), True, "rational", 0)


# -- borderline cases ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statement", ["I12", "B1", "B2.a"])
def test_equality_is_no_violation(statement: str) -> None:
    """One state per layer, π on one action: κ, Lemma 1's right side and 1 + H(C_∞ - 1) are one number, not a dyadic one."""
    case = instance(one_state(3), {"pi": [[[1.0, 0.0]]] * 3, "mu": [[[0.3, 0.7]]] * 3})
    decision = decide(statement, case)
    assert holds(decision, exact="rational")
    assert decision.left == decision.right


def test_equality_of_second_moment_and_bound_is_no_violation() -> None:
    case = instance(one_state(1), {"pi": [[[0.9, 0.1]]], "mu": [[[0.3, 0.7]]]})
    decision = decide("B3", case)  # Λ = C_∞ at H = 1
    assert holds(decision, exact="rational")
    assert decision.right[0] == pytest.approx(3.0, rel=1e-12)


def test_equality_of_balls_is_left_open() -> None:
    """C1's bound is attained by data on one pair; L = (½|u|)(2|u|), and no number of digits proves that."""
    theta = (torch.tensor([[0.3, 0.1]], dtype=torch.float64),)
    case = instance(one_state(1), {"mu": [[[1.0, 0.0]]]}, logits={"theta": theta})
    assert decide("C1", case).violated is None


@pytest.mark.parametrize("statement", ["I12", "B1", "B2.a", "B2.b", "B3"])
def test_data_without_an_action_of_the_target(statement: str) -> None:
    """∞ ≤ ∞ holds; the finite bound of a target that the data cover is not affected by other targets."""
    data = {"mu": [[[1.0, 0.0]]] * 2}
    missed = decide(statement, instance(one_state(2), {"pi": [[[0.5, 0.5]]] * 2} | data))
    assert missed.left == missed.right == (math.inf, math.inf)
    assert holds(missed, exact="rational")
    covered = decide(statement, instance(one_state(2), {"pi": [[[1.0, 0.0]]] * 2} | data))
    assert holds(covered)
    assert covered.left[0] == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize("statement", ["B5.a", "B5.b", "B7"])
def test_regret_bounds_are_vacuous_without_an_action(statement: str) -> None:
    case = instance(one_state(2), {"mu": [[[1.0, 0.0]]] * 2}, logits={"theta": tables([[[0.0, 1.0]], [[0.0, 0.5]]])})
    decision = decide(statement, case)
    assert decision.right == (math.inf, math.inf)
    assert holds(decision)


def test_regret_bounds_of_a_mixture_that_does_not_identify_the_policy() -> None:
    mdp = one_state(2, reward=[[[0.0, 1.0]], [[0.5, 0.0]]])
    case = instance(
        mdp,
        {"mu0": [[[1.0, 0.0]]] * 2, "mu1": [[[0.0, 1.0]]] * 2},
        [(0.5, "mu0"), (0.5, "mu1")],
        {"theta": tables([[[0.0, 1.0]], [[0.0, 0.5]]])},
    )
    for statement in ("B5.a", "B7"):
        decision = decide(statement, case)
        assert decision.right == (math.inf, math.inf)
        assert holds(decision)


@pytest.mark.parametrize("statement", [name for name in STATEMENTS if STATEMENTS[name].true])
def test_extremes(statement: str) -> None:
    """Probabilities of 1e-200 in four layers, whose products no float holds."""
    theta = tables([[[0.0, 300.0]], [[-400.0, 0.5]], [[0.0, 0.5]], [[2.0, 0.5]]])
    policies = {
        "pi": [[[0.5, 0.5]]] * 4,
        "mu": [[[1e-200, 1 - 1e-200]], [[0.5, 0.5]], [[1.0, 1e-200]], [[1e-150, 1.0]]],
    }
    case = instance(one_state(4), policies, logits={"theta": theta})
    assert holds(decide(statement, case))


# -- parts ---------------------------------------------------------------------------------------------------------


def test_balls_decide_only_what_is_certain() -> None:
    wide, narrow = arb(1, 0.5), arb(2, 0.25)
    assert verdict(Sides(wide, narrow), "at most") is False
    assert verdict(Sides(narrow, wide), "at most") is True
    assert verdict(Sides(arb(1, 1), narrow), "at most") is None
    assert verdict(Sides(arb.nan(), narrow), "at most") is None
    assert verdict(Sides(arb(1, 1), arb(1, 1)), "equal") is None  # they meet, and nothing is known
    assert verdict(Sides(arb(1, 1), arb(4, 1)), "equal") is True
    assert verdict(Sides(arb(1), INFINITY), "at most") is False
    assert verdict(Sides(INFINITY, fmpq(1)), "at most") is True
    assert verdict(Sides(INFINITY, fmpq(1)), "equal") is True
    assert verdict(Sides(INFINITY, INFINITY), "equal") is False
    assert not is_infinite(arb("0 +/- inf"))
    assert verdict(Sides(arb(2), Between(arb(1), arb(3))), "at most") is None
    assert verdict(Sides(arb(2), Between(arb(1), INFINITY)), "at most") is None
    assert verdict(Sides(arb(2), Between(arb(3), INFINITY)), "at most") is False
    assert verdict(Sides(arb(4), Between(arb(1), arb(3))), "at most") is True
    assert enclosure(Between(arb(1), INFINITY)) == (math.nextafter(1, 0), math.inf)


def test_floats_enclose() -> None:
    assert enclosure(fmpq(1, 2)) == (0.5, 0.5)
    assert enclosure(fmpq(0)) == (0.0, 0.0)
    low, high = enclosure(fmpq(1, 3))
    assert Fraction(low) < Fraction(1, 3) < Fraction(high)
    assert math.nextafter(low, 1) == high
    assert enclosure(fmpq(10) ** 400) == (pytest.approx(1.7976931348623157e308), math.inf)
    assert enclosure(arb(10) ** 400)[1] == math.inf
    assert enclosure(arb.nan()) == (-math.inf, math.inf)


def test_positive_semidefinite() -> None:
    assert is_positive_semidefinite(fmpq_mat([[1, 1], [1, 1]]))
    assert is_positive_semidefinite(fmpq_mat([[0, 0, 0], [0, 2, 1], [0, 1, fmpq(1, 2)]]))
    assert not is_positive_semidefinite(fmpq_mat([[0, 1], [1, 5]]))
    assert not is_positive_semidefinite(fmpq_mat([[2, 3, 0], [3, 4, 0], [0, 0, 1]]))
    assert not is_positive_semidefinite(fmpq_mat([[1, 0], [0, fmpq(-1, 10**50)]]))


def test_top_eigenvalue() -> None:
    with ctx.workprec(200):
        ball = top_eigenvalue(arb_mat([[2, 1, 0], [1, 2, 0], [0, 0, fmpq(5, 2)]]), 40)
        twice = top_eigenvalue(arb_mat([[3, 0], [0, 3]]), 40)
    assert ball.contains(3)
    assert twice.contains(3)
    assert width(enclosure(ball)) < 1e-11


def test_a_proof_of_a_zero_needs_one() -> None:
    """Krawczyk's test accepts a stationary point and refuses its neighbours."""
    problem = ExactProblem(c3({"theta": HIGH_MINIMUM}))
    with ctx.workprec(320):
        search = Search(problem, problem.logits("theta"), problem.behaviour("mu"))
        point = search.start
        for _ in range(12):
            gradient, slope = search.gradient(point)
            point = (point - slope.solve(gradient)).mid()
        assert search.proof(point) is not None
        off = arb_mat(point.nrows(), 1, [arb(2) ** -70] * point.nrows())
        assert search.proof(point + off) is None


def test_the_slope_is_the_derivative_of_the_gradient() -> None:
    problem = ExactProblem(random_instance("dense", 2, mixture=True))
    with ctx.workprec(320):
        search = Search(problem, problem.logits("theta"), problem.behaviour("mu"))
        slope, step = search.gradient(search.start)[1], arb(2) ** -80
        for j in range(len(search.free)):
            shift = arb_mat(len(search.free), 1)
            shift[j, 0] = step
            ahead, behind = (search.gradient(search.start + sign * shift)[0] for sign in (1, -1))
            for i in range(len(search.free)):
                assert abs((ahead[i, 0] - behind[i, 0]) / (2 * step) - slope[i, j]) < arb(2) ** -100


def test_the_supremum_over_t_may_be_inside() -> None:
    """Three actions, ``π_t ∝ (e^{(3/10 - t)F}, c, e^{(t - 3/10)F})``, little data on the second: Λ is largest at t = 3/10."""
    peak, f, c, rare = 0.3, 8.0, 2.0, 2.0**-10
    log_actions = math.log(3)
    reward = [peak * f + log_actions, math.log(c) + log_actions, -peak * f + log_actions]
    log_optimum = torch.tensor([[peak * f, math.log(c), -peak * f]], dtype=torch.float64)
    theta = log_optimum + torch.tensor([[-f, 0.0, f]], dtype=torch.float64)
    case = instance(
        deterministic([[3]], [], reward=[[reward]]),
        {"mu": [[[0.5, rare, 0.5 - rare]]]},
        logits={"theta": (theta,)},
    )
    problem = ExactProblem(case)
    with ctx.workprec(320):
        soft, data = SoftProblem(problem, problem.logits("theta")), DataMoments(problem, problem.behaviour("mu"))
        supremum = arb(c / (c + 2)) / arb(rare)
        above = largest_second_moment(soft, data, supremum * arb(1.01))
        below = largest_second_moment(soft, data, supremum * arb(0.99))
    assert float(supremum) * (1 - 1e-9) < float(above.high) < float(supremum) * 1.01
    assert float(supremum) * 0.99 < float(below.low) < float(supremum) * (1 + 1e-9)


def test_rows_are_divided_by_their_exact_sums() -> None:
    problem = ExactProblem(instance(one_state(1), {"mu": [[[0.1, 0.9]]], "pi": [[[0.3, 0.7]]]}))
    for name in ("mu", "pi"):
        assert sum(problem.policy(name)[0][0], fmpq(0)) == 1
    assert sum(mixed_table(problem.behaviour("mu"))[0][0], fmpq(0)) == 1


@pytest.mark.parametrize(
    ("statement", "policies", "field"),
    [
        ("B9", {}, "statement"),
        ("B1", {"pi": [[[0.5, 0.5, 0.0]]]}, "policies.mu"),
        ("B1", {"pi": [[[0.5, 0.0, 0.5]]], "mu": [[[0.5, 0.5, 0.0]]]}, r"policies.pi\[0\]\[0\]\[2\]"),
        ("B5.a", {"mu": [[[0.5, 0.5, 0.0]]]}, "logits.theta"),
    ],
)
def test_refusals(statement: str, policies: dict[str, Rows], field: str) -> None:
    mdp = RegularizedMDP(
        beta=1.0,
        initial=torch.tensor([1.0]),
        reward=tables([[[0.0, 0.0, 0.0]]]),
        reference=tables([[[0.5, 0.5, 0.0]]]),
        transitions=[],
    )
    with pytest.raises(InvalidInputError, match=field):
        decide(statement, instance(mdp, policies))


def test_the_optimum_is_no_rational_policy() -> None:
    case = instance(one_state(1), {"pi": [[[0.5, 0.5]]]}, [(1.0, "optimal")])
    with pytest.raises(InvalidInputError, match=r"policies\.optimal"):
        decide("B2.b", case)


def test_statements_of_markov_data_refuse_a_mixture() -> None:
    with pytest.raises(InvalidInputError, match="mixtures"):
        decide("B1", random_instance("deterministic", 0, mixture=True))
