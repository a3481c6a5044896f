"""Checks on tables of numbers, shared by everything that accepts a probability from outside.

A row that sums to 1 within :data:`ROW_SUM_TOLERANCE` is accepted and divided by its sum; a sum that is 1 up
to its own rounding is left bit-identical, so that saving and loading changes nothing. Anything further off is
refused with its layer and index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tbrm_theory.errors import InvalidInputError

__all__ = [
    "LARGEST",
    "ROW_SUM_TOLERANCE",
    "check_finite",
    "check_layers",
    "check_shapes",
    "first_index",
    "normalised",
    "per_distinct_layer",
    "safe_log",
    "side_by_side",
]

ROW_SUM_TOLERANCE = 1e-9
LARGEST = 1e100
"""No input is larger in magnitude: sums of squares over any horizon stay finite, ``∞ - ∞`` never arises."""
_Derived = TypeVar("_Derived")
_EXACT_SUM = 8 * torch.finfo(torch.float64).eps  # a sum this close to 1 differs from it by rounding alone


def first_index(bad: Bool[Tensor, "..."]) -> str:
    """The index of the first offending cell, written ``[0][2]``."""
    index = bad.nonzero()[0].tolist() if bad.dim() else []
    return "".join(f"[{i}]" for i in index)


def check_finite(table: Float[Tensor, "..."], where: str) -> None:
    """Refuse NaN, infinities and anything beyond :data:`LARGEST`."""
    bad = ~(table.abs() <= LARGEST)
    if bool(bad.any()):
        raise InvalidInputError(
            where + first_index(bad),
            f"expected a finite number of at most {LARGEST:g} in magnitude, found {table[bad][0].item()}",
        )


def check_shapes(tables: Sequence[Tensor], like: Sequence[Tensor], where: str) -> None:
    """Refuse anything but one table for each layer, of the states and actions that ``like`` has there.

    A table of one state or one action would otherwise be broadcast over the others.

    Raises:
        InvalidInputError: names the layer.
    """
    if len(tables) != len(like):
        raise InvalidInputError(where, f"expected {len(like)} layers, found {len(tables)}")
    for h, (table, pattern) in enumerate(zip(tables, like, strict=True)):
        expected, found = tuple(pattern.shape[-2:]), tuple(table.shape[-2:])
        if found != expected:
            raise InvalidInputError(f"{where}[{h}]", f"expected (states, actions) = {expected}, found {found}")


def check_layers(tables: Sequence[Tensor], like: Sequence[Tensor], where: str) -> None:
    """:func:`check_shapes`, and no NaN.

    Raises:
        InvalidInputError: names the layer, and the cell.
    """
    check_shapes(tables, like, where)
    searched: set[int] = set()
    for h, table in enumerate(tables):
        if id(table) not in searched:
            searched.add(id(table))
            missing = table.isnan()
            if bool(missing.any()):
                raise InvalidInputError(f"{where}[{h}]{first_index(missing)}", "expected a number, found nan")


def normalised(
    probability: Float[Tensor, "... outcomes"], where: str, absent: Bool[Tensor, "..."] | None = None
) -> Float[Tensor, "... outcomes"]:
    """Rows over the last dimension, checked to be distributions and divided by their sum.

    Args:
        where: name of the table for the error message.
        absent: rows of actions that do not exist; these may also be all zero.

    Raises:
        InvalidInputError: an entry is not finite or negative, or a row's sum is further than 1e-9 from 1.
    """
    check_finite(probability, where)
    negative = probability < 0
    if bool(negative.any()):
        raise InvalidInputError(
            where + first_index(negative), f"expected a probability, found {probability[negative][0].item()}"
        )
    total = probability.sum(-1)
    wrong = (total - 1).abs() > ROW_SUM_TOLERANCE
    if absent is not None:
        wrong = wrong & ~(absent & (total == 0))
    if bool(wrong.any()):
        raise InvalidInputError(
            where + first_index(wrong),
            f"expected probabilities that sum to 1, found the sum {total[wrong][0].item()!r}",
        )
    exact = ((total - 1).abs() <= _EXACT_SUM) | (total == 0)
    return probability / torch.where(exact, torch.ones_like(total), total).unsqueeze(-1)


def safe_log(probability: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``log p`` with ``log 0 = -inf``, and gradient 0 there instead of NaN."""
    positive = probability > 0
    return torch.where(positive, torch.where(positive, probability, 1.0).log(), -torch.inf)


def per_distinct_layer(function: Callable[..., _Derived], *columns: Sequence[Any]) -> tuple[_Derived, ...]:
    """``function`` on each layer's tables or kernels, once for layers that share the very same ones.

    A process unrolled over 10⁴ steps has one table in memory, not 10⁴; what is derived from it keeps that.
    """
    done: dict[tuple[int, ...], _Derived] = {}
    result = []
    for layer in zip(*columns, strict=True):
        key = tuple(id(part) for part in layer)
        if key not in done:
            done[key] = function(*layer)
        result.append(done[key])
    return tuple(result)


def side_by_side(rows: Sequence[Float[Tensor, "... _"]]) -> Float[Tensor, "... cells"]:
    """All layers in one vector along the last dimension, batch dimensions broadcast."""
    batch = torch.broadcast_shapes(*(row.shape[:-1] for row in rows))
    return torch.cat([row.expand(*batch, -1) for row in rows], dim=-1)
