"""A function run as a program: its exit status, and one line on standard error for whatever the user can put right.

Status: what the function returns; 2: bad input, a file that cannot be read or written, a full disk, too little memory; 130: Ctrl-C;
1: whoever read the output has gone. Anything else is a bug, and shows as a traceback.

After a Ctrl-C the status is 130 whatever becomes of it on its way up: another error of the code that it interrupted, or a pipe whose
reader it ended, too. It cannot get lost where Python drops errors (in ``__del__`` and the like), and a second one ends the program at
once. Packages that are being loaded may not survive one: until then, a script ends at the first (see the experiments).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from tbrm_theory.errors import InvalidInputError

__all__ = ["run_program"]


def run_program(name: str, function: Callable[[], int]) -> int:
    """Call ``function`` and return the exit status of the program ``name``, which stands before every error."""
    for stream in ("stdout", "stderr"):
        _prepare(stream)
    interruption = _Interruption()
    try:
        with interruption:
            status = _status(name, function)
    except BaseException:
        if not interruption.came:
            raise
    if interruption.came:
        try:
            sys.stdout.flush()
        except OSError:  # its reader has got the same Ctrl-C
            _discard_stdout()
        return 130
    return status


def _status(name: str, function: Callable[[], int]) -> int:
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


class _Interruption:
    """Ctrl-C from ``__enter__`` on: a ``KeyboardInterrupt`` that is remembered; after one, the next ends the program at once."""

    def __init__(self) -> None:
        self.came = False
        self._before: Any = None
        self._hook_before = sys.unraisablehook
        self._heeded = threading.current_thread() is threading.main_thread()  # no other may set a handler

    def __enter__(self) -> None:
        if self._heeded:
            self._before = signal.getsignal(signal.SIGINT) or signal.SIG_DFL
            sys.unraisablehook = self._dropped
            signal.signal(signal.SIGINT, self._arrives)

    def __exit__(self, *_: object) -> None:
        if self._heeded and not self.came:
            signal.signal(signal.SIGINT, self._before)
            sys.unraisablehook = self._hook_before

    def _arrives(self, *_: object) -> None:
        if self.came:
            self._end()
        self.came = True
        raise KeyboardInterrupt

    def _dropped(self, error: sys.UnraisableHookArgs) -> None:
        if self.came and issubclass(error.exc_type, KeyboardInterrupt):
            self._end()
        self._hook_before(error)

    def _end(self) -> NoReturn:
        for child in multiprocessing.active_children():
            child.kill()
        if sys.stdout.isatty():
            os.write(sys.stdout.fileno(), b"\x1b[?25h")  # the cursor, which a progress bar hides
        os._exit(130)


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
