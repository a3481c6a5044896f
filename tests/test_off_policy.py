"""The off-policy experiment, small: what is predicted comes about, verdicts can turn, the figure draws the committed table."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tbrm_theory as tt
from tbrm_theory import bounds
from tbrm_theory.behaviours import MixtureBehaviour
from tbrm_theory.claims.derivatives import ListedLoss
from tbrm_theory.named_behaviours import random_markov
from tbrm_theory.objectives import SampleObjective
from tbrm_theory.occupancy import enumerate_trajectories
from tbrm_theory.optimisers import least_squares_plan
from tbrm_theory.trajectories import TrajectoryBatch, sample_trajectories

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
sys.path.insert(0, str(ROOT / "paper_figs"))

import fig_off_policy as figure  # noqa: E402
import off_policy  # noqa: E402
import off_policy_report as report  # noqa: E402

PROBLEMS: dict[str, dict[str, Any]] = {
    "token-tree": {"horizon": 2, "vocabulary": 2, "correct": 0.5, "beta": 0.3},
    "combination-lock": {"horizon": 3},
}
SMALL: dict[str, Any] = {
    "distance": (-1.0, 0.0, 1.0),
    "updates": (20, 100),
    "ages": (1, 4),
    "reuse": (1, 4),
    "batches": 20,
    "batch_size": 16,
    "seeds": 2,
    "sizes": (4, 64, 256, 1024, 4096),
    "data_sets": 100,
    "errors": (0.0, 0.3, 0.5, 0.7),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run."""
    results = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(off_policy, "PROBLEMS", PROBLEMS)
        assert off_policy.main(off_policy.Config(results=results, **SMALL)) == 0
    return results / "off_policy" / "latest"


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def row_of(run: Path, cell: str) -> dict[str, Any]:
    return next(row for row in rows_of(run) if row["cell"] == cell)


