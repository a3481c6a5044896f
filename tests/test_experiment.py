"""The loop of an experiment: what is recorded is not made again, Ctrl-C keeps it, the exit status is the summary's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from tbrm_theory.experiment import run_experiment

Row = dict[str, Any]


@dataclass(frozen=True)
class Config:
    size: int
    results: Path


def summarise(rows: list[Row], seconds: float) -> Row:
    assert seconds >= 0
    return {
        "sum": sum(row["x"] for row in rows),
        "names": ["[red]"],
        "unexpected": [r["cell"] for r in rows if r["x"] > 9],
    }


def tables(rows: list[Row], summary: Row) -> list[Table]:
    return [Table(f"{len(rows)} rows, {summary['sum']}")]


def attempt(results: Path, cells: dict[str, Callable[[], Row]], **options: Any) -> int:
    return run_experiment("demo", Config(3, results), cells, summarise, tables, **options)


def interrupted() -> Row:
    raise KeyboardInterrupt


def made_again() -> Row:
    raise AssertionError("made again")


def test_an_interrupted_experiment_keeps_its_rows_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latest = tmp_path / "demo" / "latest"
    assert attempt(tmp_path, {"a": lambda: {"x": 1, "bound": math.inf}, "b": interrupted}) == 130
    assert f"the same command goes on from {latest.resolve()}" in capsys.readouterr().out
    assert not (latest / "summary.json").exists()
    assert json.loads((latest / "config.json").read_text()) == {"size": 3}
    assert attempt(tmp_path, {"a": made_again, "b": lambda: {"x": 2}}) == 0
    rows = [json.loads(line) for line in (latest / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"cell": "a", "x": 1, "bound": "inf"}, {"cell": "b", "x": 2}]
    assert json.loads((latest / "summary.json").read_text())["sum"] == 3


def test_what_is_unexpected_is_status_1(tmp_path: Path) -> None:
    assert attempt(tmp_path, {"a": lambda: {"x": 10}}) == 1


def test_tables_and_summary_are_printed_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert attempt(tmp_path, {"a": lambda: {"x": 7}}, in_tables=["sum"]) == 0
    printed = capsys.readouterr().out
    assert "1 rows, 7" in printed
    assert "names: ['[red]']" in printed  # no markup
    assert "sum: " not in printed
    assert f"results: {(tmp_path / 'demo' / 'latest').resolve()}" in printed


def test_the_summary_is_on_disk_before_anything_is_printed(tmp_path: Path) -> None:
    def reader_has_gone(rows: list[Row], summary: Row) -> list[Table]:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run_experiment("demo", Config(3, tmp_path), {"a": lambda: {"x": 1}}, summarise, reader_has_gone)
    assert (tmp_path / "demo" / "latest" / "summary.json").exists()
