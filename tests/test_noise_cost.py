"""O6, O7: what noisy returns cost, on which data they cost least, and what a verifier that errs does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from convert import plain
from plants import Plant, check_that_the_verdict_turns, function, scaled, scaled_tables
from problems import random_policy, random_problem

import tbrm_theory as tt
from tbrm_theory import dynamic_programming, noise_cost, population
from tbrm_theory.behaviours import Behaviour, HistoryBehaviour, MarkovBehaviour, MixtureBehaviour
from tbrm_theory.claims import noisy_rewards
from tbrm_theory.claims.derivatives import ListedLoss, tables
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.named_behaviours import random_markov, replay_of_deterministic, with_holes
from tbrm_theory.noise_cost import best_data_on_tree
from tbrm_theory.occupancy import enumerate_trajectories
from tbrm_theory.statistics import CHECK_FAILURE_RATE
from tbrm_theory.training import exact_regret
from tbrm_theory.transitions import DenseTransition, DeterministicTransition

# -- the claims can fail ---------------------------------------------------------------------------------------------


def optimal_data(original: Any) -> Any:
    """The optimum's own data for the best ones."""
    return lambda mdp, *, solution: solution.log_policy


BUGS: dict[str, Plant] = {
    "O6.a": function(noise_cost, "noise_cost", scaled(1 + 1e-9)),
    "O6.b": function(noise_cost, "best_data_on_tree", optimal_data),
    "O6.c": function(noise_cost, "noise_cost", scaled(0.5)),
    "O7.a": function(population, "soft_plan", scaled_tables(1 + 1e-9)),
    "O7.b": function(dynamic_programming, "regret", scaled(1 + 1e-9)),
}


