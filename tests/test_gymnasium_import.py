"""Imported environments against gymnasium itself: its table read by plain Python, its episodes, and quantecon's solver.

Nothing here uses the import's own reading of the table. Values after ``terminated`` are 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.toy_text.frozen_lake import generate_random_map
from quantecon.markov import DiscreteDP, backward_induction

from tbrm_theory.dynamic_programming import solve
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.families import make
from tbrm_theory.gymnasium_import import from_gymnasium
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.transitions import DeterministicTransition, SparseTransition
from tests.convert import plain

approx = pytest.approx

ENVIRONMENTS: list[tuple[str, dict[str, Any], int]] = [
    ("FrozenLake-v1", {"is_slippery": False}, 10),
    ("FrozenLake-v1", {"is_slippery": True}, 10),
    ("FrozenLake-v1", {"map_name": "8x8", "is_slippery": False}, 20),
    ("FrozenLake-v1", {"map_name": "8x8", "is_slippery": True, "success_rate": 0.7}, 20),
    ("CliffWalking-v1", {"is_slippery": False}, 15),
    ("CliffWalking-v1", {"is_slippery": True}, 15),
    ("Taxi-v4", {}, 12),
    ("Taxi-v4", {"is_rainy": True}, 6),
]
ALL = pytest.mark.parametrize(
    ("env_id", "kwargs", "horizon"),
    ENVIRONMENTS,
    ids=[f"{i}-{'-'.join(map(str, k.values()))}" for i, k, _ in ENVIRONMENTS],
)


class Tabular(gymnasium.Env[int, int]):
    """An environment that is its table; three states, two actions, unless given others."""

    def __init__(self, **changes: Any) -> None:
        self.P: Any = {s: {a: [(1.0, (s + a) % 3, 1.0, False)] for a in range(2)} for s in range(3)}
        self.initial_state_distrib: Any = np.array([0.25, 0.0, 0.75])
        for name, value in changes.items():
            setattr(self, name, value)

    def with_pair(self, s: int, a: int, rows: Any) -> Tabular:
        self.P[s][a] = rows
        return self


def imported(env: Tabular, horizon: int = 2, **options: Any) -> RegularizedMDP:
    return from_gymnasium(env, horizon=horizon, beta=1.0, **options)


def values_by_plain_python(env_id: str, kwargs: dict[str, Any], horizon: int, beta: float) -> list[list[float]]:
    """``[h][s]`` in reward units, by backward recursion on the environment's own table.

    Hard optimum if ``beta`` is 0, otherwise β log Σ_a A^−1 exp(Q/β).
    """
    table = gymnasium.make(env_id, **kwargs).unwrapped.P  # type: ignore[attr-defined]
    values = [[0.0] * len(table)]
    for _ in range(horizon):
        after = values[0]
        layer = []
        for s in range(len(table)):
            q = [
                math.fsum(p * (r + (0.0 if end else after[t])) for p, t, r, end in table[s][a])
                for a in range(len(table[s]))
            ]
            best = max(q)
            spread = math.fsum(math.exp((x - best) / beta) for x in q) / len(q) if beta > 0 else 1.0
            layer.append(best + beta * math.log(spread))
        values.insert(0, layer)
    return values[:-1]


def hard_values(mdp: RegularizedMDP) -> list[torch.Tensor]:
    """The optimum without regularisation, from the problem's own tables."""
    values = [torch.zeros(mdp.reward[0].shape[0], dtype=torch.float64)]
    for h in reversed(range(mdp.horizon)):
        after = mdp.transitions[h].expect(values[0]) if h < mdp.horizon - 1 else 0.0
        q = torch.where(mdp.valid[h], mdp.reward[h] + after, -torch.inf)
        values.insert(0, q.amax(-1))
    return values[:-1]


# --- Values -------------------------------------------------------------------------------------------------


@ALL
def test_values_agree_with_a_recursion_on_the_environments_table(
    env_id: str, kwargs: dict[str, Any], horizon: int
) -> None:
    mdp = from_gymnasium(env_id, horizon=horizon, beta=0.5, **kwargs)
    solution = solve(mdp)
    expected = values_by_plain_python(env_id, kwargs, horizon, 0.5)
    for h in range(horizon):
        assert (0.5 * solution.v[h][:-1]).tolist() == approx(expected[h], rel=1e-12, abs=1e-13)
        assert solution.v[h][-1] == 0  # nothing follows the end
    assert solution.certified


