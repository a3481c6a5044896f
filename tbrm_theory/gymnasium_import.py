"""Real problems: a gymnasium environment with a transition table, unrolled to a horizon.

``env.unwrapped.P[s][a]`` lists rows ``(probability, next state, reward, terminated)``. What is made of it:

* rows with one successor are added up (a slippery lake lists the same square twice), and a pair's reward is
  the probability-weighted mean of its rows;
* a row that terminates leads to one extra state, the last, which has a single action of reward 0. What the
  table says about the state that ended the episode is not used: the cliff's goal has rows that walk on from it;
* every layer has all states, and all layers share one set of tensors, so a horizon of 10⁴ costs no more than
  one step. The horizon takes the place of gymnasium's own limit on the length of an episode.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import gymnasium
import torch
from gymnasium.envs.toy_text.frozen_lake import generate_random_map
from torch import Tensor

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.random_tables import ReferenceKind, draw_reference, seeded
from tbrm_theory.registry import Count, Temperature, family
from tbrm_theory.shapes import StateActionMask, StateActionTable, StateTable
from tbrm_theory.tables import ROW_SUM_TOLERANCE, first_index
from tbrm_theory.transitions import DeterministicTransition, SparseTransition, Transition

__all__ = ["from_gymnasium"]

Row: TypeAlias = tuple[float, int, float, bool]
"""Probability, next state, reward, terminated."""
TransitionTable: TypeAlias = Sequence[Sequence[Sequence[Row]]]


def from_gymnasium(
    env_or_id: gymnasium.Env[Any, Any] | str,
    *,
    horizon: int,
    beta: float,
    reference: Tensor | None = None,
    **make_kwargs: Any,
) -> RegularizedMDP:
    """A tabular environment as a layered problem.

    Args:
        env_or_id: an environment, or the id of one, which is made with ``make_kwargs`` and closed again.
        horizon: number of steps, at least 1.
        reference: probabilities ``(states, actions)``, or ``(actions,)`` for all states alike, 0 for an
            action that is not to exist; uniform if not given.

    Raises:
        InvalidInputError: no such environment, none with a transition table, or a malformed table or argument.
    """
    if isinstance(env_or_id, str):
        env = _make(env_or_id, make_kwargs)
        try:
            return from_gymnasium(env, horizon=horizon, beta=beta, reference=reference)
        finally:
            env.close()
    if make_kwargs:
        raise InvalidInputError(next(iter(make_kwargs)), "given for an environment that is already made")
    if horizon < 1:
        raise InvalidInputError("horizon", f"expected at least 1, found {horizon}")
    table = _read_table(env_or_id)
    exists = _existing_actions(table)
    reward, policy, kernel = (
        _mean_reward(table, exists),
        _reference(reference, exists),
        _kernel(table, exists),
    )
    return RegularizedMDP(
        beta=beta,
        initial=_initial(env_or_id, len(table)),
        reward=[reward] * horizon,
        reference=[policy] * horizon,
        transitions=[kernel] * (horizon - 1),
    )


# -- reading the environment ---------------------------------------------------------------------------------


def _make(env_id: str, make_kwargs: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    try:
        return gymnasium.make(env_id, **make_kwargs)
    except (gymnasium.error.Error, TypeError) as error:
        raise InvalidInputError(env_id, f"gymnasium does not make it: {error}") from error


def _read_table(env: gymnasium.Env[Any, Any]) -> TransitionTable:
    """The rows of positive probability of every pair, checked."""
    table = getattr(env.unwrapped, "P", None)
    if table is None:
        raise InvalidInputError("P", f"expected an environment with a transition table, found {env}")
    try:
        rows = [[list(table[s][a]) for a in range(len(table[s]))] for s in range(len(table))]
    except (KeyError, IndexError, TypeError) as error:
        problem = f"expected P[state][action] to be lists of rows, both counted from 0; {error!r}"
        raise InvalidInputError("P", problem) from error
    if not rows or not all(rows):
        raise InvalidInputError("P", "expected at least one state, and one action in every state")
    return [[_read_pair(pair, f"P[{s}][{a}]", len(rows)) for a, pair in enumerate(row)] for s, row in enumerate(rows)]


def _read_pair(rows: Sequence[Any], where: str, states: int) -> Sequence[Row]:
    for row in rows:
        try:
            probability, next_state, reward, _ = row
            sound = probability >= 0 and math.isfinite(reward) and next_state in range(states)
        except (TypeError, ValueError):
            sound = False
        if not sound:
            problem = f"expected (probability, state below {states}, finite reward, terminated), found {row}"
            raise InvalidInputError(where, problem)
    total = math.fsum(probability for probability, *_ in rows)
    if not abs(total - 1) <= ROW_SUM_TOLERANCE:
        raise InvalidInputError(where, f"expected probabilities that sum to 1, found the sum {total!r}")
    return [(float(p), int(s), float(r), bool(end)) for p, s, r, end in rows if p > 0]


def _initial(env: gymnasium.Env[Any, Any], states: int) -> StateTable:
    """The law of the first state; the extra one has probability 0."""
    law = getattr(env.unwrapped, "initial_state_distrib", None)
    if law is None or len(law) != states:
        found = "none" if law is None else str(len(law))
        raise InvalidInputError("initial_state_distrib", f"expected {states} probabilities, found {found}")
    return torch.tensor([*map(float, law), 0.0], dtype=torch.float64)


# -- one layer, the extra state last -------------------------------------------------------------------------


def _existing_actions(table: TransitionTable) -> StateActionMask:
    """Which actions each state has; the extra state has the first one only."""
    counts = torch.tensor([*(len(row) for row in table), 1])
    return torch.arange(int(counts.max())) < counts.unsqueeze(-1)


def _mean_reward(table: TransitionTable, exists: StateActionMask) -> StateActionTable:
    reward = torch.zeros(exists.shape, dtype=torch.float64)
    for s, row in enumerate(table):
        for a, pair in enumerate(row):
            total = math.fsum(p for p, *_ in pair)
            reward[s, a] = math.fsum(p * r for p, _, r, _ in pair) / total
    return reward


def _kernel(table: TransitionTable, exists: StateActionMask) -> Transition:
    """Successors added up; a successor table if every pair has just one."""
    extra = len(table)
    successors: dict[tuple[int, int], dict[int, float]] = {(extra, 0): {extra: 1.0}}
    for s, row in enumerate(table):
        for a, pair in enumerate(row):
            law = successors.setdefault((s, a), defaultdict(float))
            for p, next_state, _, terminated in pair:
                law[extra if terminated else next_state] += p
    width = max(len(law) for law in successors.values())
    target = torch.zeros(*exists.shape, width, dtype=torch.int64)
    probability = torch.zeros(*exists.shape, width, dtype=torch.float64)
    for (s, a), law in successors.items():
        target[s, a, : len(law)] = torch.tensor(list(law))
        probability[s, a, : len(law)] = torch.tensor(list(law.values()), dtype=torch.float64)
    if width == 1:
        return DeterministicTransition(target.squeeze(-1), extra + 1)
    return SparseTransition(target, probability, extra + 1)


def _reference(given: Tensor | None, exists: StateActionMask) -> StateActionTable:
    if given is None:
        return exists.to(torch.float64) / exists.sum(-1, keepdim=True)
    states, actions = exists.shape[0] - 1, exists.shape[1]
    if tuple(given.shape) not in ((actions,), (states, actions)):
        problem = f"expected shape ({states}, {actions}) or ({actions},), found {tuple(given.shape)}"
        raise InvalidInputError("reference", problem)
    only_first = torch.eye(1, actions, dtype=torch.float64)
    policy = torch.cat([given.to("cpu", torch.float64).expand(states, actions), only_first])
    outside = (policy != 0) & ~exists
    if bool(outside.any()):
        raise InvalidInputError(f"reference{first_index(outside)}", "expected 0, for there is no such action")
    return policy


# -- families ------------------------------------------------------------------------------------------------


_LAKES = {
    (4, False): (10, 0.1),
    (8, False): (20, 0.05),
    (16, False): (50, 0.02),
    (4, True): (30, 0.01),
    (8, True): (100, 0.005),
    (16, True): (200, 0.001),
}
"""Size and whether slippery: the usual horizon and ``beta``. On slippery ice even the best policy arrives rarely
and late: 4×4 in 0.04 of the episodes within 10 steps, 16×16 practically never, so that nothing can be learned.
"""


@family("frozen-lake", deterministic=True)
def frozen_lake(
    seed: int,
    *,
    size: Literal[4, 8, 16] = 4,
    slippery: bool = False,
    horizon: Count | None = None,
    beta: Temperature | None = None,
    reference: ReferenceKind = "uniform",
) -> RegularizedMDP:
    """gymnasium's FrozenLake-v1: 1 for reaching the goal across the ice, the episode ends in a hole.

    The 4×4 and 8×8 maps are gymnasium's own, the 16×16 one is drawn with ``seed``. The usual horizon and
    ``beta`` depend on the size, and on whether steps slip sideways two times in three.
    """
    usual_horizon, usual_beta = _LAKES[size, slippery]
    the_map = {"desc": generate_random_map(size, seed=seed)} if size == 16 else {"map_name": f"{size}x{size}"}
    return _unrolled(
        seed,
        "FrozenLake-v1",
        horizon or usual_horizon,
        beta or usual_beta,
        reference,
        is_slippery=slippery,
        **the_map,
    )


@family("cliff-walking", deterministic=True)
def cliff_walking(
    seed: int,
    *,
    slippery: bool = False,
    horizon: Count = 15,
    beta: Temperature = 1.0,
    reference: ReferenceKind = "uniform",
) -> RegularizedMDP:
    """gymnasium's CliffWalking-v1: -1 a step to the goal along a cliff; -100 for a fall, back to the start."""
    return _unrolled(seed, "CliffWalking-v1", horizon, beta, reference, is_slippery=slippery)


@family("taxi", deterministic=True)
def taxi(
    seed: int, *, horizon: Count = 15, beta: Temperature = 1.0, reference: ReferenceKind = "uniform"
) -> RegularizedMDP:
    """gymnasium's Taxi-v4: fetch a passenger and deliver, 20 for it, -1 a step, -10 for a wrong one; 300 starts."""
    return _unrolled(seed, "Taxi-v4", horizon, beta, reference)


def _unrolled(
    seed: int, env_id: str, horizon: int, beta: float, kind: ReferenceKind, **make_kwargs: Any
) -> RegularizedMDP:
    env = _make(env_id, make_kwargs)
    try:
        exists = _existing_actions(_read_table(env))[:-1]
        reference = draw_reference(kind, exists, seeded(seed))
        return from_gymnasium(env, horizon=horizon, beta=beta, reference=reference)
    finally:
        env.close()
