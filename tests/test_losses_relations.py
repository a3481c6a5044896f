"""What ties the family together (theory.md §5): equalities between losses, and whose gradient a policy gradient has in the mean."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tbrm_theory import losses
from tbrm_theory.dynamic_programming import objective, solve
from tbrm_theory.losses import LOSSES, TrajectoryScores
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.occupancy import enumerate_trajectories
from tbrm_theory.scores import table_scores
from tbrm_theory.trajectories import TrajectoryBatch
from tests.drawn import random_problem
from tests.drawn_scores import draw_scores, with_gradients

BETA = 0.3
CLOSE: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}


def same(one: Any, other: Any, scores: TrajectoryScores, fields: tuple[str, ...]) -> None:
    """Value and gradients."""
    (value, gradients), (expected, expected_gradients) = (with_gradients(loss, scores) for loss in (one, other))
    torch.testing.assert_close(value, expected, **CLOSE)
    for field in fields:
        assert expected_gradients[field].abs().max() > 1e-6
        torch.testing.assert_close(gradients[field], expected_gradients[field], **CLOSE)


@pytest.mark.parametrize("size", [2, 3, 6])
def test_pairwise_is_twice_vargrad(size: int) -> None:
    """``E(g - g')² = 2 VarGrad``: for two responses, and in the mean over the pairs of any group."""
    scores = draw_scores(batch=(2,), trajectories=6)
    same(
        lambda own: losses.pairwise_loss(own, beta=BETA, group_size=size),
        lambda own: 2 * losses.vargrad_loss(own, beta=BETA, group_size=size),
        scores,
        ("log_policy", "log_reference", "trajectory_return"),
    )


def test_on_policy_rloo_has_the_gradient_of_vargrad() -> None:
    """At ratio 1, with the KL penalty in the reward: ``∇RLOO = (β/2) ∇VarGrad``, sample by sample."""
    scores = draw_scores(trajectories=6)
    scores = dataclasses.replace(scores, behaviour_log_policy=scores.log_policy)
    _, rloo = with_gradients(lambda own: losses.rloo_loss(own, beta=BETA, group_size=3), scores)
    _, vargrad = with_gradients(lambda own: losses.vargrad_loss(own, beta=BETA, group_size=3), scores)
    assert vargrad["log_policy"].abs().max() > 0.1
    torch.testing.assert_close(rloo["log_policy"], BETA / 2 * vargrad["log_policy"], **CLOSE)


def test_trajectory_balance_with_log_z_tied_to_the_value_is_tbrm() -> None:
    def tied(own: TrajectoryScores) -> Tensor:
        return losses.trajectory_balance_loss(dataclasses.replace(own, log_partition=own.initial_value), beta=BETA)

    same(tied, lambda own: losses.tbrm_loss(own, beta=BETA), draw_scores(), ("log_policy", "initial_value"))


def test_tbrm_minimised_over_an_offset_is_the_groups_variance() -> None:
    """I6: one free offset for each prompt leaves ``(n - 1)/n`` of VarGrad, with the same gradient in the policy."""
    scores, size = draw_scores(trajectories=6), 3

    def least(own: TrajectoryScores) -> Tensor:
        residual = losses.tbrm_residual(own, beta=BETA).unflatten(-1, (-1, size))
        value = own.initial_value.unflatten(-1, (-1, size))
        best = (value - residual).mean(-1, keepdim=True)  # minus the mean of g
        leaves = dataclasses.replace(own, initial_value=best.detach().expand(-1, size).flatten())
        return losses.tbrm_loss(leaves, beta=BETA)

    same(
        least,
        lambda own: (size - 1) / size * losses.vargrad_loss(own, beta=BETA, group_size=size),
        scores,
        ("log_policy", "log_reference"),
    )
    offsets = torch.linspace(-1, 1, 5, dtype=torch.float64)
    values = [losses.tbrm_loss(dataclasses.replace(scores, initial_value=c.expand(6)), beta=BETA) for c in offsets]
    assert min(value.item() for value in values) > least(scores).item()


def test_kimis_is_a_star_pos_with_the_groups_own_estimate() -> None:
    scores, size = draw_scores(trajectories=6), 3
    returns = scores.trajectory_return.view(2, size) / BETA
    value = (returns.exp().mean(-1, keepdim=True)).log().expand(2, size).flatten()
    same(
        lambda own: losses.kimi_loss(own, beta=BETA, group_size=size),
        lambda own: losses.a_star_po_loss(dataclasses.replace(own, baseline=value), beta=BETA),
        scores,
        ("log_policy", "log_reference"),
    )


def test_on_the_last_step_soft_q_learning_on_logits_is_tbrm_and_that_on_ratios_is_iterative() -> None:
    """H = 1: X5's failure is shared by the latter (``V`` frozen in both), and not by the former."""
    scores = draw_scores(steps=1)
    scores = dataclasses.replace(
        scores,
        initial_value=scores.given()["value"][:, 0],
        trajectory_return=scores.given()["reward"][:, 0],
        frozen_initial_value=scores.given()["frozen_value"][:, 0],
    )
    for kind in ("one-step", "multi-step"):
        for suffix, relative in (("-q", "tbrm"), ("", "tbrm-iterative")):
            one, other = (LOSSES[name].function for name in (f"sql-{kind}{suffix}", relative))
            same(lambda own, f=one: f(own, beta=BETA), lambda own, f=other: f(own, beta=BETA), scores, ("log_policy",))


def test_ppo_with_one_step_and_no_critic_is_reinforce_on_policy() -> None:
    """At ratio 1, critic 0 and no entropy bonus the two have one gradient in the policy."""
    scores = draw_scores(steps=1)
    zero = torch.zeros_like(scores.log_policy)
    scores = dataclasses.replace(
        scores, behaviour_log_policy=scores.log_policy, critic=zero, trajectory_return=scores.given()["reward"][:, 0]
    )
    _, ppo = with_gradients(lambda own: losses.ppo_loss(own, beta=BETA, entropy_coefficient=0.0), scores)
    _, reinforce = with_gradients(lambda own: losses.reinforce_loss(own, beta=BETA), scores)
    assert reinforce["log_policy"].abs().max() > 0.1
    torch.testing.assert_close(ppo["log_policy"], reinforce["log_policy"], **CLOSE)


# -- in the mean over all trajectories --------------------------------------------------------------------------


def every_trajectory(mdp: RegularizedMDP) -> TrajectoryBatch:
    """Each as a batch element of its own, so that a loss has one value for each."""
    listed = enumerate_trajectories(mdp)
    mask = torch.ones_like(listed.states, dtype=torch.bool)
    return TrajectoryBatch(listed.states.unsqueeze(-2), listed.actions.unsqueeze(-2), mask.unsqueeze(-2))


def drawn_logits(mdp: RegularizedMDP) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.where(valid, torch.randn(valid.shape, generator=generator, dtype=torch.float64), 0.0)
        for valid in mdp.valid
    )


