"""Scores of tables against a plain loop over trajectories, on every kind of problem; and what the losses make of them (I5)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from torch import Tensor

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.losses import RESIDUALS, brm_residual, first_logit_residual, tbrm_residual
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.occupancy import enumerate_trajectories, flatten_tables
from tbrm_theory.scores import pair_index, table_scores
from tbrm_theory.shapes import PerLayerStateAction
from tbrm_theory.trajectories import TrajectoryBatch, sample_trajectories, trajectory_return
from tests import reference as rf
from tests import strategies
from tests.convert import plain
from tests.drawn import KINDS, random_problem, short_answers

CLOSE: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
every_kind = pytest.mark.parametrize("kind", KINDS)


def everything(mdp: RegularizedMDP) -> TrajectoryBatch:
    """Every trajectory of a small problem, without padding."""
    listed = enumerate_trajectories(mdp)
    return TrajectoryBatch(listed.states, listed.actions, torch.ones_like(listed.states, dtype=torch.bool))


def draw_logits(mdp: RegularizedMDP, *batch: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Random logits; those of actions that do not exist are NaN, so that nothing may read them."""
    generator = torch.Generator().manual_seed(seed)
    tables = [torch.randn(*batch, *valid.shape, generator=generator, dtype=torch.float64) for valid in mdp.valid]
    return tuple(torch.where(valid, table, math.nan) for valid, table in zip(mdp.valid, tables, strict=True))


def as_table(mdp: RegularizedMDP, tables: PerLayerStateAction) -> rf.Table:
    return [mdp.rows(h, layer) for h, layer in enumerate(tables)]


@given(st.data())
def test_scores_are_what_a_plain_loop_reads(data: st.DataObject) -> None:
    """Ragged layers, missing actions, one state, one action: every field, on every trajectory."""
    mdp = data.draw(strategies.problems())
    logits = data.draw(strategies.tables_of(mdp))
    other = data.draw(strategies.tables_of(mdp))
    first, critic = other[0], tuple(table.sum(-1) for table in other)
    batch, problem, table = everything(mdp), plain(mdp), as_table(mdp, logits)
    event(f"{mdp.horizon} layers")
    scores = table_scores(
        logits,
        mdp.log_reference,
        mdp.reward,
        batch,
        reference_first_logits=first,
        frozen_first_logits=2 * first,
        frozen_logits=other,
        behaviour_log_policy=mdp.log_reference,
        log_partition=critic[0],
        baseline=2 * critic[0],
        critic=critic,
        entropy=True,
    )
    frozen = rf.soft_value(problem, as_table(mdp, other))
    values, policy = rf.soft_value(problem, table), rf.softmax_policy(problem, table)
    reference_value, frozen_value = (
        rf.soft_value(problem, as_table(mdp, (scale * first, *logits[1:])))[0] for scale in (1, 2)
    )
    for i, trajectory in enumerate(zip(batch.states.tolist(), batch.actions.tolist(), strict=True)):
        steps = list(enumerate(zip(*trajectory, strict=True)))
        expected = {
            "log_policy": [math.log(policy[h][s][a]) for h, (s, a) in steps],
            "log_reference": [math.log(problem.reference[h][s][a]) for h, (s, a) in steps],
            "value": [values[h][s] for h, (s, a) in steps],
            "reward": [problem.reward[h][s][a] for h, (s, a) in steps],
            "initial_value": values[0][trajectory[0][0]],
            "first_logit": table[0][trajectory[0][0]][trajectory[1][0]],
            "trajectory_return": math.fsum(problem.reward[h][s][a] for h, (s, a) in steps),
            "reference_initial_value": reference_value[trajectory[0][0]],
            "frozen_initial_value": frozen_value[trajectory[0][0]],
            "frozen_value": [frozen[h][s] for h, (s, a) in steps],
            "behaviour_log_policy": [math.log(problem.reference[h][s][a]) for h, (s, a) in steps],
            "log_partition": critic[0][trajectory[0][0]].item(),
            "baseline": 2 * critic[0][trajectory[0][0]].item(),
            "critic": [critic[h][s].item() for h, (s, a) in steps],
            "entropy": [-math.fsum(p * math.log(p) for p in policy[h][s] if p > 0) for h, (s, a) in steps],
        }
        for name, value in expected.items():
            assert getattr(scores, name)[i].tolist() == pytest.approx(value, rel=1e-12, abs=1e-12), name
    assert expected.keys() | {"mask"} == {field.name for field in dataclasses.fields(scores)}
    assert torch.equal(scores.mask, batch.mask)