@ALL
def test_hard_values_agree_with_a_recursion_and_bound_the_soft_ones(
    env_id: str, kwargs: dict[str, Any], horizon: int
) -> None:
    """V_hard − β H log A ≤ β V* ≤ V_hard, here with β = 1e-4."""
    beta = 1e-4
    mdp = from_gymnasium(env_id, horizon=horizon, beta=beta, **kwargs)
    expected = values_by_plain_python(env_id, kwargs, horizon, 0.0)
    hard, soft = hard_values(mdp), solve(mdp).v
    actions = mdp.reward[0].shape[1]
    for h in range(horizon):
        assert hard[h][:-1].tolist() == approx(expected[h], rel=1e-12, abs=1e-13)
        gap = hard[h] - beta * soft[h]
        assert gap.min() >= -1e-12 * max(1.0, hard[h].abs().max().item())
        assert gap.max() <= beta * (horizon - h) * math.log(actions) * (1 + 1e-9)


@ALL
def test_small_temperatures_approach_quantecon(env_id: str, kwargs: dict[str, Any], horizon: int) -> None:
    """|β V* − V_hard| ≤ β H log A, V_hard from ``backward_induction`` on arrays filled from the table."""
    table = gymnasium.make(env_id, **kwargs).unwrapped.P  # type: ignore[attr-defined]
    states, actions, beta = len(table), len(table[0]), 1e-3
    reward, law = np.zeros((states + 1, actions)), np.zeros((states + 1, actions, states + 1))
    law[-1, :, -1] = 1.0
    for s, a in itertools.product(range(states), range(actions)):
        for p, t, r, end in table[s][a]:
            reward[s, a] += p * r
            law[s, a, states if end else t] += p
    with pytest.warns(UserWarning, match="infinite horizon solution methods are disabled"):
        program = DiscreteDP(reward, law, 1.0)
    values, _ = backward_induction(program, horizon)
    soft = solve(from_gymnasium(env_id, horizon=horizon, beta=beta, **kwargs)).v
    for h in range(horizon):
        bound = beta * (horizon - h) * math.log(actions)
        assert np.abs(beta * soft[h].numpy() - values[h]).max() <= bound * (1 + 1e-9)


# --- Episodes -----------------------------------------------------------------------------------------------


def episodes(env: gymnasium.Env[Any, Any], steps: int) -> Iterator[tuple[int, int, int, float, bool]]:
    """Seeded uniform play, ``(s, a, s', r, terminated)``; a new episode after each end."""
    rng = np.random.default_rng(0)
    state, seed = -1, 0
    for _ in range(steps):
        if state < 0:
            state, seed = int(env.reset(seed=seed)[0]), seed + 1
        action = int(rng.integers(env.action_space.n))  # type: ignore[attr-defined]
        following, reward, terminated, truncated, _ = env.step(action)
        yield state, action, int(following), float(reward), bool(terminated)
        state = -1 if terminated or truncated else int(following)


@ALL
def test_episodes_follow_the_kernel(env_id: str, kwargs: dict[str, Any], horizon: int) -> None:
    """Every step seen is possible in the problem, and ends lead to the extra state.

    Frequencies and mean rewards are as near as Hoeffding's inequality says at 1e-9: |mean − r| ≤ span √(log 2e9 / 2n).
    """
    naive = plain(from_gymnasium(env_id, horizon=2, beta=1.0, **kwargs))
    env = gymnasium.make(env_id, **kwargs)
    table, extra = env.unwrapped.P, len(naive.reward[0]) - 1  # type: ignore[attr-defined]
    seen: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for s, a, following, reward, terminated in episodes(env, 4000):
        target = extra if terminated else following
        assert naive.successors[0][s][a][target] > 0
        seen.setdefault((s, a), []).append((target, reward))
    for (s, a), steps in seen.items():
        margin = math.sqrt(math.log(2e9) / (2 * len(steps)))
        for target, p in naive.successors[0][s][a].items():
            assert abs(sum(t == target for t, _ in steps) / len(steps) - p) <= margin
        possible = [r for _, _, r, _ in table[s][a]]
        mean = math.fsum(r for _, r in steps) / len(steps)
        assert abs(mean - naive.reward[0][s][a]) <= margin * (max(possible) - min(possible)) + 1e-12
    ends = sum(target == extra for steps in seen.values() for target, _ in steps)
    assert ends > 50 or not env_id.startswith("FrozenLake")


