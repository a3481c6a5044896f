"""What residuals promise beyond the losses made of them, against plain loops; and the numbers of theory.md X5 and X6.

The contract of all losses is in ``test_losses_contract.py``; a residual added to ``RESIDUALS`` only needs a loop in ``plain_losses``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jaxtyping
import pytest
import torch
from torch import Tensor

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.losses import (
    RESIDUALS,
    TrajectoryScores,
    brm_loss,
    brm_residual,
    first_logit_residual,
    iterative_residual,
    reval_residual,
    squared_loss,
    tbrm_loss,
    tbrm_residual,
    trajectory_log_ratio,
)
from tests import plain_losses
from tests.drawn_scores import FLOAT_FIELDS, STEP_FIELDS, changed, draw_scores, filled, picked, plain_rows

BETA = 0.3

PER_STEP = {name for name in RESIDUALS if name.startswith(("brm", "sql", "pcl"))}

every_residual = pytest.mark.parametrize("name", RESIDUALS)


@pytest.fixture
def no_run_time_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users have it: the shape checks that come with pytest are off, the package's own must do."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def gradients(name: str, scores: TrajectoryScores, beta: float = BETA) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The residual, and the gradient of its sum of squares in β and in every score."""
    temperature = torch.tensor(beta, dtype=torch.float64, requires_grad=True)
    leaves = {field: getattr(scores, field).clone().requires_grad_() for field in FLOAT_FIELDS}
    residual = RESIDUALS[name](dataclasses.replace(scores, **leaves), beta=temperature)
    found = torch.autograd.grad(residual.square().sum(), [temperature, *leaves.values()], allow_unused=True)
    by_field = {
        field: torch.zeros_like(leaf) if gradient is None else gradient
        for (field, leaf), gradient in zip(leaves.items(), found[1:], strict=True)
    }
    return residual.detach(), found[0], by_field


def plain_residuals(name: str, scores: TrajectoryScores, beta: float) -> list[list[float]]:
    """By loops over lists, without masked steps."""
    rows = plain_rows(scores)
    return [plain_losses.RESIDUALS[name](row, row, beta) for row in rows]


# -- the contract -----------------------------------------------------------------------------------------


def test_the_contract_covers_every_residual() -> None:
    assert plain_losses.RESIDUALS.keys() == RESIDUALS.keys()


@every_residual
def test_a_residual_is_what_a_plain_loop_gives(name: str) -> None:
    scores = draw_scores()
    residual = RESIDUALS[name](scores, beta=BETA)
    assert residual.shape == (scores.mask.shape if name in PER_STEP else scores.mask.shape[:-1])
    for own, plain in zip(residual, plain_residuals(name, scores, BETA), strict=True):
        numbers = own.reshape(-1).tolist()
        assert numbers[: len(plain)] == pytest.approx(plain, rel=1e-13, abs=1e-13)
        assert not any(numbers[len(plain) :])


@pytest.mark.parametrize(("loss", "name"), [(tbrm_loss, "tbrm"), (brm_loss, "brm")])
def test_a_loss_is_what_a_plain_loop_gives(loss: Callable[..., Tensor], name: str) -> None:
    scores = draw_scores()
    rows = plain_residuals(name, scores, BETA)
    mean = math.fsum(math.fsum(x**2 for x in row) for row in rows) / len(rows)
    assert loss(scores, beta=BETA).item() == pytest.approx(mean, rel=1e-13)


@every_residual
def test_the_gradient_in_the_temperature_is_that_of_finite_differences(name: str) -> None:
    """Of the sum of squares; that in the scores is tested with the losses."""
    scores = draw_scores()
    if name == "sql-multi-step-q":  # rewards of later steps are constants there, and so is β beside them
        scores = dataclasses.replace(scores, mask=scores.mask & (torch.arange(4) < 1))
    _, found, _ = gradients(name, scores)
    above, below = (RESIDUALS[name](scores, beta=BETA + shift).square().sum().item() for shift in (1e-6, -1e-6))
    assert found.item() == pytest.approx((above - below) / 2e-6, rel=1e-6)
    assert found != 0