@every_kind
def test_logits_of_missing_actions_are_ignored(kind: str) -> None:
    """Whatever they hold; and they get no gradient."""
    mdp = random_problem(kind)
    assert not all(valid.all() for valid in mdp.valid)
    batch, logits = everything(mdp), draw_logits(mdp)
    leaves = tuple(table.requires_grad_() for table in logits)
    scores = table_scores(leaves, mdp.log_reference, mdp.reward, batch, frozen_logits=logits, entropy=True)
    zeros = tuple(torch.where(valid, table, 0.0) for valid, table in zip(mdp.valid, logits, strict=True))
    expected_scores = table_scores(zeros, mdp.log_reference, mdp.reward, batch, frozen_logits=zeros, entropy=True)
    for name, expected in expected_scores.given().items():
        assert torch.equal(getattr(scores, name), expected), name
    total = torch.stack([score.sum() for score in scores.given().values() if score.requires_grad]).sum()
    for gradient, valid in zip(torch.autograd.grad(total, leaves), mdp.valid, strict=True):
        assert torch.isfinite(gradient).all()
        assert not gradient[~valid].any()


@pytest.mark.parametrize("name", [name for name in RESIDUALS if name != "sql-multi-step-q"])
@every_kind
def test_the_gradient_in_the_logits_is_that_of_finite_differences(kind: str, name: str) -> None:
    """Through the gathers, the softmax and the residual; for a batch of logits, some rows of the data repeated.

    Not where the residual holds a part of what the logits give constant.
    """
    mdp = random_problem(kind)
    batch = everything(mdp).rows(torch.tensor([0, 3, 3, 5]))
    logits = [torch.where(valid, table, 0.0) for valid, table in zip(mdp.valid, draw_logits(mdp, 2), strict=True)]

    def residual(*tables: Tensor) -> Tensor:
        scores = table_scores(
            tables,
            mdp.log_reference,
            mdp.reward,
            batch,
            reference_first_logits=logits[0],
            frozen_logits=tuple(logits),
            log_partition=logits[0].sum(-1),
            baseline=logits[0].sum(-1),
            critic=tuple(table.sum(-1) for table in logits),
        )
        return RESIDUALS[name](scores, beta=mdp.beta)

    leaves = [table.clone().requires_grad_() for table in logits]
    assert torch.autograd.gradcheck(residual, leaves, atol=1e-7, rtol=1e-6, fast_mode=True)


@every_kind
@pytest.mark.parametrize("data_batched", [False, True])
def test_a_batch_of_seeds_is_a_loop(kind: str, data_batched: bool) -> None:
    """Logits ``(B, …)`` with one data set for all, or with one each."""
    mdp, seeds = random_problem(kind), 3
    logits = draw_logits(mdp, seeds)
    whole = everything(mdp)
    rows = torch.randint(whole.count, (seeds, 6), generator=torch.Generator().manual_seed(1))
    batch = TrajectoryBatch(whole.states[rows], whole.actions[rows], whole.mask[rows]) if data_batched else whole
    scores = table_scores(logits, mdp.log_reference, mdp.reward, batch)
    assert scores.batch_shape == (seeds,)
    for i in range(seeds):
        alone = table_scores(
            tuple(table[i] for table in logits),
            mdp.log_reference,
            mdp.reward,
            whole.rows(rows[i]) if data_batched else whole,
        )
        for name, expected in alone.given().items():
            own = getattr(scores, name)
            own = own[i] if own.dim() > expected.dim() else own
            torch.testing.assert_close(own, expected, **CLOSE)


def test_one_set_of_logits_meets_a_batch_of_problems() -> None:
    """Rewards and references with a batch dimension of their own."""
    mdp = random_problem("deterministic")
    batch, logits = everything(mdp), draw_logits(mdp)
    rewards = tuple(torch.stack([table, 2 * table, -table]) for table in mdp.reward)
    scores = table_scores(logits, mdp.log_reference, rewards, batch)
    expected = table_scores(logits, mdp.log_reference, mdp.reward, batch).trajectory_return
    assert scores.trajectory_return.shape == (3, batch.count)
    torch.testing.assert_close(scores.trajectory_return, torch.stack([expected, 2 * expected, -expected]), **CLOSE)


