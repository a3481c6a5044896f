"""Cases: a problem with the policies, logits and additive functions that a claim is tried on.

A case is made from a family and a seed and can be made again from them. Options are drawn with the seed so that a family is seen
in all its forms (both kinds of rewards, slippery and not, ragged layers, missing actions, uniform and Dirichlet references,
temperatures over a factor of 16), always small enough to list every trajectory. Policies, logits and functions carry a batch
dimension of :data:`DRAWS`: the first draw is smooth, the second peaked.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from typing import Any

import torch
from torch import Tensor

from tbrm_theory.dynamic_programming import Solution, admissible_logits, soft_policy, solve
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.families import FAMILIES, make
from tbrm_theory.instance import Instance
from tbrm_theory.losses import TrajectoryScores
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.occupancy import Enumeration, enumerate_trajectories
from tbrm_theory.scores import table_scores
from tbrm_theory.shapes import PerLayerState, PerLayerStateAction
from tbrm_theory.trajectories import TrajectoryBatch

__all__ = [
    "DRAWS",
    "MOST_TRAJECTORIES",
    "Case",
    "case_of",
    "cases_in_turn",
    "check_family",
    "file_case",
    "make_case",
    "small_options",
]

DRAWS = 2
"""Policies, logits and functions in a case."""
MOST_TRAJECTORIES = 50_000
_TEMPERATURE_RANGE = 4.0  # β is the family's own, divided or multiplied by up to this

_SMALL: dict[str, Sequence[Mapping[str, Any]]] = {
    "two-armed-bandit": [{"advantage": 10.0}, {"advantage": 1.0}, {"advantage": 3.0, "folded": False}],
    "chain": [{"horizon": 6, "states": 3}, {"horizon": 4, "states": 4, "slip": 0.2}],
    "combination-lock": [{"horizon": 4}, {"horizon": 5, "actions": 3, "scrambled": True}, {"horizon": 1}],
    "one-state": [{"horizon": 4, "actions": 3}, {"horizon": 3, "actions": 1}],
    "dense-random": [{"horizon": 3, "states": 3}, {"horizon": 2, "states": 5, "actions": 4}],
    "garnet": [{"horizon": 4, "states": 4, "actions": 2}, {"horizon": 3, "states": 5, "branching": 3}],
    "deterministic-dag": [{"horizon": 4, "states": 3}, {"horizon": 6, "states": 2, "actions": 2}],
    "deterministic-tree": [{"horizon": 4, "roots": 2}, {"horizon": 1, "actions": 5}],
    "token-tree": [
        {"horizon": 4, "vocabulary": 3, "prompts": 2, "rewards": "outcome"},
        {"horizon": 3, "vocabulary": 4, "prompts": 3, "rewards": "step"},
    ],
    "frozen-lake": [
        {"size": 4, "horizon": 6},
        {"size": 4, "horizon": 3, "slippery": True},
        {"size": 8, "horizon": 4},
        {"size": 16, "horizon": 4},
    ],
    "cliff-walking": [{"horizon": 4}, {"horizon": 3, "slippery": True}],
    "taxi": [{"horizon": 2}],
    "modular-arithmetic": [{"modulus": 3, "prompts": 3}],
    "balanced-brackets": [{"pairs": 2}, {"pairs": 1, "kinds": 2}],
    "shortest-path": [{"nodes": 4, "prompts": 3}],
}
"""Options of each family that keep it small enough to list; a seed picks one entry. A family not named here has its defaults."""

_COMMON: dict[str, Sequence[Any]] = {
    "reference": ("uniform", "dirichlet"),
    "missing": (0.0, 0.3),
    "ragged": (False, True),
}
"""Options that families have in common, with the values that are tried."""


@dataclass(frozen=True, eq=False)
class Case:
    """A problem and what a claim needs on it. All tables but the problem's own carry the batch of :data:`DRAWS`."""

    family: str
    seed: int
    mdp: RegularizedMDP
    log_policy: PerLayerStateAction
    """``log π``, full support."""
    other_policy: PerLayerStateAction
    """``log π†``; the second draw leaves out actions."""
    log_behaviour: PerLayerStateAction
    """``log μ`` of Markov data, full support."""
    logits: PerLayerStateAction
    """``logit_θ``, ``-inf`` where the action does not exist."""
    additive: PerLayerStateAction
    """``f_h(s,a)``, any numbers; 0 where the action does not exist."""
    gauge: PerLayerState
    """``c_h(s)``, any numbers."""

    @cached_property
    def solution(self) -> Solution:
        return solve(self.mdp)

    @cached_property
    def listed(self) -> Enumeration:
        """Every trajectory.

        Raises:
            InvalidInputError: more than :data:`MOST_TRAJECTORIES`.
        """
        return enumerate_trajectories(self.mdp, limit=MOST_TRAJECTORIES)

    @cached_property
    def too_large(self) -> str | None:
        """Why no claim can be checked here, if the trajectories are too many to list."""
        try:
            return None if len(self.listed.states) else "no trajectories"
        except InvalidInputError:
            return f"more than {MOST_TRAJECTORIES:,} trajectories"

    @cached_property
    def trajectories(self) -> TrajectoryBatch:
        """The listed trajectories as a batch of data, nothing padded."""
        states, actions = self.listed.states, self.listed.actions
        return TrajectoryBatch(states, actions, torch.ones_like(states, dtype=torch.bool))

    def scores(self, logits: PerLayerStateAction) -> TrajectoryScores:
        """What a loss sees of every listed trajectory."""
        return table_scores(logits, self.mdp.log_reference, self.mdp.reward, self.trajectories)

    @cached_property
    def soft_policy(self) -> PerLayerStateAction:
        """``log π_θ`` of :attr:`logits`."""
        return tuple(soft_policy(table) for table in self.logits)

    # -- how many roundings (see ``comparison``) -----------------------------------------------------------------------

    @cached_property
    def sweep(self) -> int:
        """Operations along a sweep over the layers: in each a sum over actions, one over successors, and a few more."""
        successors = [kernel.edges()[1].shape[-1] for kernel in self.mdp.transitions]
        return sum(table.shape[-1] + 8 for table in self.mdp.reference) + sum(successors)

    @cached_property
    def listing(self) -> int:
        """Operations of a sum over trajectories of sums along them."""
        return len(self.listed.states) + 4 * self.mdp.horizon + 8


