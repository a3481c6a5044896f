"""The problem: a layered finite-horizon MDP with a reference policy and a temperature (theory.md §0).

Layer ``h`` (``0 … H-1`` in code) has ``S_h`` states and ``A_h`` actions. An action whose reference probability is 0 does not
exist; every state has at least one that does. ``transitions[h]`` leads from layer ``h`` to ``h+1``; nothing follows the last
layer. Rewards are in reward units; everything else the package computes is in units of ``beta``, as in [Y].

All numbers are float64. Leading batch dimensions are allowed on every table and broadcast, so that ten thousand small problems
are one object.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.json_fields import Field, read_json
from tbrm_theory.mdp_format import FORMAT, VERSION, read_problem, transition_document
from tbrm_theory.shapes import PerLayerMask, PerLayerStateAction, Scalars, StateTable
from tbrm_theory.tables import check_finite, normalised, per_distinct_layer, safe_log
from tbrm_theory.transitions import (
    DenseTransition,
    DeterministicTransition,
    SparseTransition,
    Transition,
)

__all__ = ["RegularizedMDP"]


@dataclass(frozen=True, eq=False)
class RegularizedMDP:
    """A layered MDP with its reference policy and temperature.

    Args:
        beta: KL temperature of ``J_β`` in reward units, shape ``(…)``; positive.
        initial: law ``ρ`` of the first state, ``(…, S_0)``.
        reward: one table ``(…, S_h, A_h)`` for each layer; cells of non-existent actions are ignored.
        reference: one table of probabilities for each layer, like ``reward``.
        transitions: one kernel between each two layers.
        action_counts: how many actions each state lists, one tuple for each layer, when fewer than ``A_h``; cells beyond are
            padding. Only the file format needs it.

    Raises:
        InvalidInputError: anything malformed, with the path of the field (``layers[1].reference[0]``).
    """

    beta: Scalars
    initial: StateTable
    reward: PerLayerStateAction
    reference: PerLayerStateAction
    transitions: tuple[Transition, ...]
    action_counts: tuple[tuple[int, ...], ...] | None = None

    def __init__(
        self,
        *,
        beta: float | Tensor,
        initial: Tensor,
        reward: Sequence[Tensor],
        reference: Sequence[Tensor],
        transitions: Sequence[Transition],
        action_counts: Sequence[Sequence[int]] | None = None,
    ) -> None:
        def double(table: Tensor) -> Tensor:
            return table.to(torch.float64)

        initial = double(initial)
        reward = per_distinct_layer(double, tuple(reward))
        reference = per_distinct_layer(double, tuple(reference))
        temperature = torch.as_tensor(beta, dtype=torch.float64, device=initial.device)
        _check_temperature(temperature)
        _check_sizes(initial, reward, reference, tuple(transitions))
        set_field = object.__setattr__  # the fields are frozen for everyone but the constructor
        set_field(self, "beta", temperature)
        set_field(self, "initial", normalised(initial, "initial"))
        set_field(self, "reference", _checked_reference(reference))
        set_field(self, "reward", _checked_reward(reward, self.reference))
        set_field(self, "transitions", _checked_transitions(tuple(transitions), self.reference))
        set_field(self, "action_counts", action_counts and tuple(tuple(row) for row in action_counts))

    # -- derived tables ----------------------------------------------------------------------------------------------------

    @property
    def horizon(self) -> int:
        return len(self.reward)

    @property
    def batch_shape(self) -> torch.Size:
        """The broadcast leading dimensions of all tables."""
        distinct = {id(t): t.shape[:-2] for t in (*self.reward, *self.reference)}
        kernels = {id(k): next(iter(k.edges())).shape[:-3] for k in self.transitions}
        return torch.broadcast_shapes(self.beta.shape, self.initial.shape[:-1], *distinct.values(), *kernels.values())

    @property
    def is_deterministic(self) -> bool:
        """Whether every transition is declared deterministic (a table of successors)."""
        return all(isinstance(kernel, DeterministicTransition) for kernel in self.transitions)

    @cached_property
    def valid(self) -> PerLayerMask:
        """Which actions exist, ``(…, S_h, A_h)``."""
        return per_distinct_layer(lambda reference: reference > 0, self.reference)

    @cached_property
    def log_reference(self) -> PerLayerStateAction:
        """``log π_ref``, ``-inf`` where the action does not exist."""
        return per_distinct_layer(safe_log, self.reference)

    @cached_property
    def regularized_reward(self) -> PerLayerStateAction:
        """``R_β(s,a) = r(s,a)/β + log π_ref(a|s)``, ``-inf`` where the action does not exist."""
        beta = self.beta[..., None, None]
        return per_distinct_layer(lambda reward, log: reward / beta + log, self.reward, self.log_reference)

    def to(self, device: torch.device | str) -> RegularizedMDP:
        """The same problem on another device; layers that share a table go on sharing it."""
        moved: dict[int, Any] = {}

        def move(part: Any) -> Any:
            if id(part) not in moved:
                moved[id(part)] = part.to(device)
            return moved[id(part)]

        return RegularizedMDP(
            beta=move(self.beta),
            initial=move(self.initial),
            reward=[move(table) for table in self.reward],
            reference=[move(table) for table in self.reference],
            transitions=[move(kernel) for kernel in self.transitions],
            action_counts=self.action_counts,
        )

    # -- file format (design.md) ---------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path) -> RegularizedMDP:
        """Read the problem of an instance file; its policies, mixtures and logits are read by ``Instance.load``."""
        return cls.from_field(read_json(path))

    @classmethod
    def from_field(cls, document: Field) -> RegularizedMDP:
        """Read the problem of a parsed instance file.

        Raises:
            InvalidInputError: names the path of the first malformed field and what was expected there.
        """
        return cls(**read_problem(document))

    def to_document(self) -> dict[str, Any]:
        """The instance file of this problem as JSON data; loading it gives bit-identical tables.

        Raises:
            InvalidInputError: the problem has batch dimensions, which the format does not know.
        """
        if self.batch_shape:
            raise InvalidInputError("mdp", f"expected one problem, found a batch of shape {tuple(self.batch_shape)}")
        layers: list[dict[str, Any]] = [
            {
                "reward": self.rows(h, self.reward[h]),
                "reference": self.rows(h, self.reference[h]),
                "transition": None,
            }
            for h in range(self.horizon)
        ]
        for h, kernel in enumerate(self.transitions):
            layers[h]["transition"] = transition_document(kernel, partial(self.rows, h))
        return {
            "format": FORMAT,
            "version": VERSION,
            "beta": self.beta.item(),
            "initial": self.initial.tolist(),
            "layers": layers,
        }

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(self.to_document(), allow_nan=False) + "\n", encoding="utf-8")

    def rows(self, layer: int, table: Tensor) -> list[list[Any]]:
        """A table of one layer as nested lists in the file's own shape, without padding."""
        lists = table.tolist()
        if self.action_counts is None:
            return lists
        return [row[:count] for row, count in zip(lists, self.action_counts[layer], strict=True)]


