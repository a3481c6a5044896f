"""X1, X3 and X4 as experiments, small: predictions come about, verdicts can turn, runs resume, figures draw the committed tables."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tbrm_theory import coverage, make
from tbrm_theory.named_behaviours import replay
from tbrm_theory.occupancy import occupancy

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
sys.path.insert(0, str(ROOT / "paper_figs"))

import coverage_horizon  # noqa: E402
import fig_coverage_horizon  # noqa: E402
import fig_mixture_data  # noqa: E402
import fig_uncovered_actions  # noqa: E402
import mixture_data  # noqa: E402
import uncovered_actions  # noqa: E402

FIGURES: dict[str, ModuleType] = {
    "mixture_data": fig_mixture_data,
    "uncovered_actions": fig_uncovered_actions,
    "coverage_horizon": fig_coverage_horizon,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a small run of each."""
    results = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture_data, "SETTINGS", ((2, 1, 2, 1.0), (3, 2, 2, 0.3)))
        patch.setattr(uncovered_actions, "FAMILIES", {"combination-lock": {"horizon": 3}})
        patch.setattr(uncovered_actions, "WEIGHTS", (1e-6, 1 / 3))
        patch.setattr(uncovered_actions, "MASSES", (0.3, 1e-2, 1e-3, 1e-4, 1e-5, 0.0))
        config = mixture_data.Config(halvings=6, seeds=1, shares=2, data_sets=2, mixtures=40, results=results)
        assert mixture_data.main(config) == 0
        assert uncovered_actions.main(uncovered_actions.Config(seeds=1, data_sets=2, results=results)) == 0
    assert coverage_horizon.main(coverage_horizon.Config(longest=8, ways_back=(0.5,), results=results)) == 0
    return {name: results / name / "latest" for name in FIGURES}


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: math.inf if value == "inf" and key != "fraction" else value for key, value in row.items()} for row in rows
    ]


def summary_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text())


def test_headlines(runs: dict[str, Path]) -> None:
    mixtures, omitted, growth = (summary_of(runs[name]) for name in FIGURES)
    assert mixtures["kappa_at_1_64"] == "2111/63"
    assert mixtures["flip_0"]["loss"] < 1e-20
    assert max(mixtures["flip_0"]["regret"]) > 1e-3
    assert mixtures["flip_0"]["brm_regret"] < 1e-6
    assert mixtures["flips_exact"] == "6 of 6"
    assert mixtures["largest_error"] < 1e-12
    assert mixtures["bound_fails_by"][0] > 2
    assert mixtures["lemma1_fails"]["H=2 S=1 K=2 a=1"]["share"] > 0.3
    assert omitted["zero_loss_at_regret"] == "1 of 1"
    assert omitted["least_regret_at_infinite_kappa"] < 1e-6 < 1 < omitted["largest_regret_at_infinite_kappa"]
    assert omitted["kappa_exponent"] == pytest.approx(-1, abs=0.01)
    assert omitted["condition_exponent"] == pytest.approx(-1, abs=0.01)
    assert omitted["largest_scaled_condition"] == pytest.approx(4, rel=1e-9)
    assert growth["bits_per_step"]["lock c=1"] == pytest.approx(1, abs=1e-9)
    assert growth["exponent"]["one state c=0.1"] == pytest.approx(1, abs=1e-9)
    assert growth["corollary6_over_kappa"]["tree c=0.1"] > 10


@pytest.mark.parametrize(
    ("name", "cell", "change", "verdict"),
    [
        ("mixture_data", "flip 0", {"loss": [1e-9]}, "UNEXPECTED"),
        ("mixture_data", "flip 0", {"regret": [1.0, 1e-9]}, "UNEXPECTED"),
        ("mixture_data", "flip 0", {"brm_regret": [1e-3]}, "UNEXPECTED"),
        ("mixture_data", "flip 0", {"brm_at_tbrm": [1e-9]}, "UNEXPECTED"),
        ("mixture_data", "flip 2^-6", {"regret": [0.0, 1e-9]}, "UNEXPECTED"),
        ("mixture_data", "flip 2^-6", {"kappa": 33.0}, "UNEXPECTED"),
        ("mixture_data", "flip 2^-6", {"harmonic": 33.0}, "UNEXPECTED"),
        ("mixture_data", "deterministic seed 0 share 1", {"regret": [1e-9]}, "UNEXPECTED"),
        ("mixture_data", "deterministic seed 0 share 0", {"regret": [1e-9]}, "UNEXPECTED"),
        ("mixture_data", "H=2 S=1 K=2 a=1", {"bound_fails": 1}, "UNEXPECTED"),
        ("uncovered_actions", "combination-lock seed 0", {"regret": [1e-9]}, "UNEXPECTED"),
        ("uncovered_actions", "combination-lock seed 0", {"kappa": 7.0}, "UNEXPECTED"),
        ("uncovered_actions", "worse, reference 0.333", {"worthless_regret": 0.5}, "UNEXPECTED"),
        ("uncovered_actions", "worse, reference 0.333", {"supremum": 1e-3}, "UNEXPECTED"),
        ("uncovered_actions", "m = 0.01", {"fixed_error_bound": 1e-3}, "UNEXPECTED"),
        ("uncovered_actions", "m = 0", {"kappa": 7.0}, "UNEXPECTED"),
        ("coverage_horizon", "tree c=1", {"error_solved": 1e-9}, "WRONG"),
        ("coverage_horizon", "lock c=1", {"closed": [1.0 + h for h in range(8)]}, "WRONG SLOPE"),
        ("coverage_horizon", "leaky lock c=1 way back 0.5", {"closed": [2.0**h for h in range(1, 9)]}, "NOT LINEAR"),
    ],
)
def test_each_verdict_can_turn(
    runs: dict[str, Path], name: str, cell: str, change: dict[str, Any], verdict: str
) -> None:
    module = {"mixture_data": mixture_data, "uncovered_actions": uncovered_actions}.get(name, coverage_horizon)
    [row] = [row for row in rows_of(runs[name]) if row["cell"] == cell]
    assert module.verdict(row) == row["verdict"]
    assert not row["verdict"].isupper()
    doctored = {**row, **change}
    assert module.verdict(doctored) == verdict


