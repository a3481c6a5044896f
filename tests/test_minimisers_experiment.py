"""`experiments/minimisers.py`, small: the predictions come about and can fail, and the figure draws the committed table."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
sys.path.insert(0, str(ROOT / "paper_figs"))

import fig_minimisers  # noqa: E402
import minimisers  # noqa: E402
from table_figure import Options  # noqa: E402

from tbrm_theory import coverage  # noqa: E402
from tbrm_theory.behaviours import MixtureBehaviour  # noqa: E402
from tbrm_theory.dynamic_programming import solve  # noqa: E402
from tbrm_theory.losses import LOSSES  # noqa: E402
from tbrm_theory.population import noise_floor  # noqa: E402

SMALL = minimisers.Config(losses=("tbrm", "sql-one-step-q", "kimi", "reinforce"), problems=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("results")
    assert minimisers.main(replace(SMALL, results=results)) == 0
    return results / "minimisers" / "latest"


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_predictions_come_about(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["verdict"] == "as predicted"
    assert summary["unexpected"] == []
    assert summary["largest_regret_at_optimum"] <= minimisers.EXACT
    assert summary["largest_residual"] <= 1e-12
    assert summary["minimisers"] > 0
    assert summary["fixed_points"] > 0
    seen = {found for verdicts in summary["verdicts"].values() for found in verdicts.values()}
    assert seen == {minimisers.OPTIMUM, minimisers.AMONG, minimisers.ELSEWHERE, minimisers.NOWHERE}


def test_every_key_of_the_summary_and_of_a_row_is_explained(run: Path) -> None:
    for key in json.loads((run / "summary.json").read_text()):
        assert f"`{key}`" in (minimisers.__doc__ or ""), key
    for key in rows_of(run)[0].keys() - {"cell", "loss", "kind", "problem"}:
        assert f"`{key}`" in (minimisers.__doc__ or ""), key


def test_a_finished_part_is_not_run_again(run: Path) -> None:
    before = (run / "metrics.jsonl").read_text()
    (run / "summary.json").unlink()
    assert minimisers.main(replace(SMALL, results=run.parents[1])) == 0
    assert (run / "metrics.jsonl").read_text() == before


def test_every_loss_has_a_row_and_every_row_a_prediction_for_each_kind() -> None:
    assert set(LOSSES) <= set(minimisers.VARIANTS)
    assert minimisers.PREDICTED.keys() == minimisers.VARIANTS.keys()
    assert {len(row) for row in minimisers.PREDICTED.values()} == {len(minimisers.KINDS)}


@pytest.mark.parametrize("number", [0, 1])
def test_the_data_are_what_their_names_say(number: int) -> None:
    """κ(π*, μ) is finite with full support alone; the mixture has every pair; noise has a floor."""
    for kind in minimisers.KINDS:
        mdp, data = minimisers.problem(kind, number, 0)
        assert mdp.is_deterministic == (not kind.startswith("noise"))
        if data is None:
            assert kind.endswith("on-policy")
            continue
        mixture = MixtureBehaviour(tuple(w for w, _ in data), tuple(policy for _, policy in data))
        kappa = coverage.kappa(mdp, solve(mdp).log_policy, mixture).item()
        assert (kappa < torch.inf) == (kind in ("full support", "noise")), kind
        assert (noise_floor(mdp, mixture).item() > 1e-4) == (kind == "noise")
        if kind == "mixture":
            assert len(data) == 2
            covered = [torch.stack(tables).exp().sum(0) > 0 for tables in zip(*(p for _, p in data), strict=True)]
            assert all(bool(table.all()) for table in covered)


# -- verdicts --------------------------------------------------------------------------------------------------------


def ended(
    *regrets: float, rests: tuple[bool, ...] = (True, True, True), steps: tuple[int, ...] = (9, 9, 9)
) -> dict[str, Any]:
    return {
        name: dict(zip(minimisers.STARTS, found, strict=True))
        for name, found in (("regret", regrets), ("rests", rests), ("steps", steps))
    }


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (ended(1e-20, 1e-18, 0.0), "optimum"),
        (ended(0.3, 1e-18, 0.0), "among others"),
        (ended(0.3, 0.1, 0.2), "elsewhere"),
        (ended(0.3, 0.1, 0.2, rests=(True, False, True)), "nowhere"),
        (ended(1e-13, 0.1, 0.2), "unclear"),
        (ended(1e-20, 1e-20, 0.2), "unclear"),
        (ended(0.3, 1e-20, 0.0, rests=(False, True, True)), "unclear"),
        (ended(1e-20, 1e-18, 0.0, rests=(True, False, True)), "unclear"),  # it passes by the optimum, and moves
        (ended(1e-20, 1e-18, 0.0, steps=(9, 9, 0)), "optimum"),
        (ended(0.3, 0.1, 0.2, rests=(False, False, False)), "nowhere"),
        (ended(0.3, 0.1, 1e-20, rests=(True, True, False)), "unclear"),  # the solver hangs beside the optimum
        (ended(0.3, 0.1, 1e-12, rests=(False, False, False)), "unclear"),
        (ended(0.3, 0.1, 0.2, steps=(9, 9, 0)), "unclear"),  # what was taken for the optimum is none
    ],
)
def test_a_verdict_follows_from_where_the_three_starts_end(row: dict[str, Any], found: str) -> None:
    assert minimisers.verdict(row) == found


@pytest.mark.parametrize(
    ("verdicts", "found"),
    [
        (["optimum", "optimum"], "optimum"),
        (["optimum", "among others"], "among others"),
        (["nowhere", "elsewhere"], "nowhere"),
        (["optimum", "elsewhere"], "unclear"),
        (["unclear", "optimum"], "unclear"),
    ],
)
def test_verdicts_of_several_problems_go_together_or_are_unclear(verdicts: list[str], found: str) -> None:
    assert minimisers.worst(verdicts) == found


@pytest.mark.parametrize(
    ("cell", "change", "what"),
    [
        ("tbrm/noise/0", {"verdict": "optimum"}, "tbrm | noise: optimum"),
        ("tbrm/on-policy/0", {"verdict": "elsewhere"}, "tbrm | on-policy: elsewhere"),
        ("sql-one-step-q/mixture/0", {"verdict": "among others"}, "sql-one-step-q | mixture: among others"),
        ("kimi/on-policy/0", {"verdict": "optimum"}, "kimi | on-policy: optimum"),
        (
            "tbrm/on-policy/0",
            {"least_eigenvalue": {"reference": 0.1, "random": -0.01, "optimum": 0.1}},
            "tbrm/on-policy/0 from random: saddle",
        ),
    ],
)
def test_other_rows_are_unexpected(cell: str, change: dict[str, Any], what: str, run: Path) -> None:
    rows = rows_of(run)
    assert sum(row["cell"] == cell for row in rows) == 1
    rows = [row | change if row["cell"] == cell else row for row in rows]
    assert minimisers.summarise(rows, 0.0)["unexpected"] == [what]


@pytest.mark.parametrize(
    ("config", "field"),
    [(minimisers.Config(losses=("nothing",)), "losses"), (minimisers.Config(problems=0), "problems")],
)
def test_settings_that_make_no_sense_are_refused(config: minimisers.Config, field: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=field):
        minimisers.main(replace(config, results=tmp_path))
    assert not list(tmp_path.iterdir())


# -- figure ----------------------------------------------------------------------------------------------------------


def test_the_figure_plots_its_table(tmp_path: Path) -> None:
    opened = plt.get_fignums()
    fig_minimisers.main(Options(out=tmp_path))
    assert (tmp_path / "minimisers.pdf").stat().st_size > 10_000
    assert plt.get_fignums() == opened
    rows = json.loads((ROOT / "paper_figs" / "data" / "minimisers.json").read_text())
    assert len(rows) == len(minimisers.VARIANTS) * len(minimisers.KINDS)
    for row in rows:  # the committed table is as predicted
        assert minimisers.as_predicted(row["loss"], row["kind"], row["verdict"])
        if row["verdict"] in (minimisers.ELSEWHERE, minimisers.NOWHERE):
            assert row["regret_from_optimum"] > minimisers.OFF
    drawn = fig_minimisers.draw(rows)
    image = drawn.axes[0].get_images()[0].get_array()
    assert image is not None
    order = list(fig_minimisers.COLOURS)
    assert image.flatten().tolist() == [order.index(row["verdict"]) for row in rows]
    plt.close(drawn)


def test_the_table_of_the_figure_is_extracted_from_a_run(run: Path, tmp_path: Path) -> None:
    fig_minimisers.main(Options(results=run, data=tmp_path, out=tmp_path))
    rows = json.loads((tmp_path / "minimisers.json").read_text())
    assert len(rows) == len(SMALL.losses) * len(minimisers.KINDS)
    assert (tmp_path / "minimisers.png").exists()