@pytest.mark.parametrize("claim_id", BUGS)
def test_a_planted_bug_turns_the_verdict(claim_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_the_verdict_turns(claim_id, BUGS[claim_id], monkeypatch, None)


def test_a_verifier_whose_errors_are_swapped_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only V_θ tells a from b: with them swapped the policies still agree, and O7.a is violated all the same."""
    original = noisy_rewards._fit
    monkeypatch.setattr(noisy_rewards, "_fit", lambda case, a, b: original(case, b, a))
    case = noisy_rewards.outcome_problem(0)
    comparison = noisy_rewards.verifier_that_errs(case)
    horizon = case.mdp.horizon
    torch.testing.assert_close(comparison.left[:, :horizon], comparison.right[:, :horizon])
    assert not comparison.holds
    assert noisy_rewards.regret_of_a_verifier_that_errs(case).holds


# -- the constant ----------------------------------------------------------------------------------------------------


def by_enumeration(mdp: RegularizedMDP, law: reference.Law, variance: float) -> float:
    """``β/2 · tr(Σ W)`` by sums over trajectories, one pseudo-inverse, no sweep."""
    problem = plain(mdp)
    star = reference.trajectory_law(problem, reference.optimal_policy(problem))
    pairs = reference.visited_pairs(law, star)

    def features(trajectory: reference.Trajectory) -> np.ndarray[Any, Any]:
        found = np.zeros(len(pairs))
        for h, (s, a) in enumerate(trajectory):
            found[pairs.index((h, s, a))] = 1
        return found

    moments = sum(p * np.outer(features(t), features(t)) for t, p in law.items())
    spread = np.zeros_like(moments)
    for start, rho in enumerate(problem.initial):
        own = {t: p / rho for t, p in star.items() if t[0][0] == start}
        mean = sum((p * features(t) for t, p in own.items()), np.zeros(len(pairs)))
        for t, p in own.items():
            spread += rho * p * np.outer(features(t) - mean, features(t) - mean)
    covariance = variance / problem.beta**2 * np.linalg.pinv(moments, rcond=1e-11, hermitian=True)
    return problem.beta / 2 * float(np.trace(covariance @ spread))


DATA: dict[str, Callable[[RegularizedMDP], Behaviour]] = {
    "Markov": lambda mdp: MarkovBehaviour(random_policy(mdp, 1)),
    "mixture": lambda mdp: MixtureBehaviour((0.3, 0.7), (random_policy(mdp, 1), random_policy(mdp, 2))),
    "history": lambda mdp: HistoryBehaviour(random_policy(mdp, 3), 0.4),
}


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("kind", DATA)
def test_constant_is_that_of_all_trajectories(kind: str, seed: int) -> None:
    """On merging states, with a missing action, and with a start of probability 0."""
    mdp = random_problem("deterministic", seed)
    behaviour = DATA[kind](mdp)
    listed = enumerate_trajectories(mdp)
    probability = behaviour.log_law(mdp, listed).exp().tolist()
    steps = torch.stack([listed.states, listed.actions], -1).tolist()
    law = {tuple((s, a) for s, a in rows): p for rows, p in zip(steps, probability, strict=True) if p > 0}
    assert len(law) >= 10
    found = noise_cost.noise_cost(mdp, behaviour, noise_variance=0.09).item()
    assert found == pytest.approx(by_enumeration(mdp, law, 0.09), rel=1e-9)


def test_batches_of_problems_and_of_data() -> None:
    mdp = tt.make("one-state", horizon=3, batch=4, seed=1)
    single = tt.make("one-state", horizon=3, seed=1)
    policies = tuple(torch.stack(pair) for pair in zip(random_policy(single, 1), random_policy(single, 2), strict=True))
    assert noise_cost.noise_cost(mdp, mdp.log_reference, noise_variance=1.0).shape == (4,)
    both = noise_cost.noise_cost(single, policies, noise_variance=1.0)
    for i in range(2):
        own = noise_cost.noise_cost(single, tuple(table[i] for table in policies), noise_variance=1.0)
        torch.testing.assert_close(both[i], own)


@pytest.mark.parametrize("family", ["deterministic-tree", "deterministic-dag"])
def test_mean_regret_of_drawn_data_sets_approaches_it(family: str) -> None:
    """10,000 data sets of 300,000 noisy returns, fitted by their moment matrices."""
    mdp = tt.make(family, seed=3, horizon=2, actions=2)
    mu = random_markov(mdp, 0)
    listed, solution, draws = enumerate_trajectories(mdp), tt.solve(mdp), np.random.default_rng(0)
    law = listed.log_law(mu.log_policy).exp()
    size, sets, deviation = 300_000, 10_000, 0.3
    counts = torch.from_numpy(draws.multinomial(size, (law / law.sum()).numpy(), sets).astype(np.float64))
    noise = torch.from_numpy(draws.standard_normal(counts.shape)) * deviation / mdp.beta * counts.rsqrt()
    loss = ListedLoss.of(mdp, listed, counts / size)
    inverse = torch.linalg.pinv(loss.moments, hermitian=True, rtol=1e-12)
    error = (inverse @ ((loss.weights * noise) @ loss.visits).unsqueeze(-1)).squeeze(-1)
    regret = exact_regret(mdp, population.soft_plan(mdp, tables(mdp, loss.reward + error)), solution)
    found = noise_cost.noise_cost(mdp, mu, noise_variance=deviation**2, solution=solution).item()
    standard = (size * regret.mean().item() - found) / (size * regret.std().item() / math.sqrt(sets))
    assert math.erfc(abs(standard) / math.sqrt(2)) > CHECK_FAILURE_RATE
    assert size * regret.std().item() / math.sqrt(sets) < 0.02 * found  # so a constant 10 % off would be seen


def test_data_that_do_not_identify_the_policy_cost_infinitely_much() -> None:
    mdp = random_problem("deterministic", 1)
    assert noise_cost.noise_cost(mdp, with_holes(mdp, 0), noise_variance=0.1).item() == math.inf
    chain = tt.make("one-state", horizon=2, actions=2)
    both = replay_of_deterministic(chain)  # every pair is visited, not every trajectory (X1)
    assert noise_cost.noise_cost(chain, both, noise_variance=0.1).item() == math.inf
    assert noise_cost.noise_cost(chain, chain.log_reference, noise_variance=0.0).item() == 0.0


@pytest.mark.parametrize("variance", [-1.0, math.inf, math.nan])
def test_a_variance_that_is_none_is_refused(variance: float) -> None:
    mdp = tt.make("one-state")
    with pytest.raises(tt.InvalidInputError, match="noise_variance: expected"):
        noise_cost.noise_cost(mdp, mdp.log_reference, noise_variance=variance)


def test_stochastic_transitions_are_refused() -> None:
    mdp = random_problem("dense", 1)
    for call in (
        lambda: noise_cost.noise_cost(mdp, mdp.log_reference, noise_variance=1.0),
        lambda: best_data_on_tree(mdp),
    ):
        with pytest.raises(tt.InvalidInputError, match="mdp: expected deterministic"):
            call()


# -- the best data on trees ------------------------------------------------------------------------------------------


def test_no_other_data_are_better_on_a_tree() -> None:
    """At the best data the derivative of the cost vanishes in every direction, and far from them it is larger."""
    mdp = tt.make("deterministic-tree", seed=5, horizon=3, actions=2, roots=2, missing=0.2)
    best = best_data_on_tree(mdp)
    least = noise_cost.noise_cost(mdp, best, noise_variance=1.0).item()
    for seed in range(3):
        direction = random_policy(mdp, seed)

        def cost(step: float, towards: tuple[torch.Tensor, ...] = direction) -> float:
            moved = [
                torch.where(valid, own + step * torch.where(valid, there, 0.0), -torch.inf)
                for own, there, valid in zip(best, towards, mdp.valid, strict=True)
            ]
            mu = tuple(torch.log_softmax(table, dim=-1) for table in moved)
            return noise_cost.noise_cost(mdp, mu, noise_variance=1.0).item()

        assert abs(cost(1e-4) - cost(-1e-4)) / 2e-4 < 1e-4 * least
        assert cost(0.1) > least * (1 + 1e-5)
        assert cost(1.0) > least * 1.01


def test_best_data_where_the_optimum_is_all_but_certain() -> None:
    """P rounds to 1 on one trajectory: 1 - P is not computed as a difference, and half the data go there."""
    mdp = tt.make("deterministic-tree", seed=0, horizon=2, actions=2, beta=0.002)
    star = tt.solve(mdp).log_policy
    best = best_data_on_tree(mdp)
    listed = enumerate_trajectories(mdp)
    p, q = listed.log_law(star).exp(), listed.log_law(best).exp()
    assert p.max().item() == 1.0
    assert q.sum().item() == pytest.approx(1)
    assert q[p.argmax()].item() == pytest.approx(0.5, abs=1e-6)


def test_a_tree_without_a_choice_has_one_kind_of_data() -> None:
    mdp = tt.make("deterministic-tree", horizon=3, actions=1)
    assert all(bool((table == 0).all()) for table in best_data_on_tree(mdp))
    assert noise_cost.noise_cost(mdp, best_data_on_tree(mdp), noise_variance=1.0).item() == 0.0


def arms(kernel: DeterministicTransition | DenseTransition, states: int) -> RegularizedMDP:
    """Three arms, then states with a single action."""
    return RegularizedMDP(
        beta=0.5,
        initial=torch.tensor([1.0]),
        reward=[torch.tensor([[0.0, 0.5, 1.0]]), torch.zeros(states, 1)],
        reference=[torch.full((1, 3), 1 / 3, dtype=torch.float64), torch.ones(states, 1)],
        transitions=[kernel],
    )


@pytest.mark.parametrize("successors", [[0, 0, 0], [0, 1, 1]])
@pytest.mark.parametrize("dense", [False, True])
def test_states_that_merge_are_refused_even_without_a_choice_to_follow(successors: list[int], dense: bool) -> None:
    states = max(successors) + 1
    kernel: DeterministicTransition | DenseTransition = DeterministicTransition(torch.tensor([successors]), states)
    if dense:
        kernel = DenseTransition(torch.nn.functional.one_hot(torch.tensor([successors]), states).to(torch.float64))
    mdp = arms(kernel, states)
    with pytest.raises(tt.InvalidInputError, match=r"transitions\[0\]: expected a tree"):
        best_data_on_tree(mdp)
    apart = arms(DeterministicTransition(torch.tensor([[2, 0, 1]]), 3), 3)
    assert best_data_on_tree(apart)[0].exp().sum().item() == pytest.approx(1)


def test_states_that_merge_late_or_two_roots_that_meet_are_refused() -> None:
    late = tt.make("combination-lock", horizon=3)
    with pytest.raises(tt.InvalidInputError, match=r"transitions\[1\]: expected a tree, found 3 pairs"):
        best_data_on_tree(late)
    meeting = RegularizedMDP(
        beta=1.0,
        initial=torch.tensor([0.5, 0.5]),
        reward=[torch.zeros(2, 1), torch.zeros(1, 2)],
        reference=[torch.ones(2, 1), torch.full((1, 2), 0.5)],
        transitions=[DeterministicTransition(torch.zeros(2, 1, dtype=torch.int64), 1)],
    )
    with pytest.raises(tt.InvalidInputError, match=r"transitions\[0\]: expected a tree, found 2 pairs"):
        best_data_on_tree(meeting)


def test_a_batch_of_problems_is_refused() -> None:
    with pytest.raises(tt.InvalidInputError, match="mdp: expected one problem"):
        best_data_on_tree(tt.make("one-state", horizon=1, batch=2))
