"""The map of spurious minima, small: its verdicts can turn, what it saves is a minimum, and a run that was cut short resumes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tbrm_theory.instance import Instance
from tbrm_theory.json_fields import Field
from tbrm_theory.parametrisations import Linear
from tbrm_theory.population import population_loss

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
sys.path.insert(0, str(ROOT / "paper_figs"))

import fig_spurious_minima as figure  # noqa: E402
import spurious_minima as spurious  # noqa: E402

SMALL = {"grid": 7, "starts": 8, "problems": 24, "iterations": 60}
SIZES = {"linear": (2, 9), "low-rank": (1,), "network": (1,)}


@pytest.fixture(scope="module", autouse=True)
def _few_classes() -> Iterator[None]:
    kept = spurious.SIZES
    spurious.SIZES = SIZES
    yield
    spurious.SIZES = kept


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("results")
    assert spurious.main(spurious.Config(results=results, **SMALL)) == 0  # type: ignore[arg-type]
    return results / "spurious_minima" / "latest"


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_small_map_is_as_predicted(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["verdict"] == "as predicted"
    assert summary["onset_at_coin"] == 1.5
    assert len(summary["share_of_problems"]) == 4 * 4
    assert summary["share_of_problems"]["network D 6, not realisable, uneven"] > 0.5


@pytest.mark.parametrize(
    ("row", "change"),
    [
        ("noise 0.0000", {"share": [0.0] * 6 + [0.1]}),
        ("noise 1.0000", {"share": [0.0, 0.0, 0.1, 0.5, 0.5, 0.5, 0.5]}),
        ("noise 1.0000", {"share": [0.0] * 7}),
        ("linear D 9, realisable, uniform", {"problems": 0.01}),
        ("linear D 2, realisable, uneven", {"problems": 0.0}),
    ],
)
def test_each_prediction_can_fail(run: Path, row: str, change: dict[str, Any]) -> None:
    rows = [{**found, **(change if found["row"] == row else {})} for found in rows_of(run)]
    assert len(spurious.summarise(rows, 0.0)["unexpected"]) == 1


def test_saddles_slopes_and_the_best_minimum_are_not_spurious() -> None:
    """``x⁴ - 2x² + x/4 + y²`` has minima near -1 and 1, of which the second is the worse, and a saddle between them."""

    class Wells:
        def value(self, theta: torch.Tensor) -> torch.Tensor:
            x, y = theta.unbind(-1)
            return x**4 - 2 * x**2 + x / 4 + y**2

        def gradient(self, theta: torch.Tensor) -> torch.Tensor:
            x, y = theta.unbind(-1)
            return torch.stack([4 * x**3 - 4 * x + 0.25, 2 * y], -1)

        def hessian(self, theta: torch.Tensor) -> torch.Tensor:
            return torch.diag_embed(torch.stack([12 * theta[..., 0] ** 2 - 4, torch.full_like(theta[..., 0], 2.0)], -1))

    wells = Wells()
    roots = np.sort(np.roots([4, 0, -4, 0.25]).real)
    theta = torch.tensor([[x, 0.0] for x in roots] + [[0.8, 0.0]], dtype=torch.float64)
    best = wells.value(theta).min()
    found, unfinished = spurious.judged(wells, theta, best)
    assert found.tolist() == [False, False, True, False]
    assert unfinished.tolist() == [False, False, False, True]
    ends = spurious.newton_descent(wells, theta + 0.01, 60)  # from beside the saddle it falls to one side
    assert wells.gradient(ends).abs().max() < 1e-7
    assert (wells.hessian(ends)[:, 0, 0] > 0).all()


def test_what_is_saved_is_a_strict_minimum_of_large_loss(run: Path) -> None:
    """By ``population_loss`` and the package's linear logits, from the file alone; the optimum has no loss."""
    document = json.loads((run / "instances" / "linear D 2, realisable, uneven.json").read_text())
    instance = Instance.from_field(Field("", document["instance"]))
    linear = Linear(instance.mdp, torch.tensor(document["fixed"], dtype=torch.float64))
    theta = torch.tensor(document["parameters"], dtype=torch.float64, requires_grad=True)
    loss = population_loss(instance.mdp, linear.logits(theta), instance.policies["data"])
    assert loss.item() == pytest.approx(document["loss"])
    assert loss.item() > document["best_loss"] + 0.001
    (gradient,) = torch.autograd.grad(loss, theta)
    assert gradient.norm() < 1e-6 * (1 + loss.item())
    circle = torch.linspace(0, 2 * torch.pi, 33, dtype=torch.float64)
    around = theta.detach() + 1e-3 * torch.stack([circle.cos(), circle.sin()], -1)
    assert (population_loss(instance.mdp, linear.logits(around), instance.policies["data"]) > loss).all()
    assert population_loss(instance.mdp, instance.logits["optimal"], instance.policies["data"]) < 1e-20


def test_a_run_cut_short_resumes_to_the_same_rows(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run.parent, tmp_path / "spurious_minima", symlinks=True)
    folder = tmp_path / "spurious_minima" / "latest"
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:-2]) + lines[-2][:20])
    (folder / "summary.json").unlink()
    assert spurious.main(spurious.Config(results=tmp_path, **SMALL)) == 0  # type: ignore[arg-type]
    assert rows_of(folder) == rows_of(run)


def test_figure_is_redrawn_from_the_committed_table_and_plots_its_numbers(tmp_path: Path) -> None:
    figure.main(figure.Options(out=tmp_path))
    assert (tmp_path / "spurious_minima.pdf").stat().st_size > 10_000
    rows = json.loads((ROOT / "paper_figs" / "data" / "spurious_minima.json").read_text())
    drawn = figure.draw(rows)
    shares = [row["share"] for row in rows if row["map"] == "noise"]
    assert np.array_equal(drawn.axes[0].collections[0].get_array(), shares)
    linear = [row for row in rows if row.get("kind") == "linear" and row["realisable"] and row["data"] == "uneven"]
    assert len(linear) == 10
    points = drawn.axes[1].containers[1].lines[0]
    assert points.get_xdata().tolist() == [row["parameters"] for row in linear]
    assert points.get_ydata().tolist() == [row["problems"] for row in linear]


def test_figure_tables_are_extracted_from_a_run(run: Path, tmp_path: Path) -> None:
    figure.main(figure.Options(results=run, data=tmp_path, out=tmp_path))
    table = {row["row"]: row for row in json.loads((tmp_path / "spurious_minima.json").read_text())}
    for row in rows_of(run):
        if row["map"] == "class":
            low, high = table[row["row"]]["interval"]
            assert low - 1e-4 <= row["problems"] <= high + 1e-4
    gathered = json.loads((tmp_path / "spurious_minima_instances.json").read_text())
    assert "linear D 2, realisable, uneven" in {entry["name"] for entry in gathered}
