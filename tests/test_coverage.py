"""χ², C_∞, κ and Λ against exact enumeration in rationals, known values, and suprema that nothing may exceed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from problems import KINDS, random_policy, random_problem
from torch import Tensor

from tbrm_theory import coverage
from tbrm_theory.behaviours import Behaviour, FixedDataset, HistoryBehaviour, MixtureBehaviour
from tbrm_theory.coverage import (
    behaviour_occupancy,
    change_of_measure,
    kappa,
    kappa_closed_form,
    kappa_linear_solve,
    optimal_test_function,
    second_moment,
)
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.families import make
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.occupancy import enumerate_trajectories, log_moment_matrix, log_occupancy, moment_matrix, occupancy
from tbrm_theory.trajectories import sample_trajectories
from tests import reference as rf
from tests.convert import plain

Policy = tuple[Tensor, ...]


def with_holes(mdp: RegularizedMDP, seed: int) -> Policy:
    """Only the likelier actions."""
    kept = [torch.where(log >= log.amax(-1, keepdim=True) - 0.8, log, -torch.inf) for log in random_policy(mdp, seed)]
    return tuple(torch.log_softmax(table, dim=-1) for table in kept)


def rational(row: Sequence[float]) -> list[Fraction]:
    exact = [Fraction(entry) for entry in row]
    return [entry / sum(exact) for entry in exact]


def rational_problem(mdp: RegularizedMDP) -> rf.PlainMDP:
    """The same problem with probabilities that sum to 1 exactly."""
    floats = plain(mdp)
    successors = [
        [[dict(zip(cell, rational(list(cell.values())), strict=True)) if cell else {} for cell in row] for row in layer]
        for layer in floats.successors
    ]
    return rf.PlainMDP(floats.beta, rational(floats.initial), floats.reward, floats.reference, successors)


def rational_policy(mdp: RegularizedMDP, log_policy: Policy) -> rf.Table:
    return [[rational(row) for row in mdp.rows(h, log.exp())] for h, log in enumerate(log_policy)]


def rational_law(mdp: RegularizedMDP, log_policy: Policy) -> rf.Law:
    return rf.trajectory_law(rational_problem(mdp), rational_policy(mdp, log_policy))


def relative(found: Tensor, expected: float | Fraction) -> float:
    return abs(found.item() / float(expected) - 1)


# -- against rationals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_the_coefficients_of_markov_data_are_those_of_exact_enumeration(kind: str, seed: int) -> None:
    mdp = random_problem(kind, seed)
    pi, mu = with_holes(mdp, 100 + seed), random_policy(mdp, 200 + seed)
    law_pi, law_mu = rational_law(mdp, pi), rational_law(mdp, mu)
    exact = rational_problem(mdp)
    found = change_of_measure(mdp, pi, mu)
    kappa_exact = rf.kappa_by_sup(law_pi, law_mu)
    assert kappa_exact > 1.01
    assert relative(found.kappa, kappa_exact) < 1e-12
    assert relative(kappa_linear_solve(mdp, pi, mu), kappa_exact) < 1e-11
    assert relative(found.lemma1, rf.lemma1(exact, law_pi, law_mu)) < 1e-12
    assert relative(found.c_inf, rf.c_infinity(exact, law_pi, law_mu)) < 1e-12
    assert found.corollary6.item() == mdp.horizon * found.c_inf.item()
    assert rf.second_moment_at_most(law_pi, law_mu, Fraction(found.second_moment.item() * (1 + 1e-10)))
    assert not rf.second_moment_at_most(law_pi, law_mu, Fraction(found.second_moment.item() * (1 - 1e-10)))
    layers = coverage.chi_square(log_occupancy(mdp, pi).state_action, log_occupancy(mdp, mu).state_action)
    for ours, theirs in zip(layers, rf.chi_square_occupancy(exact, law_pi, law_mu)[0], strict=True):
        assert ours.item() == pytest.approx(float(theirs), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("components", ["full support", "deterministic"])
def test_kappa_and_second_moment_of_mixtures_are_those_of_exact_enumeration(
    kind: str, seed: int, components: str
) -> None:
    """Finite or not: components that omit actions can leave a target out of range although every pair has data."""
    mdp = random_problem(kind, seed)
    if components == "full support":
        parts = tuple(random_policy(mdp, seed + 10 * i) for i in range(3))
    else:
        parts = tuple(tuple(greedy(log) for log in random_policy(mdp, seed + 10 * i)) for i in range(4))
    weights = (0.5, 0.25, 0.25, 0.0)[: len(parts)] if components == "full support" else (0.25,) * 4
    behaviour = MixtureBehaviour(weights, parts)
    law_mu = rf.mixture_law(
        rational_problem(mdp),
        [(Fraction(w), rational_policy(mdp, part)) for w, part in zip(weights, parts, strict=True)],
    )
    for pi in (with_holes(mdp, 50 + seed), parts[0]):
        law_pi = rational_law(mdp, pi)
        expected = rf.kappa_by_sup(law_pi, law_mu)
        found, second = kappa(mdp, pi, behaviour), second_moment(mdp, pi, behaviour)
        if expected == math.inf:
            assert found.item() == math.inf
            assert second.item() == math.inf
            continue
        assert relative(found, expected) < 1e-9
        assert rf.second_moment_at_most(law_pi, law_mu, Fraction(second.item() * (1 + 1e-8)))
        assert not rf.second_moment_at_most(law_pi, law_mu, Fraction(second.item() * (1 - 1e-8)))


def greedy(log: Tensor) -> Tensor:
    best = log == log.amax(-1, keepdim=True)
    return torch.where(best, 0.0, -torch.inf).to(torch.float64)


def test_data_with_a_memory_and_data_from_a_file_go_through_the_trajectories() -> None:
    mdp = random_problem("deterministic", 1)
    pi = with_holes(mdp, 3)
    history = HistoryBehaviour(random_policy(mdp, 4), repeat=0.3)
    listed = enumerate_trajectories(mdp)
    keys = [
        tuple(zip(states, actions, strict=True))
        for states, actions in zip(listed.states.tolist(), listed.actions.tolist(), strict=True)
    ]

    def law_of(behaviour: Behaviour) -> rf.Law:
        probability = rational(behaviour.log_law(mdp, listed).exp().tolist())
        return {key: p for key, p in zip(keys, probability, strict=True) if p > 0}

    law_pi = rational_law(mdp, pi)
    assert relative(kappa(mdp, pi, history), rf.kappa_by_sup(law_pi, law_of(history))) < 1e-9
    every = sample_trajectories(mdp, random_policy(mdp, 9), 4000, torch.Generator().manual_seed(0))
    few = sample_trajectories(mdp, random_policy(mdp, 9), 4, torch.Generator().manual_seed(0))
    for data, finite in ((FixedDataset(every), True), (FixedDataset(few), False)):
        expected = rf.kappa_by_sup(law_pi, law_of(data))
        assert (expected < math.inf) == finite
        found = kappa(mdp, pi, data)
        assert relative(found, expected) < 1e-9 if finite else found.item() == math.inf
        occupied = behaviour_occupancy(mdp, data).state_action
        counted = rf.occupancy_state_action(plain(mdp), {key: float(p) for key, p in law_of(data).items()})
        for ours, theirs in zip(occupied, counted, strict=True):
            assert ours.exp().flatten().tolist() == pytest.approx([x for row in theirs for x in row], abs=1e-12)


# -- known values and extremes ---------------------------------------------------------------------------------------


def two_steps(first: Sequence[float], second: Sequence[float]) -> Policy:
    return tuple(torch.tensor([row], dtype=torch.float64).log() for row in (first, second))


@pytest.mark.parametrize(("flip", "expected"), [(0.0, math.inf), (1 / 64, 2111 / 63), (0.5, 3.0)])
def test_x1_a_mixture_on_one_state_per_layer(flip: float, expected: float) -> None:
    mdp = make("one-state", seed=0, horizon=2, actions=2)
    keep = [1 - flip, flip]
    mixture = MixtureBehaviour((0.5, 0.5), (two_steps(keep, keep), two_steps(keep[::-1], keep[::-1])))
    found = change_of_measure(mdp, two_steps([1, 0], [0, 1]), mixture)
    assert found.kappa.item() == pytest.approx(expected, rel=1e-12)
    assert found.lemma1.item() == pytest.approx(3, rel=1e-12)
    assert found.corollary6.item() == pytest.approx(4, rel=1e-12)


@pytest.mark.parametrize("exponent", [20, 25, 30, 60, 200])
def test_mixtures_that_all_but_never_cross_are_left_to_rationals(exponent: int) -> None:
    """κ = 1 + 1/(2p(1-p)) (X1); float64 would find 2e31 at p = 2^-60. The second moment is the same, its worst f being κ's."""
    mdp, flip = make("one-state", seed=0, horizon=2, actions=2), 2.0**-exponent
    keep = [1 - flip, flip]
    mixture = MixtureBehaviour((0.5, 0.5), (two_steps(keep, keep), two_steps(keep[::-1], keep[::-1])))
    pi = two_steps([1, 0], [0, 1])
    expected, tolerance = 1 + 1 / (2 * flip * (1 - flip)), 1e-7 if exponent == 25 else 1e-9
    both = tuple(torch.stack([table, table.flip(-1)]) for table in pi)
    assert kappa(mdp, both, mixture).tolist() == pytest.approx([expected] * 2, rel=tolerance)
    assert second_moment(mdp, pi, mixture).item() == pytest.approx(expected, rel=tolerance)
    inside = two_steps([0.5, 0.5], [0.5, 0.5])  # its value is not small, and was as wrong
    law_mu = rf.mixture_law(
        rational_problem(mdp), [(Fraction(1, 2), rational_policy(mdp, part)) for part in mixture.log_policies]
    )
    assert relative(kappa(mdp, inside, mixture), rf.kappa_by_sup(rational_law(mdp, inside), law_mu)) < tolerance


