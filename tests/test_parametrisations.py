"""Tables, linear features and a network: logits, and their derivative as a product, an adjoint and a matrix."""

from __future__ import annotations

import math
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tbrm_theory.dynamic_programming import regret, soft_policy, solve
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.families import make
from tbrm_theory.losses import tbrm_residual
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.occupancy import enumerate_trajectories, flatten_tables
from tbrm_theory.parametrisations import Linear, Network, Tabular, linear_features
from tbrm_theory.population import population_loss
from tbrm_theory.scores import table_scores
from tbrm_theory.trajectories import TrajectoryBatch
from tests import reference as rf
from tests import strategies
from tests.convert import plain
from tests.drawn import KINDS, parametrisation, random_problem, short_answers

CLOSE: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
SORTS = ("tabular", "linear", "network")
every_sort = pytest.mark.parametrize("sort", SORTS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat_cells(mdp: RegularizedMDP) -> list[tuple[int, int, int]]:
    """``(h, s, a)`` in the order of the flat vector."""
    return [
        (h, s, a) for h, table in enumerate(mdp.reference) for s in range(table.shape[0]) for a in range(table.shape[1])
    ]


# -- tables --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["tbrm", "brm"])
@given(data=st.data())
def test_the_free_logits_are_exactly_those_that_change_a_residual(data: st.DataObject, loss: str) -> None:
    """I8, by brute force: each logit is moved alone, and the residuals of all trajectories are compared.

    TBRM does not see the only action of a state after the first layer; BRM does.
    """
    mdp = data.draw(strategies.problems())
    logits = data.draw(strategies.tables_of(mdp))
    problem, table = plain(mdp), [mdp.rows(h, layer) for h, layer in enumerate(logits)]
    residuals = rf.step_residuals if loss == "brm" else lambda *arguments: [rf.residual(*arguments)]

    def matters(h: int, s: int, a: int) -> bool:
        if a >= len(table[h][s]):
            return False  # a cell beyond the actions that the state lists
        moved = rf.tabulate(table, lambda *cell: table[cell[0]][cell[1]][cell[2]] + 0.5 * (cell == (h, s, a)))
        return any(
            abs(one - other) > 1e-6
            for trajectory in rf.trajectories(problem)
            for one, other in zip(
                residuals(problem, moved, trajectory), residuals(problem, table, trajectory), strict=True
            )
        )

    expected = [i for i, cell in enumerate(flat_cells(mdp)) if matters(*cell)]
    found = Tabular(mdp, loss=loss)
    assert found.free.tolist() == expected
    assert found.size == len(expected)


def test_a_state_reached_with_the_tiniest_probability_is_reached() -> None:
    """Products of probabilities would underflow after 1100 layers of ½; whether a state is reached does not."""
    mdp = make("combination-lock", horizon=1200)
    free = Tabular(mdp).free
    assert len(free) == 2 + 4 * 1199


def test_brm_can_be_fitted_where_an_action_has_no_alternative() -> None:
    """Q* is among the logits of ``Tabular(mdp, loss="brm")``; without the only actions it is not."""
    mdp = random_problem("deterministic")
    assert any((valid.sum(-1) == 1).any() for valid in mdp.valid[1:])
    optimal = tuple(torch.where(valid, q, 0.0) for valid, q in zip(mdp.valid, solve(mdp).q, strict=True))
    losses = []
    for loss in ("brm", "tbrm"):
        table = Tabular(mdp, loss=loss)
        losses.append(
            population_loss(mdp, table.logits(table.parameters(optimal)), mdp.log_reference, loss="brm").item()
        )
    assert losses[0] < 1e-28
    assert losses[1] > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_and_logits_are_inverse(kind: str) -> None:
    mdp = random_problem(kind)
    table = Tabular(mdp)
    theta = table.initial(3, generator())
    logits = table.logits(theta)
    assert [layer.shape for layer in logits] == [(3, *layer.shape) for layer in mdp.reference]
    assert torch.equal(table.parameters(logits), theta)
    others = torch.ones(len(flat_cells(mdp)), dtype=torch.bool)
    others[table.free] = False
    assert others.any()
    assert not flatten_tables(logits)[:, others].any()


def residuals_of(mdp: RegularizedMDP, logits: tuple[Tensor, ...]) -> Tensor:
    """``f_θ`` on every trajectory."""
    listed = enumerate_trajectories(mdp)
    batch = TrajectoryBatch(listed.states, listed.actions, torch.ones_like(listed.states, dtype=torch.bool))
    return tbrm_residual(table_scores(logits, mdp.log_reference, mdp.reward, batch), beta=mdp.beta)


def test_a_step_of_a_table_changes_the_residual_linearly() -> None:
    """I14, deterministic transitions: by exactly Σ_h step_h(s_h, a_h) on every trajectory, however long the step is."""
    mdp = random_problem("deterministic")
    table, listed = Tabular(mdp), enumerate_trajectories(mdp)
    theta, step = table.initial(2, generator()), 30.0 * table.initial(2, generator(1))
    start = residuals_of(mdp, table.logits(theta))
    moved = residuals_of(mdp, table.logits(table.moved(theta, step)))
    torch.testing.assert_close(moved - start, listed.sum_along(table.logits(step)), rtol=1e-12, atol=1e-12)
    straight = residuals_of(mdp, table.logits(theta + step))
    assert (straight - moved).abs().max() > 10  # adding it to the logits is something else


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_a_step_of_a_table_is_one_of_the_logits_to_first_order(kind: str) -> None:
    """Stochastic transitions: f changes along ``moved`` as along ``theta + step``."""
    mdp = random_problem(kind)
    table = Tabular(mdp)
    theta, step = table.initial(1, generator())[0], 3.0 * table.initial(1, generator(1))[0]
    start = residuals_of(mdp, table.logits(theta))
    slope = torch.func.jvp(lambda x: residuals_of(mdp, table.logits(x)), (theta,), (step,))[1]
    assert slope.abs().max() > 1
    for size in (1e-4, 1e-3):
        along = residuals_of(mdp, table.logits(table.moved(theta, size * step))) - start
        torch.testing.assert_close(along, size * slope, rtol=0.0, atol=100 * size**2)


# -- derivatives ---------------------------------------------------------------------------------------------------------


@every_sort
@pytest.mark.parametrize("kind", KINDS)
def test_the_derivative_is_that_of_finite_differences_in_all_its_forms(sort: str, kind: str) -> None:
    """``J v`` by central differences; the matrix and the adjoint by ``J v`` and ``⟨w, J v⟩ = ⟨Jᵀ w, v⟩``; for a batch of seeds."""
    mdp = random_problem(kind)
    map_ = parametrisation(sort, mdp)
    theta, v = map_.initial(3, generator()), map_.initial(3, generator(1))
    w = torch.randn(3, len(flat_cells(mdp)), generator=generator(2), dtype=torch.float64)
    small = 1e-5
    differences = (map_.flat_logits(theta + small * v) - map_.flat_logits(theta - small * v)) / (2 * small)
    change = map_.derivative(theta, v)
    torch.testing.assert_close(change, differences, rtol=1e-7, atol=1e-8)
    back = map_.adjoint(theta, w)
    torch.testing.assert_close((w * change).sum(-1), (back * v).sum(-1), **CLOSE)
    jacobian = map_.jacobian(theta)
    assert jacobian.shape == (3, len(flat_cells(mdp)), map_.size)
    torch.testing.assert_close((jacobian @ v.unsqueeze(-1)).squeeze(-1), change, **CLOSE)
    torch.testing.assert_close((jacobian.mT @ w.unsqueeze(-1)).squeeze(-1), back, **CLOSE)
    torch.testing.assert_close(map_.jacobian(theta[0]), jacobian[0], **CLOSE)  # without a seed dimension, too


@every_sort
def test_seeds_are_a_loop(sort: str) -> None:
    mdp = random_problem("dense")
    map_ = parametrisation(sort, mdp)
    theta, step = map_.initial(3, generator()), map_.initial(3, generator(1))
    assert theta.shape == (3, map_.size)
    whole, moved = map_.logits(theta), map_.moved(theta, step)
    for i in range(3):
        for layer, alone in zip(whole, map_.logits(theta[i]), strict=True):
            torch.testing.assert_close(layer[i], alone, **CLOSE)
        torch.testing.assert_close(moved[i], map_.moved(theta[i], step[i]), **CLOSE)


@every_sort
def test_starting_points_are_normal_and_those_of_their_seed(sort: str) -> None:
    map_ = parametrisation(sort, make("frozen-lake", size=4, horizon=6))
    draws = map_.initial(400, generator(), scale=3.0)
    assert torch.equal(draws, map_.initial(400, generator(), scale=3.0))
    assert not torch.equal(draws, map_.initial(400, generator(1), scale=3.0))
    assert draws.mean().item() == pytest.approx(0, abs=6 * 3 / draws.numel() ** 0.5)
    assert draws.std().item() == pytest.approx(3, abs=6 * 3 / draws.numel() ** 0.5)


# -- linear features and the network -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_realisable_features_hold_the_optimum(kind: str) -> None:
    mdp = random_problem(kind)
    features = linear_features(mdp, 4, generator(), realisable=True)
    optimal = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    logits = Linear(mdp, features).logits(optimal)
    for valid, layer, q in zip(mdp.valid, logits, solve(mdp).q, strict=True):
        assert torch.equal(layer[valid], q[valid])
        assert not layer[~valid].any()
    log_policy = tuple(
        soft_policy(torch.where(valid, layer, -torch.inf)) for valid, layer in zip(mdp.valid, logits, strict=True)
    )
    assert regret(mdp, log_policy).item() < 1e-28


def test_other_features_do_not_hold_the_optimum() -> None:
    """No θ gives Q*: the least-squares distance is far from 0. Everything else is drawn alike."""
    mdp = random_problem("deterministic")
    features = linear_features(mdp, 4, generator(), realisable=False)
    optimal = flatten_tables(tuple(torch.where(v, q, 0.0) for v, q in zip(mdp.valid, solve(mdp).q, strict=True)))
    closest = features @ torch.linalg.lstsq(features, optimal.unsqueeze(-1)).solution.squeeze(-1)
    assert (closest - optimal).norm() > 1
    assert torch.equal(features[:, 1:], linear_features(mdp, 4, generator(), realisable=True)[:, 1:])


def test_a_linear_map_is_the_product_with_its_features() -> None:
    mdp = random_problem("dense")
    features = linear_features(mdp, 3, generator(), realisable=False)
    theta = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    flat = flatten_tables(Linear(mdp, features).logits(theta))
    rows = [math.fsum(x * t for x, t in zip(row, theta.tolist(), strict=True)) for row in features.tolist()]
    assert flat.tolist() == pytest.approx(rows)


def test_the_states_of_a_network_share_its_weights() -> None:
    """Every parameter moves logits in several states and layers, and their number does not grow with the horizon."""
    short, long = (Network(make("chain", horizon=horizon), generator()) for horizon in (3, 9))
    assert short.size == long.size
    network = Network(random_problem("dense"), generator(), features=3, width=4)
    jacobian = network.jacobian(network.initial(1, generator()))[0]
    layers = torch.tensor([h for h, _, _ in flat_cells(network.mdp)])
    for column in jacobian.T[: 3 * 4 + 4 * 4]:
        assert len(layers[column != 0].unique()) == network.mdp.horizon


def test_a_network_is_two_layers_of_tanh_and_a_linear_one_by_plain_loops() -> None:
    """Weights are divided by the root of the number of inputs, so that wide and narrow layers start alike."""
    mdp = random_problem("dense")
    network = Network(mdp, generator(), features=3, width=4)
    theta = network.initial(1, generator(5))[0]
    weights = iter(theta.tolist())
    actions = max(table.shape[-1] for table in mdp.reference)
    layers = [
        [[next(weights) / math.sqrt(rows) for _ in range(columns)] for _ in range(rows)]
        for rows, columns in ((3, 4), (4, 4), (4, actions))
    ]
    assert next(weights, None) is None

    def through(values: list[float], matrix: list[list[float]]) -> list[float]:
        return [math.fsum(x * row[j] for x, row in zip(values, matrix, strict=True)) for j in range(len(matrix[0]))]

    expected = []
    states = iter(network._inputs.tolist())
    for table in mdp.reference:
        for _ in range(table.shape[0]):
            first = [math.tanh(x) for x in through(next(states), layers[0])]
            second = [math.tanh(x) for x in through(first, layers[1])]
            expected += through(second, layers[2])[: table.shape[1]]
    assert network.flat_logits(theta).tolist() == pytest.approx(expected, rel=1e-12)


def test_a_network_is_the_one_that_its_generator_draws() -> None:
    mdp = random_problem("dense")
    theta = Network(mdp, generator(), features=3, width=4).initial(1, generator(5))
    one, same, other = (Network(mdp, generator(seed), features=3, width=4).flat_logits(theta) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# -- errors --------------------------------------------------------------------------------------------------------------


def test_a_batch_of_problems_has_no_parametrisation() -> None:
    mdp = make("garnet", horizon=2, states=3, actions=2, missing=0.3, batch=3)
    with pytest.raises(InvalidInputError, match=r"^mdp: expected one set of states and actions, found .* \(3,\)"):
        Tabular(mdp)
    with pytest.raises(InvalidInputError, match=r"^mdp: expected one problem, found a batch of shape \(3,\)"):
        linear_features(mdp, 2, generator(), realisable=True)


def test_an_unknown_loss_has_no_table() -> None:
    with pytest.raises(InvalidInputError, match=r"^loss: expected one of tbrm, brm, found 'ppo'"):
        Tabular(short_answers(), loss="ppo")


@pytest.mark.parametrize("shape", [(5, 2), (12, 0), (12,)])
def test_features_of_another_shape_are_refused(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the package's own checks must do
    mdp = short_answers()
    assert len(flat_cells(mdp)) == 12
    with pytest.raises(InvalidInputError, match=r"^features: expected 12 rows, one for each pair, and at least one"):
        Linear(mdp, torch.zeros(shape, dtype=torch.float64))


def test_features_must_be_finite() -> None:
    mdp = short_answers()
    features = torch.zeros(12, 2, dtype=torch.float64)
    features[3, 1] = math.nan
    with pytest.raises(InvalidInputError, match=r"^features\[3\]\[1\]: expected a finite number"):
        Linear(mdp, features)


def test_sizes_must_be_positive() -> None:
    mdp = short_answers()
    with pytest.raises(InvalidInputError, match=r"^dimension: expected at least 1, found 0"):
        linear_features(mdp, 0, generator(), realisable=True)
    for option in ("features", "width"):
        with pytest.raises(InvalidInputError, match=rf"^{option}: expected at least 1, found 0"):
            Network(mdp, generator(), **{option: 0})
    for map_ in (Tabular(mdp), Network(mdp, generator())):
        with pytest.raises(InvalidInputError, match=r"^seeds: expected at least 1, found 0"):
            map_.initial(0, generator())
