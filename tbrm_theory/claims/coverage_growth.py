"""X4: how κ, Lemma 1 and C_∞ grow with the horizon: exponentially on trees and locks, linearly where states are one.

A per-step change of policy has ``χ²(π_h(·|s) ‖ μ_h(·|s)) = c`` in every state that π visits. One side is ``coverage``, the closed
form and, where there are few pairs, the linear solve; the other is a formula in H and c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from tbrm_theory import coverage
from tbrm_theory.behaviours import MarkovBehaviour
from tbrm_theory.claims.cases import Case, case_of
from tbrm_theory.claims.comparison import Comparison
from tbrm_theory.claims.registry import claim
from tbrm_theory.families import make
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.moments import moment_form
from tbrm_theory.random_tables import seeded
from tbrm_theory.shapes import PerLayerStateAction
from tbrm_theory.tables import safe_log
from tbrm_theory.transitions import DenseTransition

__all__ = [
    "CoveragePair",
    "leaky_lock",
    "leaky_lock_masses",
    "lemma1_of_products",
    "lock",
    "one_state",
    "step",
    "step_chi_square",
    "tree",
]

Rows: TypeAlias = tuple[Tensor, Tensor]
"""Probabilities of π and of μ over the actions of a state."""
_INSTANCES = 25


@dataclass(frozen=True, eq=False)
class CoveragePair:
    """A problem with a target and the data's policy, and what one step changes."""

    mdp: RegularizedMDP
    log_policy: PerLayerStateAction
    log_behaviour: PerLayerStateAction
    c: float
    """``χ²(π_h(·|s) ‖ μ_h(·|s))`` in every state that π visits."""
    ratio: float
    """``max_a π_h(a|s)/μ_h(a|s)`` there."""


def step_chi_square(policy: Tensor, behaviour: Tensor) -> float:
    """``χ²`` of two rows of positive probabilities."""
    return float(((policy - behaviour).square() / behaviour).sum())


def step(c: float) -> Rows:
    """π and μ over two actions, μ uniform, with ``χ²(π ‖ μ) = c``, from 0 to 1; at 1 π is deterministic."""
    half = 0.5 * c**0.5
    return torch.tensor([0.5 + half, 0.5 - half], dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64)


def tree(horizon: int, rows: Rows, *, seed: int = 0) -> CoveragePair:
    """A token tree; in each state π and μ are these two rows of probabilities, in a random order of the actions."""
    return _with_rows(make("token-tree", seed=seed, horizon=horizon, vocabulary=len(rows[0])), rows, seed)


def one_state(horizon: int, rows: Rows, *, seed: int = 0) -> CoveragePair:
    """One state per layer, π and μ as in :func:`tree`."""
    return _with_rows(make("one-state", seed=seed, horizon=horizon, actions=len(rows[0])), rows, seed)


def lock(horizon: int, *, right: float = 0.5, seed: int = 0) -> CoveragePair:
    """The combination lock: π always right, μ right with probability ``right``, ``c = 1/right - 1``; two merged states."""
    mdp = make("combination-lock", seed=seed, horizon=horizon, scrambled=True)
    rows = torch.tensor([right, 1 - right], dtype=torch.float64)
    data, target = [], []
    for h in range(horizon):
        opens = int(mdp.reward[h][0].argmax())
        if h < horizon - 1:
            opens = mdp.transitions[h].edges()[0][0, :, 0].tolist().index(0)
        order = [opens, 1 - opens]
        data.append(rows[order].log().expand(2, 2))
        target.append(safe_log(torch.tensor([1.0, 0.0], dtype=torch.float64)[order]).expand(2, 2))
    return CoveragePair(mdp, tuple(target), tuple(data), 1 / right - 1, 1 / right)