def test_data_without_components_that_float64_cannot_resolve_are_refused() -> None:
    mdp = make("one-state", seed=0, horizon=2, actions=2)
    history = HistoryBehaviour(two_steps([0.5, 0.5], [0.5, 0.5]), repeat=1 - 2.0**-48)
    with pytest.raises(InvalidInputError, match="condition below"):
        kappa(mdp, two_steps([1, 0], [0, 1]), history)


@pytest.mark.parametrize("probability", [1e-12, 1e-100, 1e-200])
def test_rare_data_are_rare_and_not_missing(probability: float) -> None:
    """Bandit: κ = 1 + χ²((1,0) ‖ (p,1-p)) = 1/p, whichever way it is computed."""
    mdp = make("one-state", seed=0, horizon=1, actions=2)
    pi = (torch.tensor([[0.0, -torch.inf]], dtype=torch.float64),)
    mu = (torch.tensor([[math.log(probability), math.log1p(-probability)]], dtype=torch.float64),)
    found = change_of_measure(mdp, pi, mu)
    for value in (found.kappa, kappa_linear_solve(mdp, pi, mu), found.lemma1, found.c_inf, found.second_moment):
        assert value.item() == pytest.approx(1 / probability, rel=1e-12)


def test_what_underflows_as_a_probability_is_still_covered() -> None:
    """μ = e^{-800}, which is 0 as a double, and π as rare: the ratio is 1."""
    mdp = make("one-state", seed=0, horizon=2, actions=2)
    rare = torch.tensor([[0.0, -800.0]], dtype=torch.float64)
    rarer = torch.tensor([[0.0, -801.0]], dtype=torch.float64)
    found = change_of_measure(mdp, (rare, rare), (rare, rare))
    assert [found.kappa.item(), found.lemma1.item(), found.c_inf.item()] == [1.0, 1.0, 1.0]
    assert found.second_moment.item() == pytest.approx(1.0, rel=1e-12)
    assert change_of_measure(mdp, (rare, rare), (rare, rarer)).c_inf.item() == pytest.approx(math.e, rel=1e-12)