def test_padding_does_not_count_in_the_return() -> None:
    """Responses of different length: the return is that of the steps before the end."""
    mdp = short_answers()
    batch = sample_trajectories(mdp, mdp.log_reference, 200, torch.Generator().manual_seed(0))
    assert not batch.mask.all()
    rewards = tuple(table + 100.0 * (torch.arange(2) == 0).unsqueeze(-1) for table in mdp.reward)  # state 0 is the end
    scores = table_scores(draw_logits(mdp), mdp.log_reference, rewards, batch)
    step = torch.where(batch.states == 0, 100.0, 0.0).double()
    expected = trajectory_return(mdp, batch) + torch.where(batch.mask, step, 0.0).sum(-1)
    torch.testing.assert_close(scores.trajectory_return, expected, **CLOSE)


def test_masked_steps_of_a_finished_response_change_no_trajectory_residual() -> None:
    """After the end everything is forced and rewardless: cutting it off or not is the same to TBRM (theory.md §0)."""
    mdp = short_answers()
    batch = sample_trajectories(mdp, mdp.log_reference, 50, torch.Generator().manual_seed(0))
    unmasked = TrajectoryBatch(batch.states, batch.actions, torch.ones_like(batch.mask))
    logits = draw_logits(mdp)
    cut, whole = (table_scores(logits, mdp.log_reference, mdp.reward, data) for data in (batch, unmasked))
    torch.testing.assert_close(tbrm_residual(cut, beta=mdp.beta), tbrm_residual(whole, beta=mdp.beta), **CLOSE)


def test_observed_returns_take_the_place_of_the_exact_ones() -> None:
    mdp = random_problem("sparse")
    batch = everything(mdp)
    observed = torch.arange(batch.count, dtype=torch.float64)
    scores = table_scores(draw_logits(mdp), mdp.log_reference, mdp.reward, batch, trajectory_return=observed)
    assert torch.equal(scores.trajectory_return, observed)


# -- the residuals of tables -------------------------------------------------------------------------------------------


@given(st.data())
def test_every_form_of_the_residual_is_the_defining_one(data: st.DataObject) -> None:
    """I5: Σ_h [logit − R_β − V(next)], V + log-ratio − r/β, and Algorithm 1's first-logit form, on every trajectory."""
    mdp = data.draw(strategies.problems())
    logits = data.draw(strategies.tables_of(mdp))
    batch, problem, table = everything(mdp), plain(mdp), as_table(mdp, logits)
    scores = table_scores(logits, mdp.log_reference, mdp.reward, batch)
    trajectories = [
        tuple(zip(s, a, strict=True)) for s, a in zip(batch.states.tolist(), batch.actions.tolist(), strict=True)
    ]
    defined = [rf.residual(problem, table, trajectory) for trajectory in trajectories]
    close: dict[str, Any] = {"rel": 1e-11, "abs": 1e-11}
    assert tbrm_residual(scores, beta=mdp.beta).tolist() == pytest.approx(defined, **close)
    assert first_logit_residual(scores, beta=mdp.beta).tolist() == pytest.approx(defined, **close)
    assert brm_residual(scores, beta=mdp.beta).sum(-1).tolist() == pytest.approx(defined, **close)
    for own, trajectory in zip(brm_residual(scores, beta=mdp.beta).tolist(), trajectories, strict=True):
        assert own == pytest.approx(rf.step_residuals(problem, table, trajectory), **close)


