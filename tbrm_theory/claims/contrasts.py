"""Data sets on which a bound of the regret from a sample is nearly attained, for C4.d and O4.

On a tree the optimum takes two trajectories, half of the time each, and all others hardly ever. The one member of the class besides
the optimum mistakes them for each other: its residual is ``a`` on the first, ``-a`` on the second and 0 elsewhere. As ``a → 0`` its
regret is ``(β/2) Var_{P*}(f) = (β/2) a²`` (B7), while uniform data on ``n`` trajectories see ``L = 2a²/n``.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from tbrm_theory.claims.cases import Case, case_of
from tbrm_theory.claims.finite_sample import DELTA, Trial, above_one, draw_counts, members
from tbrm_theory.families import make
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.random_tables import seeded

__all__ = ["noise_free_contrast", "noise_free_contrast_case", "noisy_contrast", "noisy_contrast_case"]

SHAPES = ((2, 8), (1, 40), (3, 4))
"""Horizon and actions of the trees."""
LARGEST = 0.05
"""``B``, so small that the regret is quadratic."""
ELSEWHERE = 1e-3
"""What the optimum leaves to all other trajectories."""
SIGHTINGS = (0.8, 1.01, 0.6)
"""How often the two trajectories are expected in the data, in units of ``ℓ``: O4's bound is passed from 1 on."""
CONSTANTS = (1.0, 1.02 * 28 / 3, 0.3)
"""``E f̄²`` in units of ``B² ℓ/N``: C4.d's bound is passed from 28/3 on."""


@lru_cache(maxsize=4)
def noise_free_contrast(seed: int) -> Trial:
    """A class of one member, which fits all data that hold neither of the two trajectories."""
    case, pattern, generator = _problem(seed)
    count = math.ceil(
        SIGHTINGS[seed // len(SHAPES) % 3] * math.log(1 / DELTA) * len(pattern) / 2 * above_one(generator)
    )
    plus = _counts(seed, count, pattern, 1)[0]
    logits = tuple(table[1:] for table in members(case, LARGEST * pattern.unsqueeze(0)))
    return Trial(case, case.mdp.log_reference, logits, count, 0.0, plus, torch.zeros_like(plus))


@lru_cache(maxsize=4)
def noisy_contrast(seed: int) -> Trial:
    """The optimum and one member, of the size that :data:`CONSTANTS` say; noise is the rest of ``B``."""
    case, pattern, generator = _problem(seed)
    count = int(10 ** (4 + 2 * torch.rand((), generator=generator).item()))
    constant = CONSTANTS[seed // len(SHAPES) % 3] * above_one(generator)
    share = math.sqrt(constant * math.log(2 / DELTA) * len(pattern) / (2 * count))
    plus, minus = _counts(seed, count, pattern, 2)
    logits = members(case, LARGEST * share * pattern.unsqueeze(0))
    return Trial(case, case.mdp.log_reference, logits, count, LARGEST * (1 - share), plus, minus)


def noise_free_contrast_case(seed: int) -> Case:
    return noise_free_contrast(seed).case


def noisy_contrast_case(seed: int) -> Case:
    return noisy_contrast(seed).case


def _counts(seed: int, count: int, pattern: Tensor, signs: int) -> list[Tensor]:
    """For each sign of the noise the counts of uniform draws; those of trajectories that no member mistakes stand at one of them."""
    place = torch.stack([pattern.argmax(), pattern.argmin(), pattern.abs().argmin()])
    law = torch.tensor([1.0, 1.0, len(pattern) - 2.0], dtype=torch.float64).repeat(signs) / (signs * len(pattern))
    drawn = draw_counts(seed, count, law).split(3, dim=-1)
    return [torch.zeros(len(part), len(pattern), dtype=torch.float64).index_copy(1, place, part) for part in drawn]


def _problem(seed: int) -> tuple[Case, Tensor, torch.Generator]:
    """The tree, and 1 and -1 on two trajectories, 0 on the others."""
    horizon, actions = SHAPES[seed % len(SHAPES)]
    tree = make("deterministic-tree", seed=seed, horizon=horizon, actions=actions, roots=1, reference="uniform")
    listed, generator = case_of(tree, "contrast", seed).listed, seeded(seed)
    count = len(listed.states)
    one, other = torch.randperm(count, generator=generator)[:2]
    pattern = torch.zeros(count, dtype=torch.float64)
    pattern[one], pattern[other] = 1.0, -1.0
    law = pattern.abs() * (1 - ELSEWHERE) / 2 + (1 - pattern.abs()) * ELSEWHERE / (count - 2)
    end = listed.states[:, -1] * tree.reference[-1].shape[-1] + listed.actions[:, -1]
    last = torch.zeros(tree.reference[-1].numel(), dtype=torch.float64).index_copy(0, end, law.log())
    goal = [*(torch.zeros_like(table) for table in tree.reference[:-1]), last.reshape(tree.reference[-1].shape)]
    rewards = [  # so that R_β is log P*(τ) on the last pair, and V* is 0
        torch.where(valid, tree.beta * (target - torch.where(valid, log, 0.0)), 0.0)
        for valid, target, log in zip(tree.valid, goal, tree.log_reference, strict=True)
    ]
    mdp = RegularizedMDP(
        beta=tree.beta,
        initial=tree.initial,
        reward=rewards,
        reference=tree.reference,
        transitions=tree.transitions,
    )
    return case_of(mdp, "contrast", seed), pattern, generator
