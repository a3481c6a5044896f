"""What an update costs: the instruments count what is known by hand, and the predictions of the experiment can fail."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch

from tbrm_theory.consumption import consumed
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.losses import LOSSES, TrajectoryScores

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
sys.path.insert(0, str(ROOT / "paper_figs"))

import compute  # noqa: E402
import fig_compute  # noqa: E402

SMALL = compute.Config(vocabulary=11, width=8, heads=2, blocks=2, prompt=3, response=5, trajectories=4, rollouts=(1, 2))
Row = dict[str, Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one small run."""
    results = tmp_path_factory.mktemp("results")
    assert compute.main(replace(SMALL, results=results)) == 0
    return results / "compute" / "latest"


@pytest.fixture(scope="module")
def rows(run: Path) -> list[Row]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def cell_of(rows: list[Row], cell: str) -> Row:
    return next(row for row in rows if row["cell"] == cell)


# -- the instruments -------------------------------------------------------------------------------------------------


def forward_operations(config: compute.Config, trajectories: int, length: int, outputs: int) -> int:
    """Two for each multiplication of the matrix products: 12 width² of a block for each token, attention, head."""
    block = 12 * config.width**2 * length + 2 * config.width * length**2
    return 2 * trajectories * (config.blocks * block + config.width * outputs * length)


def test_operations_are_those_of_the_matrix_products(rows: list[Row]) -> None:
    """A backward pass takes twice the forward one."""
    n, length = SMALL.trajectories, SMALL.prompt + SMALL.response - 1
    policy = forward_operations(SMALL, n, length, SMALL.vocabulary)
    critic = forward_operations(SMALL, n, length, 1)
    prompts = forward_operations(SMALL, n, SMALL.prompt, 1)
    expected = {
        "tbrm/1": 3 * policy + policy,
        "tbrm/2": 3 * policy + policy,
        "tbrm-iterative/1": 4 * policy + forward_operations(SMALL, n, SMALL.prompt, SMALL.vocabulary),
        "sql-one-step/1": 5 * policy,
        "dapo/2": 3 * policy,
        "ppo/1": 4 * policy + 3 * critic,
        "dro/1": 4 * policy + 3 * prompts,
        "trajectory-balance/2": 4 * policy + 3 * prompts // 2,
    }
    products = {cell: cell_of(rows, cell)["operations"] for cell in expected}
    # PPO's generalised advantage is a product of matrices, too: (N, H) by (H, H), outside of the models and of autograd.
    expected["ppo/1"] += 2 * n * SMALL.response**2
    assert products == expected


def test_bytes_held_are_four_copies_of_what_is_trained_and_one_of_what_is_not(rows: list[Row]) -> None:
    def size(outputs: int) -> int:
        model = compute.transformer(SMALL, outputs, trained=True)
        return 4 * sum(parameter.numel() for parameter in model.parameters())

    policy, critic = size(SMALL.vocabulary), size(1)
    assert cell_of(rows, "tbrm/1")["held"] == 4 * policy + policy
    assert cell_of(rows, "dapo/2")["held"] == 4 * policy
    assert cell_of(rows, "sql-one-step/1")["held"] == 6 * policy
    assert cell_of(rows, "ppo/1")["held"] == 5 * policy + 4 * critic


def test_models_updated_in_turn_do_not_keep_their_passes_at_once(rows: list[Row]) -> None:
    """PPO's policy and critic; with a single trained model there is no turn to take."""
    for method in ("ppo", "pcl-one-step"):
        row = cell_of(rows, f"{method}/1")
        assert 0.5 * row["saved"] < row["saved_in_turn"] < row["saved"]
    row = cell_of(rows, "tbrm/1")
    assert row["saved_in_turn"] == row["saved"]


def test_what_is_kept_for_the_backward_pass_is_counted_once_until_it_is_let_go() -> None:
    meter = compute.Meter()
    x = torch.ones(1000, dtype=torch.float32, requires_grad=True)
    weight = torch.nn.utils.skip_init(torch.nn.Linear, 1, 1)
    torch.nn.init.ones_(weight.weight)  # its parameters alone are kept by the last product, and not counted
    with meter.keeping({"policy": weight}):  # type: ignore[dict-item]
        y = (x * x).exp().sum() * weight.weight.sum()
    assert meter.peak == 2 * 4000 + 2 * 4  # x, saved twice; the exponential; the two numbers of the last product
    y.backward()
    del y
    assert meter._now.total() == 0
    assert x.grad is not None
    assert torch.allclose(x.grad, 2 * x * (x * x).exp() * weight.weight.sum())  # unpacked as it was packed


