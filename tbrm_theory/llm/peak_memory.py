"""The most memory that a stretch of work held at once, with what is done beside it left out.

Of a GPU: what was allocated there. Of a CPU: what the process held, less what it held when counting began. Where the system keeps one
mark for the life of a process and cannot lower it (anything but Linux), what is done beside it counts too.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

__all__ = ["PeakMemory"]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_LOWER_THE_MARK = "5"  # proc(5)


class PeakMemory:
    """Counts from when it is made."""

    def __init__(self) -> None:
        _restart()
        self._before = _process_bytes()
        self._device = self._process = 0

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """What is done in this context does not count."""
        self._note()
        try:
            yield
        finally:
            _restart()

    def bytes(self) -> int:
        """The peak so far."""
        self._note()
        return self._device or max(self._process - self._before, 0)

    def _note(self) -> None:
        self._process = max(self._process, _process_bytes())
        if torch.cuda.is_available():
            self._device = max(self._device, torch.cuda.max_memory_allocated())


def _restart() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        _CLEAR.write_text(_LOWER_THE_MARK)


def _process_bytes() -> int:
    """The mark."""
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
