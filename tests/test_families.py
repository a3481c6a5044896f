"""Each family is the problem that it says it is, and ``make`` refuses what it does not know.

The optimum of a small instance of every family is compared with naive enumeration, the named numbers with theory.md's.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

import tbrm_theory.families as families
from tbrm_theory.dynamic_programming import objective, solve
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.families import FAMILIES, make
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.random_tables import draw_existing, draw_reference, draw_simplex, draw_subset, seeded
from tbrm_theory.registry import Interval, Option
from tbrm_theory.transitions import DeterministicTransition, SparseTransition
from tests import reference as rf
from tests.convert import plain

approx = pytest.approx
BOTH = pytest.mark.parametrize("kind", ["uniform", "dirichlet"])

SMALL: dict[str, dict[str, Any]] = {
    "two-armed-bandit": {},
    "chain": {"horizon": 4, "states": 3, "slip": 0.25},
    "combination-lock": {"horizon": 4, "actions": 3, "scrambled": True},
    "one-state": {"horizon": 3, "actions": 3, "missing": 0.4},
    "dense-random": {"horizon": 3, "states": 3, "actions": 2, "missing": 0.4, "ragged": True},
    "garnet": {"horizon": 3, "states": 4, "actions": 3, "missing": 0.4, "ragged": True},
    "deterministic-dag": {"horizon": 4, "states": 4, "actions": 3, "missing": 0.4, "ragged": True},
    "deterministic-tree": {"horizon": 4, "actions": 3, "roots": 2, "missing": 0.4},
    "token-tree": {"horizon": 3, "vocabulary": 3, "prompts": 2},
    "frozen-lake": {"horizon": 4, "slippery": True},
    "cliff-walking": {"horizon": 3},
    "taxi": {"horizon": 2},
    "modular-arithmetic": {"modulus": 3, "prompts": 2},
    "balanced-brackets": {"pairs": 2},
    "shortest-path": {"nodes": 4, "prompts": 2},
}
FREE_OF_SEED = {
    "two-armed-bandit",
    "chain",
    "combination-lock",
    "frozen-lake",
    "cliff-walking",
    "taxi",
    "balanced-brackets",
}
"""Whose default instance is always the same: what is random there only is so on demand."""
BATCHED = [name for name, family in FAMILIES.items() if "batch" in family.options]


def document(mdp: RegularizedMDP) -> str:
    return json.dumps(mdp.to_document())


def tables_per_distinct_layer(mdp: RegularizedMDP) -> int:
    """How many reward tables, reference tables and kernels the layers share."""
    return len({id(part) for part in (*mdp.reward, *mdp.reference, *mdp.transitions)})


# --- Every family -------------------------------------------------------------------------------------------


def test_every_family_is_listed_here() -> None:
    assert set(SMALL) == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
@BOTH
def test_optimum_agrees_with_naive_enumeration(name: str, kind: str) -> None:
    """J_β(π*) = β E_ρ V* (I2), V* by recursion over lists."""
    options = SMALL[name] | ({"reference": kind} if "reference" in FAMILIES[name].options else {})
    mdp = make(name, seed=3, **options)
    naive = plain(mdp)
    values = [rf.optimal_value(naive, 0, s) if start > 0 else 0.0 for s, start in enumerate(naive.initial)]
    expected = naive.beta * math.fsum(p * v for p, v in zip(naive.initial, values, strict=True))
    assert solve(mdp).objective.item() == approx(expected, rel=1e-12)
    assert mdp.batch_shape == ()


@pytest.mark.parametrize("name", FAMILIES)
def test_deterministic_families_have_the_gibbs_form(name: str) -> None:
    """``deterministic`` is true of the default instance; there V*(s_1) = log Σ_τ exp Σ R_β (I2)."""
    mdp = make(name)
    assert mdp.is_deterministic == FAMILIES[name].deterministic
    small = make(name, **SMALL[name])
    if small.is_deterministic:
        naive = plain(small)
        start = max(range(len(naive.initial)), key=naive.initial.__getitem__)
        assert solve(small).v[0][start].item() == approx(rf.gibbs_value(naive, 0, start), rel=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_seed_decides_everything(name: str) -> None:
    same, again, other = (document(make(name, seed=seed, **SMALL[name])) for seed in (5, 5, 6))
    assert same == again
    default = [document(make(name, seed=seed)) for seed in (5, 6)] if name != "taxi" else ["", ""]
    assert (default[0] == default[1]) == (name in FREE_OF_SEED)
    assert (same == other) == (name in FREE_OF_SEED - {"combination-lock"})  # scrambled there


@pytest.mark.parametrize("name", FAMILIES)
def test_default_leaves_something_to_learn(name: str) -> None:
    """J* − J(π_ref) is at least 0.05 of the range of rewards."""
    mdp = make(name)
    rewards = torch.cat([table[valid] for table, valid in zip(mdp.reward, mdp.valid, strict=True)])
    gap = solve(mdp).objective - objective(mdp, mdp.log_reference)
    assert gap.item() >= 0.05 * (rewards.max() - rewards.min()).item() > 0
    assert solve(mdp).certified


@pytest.mark.parametrize("name", FAMILIES)
def test_dirichlet_references_are_drawn_and_alter_nothing_else(name: str) -> None:
    if "reference" not in FAMILIES[name].options:
        assert name == "two-armed-bandit"
        return
    uniform_mdp, drawn_mdp = (make(name, reference=kind, **SMALL[name]) for kind in ("uniform", "dirichlet"))
    assert plain(uniform_mdp).successors == plain(drawn_mdp).successors
    assert plain(uniform_mdp).reward == plain(drawn_mdp).reward
    for uniform, drawn in zip(uniform_mdp.reference, drawn_mdp.reference, strict=True):
        count = (uniform > 0).sum(-1, keepdim=True)
        assert torch.equal(uniform, (uniform > 0).double() / count)
        existing = drawn[(drawn > 0) & (count > 1)]
        assert len(set(existing.tolist())) == len(existing)
        assert torch.equal(drawn.sum(-1).round(decimals=12), torch.ones(len(drawn), dtype=torch.float64))


# --- Options ------------------------------------------------------------------------------------------------


def test_unknown_names_are_answered_with_the_valid_ones() -> None:
    with pytest.raises(
        InvalidInputError, match=r"family: unknown family 'frozen-lke'; did you mean 'frozen-lake'\?"
    ) as e:
        make("frozen-lke")
    assert all(name in e.value.problem for name in FAMILIES)
    with pytest.raises(InvalidInputError, match="unknown family 'zzzz'; expected one of "):
        make("zzzz")
    with pytest.raises(InvalidInputError, match="chain: unknown option 'horzion'; did you mean 'horizon'") as e:
        make("chain", horzion=3)
    assert all(option in e.value.problem for option in FAMILIES["chain"].options)


def test_options_are_read_off_the_signature() -> None:
    assert FAMILIES["frozen-lake"].options["size"] == Option("size", 4, int, None, (4, 8, 16))
    assert FAMILIES["frozen-lake"].options["beta"] == Option(
        "beta", None, float, Interval(0, without_low=True), may_be_none=True
    )
    assert list(FAMILIES["chain"].options) == ["horizon", "states", "slip", "beta", "reference"]
    assert all(family.summary.endswith(".") and family.options for family in FAMILIES.values())


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("horizon", 0, "an integer, at least 1"),
        ("horizon", True, "an integer, at least 1"),
        ("horizon", 2.0, "an integer, at least 1"),
        ("horizon", "2", "an integer, at least 1"),
        ("horizon", None, "an integer, at least 1"),
        ("states", 1, "an integer, at least 2"),
        ("slip", 1.0, "a finite number, at least 0 and less than 1"),
        ("slip", -0.1, "a finite number, at least 0 and less than 1"),
        ("slip", math.nan, "a finite number, at least 0 and less than 1"),
        ("beta", 0, "a finite number, more than 0"),
        ("beta", math.inf, "a finite number, more than 0"),
        ("beta", 10**400, "a finite number, more than 0"),
        ("beta", "0.5", "a finite number, more than 0"),
        ("beta", False, "a finite number, more than 0"),
        ("reference", "greedy", "one of 'uniform', 'dirichlet'"),
        ("reference", 1, "one of 'uniform', 'dirichlet'"),
        ("seed", -1, "an integer, at least 0 and less than"),
        ("seed", 2**63, "an integer, at least 0 and less than"),
    ],
)
def test_wrong_values_are_refused(option: str, value: Any, expected: str) -> None:
    seed, options = (value, {}) if option == "seed" else (0, {option: value})
    with pytest.raises(InvalidInputError) as e:
        FAMILIES["chain"].make(seed, options)
    assert e.value.where == f"chain.{option}"
    assert e.value.problem.startswith(f"expected {expected}")
    assert e.value.problem.endswith(f"found {value!r}")


@pytest.mark.parametrize(
    ("name", "option", "value", "expected"),
    [
        ("frozen-lake", "size", 5, "one of 4, 8, 16"),
        ("frozen-lake", "horizon", 0, "an integer, at least 1, or None"),
        ("frozen-lake", "slippery", 1, "True or False"),
        ("balanced-brackets", "kinds", 4, "an integer, at least 1 and at most 3"),
        ("token-tree", "rewards", "none", "one of 'outcome', 'step'"),
        ("token-tree", "correct", 0.0, "a finite number, more than 0 and at most 1"),
    ],
)
def test_wrong_values_of_other_kinds_are_refused(name: str, option: str, value: Any, expected: str) -> None:
    with pytest.raises(InvalidInputError) as e:
        make(name, **{option: value})
    assert str(e.value) == f"{name}.{option}: expected {expected}, found {value!r}"


def test_numbers_of_other_libraries_are_numbers() -> None:
    mdp = make("chain", horizon=np.int32(2), beta=1, slip=np.float32(0.5))
    assert (mdp.horizon, mdp.beta.item(), mdp.is_deterministic) == (2, 1.0, False)


# --- By hand ------------------------------------------------------------------------------------------------


def frozen_value_loss(mdp: rf.PlainMDP, logits: list[float]) -> float:
    """The iterative variant: E_μ [V(0) + log π_θ − R_β]² with V frozen at the zero logits, uniform data (X5)."""
    law = rf.trajectory_law(mdp, [[[0.5, 0.5]]])
    table, own_value = [[logits]], rf.log_sum_exp(logits)
    return rf.expectation(law, lambda t: (rf.residual_telescoped(mdp, table, t) - own_value + math.log(2)) ** 2)


@pytest.mark.parametrize(
    ("folded", "stays", "moves", "tbrm"),
    [
        (True, approx(50.0), approx(86.618354, abs=5e-7), approx(0.0, abs=1e-20)),
        (False, approx(43.55, abs=5e-3), approx(74.20, abs=5e-3), approx(0.48, abs=5e-3)),
    ],
)
def test_x5_two_armed_bandit(folded: bool, stays: float, moves: float, tbrm: float) -> None:
    mdp = make("two-armed-bandit", folded=folded)
    if folded:
        assert mdp.regularized_reward[0].tolist() == [[10.0, 0.0]]
    else:
        assert (mdp.reward[0] / mdp.beta).tolist() == [[10.0, 0.0]]
    naive = plain(mdp)
    assert frozen_value_loss(naive, [0.0, 0.0]) == stays
    assert frozen_value_loss(naive, [10.0, 0.0]) == moves
    assert rf.tbrm_loss(naive, [[[10.0, 0.0]]], rf.trajectory_law(naive, [[[0.5, 0.5]]])) == tbrm


def test_two_armed_bandit_at_any_temperature() -> None:
    mdp = make("two-armed-bandit", advantage=-3.0, beta=0.1)
    assert mdp.regularized_reward[0].flatten().tolist() == approx([-3.0, 0.0], abs=1e-14)


@pytest.mark.parametrize("horizon", [1, 2, 3, 4])
def test_x4_lock_has_kappa_two_to_the_horizon_and_one_state_does_not(horizon: int) -> None:
    """μ uniform, π always right: 2^H in the lock although its states merge, 1 + H with one state per layer."""
    for name, kappa in (("combination-lock", 2**horizon), ("one-state", 1 + horizon)):
        mdp = plain(make(name, horizon=horizon))
        law_pi = rf.trajectory_law(mdp, [[[1, 0]] * len(layer) for layer in mdp.reward])
        assert rf.kappa_by_sup(law_pi, rf.trajectory_law(mdp, mdp.reference)) == kappa


@pytest.mark.parametrize("scrambled", [False, True])
@pytest.mark.parametrize(("horizon", "actions"), [(1, 2), (2, 5), (6, 3)])
def test_lock_opens_with_one_combination(scrambled: bool, horizon: int, actions: int) -> None:
    """J* = β log(1 + A^−H (e^{1/β} − 1)): of A^H sequences one has reward 1."""
    mdp = make("combination-lock", seed=1, horizon=horizon, actions=actions, scrambled=scrambled, beta=0.5)
    assert solve(mdp).objective.item() == approx(0.5 * math.log1p(actions**-horizon * math.expm1(2)), rel=1e-12)
    naive = plain(mdp)
    returns = {t: rf.table_sum(naive.reward, t) for t in rf.trajectories(naive)}
    assert Counter(returns.values()) == Counter({1.0: 1, 0.0: actions**horizon - 1})
    (opening,) = (tuple(a for _, a in t) for t, value in returns.items() if value == 1)
    assert scrambled or opening == (0,) * horizon


def test_scrambled_locks_differ_by_seed() -> None:
    tables = {document(make("combination-lock", seed=seed, horizon=6, scrambled=True)) for seed in range(8)}
    assert len(tables) >= 7  # of 64 locks


@pytest.mark.parametrize("slip", [0.0, 0.125])
def test_chain_is_a_walk(slip: float) -> None:
    """Against a walker written out: from every position, every action, with and without a slip."""
    n = 4
    mdp = plain(make("chain", horizon=3, states=n, slip=slip))
    for s, (action, step) in itertools.product(range(n), [(0, -1), (1, 1)]):
        law = {}
        for moved, p in ((s + step, 1 - slip), (s - step, slip)):
            law[min(max(moved, 0), n - 1)] = p
        assert mdp.successors[1][s][action] == {target: p for target, p in law.items() if p > 0}
        assert mdp.reward[2][s][action] == {(0, 0): 0.1, (n - 1, 1): 1.0}.get((s, action), approx(0.0, abs=0.0))
    assert mdp.initial == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["chain", "combination-lock"])
def test_a_long_horizon_costs_one_table(name: str) -> None:
    mdp = make(name, horizon=10_000)
    assert mdp.horizon == 10_000
    assert tables_per_distinct_layer(mdp) <= 4


# --- Random -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BATCHED)
@pytest.mark.parametrize(("kind", "missing"), [("uniform", 0.0), ("dirichlet", 0.3)])
def test_a_batch_is_as_many_independent_problems(name: str, kind: str, missing: float) -> None:
    options = {"horizon": 3, "actions": 3} | ({} if name == "one-state" else {"states": 4, "ragged": True})
    mdp = make(name, seed=2, batch=5, reference=kind, missing=missing, **options)
    assert mdp.batch_shape == (5,)
    assert all(table.shape == (5, *mdp.reference[h].shape[-2:]) for h, table in enumerate(mdp.reward))
    assert mdp.initial.shape == (5, mdp.reference[0].shape[-2])
    drawn = [mdp.initial, *mdp.reward, *(mdp.reference if kind == "dirichlet" else ())]
    drawn += [kernel.probability for kernel in mdp.transitions if not isinstance(kernel, DeterministicTransition)]
    for table in drawn:
        certain = table[0].numel() == 1 or (table > 0).sum(-1).max() == 1  # a law of one outcome
        assert certain or len({tuple(row) for row in table.flatten(1).tolist()}) == 5
    if missing > 0:  # which actions exist is drawn for each problem too
        assert any(len({tuple(row) for row in table.flatten(1).tolist()}) > 1 for table in mdp.valid)
    optimum = solve(mdp).objective
    assert optimum.shape == (5,)
    assert len(set(optimum.tolist())) == 5
    for i in range(5):
        naive = plain(mdp, i)
        values = [rf.optimal_value(naive, 0, s) for s in range(len(naive.initial))]
        expected = naive.beta * math.fsum(p * v for p, v in zip(naive.initial, values, strict=True))
        assert optimum[i].item() == approx(expected, rel=1e-12)


def test_rewards_are_uniform_and_layers_differ() -> None:
    mdp = make("dense-random", batch=4000, horizon=2)
    for table in mdp.reward:
        assert 0 <= table.min() < 0.001
        assert 0.999 < table.max() <= 1
        assert table.mean().item() == approx(0.5, abs=0.01)
    assert not torch.equal(*mdp.reward)


def test_garnet_has_distinct_successors() -> None:
    mdp = make("garnet", states=7, actions=4, branching=3, horizon=5)
    for kernel in mdp.transitions:
        assert isinstance(kernel, SparseTransition)
        assert kernel.probability.shape == (7, 4, 3)
        assert (kernel.probability > 0).all()
        assert all(len(set(row)) == 3 for row in kernel.next_state.flatten(0, 1).tolist())
    wide = make("garnet", states=2, branching=9)
    assert all(kernel.shape == (2, 3, 2) for kernel in wide.transitions)


def test_dag_merges_and_tree_does_not() -> None:
    """In a tree the existing pairs of a layer lead to the states of the next, one each."""

    def targets(mdp: RegularizedMDP) -> list[list[int]]:
        kernels = [kernel for kernel in mdp.transitions if isinstance(kernel, DeterministicTransition)]
        return [kernel.next_state[mdp.valid[h]].tolist() for h, kernel in enumerate(kernels)]

    assert all(len(set(row)) < len(row) for row in targets(make("deterministic-dag")))
    for mdp in (make("deterministic-tree", roots=2), make("token-tree", prompts=3)):
        sizes = [len(table) for table in mdp.reward]
        assert sizes == [sizes[0] * mdp.reward[0].shape[1] ** h for h in range(mdp.horizon)]
        assert targets(mdp) == [list(range(size)) for size in sizes[1:]]
    pruned = make("deterministic-tree", seed=1, horizon=5, missing=0.5)
    sizes = [len(table) for table in pruned.reward]
    assert targets(pruned) == [list(range(size)) for size in sizes[1:]]
    assert sizes[-1] < 3**4


def test_ragged_layers_have_all_sizes() -> None:
    mdp = make("garnet", horizon=200, states=4, actions=3, ragged=True)
    assert {table.shape for table in mdp.reward} == set(itertools.product(range(1, 5), range(1, 4)))


# --- Trees --------------------------------------------------------------------------------------------------


def test_contract_example() -> None:
    mdp = make("token-tree", seed=0, horizon=5, vocabulary=4, beta=0.5)
    assert [tuple(table.shape) for table in mdp.reward] == [(4**h, 4) for h in range(5)]
    assert mdp.beta == 0.5


@pytest.mark.parametrize(("correct", "count"), [(0.1, 7), (1e-9, 1), (1.0, 64)])
def test_token_tree_rewards_the_stated_share_of_responses(correct: float, count: int) -> None:
    """With outcome reward V*(x) = log E_{y~π_ref} exp(r(x,y)/β) (I2), the same for every prompt."""
    mdp = make("token-tree", horizon=3, vocabulary=4, prompts=5, correct=correct, beta=0.5)
    assert all(not table.any() for table in mdp.reward[:-1])
    outcome = mdp.reward[-1].reshape(5, 64)
    assert outcome.sum(-1).tolist() == [count] * 5
    assert len({tuple(row) for row in outcome.tolist()}) == (1 if count == 64 else 5)
    value = math.log1p(count / 64 * math.expm1(2))
    assert solve(mdp).v[0].tolist() == approx([value] * 5, rel=1e-12)


def test_token_tree_rewards_steps() -> None:
    mdp = make("token-tree", rewards="step")
    assert all(0 < table.mean() < 1 and len(table.unique()) == table.numel() for table in mdp.reward)


@pytest.mark.parametrize(
    ("name", "options"), [("token-tree", {"vocabulary": 10}), ("deterministic-tree", {"actions": 10})]
)
def test_trees_too_large_are_refused(name: str, options: dict[str, int]) -> None:
    with pytest.raises(InvalidInputError, match=f"{name}.horizon: expected a tree of at most 10000000 pairs"):
        make(name, horizon=8, **options)


# --- Random tables ------------------------------------------------------------------------------------------


def test_simplex_points_are_uniform() -> None:
    """Dirichlet(1, …, 1) on K outcomes: means 1/K, variances (K−1)/(K²(K+1)), and a single outcome is certain."""
    draws = draw_simplex((40_000, 4), seeded(0))
    assert draws.sum(-1).tolist() == approx([1.0] * len(draws), abs=1e-15)
    assert draws.mean(0).tolist() == approx([1 / 4] * 4, abs=0.005)
    assert draws.var(0).tolist() == approx([3 / 80] * 4, rel=0.03)
    assert draw_simplex((3, 1), seeded(0)).tolist() == [[1.0]] * 3


def test_subsets_are_distinct_and_all_alike() -> None:
    """10 subsets of 3 out of 5; χ² with 9 degrees of freedom is below 27.9 with probability 0.999."""
    draws = draw_subset((20_000, 3), 5, seeded(0))
    counts = Counter(frozenset(row) for row in draws.tolist())
    assert len(counts) == 10
    assert all(len(subset) == 3 for subset in counts)
    assert sum((count - 2000) ** 2 / 2000 for count in counts.values()) < 27.9
    assert sorted(draw_subset((4,), 4, seeded(1)).tolist()) == [0, 1, 2, 3]


def test_missing_actions_leave_one_of_each_state() -> None:
    """An action exists with probability (1−m) + m/A; with m near 1 one action is left, any of them."""
    exists = draw_existing((20_000, 4), 0.3, seeded(0))
    assert exists.any(-1).all()
    assert exists.double().mean(0).tolist() == approx([0.7 + 0.3 / 4] * 4, abs=0.015)
    rare = draw_existing((20_000, 4), 1 - 1e-12, seeded(1))
    assert rare.sum(-1).max() == 1
    assert rare.double().mean(0).tolist() == approx([0.25] * 4, abs=0.015)
    assert draw_existing((2, 3), 0.0, seeded(0)).all()


def test_references_live_on_the_existing_actions() -> None:
    exists = torch.tensor([[True, False, True], [False, True, False]])
    assert draw_reference("uniform", exists, seeded(0)).tolist() == [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]
    drawn = draw_reference("dirichlet", exists, seeded(0))
    assert torch.equal(drawn > 0, exists)
    assert drawn.sum(-1).tolist() == approx([1.0, 1.0])


def test_modules_named_as_registering_do() -> None:
    assert {family.function.__module__ for family in FAMILIES.values()} == {
        families.__name__,
        *(module.__name__ for module in families.REGISTERED_ELSEWHERE),
    }
