"""The problem: a layered finite-horizon MDP with a reference policy and a temperature (theory.md §0).

Layer ``h`` (``0 … H-1`` in code) has ``S_h`` states and ``A_h`` actions. An action whose reference
probability is 0 does not exist; every state has at least one that does. ``transitions[h]`` leads from layer
``h`` to ``h+1``; nothing follows the last layer. Rewards are in reward units; everything else the package
computes is in units of ``beta``, as in [Y].

All numbers are float64. Leading batch dimensions are allowed on every table and broadcast, so that ten
thousand small problems are one object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.json_fields import Field, read_json, write_json
from tbrm_theory.mdp_checks import (
    batch_shapes,
    check_batch,
    check_sizes,
    check_temperature,
    checked_counts,
    checked_reference,
    checked_reward,
    checked_transitions,
)
from tbrm_theory.mdp_format import FORMAT, VERSION, read_problem, transition_document
from tbrm_theory.shapes import PerLayerMask, PerLayerStateAction, Scalars, StateTable
from tbrm_theory.tables import normalised, per_distinct_layer, safe_log
from tbrm_theory.transitions import DeterministicTransition, Transition

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
        action_counts: how many actions each state lists, one tuple for each layer, when fewer than ``A_h``;
            cells beyond are padding. Only the file format needs it.

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
        transitions = tuple(transitions)
        check_temperature(temperature)
        check_sizes(initial, reward, reference, transitions)
        check_batch(temperature, initial, reward, reference, transitions)
        set_field = object.__setattr__  # the fields are frozen for everyone but the constructor
        set_field(self, "beta", temperature)
        set_field(self, "initial", normalised(initial, "initial"))
        set_field(self, "reference", checked_reference(reference))
        set_field(self, "reward", checked_reward(reward, self.reference, temperature))
        set_field(self, "transitions", checked_transitions(transitions, self.reference))
        set_field(self, "action_counts", checked_counts(action_counts, self.reference))

    # -- derived tables ------------------------------------------------------------------------------------

    @property
    def horizon(self) -> int:
        return len(self.reward)

    @property
    def batch_shape(self) -> torch.Size:
        """The broadcast leading dimensions of all tables."""
        shapes = batch_shapes(self.beta, self.initial, self.reward, self.reference, self.transitions)
        return torch.Size(torch.broadcast_shapes(*shapes))

    @cached_property
    def valid(self) -> PerLayerMask:
        """Which actions exist, ``(…, S_h, A_h)``."""
        return per_distinct_layer(lambda reference: reference > 0, self.reference)

    @cached_property
    def is_deterministic(self) -> bool:
        """Whether every existing action leads to one state for certain, whatever kind of kernel says so."""

        def certain(valid: Tensor, kernel: Transition) -> bool:
            if isinstance(kernel, DeterministicTransition):
                return True
            return bool(torch.where(valid, kernel.edges()[1].amax(-1) == 1, True).all())

        return all(per_distinct_layer(certain, self.valid[:-1], self.transitions))

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

    # -- file format (design.md) -------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path) -> RegularizedMDP:
        """Read the problem of an instance file; ``Instance.load`` reads policies, mixtures and logits too."""
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
        """Write the instance file of this problem, atomically."""
        write_json(path, self.to_document())

    def rows(self, layer: int, table: Tensor) -> list[list[Any]]:
        """A table of one layer as nested lists in the file's own shape, without padding."""
        lists = table.tolist()
        if self.action_counts is None:
            return lists
        return [row[:count] for row, count in zip(lists, self.action_counts[layer], strict=True)]
