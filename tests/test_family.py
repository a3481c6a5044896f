"""The experiment of the family, small; what each loss consumes; interquartile means and their intervals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from tbrm_theory import losses
from tbrm_theory.aggregates import interquartile_mean, stratified_interval
from tbrm_theory.consumption import consumption
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.family_training import Curves, Plan, Point, trained_besides
from tbrm_theory.losses import LOSSES

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
sys.path.insert(0, str(ROOT / "paper_figs"))

import family  # noqa: E402
import fig_family  # noqa: E402
from table_figure import Options  # noqa: E402

SMALL = family.Config(
    updates=8,
    prompts=4,
    evaluations=4,
    rate_count=2,
    seeds=4,
    problems=("combination-lock", "merged-dag"),
    methods=("trajectory-balance", "vargrad"),
)


# -- interquartile means --------------------------------------------------------------------------------------------


def test_interquartile_mean_is_the_mean_of_the_middle_half() -> None:
    scores = np.random.default_rng(0).exponential(size=(3, 7, 2))
    for k in range(2):
        ordered = sorted(scores[..., k].flatten().tolist())
        assert float(interquartile_mean(scores)[k]) == pytest.approx(sum(ordered[5:16]) / 11, rel=1e-14)
    np.testing.assert_allclose(interquartile_mean(scores), scipy.stats.trim_mean(scores.reshape(21, 2), 0.25))


def test_the_interval_is_that_of_a_plain_bootstrap() -> None:
    """SciPy's percentile interval of one problem; both are random, to about 2 % of the width."""
    runs = np.random.default_rng(1).exponential(size=20)
    low, high = stratified_interval(runs[None], seed=0, resamples=20_000)
    plain = scipy.stats.bootstrap(
        (runs,),
        lambda x, axis: scipy.stats.trim_mean(x, 0.25, axis=axis),
        n_resamples=20_000,
        method="percentile",
        random_state=np.random.default_rng(2),
    ).confidence_interval
    width = plain.high - plain.low
    assert abs(float(low) - plain.low) < 0.05 * width
    assert abs(float(high) - plain.high) < 0.05 * width


def test_problems_are_not_drawn_anew() -> None:
    """Runs that agree within each problem leave nothing to chance, however far the problems are apart."""
    scores = np.repeat([[0.0], [1.0], [10.0]], 5, axis=1)
    low, high = stratified_interval(scores, seed=0)
    assert float(low) == float(high) == float(interquartile_mean(scores))


@pytest.mark.parametrize("scores", [np.zeros(3), np.zeros((2, 0)), np.full((1, 4), np.inf)])
def test_scores_that_say_nothing_are_refused(scores: Any) -> None:
    with pytest.raises(InvalidInputError, match="scores"):
        interquartile_mean(scores)


# -- Table 2 of [Y] -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_consumes_what_it_declares(loss: str) -> None:
    found = consumption(loss)
    assert found.fields == set(LOSSES[loss].fields)
    gradients = {"reinforce", "rloo", "grpo", "dr-grpo", "dapo", "ppo"}
    assert found.regression == (loss not in gradients)
    steps = {"brm", "ppo", *(name for name in LOSSES if name.startswith(("sql", "pcl")))}
    assert found.trajectory_reward == (loss not in steps)
    alone = {"tbrm", "tbrm-first-logit", "reval", "brm", "sql-multi-step-q", "reinforce"}
    assert (found.single_model and found.single_rollout) == (loss in alone)


@pytest.mark.parametrize(
    ("loss", "models", "passes"),
    [
        ("tbrm", ("policy", "reference"), 1),
        ("tbrm-iterative", ("policy", "reference", "frozen copy"), 1),
        ("ppo", ("policy", "reference", "second model"), 2),
        ("dro", ("policy", "reference", "second model"), 2),
        ("a-star-po", ("policy", "reference", "reference rollouts"), 1),
        ("dapo", ("policy",), 1),
    ],
)
def test_models_and_backward_passes(loss: str, models: tuple[str, ...], passes: int) -> None:
    found = consumption(loss)
    assert found.models == models
    assert found.backward_passes == passes


def test_another_loss_under_a_name_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "tbrm", replace(LOSSES["tbrm"], function=losses.dro_loss))
    monkeypatch.setattr(family, "LOSSES", {"tbrm": LOSSES["tbrm"], "brm": LOSSES["brm"]})
    assert family.measured()["undeclared"] == ["tbrm"]


