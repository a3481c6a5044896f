"""How long functions take, beside each other in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def seconds(*functions: Callable[[], object], repeats: int = 7) -> list[float]:
    """The median time of each function, all called in turn so that a slow moment of the machine meets them alike."""
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, taken in zip(functions, times, strict=True):
            start = _now()
            function()
            taken.append(_now() - start)
    return [statistics.median(taken) for taken in times]


def _now() -> float:
    """Once the kernels that were launched are done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
