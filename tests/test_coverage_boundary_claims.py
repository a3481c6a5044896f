"""X1, X3, X4: every claim can fail, the numbers of theory.md are exact, and the constructed problems are what they are said to be."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from plants import Plant, check_that_the_verdict_turns, function, scaled

from tbrm_theory import coverage, dynamic_programming, population
from tbrm_theory.claims import CLAIMS, coverage_growth, mixture_data, uncovered_actions
from tbrm_theory.claims.cases import case_of
from tbrm_theory.claims.exact_moments import exact_kappa, in_rationals
from tbrm_theory.named_behaviours import with_holes
from tbrm_theory.occupancy import enumerate_trajectories, occupancy

WRONG_BY_A_BILLIONTH = scaled(1 + 1e-9)


def lemma1_for_kappa(original: Any) -> Any:
    """What is only true of Markov data, and there only a bound."""
    return lambda mdp, pi, mu: coverage.lemma1(mdp, pi, mu)


def kappa_for_lemma1(original: Any) -> Any:
    """If this were Lemma 1's right side, it would not fail."""
    return lambda mdp, pi, mu: coverage.kappa_linear_solve(mdp, pi, mu)


def brm_for_tbrm(original: Any) -> Any:
    return lambda mdp, logits, data, **options: original(mdp, logits, data, loss="brm")


def tbrm_for_brm(original: Any) -> Any:
    return lambda mdp, logits, data, **options: original(mdp, logits, data)


def nothing_for_uncovered(original: Any) -> Any:
    """p/0 counted as 0."""

    def terms(*arguments: Any) -> Any:
        found = original(*arguments)
        return torch.where(found.isinf(), 0.0, found)

    return terms


def equal_weights(original: Any) -> Any:
    """The harmonic mean without the weights."""

    def bound(mdp: Any, policy: Any, mixture: Any) -> Any:
        return 1 / sum(1 / coverage.kappa(mdp, policy, part) for _, part in mixture.components)

    return bound


BUGS: dict[str, Plant] = {
    "X1.a": function(coverage, "kappa", lemma1_for_kappa),
    "X1.b": function(population, "population_loss", brm_for_tbrm),
    "X1.c": function(population, "population_loss", tbrm_for_brm),
    "X1.d": function(mixture_data, "harmonic_bound", equal_weights),
    "X1.e": function(coverage, "kappa_linear_solve", WRONG_BY_A_BILLIONTH),
    "X1.f": function(coverage, "kappa", lemma1_for_kappa),
    "X1.g": function(coverage, "lemma1", kappa_for_lemma1),
    "X1.h": function(population, "population_loss", scaled(0.01)),
    "X1.i": function(coverage, "lemma1", kappa_for_lemma1),
    "X3.a": function(coverage, "_squared_difference", nothing_for_uncovered),
    "X3.b": function(dynamic_programming, "policy_kl", WRONG_BY_A_BILLIONTH),
    "X3.c": function(dynamic_programming, "policy_kl", WRONG_BY_A_BILLIONTH),
    "X3.d": function(dynamic_programming, "policy_kl", scaled(1.5)),
    "X3.e": function(coverage, "kappa", WRONG_BY_A_BILLIONTH),
    "X4.a": function(coverage, "kappa_closed_form", lemma1_for_kappa),
    "X4.b": function(coverage, "kappa_linear_solve", WRONG_BY_A_BILLIONTH),
    "X4.c": function(coverage, "c_inf", WRONG_BY_A_BILLIONTH),
    "X4.d": function(coverage, "kappa_closed_form", lemma1_for_kappa),
}


