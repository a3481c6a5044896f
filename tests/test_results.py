"""Run folders: nothing is lost, half a line is dropped, NaN is refused, a run is found again by its settings."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.results import Run, provenance


def test_unfinished_run_with_the_same_settings_goes_on_without_its_half_line(tmp_path: Path) -> None:
    run = Run.open("demo", {"a": 1}, root=tmp_path)
    assert run.rows() == []
    run.record({"x": 1.0, "bound": math.inf})
    with run.metrics.open("a") as file:
        file.write('{"x": 2')  # killed in the middle of a line
    again = Run.open("demo", {"a": 1}, root=tmp_path)
    assert again.folder == run.folder.resolve()
    assert again.rows() == [{"x": 1.0, "bound": "inf"}]
    again.record({"x": 3.0, "bound": -math.inf})
    assert [row["x"] for row in again.rows()] == [1.0, 3.0]


def test_other_settings_or_a_finished_run_start_anew(tmp_path: Path) -> None:
    first = Run.open("demo", {"a": 1}, root=tmp_path)
    assert Run.open("demo", {"a": 1}, root=tmp_path).folder == first.folder.resolve()  # killed before its first row
    second = Run.open("demo", {"a": 2}, root=tmp_path)
    second.finish({"verdict": ("holds", 1)})
    third = Run.open("demo", {"a": 2}, root=tmp_path)
    assert len({first.folder.name, second.folder.name, third.folder.name}) == 3
    assert (tmp_path / "demo" / "latest").resolve() == third.folder.resolve()
    assert json.loads((second.folder / "summary.json").read_text()) == {"verdict": ["holds", 1]}
    (third.folder / "config.json").write_text("{")  # killed while the settings were written by something else
    assert Run.open("demo", {"a": 2}, root=tmp_path).folder.name != third.folder.name


def test_nan_is_refused_and_a_full_disk_leaves_the_run_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.open("demo", {"a": 1}, root=tmp_path)
    with pytest.raises(InvalidInputError, match="NaN"):
        run.record({"x": math.nan})
    assert run.rows() == []

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space"):
            run.finish({"verdict": "holds"})
    assert sorted(path.name for path in run.folder.iterdir()) == ["config.json", "provenance.json"]
    run.finish({"verdict": "holds"})


def test_provenance_names_versions_and_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert provenance()["packages"]["torch"].startswith("2.")
    monkeypatch.setenv("PATH", "")  # no git
    assert provenance()["commit"] is None