def test_headlines(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["unexpected"] == []
    assert summary["identified_regret"] < 1e-20
    assert len(summary["over_constant"]) == 7  # four kinds of data on the tree, three where the best are not known
    assert all(abs(ratio - 1) < 0.5 for ratio, _ in summary["over_constant"].values())
    assert min(summary["best_data"].values()) == summary["best_data"]["samples/token-tree/best/0.5"] == 1
    assert all(slow > 1 and fast > 1 for slow, fast in summary["b6_over_regret"].values())
    assert summary["verifier_error"] < 1e-12
    assert summary["verifier_spread"]["regret"] < 1e-12
    assert summary["verifier_spread"]["certificate"] > 0.1  # V_θ is off by a/β, which a centred f does not see
    assert summary["verifier_spread"]["centred"] < 1e-9


def test_certificates_are_above_the_regret_and_none_is_left_out(run: Path) -> None:
    """Every run is counted, either with a ratio or among those without a regret."""
    certificates = json.loads((run / "summary.json").read_text())["certificates"]
    expected = {"mixing": 2 * 2 * 3 * 2, "replay": 2 * 2 * 2 * 2, "samples": 14 * 5 * 100, "verifier": 2 * 16}
    assert {part: record["runs"] for part, record in certificates.items()} == expected
    assert certificates["samples"]["exact"] > 1000
    assert certificates["verifier"]["exact"] == 2  # a = b = 0
    for record in certificates.values():
        assert 1 <= record["ratio"][0] <= record["ratio"][1] <= record["ratio"][2]


def test_beside_separates_what_has_no_regret() -> None:
    regret = torch.tensor([1.0, 1e-13, 2.0, 0.0], dtype=torch.float64)
    found = report.beside(regret, torch.tensor([3.0, 1e-6, 1.0, math.inf], dtype=torch.float64))
    assert found == {"runs": 4, "exact": 2, "exact_certificate": math.inf, "ratio": [0.5, 0.5, 3.0], "too_low": 1}
    assert report.beside(regret[1:2], regret[1:2])["ratio"] is None


def test_data_further_from_the_reference_are_worse_and_so_is_no_reuse(run: Path) -> None:
    row = row_of(run, "mixing/combination-lock")
    anti, reference, _ = (values[1] for values in row["regret"]["100"])
    assert reference < 0.1 * anti
    for family in PROBLEMS:
        once, often = (row_of(run, f"replay/{family}/K={k}")["regret"] for k in (1, 4))
        assert all(more[-1] < 0.5 * less[-1] for less, more in zip(once, often, strict=True))


def test_replay_draws_no_older_batch_than_its_age(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row of the run gets trajectories of the last `age` batches, and of all of these."""
    batch, drawn_by, certified = iter(range(100)), [], []  # type: Any, list[Any], list[Any]
    certificate = off_policy._replay_certificate

    def noted(mdp: Any, logits: Any, policies: Any, solution: Any) -> torch.Tensor:
        certified.append(policies)
        return certificate(mdp, logits, policies, solution)

    def numbered(mdp: Any, policy: Any, count: int, generator: Any) -> TrajectoryBatch:
        """The batch's number in place of its actions."""
        drawn_by.append(policy)
        drawn = sample_trajectories(mdp, policy, count, generator)
        return TrajectoryBatch(drawn.states, torch.full_like(drawn.actions, next(batch)), drawn.mask)

    seen: list[torch.Tensor] = []

    def scores(q: Any, reference: Any, reward: Any, data: TrajectoryBatch) -> Any:
        seen.append(data.actions[..., 0])
        clean = TrajectoryBatch(data.states, torch.zeros_like(data.actions), data.mask)
        return table_scores(q, reference, reward, clean)

    table_scores = off_policy.table_scores
    monkeypatch.setattr(off_policy, "PROBLEMS", {"one-state": {"horizon": 2, "actions": 2}})
    monkeypatch.setattr(off_policy, "sample_trajectories", numbered)
    monkeypatch.setattr(off_policy, "table_scores", scores)
    monkeypatch.setattr(off_policy, "_replay_certificate", noted)
    config = off_policy.Config(ages=(1, 3), batches=8, batch_size=16, seeds=2)
    off_policy.replay("one-state", 2, config)
    assert len(seen) == 16
    for update, actions in enumerate(seen):
        newest = update // 2
        for row, age in enumerate((1, 1, 3, 3)):
            oldest = max(0, newest - age + 1)
            assert set(actions[row].tolist()) <= set(range(oldest, newest + 1))
    assert set(seen[-1][2:].flatten().tolist()) == {5, 6, 7}
    for age, policies in zip(
        config.ages, certified, strict=True
    ):  # the certificate is that of the policies in the buffer
        assert all(one is other for one, other in zip(policies, drawn_by[-age:], strict=True))


def test_samples_are_fresh_ones_and_one_percent_is_of_the_start(run: Path) -> None:
    assert off_policy.samples_to_one_percent([0.5, 0.008, 0.005], 32) == 64
    assert off_policy.samples_to_one_percent([0.5, 0.008], 32) is None
    for row in (row for row in rows_of(run) if row["cell"].startswith("replay")):
        assert row["samples"] == [16 * batch for batch in range(21)]  # whatever K is
        for curve, reached in zip(row["regret"], row["reached"], strict=True):
            below = [sample for sample, regret in zip(row["samples"], curve, strict=True) if 100 * regret <= curve[0]]
            assert reached == (below[0] if below else None)


def test_the_certificate_of_replay_is_above_that_with_the_exact_coefficient() -> None:
    """X1's harmonic mean is no less than κ of the mixture, and is it for a single policy."""
    mdp = tt.make("deterministic-dag", seed=0, horizon=3, states=2, actions=2)
    solution = tt.solve(mdp)
    policies = [random_markov(mdp, seed).log_policy for seed in range(3)]
    logits = tuple(table + 0.3 for table in random_markov(mdp, 5).log_policy)
    loose = off_policy._replay_certificate(mdp, logits, policies, solution)
    mixture = MixtureBehaviour((1 / 3,) * 3, tuple(policies))
    exact = bounds.theorem2(mdp, logits, mixture, solution=solution)
    assert exact < loose < 2 * exact
    torch.testing.assert_close(
        off_policy._replay_certificate(mdp, logits, policies[:1], solution),
        bounds.theorem2(mdp, logits, policies[0], solution=solution),
    )


@pytest.mark.parametrize("count", [3, 200])
def test_data_sets_fitted_at_once_are_those_fitted_one_by_one(count: int) -> None:
    """Against `least_squares_plan`, whether or not the data identify the policy."""
    mdp = tt.make("deterministic-dag", seed=1, horizon=3, states=2, actions=2)
    listed, generator = enumerate_trajectories(mdp), torch.Generator().manual_seed(0)
    law = listed.log_law(mdp.log_reference).exp()
    counts = torch.stack(
        [torch.bincount(torch.multinomial(law, count, True, generator=generator), minlength=len(law))] * 2
    )
    weights = counts.to(torch.float64) / count
    shift = torch.randn(weights.shape, generator=generator, dtype=torch.float64)
    loss = ListedLoss.of(mdp, listed, law).under(weights)
    together = off_policy.fitted(mdp, loss, shift)
    batch = TrajectoryBatch(listed.states, listed.actions, torch.ones_like(listed.states, dtype=torch.bool))
    observed = (listed.sum_along(mdp.reward) / mdp.beta + shift) * mdp.beta
    for i in range(2):
        alone = least_squares_plan(SampleObjective(mdp, batch, loss.weights[i], observed[i]))
        for many, one in zip(together, alone, strict=True):
            torch.testing.assert_close(many[i], one, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("cell", "change", "found"),
    [
        ("verifier/token-tree", {"beside": {"too_low": 1}}, "a certificate below the regret"),
        ("samples/token-tree/best/0.5", {"largest": [math.inf] * 5}, "B6 below the regret"),
        ("samples/token-tree/best/0.5", {"slope": [-0.5, -0.6, -0.4]}, "slope"),
        ("samples/token-tree/best/0.5", {"constant": 1e-3}, "of the constant"),
        (
            "samples/token-tree/best/0.5",
            {"mean": [0.0, 0.0, 0.0, 0.0, 1.3 / 4096], "error": [1.0] * 5, "constant": 1.0, "largest": [0.0] * 5},
            "1.300 of the constant",
        ),
        ("samples/token-tree/best/0", {"identified_regret": [None, 1e-6]}, "regret without noise"),
        (
            "verifier/combination-lock",
            {"reports": [{"a": 0, "b": 0, "regret": 1.0, "tempered": 0.5}]},
            "not O7's regret",
        ),
    ],
)
def test_each_verdict_can_turn(run: Path, cell: str, change: dict[str, Any], found: str) -> None:
    rows = rows_of(run)
    assert report.summarise(rows, 0.0)["unexpected"] == []
    row = next(row for row in rows if row["cell"] == cell)
    for key, value in change.items():
        old = row[key]
        if key == "reports":
            value = [value[0] | {"certificate": 1.0, "centred": 1.0}]
        row[key] = old | value if isinstance(value, dict) else value
    [unexpected] = report.summarise(rows, 0.0)["unexpected"]
    assert unexpected.startswith(cell)
    assert found in unexpected


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("distance", (0.0, 1.5)),
        ("distance", ()),
        ("updates", (0,)),
        ("ages", ()),
        ("sizes", (16, 0)),
        ("data_sets", 1),
        ("errors", (1.0,)),
        ("noise", 0.0),
        ("learning_rate", math.inf),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_written(
    setting: str, value: object, tmp_path: Path
) -> None:
    with pytest.raises(tt.InvalidInputError, match=f"{setting}: expected"):
        off_policy.Config(results=tmp_path, **{setting: value})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_figure_is_redrawn_from_the_committed_table_and_plots_its_numbers(tmp_path: Path) -> None:
    figure.main(figure.Options(out=tmp_path))
    assert (tmp_path / "off_policy.pdf").stat().st_size > 10_000
    rows = json.loads((ROOT / "paper_figs" / "data" / "off_policy.json").read_text())
    drawn = figure.draw(rows)
    mixing = [row for row in rows if row["cell"].startswith("mixing")]
    assert len(mixing) == 3
    for row, line in zip(mixing, drawn.axes[0].get_lines()[::2], strict=False):
        assert list(line.get_xdata()) == row["distance"]
        assert list(line.get_ydata()) == [max(values[1] / row["start"], figure.FLOOR) for values in row["regret"]]
    reports = next(row for row in rows if row["cell"] == "verifier/token-tree")["reports"]
    assert list(drawn.axes[3].get_lines()[0].get_ydata()) == [max(r["regret"], figure.FLOOR) for r in reports]


def test_figure_table_is_extracted_from_a_run(run: Path, tmp_path: Path) -> None:
    figure.main(figure.Options(results=run, data=tmp_path, out=tmp_path))
    table = {row["cell"]: row for row in json.loads((tmp_path / "off_policy.json").read_text())}
    means = row_of(run, "samples/token-tree/best/0.5")["mean"]
    assert table["samples/token-tree/best/0.5"]["mean"] == [float(f"{mean:.5g}") for mean in means]
    summary = json.loads((run / "summary.json").read_text())
    for key in ("slope", "over_constant"):  # of every problem, drawn or not
        said = summary["slopes" if key == "slope" else key]
        assert len(said) == 7
        for cell, value in said.items():
            assert table[cell][key] == (None if value is None else [float(f"{x:.5g}") for x in value])
    for cell, reached in summary["replay"].items():
        assert dict(zip(map(str, table[cell]["ages"]), table[cell]["reached"], strict=True)) == reached
    assert len(summary["replay"]) == 4
    assert "regret" not in table["replay/combination-lock/K=1"]