# -- checks ----------------------------------------------------------------------------------------------------------------


def _check_temperature(beta: Tensor) -> None:
    check_finite(beta, "beta")
    if bool((beta <= 0).any()):
        raise InvalidInputError("beta", f"expected a positive temperature, found {beta.min().item()}")


def _check_sizes(
    initial: Tensor,
    reward: tuple[Tensor, ...],
    reference: tuple[Tensor, ...],
    transitions: tuple[Transition, ...],
) -> None:
    if not reward:
        raise InvalidInputError("layers", "expected at least one layer")
    if len(reference) != len(reward):
        raise InvalidInputError("layers", f"{len(reward)} reward tables but {len(reference)} reference tables")
    if len(transitions) != len(reward) - 1:
        raise InvalidInputError(
            "layers",
            f"expected {len(reward) - 1} transitions between {len(reward)} layers, found {len(transitions)}",
        )
    if initial.dim() < 1:
        raise InvalidInputError("initial", "expected one probability for each state of the first layer")
    states = initial.shape[-1]
    for h, (rewards, references) in enumerate(zip(reward, reference, strict=True)):
        for name, table in (("reward", rewards), ("reference", references)):
            if table.dim() < 2 or 0 in table.shape[-2:]:
                raise InvalidInputError(f"layers[{h}].{name}", f"expected shape (…, S, A), found {tuple(table.shape)}")
        if rewards.shape[-2:] != references.shape[-2:]:
            raise InvalidInputError(
                f"layers[{h}].reward",
                f"expected the shape of reference, {tuple(references.shape[-2:])}, found {tuple(rewards.shape[-2:])}",
            )
        if references.shape[-2] != states:
            where = "initial" if h == 0 else f"layers[{h}].reference"
            raise InvalidInputError(
                where,
                f"expected {references.shape[-2] if h == 0 else states} states, "
                f"found {states if h == 0 else references.shape[-2]}",
            )
        if h < len(transitions):
            *pairs, states = transitions[h].shape
            if tuple(pairs) != tuple(references.shape[-2:]):
                raise InvalidInputError(
                    f"layers[{h}].transition",
                    f"expected {tuple(references.shape[-2:])} pairs, found {tuple(pairs)}",
                )


def _checked_reference(reference: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    where = {id(table): f"layers[{h}].reference" for h, table in reversed(list(enumerate(reference)))}
    return per_distinct_layer(lambda table: normalised(table, where[id(table)]), reference)


def _checked_reward(reward: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    where = {id(table): f"layers[{h}].reward" for h, table in reversed(list(enumerate(reward)))}

    def check(rewards: Tensor, references: Tensor) -> Tensor:
        rewards_of_existing = torch.where(references > 0, rewards, 0.0)
        check_finite(rewards_of_existing, where[id(rewards)])
        return rewards_of_existing

    return per_distinct_layer(check, reward, reference)


def _checked_transitions(kernels: tuple[Transition, ...], reference: tuple[Tensor, ...]) -> tuple[Transition, ...]:
    done: dict[tuple[int, int], Transition] = {}
    for h, kernel in enumerate(kernels):
        if (id(kernel), id(reference[h])) not in done:
            done[id(kernel), id(reference[h])] = _checked_transition(
                kernel, reference[h] == 0, f"layers[{h}].transition"
            )
    return tuple(done[id(kernel), id(reference[h])] for h, kernel in enumerate(kernels))


def _checked_transition(kernel: Transition, absent: Tensor, where: str) -> Transition:
    if not isinstance(kernel, DenseTransition):
        outside = (kernel.next_state < 0) | (kernel.next_state >= kernel.next_states)
        if bool(outside.any()):
            index = "".join(f"[{i}]" for i in outside.nonzero()[0].tolist())
            raise InvalidInputError(
                f"{where}.next_state{index}",
                f"expected a state from 0 to {kernel.next_states - 1}, found {kernel.next_state[outside][0].item()}",
            )
    match kernel:
        case DeterministicTransition():
            return kernel
        case SparseTransition(next_state, probability, next_states):
            rows = normalised(probability.to(torch.float64), f"{where}.probability", absent)
            return SparseTransition(next_state, rows, next_states)
        case DenseTransition(probability):
            return DenseTransition(normalised(probability.to(torch.float64), f"{where}.probabilities", absent))
