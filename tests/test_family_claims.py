"""F1-F7: every claim about the family of losses can fail, and holds at every temperature; what their docstrings say besides."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from plants import Plant, check_that_the_verdict_turns, function, scaled

import tbrm_theory as tt
from tbrm_theory import dynamic_programming
from tbrm_theory.behaviours import Components
from tbrm_theory.claims import CLAIMS, Verdict, held_targets, select, small_problems, verify
from tbrm_theory.claims.cases import case_of
from tbrm_theory.claims.points_of_rest import REST_ON_POLICY, dr_grpo_rest
from tbrm_theory.claims.starting_points import THRESHOLD
from tbrm_theory.expected_updates import ExpectedUpdate
from tbrm_theory.fixed_points import rest
from tbrm_theory.losses import LOSSES, group_losses, policy_gradient, step_residuals, trajectory_residuals
from tbrm_theory.mdp import RegularizedMDP
from tests import strategies

WRONG_BY_A_BILLIONTH = scaled(1 + 1e-9)
ALL_BETAS = strategies.ORDINARY_BETAS + strategies.EXTREME_BETAS
ON_ANY_PROBLEM = [c for c in CLAIMS.values() if c.id[0] == "F" and c.problem not in (held_targets._bandit, None)]


def held(original: Any) -> Any:
    """``log Z`` a constant: the value of the loss is the same, its gradient is not."""

    def residual(scores: Any, *, beta: Any) -> Any:
        return original(replace(scores, log_partition=scores.log_partition.detach()), beta=beta)

    return residual


def as_if_from_the_reference(original: Any) -> Any:
    """Off-policy data for on-policy ones."""
    return lambda self, logits: original(self, self.mdp.log_reference)


def held_next_value(original: Any) -> Any:
    return lambda value: original(value.detach())


def k2(original: Any) -> Any:
    """``½ log² π/π_ref``, which has the gradient of the other divergence on-policy."""

    def estimate(scores: Any, *, corrected: bool, why: str) -> Any:
        return 0.5 * (scores.log_policy - scores.log_reference).square()

    return estimate


def without_baseline(original: Any) -> Any:
    return lambda scores, *, beta, group_size: trajectory_residuals.reward_gap(scores, beta=beta)


def half_the_critic(original: Any) -> Any:
    return lambda reward, critic, decay: original(reward, 0.5 * critic, decay)


BUGS: dict[str, Plant] = {
    "F1.a": function(group_losses, "reward_gap", WRONG_BY_A_BILLIONTH),
    "F1.b": function(trajectory_residuals, "tbrm_residual", WRONG_BY_A_BILLIONTH),
    "F2": function(trajectory_residuals, "trajectory_balance_residual", held),
    "F3.a": function(group_losses, "reward_gap", WRONG_BY_A_BILLIONTH),
    "F3.b": function(dynamic_programming, "objective", WRONG_BY_A_BILLIONTH),
    "F4.a": function(ExpectedUpdate, "_log_law", as_if_from_the_reference),
    "F4.b": function(step_residuals, "_next", held_next_value),
    "F4.c": function(policy_gradient, "_group_advantage", WRONG_BY_A_BILLIONTH),
    "F4.d": function(policy_gradient, "_k3", k2),
    "F4.e": function(policy_gradient, "_group_advantage", scaled(2.0)),
    "F4.f": function(group_losses, "kimi_residual", without_baseline),
    "F4.g": function(group_losses, "kimi_residual", without_baseline),
    "F5": function(policy_gradient, "temperature", scaled(0.0)),
    "F6.a": function(step_residuals, "_frozen", WRONG_BY_A_BILLIONTH),
    "F6.b": function(step_residuals, "_frozen", scaled(0.0)),
    "F7.a": function(step_residuals, "sql_one_step_q_residual", lambda original: step_residuals.brm_residual),
    "F7.b": function(step_residuals, "_scaled_reward", WRONG_BY_A_BILLIONTH),
    "F7.c": function(policy_gradient, "_generalised_advantage", WRONG_BY_A_BILLIONTH),
    "F7.d": function(policy_gradient, "_generalised_advantage", half_the_critic),
}


@pytest.mark.parametrize("claim_id", BUGS)
def test_a_planted_bug_turns_the_verdict(claim_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_the_verdict_turns(claim_id, BUGS[claim_id], monkeypatch, None, instances=4)


@settings(max_examples=12)
@given(strategies.problems(betas=ALL_BETAS), st.integers(0, 1000))
def test_the_claims_hold_on_every_problem(mdp: RegularizedMDP, seed: int) -> None:
    """Not only on those that they bring: rounding bounds included, at temperatures from 1e-6 to 1e6."""
    case = case_of(mdp, "generated", seed)
    assume(small_problems.few_pairs(case) is None)
    event(f"deterministic: {mdp.is_deterministic}")
    for claim in ON_ANY_PROBLEM:
        if claim.id == "F4.e" or (claim.id in ("F4.f", "F4.g") and not mdp.is_deterministic):
            continue
        comparison = claim.check(case)
        assert comparison.holds, (claim.id, comparison.error, comparison.bound)


def test_the_problems_are_of_both_kinds_and_some_are_extreme() -> None:
    made = [small_problems.any_problem(seed) for seed in range(small_problems.PROBLEMS)]
    assert {case.mdp.is_deterministic for case in made} == {True, False}
    assert all(small_problems.certain_problem(seed).mdp.is_deterministic for seed in range(6))
    assert not any(small_problems.noisy_problem(seed).mdp.is_deterministic for seed in range(6))
    betas = [case.mdp.beta.item() for case in made]
    assert {1e-6, 1e-3, 1e3} <= set(betas)
    assert sum(0.1 <= beta <= 3 for beta in betas) > len(betas) / 2
    assert all(small_problems.few_pairs(case) is None for case in made)
    left_out = [bool((case.other_policy[0][1][case.mdp.valid[0]] == -math.inf).any()) for case in made]
    assert any(left_out)


# -- F4 --------------------------------------------------------------------------------------------------------------


def test_all_that_are_said_to_rest_on_policy_are_tried() -> None:
    """Three for each problem, by turns."""
    assert set(REST_ON_POLICY) <= set(LOSSES)
    seeds = range(small_problems.PROBLEMS)
    tried = {(seed // 2 * 3 + turn) % len(REST_ON_POLICY) for seed in seeds for turn in range(3)}
    assert len(tried) == len(REST_ON_POLICY)


def test_dr_grpo_may_rest_at_the_optimum_of_other_problems() -> None:
    """F4.e needs its uniform reference: with x = 3 and q = (x/2(1-e^-x) - 1)/(e^x - 1) for the better arm, π* is a point of rest."""
    x = 3.0
    q = (x / (2 * (1 - math.exp(-x))) - 1) / (math.exp(x) - 1)
    mdp = RegularizedMDP(
        beta=1.0,
        initial=torch.ones(1),
        reward=[torch.tensor([[x, 0.0]])],
        reference=[torch.tensor([[q, 1 - q]], dtype=torch.float64)],
        transitions=[],
    )
    update = ExpectedUpdate(mdp, "dr-grpo", None)
    assert update(update.optimum[None]).abs().max() < 1e-15
    case = case_of(mdp, "by hand", 0)
    assert (dr_grpo_rest(case)[0] - case.solution.log_policy[0]).abs().max() < 1e-13


@pytest.mark.parametrize("seed", range(4))
def test_training_with_dr_grpo_ends_where_the_formula_says(seed: int) -> None:
    """The flow from the reference against the backward pass of F4.c, deterministic and stochastic."""
    case = small_problems.any_problem(seed)
    update = ExpectedUpdate(case.mdp, "dr-grpo", None)
    found = rest(update, update.row(case.mdp.log_reference, ())[None])
    assert found.converged.all()
    expected = dr_grpo_rest(case)
    regrets = [tt.regret(case.mdp, tables).item() for tables in (update.log_policy(found.point[0]), expected)]
    assert regrets[0] == pytest.approx(regrets[1], rel=1e-8)
    assert regrets[1] > 1e-6


# -- F6 --------------------------------------------------------------------------------------------------------------


def trained_value(original: Any) -> Any:
    return lambda scores: scores.value


@pytest.mark.parametrize(("bug", "side"), [(scaled(0.0), "below"), (trained_value, "above")])
def test_the_trap_is_tested_on_both_sides_of_the_threshold(
    bug: Any, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half the problems lie below; a wrong frozen value fails there, a trained one above."""
    claim = CLAIMS["F6.b"]
    assert claim.problem is not None
    cases = [claim.problem(seed) for seed in range(20)]
    below = [held_targets._advantage(case) < THRESHOLD for case in cases]
    assert sum(below) == 10
    function(step_residuals, "_frozen", bug)(monkeypatch)
    failed = [not claim.check(case).holds for case in cases]
    assert any(failed)
    assert all(low == (side == "below") for low, wrong in zip(below, failed, strict=True) if wrong)