def small_options(family: str, seed: int) -> dict[str, Any]:
    """The options with which ``make_case`` makes the problem."""
    generator = _generator(f"options {family} {seed}")

    def pick(values: Sequence[Any]) -> Any:
        return values[int(torch.randint(len(values), (), generator=generator))]

    known = FAMILIES[family].options
    options = dict(pick(_SMALL.get(family, [{}])))
    options |= {name: pick(values) for name, values in _COMMON.items() if name in known}
    if "beta" in known:
        exponent = 2 * torch.rand((), generator=generator, dtype=torch.float64).item() - 1
        options["beta"] = (known["beta"].default or 0.1) * _TEMPERATURE_RANGE**exponent
    return options


def make_case(family: str, seed: int) -> Case:
    """The case of a family with this seed.

    Raises:
        InvalidInputError: no such family.
    """
    check_family(family)
    return case_of(make(family, seed=seed, **small_options(family, seed)), family, seed)


def check_family(name: str) -> None:
    if name not in FAMILIES:
        raise InvalidInputError("families", f"unknown family {name!r}; expected one of {', '.join(FAMILIES)}")


def cases_in_turn(seed: int, families: Sequence[str] = tuple(FAMILIES)) -> Iterator[Case]:
    """A case of the family whose turn it is at this seed, then of the next ones; different for seeds below 1000.

    For a claim that takes the first that it can use for its problem.
    """
    for turn in count():
        yield make_case(families[(seed + turn) % len(families)], seed + 1000 * turn)


def case_of(mdp: RegularizedMDP, family: str, seed: int) -> Case:
    """A case on a given problem; ``family`` and ``seed`` decide what is drawn, and name it."""
    generator = _generator(f"tables {family} {seed}")

    def tables(smooth: float, peaked: float) -> PerLayerStateAction:
        size = torch.tensor([smooth, peaked], dtype=torch.float64)[:, None, None]
        return tuple(
            size * torch.randn(DRAWS, *table.shape, generator=generator, dtype=torch.float64) for table in mdp.reference
        )

    def policy(smooth: float, peaked: float) -> PerLayerStateAction:
        return tuple(soft_policy(table) for table in admissible_logits(mdp, tables(smooth, peaked)))

    return Case(
        family=family,
        seed=seed,
        mdp=mdp,
        log_policy=policy(0.5, 3.0),
        other_policy=_with_holes(policy(1.0, 1.0)),
        log_behaviour=policy(0.3, 1.0),
        logits=admissible_logits(mdp, tables(0.5, 4.0)),
        additive=tuple(
            torch.where(valid, table, 0.0) for valid, table in zip(mdp.valid, tables(1.0, 4.0), strict=True)
        ),
        gauge=tuple(table[..., 0] for table in tables(1.0, 3.0)),
    )


def file_case(instance: Instance, name: str, seed: int) -> Case:
    """A case on the problem of a file: its logits and policies by turns where it has some, and what is missing drawn.

    The policies stand in for ``π†``, which may leave out actions; those that take actions that do not exist are left out.
    """
    case = case_of(instance.mdp, name, seed)

    def two(tables: Sequence[PerLayerStateAction]) -> PerLayerStateAction:
        chosen = [tables[(seed + i) % len(tables)] for i in range(DRAWS)]
        return tuple(torch.stack(layers) for layers in zip(*chosen, strict=True))

    possible = [
        policy
        for policy in instance.policies.values()
        if not any(
            bool((log[~valid] > -torch.inf).any()) for log, valid in zip(policy, instance.mdp.valid, strict=True)
        )
    ]
    if possible:
        case = replace(case, other_policy=two(possible))
    if instance.logits:
        case = replace(case, logits=admissible_logits(instance.mdp, two(list(instance.logits.values()))))
    return case


def _with_holes(log_policy: PerLayerStateAction) -> PerLayerStateAction:
    """The second draw takes only actions that are at least half as likely as the likeliest one of their state."""

    def punch(table: Tensor) -> Tensor:
        kept = table[1] >= table[1].amax(-1, keepdim=True) - 0.7
        return torch.stack([table[0], torch.log_softmax(torch.where(kept, table[1], -torch.inf), dim=-1)])

    return tuple(punch(table) for table in log_policy)


def _generator(name: str) -> torch.Generator:
    """A generator of its own for each thing drawn: the problem's seed is not used twice."""
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))
