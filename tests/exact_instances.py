"""Small instances for exact decisions, and numbers as fractions and floats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from flint import fmpq
from torch import Tensor

from tbrm_theory.instance import Instance
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.rigor import Decision
from tbrm_theory.rigor.problem import Table
from tbrm_theory.transitions import DeterministicTransition
from tests.problems import random_logits, random_policy, random_problem

Rows = Sequence[Sequence[Sequence[float]]]


def tables(rows: Rows) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(layer, dtype=torch.float64) for layer in rows)


def deterministic(
    actions: Sequence[Sequence[int]],
    next_state: Sequence[Sequence[Sequence[int]]],
    *,
    reward: Rows | None = None,
) -> RegularizedMDP:
    """β = 1, one start; ``actions[h][s]`` actions, uniform under the reference; padded successors."""
    width = [max(counts) for counts in actions]
    uniform = [[[1 / n] * n + [0.0] * (w - n) for n in counts] for counts, w in zip(actions, width, strict=True)]
    return RegularizedMDP(
        beta=1.0,
        initial=torch.tensor([1.0] + [0.0] * (len(actions[0]) - 1)),
        reward=[torch.zeros_like(table) for table in tables(uniform)] if reward is None else tables(reward),
        reference=tables(uniform),
        transitions=[
            DeterministicTransition(torch.tensor(layer), len(counts))
            for layer, counts in zip(next_state, actions[1:], strict=True)
        ],
    )


def one_state(horizon: int, *, reward: Rows | None = None) -> RegularizedMDP:
    """Two actions in the only state of every layer."""
    return deterministic([[2]] * horizon, [[[0, 0]]] * (horizon - 1), reward=reward)


def binary_tree(horizon: int) -> RegularizedMDP:
    return deterministic(
        [[2] * 2**h for h in range(horizon)], [[[2 * s, 2 * s + 1] for s in range(2**h)] for h in range(horizon - 1)]
    )


def instance(
    mdp: RegularizedMDP,
    policies: Mapping[str, Rows],
    mixture: Sequence[tuple[float, str]] | None = None,
    logits: dict[str, tuple[Tensor, ...]] | None = None,
) -> Instance:
    return Instance.from_probabilities(
        mdp,
        {name: tables(rows) for name, rows in policies.items()},
        {"mu": mixture} if mixture else {},
        logits or {},
    )


def sharp(horizon: int, c: fmpq, g: fmpq) -> tuple[RegularizedMDP, list, list]:
    """B3's sharp family, in rationals: the problem, π and μ. Layer 1: gA, gB, bad; later A has one action, B has two."""
    mdp = deterministic(
        [[3]] + [[1, 2]] * (horizon - 1), [[[0, 1, 1]]] + [[[0, 0], [1, 1]]] * (horizon - 2) if horizon > 1 else []
    )
    one, zero = fmpq(1), fmpq(0)
    first_b = g * (1 - 1 / c) / (1 - g)
    first_a = 1 / c - first_b
    mu = [[[first_a, first_b, 1 - 1 / c]]] + [[[one, zero], [g, 1 - g]]] * (horizon - 1)
    pi = [[[c * first_a, c * first_b, zero]]] + [[[one, zero], [one, zero]]] * (horizon - 1)
    return mdp, pi, mu


def as_fraction(number: fmpq) -> Fraction:
    return Fraction(int(number.p), int(number.q))


def as_floats(table: Table) -> list[list[list[float]]]:
    return [[[float(as_fraction(x)) for x in row] for row in layer] for layer in table]


def bandit(reward: float, theta: float, mu: float) -> Instance:
    """β = 1, A = 2, H = 1: ``R_β = (reward, 0) - log 2``, ``f ≈ (theta, 0)``, and data with ``μ(1) = mu``."""
    logits = torch.tensor([[reward + theta - math.log(2), -math.log(2)]], dtype=torch.float64)
    return instance(one_state(1, reward=[[[reward, 0.0]]]), {"mu": [[[mu, 1 - mu]]]}, logits={"theta": (logits,)})


def random_instance(kind: str, seed: int, *, mixture: bool = False) -> Instance:
    mdp = random_problem(kind, seed)
    names = ("mu0", "mu1", "pi") if mixture else ("mu", "pi")
    return Instance(
        mdp,
        {name: random_policy(mdp, seed + i) for i, name in enumerate(names)},
        {"mu": [(0.25, "mu0"), (0.75, "mu1")]} if mixture else {},
        {"theta": random_logits(mdp, seed + 7)},
    )


def holds(decision: Decision, *, exact: str | None = None) -> bool:
    assert decision.left[0] <= decision.left[1]
    assert decision.right[0] <= decision.right[1]
    assert exact is None or decision.exact == exact
    assert decision.violated is not None
    return not decision.violated


def width(ends: tuple[float, float]) -> float:
    return (ends[1] - ends[0]) / abs(ends[0])
