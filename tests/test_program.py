"""Functions run as programs: the exit status, and one line for what the user can put right, full disks and closed streams included."""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.program import run_program

ROOT = Path(__file__).parent.parent


def raising(error: BaseException) -> Callable[[], int]:
    def function() -> int:
        raise error

    return function


def a_petabyte() -> int:
    return torch.empty(10**15, dtype=torch.uint8).dim()


@pytest.mark.parametrize(
    ("function", "status", "line"),
    [
        (lambda: 3, 3, None),
        (raising(KeyboardInterrupt()), 130, None),
        (raising(BrokenPipeError()), 1, None),
        (raising(InvalidInputError("case.json", "a\nb")), 2, "case.json: a\\nb"),
        (raising(OSError(errno.ENOSPC, "No space left on device", "x.json")), 2, "x.json: No space left on device"),
        (raising(OSError(errno.ENOSPC, "No space left")), 2, "standard output: No space left"),
        (raising(MemoryError()), 2, "the problem does not fit in the memory of this machine"),
        (a_petabyte, 2, "the problem does not fit in the memory of this machine"),
    ],
)
def test_status_and_line(
    function: Callable[[], int], status: int, line: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program("p", function) == status
    assert capsys.readouterr().err == ("" if line is None else f"p: error: {line}\n")


def test_a_bug_is_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"):
        run_program("p", raising(RuntimeError("shapes differ")))


# What the commands end with, without all that the package gathers: a table, and a text longer than a pipe holds.
PRINTS = f"""
import sys, types
package = types.ModuleType("tbrm_theory")
package.__path__ = [{str(ROOT / "tbrm_theory")!r}]
sys.modules["tbrm_theory"] = package
from rich.console import Console
from rich.table import Table
from tbrm_theory.program import run_program

def main():
    table = Table("π", title="κ")
    for i in range(3000):
        table.add_row(str(i))
    Console().print(table)
    print("x" * 200_000)
    return 0

sys.exit(run_program("tbrm", main))
"""
BOTH = pytest.mark.parametrize(
    "program", [("-c", PRINTS), ("-m", "tbrm_theory", "families")], ids=["alone", "families"]
)


def shell(program: Sequence[str], redirection: str, *, encoding: str = "utf-8") -> tuple[int, bytes]:
    """Status and error stream of a program whose streams a shell redirects, without a home folder."""
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "COLUMNS")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    command = ["bash", "-c", f"{shlex.join([sys.executable, *program])} {redirection}; exit ${{PIPESTATUS[0]}}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=120, check=False)
    return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@BOTH
def test_a_full_disk_costs_one_line(program: Sequence[str]) -> None:
    line = b"tbrm: error: standard output: No space left on device\n"
    assert shell(program, "> /dev/full") == (2, line)
    assert shell(program, "> /dev/full 2>&1") == (2, b"")


@pytest.mark.slow
@BOTH
def test_closed_streams_and_poor_encodings_are_no_error(program: Sequence[str]) -> None:
    assert shell(program, ">&-") == (0, b"")
    assert shell(program, "2>&-")[0] == 0
    assert shell(program, "> /dev/null", encoding="ascii") == (0, b"")


def test_a_reader_that_has_seen_enough_is_not_told_of_it() -> None:
    """More is written than fits into the pipe, so that some of it comes after the reader has gone."""
    assert shell(("-c", PRINTS), "| head -1") == (1, b"")