def test_taxi_has_300_starts() -> None:
    mdp = from_gymnasium("Taxi-v4", horizon=1, beta=1.0)
    assert (mdp.initial > 0).sum() == 300
    assert mdp.initial.max() == approx(1 / 300, rel=1e-12)
    env = gymnasium.make("Taxi-v4")
    assert all(mdp.initial[int(env.reset(seed=seed)[0])] > 0 for seed in range(50))


# --- Traps --------------------------------------------------------------------------------------------------


def test_repeated_rows_are_added_up() -> None:
    """In the corner of the slippery lake two of three rows stay; the third goes down."""
    table = gymnasium.make("FrozenLake-v1").unwrapped.P  # type: ignore[attr-defined]
    assert len(table[0][0]) == 3
    mdp = from_gymnasium("FrozenLake-v1", horizon=2, beta=1.0)
    (kernel,) = mdp.transitions
    assert isinstance(kernel, SparseTransition)
    assert plain(mdp).successors[0][0][0] == {0: approx(2 / 3), 4: approx(1 / 3)}
    for targets, weights in zip(
        kernel.next_state.flatten(0, 1).tolist(), kernel.probability.flatten(0, 1), strict=True
    ):
        present = [t for t, p in zip(targets, weights.tolist(), strict=True) if p > 0]
        assert len(set(present)) == len(present)


def test_rows_that_do_not_quite_sum_to_one_are_divided_by_their_sum() -> None:
    third = 0.3333333333
    env = Tabular().with_pair(0, 0, [(third, 0, 3.0, False), (third, 1, 6.0, False), (third, 2, 9.0, True)])
    mdp = imported(env)
    assert plain(mdp).successors[0][0][0] == {0: approx(1 / 3), 1: approx(1 / 3), 3: approx(1 / 3)}
    assert math.fsum(plain(mdp).successors[0][0][0].values()) == approx(1.0, abs=1e-15)
    assert mdp.reward[0][0, 0] == approx(6.0, rel=1e-15)


def test_a_pair_of_one_successor_listed_in_parts_is_deterministic() -> None:
    env = Tabular().with_pair(0, 0, [(0.5, 1, 1.0, False), (0.0, 2, 99.0, True), (0.5, 1, 2.0, False)])
    mdp = imported(env)
    assert isinstance(mdp.transitions[0], DeterministicTransition)
    assert mdp.transitions[0].next_state[0, 0] == 1
    assert mdp.reward[0][0, 0] == 1.5


def test_the_goal_of_the_cliff_is_not_trusted() -> None:
    """Its rows in P walk on; an episode that reached it earns nothing more."""
    table = gymnasium.make("CliffWalking-v1").unwrapped.P  # type: ignore[attr-defined]
    assert table[47][0] == [(1.0, 35, -1, False)]
    assert table[35][2] == [(1.0, 47, -1, True)]
    mdp = from_gymnasium("CliffWalking-v1", horizon=4, beta=0.01)
    kernel = mdp.transitions[0]
    assert isinstance(kernel, DeterministicTransition)
    assert kernel.next_state[35, 2] == 48
    assert kernel.next_state[48, 0] == 48
    assert not (kernel.next_state[:47] == 47).any()
    assert hard_values(mdp)[0][35] == -1


def test_same_successor_with_and_without_end_is_two() -> None:
    env = Tabular().with_pair(1, 1, [(0.25, 2, 0.0, True), (0.75, 2, 0.0, False)])
    assert plain(imported(env)).successors[0][1][1] == {3: 0.25, 2: 0.75}


def test_the_extra_state_has_one_action_without_reward() -> None:
    for env_id, kwargs, _ in ENVIRONMENTS:
        mdp = from_gymnasium(env_id, horizon=3, beta=1.0, **kwargs)
        for h in range(3):
            assert mdp.reference[h][-1].tolist() == [1.0] + [0.0] * (mdp.reference[h].shape[1] - 1)
            assert mdp.reward[h][-1, 0] == 0
        assert plain(mdp).successors[0][-1][0] == {mdp.reward[0].shape[0] - 1: 1.0}
        assert mdp.initial[-1] == 0


