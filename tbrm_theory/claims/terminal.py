"""What the commands about claims have in common on a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.console import Console

__all__ = ["console", "one_thread"]


def console(piped_width: int) -> Console:
    """Standard output, as wide as the terminal, or as ``COLUMNS`` says, or ``piped_width`` where neither does."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else piped_width, highlight=False)


@contextmanager
def one_thread() -> Iterator[None]:
    """The tables are small: more threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