def test_a_logarithm_below_the_smallest_double_is_no_hole() -> None:
    """π on an action of probability e^{-1000}: κ is e^{1000}, beyond a double, hence inf; its square root is not."""
    mdp = make("one-state", seed=0, horizon=1, actions=2)
    mu = (torch.tensor([[0.0, -400.0]], dtype=torch.float64),)
    pi = (torch.tensor([[-torch.inf, 0.0]], dtype=torch.float64),)
    assert kappa(mdp, pi, mu).item() == pytest.approx(math.exp(400), rel=1e-12)
    assert kappa_linear_solve(mdp, pi, mu).item() == pytest.approx(math.exp(400), rel=1e-12)


def test_uncovered_pairs_and_states_give_infinity_and_never_nan() -> None:
    mdp = random_problem("deterministic", 1)
    everywhere = random_policy(mdp, 0)
    partial = tuple(greedy(log) for log in random_policy(mdp, 1))
    found = change_of_measure(mdp, everywhere, partial)
    for value in (found.kappa, found.lemma1, found.corollary6, found.c_inf, found.second_moment):
        assert value.item() == math.inf
    assert kappa_linear_solve(mdp, everywhere, partial).item() == math.inf
    same = change_of_measure(mdp, partial, partial)
    assert [same.kappa.item(), same.lemma1.item(), same.c_inf.item()] == [1.0, 1.0, 1.0]
    assert same.second_moment.item() == pytest.approx(1.0, rel=1e-12)