def own_scores(mdp: RegularizedMDP, logits: tuple[Tensor, ...], **options: Any) -> TrajectoryScores:
    return table_scores(logits, mdp.log_reference, mdp.reward, every_trajectory(mdp), **options)


def policy_of(mdp: RegularizedMDP, logits: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(
        torch.where(valid, table, -torch.inf).log_softmax(-1) for table, valid in zip(logits, mdp.valid, strict=True)
    )


@pytest.mark.parametrize("kind", ["deterministic", "dense"])
@pytest.mark.parametrize("method", ["reinforce", "ppo"])
def test_the_mean_policy_gradient_is_that_of_the_objective(method: str, kind: str) -> None:
    """``E_π ∇loss = -∇J_β`` in every logit, by enumeration; PPO's for any critic when λ = 1, since that is a baseline."""
    mdp = random_problem(kind)
    leaves = tuple(table.requires_grad_() for table in drawn_logits(mdp))
    policy = tuple(log.detach() for log in policy_of(mdp, leaves))
    law = enumerate_trajectories(mdp).log_law(policy).exp()
    critic = tuple(table.sum(-1) for table in drawn_logits(mdp))
    scores = own_scores(mdp, leaves, behaviour_log_policy=policy, critic=critic, entropy=True)
    options = {"entropy_coefficient": 0.0} if method == "ppo" else {}
    mean = (law * LOSSES[method].function(scores, beta=mdp.beta, **options)).sum()
    found = torch.autograd.grad(mean, leaves)
    expected = torch.autograd.grad(objective(mdp, policy_of(mdp, leaves)).sum(), leaves)
    assert max(gradient.abs().max().item() for gradient in expected) > 1e-3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, -other, **CLOSE)


