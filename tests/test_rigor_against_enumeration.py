"""What exact decisions are made of, against sums over every trajectory (``reference.py``), which share nothing with them."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.linalg
from flint import ctx, fmpq

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.rigor import STATEMENTS, decide
from tbrm_theory.rigor.coverage import DataMoments
from tbrm_theory.rigor.decision import enclosure
from tbrm_theory.rigor.problem import ExactProblem, Table, occupancy, rational_moments
from tbrm_theory.rigor.soft import SoftProblem
from tests import reference as ref
from tests.exact_instances import as_floats, as_fraction, holds, random_instance
from tests.problems import KINDS


def fractions(table: Table) -> list:
    return [[[as_fraction(x) for x in row] for row in layer] for layer in table]


def plain(problem: ExactProblem) -> ref.PlainMDP:
    """The same problem for enumeration, in fractions where they matter."""
    return ref.PlainMDP(
        beta=float(as_fraction(problem.beta)),
        initial=[as_fraction(x) for x in problem.initial],
        reward=fractions(problem.reward),
        reference=fractions(problem.reference),
        successors=[
            [[{t: as_fraction(p) for t, p in arcs} for arcs in row] for row in layer]
            for layer in problem.successors[:-1]
        ],
    )


def laws(problem: ExactProblem) -> tuple[ref.PlainMDP, ref.Law, ref.Law]:
    """The problem, P_π and P_μ."""
    mdp = plain(problem)
    behaviour = [(as_fraction(weight), fractions(policy)) for weight, policy in problem.behaviour("mu")]
    return mdp, ref.trajectory_law(mdp, fractions(problem.policy("pi"))), ref.mixture_law(mdp, behaviour)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixture", [False, True])
def test_coverage_against_enumeration(kind: str, mixture: bool) -> None:
    case = random_instance(kind, 1, mixture=mixture)
    problem = ExactProblem(case)
    mdp, pi, mu = laws(problem)
    data, visits = DataMoments(problem, problem.behaviour("mu")), occupancy(problem, problem.policy("pi"))
    assert as_fraction(data.kappa(visits)) == ref.kappa_by_sup(pi, mu)
    b2 = decide("B2.b", case)
    assert b2.left[0] == pytest.approx(ref.lemma1(mdp, pi, mu), rel=1e-12)
    assert b2.right[0] == pytest.approx(len(mdp.reward) * ref.c_infinity(mdp, pi, mu), rel=1e-12)
    target = rational_moments(problem, [(fmpq(1), problem.policy("pi"))])
    with ctx.workprec(300):
        low, high = (Fraction(end) for end in enclosure(data.second_moment(target)))
    for bound in (low, high):
        expected = ref.second_moment_at_most(pi, mu, bound)
        assert expected is (bound == high)
        assert data.second_moment_at_most(target, fmpq(bound.numerator, bound.denominator)) is expected


def float_plain(problem: ExactProblem) -> ref.PlainMDP:
    exact = plain(problem)

    def floats(table: list) -> list:
        return [[[float(x) for x in row] for row in layer] for layer in table]

    return ref.PlainMDP(
        beta=exact.beta,
        initial=[float(x) for x in exact.initial],
        reward=floats(exact.reward),
        reference=floats(exact.reference),
        successors=[
            [[{t: float(p) for t, p in arcs.items()} for arcs in row] for row in layer] for layer in exact.successors
        ],
    )


def residuals_by_start(mdp: ref.PlainMDP, theta: ref.Table, law: ref.Law) -> dict[int, list[tuple[float, float]]]:
    """``(P(τ), f_θ(τ))`` by initial state."""
    found: dict[int, list[tuple[float, float]]] = {}
    for trajectory, p in law.items():
        found.setdefault(trajectory[0][0], []).append((float(p), ref.residual(mdp, theta, trajectory)))
    return found


def variance_within_starts(residuals: dict[int, list[tuple[float, float]]]) -> float:
    return sum(
        sum(p * f * f for p, f in rows) - sum(p * f for p, f in rows) ** 2 / sum(p for p, _ in rows)
        for rows in residuals.values()
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixture", [False, True])
def test_regret_and_loss_against_enumeration(kind: str, mixture: bool) -> None:
    problem = ExactProblem(random_instance(kind, 3, mixture=mixture))
    mdp, behaviour = float_plain(problem), problem.behaviour("mu")
    theta = as_floats(problem.logits("theta"))
    components = [(float(as_fraction(w)), as_floats(policy)) for w, policy in behaviour]
    law = ref.mixture_law(mdp, components)
    with ctx.workprec(300):
        soft = SoftProblem(problem, problem.logits("theta"))
        own = ref.softmax_policy(mdp, theta)
        assert float(soft.regret) == pytest.approx(ref.regret(mdp, own), rel=1e-9)
        assert float(soft.corollary4) == pytest.approx(ref.corollary4(mdp, theta), rel=1e-9)
        star = ref.trajectory_law(mdp, ref.optimal_policy(mdp))
        divergence = ref.kl_trajectories(star, ref.trajectory_law(mdp, own))
        assert float(soft.divergence_from_optimum) == pytest.approx(divergence, rel=1e-9)
        assert float(soft.loss(behaviour)) == pytest.approx(ref.tbrm_loss(mdp, theta, law), rel=1e-9)
        residuals = residuals_by_start(mdp, theta, law)
        within = variance_within_starts(residuals)
        assert float(soft.variance_within_starts(behaviour)) == pytest.approx(within, rel=1e-8)
        gaps = [max(f for _, f in rows) - min(f for _, f in rows) for rows in residuals.values()]
        if kind == "deterministic":
            assert float(soft.spread()) == pytest.approx(max(gaps), rel=1e-9)
        half = soft.half_gradient(soft.covariances(behaviour))
        slope = ref.finite_difference(lambda table: ref.tbrm_loss(mdp, table, law), theta)
    if kind == "deterministic":
        weights = ref.occupancy_state_action(mdp, law)
        terms = ref.tabulate(
            mdp.reward,
            lambda h, s, a: (
                (math.log(own[h][s][a]) if h else theta[h][s][a]) - ref.soft_reward(mdp, h, s, a)
                if weights[h][s][a] > 0
                else 0.0
            ),
        )
        largest = max(abs(u) for layer in terms for row in layer for u in row)
        norm = sum(abs(x) for layer in slope for row in layer for x in row)
        expected = len(mdp.reward) / 2 * largest * norm
        assert decide("C1", problem.instance).right[0] == pytest.approx(expected, rel=1e-6)
    for h, s, a in problem.pairs:
        assert 2 * float(half[h][s][a]) == pytest.approx(slope[h][s][a], abs=1e-6)


@pytest.mark.parametrize("mixture", [False, True])
def test_theorem2_against_enumeration(mixture: bool) -> None:
    case = random_instance("deterministic", 5, mixture=mixture)
    problem = ExactProblem(case)
    mdp = float_plain(problem)
    exact, _, data = laws(problem)
    theta = as_floats(problem.logits("theta"))
    kappas = [
        float(ref.kappa_by_sup(ref.trajectory_law(exact, fractions_of(policy)), data))
        for policy in (ref.optimal_policy(mdp), ref.softmax_policy(mdp, theta))
    ]
    float_law = {trajectory: float(p) for trajectory, p in data.items()}
    root = math.sqrt(ref.tbrm_loss(mdp, theta, float_law))
    decision = decide("B5.a", case)
    assert holds(decision)
    assert decision.right[0] == pytest.approx(mdp.beta * sum(map(math.sqrt, kappas)) * root, rel=1e-9)
    spread = math.sqrt(variance_within_starts(residuals_by_start(mdp, theta, float_law)))
    decision = decide("B5.b", case)
    assert holds(decision)
    assert decision.right[0] == pytest.approx(mdp.beta * sum(math.sqrt(k - 1) for k in kappas) * spread, rel=1e-8)


def fractions_of(table: list) -> list:
    """Rows of floats, divided by their exact sums."""
    rows = [[[Fraction(x) for x in row] for row in layer] for layer in table]
    return [[[x / sum(row) for x in row] for row in layer] for layer in rows]


@pytest.mark.parametrize("seed", range(4))
def test_fast_rate_against_enumeration(seed: int) -> None:
    """Λ(π_t, μ) of the enumerated laws P_t ∝ P_{π*} e^{t f} lies below the certified bound and reaches the other one."""
    case = random_instance("deterministic", seed)
    problem = ExactProblem(case)
    mdp = float_plain(problem)
    theta = as_floats(problem.logits("theta"))
    star = ref.trajectory_law(mdp, ref.optimal_policy(mdp))
    law = ref.trajectory_law(mdp, as_floats(problem.policy("mu")))
    pairs = ref.visited_pairs(star)

    def gram(p: ref.Law) -> np.ndarray:
        return np.array([[float(x) for x in row] for row in ref.moments(p, pairs)[1]])

    values, vectors = np.linalg.eigh(gram(law))
    keep = values > 1e-12
    whitening = vectors[:, keep] / np.sqrt(values[keep])

    def second_moment(t: float) -> float:
        weights = {tau: p * math.exp(t * ref.residual(mdp, theta, tau)) for tau, p in star.items()}
        totals: dict[int, float] = {}
        for tau, weight in weights.items():
            totals[tau[0][0]] = totals.get(tau[0][0], 0.0) + weight
        tilted = {tau: w / totals[tau[0][0]] * mdp.initial[tau[0][0]] for tau, w in weights.items()}
        return float(scipy.linalg.eigvalsh(whitening.T @ gram(tilted) @ whitening)[-1])

    largest = max(second_moment(t) for t in np.linspace(0, 1, 9))
    decision = decide("B7", case)
    assert holds(decision)
    scale = mdp.beta / 2 * ref.tbrm_loss(mdp, theta, law)
    assert decision.right[0] <= scale * largest * (1 + 1e-6)
    assert decision.right[1] >= scale * largest * (1 - 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("statement", [name for name in STATEMENTS if STATEMENTS[name].true])
def test_true_statements_hold_on_random_instances(kind: str, statement: str) -> None:
    if STATEMENTS[statement].deterministic and kind != "deterministic":
        with pytest.raises(InvalidInputError, match="deterministic"):
            decide(statement, random_instance(kind, 0))
        return
    for seed in range(3):
        assert holds(decide(statement, random_instance(kind, seed)))