def leaky_lock(horizon: int, way_back: float, *, right: float = 0.5) -> CoveragePair:
    """The lock, but the wrong state leads back to the right one with probability ``way_back``, whatever is done there."""
    kernel = DenseTransition(torch.tensor([[[1, 0], [0, 1]], [[way_back, 1 - way_back]] * 2], dtype=torch.float64))
    uniform = torch.full((2, 2), 0.5, dtype=torch.float64)
    mdp = RegularizedMDP(
        beta=0.2,
        initial=torch.tensor([1.0, 0.0]),
        reward=[torch.zeros(2, 2)] * (horizon - 1) + [torch.tensor([[1.0, 0.0], [0.0, 0.0]])],
        reference=[uniform] * horizon,
        transitions=[kernel] * (horizon - 1),
    )
    data = torch.tensor([[right, 1 - right]] * 2, dtype=torch.float64).log()
    target = safe_log(torch.tensor([[1.0, 0.0]] * 2, dtype=torch.float64))
    return CoveragePair(mdp, (target,) * horizon, (data,) * horizon, 1 / right - 1, 1 / right)


def leaky_lock_masses(horizon: int, way_back: float, right: float) -> list[float]:
    """``d^μ_h(right state)``: ``g_1 = 1, g_{h+1} = right · g_h + way_back · (1 - g_h)``."""
    masses = [1.0]
    while len(masses) < horizon:
        masses.append(right * masses[-1] + way_back * (1 - masses[-1]))
    return masses


def lemma1_of_products(horizon: int, c: float) -> float:
    """``1 + Σ_h [(1+c)^h - 1]``: Lemma 1's right side where every step multiplies the density's mean square by ``1 + c``."""
    return 1 - horizon + sum((1 + c) ** h for h in range(1, horizon + 1))


def _with_rows(mdp: RegularizedMDP, rows: Rows, seed: int) -> CoveragePair:
    generator, (policy, behaviour) = seeded(seed), rows
    target, data = [], []
    for table in mdp.reference:
        order = torch.rand(table.shape, generator=generator).argsort(-1)
        target.append(safe_log(policy)[order])
        data.append(safe_log(behaviour)[order])
    ratio = float((policy / behaviour).max())
    return CoveragePair(mdp, tuple(target), tuple(data), step_chi_square(policy, behaviour), ratio)


# -- claims ----------------------------------------------------------------------------------------------------------


def _small_tree(seed: int) -> CoveragePair:
    return tree(1 + seed % 4, _random_rows(2 + seed % 2, seed), seed=seed)


def _small_one_state(seed: int) -> CoveragePair:
    return one_state(1 + seed % 12, _random_rows(2 + seed % 3, seed), seed=seed)


def _random_rows(actions: int, seed: int) -> Rows:
    draws = torch.softmax(torch.randn(2, actions, generator=seeded(seed), dtype=torch.float64), dim=-1)
    return draws[0], draws[1]


def _some_lock(seed: int) -> CoveragePair:
    """Up to ``H = 60``; seed 0 is theory.md's c = 1."""
    right = 0.5 if seed == 0 else 0.2 + 0.6 * float(torch.rand((), generator=seeded(seed)))
    return lock(1 + (7 * seed + 9) % 60, right=right, seed=seed)


def _some_leaky_lock(seed: int) -> tuple[CoveragePair, float, float]:
    u = torch.rand(2, generator=seeded(seed), dtype=torch.float64).tolist()
    right, way_back = 0.2 + 0.6 * u[0], 10 ** (-4 * u[1])
    return leaky_lock(1 + seed % 30, way_back, right=right), way_back, right


def _compared(case: Case, pair: CoveragePair, kappa: float, lemma1: float, c_inf: float, solve: bool) -> Comparison:
    """κ in closed form and, if asked for, by linear solve; Lemma 1's right side; C_∞: against the formulas."""
    mdp, target, data = case.mdp, pair.log_policy, pair.log_behaviour
    found = [coverage.kappa_closed_form(mdp, target, data), coverage.lemma1(mdp, target, data)]
    found.append(coverage.c_inf(mdp, target, data))
    expected, conditions = [kappa, lemma1, c_inf], [1.0, 1.0, 1.0]
    if solve:
        behaviour = MarkovBehaviour(data)
        found.append(coverage.kappa_linear_solve(mdp, target, behaviour))
        expected.append(kappa)
        conditions.append(float(moment_form(mdp, behaviour).condition))  # a solve multiplies rounding by it
    right = torch.tensor(expected, dtype=torch.float64)
    steps = torch.stack([log[log > -torch.inf].abs().max() for log in data]).sum()  # |log P(τ)|
    scale = right.clamp(min=1.0) * (1 + steps) * torch.tensor(conditions, dtype=torch.float64)
    return Comparison(torch.stack(found), right, scale, 2 * case.sweep + sum(len(d) for d in data))