def test_x4_on_trees_kappa_multiplies_and_the_lock_doubles() -> None:
    mdp = make("combination-lock", seed=0, horizon=30)
    right = tuple(torch.where(table > table.amin(-1, keepdim=True), 0.0, -torch.inf) for table in lock_actions(mdp))
    assert kappa(mdp, right, mdp.log_reference).item() == pytest.approx(2.0**30, rel=1e-12)


def lock_actions(mdp: RegularizedMDP) -> list[Tensor]:
    """1 for the action that stays on the good path; in the bad state either will do."""
    marks = []
    for h in range(mdp.horizon):
        table = torch.zeros_like(mdp.reference[h])
        if h < mdp.horizon - 1:
            target = mdp.transitions[h].edges()[0][..., 0]
            good = target[0] != target[-1, 0] if len(target) > 1 else target[0] == target[0].amin()
            table[0] = good.to(torch.float64)
        else:
            table[0] = (mdp.reward[h][0] == mdp.reward[h][0].max()).to(torch.float64)
        if len(table) > 1:
            table[1:, 0] = 1.0
        marks.append(table)
    return marks


# -- structure -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_test_function_attains_kappa_and_no_other_exceeds_it(kind: str) -> None:
    mdp = random_problem(kind, 3)
    pi, mu = with_holes(mdp, 1), random_policy(mdp, 2)
    best = optimal_test_function(mdp, pi, mu)
    listed = enumerate_trajectories(mdp)
    law_pi, law_mu = listed.log_law(pi).exp(), listed.log_law(mu).exp()

    def quotient(f: Policy) -> float:
        total = listed.sum_along(tuple(torch.where(v, t, 0.0) for v, t in zip(mdp.valid, f, strict=True)))
        return ((law_pi @ total) ** 2 / (law_mu @ total**2)).item()

    attained = kappa_closed_form(mdp, pi, mu).item()
    assert quotient(best) == pytest.approx(attained, rel=1e-12)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        bent = tuple(t + 0.3 * torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in best)
        assert quotient(bent) < attained
    with pytest.raises(InvalidInputError, match="infinite kappa"):
        optimal_test_function(mdp, mu, with_holes(mdp, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_what_its_elements_are_alone(kind: str) -> None:
    mdp = random_problem(kind, 0)
    pis, mus = [with_holes(mdp, i) for i in range(3)], [random_policy(mdp, 10 + i) for i in range(3)]
    together = change_of_measure(
        mdp,
        tuple(torch.stack(t) for t in zip(*pis, strict=True)),
        tuple(torch.stack(t) for t in zip(*mus, strict=True)),
    )
    for i, (pi, mu) in enumerate(zip(pis, mus, strict=True)):
        alone = change_of_measure(mdp, pi, mu)
        for name in ("kappa", "lemma1", "corollary6", "c_inf", "second_moment"):
            assert getattr(together, name)[i].item() == pytest.approx(getattr(alone, name).item(), rel=1e-12), name


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_run_through_every_coefficient(kind: str) -> None:
    mdp = random_problem(kind, 0, horizon=2)
    start = [
        torch.randn(table.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        for table in mdp.reference
    ]

    def policies(*logits: Tensor) -> tuple[Policy, Policy]:
        """Two policies that depend on the same numbers in different ways."""
        first, second = (
            tuple(
                torch.log_softmax(torch.where(valid, sign * table, -torch.inf), -1)
                for valid, table in zip(mdp.valid, logits, strict=True)
            )
            for sign in (1.0, -0.5)
        )
        return first, second

    for coefficient in (kappa_closed_form, kappa_linear_solve, coverage.lemma1, coverage.c_inf, second_moment):
        leaves = [table.clone().requires_grad_() for table in start]
        assert torch.autograd.gradcheck(lambda *t, c=coefficient: c(mdp, *policies(*t)), leaves, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_logarithms_of_occupancies_and_moments_are_logarithms_of_them(kind: str) -> None:
    mdp, policy = random_problem(kind, 5), with_holes(random_problem(kind, 5), 6)
    plain_d, log_d = occupancy(mdp, policy), log_occupancy(mdp, policy)
    for ours, logs in zip((*plain_d.state, *plain_d.state_action), (*log_d.state, *log_d.state_action), strict=True):
        torch.testing.assert_close(logs.exp(), ours, rtol=1e-13, atol=0)
        assert torch.equal(logs == -torch.inf, ours == 0)
    torch.testing.assert_close(
        log_moment_matrix(mdp, policy).exp(), moment_matrix(mdp, policy), rtol=1e-13, atol=1e-300
    )


def test_tables_that_are_no_policies_and_problems_too_large_are_refused() -> None:
    mdp = random_problem("dense", 0)
    with pytest.raises(InvalidInputError, match="log_pi"):
        change_of_measure(mdp, tuple(log - 1 for log in random_policy(mdp, 0)), mdp.log_reference)
    first, second, *rest = random_policy(mdp, 0)
    with pytest.raises(InvalidInputError, match=r"mu\[1\]"):
        kappa(mdp, mdp.log_reference, (first, second + 1, *rest))
    large = make("taxi", seed=0, horizon=2)
    with pytest.raises(InvalidInputError, match="at most 3000 pairs"):
        second_moment(large, large.log_reference, large.log_reference)
    assert kappa(large, large.log_reference, large.log_reference).item() == 1.0


@pytest.mark.parametrize("horizon", [1, 2])
def test_a_batch_of_behaviours_with_a_memory_is_one_by_one(horizon: int) -> None:
    """At H = 1 there are as many pairs as behaviours, so that their axes could be taken for each other."""
    mdp = make("one-state", horizon=horizon, actions=2)
    target, *parts = (random_policy(mdp, seed) for seed in range(3))
    batch = tuple(torch.stack(tables) for tables in zip(*parts, strict=True))
    found = change_of_measure(mdp, target, HistoryBehaviour(batch, repeat=0.5))
    each = [change_of_measure(mdp, target, HistoryBehaviour(part, repeat=0.5)) for part in parts]
    for name in ("kappa", "lemma1", "corollary6", "c_inf", "second_moment"):
        expected = [getattr(one, name).item() for one in each]
        assert getattr(found, name).tolist() == pytest.approx(expected, rel=1e-11), name
