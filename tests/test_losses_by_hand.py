"""Every loss on a bandit, worked out on paper from the papers' formulas: value, and gradient in all that it trains.

Two responses of one step to one prompt. ``π_ref`` is ½ and ¼ on their actions, ``π_θ`` ¼ and ½, the rewards are 1 and 0, and
``β = 1/log 2``: in units of ``log 2`` log-ratios are -1 and 1, ``r/β`` is 1 and 0, ``g_θ`` -2 and 1. The data are ``π_θ``'s own.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tbrm_theory.losses import LOSSES, TrajectoryScores
from tests.drawn_scores import with_gradients

L = math.log(2)
BETA = 1 / L
V, V_REF, V_FROZEN, LOG_Z, BASELINE, CRITIC = 3 * L, L, 2 * L, 4 * L, 5 * L, 6 * L
ENTROPY = 0.5


def both(first: float, second: float) -> Tensor:
    return torch.tensor([first, second], dtype=torch.float64)


def bandit() -> TrajectoryScores:
    log_policy, reward = both(-2 * L, -L), both(1.0, 0.0)
    return TrajectoryScores(
        log_policy=log_policy.unsqueeze(-1),
        log_reference=both(-L, -2 * L).unsqueeze(-1),
        mask=torch.ones(2, 1, dtype=torch.bool),
        initial_value=both(V, V),
        trajectory_return=reward,
        first_logit=V + log_policy,
        value=both(V, V).unsqueeze(-1),
        reward=reward.unsqueeze(-1),
        reference_initial_value=both(V_REF, V_REF),
        frozen_initial_value=both(V_FROZEN, V_FROZEN),
        behaviour_log_policy=log_policy.unsqueeze(-1),
        log_partition=both(LOG_Z, LOG_Z),
        baseline=both(BASELINE, BASELINE),
        critic=both(CRITIC, CRITIC).unsqueeze(-1),
        frozen_value=both(V_FROZEN, V_FROZEN).unsqueeze(-1),
        entropy=both(ENTROPY, ENTROPY).unsqueeze(-1),
    )


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def square(first: float, second: float, *trained: str) -> tuple[float, dict[str, list[float]]]:
    """The mean of two squared residuals, in units of ``log 2``: each is the derivative in everything that it is the sum of."""
    return (first**2 + second**2) / 2 * L**2, {field: [first * L, second * L] for field in trained}


def policy(value: float, first: float, second: float) -> tuple[float, dict[str, list[float]]]:
    return value, {"log_policy": [first, second]}


KIMI = math.log(1.5) / L  # log ½(2 + 1)
DPO = BETA * (sigmoid(-2) - sigmoid(1))  # β (σ(d) - p): d = β (-1 - 1) log 2, and p = σ(1 - 0)
NORMALISED = 0.5 / (math.sqrt(0.5) + 1e-4)  # the mean is ½, the deviations ±½, their standard deviation √½
# x = log π_ref/π is log 2 and -log 2; k3 = e^x - x - 1 is 1 - log 2 and log 2 - ½, and its derivative 1 - e^x is -1 and ½.
PENALTY = BETA * 0.5 / 2
# PPO: r/β - log-ratio is 2 and -1, less the critic's 6.
ADVANTAGE = (-4.0, -7.0)

BY_HAND: dict[str, tuple[float, dict[str, list[float]]]] = {
    "tbrm": square(3 - 2, 3 + 1, "log_policy", "initial_value"),
    "tbrm-first-logit": square(3 - 2, 3 + 1, "first_logit"),
    "tbrm-iterative": square(2 - 2, 2 + 1, "log_policy"),
    "reval": square(3 - 1 - 2, 3 - 1 + 1, "log_policy", "initial_value"),
    "brm": square(3 - 2, 3 + 1, "log_policy", "value"),
    "sql-one-step": square(2 - 2, 2 + 1, "log_policy"),
    "sql-multi-step": square(2 - 2, 2 + 1, "log_policy"),
    "sql-one-step-q": square(3 - 2, 3 + 1, "log_policy", "value"),
    "sql-multi-step-q": square(3 - 2, 3 + 1, "log_policy", "value"),
    "pcl-one-step": square(6 - 2, 6 + 1, "log_policy", "critic"),
    "pcl-multi-step": square(6 - 2, 6 + 1, "log_policy", "critic"),
    "trajectory-balance": square(4 - 2, 4 + 1, "log_policy", "log_partition"),
    "dro": square(5 - 2, 5 + 1, "log_policy", "baseline"),
    "a-star-po": square(5 - 2, 5 + 1, "log_policy"),
    "kimi": square(KIMI - 2, KIMI + 1, "log_policy"),
    "vargrad": policy(4.5 * L**2, -3 * L, 3 * L),
    "pairwise": policy(9 * L**2, -6 * L, 6 * L),
    "dpo": policy(-sigmoid(1) * math.log(sigmoid(-2)) - sigmoid(-1) * math.log(sigmoid(2)), DPO, -DPO),
    "reinforce": policy(-(2 * -2 * L + -1 * -L) / 2, -2 / 2, 1 / 2),  # r less β log-ratio: 1 + 1 and 0 - 1
    "rloo": policy(0.0, -3 / 2, 3 / 2),  # 2 less the other's -1, and -1 less the other's 2
    "grpo": policy(PENALTY, -(NORMALISED + BETA) / 2, (NORMALISED + BETA / 2) / 2),
    "dr-grpo": policy(PENALTY, -(0.5 + BETA) / 2, (0.5 + BETA / 2) / 2),
    "dapo": policy(0.0, -NORMALISED / 2, NORMALISED / 2),
    "ppo": (
        -sum(ADVANTAGE) / 2 - 0.001 * ENTROPY + (4**2 + 7**2) / 2 * L**2,
        {"log_policy": [4 / 2, 7 / 2], "critic": [4 * L, 7 * L], "entropy": [-0.001 / 2, -0.001 / 2]},
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_has_the_value_and_the_gradient_worked_out_on_paper(name: str) -> None:
    group: dict[str, Any] = {"group_size": 2} if LOSSES[name].needs_group else {}
    value, gradients = with_gradients(lambda own: LOSSES[name].function(own, beta=BETA, **group), bandit())
    expected, trained = BY_HAND[name]
    assert value.item() == pytest.approx(expected, rel=1e-13, abs=1e-14)
    for field in trained.keys() | {"log_policy", "initial_value", "value", "critic", "log_partition", "baseline"}:
        assert gradients[field].flatten().tolist() == pytest.approx(trained.get(field, [0, 0]), rel=1e-12, abs=1e-14)