def test_the_reference_model_has_no_reval_residual_without_reward() -> None:
    """X6: at θ = θ_ref and r = 0 TBRM's residual is V_ref(s_1), ReVal's is 0."""
    mdp = random_problem("dense")
    shift = torch.randn(3, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = (mdp.log_reference[0] + shift, *mdp.log_reference[1:])  # V_ref(s_1) = shift
    nothing = tuple(torch.zeros_like(table) for table in mdp.reward)
    batch = everything(mdp)
    scores = table_scores(logits, mdp.log_reference, nothing, batch, reference_first_logits=logits[0])
    start = shift.squeeze(-1)[batch.states[:, 0]]
    assert start.abs().min() > 1e-3
    torch.testing.assert_close(RESIDUALS["tbrm"](scores, beta=mdp.beta), start, **CLOSE)
    torch.testing.assert_close(RESIDUALS["reval"](scores, beta=mdp.beta), torch.zeros_like(start), **CLOSE)


# -- errors ------------------------------------------------------------------------------------------------------------


@every_kind
def test_positions_are_those_of_the_flat_tables(kind: str) -> None:
    mdp = random_problem(kind)
    batch = everything(mdp)
    flat = flatten_tables(mdp.reward)
    steps = [mdp.reward[h][batch.states[:, h], batch.actions[:, h]] for h in range(mdp.horizon)]
    assert torch.equal(flat[pair_index(mdp.reward, batch)], torch.stack(steps, dim=-1))


@pytest.mark.parametrize("field", ["states", "actions"])
@pytest.mark.parametrize("outside", [-1, 4])
def test_an_index_outside_its_layer_is_refused(field: str, outside: int) -> None:
    """It would read another state's cell without a word."""
    mdp = random_problem("dense")
    batch = everything(mdp)
    table = getattr(batch, field).clone()
    table[3, 1] = outside
    tables = {"states": batch.states, "actions": batch.actions, field: table}
    bad = TrajectoryBatch(tables["states"], tables["actions"], batch.mask)
    with pytest.raises(
        InvalidInputError, match=rf"^trajectories\.{field}\[3\]\[1\]: expected an index .*, found {outside}"
    ):
        table_scores(draw_logits(mdp), mdp.log_reference, mdp.reward, bad)


def test_an_action_that_does_not_exist_is_refused_by_the_residuals() -> None:
    mdp = random_problem("dense")
    batch = everything(mdp)
    assert mdp.reference[0][2, 0] == 0
    states, actions = batch.states.clone(), batch.actions.clone()
    states[1, 0], actions[1, 0] = 2, 0
    scores = table_scores(draw_logits(mdp), mdp.log_reference, mdp.reward, TrajectoryBatch(states, actions, batch.mask))
    with pytest.raises(InvalidInputError, match=r"^residual\[1\]: ∞ - ∞"):
        tbrm_residual(scores, beta=mdp.beta)


@pytest.mark.parametrize("steps", [1, 3])
def test_trajectories_of_another_horizon_are_refused(steps: int) -> None:
    """A single step would broadcast against all layers."""
    mdp = random_problem("dense")
    batch = everything(mdp)
    short = TrajectoryBatch(*(table[:, :steps] for table in (batch.states, batch.actions, batch.mask)))
    with pytest.raises(InvalidInputError, match=rf"^trajectories: expected 4 steps.* found {steps}"):
        table_scores(draw_logits(mdp), mdp.log_reference, mdp.reward, short)


@pytest.mark.parametrize("name", ["logits", "reward"])
def test_tables_that_do_not_fit_are_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the package's own checks must do
    mdp = random_problem("dense")
    tables = {"logits": draw_logits(mdp), "reward": mdp.reward}
    for change, message in (
        (lambda t: t[:-1], "expected 4 layers"),
        (lambda t: (*t[:-1], t[-1][:1]), r"\(states, actions\)"),
    ):
        changed = tables | {name: change(tables[name])}
        with pytest.raises(InvalidInputError, match=rf"^{name}.*{message}"):
            table_scores(changed["logits"], mdp.log_reference, changed["reward"], everything(mdp))


@pytest.mark.parametrize("name", ["frozen_logits", "behaviour_log_policy", "critic", "log_partition", "baseline"])
def test_optional_tables_that_do_not_fit_are_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    mdp = random_problem("dense")
    right: Any = {
        "frozen_logits": draw_logits(mdp),
        "behaviour_log_policy": mdp.log_reference,
        "critic": tuple(table.sum(-1) for table in mdp.reward),
        "log_partition": mdp.reward[0].sum(-1),
        "baseline": mdp.reward[0].sum(-1),
    }[name]
    options: dict[str, Any] = {name: right}
    table_scores(draw_logits(mdp), mdp.log_reference, mdp.reward, everything(mdp), **options)
    wrong = [right[:-1]] if torch.is_tensor(right) else [right[:-1], (*right[:-1], right[-1][:1])]
    for bad in wrong:
        options = {name: bad}
        with pytest.raises(InvalidInputError, match=rf"^{name}.*expected"):
            table_scores(draw_logits(mdp), mdp.log_reference, mdp.reward, everything(mdp), **options)


def test_frozen_logits_give_the_frozen_first_value_unless_it_is_given_itself() -> None:
    mdp = random_problem("dense")
    batch, logits, frozen = everything(mdp), draw_logits(mdp), draw_logits(mdp, seed=1)
    scores = table_scores(logits, mdp.log_reference, mdp.reward, batch, frozen_logits=frozen)
    assert torch.equal(scores.given()["frozen_initial_value"], scores.given()["frozen_value"][:, 0])
    own = table_scores(
        logits, mdp.log_reference, mdp.reward, batch, frozen_logits=frozen, frozen_first_logits=logits[0]
    )
    assert torch.equal(own.given()["frozen_initial_value"], own.initial_value)
