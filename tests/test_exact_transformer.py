"""The run `exact_cpu` at toy size, end to end: it reaches the exact optimum, its data are what it says, and it survives a kill."""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import yaml
from tiny_language_models import language_model_test, own_randomness  # noqa: F401 - a fixture
from transformers import LlamaForCausalLM

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
sys.path.insert(0, str(ROOT / "paper_figs"))

import exact_transformer as experiment  # noqa: E402
import fig_exact_cpu  # noqa: E402
import llm_run  # noqa: E402

import tbrm_theory as tt  # noqa: E402
from tbrm_theory.llm.run_files import read_settings  # noqa: E402
from tbrm_theory.llm.trainer import TBRMTrainer  # noqa: E402
from tbrm_theory.llm.trainer_state import last_checkpoint  # noqa: E402
from tbrm_theory.losses import tbrm_loss  # noqa: E402
from tbrm_theory.scores import table_scores  # noqa: E402
from tbrm_theory.trajectories import trajectory_return  # noqa: E402

pytestmark = [*language_model_test, pytest.mark.slow]

TOY = experiment.Config(
    prompts=("0", "11"),
    digits=2,
    horizon=2,
    hidden_size=32,
    intermediate_size=32,
    layers=2,
    heads=2,
    initializer_range=0.1,
    beta=0.3,
    steps=40,
    batch_size=48,
    learning_rate=0.01,
    warmup_steps=4,
    replay_capacity=96,
    evaluations=4,
    checkpoint_every=10,
    target=0.5,
)


def rows_of(results: Path) -> dict[str, dict[str, Any]]:
    text = (results / "exact_cpu" / "latest" / "metrics.jsonl").read_text()
    return {row["cell"]: row for row in map(json.loads, text.splitlines())}