def test_the_mean_gradient_of_k3_is_that_of_the_reverse_divergence_unless_corrected() -> None:
    """On-policy: ``E_π ∇k3 = ∇KL(π_ref ‖ π)``; times the ratio it is ``∇KL(π ‖ π_ref)``, which ``J_β`` has."""
    logits = torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.5, 0.1, -0.4], dtype=torch.float64).log_softmax(-1)
    log_policy = logits.log_softmax(-1)
    law = log_policy.detach().exp()
    arms = log_policy.view(3, 1, 1).expand(3, 2, 1)  # each arm twice: a group with equal rewards has no advantage
    scores = TrajectoryScores(
        log_policy=arms,
        log_reference=reference.view(3, 1, 1).expand(3, 2, 1),
        mask=torch.ones(3, 2, 1, dtype=torch.bool),
        initial_value=torch.zeros(3, 2, dtype=torch.float64),
        trajectory_return=torch.zeros(3, 2, dtype=torch.float64),
        behaviour_log_policy=arms.detach(),
    )
    forward = (log_policy.exp() * (log_policy - reference)).sum()
    reverse = (reference.exp() * (reference - log_policy)).sum()
    for corrected, divergence in ((True, forward), (False, reverse)):
        loss = losses.dr_grpo_loss(scores, beta=1.0, group_size=2, corrected_kl=corrected)
        [found] = torch.autograd.grad((law * loss).sum(), logits, retain_graph=True)
        [expected] = torch.autograd.grad(divergence, logits, retain_graph=True)
        torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close((law * loss).sum(), forward, **CLOSE)


# -- at the optimum ----------------------------------------------------------------------------------------------

VALUE_LOSSES = [
    name for name in LOSSES if name not in ("reinforce", "rloo", "grpo", "dr-grpo", "dapo", "ppo", "dpo", "kimi")
]


@pytest.mark.parametrize("name", VALUE_LOSSES)
def test_the_optimum_has_no_loss_on_deterministic_problems(name: str) -> None:
    """I7 for the family: with every value at ``V*``, whichever model it belongs to, each residual is 0.

    Not Kimi's, whose value is an estimate, nor the losses that have no zero.
    """
    mdp = random_problem("deterministic")
    solution = solve(mdp)
    q = tuple(torch.where(valid, table, 0.0) for valid, table in zip(mdp.valid, solution.q, strict=True))
    scores = own_scores(mdp, q, frozen_logits=q, log_partition=solution.v[0], baseline=solution.v[0], critic=solution.v)
    if name == "reval":
        scores = dataclasses.replace(scores, reference_initial_value=torch.zeros_like(scores.initial_value))
    if LOSSES[name].needs_group:  # every trajectory beside the next one from its first state
        listed = enumerate_trajectories(mdp)
        rows = torch.arange(listed.states.shape[0])[listed.states[:, 0] == listed.states[0, 0]]
        pairs = torch.stack([rows[:-1], rows[1:]], dim=-1)
        batch = TrajectoryBatch(
            listed.states[pairs], listed.actions[pairs], torch.ones_like(listed.states[pairs]).bool()
        )
        scores = table_scores(q, mdp.log_reference, mdp.reward, batch)
    group = {"group_size": 2} if LOSSES[name].needs_group else {}
    assert LOSSES[name].function(scores, beta=mdp.beta, **group).abs().max() < 1e-20
    noise = torch.randn(scores.log_policy.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = dataclasses.replace(scores, log_policy=scores.log_policy + noise)
    assert LOSSES[name].function(moved, beta=mdp.beta, **group).min() > 1e-3


def test_the_least_soft_label_loss_of_dpo_is_where_the_pairwise_residual_vanishes() -> None:
    """``β(log-ratio difference) = r - r'`` is the minimum of DPO with Bradley-Terry labels: gradient 0, and ``g = g'``."""
    scores = draw_scores(trajectories=4)
    gap = losses.reward_gap(scores, beta=BETA)
    moved = scores.log_policy.clone()
    moved[:, 0] -= gap
    solved = dataclasses.replace(scores, log_policy=moved)
    assert losses.pairwise_loss(solved, beta=BETA, group_size=2) < 1e-25
    _, gradients = with_gradients(lambda own: losses.dpo_loss(own, beta=BETA, group_size=2), solved)
    assert gradients["log_policy"].abs().max() < 1e-15
    _, gradients = with_gradients(lambda own: losses.dpo_loss(own, beta=BETA, group_size=2), scores)
    assert gradients["log_policy"].abs().max() > 1e-3
