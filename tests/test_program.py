"""Functions run as programs: the exit status, and one line for what the user can put right, full disks and closed streams included."""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


# A table as the commands print them, without all that the package gathers.
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
    return 0

sys.exit(run_program("tbrm", main))
"""


def shell(redirection: str, program: tuple[str, ...] = ("-c", PRINTS), *, encoding: str = "utf-8") -> Any:
    """A program with its streams redirected by a shell, without a home folder."""
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "COLUMNS")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    command = f"{shlex.join([sys.executable, *program])} {redirection}"
    return subprocess.run(
        ["sh", "-c", command], cwd=ROOT, env=environment, capture_output=True, timeout=120, check=False
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_costs_one_line() -> None:
    for program in (("-c", PRINTS), ("-m", "tbrm_theory", "families")):
        done = shell("> /dev/full", program)
        assert (done.returncode, done.stderr) == (2, b"tbrm: error: standard output: No space left on device\n")
    done = shell("> /dev/full 2>&1")
    assert (done.returncode, done.stderr) == (2, b"")


def test_closed_streams_and_poor_encodings_are_no_error() -> None:
    assert shell("").stdout.decode().count("\n") > 3000
    assert (shell(">&-").returncode, shell("2>&-").returncode) == (0, 0)
    for program in (("-c", PRINTS), ("-m", "tbrm_theory", "families")):
        done = shell("| head -1", program)
        assert (done.returncode, done.stderr) == (0, b"")
    done = shell("", encoding="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
