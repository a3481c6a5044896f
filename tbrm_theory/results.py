"""Run folders: ``results/<experiment>/<run>/`` with what was asked, where it ran, what came out.

* ``config.json``: the settings; ``provenance.json``: versions, commit, machine;
* ``metrics.jsonl``: append-only, one JSON object a line, on disk before ``record`` returns;
* ``summary.json``: written at the end, so its presence says that the run is complete;
* ``results/<experiment>/latest``: a link to the newest run.

A run that was interrupted or killed is found again by its settings and goes on: rows already recorded are kept, half a last line is
dropped. Infinite numbers are written as ``"inf"`` and ``"-inf"``; NaN is refused.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.json_fields import write_json

__all__ = ["Run", "plain_json", "provenance"]

_RECORDED_PACKAGES = ("tbrm-theory", "torch", "numpy", "scipy", "gymnasium", "matplotlib")


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
    """What the numbers depend on besides the settings: versions, commit, machine."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None  # not a checkout, or no git: an installed package

    return {
        "python": sys.version.split()[0],
        "packages": {name: version(name) for name in _RECORDED_PACKAGES},
        "commit": git("rev-parse", "HEAD"),
        "modified": bool(git("status", "--porcelain", "--untracked-files=no")),
        "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@dataclass(frozen=True)
class Run:
    """One run of an experiment, open for recording."""

    folder: Path

    @classmethod
    def open(cls, experiment: str, config: dict[str, Any], *, root: Path) -> Run:
        """Resume the latest run if it has these settings and is not complete; otherwise start a new one."""
        config = plain_json(config)
        parent = root / experiment
        parent.mkdir(parents=True, exist_ok=True)
        latest = parent / "latest"
        if latest.exists() and not (latest / "summary.json").exists():
            try:
                same = json.loads((latest / "config.json").read_text(encoding="utf-8")) == config
            except (OSError, json.JSONDecodeError):
                same = False  # killed before its settings were written
            if same:
                run = cls(latest.resolve())
                run._drop_half_line()
                return run
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
        run = cls(parent / stamp)
        run.folder.mkdir()
        write_json(run.folder / "provenance.json", plain_json(provenance()))
        write_json(run.folder / "config.json", config)
        link = parent / ".latest.partial"
        link.unlink(missing_ok=True)
        link.symlink_to(stamp)
        os.replace(link, latest)
        return run

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def record(self, row: dict[str, Any]) -> None:
        """Append one row; it is on disk when this returns."""
        line = json.dumps(plain_json(row), allow_nan=False) + "\n"
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> list[dict[str, Any]]:
        """Every row recorded so far."""
        if not self.metrics.exists():
            return []
        return [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]

    def finish(self, summary: dict[str, Any]) -> None:
        write_json(self.folder / "summary.json", plain_json(summary))

    def _drop_half_line(self) -> None:
        if not self.metrics.exists():
            return
        content = self.metrics.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            with self.metrics.open("r+b") as file:
                file.truncate(len(whole))
