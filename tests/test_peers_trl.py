"""GRPO, Dr. GRPO, DAPO, RLOO, A*-PO, DPO and IPO against the loss methods of TRL's own trainers: values and gradients, in float64.

The methods run unchanged on a bare object that has their settings, and log-probabilities are handed to them instead of a model's; so
what is compared is the loss alone, to all digits. ``test_peers_trl_trainers.py`` runs whole trainers. Where the two differ, a
test shows the instance.
"""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tbrm_theory.losses import (
    TrajectoryScores,
    a_star_po_loss,
    dapo_loss,
    dpo_loss,
    dr_grpo_loss,
    grpo_loss,
    pairwise_loss,
    rloo_loss,
)
from tests.drawn_scores import draw_scores

package = pytest.importorskip("trl", reason="TRL is not installed")

BETA, GROUP, COUNT, STEPS = 0.3, 3, 12, 4
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-13}


@pytest.fixture(scope="module")
def trl() -> SimpleNamespace:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a2po = importlib.import_module("trl.experimental.a2po")
        return SimpleNamespace(
            grpo=package.GRPOTrainer, rloo=package.RLOOTrainer, dpo=package.DPOTrainer, a2po=a2po.A2POTrainer
        )


class OneProcess:
    """As accelerate's accelerator on one process."""

    num_processes = 1
    sync_gradients = True
    device = torch.device("cpu")

    def gather(self, table: Tensor) -> Tensor:
        return table

    gather_for_metrics = gather

    def reduce(self, table: Tensor, reduction: str) -> Tensor:
        return table


def given(name: str, scores: TrajectoryScores) -> Tensor:
    return scores.given()[name]


def bare(scores: TrajectoryScores, **settings: Any) -> SimpleNamespace:
    """What every trainer's loss method asks its trainer for; it gets the scores as its model's."""
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            scores.log_policy,
            given("entropy", scores).detach(),
            None,
        ),
        _get_sequence_logps=lambda *_: (scores.log_policy * scores.mask).sum(-1),
        model=SimpleNamespace(training=True),
        accelerator=OneProcess(),
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        **settings,
    )


def tokens(scores: TrajectoryScores) -> dict[str, Tensor]:
    """One token of prompt and the responses; which tokens they are does not matter to a loss."""
    ones = torch.ones(COUNT, 1, dtype=torch.int64)
    return {
        "prompt_ids": ones,
        "prompt_mask": ones,
        "completion_ids": torch.ones(COUNT, STEPS, dtype=torch.int64),
        "completion_mask": scores.mask.long(),
    }


def group_advantages(scores: TrajectoryScores, *, normalised: bool) -> Tensor:
    """GRPO's, one group at a time."""
    found = []
    for group in scores.trajectory_return.split(GROUP):
        centred = group - group.mean()
        found.append(centred / (group.std() + 1e-4) if normalised else centred)
    return torch.cat(found)


def same_value_and_gradient(own: Tensor, theirs: Tensor, leaf: Tensor) -> None:
    torch.testing.assert_close(own, theirs, **EXACT)
    [expected] = torch.autograd.grad(theirs, leaf, retain_graph=True)
    [found] = torch.autograd.grad(own, leaf, retain_graph=True)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected, **EXACT)


def trained(scores: TrajectoryScores) -> TrajectoryScores:
    return dataclasses.replace(scores, log_policy=scores.log_policy.detach().requires_grad_())


# -- group-relative policy optimisation --------------------------------------------------------------------------


def grpo_peer(
    trl: SimpleNamespace, scores: TrajectoryScores, *, loss_type: str, corrected: bool, **settings: Any
) -> Tensor:
    """``GRPOTrainer._compute_loss`` on the given scores."""
    defaults: dict[str, Any] = {"beta": BETA, "epsilon_low": 0.2, "epsilon_high": 0.2}
    trainer = bare(
        scores,
        **(defaults | settings),
        loss_type=loss_type,
        args=SimpleNamespace(use_bias_correction_kl=corrected, delta=None, steps_per_generation=1),
        max_completion_length=STEPS,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
    )
    inputs = tokens(scores) | {
        "advantages": group_advantages(scores, normalised=loss_type != "dr_grpo"),
        "old_per_token_logps": given("behaviour_log_policy", scores),
        "ref_per_token_logps": scores.log_reference,
        "num_items_in_batch": scores.mask.sum(),
    }
    loss: Tensor = trl.grpo._compute_loss(trainer, None, inputs)
    return loss


def drawn() -> TrajectoryScores:
    """Ratios inside the clipping range and beyond both ends, with advantages of both signs."""
    return trained(draw_scores(trajectories=COUNT, steps=STEPS, spread=0.4))


