"""Run folders: nothing is lost, half a line is dropped, NaN is refused, a run is found again by its settings, by one process."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tbrm_theory import results
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.results import Run, provenance

ROOT = Path(__file__).parent.parent


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


def test_other_code_or_versions_start_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, here = Run.open("demo", {}, root=tmp_path), provenance()
    with monkeypatch.context() as patch:
        patch.setattr(results, "provenance", lambda: here | {"commit": "another"})
        second = Run.open("demo", {}, root=tmp_path)
    assert second.folder != first.folder
    assert Run.open("demo", {}, root=tmp_path).folder == first.folder  # still there, and the latest again
    assert (tmp_path / "demo" / "latest").resolve() == first.folder.resolve()


def test_a_run_of_another_process_is_left_to_it_until_that_ends(tmp_path: Path) -> None:
    program = """
import pathlib, sys
from tbrm_theory.results import Run
print(Run.open("demo", {}, root=pathlib.Path(sys.argv[1])).folder.name, flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as other:
        assert other.stdout is not None
        theirs = other.stdout.readline().strip()
        mine = Run.open("demo", {}, root=tmp_path)
        assert mine.folder.name != theirs
        other.send_signal(signal.SIGKILL)
    mine.finish({})
    assert Run.open("demo", {}, root=tmp_path).folder.name == theirs


def test_a_row_that_does_not_fit_on_the_disk_leaves_no_half_line(tmp_path: Path) -> None:
    run = Run.open("demo", {}, root=tmp_path)
    run.record({"x": 1})
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # what a full disk does: part of the row is written
        with pytest.raises(OSError, match=r"metrics\.jsonl"):
            run.record({"x": "y" * 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    run.record({"x": 2})
    assert run.rows() == [{"x": 1}, {"x": 2}]


@pytest.mark.parametrize("line", [b"{", b"3", b"\xff", b"\0\0", b"", b"[" * 100_000])
def test_a_corrupt_row_is_named_and_nothing_is_thrown_away(line: bytes, tmp_path: Path) -> None:
    run = Run.open("demo", {}, root=tmp_path)
    run.record({"x": 1})
    with run.metrics.open("ab") as file:
        file.write(line + b"\n")
    run.record({"x": 2})
    with pytest.raises(InvalidInputError, match=r"metrics\.jsonl, line 2: expected a recorded row"):
        Run.open("demo", {}, root=tmp_path).rows()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"3", b"[" * 100_000])
def test_corrupt_settings_start_a_new_run(content: bytes, tmp_path: Path) -> None:
    for name in ("config.json", "provenance.json"):
        run = Run.open("demo", {}, root=tmp_path)
        (run.folder / name).write_bytes(content)
        assert Run.open("demo", {}, root=tmp_path).folder != run.folder


def test_a_file_or_folder_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InvalidInputError, match=r"file.*demo: expected a folder"):
            Run.open("demo", {}, root=root)
    (tmp_path / "demo" / "latest").mkdir(parents=True)
    with pytest.raises(InvalidInputError, match="latest: expected a link to a run"):
        Run.open("demo", {}, root=tmp_path)


def test_a_file_system_without_locks_is_no_reason_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(results.fcntl, "flock", no_locks)
    Run.open("demo", {}, root=tmp_path).record({"x": 1})
    assert Run.open("demo", {}, root=tmp_path).rows() == [{"x": 1}]


def test_the_commit_of_a_checkout_around_an_installed_package_is_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "something else"], check=True)
    monkeypatch.setattr(results, "__file__", str(tmp_path / "results.py"))
    found = provenance()
    assert (found["commit"], found["modified"], found["changes"]) == (None, None, None)
    monkeypatch.setattr(results, "_RECORDED_PACKAGES", ("no-such-package",))
    assert provenance()["packages"] == {"no-such-package": None}