@ALL
def test_transition_kinds(env_id: str, kwargs: dict[str, Any], horizon: int) -> None:
    """A successor table where every pair has one row; which these are is known."""
    stochastic = kwargs.get("is_slippery") or kwargs.get("is_rainy")
    assert from_gymnasium(env_id, horizon=2, beta=1.0, **kwargs).is_deterministic == (not stochastic)


def test_layers_share_one_table() -> None:
    mdp = from_gymnasium("Taxi-v4", horizon=10_000, beta=1.0)
    assert mdp.horizon == 10_000
    assert len({id(part) for part in (*mdp.reward, *mdp.reference, *mdp.transitions)}) == 3


def test_states_may_differ_in_their_actions() -> None:
    env = Tabular().with_pair(1, 2, [(1.0, 0, 5.0, True)])
    mdp = imported(env)
    assert mdp.reference[0].tolist() == [[0.5, 0.5, 0.0], [1 / 3] * 3, [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]
    assert mdp.reward[0][1, 2] == 5


def test_lists_serve_as_tables_too() -> None:
    env = Tabular(
        P=[[[(1.0, 0, 1.0, True)], [(1.0, 1, 0.0, False)]], [[(1.0, 1, 0.0, False)]]], initial_state_distrib=[0, 1]
    )
    assert plain(imported(env)).successors == [[[{2: 1.0}, {1: 1.0}], [{1: 1.0}, {0: 1.0}], [{2: 1.0}, {0: 1.0}]]]


# --- Reference ----------------------------------------------------------------------------------------------


def test_reference_for_all_states_or_for_each() -> None:
    one = torch.tensor([0.25, 0.75], dtype=torch.float64)
    each = torch.tensor([[0.25, 0.75], [1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    assert imported(Tabular(), reference=one).reference[1].tolist() == [[0.25, 0.75]] * 3 + [[1.0, 0.0]]
    assert imported(Tabular(), reference=each).reference[0].tolist() == [*each.tolist(), [1.0, 0.0]]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (torch.ones(3, dtype=torch.float64) / 3, r"reference: expected shape \(3, 2\) or \(2,\), found \(3,\)"),
        (torch.ones(2, 2, 2, dtype=torch.float64) / 2, r"reference: expected shape"),
        (
            torch.tensor([0.5, 0.6], dtype=torch.float64),
            r"layers\[0\]\.reference\[0\]: expected probabilities that sum to 1",
        ),
    ],
)
def test_wrong_references_are_refused(reference: torch.Tensor, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        imported(Tabular(), reference=reference)


def test_reference_on_actions_that_a_state_lacks_is_refused() -> None:
    env = Tabular().with_pair(1, 2, [(1.0, 0, 5.0, True)])
    with pytest.raises(InvalidInputError, match=r"reference\[0\]\[2\]: expected 0, for there is no such action"):
        imported(env, reference=torch.full((3,), 1 / 3, dtype=torch.float64))


# --- What is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"P": None}, "P: expected an environment with a transition table"),
        ({"P": {}}, "P: expected at least one state"),
        ({"P": {0: {}}}, "P: expected at least one state, and one action in every state"),
        ({"P": {1: {0: []}}}, "P: expected P.state..action. to be lists of rows, both counted from 0; KeyError"),
        ({"P": 7}, "P: expected P.state..action. to be lists of rows"),
        ({"initial_state_distrib": None}, "initial_state_distrib: expected 3 probabilities, found none"),
        ({"initial_state_distrib": [0.5, 0.5]}, "initial_state_distrib: expected 3 probabilities, found 2"),
        ({"initial_state_distrib": [0.5, 0.6, 0.5]}, "initial: expected probabilities that sum to 1"),
    ],
)
def test_malformed_environments_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        imported(Tabular(**changes))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(0.5, 0, 0.0, False)], "expected probabilities that sum to 1, found the sum 0.5"),
        ([], "expected probabilities that sum to 1, found the sum 0.0"),
        ([(1.0, 3, 0.0, False)], "expected .probability, state below 3, finite reward, terminated."),
        ([(1.0, 1.5, 0.0, False)], "expected .probability, state below 3"),
        ([(1.0, -1, 0.0, False)], "expected .probability, state below 3"),
        ([(1.0, 0, math.nan, False)], "expected .probability, state below 3"),
        ([(1.5, 0, 0.0, False), (-0.5, 0, 0.0, False)], "expected .probability, state below 3"),
        ([(math.nan, 0, 0.0, False)], "expected .probability, state below 3"),
        ([(1.0, 0, 0.0)], "expected .probability, state below 3"),
        ([(1.0, "0", 0.0, False)], "expected .probability, state below 3"),
        ([1.0], "expected .probability, state below 3"),
    ],
)
def test_malformed_rows_are_refused(rows: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as e:
        imported(Tabular().with_pair(2, 1, rows))
    assert e.value.where == "P[2][1]"


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="horizon: expected at least 1, found 0"):
        imported(Tabular(), horizon=0)
    with pytest.raises(InvalidInputError, match="beta: expected a positive temperature"):
        from_gymnasium(Tabular(), horizon=1, beta=0.0)
    with pytest.raises(InvalidInputError, match="is_slippery: given for an environment that is already made"):
        from_gymnasium(Tabular(), horizon=1, beta=1.0, is_slippery=True)
    with pytest.raises(InvalidInputError, match="NoSuchLake-v1: gymnasium does not make it: "):
        from_gymnasium("NoSuchLake-v1", horizon=1, beta=1.0)
    with pytest.raises(InvalidInputError, match=r"FrozenLake-v1: gymnasium does not make it: .*slipery"):
        from_gymnasium("FrozenLake-v1", horizon=1, beta=1.0, slipery=True)
    with pytest.raises(
        InvalidInputError, match=r"P: expected an environment with a transition table, found .*CartPole"
    ):
        from_gymnasium("CartPole-v1", horizon=1, beta=1.0)

    with (
        pytest.warns(DeprecationWarning, match="out of date"),
        pytest.raises(InvalidInputError, match=r"Taxi-v3: gymnasium does not make it: .*use `Taxi-v4` instead"),
    ):
        from_gymnasium("Taxi-v3", horizon=1, beta=1.0)