def test_an_interrupted_run_goes_on_to_the_same_numbers(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = coverage_horizon.Config(longest=8, ways_back=(0.5,), results=tmp_path)
    original, made = coverage_horizon.run_cell, []

    def interrupted(cell: Any, longest: int) -> dict[str, Any]:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(cell.name)
        return original(cell, longest)

    with monkeypatch.context() as patch:
        patch.setattr(coverage_horizon, "run_cell", interrupted)
        assert coverage_horizon.main(config) == 130
    assert len(rows_of(tmp_path / "coverage_horizon" / "latest")) == 3
    assert coverage_horizon.main(config) == 0
    assert rows_of(tmp_path / "coverage_horizon" / "latest") == rows_of(runs["coverage_horizon"])


def test_an_unexpected_row_is_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage_horizon, "ERROR", -1.0)
    config = coverage_horizon.Config(longest=3, chi_squares=(1.0,), ways_back=(), results=tmp_path)
    assert coverage_horizon.main(config) == 1
    assert summary_of(tmp_path / "coverage_horizon" / "latest")["verdict"] == "NOT as predicted"


def test_the_markov_policy_has_the_mixture_s_occupancies() -> None:
    """So Lemma 1's right side is that of the mixture, and κ is not."""
    mdp = make("deterministic-dag", seed=3, horizon=3, states=3, actions=2)
    mixture = replay(mdp, 1, count=3)
    markov = mixture_data.same_occupancies(mdp, mixture)
    parts = [(w, occupancy(mdp, policy).state_action) for w, policy in mixture.components]
    for h, mass in enumerate(occupancy(mdp, markov).state_action):
        assert torch.allclose(mass, sum(w * tables[h] for w, tables in parts), rtol=1e-13, atol=1e-16)
    target = mdp.log_reference
    for share in (0.0, 0.4, 1.0):
        data = mixture_data.between(mdp, mixture, share)
        assert coverage.lemma1(mdp, target, data).item() == pytest.approx(
            coverage.lemma1(mdp, target, mixture).item(), rel=1e-12
        )


# -- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_redrawn_from_the_committed_tables(name: str, tmp_path: Path) -> None:
    FIGURES[name].main(FIGURES[name].Options(out=tmp_path))
    assert (tmp_path / f"{name}.pdf").stat().st_size > 10_000
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", FIGURES)
def test_figure_tables_are_extracted_from_a_run(name: str, runs: dict[str, Path], tmp_path: Path) -> None:
    FIGURES[name].main(FIGURES[name].Options(results=runs[name], data=tmp_path, out=tmp_path))
    table = json.loads((tmp_path / f"{name}.json").read_text())
    assert [row["cell"] for row in table] == [row["cell"] for row in rows_of(runs[name])]


def committed(name: str) -> list[dict[str, Any]]:
    return json.loads((ROOT / "paper_figs" / "data" / f"{name}.json").read_text())


def plotted(axis: Any, label: str) -> list[float]:
    [line] = [line for line in axis.get_lines() if line.get_label() == label]
    return list(line.get_ydata())


def test_what_is_plotted_is_what_is_committed() -> None:
    rows = committed("mixture_data")
    flips = sorted((row for row in rows if row["kind"] == "flip" and row["flip"] > 0), key=lambda row: row["flip"])
    axes = fig_mixture_data.draw(rows).axes
    assert plotted(axes[0], "κ, exact: 1 + 1/(2p(1-p))") == [row["kappa"] for row in flips]
    counts = [row for row in rows if row["kind"] == "random mixtures"]
    widths = [bar.get_width() for bar in axes[3].containers[1]]
    assert widths == [row["lemma1_fails"] / row["mixtures"] for row in counts]

    rows = committed("uncovered_actions")
    masses = [row for row in rows if row["kind"] == "masses" and row["mass"] > 0]
    axes = fig_uncovered_actions.draw(rows).axes
    assert plotted(axes[2], "κ(π*, μ)") == [row["kappa"] for row in masses]
    weights = [row for row in rows if row["kind"] == "weights" and row["reward"] == "better"]
    assert plotted(axes[1], "omitted one better") == [row["regret_from_reference"] for row in weights]

    rows = committed("coverage_horizon")
    axes = fig_coverage_horizon.draw(rows).axes
    assert plotted(axes[0], "tree, c = 1") == next(row["kappa"] for row in rows if row["cell"] == "tree c=1")