@pytest.mark.parametrize("claim_id", BUGS)
def test_a_planted_bug_turns_the_verdict(claim_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_the_verdict_turns(claim_id, BUGS[claim_id], monkeypatch, None, instances=5)


# -- X1 --------------------------------------------------------------------------------------------------------------


def flipped_laws(flip: Fraction) -> tuple[list[Fraction], list[Fraction]]:
    """π = (0,1) and the mixture of theory.md, in rationals, over (0,0), (0,1), (1,0), (1,1)."""

    def law(*first: Fraction) -> list[Fraction]:
        return [
            math.prod(
                (p if action == 0 else 1 - p for p, action in zip(first, actions, strict=True)), start=Fraction(1)
            )
            for actions in ((0, 0), (0, 1), (1, 0), (1, 1))
        ]

    zeros, ones = law(1 - flip, 1 - flip), law(flip, flip)
    return law(Fraction(1), Fraction(0)), [(p + q) / 2 for p, q in zip(zeros, ones, strict=True)]


@pytest.mark.parametrize(
    ("flip", "kappa"),
    [
        (Fraction(0), math.inf),
        (Fraction(1, 64), Fraction(2111, 63)),
        (Fraction(1, 4), Fraction(11, 3)),
        (Fraction(1, 2), Fraction(3)),
    ],
)
def test_the_numbers_of_theory_md_are_exact(flip: Fraction, kappa: Fraction | float) -> None:
    problem = mixture_data.flipped(2, float(flip))
    listed = enumerate_trajectories(problem.mdp)
    assert listed.actions.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert exact_kappa(listed, *flipped_laws(flip)) == kappa
    assert mixture_data.flipped_kappa(2, flip) == kappa
    found = coverage.change_of_measure(problem.mdp, problem.log_policy, problem.behaviour)
    assert found.kappa.item() == pytest.approx(float(kappa), rel=1e-13)
    assert found.lemma1.item() == pytest.approx(3, rel=1e-14)
    assert found.corollary6.item() == pytest.approx(4, rel=1e-14)


def test_the_harmonic_bound_is_half_tight_for_rare_flips_and_exact_for_markov_data() -> None:
    """2 exactly as p → 0: each component alone has κ ~ 1/p, the mixture 1/(2p)."""
    for flip, ratio in ((1e-6, 0.5), (0.5, 1.0)):
        problem = mixture_data.flipped(2, flip)
        bound = mixture_data.harmonic_bound(problem.mdp, problem.log_policy, problem.behaviour)
        kappa = coverage.kappa(problem.mdp, problem.log_policy, problem.behaviour)
        assert (kappa / bound).item() == pytest.approx(ratio, rel=1e-5)


def test_seed_0_of_the_opposite_policies_is_theory_md_s_example() -> None:
    problem = mixture_data.opposite_policies(0)
    assert [table.exp().tolist() for table in problem.log_policy] == [[[1, 0]], [[0, 1]]]
    components = problem.behaviour.components
    assert [weight for weight, _ in components] == [0.5, 0.5]
    assert [[table.exp().tolist() for table in policy] for _, policy in components] == [[[[1, 0]]] * 2, [[[0, 1]]] * 2]
    assert [table.tolist() for table in problem.unseen] == [[[1, -1]], [[-1, 1]]]


@pytest.mark.parametrize("seed", range(12))
def test_the_unseen_function_vanishes_on_the_data_and_not_under_the_target(seed: int) -> None:
    problem = mixture_data.opposite_policies(seed)
    listed = enumerate_trajectories(problem.mdp)
    total = listed.sum_along(problem.unseen)
    assert bool((total[problem.behaviour.log_law(problem.mdp, listed) > -math.inf] == 0).all())
    [target] = total[listed.log_law(problem.log_policy) > -math.inf].tolist()
    assert target == 2


def test_exact_kappa_agrees_with_the_closed_form_and_sees_what_is_out_of_range() -> None:
    case = case_of(mixture_data.flipped(3, 0.25).mdp, "test", 0)
    target = case.listed.log_law(tuple(t[0] for t in case.log_policy)).exp()
    law = case.listed.log_law(tuple(t[0] for t in case.log_behaviour)).exp()
    closed = coverage.kappa_closed_form(case.mdp, case.log_policy, case.log_behaviour)[0].item()
    assert float(exact_kappa(case.listed, in_rationals(target), in_rationals(law))) == pytest.approx(closed, rel=1e-13)
    assert exact_kappa(case.listed, in_rationals(law), in_rationals(law)) == pytest.approx(1, abs=1e-15)
    one = torch.zeros(len(law), dtype=torch.float64)
    one[0] = 1.0
    assert exact_kappa(case.listed, in_rationals(target), in_rationals(one)) == math.inf


# -- X3 --------------------------------------------------------------------------------------------------------------


def test_the_covered_optimum_takes_no_omitted_action_and_is_the_best_of_those() -> None:
    case = uncovered_actions._deterministic_with_holes(4)
    data = with_holes(case.mdp, 4, share=0.3)
    best = uncovered_actions.covered_optimum(case.mdp, data)
    omitted = uncovered_actions.omitted_actions(case.mdp, data)
    assert sum(float(table.sum()) for table in omitted) > 0
    mass = occupancy(case.mdp, best).state_action
    assert all(bool((table[gone > 0] == 0).all()) for table, gone in zip(mass, omitted, strict=True))
    least = dynamic_programming.regret(case.mdp, best)
    assert least > 0
    for draw in range(2):
        other = tuple(
            torch.log_softmax(torch.where(gone > 0, -torch.inf, table[draw]), -1)
            for gone, table in zip(omitted, case.log_policy, strict=True)
        )
        assert dynamic_programming.regret(case.mdp, other) > least


def test_the_rare_arm_has_the_optimum_and_the_data_that_were_asked_for() -> None:
    mdp, data = uncovered_actions.rare_arm(1e-5, 0.3, beta=0.7)
    assert dynamic_programming.solve(mdp).log_policy[0].exp().tolist() == [pytest.approx([0.3, 0.7])]
    assert data.log_policy[0].exp().tolist() == [pytest.approx([1e-5, 1 - 1e-5], rel=1e-12)]


# -- X4 --------------------------------------------------------------------------------------------------------------


def test_growth_at_c_1() -> None:
    """The integers of theory.md: 2^H on trees and locks, 1 + H on one state, 2H with a way back of ½."""
    for make_pair, expected in (
        (lambda horizon: coverage_growth.tree(horizon, coverage_growth.step(1.0)), 2**6),
        (lambda horizon: coverage_growth.one_state(horizon, coverage_growth.step(1.0)), 7),
        (coverage_growth.lock, 2**6),
        (lambda horizon: coverage_growth.leaky_lock(horizon, 0.5), 12),
    ):
        pair = make_pair(6)
        assert pair.c == 1
        assert coverage.kappa(pair.mdp, pair.log_policy, pair.log_behaviour).item() == pytest.approx(
            expected, rel=1e-14
        )


@pytest.mark.parametrize("c", [0.0, 0.1, 1.0])
def test_a_step_has_the_chi_square_that_was_asked_for(c: float) -> None:
    policy, behaviour = coverage_growth.step(c)
    assert policy.sum() == pytest.approx(1.0, abs=1e-15)
    assert coverage_growth.step_chi_square(policy, behaviour) == pytest.approx(c, abs=1e-15)
    pair = coverage_growth.tree(3, (policy, behaviour), seed=2)
    assert coverage.kappa(pair.mdp, pair.log_policy, pair.log_behaviour).item() == pytest.approx(
        (1 + c) ** 3, rel=1e-13
    )


def test_the_lock_s_target_opens_it() -> None:
    pair = coverage_growth.lock(7, seed=3)
    reached = occupancy(pair.mdp, pair.log_policy).state
    assert [state.tolist() for state in reached] == [[1.0, 0.0]] * 7
    assert float((occupancy(pair.mdp, pair.log_policy).state_action[-1] * pair.mdp.reward[-1]).sum()) == 1.0


def test_a_leak_of_0_is_the_lock() -> None:
    for horizon in (1, 5, 40):
        leaky, closed = coverage_growth.leaky_lock(horizon, 0.0), coverage_growth.lock(horizon)
        kappas = [coverage.kappa(pair.mdp, pair.log_policy, pair.log_behaviour).item() for pair in (leaky, closed)]
        assert kappas[0] == pytest.approx(kappas[1], rel=1e-13)
    assert coverage_growth.leaky_lock_masses(3, 0.0, 0.5) == [1.0, 0.5, 0.25]


def test_each_claim_here_is_planted() -> None:
    assert set(BUGS) == {claim_id for claim_id in CLAIMS if claim_id[:2] in ("X1", "X3", "X4")}
