"""Expected updates against plain loops and finite differences; the flow to points of rest on fields whose zeros are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tbrm_theory.behaviours import Components
from tbrm_theory.claims.counterexamples import stochastic_transitions
from tbrm_theory.dynamic_programming import soft_value
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.expected_updates import LEARNED, ExpectedUpdate
from tbrm_theory.fixed_points import RESIDUAL, jacobian, rest
from tbrm_theory.losses import LOSSES
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.objectives import SampleObjective
from tbrm_theory.occupancy import enumerate_trajectories
from tbrm_theory.optimisers import least_squares_plan
from tbrm_theory.trajectories import TrajectoryBatch
from tests import reference as rf
from tests.convert import plain
from tests.problems import random_logits, random_policy, random_problem

approx = pytest.approx

# -- expected updates ------------------------------------------------------------------------------------------------


def gap(reference: rf.PlainMDP, policy: rf.Table, tau: rf.Trajectory) -> float:
    """``g_θ(τ)``."""
    ratio = rf.action_probability(policy, tau) / rf.action_probability(reference.reference, tau)
    return math.log(ratio) - rf.table_sum(reference.reward, tau) / reference.beta


def in_pairs(reference: rf.PlainMDP, law: rf.Law, amount: Callable[[rf.Trajectory, rf.Trajectory], float]) -> float:
    return math.fsum(
        p * q / reference.initial[one[0][0]] * amount(one, other)
        for one, p in law.items()
        for other, q in law.items()
        if one[0][0] == other[0][0]
    )


def expected(name: str, mdp: RegularizedMDP, law: rf.Law, held: rf.Table) -> Callable[[rf.Table], float]:
    """The mean of a loss as a function of the logits, plain; ``held`` are those of what is frozen."""
    reference, beta = plain(mdp), mdp.beta.item()

    def value(logits: rf.Table, tau: rf.Trajectory) -> float:
        return rf.state_value(reference, logits, 0, tau[0][0])

    def next_value(tau: rf.Trajectory, h: int) -> float:
        return rf.state_value(reference, held, h + 1, tau[h + 1][0]) if h + 1 < len(tau) else 0.0

    def loss(logits: rf.Table) -> float:
        policy, then = rf.softmax_policy(reference, logits), rf.softmax_policy(reference, held)

        def g(tau: rf.Trajectory) -> float:
            return gap(reference, policy, tau)

        if name == "tbrm":
            return rf.expectation(law, lambda tau: (value(logits, tau) + g(tau)) ** 2)
        if name == "tbrm-iterative":
            return rf.expectation(law, lambda tau: (value(held, tau) + g(tau)) ** 2)
        if name == "brm":
            return rf.brm_loss(reference, logits, law)
        if name == "vargrad":
            return in_pairs(reference, law, lambda one, other: 0.5 * (g(one) - g(other)) ** 2)
        if name == "reinforce":
            return rf.expectation(
                law, lambda tau: beta * gap(reference, then, tau) * math.log(rf.action_probability(policy, tau))
            )
        assert name == "sql-one-step-q"
        return rf.expectation(
            law,
            lambda tau: math.fsum(
                (logits[h][s][a] - rf.soft_reward(reference, h, s, a) - next_value(tau, h)) ** 2
                for h, (s, a) in enumerate(tau)
            ),
        )

    return loss


@pytest.mark.parametrize("name", ["tbrm", "tbrm-iterative", "brm", "vargrad", "reinforce", "sql-one-step-q"])
@pytest.mark.parametrize(("kind", "data"), [("dense", "mixture"), ("deterministic", "own")])
def test_an_update_is_the_gradient_of_the_mean_with_everything_held(name: str, kind: str, data: str) -> None:
    mdp = random_problem(kind, 1, horizon=2)
    reference, logits = plain(mdp), random_logits(mdp, 5)
    table = [mdp.rows(h, torch.where(v, q, 0.0)) for h, (q, v) in enumerate(zip(logits, mdp.valid, strict=True))]
    parts: Components | None = None
    law = rf.trajectory_law(reference, rf.softmax_policy(reference, table))
    if data == "mixture":
        parts = [(0.25, random_policy(mdp, 6)), (0.75, random_policy(mdp, 7))]
        law = rf.mixture_law(
            reference, [(w, [mdp.rows(h, log.exp()) for h, log in enumerate(policy)]) for w, policy in parts]
        )
    update = ExpectedUpdate(mdp, name, parts)
    found = update(update.row(logits, ())[None])[0]
    slopes = rf.finite_difference(expected(name, mdp, law, table), table)
    plain_row = [
        slopes[h][s][a]
        for h, valid in enumerate(mdp.valid)
        for s, row in enumerate(valid.tolist())
        for a, exists in enumerate(row)
        if exists
    ]
    assert found.tolist() == approx(plain_row, abs=1e-7)
    assert found.abs().max() > 1e-3


def test_what_is_learned_beside_the_logits_follows_them_in_a_row() -> None:
    mdp = random_problem("sparse", 1, horizon=2)
    states = [len(valid) for valid in mdp.valid]
    for name in LOSSES:
        update = ExpectedUpdate(mdp, name, None)
        extra = {"critic": sum(states), "log_partition": states[0], "baseline": states[0]}.get(LEARNED.get(name, ""), 0)
        assert len(update.optimum) == update.logit_count + extra, name
        for table, q in zip(update.logits(update.optimum), update.solution.q, strict=True):
            assert torch.equal(table, q)


def test_what_a_star_po_estimates_is_the_optimal_value_where_nothing_is_random() -> None:
    mdp = random_problem("deterministic", 1)
    update = ExpectedUpdate(mdp, "a-star-po", None)
    assert update.reference_value.tolist() == approx(soft_value(update.solution.q[0]).tolist(), abs=1e-13)


def test_updates_of_nothing_are_refused() -> None:
    mdp = random_problem("dense", 1)
    with pytest.raises(InvalidInputError, match="loss"):
        ExpectedUpdate(mdp, "nothing", None)
    with pytest.raises(InvalidInputError, match="data"):
        ExpectedUpdate(mdp, "tbrm", [])


# -- points of rest --------------------------------------------------------------------------------------------------


def linear(matrix: list[list[float]]) -> Callable[[Tensor], Tensor]:
    return lambda points: points @ torch.tensor(matrix, dtype=torch.float64).T


def points(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_a_minimum_is_found_and_is_called_one() -> None:
    def field(x: Tensor) -> Tensor:
        """Of ``Σ cosh(x_i - i)``."""
        return torch.sinh(x - torch.arange(2.0, dtype=torch.float64))

    found = rest(field, points([3.0, -4.0], [0.5, 0.0]))
    assert found.converged.all()
    assert (found.point - points([0.0, 1.0])).abs().max() <= RESIDUAL * math.sinh(5)  # relative to the starts
    assert found.least_eigenvalue.tolist() == approx([1.0, 1.0])
    assert found.asymmetry.max() < 1e-9
    assert bool((found.steps > 0).all())


def test_a_saddle_is_left_and_if_not_it_is_called_one() -> None:
    """``x² - y²`` with walls: the flow leaves the saddle from anywhere but its axis."""

    def field(x: Tensor) -> Tensor:
        return torch.stack([2 * x[:, 0], -2 * x[:, 1] + x[:, 1] ** 3], dim=-1)

    found = rest(field, points([1.0, 1e-3], [1.0, 0.0]))
    assert found.converged.all()
    assert found.point.tolist() == [approx([0.0, math.sqrt(2)], abs=1e-9), approx([0.0, 0.0], abs=1e-9)]
    assert found.least_eigenvalue[0] > 0.4
    assert found.least_eigenvalue[1] == approx(-1.0)


def test_a_field_that_is_no_gradient_is_called_so() -> None:
    found = rest(linear([[0.1, -1.0], [1.0, 0.1]]), points([1.0, 1.0]))
    assert found.converged.all()
    assert found.point.abs().max() < 1e-10
    assert found.least_eigenvalue.item() == approx(0.1 / math.sqrt(1.01))
    assert found.asymmetry.item() > 1


def test_where_there_is_no_rest_none_is_found() -> None:
    def away(x: Tensor) -> Tensor:
        return -torch.exp(-x)

    def jump(x: Tensor) -> Tensor:
        """As of a clipped objective: never 0, and of either sign."""
        return torch.where(x > 0.3, 1.0, -1.0).to(torch.float64)

    for field in (away, jump):
        found = rest(field, points([0.0]), steps=60)
        assert not found.converged.any()
    assert rest(away, points([0.0])).runs_away.all()


def test_flat_directions_stay_where_they_are() -> None:
    found = rest(linear([[1.0, 0.0], [0.0, 0.0]]), points([1.0, 7.0]))
    assert found.converged.all()
    assert found.point.tolist() == [approx([0.0, 7.0], abs=1e-12)]
    assert found.least_eigenvalue.item() == approx(0.0, abs=1e-9)


def test_the_jacobian_is_laid_out_as_derivatives_of_rows() -> None:
    value, slope = jacobian(linear([[1.0, 2.0], [3.0, 4.0]]), points([1.0, -1.0], [0.0, 2.0]))
    assert value.tolist() == [[-1.0, -1.0], [4.0, 8.0]]
    assert slope.flatten().tolist() == approx([1.0, 2.0, 3.0, 4.0] * 2)


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="starts"):
        rest(linear([[1.0]]), points([math.nan]))
    with pytest.raises(InvalidInputError, match="starts"):
        rest(linear([[1.0]]), torch.zeros(0, 1, dtype=torch.float64))
    with pytest.raises(InvalidInputError, match="field"):
        rest(lambda x: torch.log(x), points([0.5e-5]))


# -- against other solvers -------------------------------------------------------------------------------------------


def test_tbrm_ends_where_least_squares_does() -> None:
    """Noise-free data with holes: of all minimisers one, its residual 0 on the data as that of I14's plan."""
    mdp = random_problem("deterministic", 3)
    listed = enumerate_trajectories(mdp)
    policy = random_policy(mdp, 4)
    update = ExpectedUpdate(mdp, "tbrm", [(1.0, policy)])
    start = update.row(random_logits(mdp, 8), ())
    found = rest(update, start[None])
    batch = TrajectoryBatch(listed.states, listed.actions, torch.ones_like(listed.states, dtype=torch.bool))
    plan = least_squares_plan(SampleObjective(mdp, batch, listed.log_law(policy).exp(), listed.sum_along(mdp.reward)))
    assert found.converged.all()
    theirs = listed.log_law(tuple(torch.log_softmax(table, dim=-1) for table in plan))
    ours = listed.log_law(update.log_policy(found.point[0]))
    assert (ours - theirs).abs().max() < 1e-8


def test_both_minima_of_c3_are_found() -> None:
    """Stochastic transitions with two strict minima, known to Newton's method on a Hessian written out (C3.a-c)."""
    example = stochastic_transitions(0)
    update = ExpectedUpdate(example.case.mdp, "tbrm", [(1.0, example.log_behaviour)])
    known = torch.stack([example.spurious, example.better])
    nudge = 1e-2 * torch.linspace(-1, 1, known.shape[-1], dtype=torch.float64)
    found = rest(update, known + nudge)
    assert found.converged.all()
    assert update.expected_loss(found.point).tolist() == approx(example.population_loss(known).tolist(), rel=1e-12)
    assert update.expected_loss(found.point).tolist() == approx([2.435764, 2.179489], abs=1e-6)
    assert bool((found.least_eigenvalue > -1e-9).all())
