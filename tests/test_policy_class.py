"""The worst policy for given data against all deterministic policies, one by one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from problems import KINDS, random_policy, random_problem

from tbrm_theory import policy_class
from tbrm_theory.behaviours import MixtureBehaviour
from tbrm_theory.coverage import c_inf, lemma1
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.families import make
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.policy_class import largest_c_inf, largest_chi_square, largest_reach
from tbrm_theory.transitions import DenseTransition
from tests import reference as rf
from tests.convert import plain


def deterministic_laws(mdp: rf.PlainMDP) -> list[rf.Law]:
    """The law of every deterministic policy on existing actions."""
    cells = [(h, s) for h, layer in enumerate(mdp.reference) for s in range(len(layer))]
    existing = [[a for a, p in enumerate(mdp.reference[h][s]) if p > 0] for h, s in cells]
    laws = []
    for choice in itertools.product(*existing):
        chosen = dict(zip(cells, choice, strict=True))
        policy = rf.tabulate(mdp.reference, lambda h, s, a, chosen=chosen: float(chosen[h, s] == a))
        laws.append(rf.trajectory_law(mdp, policy))
    return laws


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_no_deterministic_policy_is_worse_and_one_is_as_bad(kind: str, seed: int) -> None:
    mdp = random_problem(kind, seed)
    mu = random_policy(mdp, 20 + seed)
    naive = plain(mdp)
    laws = deterministic_laws(naive)
    data = rf.trajectory_law(naive, [mdp.rows(h, log.exp()) for h, log in enumerate(mu)])
    assert largest_c_inf(mdp, mu) == pytest.approx(max(rf.c_infinity(naive, law, data) for law in laws), rel=1e-12)
    found = largest_chi_square(mdp, mu)
    assert found.exact
    assert found.lower == found.upper == pytest.approx(max(rf.lemma1(naive, law, data) for law in laws), rel=1e-12)
    assert lemma1(mdp, found.log_policy, mu).item() == pytest.approx(found.lower, rel=1e-12)
    for h, reach in enumerate(largest_reach(mdp)):
        best = [max(rf.occupancy_state(naive, law)[h][s] for law in laws) for s in range(len(reach))]
        assert reach.tolist() == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_on_larger_problems_search_and_bound_enclose_the_truth(
    kind: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mdp = random_problem(kind, seed)
    mu = random_policy(mdp, 40 + seed)
    truth = largest_chi_square(mdp, mu)
    monkeypatch.setattr(policy_class, "MOST_POLICIES", 0)
    found = largest_chi_square(mdp, mu)
    assert not found.exact
    assert 0.9 * truth.lower <= found.lower <= truth.lower * (1 + 1e-12)
    assert truth.upper <= found.upper * (1 + 1e-12)
    assert lemma1(mdp, found.log_policy, mu).item() == pytest.approx(found.lower, rel=1e-12)


def test_every_policy_is_within_the_coefficients_of_the_class() -> None:
    mdp = make("frozen-lake", seed=0, size=4, horizon=5)
    mu = mdp.log_reference
    worst, chi = largest_c_inf(mdp, mu), largest_chi_square(mdp, mu)
    assert 1 < chi.lower <= chi.upper < math.inf
    for seed in range(10):
        pi = random_policy(mdp, seed)
        assert c_inf(mdp, pi, mu).item() <= worst
        assert lemma1(mdp, pi, mu).item() <= chi.lower * (1 + 1e-12)


def test_what_some_policy_does_and_the_data_do_not_is_infinite() -> None:
    mdp = random_problem("deterministic", 1)
    hole = tuple(
        torch.log_softmax(torch.where(log == log.amax(-1, keepdim=True), log, -torch.inf), -1)
        for log in random_policy(mdp, 0)
    )
    assert largest_c_inf(mdp, hole) == math.inf
    found = largest_chi_square(mdp, hole)
    assert found.lower == found.upper == math.inf


def test_mixtures_go_by_their_occupancies_and_batches_are_refused() -> None:
    mdp = random_problem("dense", 0)
    one, other = random_policy(mdp, 1), random_policy(mdp, 2)
    both = MixtureBehaviour((0.5, 0.5), (one, other))
    assert 1 < largest_c_inf(mdp, both) <= 2 * min(largest_c_inf(mdp, one), largest_c_inf(mdp, other))
    batch = tuple(torch.stack(tables) for tables in zip(one, other, strict=True))
    with pytest.raises(InvalidInputError, match="found a batch"):
        largest_c_inf(mdp, batch)


def test_what_is_infinite_behind_a_transition_of_probability_0_is_no_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """One uncovered pair at the end, and kernels that lead to its state from some pairs only."""
    monkeypatch.setattr(policy_class, "MOST_POLICIES", 1)
    uniform = torch.full((2, 2), 0.5, dtype=torch.float64)
    kernel = DenseTransition(torch.tensor([[[1, 0], [0.5, 0.5]], [[0, 1], [0, 1]]], dtype=torch.float64))
    mdp = RegularizedMDP(
        beta=1.0,
        initial=torch.tensor([1.0, 0.0]),
        reward=[torch.zeros(2, 2)] * 3,
        reference=[uniform] * 3,
        transitions=[kernel] * 2,
    )
    omitting = torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=torch.float64).log()
    assert largest_chi_square(mdp, (uniform.log(), uniform.log(), omitting)).upper == math.inf
    covered = largest_chi_square(mdp, (uniform.log(),) * 3)
    assert covered.lower <= covered.upper < math.inf
