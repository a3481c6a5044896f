"""Array types, in one place, so that signatures read like the mathematics.

Every table may carry leading batch dimensions (written ``...``), which broadcast: a batch of logits meets one MDP, one set of
logits meets a batch of MDPs. A per-layer quantity is a tuple of tables, one for each layer ``h = 0 … H-1`` in code (``1 … H``
in theory.md); layers may differ in size.
"""

from __future__ import annotations

from typing import TypeAlias

from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = [
    "NextStateTable",
    "PerLayerMask",
    "PerLayerState",
    "PerLayerStateAction",
    "Scalars",
    "StateActionMask",
    "StateActionTable",
    "StateTable",
    "SuccessorTable",
]

Scalars: TypeAlias = Float[Tensor, "..."]
"""One number for each batch element, shape ``(…)``."""

StateTable: TypeAlias = Float[Tensor, "... states"]
NextStateTable: TypeAlias = Float[Tensor, "... next_states"]
StateActionTable: TypeAlias = Float[Tensor, "... states actions"]
StateActionMask: TypeAlias = Bool[Tensor, "... states actions"]
SuccessorTable: TypeAlias = Int[Tensor, "... states actions"]

PerLayerState: TypeAlias = tuple[Float[Tensor, "... _"], ...]
PerLayerStateAction: TypeAlias = tuple[Float[Tensor, "... _ _"], ...]
PerLayerMask: TypeAlias = tuple[Bool[Tensor, "... _ _"], ...]
