"""Occupancies, trajectory laws and moment matrices against plain enumeration and against each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from torch import Tensor

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.occupancy import (
    enumerate_trajectories,
    flatten_tables,
    moment_matrix,
    moment_product,
    occupancy,
    unflatten_tables,
)
from tbrm_theory.transitions import DenseTransition, DeterministicTransition, SparseTransition, Transition
from tests import reference as rf
from tests import strategies
from tests.convert import plain

EXACT = {"rtol": 1e-13, "atol": 1e-14}


def policy_table(mdp: RegularizedMDP, log_policy: tuple[Tensor, ...]) -> rf.Table:
    return [mdp.rows(h, log.exp()) for h, log in enumerate(log_policy)]


def batched_problem(kind: str, batch: tuple[int, ...] = (3,), horizon: int = 3) -> RegularizedMDP:
    """Layers of 2, 3, 2 … states with 2 or 3 actions, some missing; everything differs along the batch."""
    generator = torch.Generator().manual_seed(5)
    sizes = [(2 + h % 2, 3 - h % 2) for h in range(horizon)]

    def simplex(*shape: int) -> Tensor:
        weight = torch.rand(*batch, *shape, generator=generator, dtype=torch.float64) + 0.05
        return weight / weight.sum(-1, keepdim=True)

    def kernel(h: int) -> Transition:
        following = sizes[h + 1][0]
        successors = torch.randint(following, (*batch, *sizes[h], 2), generator=generator)
        match kind:
            case "deterministic":
                return DeterministicTransition(successors[..., 0], following)
            case "sparse":
                return SparseTransition(successors, simplex(*sizes[h], 2), following)
            case _:
                return DenseTransition(simplex(*sizes[h], following))

    references = [simplex(*size) for size in sizes]
    references[-1][..., 0, 1] = 0.0  # an action that does not exist
    references[-1] = references[-1] / references[-1].sum(-1, keepdim=True)
    return RegularizedMDP(
        beta=0.5,
        initial=simplex(sizes[0][0]),
        reward=[torch.zeros(size) for size in sizes],
        reference=references,
        transitions=[kernel(h) for h in range(horizon - 1)],
    )


def draw_tables(mdp: RegularizedMDP, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(table.shape, generator=generator, dtype=torch.float64) for table in mdp.reference)


# -- one problem ---------------------------------------------------------------------------------------------------


@given(st.data(), strategies.problems())
def test_the_enumeration_lists_every_trajectory_once_with_its_probability(
    data: st.DataObject, mdp: RegularizedMDP
) -> None:
    log_policy = data.draw(strategies.log_policies(mdp))
    listed, reference = enumerate_trajectories(mdp), plain(mdp)
    event(f"trajectories: {min(len(listed.states), 100) // 10}0 or more")
    taken = [
        tuple(zip(states, actions, strict=True))
        for states, actions in zip(listed.states.tolist(), listed.actions.tolist(), strict=True)
    ]
    assert len(set(taken)) == len(taken)
    dynamics = dict(zip(taken, listed.log_dynamics.exp().tolist(), strict=True))
    law = dict(zip(taken, listed.log_law(log_policy).exp().tolist(), strict=True))
    assert dynamics == pytest.approx(rf.trajectories(reference), rel=1e-13)
    expected = rf.trajectory_law(reference, policy_table(mdp, log_policy))
    assert {trajectory: p for trajectory, p in law.items() if p > 0} == pytest.approx(expected, rel=1e-13)


def test_a_successor_listed_twice_is_one_trajectory() -> None:
    """Its probabilities add up: ``log P(τ)`` of a row is that of the trajectory, not of a part of it."""
    mdp = RegularizedMDP(
        beta=1.0,
        initial=torch.ones(1),
        reward=[torch.zeros(1, 1), torch.zeros(3, 1)],
        reference=[torch.ones(1, 1), torch.ones(3, 1)],
        transitions=[SparseTransition(torch.tensor([[[2, 0, 2, 0]]]), torch.tensor([[[0.25, 0.5, 0.25, 0.0]]]), 3)],
    )
    listed = enumerate_trajectories(mdp)
    assert sorted(zip(listed.states[:, 1].tolist(), listed.log_dynamics.exp().tolist(), strict=True)) == [
        (0, 0.5),
        (2, 0.5),
    ]


@given(st.data(), strategies.problems())
def test_occupancies_are_the_masses_of_the_trajectories_through_a_pair(
    data: st.DataObject, mdp: RegularizedMDP
) -> None:
    log_policy = data.draw(strategies.log_policies(mdp))
    law = rf.trajectory_law(plain(mdp), policy_table(mdp, log_policy))
    d = occupancy(mdp, log_policy)
    for found, expected in zip(d.state, rf.occupancy_state(plain(mdp), law), strict=True):
        assert found.tolist() == pytest.approx(expected, rel=1e-13, abs=1e-15)
    for h, expected_rows in enumerate(rf.occupancy_state_action(plain(mdp), law)):
        for found_row, expected_row in zip(mdp.rows(h, d.state_action[h]), expected_rows, strict=True):
            assert found_row == pytest.approx(expected_row, rel=1e-13, abs=1e-15)


@given(st.data(), strategies.problems())
def test_the_moment_matrix_is_the_probability_of_two_pairs_on_one_trajectory(
    data: st.DataObject, mdp: RegularizedMDP
) -> None:
    log_policy = data.draw(strategies.log_policies(mdp))
    law = rf.trajectory_law(plain(mdp), policy_table(mdp, log_policy))
    pairs = [
        (h, s, a) for h, table in enumerate(mdp.reference) for s in range(len(table)) for a in range(table.shape[1])
    ]
    _, expected = rf.moments(law, pairs)
    found = moment_matrix(mdp, log_policy)
    torch.testing.assert_close(
        found, torch.tensor([[float(entry) for entry in row] for row in expected], dtype=torch.float64), **EXACT
    )
    assert torch.equal(found, found.T)


@given(st.data(), strategies.problems())
def test_i11_sums_along_trajectories_have_the_moments_of_the_matrix(data: st.DataObject, mdp: RegularizedMDP) -> None:
    """``E_μ[Σg] = d·g``, ``E_μ[(Σg)²] = gᵀ M g`` and ``M g = E_μ[(Σg) φ]``, against lists of trajectories."""
    log_policy, g = data.draw(strategies.log_policies(mdp)), data.draw(strategies.tables_of(mdp))
    reference, table = plain(mdp), [mdp.rows(h, layer) for h, layer in enumerate(g)]
    law = rf.trajectory_law(reference, policy_table(mdp, log_policy))
    flat, product = flatten_tables(g), flatten_tables(moment_product(mdp, log_policy, g))
    first = rf.expectation(law, lambda tau: rf.table_sum(table, tau))
    second = rf.expectation(law, lambda tau: rf.table_sum(table, tau) ** 2)
    size = 1 + mdp.horizon * flat.abs().max().item()
    d = flatten_tables(occupancy(mdp, log_policy).state_action)
    assert (d @ flat).item() == pytest.approx(first, abs=1e-13 * size)
    assert (flat @ product).item() == pytest.approx(second, abs=1e-13 * size**2)
    assert (flat @ moment_matrix(mdp, log_policy) @ flat).item() == pytest.approx(second, abs=1e-13 * size**2)
    through = rf.tabulate(
        reference.reward,
        lambda h, s, a: rf.expectation(law, lambda tau: rf.table_sum(table, tau) * (tau[h] == (s, a))),
    )
    for h, layer in enumerate(unflatten_tables(mdp, product)):
        for found_row, expected_row in zip(mdp.rows(h, layer), through[h], strict=True):
            assert found_row == pytest.approx(expected_row, abs=1e-13 * size)


@given(st.data(), strategies.problems())
def test_flattening_is_undone_by_unflattening_and_orders_by_layer_state_action(
    data: st.DataObject, mdp: RegularizedMDP
) -> None:
    tables = data.draw(strategies.tables_of(mdp))
    flat = flatten_tables(tables)
    assert flat.tolist() == [entry for table in tables for row in table.tolist() for entry in row]
    assert all(map(torch.equal, unflatten_tables(mdp, flat), tables))


# -- batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", strategies.KINDS)
def test_a_batch_is_a_loop(kind: str) -> None:
    mdp = batched_problem(kind)
    log_policy = mdp.log_reference
    g = draw_tables(mdp, 7)
    d, matrix, product = occupancy(mdp, log_policy), moment_matrix(mdp, log_policy), moment_product(mdp, log_policy, g)
    for i in range(3):
        single, policy = strategies.one_of(mdp, i), tuple(log[i] for log in log_policy)
        alone = occupancy(single, policy)
        for together, expected in zip((*d.state, *d.state_action), (*alone.state, *alone.state_action), strict=True):
            torch.testing.assert_close(together[i], expected, **EXACT)
        torch.testing.assert_close(matrix[i], moment_matrix(single, policy), **EXACT)
        expected_product = moment_product(single, policy, tuple(table[i] for table in g))
        for together, expected in zip(product, expected_product, strict=True):
            torch.testing.assert_close(together[i], expected, **EXACT)
        listed = enumerate_trajectories(single)
        law = listed.log_law(policy).exp()
        assert law.sum().item() == pytest.approx(1, abs=1e-14)
        sums = listed.sum_along(tuple(table[i] for table in g))
        flat = flatten_tables(g)[i]
        assert (law @ sums.square()).item() == pytest.approx((flat @ matrix[i] @ flat).item(), rel=1e-12)


@pytest.mark.parametrize("kind", strategies.KINDS)
def test_many_policies_on_one_problem_and_one_policy_on_many(kind: str) -> None:
    """The batch of the problem and that of the policy broadcast: ``(3,)`` and ``(2, 1)`` to ``(2, 3)``."""
    mdp = batched_problem(kind)
    generator = torch.Generator().manual_seed(11)
    logits = [torch.randn(2, 1, *table.shape[-2:], generator=generator, dtype=torch.float64) for table in mdp.valid]
    policies = tuple(
        torch.log_softmax(torch.where(valid, table, -torch.inf), -1)
        for table, valid in zip(logits, mdp.valid, strict=True)
    )
    d, matrix = occupancy(mdp, policies), moment_matrix(mdp, policies)
    product = flatten_tables(moment_product(mdp, policies, draw_tables(strategies.one_of(mdp, 0), 3)))
    assert matrix.shape[:-2] == product.shape[:-1] == d.state_action[0].shape[:-2] == (2, 3)
    for i in range(3):
        single = strategies.one_of(mdp, i)
        for j in range(2):
            policy = tuple(log[j, i] for log in policies)
            torch.testing.assert_close(matrix[j, i], moment_matrix(single, policy), **EXACT)
            torch.testing.assert_close(
                product[j, i], flatten_tables(moment_product(single, policy, draw_tables(single, 3))), **EXACT
            )
            torch.testing.assert_close(d.state_action[-1][j, i], occupancy(single, policy).state_action[-1], **EXACT)
        several = tuple(log[:, i] for log in policies)
        laws = enumerate_trajectories(single).log_law(several)
        assert laws.shape[0] == 2
        torch.testing.assert_close(laws.exp().sum(-1), torch.ones(2, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("kind", strategies.KINDS)
def test_the_diagonal_of_the_moment_matrix_is_the_occupancy_and_its_sums_are_horizon_times_it(kind: str) -> None:
    mdp = batched_problem(kind, horizon=4)
    matrix = moment_matrix(mdp, mdp.log_reference)
    d = flatten_tables(occupancy(mdp, mdp.log_reference).state_action)
    torch.testing.assert_close(matrix.diagonal(dim1=-2, dim2=-1), d, **EXACT)
    torch.testing.assert_close(matrix.sum(-1), 4 * d, **EXACT)


def test_mass_on_a_missing_action_stays_in_its_layer() -> None:
    mdp = RegularizedMDP(
        beta=1.0,
        initial=torch.tensor([1.0]),
        reward=[torch.zeros(1, 2), torch.zeros(2, 1)],
        reference=[torch.tensor([[1.0, 0.0]]), torch.ones(2, 1)],
        transitions=[DeterministicTransition(torch.tensor([[0, 1]]), 2)],
    )
    d = occupancy(mdp, (torch.tensor([[0.25, 0.75]]).double().log(), torch.zeros(2, 1, dtype=torch.float64)))
    assert d.state_action[0].tolist() == [[0.25, 0.75]]
    assert d.state[1].tolist() == [0.25, 0.0]


def test_gradients_flow_through_the_sweeps() -> None:
    mdp = batched_problem("dense", batch=(), horizon=2)
    logits = [torch.randn(table.shape, generator=torch.Generator().manual_seed(2)).double() for table in mdp.valid]
    g = draw_tables(mdp, 1)

    def moments(*tables: Tensor) -> tuple[Tensor, Tensor]:
        policy = tuple(
            torch.log_softmax(torch.where(valid, table, -torch.inf), -1)
            for valid, table in zip(mdp.valid, tables, strict=True)
        )
        flat = flatten_tables(g)
        return flat @ moment_matrix(mdp, policy) @ flat, flat @ flatten_tables(moment_product(mdp, policy, g))

    assert torch.autograd.gradcheck(moments, [table.requires_grad_() for table in logits])


# -- refusals ------------------------------------------------------------------------------------------------------


def test_a_batch_cannot_be_listed() -> None:
    with pytest.raises(InvalidInputError, match=r"one problem, found a batch of shape \(3,\)"):
        enumerate_trajectories(batched_problem("dense"))


def test_listing_stops_at_the_limit() -> None:
    tie = torch.full((1, 2), 0.5)
    mdp = RegularizedMDP(
        beta=1.0,
        initial=torch.ones(1),
        reward=[torch.zeros(1, 2)] * 5,
        reference=[tie] * 5,
        transitions=[DeterministicTransition(torch.zeros(1, 2, dtype=torch.int64), 1)] * 4,
    )
    assert len(enumerate_trajectories(mdp, limit=32).states) == 32
    with pytest.raises(InvalidInputError, match="at most 31 trajectories"):
        enumerate_trajectories(mdp, limit=31)
    # Refused early, not after filling the memory: 2^60 trajectories would follow.
    with pytest.raises(InvalidInputError, match="found more"):
        enumerate_trajectories(
            RegularizedMDP(
                beta=1.0,
                initial=torch.ones(1),
                reward=[torch.zeros(1, 2)] * 60,
                reference=[tie] * 60,
                transitions=[mdp.transitions[0]] * 59,
            ),
            limit=10_000,
        )