def test_passes_of_a_model_are_counted_by_its_hooks() -> None:
    meter, model = compute.Meter(), compute.transformer(SMALL, 1, trained=True)
    meter.watch("critic", model)
    tokens = torch.zeros(2, 3, dtype=torch.long)
    with torch.no_grad():
        model(tokens)
    (model(tokens).sum() + model(tokens).sum()).backward()
    assert (meter.evaluations["critic"], meter.tokens["critic"], meter.backward["critic"]) == (3, 18, 2)


def test_a_loss_that_reads_more_is_found_out(rows: list[Row]) -> None:
    def curious(scores: TrajectoryScores, *, beta: float) -> torch.Tensor:
        assert scores.entropy is not None
        return LOSSES["tbrm"].function(scores, beta=beta) + 0.1 * scores.entropy.mean()

    reads = sorted(consumed(replace(LOSSES["tbrm"], function=curious)))
    assert reads == sorted([*LOSSES["tbrm"].fields, "entropy"])
    row = cell_of(rows, "tbrm/1") | {"consumed": reads}
    assert compute.unexpected([row]) == [f"tbrm/1: reads {reads}"]


# -- the experiment --------------------------------------------------------------------------------------------------


def test_the_predictions_come_about_and_every_key_is_explained(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["unexpected"] == []
    for key in summary:
        assert f"`{key}`" in (compute.__doc__ or ""), key


def test_groups_of_one_are_refused_by_those_that_compare_within_a_group(rows: list[Row]) -> None:
    refused = {row["method"] for row in rows if "refused" in row}
    assert refused == {"vargrad", "kimi", "pairwise", "dpo", "rloo", "grpo", "dr-grpo", "dapo"}


def test_what_was_run_agrees_with_table_2_of_the_package(run: Path, rows: list[Row]) -> None:
    """Rollouts and models of the update that was measured; the rollouts of the reference for A*-PO are made before it."""
    summary = json.loads((run / "summary.json").read_text())
    for method, columns in summary["table2"].items():
        assert columns["single_rollout"] == (summary["cost"][method]["rollouts"] == 1)
        alone = not summary["cost"][method]["extra_models"]
        assert columns["single_model"] == (alone and method != "a-star-po"), method
        assert columns["trajectory_reward"] == ("reward" not in cell_of(rows, f"{method}/2")["consumed"])


def test_a_loss_of_groups_that_takes_a_group_of_one_is_unexpected(rows: list[Row]) -> None:
    row = cell_of(rows, "kimi/2") | {"cell": "kimi/1", "rollouts": 1}
    assert compute.unexpected([row]) == ["kimi/1: a group of one"]


@pytest.mark.parametrize(
    ("cell", "change"),
    [
        ("tbrm/1", {"refused": "no reason"}),
        ("grpo/2", {"refused": "no reason"}),
        ("brm/1", {"backward": {"policy": 2}}),
        ("tbrm/2", {"evaluations": {"policy": 1, "reference": 1, "critic": 1}}),
        ("ppo/1", {"operations": 10**9}),
        ("ppo/1", {"held": 1}),
    ],
)
def test_other_costs_are_unexpected(cell: str, change: Row, rows: list[Row]) -> None:
    changed = [row | change if row["cell"] == cell else row for row in rows]
    if cell == "tbrm/1":
        assert compute.unexpected(changed) == ["tbrm/1: no reason"]
    elif cell == "grpo/2":
        assert compute.unexpected(changed) == ["grpo/2: no reason"]
    else:
        assert len(compute.summarise(changed, 0.0)["unexpected"]) == 1


@pytest.mark.parametrize("rollouts", [(2,), (1, 3), (1, 0)])
def test_groups_that_do_not_fit_are_refused(rollouts: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="rollouts"):
        compute.main(replace(SMALL, rollouts=rollouts, results=tmp_path))


# -- the figure ------------------------------------------------------------------------------------------------------


def test_the_table_is_extracted_from_a_run(run: Path, tmp_path: Path) -> None:
    fig_compute.main(fig_compute.Options(results=run, data=tmp_path, out=tmp_path))
    assert (tmp_path / "compute.png").exists()
    drawn = json.loads((tmp_path / "compute.json").read_text())
    assert [row["method"] for row in drawn] == list(LOSSES)
    assert {row["rollouts"] for row in drawn} == {1, 2}


def test_the_figure_plots_the_committed_table(tmp_path: Path) -> None:
    opened = plt.get_fignums()
    fig_compute.main(fig_compute.Options(out=tmp_path))
    assert (tmp_path / "compute.pdf").stat().st_size > 10_000
    assert plt.get_fignums() == opened
    table = json.loads((ROOT / "paper_figs" / "data" / "compute.json").read_text())
    drawn = fig_compute.draw(table)
    assert [row["method"] for row in table] == list(LOSSES)
    widths = [bar.get_width() for bar in drawn.axes[0].patches]
    assert widths == [row["operations"] / table[0]["operations"] for row in table]
    plt.close(drawn)
