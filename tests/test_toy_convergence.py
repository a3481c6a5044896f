"""The main experiment, small: its verdicts can turn, its exit status follows them, and a killed run resumes to the same numbers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
sys.path.insert(0, str(ROOT / "paper_figs"))

import fig_toy_convergence as figure  # noqa: E402
import toy_convergence as toy  # noqa: E402

SMALL = {"families": ("deterministic-dag", "garnet"), "seeds": 2, "steps": 100}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("results")
    status = toy.main(toy.Config(results=results, **SMALL))  # type: ignore[arg-type]
    assert status in (0, 1)
    return results / "toy_convergence" / "latest"


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_positive_cells_are_exact_and_controls_fail(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["positive_cells"] == 6
    assert summary["positive_max_regret"] < 1e-10
    assert summary["negative_controls"] == summary["negative_controls_as_predicted"] == 3


@pytest.mark.parametrize(
    ("kind", "change", "verdict"),
    [
        ("positive", {"regret_curve": [[1.0], [1e-9]]}, "FAILED"),
        ("positive", {"regret_curve": [[1.0, 1.0], [0.0, 1e-9]]}, "FAILED"),  # one bad seed is enough
        ("uncovered actions", {"regret_curve": [[1.0, 1.0], [1.0, 1e-12]]}, "DID NOT FAIL"),
        ("positive", {"regret_curve": [[1.0], [1e-9]], "condition_number": 1e15}, "conditioning limited"),
        ("positive", {"regret_curve": [[1e-4], [0.0]]}, "starts too close"),
        ("uncovered actions", {"regret_curve": [[1.0], [1e-12]]}, "DID NOT FAIL"),
        ("uncovered actions", {"loss_curve": [[1.0], [1e-9]]}, "DID NOT FAIL"),
        ("unidentifying mixture", {"regret_curve": [[1.0], [1e-12]]}, "DID NOT FAIL"),
        ("stochastic transitions", {"loss_curve": [[3.0], [2.0]], "noise_floor": 1.0}, "DID NOT FAIL"),
        ("stochastic transitions", {"loss_curve": [[3.0], [0.0]]}, "DID NOT FAIL"),
        ("curve", {"regret_curve": [[1.0], [0.9]]}, "MISSED"),
    ],
)
def test_each_verdict_can_turn(run: Path, kind: str, change: dict[str, Any], verdict: str) -> None:
    row = next(row for row in rows_of(run) if row["kind"] == kind)
    if kind == "curve":  # a hundred steps are too few to be on target
        row["regret_curve"] = [[1.0], [1e-3]]
    doctored = {**row, **change}
    doctored["verdict"] = toy.verdict(doctored)
    assert toy.verdict(row) != verdict
    assert doctored["verdict"] == verdict
    expected = 0 if verdict in ("conditioning limited", "starts too close") else 1
    assert len(toy.summarise([doctored], 0.0)["unexpected"]) == expected


def test_a_run_that_lost_its_positive_cells_has_not_passed(run: Path) -> None:
    rows = rows_of(run)
    assert toy.summarise(rows, 0.0, least_positive=6)["verdict"] == toy.summarise(rows, 0.0)["verdict"]
    assert "at least 7 positive cells, found 6" in toy.summarise(rows, 0.0, least_positive=7)["unexpected"][-1]


def test_killed_run_resumes_to_the_same_numbers(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "experiments" / "toy_convergence.py"), "--results", str(tmp_path)]
    command += ["--families", *SMALL["families"], "--seeds", "2", "--steps", "100"]  # type: ignore[misc]
    metrics = tmp_path / "toy_convergence" / "latest" / "metrics.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert 3 <= metrics.read_bytes().count(b"\n") < len(rows_of(run))  # it was really killed half-way
    assert toy.main(toy.Config(results=tmp_path, **SMALL)) in (0, 1)  # type: ignore[arg-type]
    assert (metrics.parent / "summary.json").exists()

    def numbers(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {row["cell"]: {key: value for key, value in row.items() if key != "seconds"} for row in rows}

    assert numbers(rows_of(metrics.parent)) == numbers(rows_of(run))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("families", ("chain", "nowhere")), ("seeds", 0), ("steps", 0), ("iterations", 0), ("seed", -1)],
)
def test_impossible_settings_are_refused_before_anything_is_written(
    setting: str, value: object, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"{setting}: expected"):
        toy.Config(results=tmp_path, **{setting: value})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(cell: toy.Cell, config: toy.Config) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(toy, "run_cell", interrupted)
    assert toy.main(toy.Config(families=("chain",), results=tmp_path)) == 130
    assert "the same command goes on from" in capsys.readouterr().out


def test_a_reader_that_has_gone_costs_no_result(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {row["cell"]: row for row in rows_of(run)}
    monkeypatch.setattr(toy, "run_cell", lambda cell, config: rows[cell.name])
    monkeypatch.setattr(toy, "table", lambda rows: sys.exit(1))  # as rich does on a closed pipe
    with pytest.raises(SystemExit):
        toy.main(toy.Config(results=tmp_path, **SMALL))  # type: ignore[arg-type]
    assert (tmp_path / "toy_convergence" / "latest" / "summary.json").exists()


def test_the_figure_refuses_a_folder_without_a_run_and_keeps_its_table(tmp_path: Path) -> None:
    table = tmp_path / "toy_convergence.json"
    table.write_text('{"a": 1}')
    with pytest.raises(ValueError, match="expected the folder of a run"):
        figure.main(figure.Options(results=tmp_path / "nowhere", data=tmp_path, out=tmp_path))
    with pytest.raises(ValueError, match=r"toy_convergence\.json: expected a table"):
        figure.main(figure.Options(data=tmp_path, out=tmp_path))
    assert table.read_text() == '{"a": 1}'


def test_figure_is_redrawn_from_the_committed_table_and_plots_its_numbers(tmp_path: Path) -> None:
    figure.main(figure.Options(out=tmp_path))
    assert (tmp_path / "toy_convergence.pdf").stat().st_size > 10_000
    rows = json.loads((ROOT / "paper_figs" / "data" / "toy_convergence.json").read_text())
    drawn = figure.draw(rows)
    population = [row for row in rows if row["kind"] == "positive" and row["mode"] == "population"]
    lines = drawn.axes[0].get_lines()
    assert len(population) >= 20
    for row, line in zip(population, lines, strict=False):
        assert list(line.get_xdata()) == row["step"]
        assert list(line.get_ydata()) == [max(value, figure.FLOOR) for value in row["regret"]["largest"]]


def test_figure_table_is_extracted_from_a_run(run: Path, tmp_path: Path) -> None:
    figure.main(figure.Options(results=run, data=tmp_path, out=tmp_path))
    table = {row["cell"]: row for row in json.loads((tmp_path / "toy_convergence.json").read_text())}
    for row in rows_of(run):
        assert table[row["cell"]]["regret"]["largest"][-1] == float(f"{max(row['regret_curve'][-1]):.4g}")
