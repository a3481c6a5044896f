"""The problem part of the instance file (design.md): JSON to the arguments of ``RegularizedMDP``, and back.

Rows may list different numbers of actions; tables are padded to the widest with reference probability 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.json_fields import Field
from tbrm_theory.tables import ROW_SUM_TOLERANCE
from tbrm_theory.transitions import DenseTransition, DeterministicTransition, SparseTransition, Transition

__all__ = ["FORMAT", "VERSION", "ragged_table", "read_problem", "transition_document"]

FORMAT, VERSION = "tbrm-instance", 1


def read_problem(document: Field) -> dict[str, Any]:
    """The keyword arguments of ``RegularizedMDP`` from a parsed instance file.

    Raises:
        InvalidInputError: names the path of the first malformed field and what was expected there.
    """
    if document["format"].text() != FORMAT:
        document["format"].refuse(f'"{FORMAT}"')
    if document["version"].value != VERSION or isinstance(document["version"].value, bool):
        document["version"].refuse(f"version {VERSION}")
    document.only("format", "version", "beta", "initial", "layers", "policies", "mixtures", "logits")
    layers = document["layers"].items(of="layers")
    for layer in layers:
        layer.only("reward", "reference", "transition")
    counts = [[len(row.items(of="actions")) for row in layer["reference"].items(of="states")] for layer in layers]
    reference = [ragged_table(layer["reference"], rows) for layer, rows in zip(layers, counts, strict=True)]
    reward = [
        ragged_table(layer["reward"], rows, optional=table == 0)
        for layer, rows, table in zip(layers, counts, reference, strict=True)
    ]
    initial = [entry.probability() for entry in document["initial"].items(len(counts[0]), "states")]
    transitions = [
        _read_transition(layer["transition"], here == 0, rows, len(next_rows))
        for layer, here, rows, next_rows in zip(layers, reference, counts, counts[1:], strict=False)
    ]
    if not layers[-1]["transition"].is_null:
        layers[-1]["transition"].refuse("null, since nothing follows the last layer")
    return {
        "beta": document["beta"].number(),
        "initial": torch.tensor(initial, dtype=torch.float64),
        "reward": reward,
        "reference": reference,
        "transitions": transitions,
        "action_counts": counts,
    }


def transition_document(kernel: Transition, rows: Callable[[Tensor], list[list[Any]]]) -> dict[str, Any]:
    """A kernel as JSON data; ``rows`` writes a table in the file's own shape."""
    match kernel:
        case DeterministicTransition():
            return {"kind": "deterministic", "next_state": rows(kernel.next_state)}
        case DenseTransition():
            return {"kind": "dense", "probabilities": rows(kernel.probability)}
        case SparseTransition():
            present = kernel.probability > 0
            state, action, _ = present.nonzero(as_tuple=True)
            return {
                "kind": "sparse",
                "state": state.tolist(),
                "action": action.tolist(),
                "next_state": kernel.next_state[present].tolist(),
                "probability": kernel.probability[present].tolist(),
            }


def ragged_table(field: Field, counts: Sequence[int], optional: Tensor | None = None) -> Tensor:
    """Rows of the given lengths, padded with 0 to the longest; ``null`` is read as 0 where ``optional``."""
    table = torch.zeros(len(counts), max(counts), dtype=torch.float64)
    for s, (row, count) in enumerate(zip(field.items(len(counts), "states"), counts, strict=True)):
        cells = row.items(count, "actions")
        skip = [cell.is_null and optional is not None and bool(optional[s, a]) for a, cell in enumerate(cells)]
        table[s, :count] = torch.tensor(
            [0.0 if skipped else cell.number() for cell, skipped in zip(cells, skip, strict=True)],
            dtype=torch.float64,
        )
    return table


def _read_transition(field: Field, absent: Tensor, counts: Sequence[int], next_states: int) -> Transition:
    if field.is_null:
        field.refuse("a transition to the next layer")
    kind = field["kind"].text()
    if kind == "deterministic":
        field.only("kind", "next_state")
        return _read_deterministic(field["next_state"], absent, counts, next_states)
    if kind == "dense":
        field.only("kind", "probabilities")
        return _read_dense(field["probabilities"], absent, counts, next_states)
    if kind == "sparse":
        field.only("kind", "state", "action", "next_state", "probability")
        return _read_sparse(field, absent, counts, next_states)
    field["kind"].refuse('"deterministic", "dense" or "sparse"')


def _read_deterministic(field: Field, absent: Tensor, counts: Sequence[int], next_states: int) -> Transition:
    table = torch.zeros(absent.shape, dtype=torch.int64)
    for s, (row, count) in enumerate(zip(field.items(len(counts), "states"), counts, strict=True)):
        for a, cell in enumerate(row.items(count, "actions")):
            if not (cell.is_null and absent[s, a]):
                table[s, a] = cell.index(next_states, "state of the next layer")
    return DeterministicTransition(table, next_states)


def _read_dense(field: Field, absent: Tensor, counts: Sequence[int], next_states: int) -> Transition:
    table = torch.zeros(*absent.shape, next_states, dtype=torch.float64)
    for s, (row, count) in enumerate(zip(field.items(len(counts), "states"), counts, strict=True)):
        for a, cell in enumerate(row.items(count, "actions")):
            if not (cell.is_null and absent[s, a]):
                entries = [entry.probability() for entry in cell.items(next_states, "states of the next layer")]
                table[s, a] = torch.tensor(entries, dtype=torch.float64)
    return DenseTransition(table)


def _read_sparse(field: Field, absent: Tensor, counts: Sequence[int], next_states: int) -> Transition:
    """Lists of equal length; several entries for one ``(s, a, s')`` are added up."""
    states = field["state"].items()
    columns = [field[name].items(len(states)) for name in ("action", "next_state", "probability")]
    successors: dict[tuple[int, int], dict[int, float]] = {}
    for state, action, next_state, probability in zip(states, *columns, strict=True):
        s = state.index(len(counts), "state")
        a = action.index(counts[s], f"action of state {s}")
        row = successors.setdefault((s, a), {})
        t = next_state.index(next_states, "state of the next layer")
        row[t] = row.get(t, 0.0) + probability.probability()
    for s, a in (~absent).nonzero().tolist():
        if (s, a) not in successors:
            raise InvalidInputError(field.path, f"expected an entry for action {a} of state {s}, which exists")
    for (s, a), row in successors.items():
        total = math.fsum(row.values())
        if abs(total - 1) > ROW_SUM_TOLERANCE and not (absent[s, a] and total == 0):
            expected = f"expected the entries of action {a} of state {s} to sum to 1"
            raise InvalidInputError(f"{field.path}.probability", f"{expected}, found the sum {total!r}")
    width = max(len(row) for row in successors.values())
    index = torch.zeros(*absent.shape, width, dtype=torch.int64)
    weight = torch.zeros(*absent.shape, width, dtype=torch.float64)
    for (s, a), row in successors.items():
        index[s, a, : len(row)] = torch.tensor(list(row), dtype=torch.int64)
        weight[s, a, : len(row)] = torch.tensor(list(row.values()), dtype=torch.float64)
    return SparseTransition(index, weight, next_states)
