"""Bugs to plant: what turns the verdict of a claim shows that the claim can fail."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from tbrm_theory import claims
from tbrm_theory.claims import Verdict, select, verify
from tbrm_theory.transitions import DenseTransition, DeterministicTransition, SparseTransition

Plant = Callable[[pytest.MonkeyPatch], None]


def kernels(method: str, bug: Callable[[Any], Any]) -> Plant:
    """The same bug in ``expect``, ``push`` or ``variance`` of every kind of kernel."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        for kernel in (DeterministicTransition, SparseTransition, DenseTransition):
            monkeypatch.setattr(kernel, method, bug(getattr(kernel, method)))

    return plant


def function(module: Any, name: str, bug: Callable[[Any], Any]) -> Plant:
    return lambda monkeypatch: monkeypatch.setattr(module, name, bug(getattr(module, name)))


def scaled(by: float) -> Callable[[Any], Any]:
    """A result that is off by one part in a billion, or by half."""
    return lambda original: lambda *arguments, **options: original(*arguments, **options) * by


def scaled_tables(by: float) -> Callable[[Any], Any]:
    """The same of every table of a result."""
    return lambda original: lambda *arguments: tuple(table * by for table in original(*arguments))


def later_layers(original: Any) -> Any:
    """Leaves the last layer's terms out."""

    def without_last(*arguments: Any) -> Any:
        *earlier, last = original(*arguments)
        return (*earlier, torch.zeros_like(last))

    return without_last


def check_that_the_verdict_turns(
    claim_id: str, plant: Plant, monkeypatch: pytest.MonkeyPatch, families: Sequence[str] | None, instances: int = 3
) -> None:
    """The claim holds; with the bug it is violated, and the seed that is printed shows it again.

    Problems are made anew for it: those of other tests are without the bug, and its own have it.
    """
    [claim] = select([claim_id])
    assert verify([claim], families, instances)[claim_id].verdict is Verdict.HOLDS
    try:
        plant(monkeypatch)
        _forget_problems()
        outcome = verify([claim], families, instances)[claim_id]
        assert outcome.verdict is Verdict.VIOLATED
        assert outcome.worst is not None
        assert outcome.worst.error > outcome.worst.bound
        where = None if claim.problem is not None else [outcome.worst.family]
        again = verify([claim], where, instances=1, seed=outcome.worst.seed)[claim_id]
        assert again.worst is not None
        assert again.worst.error == outcome.worst.error
    finally:
        _forget_problems()


def _forget_problems() -> None:
    """Empty every cache of the claims' modules."""
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{claims.__name__}."):
            for value in vars(module).values():
                if hasattr(value, "cache_clear"):
                    value.cache_clear()
