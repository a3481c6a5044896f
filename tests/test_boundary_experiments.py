"""The experiments of X2, X5, X6 and X7, small: their predictions come about, can fail, and the figures draw the committed tables."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib.pyplot as plt
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
sys.path.insert(0, str(ROOT / "paper_figs"))

import calibrated_start  # noqa: E402
import conditioning as conditioning_experiment  # noqa: E402
import fig_calibrated_start  # noqa: E402
import fig_conditioning  # noqa: E402
import fig_frozen_value  # noqa: E402
import fig_transition_noise  # noqa: E402
import frozen_value  # noqa: E402
import transition_noise  # noqa: E402

NOISE = transition_noise.Config(noise=(0.0, 1e-5, 3e-5, 1e-4, 0.3), families=("combination-lock",), episodes=1000)
FROZEN = frozen_value.Config(advantages=(1.0, 10.0), steps=(1, 8))
START = calibrated_start.Config(horizon=2, vocabulary=3, values=(-1.0, 3.0), steps=40)
CONDITIONING = conditioning_experiment.Config(horizons=(2, 3, 4), steps=150, spreads=(0.0, 2.0))

SMALL: dict[str, tuple[ModuleType, Any, ModuleType]] = {
    "transition_noise": (transition_noise, NOISE, fig_transition_noise),
    "frozen_value": (frozen_value, FROZEN, fig_frozen_value),
    "calibrated_start": (calibrated_start, START, fig_calibrated_start),
    "conditioning": (conditioning_experiment, CONDITIONING, fig_conditioning),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of one small run of each."""
    results = tmp_path_factory.mktemp("results")
    for module, config, _ in SMALL.values():
        assert module.main(replace(config, results=results)) == 0
    return {name: results / name / "latest" for name in SMALL}


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", SMALL)
def test_the_predictions_come_about(name: str, runs: dict[str, Path]) -> None:
    summary = json.loads((runs[name] / "summary.json").read_text())
    assert summary["verdict"] == "as predicted"
    assert summary["unexpected"] == []


@pytest.mark.parametrize("name", SMALL)
def test_every_key_of_the_summary_is_explained(name: str, runs: dict[str, Path]) -> None:
    module, _, _ = SMALL[name]
    for key in json.loads((runs[name] / "summary.json").read_text()):
        assert f"`{key}`" in (module.__doc__ or ""), key