@every_residual
def test_masking_a_suffix_is_cutting_it_off(name: str) -> None:
    scores, kept = draw_scores(steps=4), 2
    shorter = changed(scores, lambda field, table: table[:, :kept] if table.dim() == 2 else table)
    mask = scores.mask & (torch.arange(4) < kept)
    residual, in_beta, by_field = gradients(name, dataclasses.replace(scores, mask=mask))
    expected, expected_in_beta, expected_by_field = gradients(name, shorter)
    if name in PER_STEP:
        assert not residual[:, kept:].any()
        residual = residual[:, :kept]
    torch.testing.assert_close(residual, expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(in_beta, expected_in_beta, rtol=1e-13, atol=1e-13)
    for field in FLOAT_FIELDS:
        own = by_field[field]
        if field in STEP_FIELDS:
            assert not own[:, kept:].any()
            own = own[:, :kept]
        torch.testing.assert_close(own, expected_by_field[field], rtol=1e-13, atol=1e-13)


@every_residual
def test_padding_contributes_nothing_whatever_it_holds(name: str) -> None:
    scores = draw_scores()
    assert not scores.mask.all()
    residual, in_beta, _ = gradients(name, filled(scores, 0.0))
    for garbage in (math.nan, math.inf, -math.inf, 1e300):
        found, found_in_beta, _ = gradients(name, filled(scores, garbage))
        assert torch.equal(found, residual)
        assert torch.equal(found_in_beta, in_beta)
        if name in PER_STEP:
            assert not found[~scores.mask].any()


@every_residual
def test_no_trajectory_sees_another(name: str) -> None:
    scores = draw_scores()
    residual, _, by_field = gradients(name, scores)
    for i in range(len(residual)):
        alone, _, alone_by_field = gradients(name, picked(scores, i))
        torch.testing.assert_close(alone[0], residual[i], rtol=1e-14, atol=1e-14)
        for field in FLOAT_FIELDS:
            torch.testing.assert_close(alone_by_field[field][0], by_field[field][i], rtol=1e-13, atol=1e-13)


@every_residual
def test_residuals_follow_a_permutation_of_the_trajectories(name: str) -> None:
    scores, order = draw_scores(), torch.tensor([3, 0, 4, 2, 1])
    residual = RESIDUALS[name](scores, beta=BETA)
    assert torch.equal(RESIDUALS[name](picked(scores, order), beta=BETA), residual[order])


@pytest.mark.parametrize("loss", [tbrm_loss, brm_loss])
def test_losses_do_not_see_the_order_of_the_trajectories(loss: Callable[..., Tensor]) -> None:
    scores, order = draw_scores(), torch.tensor([3, 0, 4, 2, 1])
    expected = loss(scores, beta=BETA)
    torch.testing.assert_close(loss(picked(scores, order), beta=BETA), expected, rtol=1e-14, atol=0.0)


@every_residual
def test_leading_dimensions_are_a_loop(name: str) -> None:
    """The reference scores have none of their own and serve the whole batch; β has one value for each element."""
    scores = draw_scores(batch=(2, 3))
    shared = ("log_reference", "reward", "mask", "reference_initial_value")
    scores = changed(scores, lambda field, table: table[0, 0] if field in shared else table)
    beta = torch.tensor([[0.1, 0.5, 2.0], [1.0, 7.0, 0.3]], dtype=torch.float64)
    residual = RESIDUALS[name](scores, beta=beta)
    assert residual.shape[:2] == scores.batch_shape == (2, 3)
    for i in range(2):
        for j in range(3):
            one = {field: table if field in shared else table[i, j] for field, table in scores.given().items()}
            alone = RESIDUALS[name](TrajectoryScores(**one), beta=beta[i, j].item())
            torch.testing.assert_close(residual[i, j], alone, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("loss", [tbrm_loss, brm_loss])
def test_a_loss_has_the_batch_dimensions_and_no_other(loss: Callable[..., Tensor]) -> None:
    assert loss(draw_scores(), beta=BETA).shape == ()
    assert loss(draw_scores(batch=(2, 3)), beta=BETA).shape == (2, 3)


@every_residual
def test_rewards_and_temperature_enter_as_a_ratio(name: str) -> None:
    """r → c·r with β → c·β changes nothing: no factor of β is hidden. A power of two, so to the bit."""
    scores = draw_scores()
    scaled = changed(scores, lambda field, table: 8 * table if field in ("reward", "trajectory_return") else table)
    assert torch.equal(RESIDUALS[name](scaled, beta=8 * BETA), RESIDUALS[name](scores, beta=BETA))
    assert not torch.equal(RESIDUALS[name](scaled, beta=BETA), RESIDUALS[name](scores, beta=BETA))


def test_no_half_is_hidden_in_a_loss() -> None:
    """Where every residual is 2, the TBRM loss is 4, and BRM's is 4 for each step."""
    scores = draw_scores()
    shift = 2 - tbrm_residual(scores, beta=BETA)
    level = dataclasses.replace(scores, initial_value=scores.initial_value + shift)
    assert tbrm_loss(level, beta=BETA).item() == pytest.approx(4, rel=1e-14)
    assert squared_loss(torch.full((3, 7), -2.0)).tolist() == [4.0, 4.0, 4.0]
    shift_by_step = 2 - brm_residual(scores, beta=BETA)
    level = dataclasses.replace(scores, log_policy=scores.log_policy + shift_by_step)
    steps = scores.mask.sum(-1).double().mean().item()
    assert brm_loss(level, beta=BETA).item() == pytest.approx(4 * steps, rel=1e-14)


@every_residual
def test_a_temperature_keeps_all_its_digits(name: str) -> None:
    """A Python float is not rounded to single precision on the way."""
    scores = draw_scores()
    exact = torch.tensor(BETA, dtype=torch.float64)
    assert torch.equal(RESIDUALS[name](scores, beta=BETA), RESIDUALS[name](scores, beta=exact))


@every_residual
def test_single_precision_stays_single_precision(name: str) -> None:
    """A language model's scores are not promoted by a temperature in double precision."""
    double = draw_scores()
    single = changed(double, lambda field, table: table if field == "mask" else table.float())
    residual = RESIDUALS[name](single, beta=torch.tensor(BETA, dtype=torch.float64))
    assert residual.dtype == torch.float32
    torch.testing.assert_close(residual.double(), RESIDUALS[name](double, beta=BETA), rtol=1e-5, atol=1e-5)


# -- how the residuals are related -------------------------------------------------------------------------


def consistent(scores: TrajectoryScores) -> TrajectoryScores:
    """The scores made those of one model: V and rewards agree between steps and trajectories."""
    own = scores.given()
    return dataclasses.replace(
        scores,
        initial_value=own["value"][..., 0],
        first_logit=own["value"][..., 0] + own["log_policy"][..., 0],
        trajectory_return=torch.where(own["mask"], own["reward"], 0.0).sum(-1),
    )


def test_algorithm_1_has_the_residual_of_equation_4() -> None:
    """[Y] Algorithm 1 ≡ Eq. 4 (I5), as soon as logit = V + log π; and not otherwise."""
    scores = draw_scores(batch=(3,))
    one_model = consistent(scores)
    expected = tbrm_residual(one_model, beta=BETA)
    torch.testing.assert_close(first_logit_residual(one_model, beta=BETA), expected, rtol=1e-13, atol=1e-13)
    assert (first_logit_residual(scores, beta=BETA) - tbrm_residual(scores, beta=BETA)).abs().min() > 1e-6


def test_brm_residuals_telescope_to_tbrm() -> None:
    """Σ_h of the step residuals is the trajectory residual (I5)."""
    scores = consistent(draw_scores(batch=(3,)))
    total = brm_residual(scores, beta=BETA).sum(-1)
    torch.testing.assert_close(total, tbrm_residual(scores, beta=BETA), rtol=1e-13, atol=1e-13)


def test_iterative_and_reval_differ_from_tbrm_in_the_value_alone() -> None:
    scores = draw_scores()
    own, tbrm = scores.given(), tbrm_residual(scores, beta=BETA)
    shift = own["frozen_initial_value"] - own["initial_value"]
    torch.testing.assert_close(iterative_residual(scores, beta=BETA), tbrm + shift)
    torch.testing.assert_close(reval_residual(scores, beta=BETA), tbrm - own["reference_initial_value"])


# -- numbers of the papers ---------------------------------------------------------------------------------


def bandit_scores(logits: list[float], log_reference: list[float], scaled_reward: list[float]) -> TrajectoryScores:
    """Both arms of the two-armed bandit, once each: uniform data; V is frozen at logits (0, 0)."""
    table = torch.tensor(logits, dtype=torch.float64)
    value = table.logsumexp(0)
    return TrajectoryScores(
        log_policy=(table - value).unsqueeze(-1),
        log_reference=torch.tensor(log_reference, dtype=torch.float64).unsqueeze(-1),
        mask=torch.ones(2, 1, dtype=torch.bool),
        initial_value=value.expand(2),
        trajectory_return=torch.tensor(scaled_reward, dtype=torch.float64),
        frozen_initial_value=torch.full((2,), math.log(2), dtype=torch.float64),
    )


@pytest.mark.parametrize(
    ("log_reference", "expected"),
    [
        ([0.0, 0.0], (50.0, 86.618354, 0.0)),  # the reference folded into R_β = (10, 0)
        ([math.log(0.5)] * 2, (43.55, 74.20, 0.48)),  # r/β = (10, 0) and a uniform reference
    ],
)
def test_the_iterative_variant_stays_at_the_wrong_policy(
    log_reference: list[float], expected: tuple[float, float, float]
) -> None:
    """X5, [Y] App. F: with V frozen at (0, 0) the loss prefers (0, 0) to (10, 0), which TBRM does not."""
    start = bandit_scores([0.0, 0.0], log_reference, [10.0, 0.0])
    optimal = bandit_scores([10.0, 0.0], log_reference, [10.0, 0.0])
    stays = squared_loss(iterative_residual(start, beta=1.0)).item()
    moves = squared_loss(iterative_residual(optimal, beta=1.0)).item()
    tbrm = tbrm_loss(optimal, beta=1.0).item()
    digits = 1e-6 if expected[2] == 0 else 5e-3
    assert (stays, moves, tbrm) == pytest.approx(expected, abs=digits, rel=0)
    assert stays < moves
    assert tbrm < tbrm_loss(start, beta=1.0).item()


def test_calibrated_initialisation() -> None:
    """X6, [R] Prop. 1: at θ_ref without reward TBRM's loss is the mean of V_ref(s_1)², ReVal's is 0."""
    scores = draw_scores()
    value = scores.given()["reference_initial_value"]
    calibrated = dataclasses.replace(
        scores,
        log_policy=scores.log_reference,
        initial_value=value,
        trajectory_return=torch.zeros_like(value),
    )
    expected = value.square().mean()
    assert expected > 0.1
    torch.testing.assert_close(tbrm_loss(calibrated, beta=BETA), expected, rtol=1e-14, atol=0.0)
    assert squared_loss(reval_residual(calibrated, beta=BETA)).item() == 0.0


# -- errors ------------------------------------------------------------------------------------------------


@every_residual
@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_that_is_none_is_refused(name: str, beta: float) -> None:
    with pytest.raises(InvalidInputError, match=r"^beta: expected a positive, finite temperature"):
        RESIDUALS[name](draw_scores(), beta=beta)


@every_residual
def test_the_bad_temperature_of_a_batch_is_named(name: str) -> None:
    beta = torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64)
    with pytest.raises(InvalidInputError, match=r"^beta\[1\]: .*found -2"):
        RESIDUALS[name](draw_scores(batch=(3,)), beta=beta)


@every_residual
@pytest.mark.parametrize(("batch", "shape"), [((), (5,)), ((2,), (3,)), ((2,), (5,)), ((3,), (2, 3))])
def test_a_temperature_for_each_trajectory_is_refused(
    name: str, batch: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    """It would broadcast ``(N,)`` residuals to ``(N, N)``."""
    with pytest.raises(InvalidInputError, match=r"^beta: expected"):
        RESIDUALS[name](draw_scores(batch=batch), beta=torch.ones(shape, dtype=torch.float64))


@pytest.mark.parametrize("function", [*RESIDUALS.values(), tbrm_loss, brm_loss])
def test_an_infinite_difference_is_refused(function: Callable[..., Tensor]) -> None:
    """An action that neither policy has: ∞ - ∞ is no number."""
    scores = draw_scores()
    log_policy, log_reference = scores.log_policy.clone(), scores.log_reference.clone()
    log_policy[1, 1] = log_reference[1, 1] = -math.inf
    with pytest.raises(InvalidInputError, match=r"^residual\[1\].*: ∞ - ∞"):
        function(dataclasses.replace(scores, log_policy=log_policy, log_reference=log_reference), beta=BETA)


def test_an_action_that_the_policy_cannot_take_has_infinite_loss() -> None:
    scores = draw_scores()
    log_policy = scores.log_policy.clone()
    log_policy[1, 1] = -math.inf
    impossible = dataclasses.replace(scores, log_policy=log_policy)
    assert tbrm_residual(impossible, beta=BETA)[1] == -math.inf
    assert tbrm_loss(impossible, beta=BETA) == brm_loss(impossible, beta=BETA) == math.inf


def test_the_log_ratio_refuses_nan() -> None:
    scores = draw_scores()
    with pytest.raises(InvalidInputError, match=r"^scores\.log_policy\[0\]\[0\]"):
        trajectory_log_ratio(dataclasses.replace(scores, log_policy=scores.log_policy * math.nan))


@pytest.mark.usefixtures("no_run_time_shapes")
@pytest.mark.parametrize(
    ("residual", "where"),
    [
        (torch.zeros(0, dtype=torch.float64), r"residual: expected shape"),
        (torch.zeros((), dtype=torch.float64), r"residual: expected shape"),
        (torch.tensor([[1.0], [math.nan]], dtype=torch.float64), r"residual\[1\]\[0\]: expected a number"),
    ],
)
def test_a_mean_of_nothing_is_refused(residual: Tensor, where: str) -> None:
    with pytest.raises(InvalidInputError, match=where):
        squared_loss(residual)


@pytest.mark.usefixtures("no_run_time_shapes")
@pytest.mark.parametrize("shape", [(4,), (0, 4), (5, 0), (0, 5, 4)])
def test_empty_scores_are_refused(shape: tuple[int, ...]) -> None:
    scores = draw_scores()
    table = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(InvalidInputError, match=r"^scores\.log_policy: expected shape"):
        dataclasses.replace(scores, **dict.fromkeys(STEP_FIELDS, table), mask=torch.ones(shape, dtype=torch.bool))


@pytest.mark.usefixtures("no_run_time_shapes")
@pytest.mark.parametrize("field", ["mask", *FLOAT_FIELDS])
def test_only_batch_dimensions_broadcast(field: str) -> None:
    """``(N, 1)`` does not meet ``(N, H)``, nor ``(1,)`` ``(N,)``; the field is named."""
    scores = draw_scores(batch=(2,))
    table = getattr(scores, field)
    wrong = [table[..., :1], table[..., :-1], table.movedim(-1, -2), table[0, 0], table.sum(), table[:, :3]]
    if field == "log_policy":  # the size of everything else is measured against it
        wrong = [table[..., :-1], table[:, :3]]
    for bad in wrong:
        bad = bad.bool() if field == "mask" else bad
        named = r"\w+" if field == "log_policy" else field
        with pytest.raises(InvalidInputError, match=rf"^scores\.{named}: expected shape"):
            dataclasses.replace(scores, **{field: bad})


@pytest.mark.parametrize("field", ["log_reference", "mask", "initial_value", "reward"])
def test_batch_dimensions_that_do_not_fit_are_named(field: str) -> None:
    table = getattr(draw_scores(batch=(3,)), field)
    with pytest.raises(InvalidInputError, match=r"^scores\.\w+: expected batch dimensions that broadcast"):
        dataclasses.replace(draw_scores(batch=(2,)), **{field: table})


@pytest.mark.parametrize(
    ("row", "where"),
    [
        ([True, False, True], r"\[1\]\[2\]"),
        ([False, False, False], r"\[1\]\[0\]"),
        ([False, True, True], r"\[1\]\[0\]"),
    ],
)
def test_a_mask_is_a_prefix(row: list[bool], where: str) -> None:
    scores = draw_scores(trajectories=2, steps=3)
    mask = torch.tensor([[True, True, False], row])
    with pytest.raises(InvalidInputError, match=rf"^scores\.mask{where}: expected True on the first steps"):
        dataclasses.replace(scores, mask=mask)