@pytest.mark.parametrize("corrected", [False, True])
def test_grpo_is_trls(trl: SimpleNamespace, corrected: bool) -> None:
    scores = drawn()
    own = grpo_loss(scores, beta=BETA, group_size=GROUP, corrected_kl=corrected)
    theirs = grpo_peer(trl, scores, loss_type="grpo", corrected=corrected)
    same_value_and_gradient(own, theirs, scores.log_policy)


@pytest.mark.parametrize("corrected", [False, True])
def test_dr_grpo_is_trls_with_the_longest_response_divided_out(trl: SimpleNamespace, corrected: bool) -> None:
    scores = drawn()
    own = dr_grpo_loss(scores, beta=BETA, group_size=GROUP, corrected_kl=corrected)
    theirs = grpo_peer(trl, scores, loss_type="dr_grpo", corrected=corrected)
    same_value_and_gradient(own / STEPS, theirs, scores.log_policy)


def test_dapo_is_trls(trl: SimpleNamespace) -> None:
    scores = drawn()
    own = dapo_loss(scores, beta=BETA, group_size=GROUP)
    theirs = grpo_peer(trl, scores, loss_type="dapo", corrected=False, beta=0.0, epsilon_high=0.28)
    same_value_and_gradient(own, theirs, scores.log_policy)
    narrow = grpo_peer(trl, scores, loss_type="dapo", corrected=False, beta=0.0)
    assert not torch.allclose(narrow, theirs)  # the higher end is reached


def test_trls_default_kl_has_the_value_of_grpos_and_another_gradient(trl: SimpleNamespace) -> None:
    """A disagreement: ``use_bias_correction_kl``, on by default in TRL 1.16, multiplies k3 by the ratio.

    On-policy the ratio is 1 and so is the value; the gradient is that of ``KL(π ‖ π_ref)`` instead of ``KL(π_ref ‖ π)``.
    """
    fields = {field.name: field.default for field in dataclasses.fields(package.GRPOConfig)}
    assert fields["use_bias_correction_kl"] is True
    scores = drawn()
    scores = dataclasses.replace(scores, behaviour_log_policy=scores.log_policy.detach())
    plain, corrected = (grpo_peer(trl, scores, loss_type="grpo", corrected=flag) for flag in (False, True))
    torch.testing.assert_close(plain, corrected, **EXACT)
    gradients = [torch.autograd.grad(loss, scores.log_policy)[0] for loss in (plain, corrected)]
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3


# -- leave-one-out -----------------------------------------------------------------------------------------------


def rloo_peer(trl: SimpleNamespace, scores: TrajectoryScores, clip: float) -> Tensor:
    """``RLOOTrainer._compute_loss``, the advantages written out: the KL penalty with the sampling policy's log-probabilities."""
    old = (given("behaviour_log_policy", scores) * scores.mask).sum(-1)
    rewards = scores.trajectory_return - BETA * (old - (scores.log_reference * scores.mask).sum(-1))
    advantages = torch.cat([group - (group.sum() - group) / (GROUP - 1) for group in rewards.split(GROUP)])
    trainer = bare(scores, epsilon_low=clip, epsilon_high=clip)
    inputs = tokens(scores) | {"advantages": advantages, "old_logps": old}
    loss: Tensor = trl.rloo._compute_loss(trainer, None, inputs)
    return loss


@pytest.mark.parametrize("clip", [0.2, 0.6])
def test_rloo_is_trls(trl: SimpleNamespace, clip: float) -> None:
    """TRL clips the ratio of whole trajectories; so do we."""
    scores = drawn()
    own = rloo_loss(scores, beta=BETA, group_size=GROUP, clip=clip)
    same_value_and_gradient(own, rloo_peer(trl, scores, clip), scores.log_policy)


# -- A*-PO -------------------------------------------------------------------------------------------------------


def test_a_star_po_is_trls_in_units_of_beta(trl: SimpleNamespace) -> None:
    """TRL regresses ``β log π/π_ref`` on ``r - V``, in reward units: β² times ours."""
    scores = drawn()
    trainer = bare(scores, args=SimpleNamespace(beta2=BETA))
    inputs = {
        "input_ids": None,
        "attention_mask": None,
        "logits_to_keep": STEPS,
        "ref_logps": (scores.log_reference * scores.mask).sum(-1),
        "rewards": scores.trajectory_return,
        "v_star": BETA * given("baseline", scores),
    }
    theirs = trl.a2po.compute_loss(trainer, None, inputs)
    same_value_and_gradient(BETA**2 * a_star_po_loss(scores, beta=BETA), theirs, scores.log_policy)


# -- preferences -------------------------------------------------------------------------------------------------


