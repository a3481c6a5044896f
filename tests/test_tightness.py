"""The tightness experiment, small: its verdicts can turn, it resumes, and the figure draws the committed table."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tbrm_theory.instance import Instance

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
sys.path.insert(0, str(ROOT / "paper_figs"))

import fig_tightness as figure  # noqa: E402
import tightness  # noqa: E402

SMALL: dict[str, Any] = {"claims": ("B1", "X1"), "steps": 70, "restarts": 8, "seeds": 2}


@pytest.fixture(autouse=True)
def _python_random_state() -> Iterator[None]:
    """rich draws identifiers of styles from Python's global generator; they are never printed."""
    state = random.getstate()
    yield
    random.setstate(state)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("results")
    assert tightness.main(tightness.Config(results=results, **SMALL)) == 0
    return results / "tightness" / "latest"


def rows_of(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for record in records for row in record["rows"]]


def test_the_best_seed_of_every_claim_and_horizon_is_kept(run: Path) -> None:
    rows = rows_of(run)
    assert len(rows) == 8  # two seeds of B1 at three horizons and of X1 at one
    best = tightness.best_of_seeds(rows)
    assert [(row["claim"], row["horizon"]) for row in best] == [("B1", 1), ("B1", 2), ("B1", 3), ("X1", 2)]
    for row in best:
        rivals = [float(r["best_ratio"]) for r in rows if (r["claim"], r["horizon"]) == (row["claim"], row["horizon"])]
        assert float(row["best_ratio"]) == max(rivals)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["searches"] == 4
    assert summary["refuted"] == ["X1"]
    assert summary["unexpected"] == []
    assert summary["tightest"]["B1"] > 0.9999


def test_the_run_holds_the_table_and_the_worst_instances(run: Path) -> None:
    lines = (run / "tightness.md").read_text().splitlines()
    assert lines == (tightness.markdown(tightness.best_of_seeds(rows_of(run)))).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| B1", "| X1"]
    assert [line.split(" | ")[2] for line in lines[2:]] == [
        "3",
        "2",
    ]  # B1 is attained at every horizon: the longest one
    stored = {path.stem: Instance.load(path) for path in (run / "worst").iterdir()}
    assert set(stored) == {"B1-1", "B1-2", "B1-3", "X1-2"}
    assert all(instance.mdp.horizon == int(name[-1]) for name, instance in stored.items())


@pytest.mark.parametrize(
    ("claim", "change", "found"),
    [
        ("B1", {"violated": True}, "violated"),
        ("B1", {"confirmed_exactly": False}, "undecided"),
        ("B1", {"best_ratio": 0.99}, "not as tight as it can be"),
        ("X1", {"violated": False}, "not refuted"),
    ],
)
def test_each_verdict_can_turn(run: Path, claim: str, change: dict[str, Any], found: str) -> None:
    row = next(row for row in rows_of(run) if row["claim"] == claim)
    assert tightness.unexpected(row) is None
    doctored = {**row, **change}
    doctored["unexpected"] = tightness.unexpected(doctored)
    assert doctored["unexpected"] == found
    assert tightness.summarise([doctored])["verdict"] == "NOT as predicted"


def test_an_interrupted_run_goes_on_where_it_stopped(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tightness"
    folder.mkdir()
    kept = folder / "kept"
    kept.mkdir()
    (folder / "latest").symlink_to("kept")
    for name in ("config.json", "provenance.json"):
        (kept / name).write_text((run / name).read_text())
    first, *_ = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (kept / "metrics.jsonl").write_text(first + first[: len(first) // 2])
    assert tightness.main(tightness.Config(results=tmp_path, **SMALL)) == 0

    def numbers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]

    assert numbers(rows_of(kept)) == numbers(rows_of(run))


@pytest.mark.parametrize(
    ("setting", "value"), [("steps", 0), ("restarts", 0), ("seeds", 0), ("seed", -1), ("claims", ("B1", "B99"))]
)
def test_impossible_settings_are_refused_before_anything_is_written(
    setting: str, value: object, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"{setting.removesuffix('s')}s?: "):
        tightness.Config(results=tmp_path, **{setting: value})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_figure_is_redrawn_from_the_committed_table_and_plots_its_numbers(tmp_path: Path) -> None:
    figure.main(figure.Options(out=tmp_path))
    assert (tmp_path / "tightness.pdf").stat().st_size > 5_000
    rows = json.loads((ROOT / "paper_figs" / "data" / "tightness.json").read_text())
    drawn = figure.draw(rows)
    gaps = [x for line in drawn.axes[0].get_lines()[: len(figure.COLOURS)] for x in line.get_xdata()]
    wanted = [max(1 - row["best_ratio"], figure.FLOOR) for row in rows if row["expected_to_hold"]]
    assert sorted(gaps) == sorted(wanted)
    ratios = [line.get_xdata()[0] for line in drawn.axes[1].get_lines()[:-1]]
    assert ratios == [min(float(row["best_ratio"]), figure.CEILING) for row in rows if not row["expected_to_hold"]]


def test_figure_table_is_extracted_from_a_run(run: Path, tmp_path: Path) -> None:
    figure.main(figure.Options(results=run, data=tmp_path, out=tmp_path))
    table = json.loads((tmp_path / "tightness.json").read_text())
    best = tightness.best_of_seeds(rows_of(run))
    assert table == [{key: value for key, value in row.items() if key != "instance"} for row in best]
    for row in best:
        path = tmp_path / "worst" / f"{row['claim']}-{row['horizon']}.json"
        assert json.loads(path.read_text()) == row["instance"]