def summary_of(results: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((results / "exact_cpu" / "latest" / "summary.json").read_text())
    return summary


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one toy run, from its YAML file through the entry point of all runs."""
    folder = tmp_path_factory.mktemp("results")
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(TOY).items()}
    (folder / "toy.yaml").write_text(yaml.safe_dump({"run": "exact"} | given | {"results": str(folder)}))
    with torch.random.fork_rng():
        assert llm_run.main(["--config", str(folder / "toy.yaml")]) == 0
    return folder


def test_the_transformer_reaches_the_optimum_of_its_own_tree(results: Path) -> None:
    summary = summary_of(results)
    assert summary["verdict"] == "as predicted"
    for phase in ("on_policy", "off_policy", "replay"):
        assert 0 < summary[f"regret_fraction_{phase}"] < TOY.target
    assert summary["vocabulary"] == 5
    assert summary["horizon"] == 2
    assert min(summary["early_end"]) > 0
    assert summary["samples"] == 48 * (40 + 40 + 20)
    assert all(bound > 0 for bound in summary["certificate"].values())


def test_every_key_of_the_summary_is_explained(results: Path) -> None:
    for key in summary_of(results):
        assert f"`{key}`" in (experiment.__doc__ or ""), key


def test_the_curves_begin_at_the_reference(results: Path) -> None:
    rows = rows_of(results)
    initial = rows["tree"]["initial_regret"]
    for phase in experiment.PHASES:
        assert rows[phase]["step"] == [0, 10, 20, 30, 40]
        for cell in (phase, f"table/{phase}"):
            assert rows[cell]["regret"][0] == pytest.approx(initial, rel=1e-6)
            assert rows[cell]["regret"][-1] < initial


def test_a_regret_above_the_target_is_unexpected(results: Path) -> None:
    rows = list(rows_of(results).values())
    strict = experiment.summarise(1e-9, rows, 0.0)
    assert [line.split(":")[0] for line in strict["unexpected"]] == list(experiment.PHASES)
    small = [row | {"initial_regret": 0.1} if row["cell"] == "tree" else row for row in rows]
    assert (
        "the initial regret is 10.0% of the reward's range"
        in experiment.summarise(TOY.target, small, 0.0)["unexpected"]
    )
    silent = [row | {"early_end": [0.0, 0.1]} if row["cell"] == "tree" else row for row in rows]
    assert experiment.summarise(TOY.target, silent, 0.0)["unexpected"] == ["no response ends early"]
    loose = [row | {"certificate": 0.0} if row["cell"] == "replay" else row for row in rows]
    assert experiment.summarise(TOY.target, loose, 0.0)["unexpected"] == ["replay: certificate below the regret"]


def test_the_figure_draws_the_runs_table(results: Path) -> None:
    drawn = fig_exact_cpu.extract(list(rows_of(results).values()))
    figure = fig_exact_cpu.draw(drawn)
    for axis, phase in zip(figure.axes, experiment.PHASES, strict=True):
        table, transformer, target = (np.asarray(line.get_ydata()).tolist() for line in axis.lines)
        by_cell = {row["cell"]: row for row in drawn}
        assert transformer == by_cell[phase]["share"]
        assert table == by_cell[f"table/{phase}"]["share"]
        assert target == [0.02, 0.02]
    plt.close(figure)


# -- where the data come from ----------------------------------------------------------------------------------------


class Watched(TBRMTrainer):
    """Keeps the rows that its losses read, the values, and the policy's own probabilities of that moment."""

    problem: experiment.Problem
    seen: list[dict[str, Any]]

    def _compute_loss(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = super()._compute_loss(model, inputs)
        self.seen.append({"inputs": inputs, "loss": loss.item(), "logits": self.problem.tree.logits(model)})
        return loss


@pytest.mark.parametrize("phase", experiment.PHASES)
def test_the_trainers_loss_is_that_of_the_table_on_its_own_samples(
    phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer's rows, as trajectories of the tree, give the tabular loss of the model's logits: the same function, two roads."""
    problem = experiment.Problem(replace(TOY, steps=4, batch_size=24, evaluations=1, checkpoint_every=4))
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(experiment, "TBRMTrainer", Watched)
    monkeypatch.setattr(Watched, "problem", problem, raising=False)
    monkeypatch.setattr(Watched, "seen", seen, raising=False)
    experiment.train(problem, phase, tmp_path)
    assert len(seen) == 4
    for entry in seen:
        inputs = entry["inputs"]
        prompts, responses = (
            [ids[mask.bool()].tolist() for ids, mask in zip(inputs[f"{part}_ids"], inputs[f"{part}_mask"], strict=True)]
            for part in ("prompt", "completion")
        )
        batch = problem.tree.trajectories(prompts, responses)
        scores = table_scores(entry["logits"], problem.mdp.log_reference, problem.mdp.reward, batch)
        assert entry["loss"] == pytest.approx(tbrm_loss(scores, beta=TOY.beta).item(), rel=1e-4)
        assert scores.trajectory_return.tolist() == inputs["trajectory_return"].tolist()
    assert not all(map(torch.equal, seen[0]["logits"], seen[-1]["logits"]))  # it has learned in between


@pytest.mark.parametrize(("phase", "sampler"), [("on-policy", "policy"), ("off-policy", "reference")])
def test_who_writes_the_responses(phase: str, sampler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The off-policy run asks the reference alone for responses; the policy is far from it here."""
    problem = experiment.Problem(replace(TOY, steps=3, batch_size=24, evaluations=1))
    asked: list[Any] = []
    own = LlamaForCausalLM.generate

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(self)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)
    trainers: list[TBRMTrainer] = []

    class Kept(TBRMTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            trainers.append(self)

    monkeypatch.setattr(experiment, "TBRMTrainer", Kept)
    experiment.train(problem, phase, tmp_path)
    (trainer,) = trainers
    expected = trainer.model if sampler == "policy" else trainer.ref_model
    assert len(asked) == 3
    assert all(model is expected for model in asked)
    initial = problem.model().state_dict()
    assert all(torch.equal(value, initial[name]) for name, value in trainer.ref_model.state_dict().items())
    assert not all(torch.equal(value, initial[name]) for name, value in trainer.model.state_dict().items())


def test_the_reward_of_sampled_ids_is_that_of_the_tree() -> None:
    """Digits d are the tokens d + 2; the end is 1, padding 0, the mark 5."""
    problem = experiment.Problem(replace(TOY, prompts=("0", "12", "21"), digits=3, horizon=3))
    paid = {
        (4, 2, 1): [1.0, 1.0, 0.0],  # "20" and the end
        (3, 1): [0.0, 0.0, 1.0],
        (1,): [0.0, 0.0, 0.0],
        (2, 4, 4): [0.0, 0.0, 0.0],  # truncated
        (2, 0, 1): [0.0, 0.0, 0.0],
        (2, 5, 1): [0.0, 0.0, 0.0],
    }
    for ids, expected in paid.items():
        assert problem.score(problem.texts, [list(ids)] * 3) == expected
        batch = problem.tree.trajectories(problem.tree.prompts, [ids] * 3)
        assert trajectory_return(problem.mdp, batch).tolist() == expected


def test_no_two_states_are_one_text() -> None:
    """What the mark is for: no prompt begins another one."""
    problem = experiment.Problem(experiment.Config())
    for i, prompt in enumerate(problem.tree.prompts):
        assert not any(prompt[: len(other)] == other for j, other in enumerate(problem.tree.prompts) if j != i)


def test_without_the_mark_a_text_of_one_digit_is_read_the_same_at_any_length() -> None:
    """Attention averages equal values, and rotary positions are in the weights of the average alone."""
    model = experiment.Problem(experiment.Config()).model().double()

    def last(*tokens: int) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=torch.tensor([tokens])).logits[0, -1]
        return logits

    torch.testing.assert_close(last(3, 3, 3), last(3), rtol=1e-12, atol=1e-12)
    mark = experiment.Problem(experiment.Config()).tree.vocabulary - 1
    assert (last(3, mark, 3, 3) - last(3, mark, 3)).abs().max() > 1e-3


# -- interruptions -----------------------------------------------------------------------------------------------------


def test_a_run_killed_inside_a_part_goes_on_to_the_same_numbers(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 in the middle of the last of the three runs; complete parts are not repeated (test_llm_training.py resumes others)."""
    config = replace(TOY, results=tmp_path)
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit the locks of threads that it does not have
    child = spawn.Process(target=experiment.main, args=(config,))
    child.start()
    deadline = time.monotonic() + 300
    wanted = "exact_cpu/*/checkpoints/replay/checkpoint-20/tbrm_state_0.safetensors"
    while not list(tmp_path.glob(wanted)) and child.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert child.is_alive(), "it ended before it could be killed"
    child.kill()
    child.join()
    assert list(rows_of(tmp_path)) == ["tree", "on-policy", "off-policy"]
    trained: list[int] = []
    own = TBRMTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        trained.append(self.state.global_step)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(TBRMTrainer, "training_step", training_step)
    assert experiment.main(config) == 0
    assert trained[0] >= 20  # of the last of the three runs, the only one left
    assert trained == list(range(trained[0], TOY.steps))
    assert len([path for path in (tmp_path / "exact_cpu").iterdir() if not path.is_symlink()]) == 1
    interrupted, whole = rows_of(tmp_path), rows_of(results)
    assert list(interrupted) == list(whole)
    for cell, row in whole.items():
        assert interrupted[cell] | {"seconds": None} == row | {"seconds": None}


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path, before=200) is None
    for step in (9, 80, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (9, 80):
        (tmp_path / f"checkpoint-{step}" / "tbrm_state_0.safetensors").touch()
    assert last_checkpoint(tmp_path, before=200) == str(tmp_path / "checkpoint-80")
    assert last_checkpoint(tmp_path, before=80) == str(tmp_path / "checkpoint-9")
    assert last_checkpoint(tmp_path, before=200, processes=2) is None
    (tmp_path / "checkpoint-9" / "tbrm_state_1.safetensors").touch()
    assert last_checkpoint(tmp_path, before=200, processes=2) == str(tmp_path / "checkpoint-9")
    assert last_checkpoint(tmp_path, before=200, own=False) is None
    (tmp_path / "checkpoint-100" / "trainer_state.json").touch()
    assert last_checkpoint(tmp_path, before=200, own=False) == str(tmp_path / "checkpoint-100")


# -- settings ------------------------------------------------------------------------------------------------------------


def test_the_committed_settings_are_of_the_size_that_was_asked_for() -> None:
    given = yaml.safe_load((ROOT / "experiments" / "configs" / "exact_cpu.yaml").read_text())
    assert given.pop("run") == "exact"
    assert given.keys() <= {field.name for field in fields(experiment.Config)}
    config = read_settings(["--config", str(ROOT / "experiments/configs/exact_cpu.yaml")], experiment.Config)
    problem = experiment.Problem(config)
    assert problem.tree.vocabulary >= 8
    assert problem.tree.horizon >= 5
    assert len(problem.tree.prompts) >= 4
    assert config.target <= 0.02
    assert config.batch_size % len(config.prompts) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ("0", "7")}, r"prompts\[1\]: expected digits of 01"),
        ({"prompts": ("",)}, r"prompts\[0\]: expected digits"),
        ({"digits": 11}, "digits: expected at most 10"),
        ({"steps": 0}, "steps: expected at least 1"),
    ],
)
def test_malformed_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(tt.InvalidInputError, match=f"^{message}"):
        replace(TOY, **change)
