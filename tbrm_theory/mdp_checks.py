"""What ``RegularizedMDP`` refuses, and the tables as it keeps them.

Every message names the field as in the instance file, ``layers[1].reference[0]``, and says what was expected
there. Layers that share a table are checked once and go on sharing it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.tables import LARGEST, check_finite, first_index, normalised, per_distinct_layer
from tbrm_theory.transitions import DenseTransition, DeterministicTransition, SparseTransition, Transition

__all__ = [
    "batch_shapes",
    "check_batch",
    "check_sizes",
    "check_temperature",
    "checked_counts",
    "checked_reference",
    "checked_reward",
    "checked_transitions",
]


def check_temperature(beta: Tensor) -> None:
    check_finite(beta, "beta")
    if bool((beta <= 0).any()):
        raise InvalidInputError("beta", f"expected a positive temperature, found {beta.min().item()}")


def check_sizes(
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
            _check_kernel(transitions[h], f"layers[{h}].transition")
            *pairs, states = transitions[h].shape
            if tuple(pairs) != tuple(references.shape[-2:]):
                raise InvalidInputError(
                    f"layers[{h}].transition",
                    f"expected {tuple(references.shape[-2:])} pairs, found {tuple(pairs)}",
                )


def _kernel_tables(kernel: Transition) -> dict[str, tuple[Tensor, int]]:
    """The tables of a kernel by name, and how many dimensions of each are not batch dimensions."""
    match kernel:
        case DeterministicTransition():
            return {"next_state": (kernel.next_state, 2)}
        case SparseTransition():
            return {"next_state": (kernel.next_state, 3), "probability": (kernel.probability, 3)}
        case DenseTransition():
            return {"probabilities": (kernel.probability, 3)}


def _check_kernel(kernel: Transition, where: str) -> None:
    tables = _kernel_tables(kernel)
    for name, (table, own) in tables.items():
        if table.dim() < own or 0 in table.shape[-own:]:
            raise InvalidInputError(
                f"{where}.{name}",
                f"expected {own} non-empty dimensions after the batch, found {tuple(table.shape)}",
            )
        if name == "next_state" and table.is_floating_point():
            raise InvalidInputError(f"{where}.{name}", f"expected integers, found {table.dtype}")
    if len({tuple(table.shape[-own:]) for table, own in tables.values()}) > 1:
        shapes = " and ".join(f"{tuple(table.shape[-own:])}" for table, own in tables.values())
        raise InvalidInputError(where, f"expected next_state and probability of one shape, found {shapes}")


def batch_shapes(
    beta: Tensor,
    initial: Tensor,
    reward: Sequence[Tensor],
    reference: Sequence[Tensor],
    transitions: Sequence[Transition],
) -> dict[torch.Size, str]:
    """Every distinct shape of batch dimensions, and the first field that has it."""
    found = {beta.shape: "beta"}
    found.setdefault(initial.shape[:-1], "initial")
    for h, tables in enumerate(zip(reward, reference, strict=True)):
        for name, table in zip(("reward", "reference"), tables, strict=True):
            found.setdefault(table.shape[:-2], f"layers[{h}].{name}")
    for h, kernel in enumerate(transitions):
        for name, (table, own) in _kernel_tables(kernel).items():
            found.setdefault(table.shape[:-own], f"layers[{h}].transition.{name}")
    return found


def check_batch(
    beta: Tensor,
    initial: Tensor,
    reward: tuple[Tensor, ...],
    reference: tuple[Tensor, ...],
    transitions: tuple[Transition, ...],
) -> None:
    common = torch.Size()
    for shape, where in batch_shapes(beta, initial, reward, reference, transitions).items():
        try:
            common = torch.broadcast_shapes(common, shape)
        except RuntimeError as error:
            expected = f"expected batch dimensions that broadcast with {tuple(common)}"
            raise InvalidInputError(where, f"{expected}, found {tuple(shape)}") from error


def checked_reference(reference: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    where = {id(table): f"layers[{h}].reference" for h, table in reversed(list(enumerate(reference)))}
    return per_distinct_layer(lambda table: normalised(table, where[id(table)]), reference)


def checked_reward(reward: tuple[Tensor, ...], reference: tuple[Tensor, ...], beta: Tensor) -> tuple[Tensor, ...]:
    where = {id(table): f"layers[{h}].reward" for h, table in reversed(list(enumerate(reward)))}

    def check(rewards: Tensor, references: Tensor) -> Tensor:
        rewards_of_existing = torch.where(references > 0, rewards, 0.0)
        check_finite(rewards_of_existing, where[id(rewards)])
        large = rewards_of_existing.abs() > LARGEST * beta.min()
        if bool(large.any()):
            raise InvalidInputError(
                where[id(rewards)] + first_index(large), f"expected |reward|/beta of at most {LARGEST:g}"
            )
        return rewards_of_existing

    return per_distinct_layer(check, reward, reference)


def checked_counts(
    counts: Sequence[Sequence[int]] | None, reference: tuple[Tensor, ...]
) -> tuple[tuple[int, ...], ...] | None:
    if counts is None:
        return None
    if len(counts) != len(reference):
        raise InvalidInputError("action_counts", f"expected {len(reference)} layers, found {len(counts)}")
    for h, (row, table) in enumerate(zip(counts, reference, strict=True)):
        states, actions = table.shape[-2:]
        if len(row) != states:
            raise InvalidInputError(f"action_counts[{h}]", f"expected {states} states, found {len(row)}")
        exists = (table > 0).reshape(-1, states, actions).any(0)
        needed = (exists * torch.arange(1, actions + 1, device=table.device)).amax(-1).tolist()
        for s, (count, least) in enumerate(zip(row, needed, strict=True)):
            if not least <= count <= actions:
                raise InvalidInputError(
                    f"action_counts[{h}][{s}]", f"expected a count from {least} to {actions}, found {count}"
                )
    return tuple(tuple(row) for row in counts)


def checked_transitions(kernels: tuple[Transition, ...], reference: tuple[Tensor, ...]) -> tuple[Transition, ...]:
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
            raise InvalidInputError(
                f"{where}.next_state{first_index(outside)}",
                f"expected a state from 0 to {kernel.next_states - 1}, found {kernel.next_state[outside][0].item()}",
            )
    match kernel:
        case DeterministicTransition(next_state, next_states):
            return DeterministicTransition(next_state.to(torch.int64), next_states)
        case SparseTransition(next_state, probability, next_states):
            rows = normalised(probability.to(torch.float64), f"{where}.probability", absent)
            return SparseTransition(next_state.to(torch.int64), rows, next_states)
        case DenseTransition(probability):
            return DenseTransition(normalised(probability.to(torch.float64), f"{where}.probabilities", absent))
