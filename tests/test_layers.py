"""Every public function of tables refuses a wrong layer, whichever it is: nothing is broadcast, and no NaN comes back.

The annotations that are checked under pytest see one layer of a tuple, and nothing checks them elsewhere.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import jaxtyping
import pytest
import torch
from drawn import random_policy, random_problem
from torch import Tensor

from tbrm_theory import bounds, coverage, dynamic_programming, occupancy, population
from tbrm_theory.behaviours import HistoryBehaviour, MarkovBehaviour, MixtureBehaviour
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.parametrisations import Tabular
from tbrm_theory.scores import table_scores
from tbrm_theory.shapes import PerLayerStateAction
from tbrm_theory.trajectories import sample_trajectories

MDP = random_problem("deterministic")
POLICY = random_policy(MDP, 1)


def scores(logits: PerLayerStateAction, reward: PerLayerStateAction) -> Any:
    batch = sample_trajectories(MDP, POLICY, 3, torch.Generator().manual_seed(0))
    return table_scores(logits, MDP.log_reference, reward, batch)


TAKES_LAYERS: dict[str, Callable[[PerLayerStateAction], Any]] = {
    "evaluate": lambda t: dynamic_programming.evaluate(MDP, t),
    "objective": lambda t: dynamic_programming.objective(MDP, t),
    "regret": lambda t: dynamic_programming.regret(MDP, t),
    "policy_kl": lambda t: dynamic_programming.policy_kl(MDP, POLICY, t),
    "bellman_operator": lambda t: dynamic_programming.bellman_operator(MDP, t),
    "policy_bellman_operator, policy": lambda t: dynamic_programming.policy_bellman_operator(MDP, t, MDP.reward),
    "policy_bellman_operator, q": lambda t: dynamic_programming.policy_bellman_operator(MDP, POLICY, t),
    "occupancy": lambda t: occupancy.occupancy(MDP, t),
    "log_occupancy": lambda t: occupancy.log_occupancy(MDP, t),
    "moment_matrix": lambda t: occupancy.moment_matrix(MDP, t),
    "log_moment_matrix": lambda t: occupancy.log_moment_matrix(MDP, t),
    "moment_product, policy": lambda t: occupancy.moment_product(MDP, t, MDP.reward),
    "moment_product, g": lambda t: occupancy.moment_product(MDP, POLICY, t),
    "additive_moments, tables": lambda t: population.additive_moments(MDP, t, POLICY),
    "additive_moments, policy": lambda t: population.additive_moments(MDP, MDP.reward, t),
    "residual_terms": lambda t: population.residual_terms(MDP, t),
    "soft_plan": lambda t: population.soft_plan(MDP, t),
    "population_loss, logits": lambda t: population.population_loss(MDP, t, POLICY),
    "population_loss, policy": lambda t: population.population_loss(MDP, MDP.reward, t),
    "population_loss, mixture": lambda t: population.population_loss(
        MDP, MDP.reward, MixtureBehaviour((0.5, 0.5), (POLICY, t))
    ),
    "population_loss, history": lambda t: population.population_loss(MDP, MDP.reward, HistoryBehaviour(t, 0.5)),
    "noise_floor": lambda t: population.noise_floor(MDP, t),
    "corollary4": lambda t: bounds.corollary4(MDP, t),
    "change_of_measure, policy": lambda t: coverage.change_of_measure(MDP, t, POLICY),
    "change_of_measure, data": lambda t: coverage.change_of_measure(MDP, POLICY, t),
    "change_of_measure, mixture": lambda t: coverage.change_of_measure(
        MDP, POLICY, MixtureBehaviour((0.5, 0.5), (POLICY, t))
    ),
    "kappa, behaviour": lambda t: coverage.kappa(MDP, POLICY, MarkovBehaviour(t)),
    "sample": lambda t: sample_trajectories(MDP, t, 3, torch.Generator().manual_seed(0)),
    "table_scores, logits": lambda t: scores(t, MDP.reward),
    "table_scores, reward": lambda t: scores(POLICY, t),
    "rewards of a problem": lambda t: RegularizedMDP(
        beta=0.5, initial=MDP.initial, reward=t, reference=MDP.reference, transitions=MDP.transitions
    ),
}

IGNORES_NAN = ("table_scores, logits", "table_scores, reward")  # on pairs that no trajectory visits; losses refuse it


def one_nan(table: Tensor) -> Tensor:
    spoilt = table.clone()
    spoilt[0, 1] = math.nan
    return spoilt


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "one action": lambda table: torch.zeros_like(table[:, :1]),
    "one state": lambda table: table[:1],
    "states twice": lambda table: torch.cat([table, table]),
    "nan": one_nan,
}


@pytest.mark.parametrize("name", TAKES_LAYERS)
def test_a_wrong_layer_is_refused_whichever_it_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the package's own checks must do
    call = TAKES_LAYERS[name]
    call(POLICY if name != "rewards of a problem" else MDP.reward)
    for sort, wrong in WRONG.items():
        if sort == "nan" and name in IGNORES_NAN:
            continue
        for h in range(1, MDP.horizon):
            tables = (*POLICY[:h], wrong(POLICY[h]), *POLICY[h + 1 :])
            if name == "rewards of a problem":
                tables = (*MDP.reward[:h], wrong(MDP.reward[h]), *MDP.reward[h + 1 :])
            with pytest.raises(InvalidInputError, match=rf"\[{h}\]"):
                call(tables)
    for tables in (POLICY[:-1], (*POLICY, POLICY[-1])):
        with pytest.raises(InvalidInputError):
            call(tables)


def test_data_of_coefficients_must_be_policies() -> None:
    doubled = tuple(log + math.log(2.0) for log in POLICY)
    for data in (MarkovBehaviour(doubled), MixtureBehaviour((0.5, 0.5), (POLICY, doubled))):
        with pytest.raises(InvalidInputError, match=r"^mu\[0\]\[0\]: expected log-probabilities of a distribution"):
            coverage.kappa(MDP, POLICY, data)


def test_tables_to_sum_along_trajectories_are_one_for_each_layer() -> None:
    listed = occupancy.enumerate_trajectories(MDP)
    for tables in (POLICY[:-1], (*POLICY, POLICY[-1])):
        with pytest.raises(InvalidInputError, match=r"^tables: expected 4 layers, found "):
            listed.sum_along(tables)


def test_parameters_of_other_tables_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(
        InvalidInputError, match=r"^logits\[2\]: expected \(states, actions\) = \(4, 2\), found \(8, 2\)"
    ):
        Tabular(MDP).parameters((*POLICY[:2], WRONG["states twice"](POLICY[2]), POLICY[3]))


def test_sums_along_trajectories_ignore_what_is_never_taken_and_refuse_the_infinite() -> None:
    """R_β is -inf at actions that do not exist, and 0 · ∞ would be NaN."""
    zeros = tuple(
        torch.where(valid, table, 0.0) for valid, table in zip(MDP.valid, MDP.regularized_reward, strict=True)
    )
    assert any(bool(table.isinf().any()) for table in MDP.regularized_reward)
    product = occupancy.moment_product(MDP, POLICY, MDP.regularized_reward)
    for one, other in zip(product, occupancy.moment_product(MDP, POLICY, zeros), strict=True):
        assert torch.equal(one, other)
    moments, expected = (population.additive_moments(MDP, u, POLICY) for u in (MDP.regularized_reward, zeros))
    assert torch.equal(moments.mean, expected.mean)
    assert torch.equal(moments.variance, expected.variance)
    infinite = (*zeros[:2], torch.full_like(zeros[2], -math.inf), zeros[3])
    with pytest.raises(InvalidInputError, match=r"^g\[2\]\[0\]\[0\]: expected a finite number"):
        occupancy.moment_product(MDP, POLICY, infinite)
    with pytest.raises(InvalidInputError, match=r"^tables\[2\]\[0\]\[0\]: expected a finite number"):
        population.additive_moments(MDP, infinite, POLICY)


def test_bellman_operators_ignore_actions_that_do_not_exist() -> None:
    """A finite number there would enter the log-sum-exp."""
    q = tuple(torch.where(valid, log, -math.inf) for valid, log in zip(MDP.valid, POLICY, strict=True))
    filled = tuple(torch.where(valid, log, 7.0) for valid, log in zip(MDP.valid, q, strict=True))
    assert any(not torch.equal(one, other) for one, other in zip(q[1:], filled[1:], strict=True))
    for operator in (
        lambda table: dynamic_programming.bellman_operator(MDP, table),
        lambda table: dynamic_programming.policy_bellman_operator(MDP, POLICY, table),
    ):
        for one, other in zip(operator(q), operator(filled), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("test", ["one", "another"])  # each begins anew
def test_under_pytest_the_first_calls_of_a_function_check_its_annotations(test: str) -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match="soft_value"):
        dynamic_programming.soft_value(torch.zeros(3))
    for _ in range(3):
        dynamic_programming.soft_value(torch.zeros(2, 3))
    if os.environ.get("HYPOTHESIS_PROFILE") == "thorough":
        with pytest.raises(jaxtyping.TypeCheckError, match="soft_value"):
            dynamic_programming.soft_value(torch.zeros(3))
    else:
        assert dynamic_programming.soft_value(torch.zeros(3)).shape == ()