@claim("X4.a", source="own", problem=lambda seed: case_of(_small_tree(seed).mdp, "X4", seed), problems=_INSTANCES)
def trees(case: Case) -> Comparison:
    """token trees: κ = (1+c)^H, Lemma 1's right side 1 + Σ_h [(1+c)^h - 1], C_∞ = (max π/μ)^H

    Left: ``coverage``, in closed form and by linear solve. Right: the formulas. *Proof.* A pair is its whole prefix, so
    ``1 + χ²(d^π_h ‖ d^μ_h) = (1+c)^h``; κ by I13. ∎
    """
    pair = _small_tree(case.seed)
    horizon = case.mdp.horizon
    formulas = ((1 + pair.c) ** horizon, lemma1_of_products(horizon, pair.c), pair.ratio**horizon)
    return _compared(case, pair, *formulas, solve=True)


@claim("X4.b", source="own", problem=lambda seed: case_of(_small_one_state(seed).mdp, "X4", seed), problems=_INSTANCES)
def one_state_per_layer(case: Case) -> Comparison:
    """one state per layer: κ = Lemma 1's right side = 1 + Hc, C_∞ = max π/μ

    Left: ``coverage``, in closed form and by linear solve. Right: the formulas. *Proof.* ``w_h(s) = 1`` in I12. ∎
    """
    pair = _small_one_state(case.seed)
    kappa = 1 + case.mdp.horizon * pair.c
    return _compared(case, pair, kappa, kappa, pair.ratio, solve=True)


@claim("X4.c", source="own", problem=lambda seed: case_of(_some_lock(seed).mdp, "X4", seed), problems=_INSTANCES)
def combination_locks(case: Case) -> Comparison:
    """combination lock, two states per layer: κ = (1+c)^H = C_∞ all the same, 2^H at c = 1

    π always right; up to H = 60, by linear solve up to 12. Left: ``coverage``. Right: the formulas. *Proof.* Of one
    trajectory of π each prefix is seen with probability ``(1+c)^{-h}``: in I12 ``w_h = (1+c)^{h-1}`` and the sum is ``1 +
    Σ_h (1+c)^{h-1} c``. ∎
    """
    pair = _some_lock(case.seed)
    horizon = case.mdp.horizon
    kappa = (1 + pair.c) ** horizon
    return _compared(case, pair, kappa, lemma1_of_products(horizon, pair.c), kappa, solve=horizon <= 12)


@claim(
    "X4.d", source="own", problem=lambda seed: case_of(_some_leaky_lock(seed)[0].mdp, "X4", seed), problems=_INSTANCES
)
def locks_with_a_way_back(case: Case) -> Comparison:
    """lock with a way back: κ = 1 + c Σ_h 1/g_h, g_h the share of the data that is right at h

    so κ is at most ``1 + cH/min g``: linear in H as soon as state ratios stay bounded, after growing like ``(1+c)^h``
    up to ``h ~ log(1/g) / log(1+c)``. Lemma 1's right side is ``1 + Σ_h [(1+c)/g_h - 1]``, C_∞ the largest ``(1+c)/g_h``. Left:
    ``coverage``. Right: the formulas. *Proof.* π stays right: ``w_h = 1/g_h`` in I12; With way back r, and μ
    right with probability p, ``g_h`` tends to ``g = r/(1 - p + r)``. ∎
    """
    pair, way_back, right = _some_leaky_lock(case.seed)
    masses = leaky_lock_masses(case.mdp.horizon, way_back, right)
    kappa = 1 + pair.c * sum(1 / g for g in masses)
    lemma1 = 1 + sum((1 + pair.c) / g - 1 for g in masses)
    return _compared(case, pair, kappa, lemma1, (1 + pair.c) / min(masses), solve=case.mdp.horizon <= 12)