def test_environments_made_here_are_closed_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[Any] = []
    monkeypatch.setattr("gymnasium.envs.toy_text.frozen_lake.FrozenLakeEnv.close", lambda env: closed.append(env))
    env = gymnasium.make("FrozenLake-v1")
    from_gymnasium(env, horizon=1, beta=1.0)
    assert closed == []
    from_gymnasium("FrozenLake-v1", horizon=1, beta=1.0)
    make("frozen-lake")
    assert len(closed) == 2


# --- Families -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "steps"), [(4, 6), (8, 14), (16, 30)])
def test_the_goal_of_every_lake_is_within_the_usual_horizon(size: int, steps: int) -> None:
    mdp = make("frozen-lake", seed=2, size=size)
    assert mdp.reward[0].shape == (size**2 + 1, 4)
    assert mdp.horizon > steps
    assert (mdp.initial @ hard_values(mdp)[0]).item() == 1.0
    assert make("frozen-lake", size=size, horizon=3, beta=2, slippery=True).beta == 2.0


def test_the_large_lake_is_gymnasiums_random_map() -> None:
    mdp = from_gymnasium(
        "FrozenLake-v1", horizon=50, beta=0.02, is_slippery=False, desc=generate_random_map(16, seed=7)
    )
    assert plain(make("frozen-lake", size=16, seed=7)) == plain(mdp)
    assert plain(make("frozen-lake", size=16, seed=8)).successors != plain(mdp).successors


def test_slippery_families_are_stochastic() -> None:
    for name in ("frozen-lake", "cliff-walking"):
        assert make(name).is_deterministic
        assert not make(name, slippery=True).is_deterministic


def test_ten_steps_are_too_few_on_slippery_ice() -> None:
    """Why its usual horizon is longer: the best policy without regularisation reaches the goal in 4 % of the episodes."""
    mdp = make("frozen-lake", slippery=True, horizon=10)
    assert 0.04 < (mdp.initial @ hard_values(mdp)[0]).item() < 0.05
