"""Rows, the batches made of them, and a first-in-first-out buffer of past ones.

A row is one prompt with one completion: a dictionary of tensors on the CPU, without padding, whose names say the shape.
``prompt_ids`` has the prompt's length, a tensor with no dimension belongs to the row as a whole (its reward), and every other
one has the completion's length. Token ids are kept as they were sampled; text is never tokenised again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tbrm_theory.errors import InvalidInputError

__all__ = ["Replay", "Row", "batch_of", "rows_of"]

Row: TypeAlias = dict[str, Tensor]

_MASKS = ("prompt_mask", "completion_mask")


def rows_of(batch: dict[str, Tensor]) -> list[Row]:
    """The rows of a padded batch: prompts padded on the left, completions on the right, masks gone."""
    prompt, completion = batch["prompt_mask"].bool().cpu(), batch["completion_mask"].bool().cpu()
    rows: list[Row] = [{} for _ in prompt]
    for name, table in batch.items():
        if name not in _MASKS:
            kept = None if table.dim() == 1 else prompt if name.startswith("prompt_") else completion
            for i, (row, values) in enumerate(zip(rows, table.detach().cpu(), strict=True)):
                row[name] = (values if kept is None else values[kept[i]]).clone()
    return rows


def batch_of(rows: Sequence[Row], *, pad_token_id: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The padded batch of ``rows``, which all have the same names.

    Raises:
        InvalidInputError: no rows, or rows of different kinds.
    """
    if not rows or any(row.keys() != rows[0].keys() for row in rows):
        raise InvalidInputError("rows", "expected at least one row, and the same tensors in each")
    batch = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if values[0].dim() == 0:
            batch[name] = torch.stack(values)
        else:
            side = "left" if name.startswith("prompt_") else "right"
            fill = pad_token_id if name in ("prompt_ids", "completion_ids") else 0
            batch[name] = pad_sequence(values, batch_first=True, padding_value=fill, padding_side=side)
    for part, side in (("prompt", "left"), ("completion", "right")):
        ones = [torch.ones_like(row[f"{part}_ids"]) for row in rows]
        batch[f"{part}_mask"] = pad_sequence(ones, batch_first=True, padding_side=side)
    return {name: table.to(device) for name, table in batch.items()}


class Replay:
    """The last ``capacity`` rows, added and drawn in whole groups (the rollouts of one prompt); the oldest leave first.

    Draws are without replacement within one call, from a generator of its own.
    """

    def __init__(self, capacity: int, *, seed: int) -> None:
        if capacity < 1:
            raise InvalidInputError("capacity", f"expected a positive number of rows, found {capacity}")
        self.capacity = capacity
        self.groups: list[list[Row]] = []
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    def add(self, groups: Sequence[list[Row]]) -> None:
        self.groups += groups
        while len(self) > self.capacity:
            del self.groups[0]

    def draw(self, number: int) -> list[list[Row]]:
        """``number`` different groups.

        Raises:
            InvalidInputError: more than there are.
        """
        if number > len(self.groups):
            raise InvalidInputError("number", f"expected at most {len(self.groups)} groups, found {number}")
        picks = torch.randperm(len(self.groups), generator=self.generator)[:number]
        return [self.groups[i] for i in picks.tolist()]
