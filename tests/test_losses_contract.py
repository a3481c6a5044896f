"""One contract for every loss of ``LOSSES``, against the plain loops of ``plain_losses``.

A loss added to ``LOSSES`` is held to the whole contract; it only needs a loop there.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.losses import LOSSES, RESIDUALS, TrajectoryScores
from tests import plain_losses
from tests.drawn_scores import (
    FLOAT_FIELDS,
    REQUIRED,
    STEP_FIELDS,
    TRAJECTORY_FIELDS,
    changed,
    draw_scores,
    filled,
    picked,
    plain_rows,
    with_gradients,
    without,
)

BETA = 0.3
GROUP = 3
CLOSE: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}

# The scores that enter a loss as constants, in part or entirely: a difference quotient of the value is not the gradient there.
CONSTANT = {
    "tbrm-iterative": {"frozen_initial_value"},
    "sql-one-step": {"frozen_value"},
    "sql-multi-step": {"frozen_value"},
    "sql-one-step-q": {"frozen_value"},
    "sql-multi-step-q": {"log_policy", "log_reference", "reward"},
    "a-star-po": {"baseline"},
    "reinforce": {"log_policy", "log_reference", "trajectory_return"},
    "rloo": {"log_reference", "trajectory_return", "behaviour_log_policy"},
    "grpo": {"trajectory_return", "behaviour_log_policy"},
    "dr-grpo": {"trajectory_return", "behaviour_log_policy"},
    "dapo": {"trajectory_return", "behaviour_log_policy"},
    "ppo": {"log_reference", "behaviour_log_policy", "reward", "critic"},
}
# Settings other than the defaults, for every option that there is.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "rloo": [{"clip": 0.05}, {"clip": 2.0}],
    "grpo": [{"clip": 0.5}, {"corrected_kl": True}],
    "dr-grpo": [{"clip": 0.5}, {"corrected_kl": True}],
    "dapo": [{"clip": 0.4}, {"clip_higher": 0.7}],
    "ppo": [{"clip": 0.5}, {"gae_lambda": 0.7}, {"gae_lambda": 0.0}, {"entropy_coefficient": 0.3}],
}

every_loss = pytest.mark.parametrize("name", LOSSES)
every_setting = pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name in LOSSES for options in ({}, *VARIANTS.get(name, []))]
)


def scores_of_groups(**options: Any) -> TrajectoryScores:
    """Two groups of three; the spread puts ratios on both sides of the clipping range and inside it."""
    return draw_scores(trajectories=2 * GROUP, spread=0.5, **options)


def call(name: str, scores: TrajectoryScores, beta: float | Tensor = BETA, **options: Any) -> Tensor:
    group = {"group_size": GROUP} if LOSSES[name].needs_group else {}
    return LOSSES[name].function(scores, beta=beta, **group, **options)


def quotient(function: Callable[[list[plain_losses.Row]], float], rows: list[plain_losses.Row], *place: Any) -> float:
    """The central difference quotient of ``function`` in the number at ``place`` (trajectory, field, step)."""
    values = []
    for shift in (1e-5, -1e-5):
        moved = copy.deepcopy(rows)
        at: Any = moved
        for key in place[:-1]:
            at = at[key]
        at[place[-1]] += shift
        values.append(function(moved))
    return (values[0] - values[1]) / 2e-5


# -- the contract --------------------------------------------------------------------------------------------


def test_the_contract_covers_every_loss() -> None:
    assert plain_losses.LOSSES.keys() == LOSSES.keys()
    assert {name for name, loss in LOSSES.items() if loss.options} == VARIANTS.keys()
    for name, loss in LOSSES.items():
        assert set().union(*VARIANTS.get(name, [])) == loss.options.keys()
        assert loss.name == name
        assert RESIDUALS.keys() <= LOSSES.keys()


@every_loss
def test_the_registry_says_how_a_loss_is_called(name: str) -> None:
    loss = LOSSES[name]
    signature = dict(inspect.signature(loss.function).parameters)
    assert signature.pop("scores").default is inspect.Parameter.empty
    assert ("group_size" in signature) == loss.needs_group
    assert {key: given.kind for key, given in signature.items()} == dict.fromkeys(
        signature, inspect.Parameter.KEYWORD_ONLY
    )
    defaults = {key: given.default for key, given in signature.items() if key not in ("beta", "group_size")}
    assert defaults == dict(loss.options)
    assert loss.source
    assert loss.function.__doc__ is not None


def test_the_drawn_ratios_lie_inside_the_clipping_range_and_beyond_both_ends() -> None:
    """With advantages of both signs: every case of the surrogate occurs in the tests that follow."""
    scores = scores_of_groups()
    ratio = (scores.log_policy - scores.given()["behaviour_log_policy"]).exp()
    returns = scores.trajectory_return.unflatten(-1, (-1, GROUP))
    gains = (returns > returns.mean(-1, keepdim=True)).flatten().unsqueeze(-1)
    for better in (gains, ~gains):
        for where in (ratio < 0.8, (ratio > 0.8) & (ratio < 1.2), ratio > 1.28):
            assert (where & better & scores.mask).any()


@every_setting
def test_a_loss_and_its_gradient_are_those_of_a_plain_loop(name: str, options: dict[str, Any]) -> None:
    """In every score, by difference quotients of the loop in which constants are held."""
    scores = scores_of_groups()
    value, gradients = with_gradients(lambda own: call(name, own, **options), scores)
    rows = plain_rows(scores)

    def plain(moved: list[plain_losses.Row]) -> float:
        return plain_losses.LOSSES[name](moved, rows, BETA, GROUP, **options)

    assert value.shape == ()
    assert value.item() == pytest.approx(plain(rows), rel=1e-12, abs=1e-12)
    trained = 0
    for field in FLOAT_FIELDS:
        expected = torch.zeros_like(gradients[field])
        if field in LOSSES[name].fields:
            for i, row in enumerate(rows):
                if field in TRAJECTORY_FIELDS:
                    expected[i] = quotient(plain, rows, i, field)
                else:
                    for h in range(len(row[field])):
                        expected[i, h] = quotient(plain, rows, i, field, h)
        size = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(gradients[field], expected, rtol=0.0, atol=1e-7 * size)
        trained += bool(expected.any())
    assert trained > 0


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "reinforce"])
def test_gradcheck(name: str) -> None:
    """In all scores that no part of the loss holds constant; REINFORCE holds each of its own constant in one place."""
    scores = scores_of_groups(steps=3)
    fields = [field for field in FLOAT_FIELDS if field in LOSSES[name].fields and field not in CONSTANT.get(name, ())]
    assert fields
    leaves = [getattr(scores, field).clone().requires_grad_() for field in fields]

    def loss(*tables: Tensor) -> Tensor:
        return call(name, dataclasses.replace(scores, **dict(zip(fields, tables, strict=True))))

    assert torch.autograd.gradcheck(loss, leaves, atol=1e-6, rtol=1e-6)


@every_loss
def test_masking_a_suffix_is_cutting_it_off(name: str) -> None:
    scores, kept = scores_of_groups(), 2
    shorter = changed(scores, lambda field, table: table[:, :kept] if table.dim() == 2 else table)
    masked = dataclasses.replace(scores, mask=scores.mask & (torch.arange(4) < kept))
    value, gradients = with_gradients(lambda own: call(name, own), masked)
    expected, expected_gradients = with_gradients(lambda own: call(name, own), shorter)
    torch.testing.assert_close(value, expected, **CLOSE)
    for field, own in gradients.items():
        if field in STEP_FIELDS:
            assert not own[:, kept:].any(), field
            own = own[:, :kept]
        torch.testing.assert_close(own, expected_gradients[field], **CLOSE)


@every_loss
def test_padding_contributes_nothing_whatever_it_holds(name: str) -> None:
    scores = scores_of_groups()
    assert not scores.mask.all()
    expected, expected_gradients = with_gradients(lambda own: call(name, own), filled(scores, 0.0))
    for garbage in (math.nan, math.inf, -math.inf, 1e300):
        value, gradients = with_gradients(lambda own: call(name, own), filled(scores, garbage))
        assert torch.equal(value, expected)
        for field, own in gradients.items():
            assert torch.equal(own, expected_gradients[field]), field
            assert torch.isfinite(own).all(), field
            if field in STEP_FIELDS:
                assert not own[~scores.mask].any(), field


@every_loss
def test_leading_dimensions_are_a_loop(name: str) -> None:
    """The reference scores have none of their own and serve the whole batch; β has one value for each element."""
    scores = scores_of_groups(batch=(2, 2))
    shared = ("log_reference", "reward", "mask", "reference_initial_value")
    scores = changed(scores, lambda field, table: table[0, 0] if field in shared else table)
    beta = torch.tensor([[0.1, 0.5], [7.0, 0.3]], dtype=torch.float64)
    value, gradients = with_gradients(lambda own: call(name, own, beta), scores)
    assert value.shape == (2, 2)
    for i in range(2):
        for j in range(2):
            one = {field: table if field in shared else table[i, j] for field, table in scores.given().items()}
            number = beta[i, j].item()
            alone, own = with_gradients(functools.partial(call, name, beta=number), TrajectoryScores(**one))
            torch.testing.assert_close(value[i, j], alone, **CLOSE)
            for field in set(FLOAT_FIELDS) - set(shared):
                torch.testing.assert_close(gradients[field][i, j], own[field], **CLOSE)


@every_loss
@pytest.mark.parametrize("order", [[3, 4, 5, 0, 1, 2], [2, 0, 1, 4, 3, 5], [4, 3, 5, 2, 1, 0]])
def test_neither_the_order_of_groups_nor_that_within_a_group_matters(name: str, order: list[int]) -> None:
    scores = scores_of_groups()
    value, gradients = with_gradients(lambda own: call(name, own), scores)
    moved, moved_gradients = with_gradients(lambda own: call(name, own), picked(scores, torch.tensor(order)))
    torch.testing.assert_close(moved, value, **CLOSE)
    for field, own in moved_gradients.items():
        torch.testing.assert_close(own, gradients[field][order], **CLOSE)


@every_loss
def test_a_loss_is_the_mean_of_that_of_its_groups(name: str) -> None:
    """Of its trajectories, where there are no groups; of its tokens for DAPO, whose groups are weighted by their number."""
    scores, size = scores_of_groups(), GROUP if LOSSES[name].needs_group else 1
    parts = [picked(scores, slice(i, i + size)) for i in range(0, 2 * GROUP, size)]
    weights = torch.tensor(
        [1.0 * (part.mask.sum().item() if name == "dapo" else 1) for part in parts], dtype=torch.float64
    )
    alone = torch.stack([call(name, part) for part in parts])
    torch.testing.assert_close(call(name, scores), (weights * alone).sum() / weights.sum(), **CLOSE)


def changes_when(name: str, scores: TrajectoryScores, other: TrajectoryScores) -> bool:
    """Whether the value or the gradient in any score differs between the two."""
    (value, gradients), (moved, moved_gradients) = (
        with_gradients(lambda own: call(name, own), x) for x in (scores, other)
    )
    return not torch.equal(value, moved) or any(not torch.equal(gradients[f], moved_gradients[f]) for f in gradients)


@every_loss
def test_a_loss_reads_the_scores_that_the_registry_names_and_no_others(name: str) -> None:
    """Each field in turn gets other numbers; the table of what a method needs is computed from ``fields``."""
    scores, fresh = scores_of_groups(), scores_of_groups(seed=1)
    longer = changed(scores, lambda field, table: table if field != "mask" else torch.ones_like(table))
    read = {
        f for f in FLOAT_FIELDS if changes_when(name, scores, dataclasses.replace(scores, **{f: getattr(fresh, f)}))
    }
    if changes_when(name, scores, longer):
        read.add("mask")
    assert read == set(LOSSES[name].fields)
    assert len(LOSSES[name].fields) == len(read)


@every_loss
def test_a_loss_needs_the_scores_that_it_reads_and_no_others(name: str) -> None:
    scores, fields = scores_of_groups(), set(LOSSES[name].fields)
    bare = without(scores, *(set(FLOAT_FIELDS) - fields - set(REQUIRED)))
    assert torch.equal(call(name, bare), call(name, scores))
    for field in fields - set(REQUIRED):
        with pytest.raises(InvalidInputError, match=rf"^scores\.{field}: missing"):
            call(name, without(scores, field))


@every_loss
def test_nan_in_a_score_is_named_and_never_returned(name: str) -> None:
    scores = scores_of_groups()
    for field in FLOAT_FIELDS:
        table = getattr(scores, field).clone()
        index = (2, 1) if table.dim() == 2 else (2,)
        table[index] = math.nan
        bad = dataclasses.replace(scores, **{field: table})
        if field in LOSSES[name].fields:
            where = "".join(rf"\[{i}\]" for i in index)
            with pytest.raises(InvalidInputError, match=rf"^scores\.{field}{where}: expected a number, found nan"):
                call(name, bad)
        else:
            assert torch.equal(call(name, bad), call(name, scores))


@every_loss
def test_single_precision_stays_single_precision(name: str) -> None:
    double = scores_of_groups()
    single = changed(double, lambda field, table: table if field == "mask" else table.float())
    value = call(name, single, torch.tensor(BETA, dtype=torch.float64))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), call(name, double), rtol=1e-4, atol=1e-5)


# -- bad input -----------------------------------------------------------------------------------------------


@every_loss
def test_a_temperature_that_is_none_is_refused(name: str) -> None:
    for beta in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InvalidInputError, match=r"^beta: expected a positive, finite temperature"):
            call(name, scores_of_groups(), beta)
    with pytest.raises(InvalidInputError, match=r"^beta: expected"):
        call(name, scores_of_groups(), torch.ones(2 * GROUP, dtype=torch.float64))


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.needs_group])
def test_a_group_size_that_does_not_fit_is_refused(name: str) -> None:
    function, scores = LOSSES[name].function, scores_of_groups()
    for size in (4, 5, 12):
        with pytest.raises(
            InvalidInputError, match=rf"^group_size: expected a divisor of the 6 trajectories, found {size}"
        ):
            function(scores, beta=BETA, group_size=size)
    for size in (1, 0, -3):
        with pytest.raises(InvalidInputError, match=rf"^group_size: expected at least 2 .*, found {size}"):
            function(scores, beta=BETA, group_size=size)
    assert function(scores, beta=BETA, group_size=2) != function(scores, beta=BETA, group_size=6)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        *((name, "clip", bad) for name in ("rloo", "grpo", "dr-grpo", "dapo", "ppo") for bad in (-0.1, math.nan)),
        ("dapo", "clip_higher", -0.1),
        ("ppo", "gae_lambda", 1.1),
        ("ppo", "gae_lambda", math.nan),
        ("ppo", "entropy_coefficient", math.nan),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(name: str, option: str, value: float) -> None:
    with pytest.raises(InvalidInputError, match=rf"^{option}: expected"):
        call(name, scores_of_groups(), **{option: value})