# -- F7 --------------------------------------------------------------------------------------------------------------


def test_soft_q_learning_on_logits_finds_the_optimum_where_tbrm_cannot() -> None:
    """X1's mixture, κ = ∞: F7.a. TBRM's loss is 0 where it ends, and its policy is wrong."""
    mdp = tt.make("one-state", seed=3, horizon=2, actions=2, beta=0.5)
    parts: Components = []
    for action in (0, 1):
        table = torch.full((1, 2), -math.inf, dtype=torch.float64)
        table[0, action] = 0.0
        parts.append((0.5, (table, table)))
    ends = {}
    for loss in ("sql-one-step-q", "tbrm"):
        update = ExpectedUpdate(mdp, loss, parts)
        found = rest(update, update.row(mdp.log_reference, ())[None])
        assert found.converged.all()
        ends[loss] = tt.regret(mdp, update.log_policy(found.point[0])).item()
        if loss == "tbrm":
            assert update.expected_loss(found.point).item() < 1e-20
    assert ends["sql-one-step-q"] < 1e-18
    assert ends["tbrm"] > 1e-3


def test_a_claim_of_the_family_is_selected_by_its_number() -> None:
    outcomes = verify(select(["F5", "F6"]), None, 2)
    assert {name: outcome.verdict for name, outcome in outcomes.items()} == dict.fromkeys(
        ("F5", "F6.a", "F6.b"), Verdict.HOLDS
    )