# -- the experiment -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("results")
    assert family.main(replace(SMALL, results=results)) == 0
    return results / "family" / "latest"


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_summary_and_its_explanation(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["unexpected"] == []
    for key in summary:
        assert f"`{key}`" in (family.__doc__ or ""), key
    assert set(summary["final"]) == {"1", "4"}
    assert set(summary["final"]["1"]["merged-dag"]) == {"trajectory-balance"}  # VarGrad compares rollouts
    assert summary["same_as"]["rloo"][1] < 1e-9
    assert summary["same_as"]["reval"][1] is None  # TBRM is not in this run


def test_every_method_has_the_same_number_of_points() -> None:
    counts = {len(family.grid(method, family.Config())) for method in family.COEFFICIENTS}
    assert counts == {15}
    for method in family.COEFFICIENTS:
        rates = {rate for rate, _ in family.grid(method, family.Config())}
        assert min(rates) == pytest.approx(0.01)
        assert max(rates) == pytest.approx(1.0)


def test_every_method_tunes_the_one_coefficient_that_it_has() -> None:
    for method, coefficient in family.COEFFICIENTS.items():
        fields = LOSSES[method].fields
        has = {
            family.REFRESH: any(name.startswith("frozen") for name in fields),
            family.COMPANION: bool(trained_besides(method)),
            family.ROLLOUTS: "baseline" in fields and not trained_besides(method),
            family.TEMPERATURE: method in ("grpo", "dr-grpo"),
        }
        assert [name for name, there in has.items() if there] == ([coefficient[0]] if coefficient else []), method
        for rate, value in family.grid(method, family.Config()):
            plain = Point(rate) if coefficient is None else replace(Point(rate), **{coefficient[0]: value})
            assert family.as_point(method, rate, value) == plain


@pytest.mark.parametrize(("winner", "edges"), [((1.0, 3.0), (True, False)), ((0.1, 10.0), (False, True))])
def test_the_middle_half_of_other_seeds_decides_and_the_reported_ones_have_no_say(
    winner: tuple[float, float], edges: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On curves made up: the winner has the least interquartile mean, not the least mean nor the luckiest seed."""
    calls: list[tuple[set[int], Plan]] = []

    def train(mdp: Any, loss: str, points: Any, seeds: Any, plan: Plan) -> Curves:
        calls.append((set(seeds), plan))
        settings = [(point.learning_rate, point.companion_rate) for point in points]
        if len(points) > 1:
            shares = [[0.1, 0.2, 0.2, 90.0] if pytest.approx(s) == winner else [0.0, 0.3, 0.3, 0.3] for s in settings]
            regret = torch.stack([torch.ones(len(points), 4), torch.tensor(shares)], dim=-1)
            return Curves(torch.tensor([0, 8]), torch.zeros(len(points), 2, dtype=torch.int64), 2 * regret.double())
        assert settings == [pytest.approx(winner)]
        curve = [[1.0, 0.0, 0.0, 0.4], [1.0, 0.01, 0.02, 0.1], [1.0, 0.02, 0.0, 0.3], [1.0, 0.5, 0.01, 9.0]]
        samples = torch.tensor([[5, 105, 205, 305]])
        return Curves(torch.arange(4), samples, 2 * torch.tensor([curve], dtype=torch.float64))

    monkeypatch.setattr(family, "train", train)
    row = family.tuned("merged-dag", "trajectory-balance", 4, replace(SMALL, rate_count=3))
    assert row["winner"] == pytest.approx(list(winner))
    assert (row["at_edge"], row["coefficient_at_edge"]) == edges
    assert row["share"] == pytest.approx([1.0, 0.015, 0.005, 0.35])
    assert row["samples_to_one_percent"] == 205
    assert row["finals"] == pytest.approx([0.4, 0.1, 0.3, 9.0])
    assert row["initial_regret"] == 2.0
    [(tuning, first), (reported, second)] = calls
    assert len(tuning) == len(reported) == 4
    assert not tuning & reported
    assert replace(first, evaluations=second.evaluations) == second


def test_over_all_problems_it_is_the_middle_half_of_all_runs() -> None:
    finals = {"one": [0.0, 0.1, 0.2, 0.3], "other": [0.25, 0.26, 5.0, 90.0]}
    runs = [{"n": 1, "method": "tbrm", "problem": name, "finals": row} for name, row in finals.items()]
    runs += [{"n": 4, "method": "tbrm", "problem": "one", "finals": [1.0] * 4}]
    found = family.overall(runs)
    middle, low, high = found["1"]["tbrm"]
    assert middle == pytest.approx((0.2 + 0.25 + 0.26 + 0.3) / 4)
    assert low < middle < high
    assert found["4"]["tbrm"] == [1.0, 1.0, 1.0]


def test_the_quick_slice_is_one_of_the_whole() -> None:
    quick, whole = family.Config(quick=True), family.Config()
    assert set(family.cells(quick)) < set(family.cells(whole))
    assert {name.split("/")[1] for name in family.cells(quick) if "/" in name} == {
        "modular-arithmetic",
        "combination-lock",
    }
    assert quick.plan(4) == replace(whole.plan(4), updates=whole.updates // 3)


def test_every_loss_is_a_method_or_the_same_as_one() -> None:
    assert sorted([*family.COEFFICIENTS, *family.SAME]) == sorted(LOSSES)


def test_winner_and_curve_are_those_of_the_grid(run: Path) -> None:
    for row in rows_of(run):
        if row["cell"].startswith("tuned"):
            rate, coefficient, score = min(row["grid"], key=lambda point: point[2])
            assert row["winner"] == [rate, coefficient]
            assert row["share"][0] == 1.0
            assert row["low"][-1] <= row["share"][-1] <= row["high"][-1]
            assert row["samples"][-1] == 8 * 4 * row["n"]
            assert score <= 1.5 * row["share"][-1]  # other seeds, the same problem


@pytest.mark.slow
def test_the_quick_slice_runs_as_a_program(tmp_path: Path) -> None:
    program = [sys.executable, str(ROOT / "experiments" / "family.py"), "--quick", "--results", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "family" / "latest" / "summary.json").read_text())
    assert summary["verdict"] == "as predicted"
    assert set(summary["final"]["4"]) == {"modular-arithmetic", "combination-lock"}
    for by_method in summary["final"]["4"].values():
        assert {"tbrm", "grpo"} <= set(by_method)
        assert all(low <= middle <= high for middle, low, high in by_method.values())


def test_a_finished_part_is_not_run_again(run: Path) -> None:
    before = (run / "metrics.jsonl").read_text()
    lines = before.splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-2]))
    (run / "summary.json").unlink()
    assert family.main(replace(SMALL, results=run.parents[1])) == 0
    assert (run / "metrics.jsonl").read_text() == before  # the two that were missing, to the last bit


@pytest.mark.parametrize(
    ("prefix", "change", "what"),
    [
        ("same/merged-dag/4/rloo", {"difference": 1e-3}, "same/merged-dag/4/rloo: 1.0e-03"),
        ("same/merged-dag/4/rloo", {"moved": 0.0}, "same/merged-dag/4/rloo: nothing moved"),
        (
            "tuned/merged-dag/4/vargrad",
            {"share": [1.0, 1.2]},
            "tuned/merged-dag/4/vargrad: no better than the reference",
        ),
        ("consumption", {"undeclared": ["ppo"]}, "ppo: consumes other scores than it declares"),
    ],
)
def test_other_results_are_unexpected(prefix: str, change: dict[str, Any], what: str, run: Path) -> None:
    rows = [row | change if row["cell"] == prefix else row for row in rows_of(run)]
    assert family.summarise(rows, SMALL, 0.0)["unexpected"] == [what]


@pytest.mark.parametrize(
    ("problem", "method", "promised"),
    [
        ("merged-dag", "brm", True),
        ("frozen-lake", "brm", False),
        ("frozen-lake", "tbrm", True),
        ("frozen-lake", "sql-multi-step", True),
        ("merged-dag", "dapo", False),
    ],
)
def test_who_must_end_better_than_the_reference(problem: str, method: str, promised: bool) -> None:
    assert family.must_learn({"problem": problem, "method": method}) is promised


def test_who_ends_no_better_is_listed(run: Path) -> None:
    change = {"share": [1.0, 1.2], "method": "dapo"}
    cell = "tuned/merged-dag/4/vargrad"
    rows = [row | change if row["cell"] == cell else row for row in rows_of(run)]
    summary = family.summarise(rows, SMALL, 0.0)
    assert (summary["no_better"], summary["unexpected"]) == (["merged-dag/4/vargrad"], [])


def test_a_comparison_that_was_not_run_is_unexpected(run: Path) -> None:
    rows = [row for row in rows_of(run) if row["cell"] != "same/merged-dag/4/rloo"]
    assert family.summarise(rows, SMALL, 0.0)["unexpected"] == ["same/merged-dag/4/rloo: not run"]


def test_methods_that_are_not_one_give_other_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(family.SAME, "kimi", ("vargrad", lambda beta: 1.0))
    row = family.compared("merged-dag", "kimi", 4, replace(SMALL, updates=40))
    assert row["difference"] > 1e3 * family.SAME_CURVES


@pytest.mark.parametrize(
    ("change", "field"),
    [({"problems": ("nowhere",)}, "problems"), ({"seeds": 3}, "seeds"), ({"rates": (1.0, 0.1)}, "rates")],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        replace(SMALL, **change)


# -- the figure -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_table_is_extracted_and_drawn(run: Path, tmp_path: Path) -> None:
    fig_family.main(Options(results=run, data=tmp_path, out=tmp_path))
    rows = json.loads((tmp_path / "family.json").read_text())
    assert len(rows) == 2 * 3 + 3  # curves, and what is over all problems
    drawn = fig_family.draw(rows)
    lines = {line.get_label(): line for line in drawn.axes[0].get_lines()}
    assert np.asarray(lines["TB = DRO"].get_ydata()).tolist() == rows[0]["share"]


@pytest.mark.slow
def test_the_figure_is_redrawn_from_the_committed_table(tmp_path: Path) -> None:
    assert torch.get_default_dtype() == torch.float32
    fig_family.main(Options(out=tmp_path))
    assert (tmp_path / "family.pdf").stat().st_size > 10_000
