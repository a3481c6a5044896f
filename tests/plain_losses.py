"""Every residual and loss once more, by loops over lists of Python floats; nothing here comes from the package.

A row is one trajectory: a list for each score of a step, cut to the trajectory's length, and a number for each score of a
trajectory. ``held`` is a second set of rows, from which everything is read that a loss holds constant: with it a difference
quotient in ``rows`` alone is the gradient that the loss shall have.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]


def log_ratio(row: Row) -> float:
    return math.fsum(row["log_policy"]) - math.fsum(row["log_reference"])


def gap(row: Row, beta: float) -> float:
    return log_ratio(row) - row["trajectory_return"] / beta


def steps(row: Row) -> range:
    return range(len(row["log_policy"]))


def at(values: Sequence[float], h: int) -> float:
    """``V(s_h)``, 0 after the end."""
    return values[h] if h < len(values) else 0.0


def step_gap(row: Row, h: int, beta: float) -> float:
    return row["log_policy"][h] - row["log_reference"][h] - row["reward"][h] / beta


# -- residuals -----------------------------------------------------------------------------------------------


def first_logit(row: Row, beta: float) -> float:
    later = math.fsum(row["log_policy"][1:])
    return row["first_logit"] + later - math.fsum(row["log_reference"]) - row["trajectory_return"] / beta


def one_step(row: Row, own: Sequence[float], following: Sequence[float], beta: float) -> list[float]:
    return [own[h] + step_gap(row, h, beta) - at(following, h + 1) for h in steps(row)]


def multi_step(row: Row, own: Sequence[float], beta: float) -> list[float]:
    return [own[h] + math.fsum(step_gap(row, k, beta) for k in steps(row) if k >= h) for h in steps(row)]


def multi_step_q(row: Row, held: Row, beta: float) -> list[float]:
    """Every logit on the regularised return that follows; the rewards of that return are data, its policy is held."""
    found = []
    for h in steps(row):
        target = row["reward"][h] / beta
        for k in range(h + 1, len(row["log_policy"])):
            target -= step_gap(held, k, beta)
        logit = row["value"][h] + row["log_policy"][h]
        found.append(logit - row["log_reference"][h] - target)
    return found


RESIDUALS: dict[str, Callable[[Row, Row, float], list[float]]] = {
    "tbrm": lambda row, held, beta: [row["initial_value"] + gap(row, beta)],
    "tbrm-first-logit": lambda row, held, beta: [first_logit(row, beta)],
    "tbrm-iterative": lambda row, held, beta: [held["frozen_initial_value"] + gap(row, beta)],
    "reval": lambda row, held, beta: [row["initial_value"] - row["reference_initial_value"] + gap(row, beta)],
    "brm": lambda row, held, beta: one_step(row, row["value"], row["value"], beta),
    "sql-one-step": lambda row, held, beta: one_step(row, held["frozen_value"], held["frozen_value"], beta),
    "sql-multi-step": lambda row, held, beta: multi_step(row, held["frozen_value"], beta),
    "sql-one-step-q": lambda row, held, beta: one_step(row, row["value"], held["frozen_value"], beta),
    "sql-multi-step-q": multi_step_q,
    "pcl-one-step": lambda row, held, beta: one_step(row, row["critic"], row["critic"], beta),
    "pcl-multi-step": lambda row, held, beta: multi_step(row, row["critic"], beta),
    "trajectory-balance": lambda row, held, beta: [row["log_partition"] + gap(row, beta)],
    "dro": lambda row, held, beta: [row["baseline"] + gap(row, beta)],
    "a-star-po": lambda row, held, beta: [held["baseline"] + gap(row, beta)],
}


# -- losses --------------------------------------------------------------------------------------------------


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def groups(rows: list[Row], size: int) -> list[list[Row]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def squares(residual: Callable[[Row, Row, float], list[float]]) -> Callable[..., float]:
    def loss(rows: list[Row], held: list[Row], beta: float, size: int) -> float:
        totals = [math.fsum(x**2 for x in residual(row, own, beta)) for row, own in zip(rows, held, strict=True)]
        return mean(totals)

    return loss


def kimi(rows: list[Row], held: list[Row], beta: float, size: int) -> float:
    found = []
    for group in groups(rows, size):
        value = math.log(mean([math.exp(row["trajectory_return"] / beta) for row in group]))
        found += [(value + gap(row, beta)) ** 2 for row in group]
    return mean(found)


def vargrad(rows: list[Row], held: list[Row], beta: float, size: int) -> float:
    return mean([statistics.variance([gap(row, beta) for row in group]) for group in groups(rows, size)])


def pairwise(rows: list[Row], held: list[Row], beta: float, size: int) -> float:
    return mean(
        [
            (gap(one, beta) - gap(other, beta)) ** 2
            for group in groups(rows, size)
            for one, other in itertools.combinations(group, 2)
        ]
    )


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def dpo(rows: list[Row], held: list[Row], beta: float, size: int) -> float:
    found = []
    for group in groups(rows, size):
        for one, other in itertools.combinations(group, 2):
            preferred = sigmoid(one["trajectory_return"] - other["trajectory_return"])
            agrees = sigmoid(beta * (log_ratio(one) - log_ratio(other)))
            found.append(-preferred * math.log(agrees) - (1 - preferred) * math.log(1 - agrees))
    return mean(found)


def clipped(ratio: float, advantage: float, lower: float, higher: float) -> float:
    """PPO's surrogate by cases: a gain is not counted beyond the range, a loss always is."""
    if advantage > 0:
        return advantage * (1 + higher if ratio > 1 + higher else ratio)
    return advantage * (1 - lower if ratio < 1 - lower else ratio)