@pytest.mark.parametrize("name", SMALL)
def test_a_finished_part_is_not_run_again(name: str, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted run goes on: with everything recorded nothing is left but the summary."""
    module, config, _ = SMALL[name]
    results = runs[name].parents[1]
    before = (runs[name] / "metrics.jsonl").read_text()
    (runs[name] / "summary.json").unlink()
    assert module.main(replace(config, results=results)) == 0
    assert (runs[name] / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("name", SMALL)
def test_the_figure_is_redrawn_from_the_committed_table(name: str, tmp_path: Path) -> None:
    _, _, figure = SMALL[name]
    opened = plt.get_fignums()
    figure.main(figure.Options(out=tmp_path))
    assert (tmp_path / f"{name}.pdf").stat().st_size > 10_000
    assert plt.get_fignums() == opened  # matplotlib warns of the twenty-first figure left open


@pytest.mark.parametrize("name", SMALL)
def test_the_table_of_a_figure_is_extracted_from_a_run(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    _, _, figure = SMALL[name]
    figure.main(figure.Options(results=runs[name], data=tmp_path, out=tmp_path))
    assert (tmp_path / f"{name}.png").exists()
    assert len(json.loads((tmp_path / f"{name}.json").read_text())) > 1


# -- X2 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("noise", "change", "what"),
    [
        (0.0, {"regret": {"tbrm": 1e-6}}, "TBRM wrong without noise"),
        (0.3, {"regret": {"tbrm": 1e-9}}, "TBRM right with noise"),
        (0.3, {"loss": {"tbrm": 99.0}}, "TBRM above the floor"),
        (0.3, {"regret": {"corrected": 1e-6}}, "corrected wrong"),
        (0.3, {"regret": {"optimal data": 0.0}}, "the optimum's own data"),
        (0.0, {"regret": {"optimal data": 1.0}}, "the optimum's own data"),
    ],
)
def test_a_cell_of_the_noise_can_be_unexpected(
    noise: float, change: dict[str, Any], what: str, runs: dict[str, Path]
) -> None:
    row = next(row for row in rows_of(runs["transition_noise"]) if row["noise"] == noise)
    assert transition_noise.unexpected(row) == []
    for key, entries in change.items():
        row[key] |= entries
    assert transition_noise.unexpected(row) == [f"combination-lock/{noise}: {what}"]


def test_another_exponent_is_unexpected(runs: dict[str, Path]) -> None:
    rows = rows_of(runs["transition_noise"])
    for row in rows:
        row["regret"]["tbrm"] = max(row["noise"], 1e-30)
    assert "combination-lock: exponent 1.000" in transition_noise.summarise(rows, 0.0)["unexpected"]


def test_noise_figure_plots_its_table() -> None:
    rows = json.loads((ROOT / "paper_figs" / "data" / "transition_noise.json").read_text())
    drawn = fig_transition_noise.draw(rows)
    chain = [row for row in rows if row["family"] == "chain" and row["noise"] > 0]
    assert list(drawn.axes[0].get_lines()[0].get_ydata()) == [row["regret"]["tbrm"] for row in chain]
    assert list(drawn.axes[1].get_lines()[0].get_ydata()) == [row["noise_floor"] for row in chain]


# -- X5 --------------------------------------------------------------------------------------------------------------


def test_the_coarse_class_holds_the_start_and_tbrm_does_not(runs: dict[str, Path]) -> None:
    cells = {row["cell"]: row for row in rows_of(runs["frozen_value"])}
    assert cells["basin/10/1"]["path"] == [0.0]
    assert cells["basin/1/1"]["path"] == [0.0, 1.0]
    assert cells["basin/10/8"]["path"][-1] < 10.0
    assert cells["basin/10/8"]["tbrm_regret"] < 1e-30


@pytest.mark.parametrize(
    ("cell", "change"),
    [
        ("basin/10/1", {"path": [0.0, 10.0]}),
        ("basin/10/1", {"tbrm_regret": 0.1}),
        ("threshold", {"threshold": 1.9}),
        ("paper", {"scores": dict.fromkeys(frozen_value.PRINTED, 1.0)}),
    ],
)
def test_other_numbers_of_the_bandit_are_unexpected(cell: str, change: dict[str, Any], runs: dict[str, Path]) -> None:
    rows = [row | change if row["cell"] == cell else row for row in rows_of(runs["frozen_value"])]
    assert frozen_value.summarise(rows, 0.0)["unexpected"]


def test_bandit_figure_plots_its_table() -> None:
    rows = json.loads((ROOT / "paper_figs" / "data" / "frozen_value.json").read_text())
    drawn = fig_frozen_value.draw(rows)
    threshold = next(row for row in rows if row["cell"] == "threshold")
    assert list(drawn.axes[1].get_lines()[0].get_ydata()) == threshold["kept"]


# -- X6 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "change", "what"),
    [
        ("curve/tbrm/reference/none", {"kl": [0.0]}, "TBRM rests"),
        ("curve/tbrm/reference/none", {"later_layers_moved": 0.1}, "later layers move"),
        ("curve/reval/uniform/none", {"kl": [0.1]}, "ReVal moves"),
        ("curve/reval/uniform/none", {"loss": [0.1]}, "loss at the start"),
        ("level/3", {"start_loss": {"tbrm": 8.9, "reval": 0.0}}, "loss at the start"),
        ("minimiser/reval/uniform", {"value_error": 0.1}, "minimisers"),
        ("minimiser/tbrm/uniform", {"kl": 0.1}, "minimisers"),
    ],
)
def test_another_start_is_unexpected(cell: str, change: dict[str, Any], what: str, runs: dict[str, Path]) -> None:
    rows = rows_of(runs["calibrated_start"])
    assert sum(row["cell"] == cell for row in rows) == 1
    rows = [row | change if row["cell"] == cell else row for row in rows]
    assert calibrated_start.summarise(rows, 0.0)["unexpected"] == [what]


def test_start_figure_plots_its_table() -> None:
    rows = json.loads((ROOT / "paper_figs" / "data" / "calibrated_start.json").read_text())
    drawn = fig_calibrated_start.draw(rows)
    rewarded = [row for row in rows if row["cell"].startswith("curve") and row["reward"]]
    assert list(drawn.axes[1].get_lines()[0].get_ydata()) == rewarded[0]["regret"]


# -- X7 --------------------------------------------------------------------------------------------------------------


def doctored(rows: list[dict[str, Any]], cell: str, run: str, **change: Any) -> list[dict[str, Any]]:
    rows = copy.deepcopy(rows)
    next(row for row in rows if row["cell"] == cell)["runs"][run] |= change
    return rows


@pytest.mark.parametrize(
    ("cell", "run", "change", "what"),
    [
        ("train/4/brm/gd", "spread 0, reference", {"steps": 1}, "gradient descent on BRM is not slower"),
        ("train/4/tbrm/gd", "spread 0, reference", {"steps": -1}, "gradient descent on BRM is not slower"),
        ("train/4/brm/adam", "spread 0, reference", {"steps": -1}, "Adam on calibrated BRM is slow"),
        ("train/4/brm/adam", "spread 0, reference", {"worst": 1.1}, "calibrated BRM gets worse"),
        ("train/4/brm/adam", "spread 2, reference", {"worst": 1.0}, "raw BRM does not get worse"),
        ("train/4/tbrm/adam", "spread 2, reference", {"worst": 2.0}, "raw TBRM gets worse"),
    ],
)
def test_other_runs_are_unexpected(
    cell: str, run: str, change: dict[str, Any], what: str, runs: dict[str, Path]
) -> None:
    rows = doctored(rows_of(runs["conditioning"]), cell, run, **change)
    assert conditioning_experiment.summarise(rows, CONDITIONING, 0.0)["unexpected"] == [what]


def test_other_condition_numbers_are_unexpected(runs: dict[str, Path]) -> None:
    rows = rows_of(runs["conditioning"])
    next(row for row in rows if row["cell"] == "condition/one-state/10")["condition"]["brm"] = 170.0
    assert conditioning_experiment.summarise(rows, CONDITIONING, 0.0)["unexpected"] == ["one-state/10: brm 170.0"]


def test_the_first_layer_hears_of_the_reward_late_under_brm(runs: dict[str, Path]) -> None:
    cells = {row["cell"]: row for row in rows_of(runs["conditioning"])}
    for horizon in (2, 3, 4):
        tbrm, brm = (cells[f"train/{horizon}/{loss}/gd"]["runs"]["spread 0, reference"] for loss in ("tbrm", "brm"))
        assert tbrm["first_layer"] == 1
        assert brm["first_layer"] >= horizon  # X7.d


def test_conditioning_figure_plots_its_table() -> None:
    rows = json.loads((ROOT / "paper_figs" / "data" / "conditioning.json").read_text())
    drawn = fig_conditioning.draw(rows)
    one_state = [row["condition"]["tbrm"] for row in rows if row.get("family") == "one-state"]
    assert list(drawn.axes[0].get_lines()[0].get_ydata()) == one_state


# -- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "config", "field"),
    [
        (transition_noise, transition_noise.Config(families=("nowhere",)), "families"),
        (frozen_value, frozen_value.Config(advantages=(-1.0,)), "advantages"),
        (calibrated_start, calibrated_start.Config(values=(0.0,)), "values"),
        (conditioning_experiment, conditioning_experiment.Config(horizons=(2, 4)), "horizons"),
        (conditioning_experiment, conditioning_experiment.Config(spreads=(1.0,)), "spreads"),
    ],
)
def test_settings_that_make_no_sense_are_refused(module: ModuleType, config: Any, field: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=field):
        module.main(replace(config, results=tmp_path))
    assert not list(tmp_path.iterdir())
