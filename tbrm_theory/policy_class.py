"""The worst policy for given data: ``max_π C_∞`` exactly, ``max_π χ²`` by search and from above (theory.md B2, B5).

Both range over all policies of a problem. ``C_∞`` is largest at a policy that goes to one pair as often as possible, which dynamic
programming finds. ``1 + Σ_h χ²(d^π_h ‖ d^μ_h)`` is convex in the occupancies, hence largest at a deterministic policy; finding it is
hard in general, so small problems are searched in full, and larger ones get a policy from below and a certified bound from above.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from tbrm_theory.coverage import Data, behaviour_occupancy, data_behaviour, lemma1
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.occupancy import LogOccupancy, log_occupancy
from tbrm_theory.shapes import PerLayerState, PerLayerStateAction
from tbrm_theory.transitions import Transition

__all__ = ["MOST_POLICIES", "LargestChiSquare", "largest_c_inf", "largest_chi_square", "largest_reach"]

MOST_POLICIES = 100_000
"""Deterministic policies that are all tried."""
_AT_ONCE = 4096
_ASCENTS = 20


@dataclass(frozen=True, eq=False)
class LargestChiSquare:
    """``max_π 1 + Σ_h χ²(d^π_h ‖ d^μ_h)`` between two bounds."""

    lower: float
    """Attained by ``log_policy``."""
    upper: float
    """No policy exceeds it; equal to ``lower`` if every deterministic policy was tried."""
    log_policy: PerLayerStateAction
    exact: bool
    """Whether every deterministic policy was tried."""


def largest_reach(mdp: RegularizedMDP) -> PerLayerState:
    """``max_π d^π_h(s)`` of every state, by one backward sweep for all states of each layer."""
    reach = []
    for target, table in enumerate(mdp.reference):
        value = torch.eye(table.shape[-2], dtype=torch.float64, device=table.device)  # (target, state)
        for h in range(target - 1, -1, -1):
            arriving = mdp.transitions[h].expect(value)
            value = torch.where(mdp.valid[h], arriving, 0.0).amax(-1)
        reach.append((mdp.initial * value).sum(-1))
    return tuple(reach)


def largest_c_inf(mdp: RegularizedMDP, mu: Data) -> float:
    """``max_π C_∞(π,μ) = max_{h,s,a} max_π d^π_h(s) / d^μ_h(s,a)``; ``inf`` if some policy visits a pair without data.

    Raises:
        InvalidInputError: a problem or data with batch dimensions.
    """
    log_data = _log_data(mdp, mu)
    largest = -math.inf
    for valid, reach, log_d in zip(mdp.valid, largest_reach(mdp), log_data, strict=True):
        visited = valid & (reach > 0).unsqueeze(-1)
        largest = max(largest, torch.where(visited, reach.log().unsqueeze(-1) - log_d, -torch.inf).max().item())
    return _exp(largest)


def largest_chi_square(mdp: RegularizedMDP, mu: Data, *, seed: int = 0) -> LargestChiSquare:
    """The largest of Lemma 1's right side over all policies, ``C_χ(μ)`` of theory.md B5.

    With at most :data:`MOST_POLICIES` deterministic policies all are tried. Otherwise ``lower`` comes from a local search: the
    function is convex in ``d^π``, so the deterministic policy that is best for its linearisation is never worse. ``upper`` is
    ``1 - H + max_π E_π Σ_h reach_h(s_h)/d^μ_h(s_h,a_h)``, exact by dynamic programming, since ``d^π_h(s,a) ≤ reach_h(s)``.

    Raises:
        InvalidInputError: a problem or data with batch dimensions.
    """
    log_data = _log_data(mdp, mu)
    reach = largest_reach(mdp)
    gain = tuple(
        torch.where(valid & (r > 0).unsqueeze(-1), (r.log().unsqueeze(-1) - log_d).exp(), 0.0)
        for valid, r, log_d in zip(mdp.valid, reach, log_data, strict=True)
    )
    upper, start = _best_policy(mdp, gain)
    upper = 1 - mdp.horizon + upper
    free = [[[a for a in range(valid.shape[-1]) if valid[s, a]] for s in range(valid.shape[-2])] for valid in mdp.valid]
    count = math.prod(len(actions) for layer in free for actions in layer)
    if count <= MOST_POLICIES:
        lower, policy = max(
            (_best_of(mdp, batch, mu) for batch in _all_policies(mdp, free)), key=lambda found: found[0]
        )
        return LargestChiSquare(lower, lower, policy, exact=True)
    generator = torch.Generator(device=mdp.initial.device).manual_seed(seed)
    starts = [start, *(_random_vertex(mdp, generator) for _ in range(_ASCENTS))]
    lower, policy = max((_ascend(mdp, one, log_data, mu) for one in starts), key=lambda found: found[0])
    return LargestChiSquare(lower, upper, policy, exact=False)


def _ascend(
    mdp: RegularizedMDP, policy: PerLayerStateAction, log_data: PerLayerStateAction, mu: Data
) -> tuple[float, PerLayerStateAction]:
    """Linearise and take the best deterministic policy until nothing is gained."""
    value = lemma1(mdp, policy, mu).item()
    while value < math.inf:
        d = log_occupancy(mdp, policy).state_action
        gradient = tuple(
            torch.where(valid & (here > -torch.inf), (here - log_d).exp(), 0.0)
            for valid, here, log_d in zip(mdp.valid, d, log_data, strict=True)
        )
        candidate = _best_policy(mdp, gradient)[1]
        gained = lemma1(mdp, candidate, mu).item()
        if gained <= value * (1 + 1e-12):
            break
        value, policy = gained, candidate
    return value, policy


def _best_policy(mdp: RegularizedMDP, gain: PerLayerStateAction) -> tuple[float, PerLayerStateAction]:
    """``max_π E_π Σ_h gain_h(s_h,a_h)`` and a deterministic policy that attains it, by dynamic programming without entropy."""
    policy: list[Tensor] = []
    value: Tensor | None = None
    for h in range(mdp.horizon - 1, -1, -1):
        q = gain[h] if value is None else gain[h] + _expect(mdp.transitions[h], value)
        q = torch.where(mdp.valid[h], q, -torch.inf)
        value, best = q.max(-1)
        policy.append(_vertex(best, q.shape[-1]))
    assert value is not None
    expected = torch.where(mdp.initial > 0, mdp.initial * value, 0.0).sum()
    return expected.item(), tuple(reversed(policy))


def _expect(kernel: Transition, value: Tensor) -> Tensor:
    """``E[value(s')|s,a]`` of values that may be infinite: ``inf`` where one of these is possible, never ``0 · ∞``."""
    infinite = value.isinf()
    possible = kernel.expect(infinite.to(value.dtype)) > 0
    return torch.where(possible, torch.inf, kernel.expect(torch.where(infinite, 0.0, value)))


def _vertex(action: Tensor, actions: int) -> Tensor:
    """``log π`` of a deterministic policy."""
    chosen = torch.nn.functional.one_hot(action, actions).to(torch.bool)
    return torch.where(chosen, torch.zeros((), dtype=torch.float64, device=action.device), -torch.inf)


def _random_vertex(mdp: RegularizedMDP, generator: torch.Generator) -> PerLayerStateAction:
    chosen = [torch.multinomial(valid.to(torch.float64), 1, generator=generator).squeeze(-1) for valid in mdp.valid]
    return tuple(_vertex(action, valid.shape[-1]) for action, valid in zip(chosen, mdp.valid, strict=True))


def _all_policies(mdp: RegularizedMDP, free: list[list[list[int]]]) -> Iterator[PerLayerStateAction]:
    """Every deterministic policy, in batches."""
    widths = [len(layer) for layer in free]
    choices = product(*(actions for layer in free for actions in layer))
    while batch := [choice for _, choice in zip(range(_AT_ONCE), choices, strict=False)]:
        columns = torch.tensor(batch, device=mdp.initial.device).split(widths, dim=-1)
        yield tuple(_vertex(column, valid.shape[-1]) for column, valid in zip(columns, mdp.valid, strict=True))


def _best_of(mdp: RegularizedMDP, batch: PerLayerStateAction, mu: Data) -> tuple[float, PerLayerStateAction]:
    values = lemma1(mdp, batch, mu)
    best = int(values.argmax())
    return values[best].item(), tuple(table[best] for table in batch)


def _log_data(mdp: RegularizedMDP, mu: Data) -> PerLayerStateAction:
    """``log d^μ`` of one problem and one behaviour."""
    occupied: LogOccupancy = behaviour_occupancy(mdp, data_behaviour(mdp, mu))
    if mdp.batch_shape or any(table.dim() > 2 for table in occupied.state_action):
        raise InvalidInputError("mdp", "expected one problem and one behaviour, found a batch")
    return occupied.state_action


def _exp(logarithm: float) -> float:
    """``e^x``, ``inf`` beyond the largest double."""
    return torch.tensor(logarithm, dtype=torch.float64).exp().item()