def reinforce(rows: list[Row], held: list[Row], beta: float, size: int) -> float:
    advantages = [own["trajectory_return"] - beta * log_ratio(own) for own in held]
    gains = [a * math.fsum(row["log_policy"]) for a, row in zip(advantages, rows, strict=True)]
    return -mean(gains)


def rloo(rows: list[Row], held: list[Row], beta: float, size: int, *, clip: float = 0.2) -> float:
    gains = []
    for group, own in zip(groups(rows, size), groups(held, size), strict=True):
        rewards = [
            row["trajectory_return"] - beta * (math.fsum(row["behaviour_log_policy"]) - math.fsum(row["log_reference"]))
            for row in own
        ]
        for i, row in enumerate(group):
            advantage = rewards[i] - mean([reward for j, reward in enumerate(rewards) if j != i])
            ratio = math.exp(math.fsum(row["log_policy"]) - math.fsum(own[i]["behaviour_log_policy"]))
            gains.append(clipped(ratio, advantage, clip, clip))
    return -mean(gains)


def token_gains(
    rows: list[Row],
    held: list[Row],
    size: int,
    *,
    normalised: bool,
    penalty: float,
    corrected: bool = False,
    lower: float = 0.2,
    higher: float = 0.2,
) -> list[list[float]]:
    """The clipped surrogate less the penalty, a list for each trajectory."""
    found = []
    for group, own in zip(groups(rows, size), groups(held, size), strict=True):
        returns = [row["trajectory_return"] for row in own]
        scale = statistics.stdev(returns) + 1e-4 if normalised else 1.0
        for row, fixed, value in zip(group, own, returns, strict=True):
            gains = []
            for h in steps(row):
                ratio = math.exp(row["log_policy"][h] - fixed["behaviour_log_policy"][h])
                gain = clipped(ratio, (value - mean(returns)) / scale, lower, higher)
                if penalty:
                    x = row["log_reference"][h] - row["log_policy"][h]
                    gain -= penalty * (math.exp(x) - x - 1) * (ratio if corrected else 1.0)
                gains.append(gain)
            found.append(gains)
    return found


def grpo(
    rows: list[Row], held: list[Row], beta: float, size: int, *, clip: float = 0.2, corrected_kl: bool = False
) -> float:
    gains = token_gains(
        rows, held, size, normalised=True, penalty=beta, corrected=corrected_kl, lower=clip, higher=clip
    )
    return -mean([mean(gain) for gain in gains])


def dr_grpo(
    rows: list[Row], held: list[Row], beta: float, size: int, *, clip: float = 0.2, corrected_kl: bool = False
) -> float:
    gains = token_gains(
        rows, held, size, normalised=False, penalty=beta, corrected=corrected_kl, lower=clip, higher=clip
    )
    return -mean([math.fsum(gain) for gain in gains])


def dapo(
    rows: list[Row], held: list[Row], beta: float, size: int, *, clip: float = 0.2, clip_higher: float = 0.28
) -> float:
    gains = token_gains(rows, held, size, normalised=True, penalty=0.0, lower=clip, higher=clip_higher)
    return -mean([token for gain in gains for token in gain])


def ppo(
    rows: list[Row],
    held: list[Row],
    beta: float,
    size: int,
    *,
    clip: float = 0.2,
    gae_lambda: float = 1.0,
    entropy_coefficient: float = 0.001,
) -> float:
    found = []
    for row, own in zip(rows, held, strict=True):
        advantage, total = 0.0, 0.0
        for h in reversed(steps(row)):  # the recursion Â_h = δ_h + λ Â_{h+1}
            penalty = own["behaviour_log_policy"][h] - own["log_reference"][h]
            change = own["reward"][h] / beta - penalty + at(own["critic"], h + 1) - own["critic"][h]
            advantage = change + gae_lambda * advantage
            target = own["critic"][h] + advantage
            ratio = math.exp(row["log_policy"][h] - own["behaviour_log_policy"][h])
            total -= clipped(ratio, beta * advantage, clip, clip)
            total -= entropy_coefficient * row["entropy"][h]
            total += (row["critic"][h] - target) ** 2
        found.append(total)
    return mean(found)


LOSSES: dict[str, Callable[..., float]] = {name: squares(residual) for name, residual in RESIDUALS.items()} | {
    "vargrad": vargrad,
    "kimi": kimi,
    "pairwise": pairwise,
    "dpo": dpo,
    "reinforce": reinforce,
    "rloo": rloo,
    "grpo": grpo,
    "dr-grpo": dr_grpo,
    "dapo": dapo,
    "ppo": ppo,
}
"""``(rows, held, beta, group size, **options)``; losses without groups take the size and leave it."""
