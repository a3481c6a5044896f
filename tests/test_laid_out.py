"""All layers in one table: the law of its rollouts is the exact one, and layer by layer everything is as in the problem."""

from __future__ import annotations

import math

import pytest
import torch
from problems import KINDS, random_policy, random_problem

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.families import make
from tbrm_theory.laid_out import LaidOut, Rollouts, lay_out
from tbrm_theory.occupancy import enumerate_trajectories
from tbrm_theory.shapes import PerLayerStateAction
from tbrm_theory.statistics import CHECK_FAILURE_RATE, chi_square_p_value
from tbrm_theory.trajectories import TrajectoryBatch, check_trajectories, trajectory_return


def cells_of(problem: LaidOut, tables: PerLayerStateAction) -> torch.Tensor:
    """The rows of the states that occur, padded."""
    width = problem.log_reference.shape[-1]
    parts = [table[..., states, :] for table, states in zip(tables, problem.states, strict=True)]
    return torch.cat([torch.nn.functional.pad(t, (0, width - t.shape[-1]), value=-torch.inf) for t in parts], dim=-2)


def as_batch(problem: LaidOut, rollouts: Rollouts) -> TrajectoryBatch:
    """The same trajectories by state of their layer."""
    width, start, states = problem.log_reference.shape[-1], 0, []
    for h, occurring in enumerate(problem.states):
        states.append(occurring[rollouts.cell[..., h] - start])
        start += len(occurring)
    actions = rollouts.pair - rollouts.cell * width
    return TrajectoryBatch(torch.stack(states, dim=-1), actions, rollouts.mask)


def drawn(problem: LaidOut, log_policy: torch.Tensor, count: int, seed: int) -> Rollouts:
    generator = torch.Generator().manual_seed(seed)
    first = problem.first_states(torch.rand(count, generator=generator, dtype=torch.float64))
    shape = (count, problem.horizon, problem.draws)
    return problem.roll_out(log_policy, first, torch.rand(shape, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_rollouts_have_the_law_of_the_policy(kind: str, seed: int) -> None:
    mdp = random_problem(kind, seed)
    problem, policy = lay_out(mdp), random_policy(mdp, seed)
    batch = as_batch(problem, drawn(problem, cells_of(problem, policy), 5_000, seed))
    check_trajectories(mdp, batch)
    listed = enumerate_trajectories(mdp)
    visited = (batch.states.unsqueeze(0) == listed.states.unsqueeze(1)).all(-1)
    counts = (visited & (batch.actions.unsqueeze(0) == listed.actions.unsqueeze(1)).all(-1)).sum(-1)
    assert int(counts.sum()) == batch.count  # every one is on the list, once
    assert chi_square_p_value(counts, listed.log_law(policy).exp()) > CHECK_FAILURE_RATE
    assert chi_square_p_value(counts, listed.log_law(random_policy(mdp, seed + 1)).exp()) < CHECK_FAILURE_RATE


@pytest.mark.parametrize("name", ["modular-arithmetic", "combination-lock", "deterministic-dag", "garnet"])
def test_returns_and_endings_are_those_of_the_problem(name: str) -> None:
    mdp = make(name)
    problem = lay_out(mdp)
    rollouts = drawn(problem, problem.log_reference, 200, 0)
    batch = as_batch(problem, rollouts)
    check_trajectories(mdp, batch)  # the mask too
    assert bool((~batch.mask).any()) == (name == "modular-arithmetic")
    torch.testing.assert_close(problem.trajectory_return(rollouts), trajectory_return(mdp, batch), rtol=1e-14, atol=0)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
def test_the_extreme_numbers_draw_what_exists(uniform: float) -> None:
    """Of an action that does not exist, of one that next to never happens, and of sums that rounding leaves below 1."""
    mdp = make("deterministic-dag", missing=0.4, actions=10, reference="dirichlet", horizon=6)
    problem = lay_out(mdp)
    log_policy = torch.log_softmax(problem.log_reference * 30, dim=-1)
    first = problem.first_states(torch.full((50,), uniform, dtype=torch.float64))
    numbers = torch.full((50, problem.horizon, problem.draws), uniform, dtype=torch.float64)
    rollouts = problem.roll_out(log_policy, first, numbers)
    check_trajectories(mdp, as_batch(problem, rollouts))
    taken = log_policy.take(rollouts.pair)
    assert bool((taken > -torch.inf).all())
    assert uniform == 0 or float(taken.min()) > math.log(
        2.0**-54
    )  # the last that the sum of the others leaves room for
    assert float(log_policy[log_policy > -torch.inf].min()) < -100  # there are others


def test_tables_of_every_layer_come_back() -> None:
    mdp = random_problem("sparse", 0)
    problem, policy = lay_out(mdp), random_policy(mdp, 3)
    back = problem.per_layer(torch.stack([cells_of(problem, policy)] * 2))
    assert any(len(states) < table.shape[-2] for states, table in zip(problem.states, policy, strict=True))
    for table, given, states, reference in zip(back, policy, problem.states, mdp.log_reference, strict=True):
        expected = reference.clone()
        expected[states] = given[states]
        assert torch.equal(table, torch.stack([expected] * 2))


def test_a_batch_of_problems_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="expected one problem"):
        lay_out(make("garnet", batch=2))
