"""Where the seconds of a training step go; the parts are exclusive, so that they sum to the step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["PARTS", "PartTimer"]

PARTS = ("rollout", "reference", "old_log_probs", "update", "critic", "other")
"""The parts of a step in the cost table of [Y] Fig. 2(b); what belongs to no other, as rewards, is ``other``."""


class PartTimer:
    """A stopwatch for nested parts: while an inner part runs, the outer one stands still."""

    def __init__(self) -> None:
        self._running: list[str] = []
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._mark = _now()

    def _charge(self) -> None:
        now = _now()
        self._seconds[self._running[-1] if self._running else "other"] += now - self._mark
        self._mark = now

    def start(self, part: str) -> None:
        self._charge()
        self._running.append(part)

    def stop(self) -> None:
        self._charge()
        self._running.pop()

    @contextmanager
    def part(self, part: str) -> Iterator[None]:
        self.start(part)
        try:
            yield
        finally:
            self.stop()

    def lap(self) -> dict[str, float]:
        """Seconds by part since the last lap."""
        self._charge()
        seconds = self._seconds
        self._seconds = dict.fromkeys(PARTS, 0.0)
        return seconds


def _now() -> float:
    """Kernels still running belong to the part that launched them."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