def dpo_peer(trl: SimpleNamespace, scores: TrajectoryScores, loss_type: str, *, label_smoothing: float = 0.0) -> Tensor:
    """``DPOTrainer._compute_loss``: trajectories 0, 2, … are preferred to 1, 3, …; TRL wants all preferred ones first."""
    order = torch.cat([torch.arange(0, COUNT, 2), torch.arange(1, COUNT, 2)])
    mask = scores.mask[order]
    reference = (scores.log_reference * scores.mask).sum(-1)[order]
    nothing = torch.zeros(COUNT, STEPS, dtype=torch.float64)
    output = SimpleNamespace(
        log_probs=torch.where(mask, scores.log_policy[order], 0.0),
        entropy=nothing,
        mean_logits=nothing,
        is_top1=nothing.bool(),
    )
    trainer = bare(
        scores,
        beta=BETA,
        loss_types=[loss_type],
        loss_weights=[1.0],
        label_smoothing=label_smoothing,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        _total_train_tokens=0,
        _tp_size=1,
    )
    prompt = torch.zeros(COUNT, 1, dtype=torch.int64)
    inputs = {
        "input_ids": torch.ones(COUNT, STEPS + 1, dtype=torch.int64),
        "attention_mask": torch.cat([prompt + 1, mask.long()], dim=1),
        "completion_mask": torch.cat([prompt, mask.long()], dim=1),
        "ref_chosen_logps": reference[: COUNT // 2],
        "ref_rejected_logps": reference[COUNT // 2 :],
    }
    loss: Tensor = trl.dpo._compute_loss(trainer, lambda **_: output, inputs, return_outputs=False)
    return loss


def with_returns(scores: TrajectoryScores, preferred: Tensor | float, rejected: Tensor | float) -> TrajectoryScores:
    returns = scores.trajectory_return.clone()
    returns[0::2], returns[1::2] = preferred, rejected
    return dataclasses.replace(scores, trajectory_return=returns)


def test_dpo_with_certain_labels_is_trls(trl: SimpleNamespace) -> None:
    """Labels by rewards so far apart that ``σ`` is 1 to the last digit."""
    scores = with_returns(drawn(), 100.0, 0.0)
    own = dpo_loss(scores, beta=BETA, group_size=2)
    same_value_and_gradient(own, dpo_peer(trl, scores, "sigmoid"), scores.log_policy)


def test_dpo_with_soft_labels_is_the_mean_of_trls_over_drawn_labels(trl: SimpleNamespace) -> None:
    """``p`` times TRL's loss with the labels as given and ``1 - p`` times that with the labels swapped."""
    scores = with_returns(drawn(), 0.7, 0.0)
    order = torch.arange(COUNT).view(-1, 2).flip(-1).flatten()
    swapped = dataclasses.replace(
        scores,
        log_policy=scores.log_policy[order],
        log_reference=scores.log_reference[order],
        mask=scores.mask[order],
    )
    p = torch.sigmoid(torch.tensor(0.7, dtype=torch.float64))
    theirs = p * dpo_peer(trl, scores, "sigmoid") + (1 - p) * dpo_peer(trl, swapped, "sigmoid")
    same_value_and_gradient(dpo_loss(scores, beta=BETA, group_size=2), theirs, scores.log_policy)


@pytest.mark.parametrize("length", [1, 3])
def test_pairwise_is_trls_ipo_on_responses_of_one_length(trl: SimpleNamespace, length: int) -> None:
    """IPO's target ``1/(2β)`` is a difference of returns of ½; TRL's means over tokens take a factor ``1/L²``."""
    drawn_scores = drawn()
    mask = (torch.arange(STEPS) < length).expand(COUNT, STEPS)
    scores = with_returns(dataclasses.replace(drawn_scores, mask=mask), 0.5 * length, 0.0)
    own = pairwise_loss(scores, beta=BETA, group_size=2) / length**2
    same_value_and_gradient(own, dpo_peer(trl, scores, "ipo"), scores.log_policy)


def test_trls_ipo_has_another_minimiser_on_responses_of_different_length(trl: SimpleNamespace) -> None:
    """A disagreement: TRL divides log-ratios by the length, so where ours is zero, at ``g = g'``, its loss is not."""
    scores = with_returns(drawn(), 0.5, 0.0)
    assert (scores.mask.sum(-1)[0::2] != scores.mask.sum(-1)[1::2]).any()
    ratio = ((scores.log_policy - scores.log_reference) * scores.mask).sum(-1)
    shift = (scores.trajectory_return / BETA - ratio).detach()  # makes g = 0 by the first step's log-probability
    moved = scores.log_policy.detach().clone()
    moved[:, 0] += shift
    solved = dataclasses.replace(scores, log_policy=moved.requires_grad_())
    assert pairwise_loss(solved, beta=BETA, group_size=2) < 1e-25
    assert dpo_peer(trl, solved, "ipo") > 0.1
