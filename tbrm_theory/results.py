"""Run folders: ``results/<experiment>/<run>/`` with what was asked, where it ran, what came out.

* ``config.json``: the settings; ``provenance.json``: versions, commit, machine;
* ``metrics.jsonl``: append-only, one JSON object a line, on disk before ``record`` returns; put in order when all are there;
* ``summary.json``: written at the end, so its presence says that the run is complete;
* ``results/<experiment>/latest``: a link to the run that was started or taken up last.

A run that was interrupted or killed is found again by its settings and goes on, if the versions, commit and machine of its provenance
are still the same: rows already recorded are kept, half a last line is dropped. A run that another process is working on is left to
it. Infinite numbers are written as ``"inf"`` and ``"-inf"``; NaN is refused.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import platform
import secrets
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.json_fields import replacement, write_json

__all__ = ["Run", "plain_json", "provenance"]

_RECORDED_PACKAGES = ("tbrm-theory", "torch", "numpy", "scipy", "gymnasium", "matplotlib", "transformers", "trl")


def plain_json(value: Any) -> Any:
    """``value`` as JSON data: ``inf`` becomes a string, tuples become lists.

    Raises:
        InvalidInputError: NaN, which no result may hold.
    """
    if isinstance(value, float):
        if math.isnan(value):
            raise InvalidInputError("results", "NaN is not a result")
        return value if math.isfinite(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, dict):
        return {str(key): plain_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(entry) for entry in value]
    return value


def provenance() -> dict[str, Any]:
    """What the numbers depend on besides the settings: versions, commit and uncommitted changes, machine; null where unknown."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, check=True, timeout=60)
        except (OSError, subprocess.SubprocessError):
            return None  # not a checkout, or no git: an installed package
        return done.stdout.decode(errors="replace").strip()

    # An installed package may lie inside the checkout of something else, whose commit says nothing here.
    ours = git("ls-files", "--error-unmatch", Path(__file__).name) is not None
    changes = git("diff", "HEAD") if ours else None
    return {
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in _RECORDED_PACKAGES},
        "commit": git("rev-parse", "HEAD") if ours else None,
        "modified": None if changes is None else bool(changes),
        "changes": hashlib.sha256(changes.encode()).hexdigest() if changes else None,
        "machine": {
            "system": platform.system(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Run:
    """One run of an experiment, open for recording."""

    folder: Path

    @classmethod
    def open(cls, experiment: str, config: dict[str, Any], *, root: Path) -> Run:
        """Go on with the newest run of these settings that is not complete, if there is one; otherwise start a new one.

        Raises:
            InvalidInputError: there is a file where a folder is needed.
            OSError: the folder cannot be written.
        """
        config, here = plain_json(config), plain_json(provenance())
        parent = root / experiment
        try:
            parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise InvalidInputError(str(parent), "expected a folder for results, found a file in its place") from error
        run = cls._unfinished(parent, config, here) or cls._new(parent, config, here)
        link, latest = parent / f".latest.{secrets.token_hex(4)}", parent / "latest"
        try:
            link.symlink_to(run.folder.name)
            os.replace(link, latest)
        except OSError as error:
            link.unlink(missing_ok=True)
            if isinstance(error, IsADirectoryError):
                raise InvalidInputError(str(latest), "expected a link to a run, found a folder in its place") from error
            raise OSError(error.errno, error.strerror, str(latest)) from error
        return run

    @classmethod
    def _unfinished(cls, parent: Path, config: dict[str, Any], here: dict[str, Any]) -> Run | None:
        for folder in sorted((entry for entry in parent.iterdir() if not entry.is_symlink()), reverse=True):
            run = cls(folder)
            written = _read(folder / "provenance.json") or {}
            same = _read(folder / "config.json") == config and written | {"started": None} == here | {"started": None}
            if same and not run._is_complete and _claim(run.folder) and not run._is_complete:
                run._drop_half_line()
                return run
        return None

    @classmethod
    def _new(cls, parent: Path, config: dict[str, Any], here: dict[str, Any]) -> Run:
        run = cls(parent / f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}-{secrets.token_hex(2)}")
        run.folder.mkdir()
        _claim(run.folder)  # before its settings are there to be found
        write_json(run.folder / "provenance.json", here)
        write_json(run.folder / "config.json", config)
        return run

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def record(self, row: dict[str, Any]) -> None:
        """Append one row; it is on disk when this returns."""
        line = (json.dumps(plain_json(row), allow_nan=False) + "\n").encode()
        with self.metrics.open("ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError as error:  # not a Ctrl-C: it finds the line whole
                file.truncate(size)  # no half line: what is recorded next begins its own
                raise OSError(error.errno, error.strerror, str(self.metrics)) from error

    def rows(self) -> list[dict[str, Any]]:
        """Every row recorded so far.

        Raises:
            InvalidInputError: a line that is no row, by its number.
        """
        if not self.metrics.exists():
            return []
        found = []
        for n, line in enumerate(self.metrics.read_bytes().splitlines(), start=1):
            row = _parsed(line)
            if row is None:
                expected = (
                    "expected a recorded row, a JSON object; delete this line, and what it held is computed again"
                )
                raise InvalidInputError(f"{self.metrics}, line {n}", expected)
            found.append(row)
        return found

    def arranged(self, cells: Iterable[str]) -> list[dict[str, Any]]:
        """The rows in the order of ``cells``, from now on in the file, too: nothing that reads them sees in which they came."""
        place = {cell: i for i, cell in enumerate(cells)}
        rows = self.rows()
        ordered = sorted(rows, key=lambda row: place[row["cell"]])
        if ordered != rows:
            with replacement(self.metrics) as file:
                file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in ordered)
        return ordered

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary: the run is complete, and no later one goes on with it."""
        write_json(self.folder / "summary.json", plain_json(summary))
        _release(self.folder)

    @property
    def _is_complete(self) -> bool:
        return (self.folder / "summary.json").exists()

    def _drop_half_line(self) -> None:
        if not self.metrics.exists():
            return
        content = self.metrics.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            with self.metrics.open("r+b") as file:
                file.truncate(len(whole))


# -- reading, and who works on a run ----------------------------------------------------------------------------------


def _parsed(text: bytes) -> dict[str, Any] | None:
    """A JSON object; None for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return _parsed(path.read_bytes())
    except OSError:
        return None


_CLAIMED: dict[Path, int] = {}
"""Folders of the runs of this process, each with the open descriptor that holds its lock."""


def _claim(folder: Path) -> bool:
    """Whether this process may work on a run: its own until the process ends, however it ends."""
    folder = folder.resolve()
    if folder in _CLAIMED:
        return True
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    except OSError:
        pass  # a file system without locks
    _CLAIMED[folder] = descriptor
    return True


def _release(folder: Path) -> None:
    descriptor = _CLAIMED.pop(folder.resolve(), None)
    if descriptor is not None:
        os.close(descriptor)
