"""A function run as a program: its exit status, and one line on standard error for whatever the user can put right.

Status: what the function returns; 2: bad input, a file that cannot be read or written, a full disk, too little memory; 130: Ctrl-C;
1: whoever read the output has gone. Anything else is a bug, and shows as a traceback.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

from tbrm_theory.errors import InvalidInputError

__all__ = ["run_program"]


def run_program(name: str, function: Callable[[], int]) -> int:
    """Call ``function`` and return the exit status of the program ``name``, which stands before every error."""
    for stream in ("stdout", "stderr"):
        _prepare(stream)
    try:
        status = function()
        sys.stdout.flush()  # here, where a closed pipe or a full disk is still handled
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _discard_stdout()
        return 1
    except InvalidInputError as error:
        return _refuse(name, str(error))
    except OSError as error:
        if error.filename is None:  # files are named where they are opened; what remains is what was printed
            _discard_stdout()
        return _refuse(name, f"{_file(error)}: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        return _refuse(name, "the problem does not fit in the memory of this machine")
    return status


def _refuse(name: str, text: str) -> int:
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    with contextlib.suppress(OSError):  # standard error is full, too; the status still says it
        print(f"{name}: error: {line}", file=sys.stderr, flush=True)
    return 2


def _file(error: OSError) -> str:
    return "standard output" if error.filename is None else os.fsdecode(error.filename)


def _prepare(name: str) -> None:
    """Where the stream was closed, print to nowhere; where its encoding lacks ``β``, print an escape rather than die."""
    stream: Any = getattr(sys, name)
    if stream is None:
        setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for as long as the program runs
    elif hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")


def _discard_stdout() -> None:
    """What is still buffered goes nowhere, so that the last flush of all succeeds."""
    with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
