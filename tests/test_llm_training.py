"""Runs of an LLM file: judged without being disturbed, measured part by part, resumed, summed up."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.llm import part_timer, pretraining, run_training
from tbrm_theory.llm.judging import Judge, Judgement, responses
from tbrm_theory.llm.methods import trainer_class
from tbrm_theory.llm.part_timer import PARTS
from tbrm_theory.llm.peak_memory import PeakMemory
from tbrm_theory.llm.run_files import read_runs
from tbrm_theory.llm.run_parts import build_dataset, build_model
from tbrm_theory.llm.timed import timed
from tbrm_theory.statistics import bootstrap_interval
from tests.tiny_language_models import language_model, language_model_test, own_randomness, tokenizer  # noqa: F401

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
sys.path.insert(0, str(ROOT / "paper_figs"))

import fig_llm_run  # noqa: E402
import llm_training  # noqa: E402
from table_figure import Options  # noqa: E402

pytestmark = language_model_test

CONFIG = ROOT / "experiments" / "configs" / "arithmetic_cpu.yaml"
TINY = [
    *("--architecture.hidden_size", "16", "--architecture.intermediate_size", "16"),
    *("--architecture.num_hidden_layers", "1", "--architecture.num_attention_heads", "2"),
    *("--architecture.num_key_value_heads", "2"),
    *("--pretraining_steps", "2", "--pretraining_accuracy", "0", "--pretraining_problems", "40"),
    *("--train_problems", "40", "--held_out_problems", "6", "--evaluation_samples", "2", "--evaluation_steps", "1"),
    *("--prompts_per_step", "8", "--per_device_train_batch_size", "8", "--max_steps", "2", "--logging_steps", "1"),
]


def command(results: Path, *words: str) -> list[str]:
    return ["--config", str(CONFIG), *TINY, "--results", str(results), *words]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """One row for each of three methods, of one seed, and of the pre-training before them; made in this process."""
    folder = tmp_path_factory.mktemp("runs")
    state = torch.random.get_rng_state()
    arguments = command(folder)
    names = ["pretraining", "tbrm-n1/seed-0", "grpo-n4/seed-0", "ppo-n1/seed-0"]
    rows = {name: {"cell": name} | llm_training.make_row(arguments, name, folder) for name in names}
    rows["folder"] = {"path": folder}
    torch.random.set_rng_state(state)
    return rows


def test_every_run_starts_from_the_pre_trained_model(made: dict[str, dict[str, Any]]) -> None:
    first = {rows["curve"][0][-1] for name, rows in made.items() if "seed" in name}
    assert len(first) == 1  # the same model, judged with the same draws
    assert made["pretraining"]["steps"] == 1  # any accuracy is enough here
    assert (made["folder"]["path"] / "pretraining" / "model.safetensors").exists()


def test_without_a_problem_that_is_answered_right_a2po_says_so(tmp_path: Path) -> None:
    methods = {"tbrm": {"num_generations": 1}, "a2po": {"method": "a2po", "num_value_samples": 1}}
    path = tmp_path / "file.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(CONFIG.read_text()) | {"methods": methods, "seeds": [0]}))
    words = command(tmp_path, "--pretraining_steps", "0", "--train_problems", "8")
    words[words.index(str(CONFIG))] = str(path)
    llm_training.make_row(words, "pretraining", tmp_path)
    with pytest.raises(InvalidInputError, match="filter_all_incorrect: no training problem was answered right"):
        llm_training.make_row(words, "a2po/seed-0", tmp_path)


def test_a_trainer_of_trl_s_is_not_pickled_with_its_models() -> None:
    trainer = timed(trainer_class("a2po"))
    with pytest.raises(TypeError, match="a trainer is not pickled"):
        pickle.dumps(trainer.__new__(trainer))


@pytest.mark.parametrize("method", ["rloo", "a2po"])
def test_trl_s_other_methods_train_and_their_costs_are_split(method: str, tmp_path: Path) -> None:
    file = yaml.safe_load(CONFIG.read_text())
    own = {"rloo": {"num_generations": 4}, "a2po": {"num_value_samples": 2, "filter_all_incorrect": False}}
    methods = {name: {"method": name} | options for name, options in own.items()}
    path = tmp_path / "file.yaml"
    path.write_text(yaml.safe_dump(file | {"methods": methods, "seeds": [0]}))
    words = command(tmp_path, "--pretraining_steps", "0")
    words[words.index(str(CONFIG))] = str(path)
    llm_training.make_row(words, "pretraining", tmp_path)
    found = llm_training.make_row(words, f"{method}/seed-0", tmp_path)
    assert {part for part in ("rollout", "reference", "update") if found["seconds_per_step"][part] <= 0} == set()
    assert found["models_held"] == 2
    assert [point[0] for point in found["curve"]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "models", "busy", "idle"),
    [
        ("tbrm-n1/seed-0", 2, {"rollout", "reference", "update"}, {"critic", "old_log_probs"}),
        ("grpo-n4/seed-0", 2, {"rollout", "reference", "update"}, {"critic", "old_log_probs"}),
        ("ppo-n1/seed-0", 3, {"rollout", "reference", "update", "critic"}, {"old_log_probs"}),
    ],
)
def test_the_cost_of_a_step_is_split_by_what_the_method_does(
    name: str, models: int, busy: set[str], idle: set[str], made: dict[str, dict[str, Any]]
) -> None:
    row = made[name]
    assert row["models_held"] == models
    assert set(row["seconds_per_step"]) == set(PARTS)
    assert {part for part in busy if row["seconds_per_step"][part] > 0} == busy
    assert {part for part in idle if row["seconds_per_step"][part] > 0} == set()
    rollouts = 4 if "n4" in name else 1
    assert [point[:2] for point in row["curve"]] == [[0, 0], [1, 8 * rollouts], [2, 16 * rollouts]]
    assert len(row["rewards"]) == 6
    assert all(len(paid) == 2 for paid in row["rewards"])
    log = made["folder"]["path"] / name / "log.jsonl"
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    for step in (step for step in steps if "step_time" in step):
        assert sum(step[f"seconds/{part}"] for part in PARTS) >= step["step_time"] * 0.999
    samples = [json.loads(line) for line in (log.parent / "samples.jsonl").read_text().splitlines()]
    assert [sample["reward"] for sample in samples] == [paid[0] for paid in row["rewards"]]


@pytest.mark.parametrize("name", ["tbrm-n1", "grpo-n4", "a2po"])
def test_paying_is_no_part_of_sampling_nor_of_the_update(
    name: str, made: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]  # a clock that only paying moves on

    @contextmanager
    def slow(_: Any) -> Iterator[Any]:
        def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
            now[0] += 100.0
            return [1.0] * len(completions)

        yield reward

    class Memory:
        beside_it = 0

        @contextmanager
        def beside(self) -> Iterator[None]:
            Memory.beside_it += 1
            yield

        def bytes(self) -> int:
            return 7

    monkeypatch.setattr(part_timer, "_now", lambda: now[0])
    monkeypatch.setattr(run_training, "_reward", slow)
    monkeypatch.setattr(run_training, "PeakMemory", Memory)
    file = yaml.safe_load(CONFIG.read_text())
    own = file["methods"].get(name, {"method": "a2po", "num_value_samples": 1, "filter_all_incorrect": False})
    path = tmp_path / "file.yaml"
    path.write_text(yaml.safe_dump(file | {"methods": {name: own, "another": {"method": "tbrm"}}, "seeds": [0]}))
    words = command(tmp_path, "--train_problems", "8", "--evaluation_steps", "9", "--max_steps", "1")
    words[words.index(str(CONFIG))] = str(path)
    run = next(run for run in read_runs(words) if run.name == f"{name}/seed-0")
    found = run_training.train_run(run, tmp_path, made["folder"]["path"] / "pretraining")
    assert [point[0] for point in found["curve"]] == [0, 1]  # judged at the end, whatever the interval
    assert (found["peak_bytes"], Memory.beside_it) == (7, 2)
    # What was judged before it is no part of a step.
    assert found["seconds_per_step"] == dict.fromkeys(PARTS, 0.0) | {"other": 100.0}


# -- judging -----------------------------------------------------------------------------------------------------------


def test_judging_leaves_the_global_generator_alone_and_repeats_itself() -> None:
    model, words = language_model(), tokenizer()
    before = torch.random.get_rng_state()
    options: dict[str, Any] = {"tokens": 4, "temperature": 1.0, "seed": 7, "rows": 3}
    first = responses(model, words, ["a", "bcd", "ea", "g"], **options)
    assert torch.equal(before, torch.random.get_rng_state())
    assert first == responses(model, words, ["a", "bcd", "ea", "g"], **options)
    assert first != responses(model, words, ["a", "bcd", "ea", "g"], **options | {"seed": 8})


def test_whatever_the_model_declares_ends_a_response() -> None:
    model, words = language_model(), tokenizer()
    options: dict[str, Any] = {"tokens": 5, "temperature": 1.0, "seed": 7, "rows": 16}
    free = responses(model, words, ["a"] * 16, **options)
    model.generation_config.eos_token_id = [1, *range(3, 12)]  # and every letter
    assert max(map(len, free)) > 1
    assert max(map(len, responses(model, words, ["a"] * 16, **options))) == 1


def test_what_a_models_settings_advise_does_not_change_its_samples() -> None:
    options: dict[str, Any] = {"tokens": 5, "temperature": 1.0, "seed": 7, "rows": 16}
    model, words = language_model(), tokenizer()
    plain = responses(model, words, ["a"] * 16, **options)
    for advice in ({"repetition_penalty": 9.0}, {"top_k": 1}, {"top_p": 0.1}, {"temperature": 0.1}):
        model = language_model()
        model.generation_config.update(do_sample=True, **advice)
        assert responses(model, words, ["a"] * 16, **options) == plain


def test_average_at_k_pays_each_response_to_its_own_problem() -> None:
    problems = Dataset.from_dict({"prompt": ["a", "b"], "worth": [1.0, 0.0]})

    def reward(prompts: list[str], completions: list[str], worth: list[float]) -> list[float]:
        assert prompts == ["a", "a", "a", "b", "b", "b"]
        return list(worth)

    judge = Judge(problems, reward, tokenizer(), samples=3, tokens=2, every=1)
    found = judge.judge(language_model(), 5)
    assert found.rewards == [[1.0] * 3, [0.0] * 3]
    assert found.accuracy == 0.5
    assert [(sample["prompt"], sample["reward"], sample["step"]) for sample in found.samples] == [
        ("a", 1.0, 5),
        ("b", 0.0, 5),
    ]


def test_memory_is_counted_without_what_is_done_beside() -> None:
    def held(mebibytes: int) -> None:
        torch.ones(mebibytes * 2**18)

    memory = PeakMemory()
    held(64)
    with memory.beside():
        held(512)
    held(32)
    assert 60 * 2**20 <= memory.bytes() < 200 * 2**20
    held(256)
    assert 250 * 2**20 <= memory.bytes() < 500 * 2**20


def test_a_model_that_does_not_learn_enough_is_refused(tmp_path: Path) -> None:
    arguments = command(tmp_path, "--pretraining_accuracy", "0.9")
    with pytest.raises(InvalidInputError, match="pretraining_steps: expected 90%"):
        llm_training.make_row(arguments, "pretraining", tmp_path)
    assert not (tmp_path / "pretraining").exists()


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    with pytest.raises(InvalidInputError, match=r"^pretrained: expected a new folder"):
        llm_training.make_row(command(tmp_path, "--pretrained", str(tmp_path / "mine")), "pretraining", tmp_path)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["config.json"]


def test_what_was_pre_trained_with_other_settings_is_refused(made: dict[str, dict[str, Any]]) -> None:
    folder = made["folder"]["path"]
    words = ["--pretrained", str(folder / "pretraining"), "--pretraining_accuracy", "0.1"]
    with pytest.raises(
        InvalidInputError, match=r"^pretrained: .* with pretraining_accuracy 0\.0, and 0\.1 is asked for"
    ):
        llm_training.make_row(command(folder, *words), "pretraining", folder)
    (folder / "old").mkdir()
    for text in ("{", "{}", '{"made": {"size": 3}}'):
        (folder / "old" / "pretrained.json").write_text(text)
        with pytest.raises(InvalidInputError, match=r"pretrained\.json: not what pre-training writes"):
            llm_training.make_row(command(folder, "--pretrained", str(folder / "old")), "pretraining", folder)


def test_what_was_pre_trained_is_not_made_again(made: dict[str, dict[str, Any]]) -> None:
    folder = made["folder"]["path"]
    again = llm_training.make_row(command(folder), "pretraining", folder)
    assert {"cell": "pretraining"} | again == made["pretraining"] | {"seconds": 0.0}


def test_a_model_needs_no_pre_training(tmp_path: Path) -> None:
    """Its weights stay as drawn; and a run killed between its last checkpoint and its record ends as it did."""
    words = command(tmp_path, "--pretraining_steps", "0", "--save_strategy", "steps", "--save_steps", "1")
    start = llm_training.make_row(words, "pretraining", tmp_path)
    assert (start["steps"], start["accuracy"]) == (0, None)
    drawn = build_model(read_runs(words)[0].arguments).state_dict()
    kept = load_file(tmp_path / "pretraining" / "model.safetensors")
    assert kept
    assert all(torch.equal(table, drawn[name]) for name, table in kept.items())
    first = llm_training.make_row(words, "tbrm-n1/seed-0", tmp_path)
    assert first["curve"][-1][0] == 2
    again = llm_training.make_row(words, "tbrm-n1/seed-0", tmp_path)
    assert [again[key] for key in ("curve", "rewards")] == [first[key] for key in ("curve", "rewards")]
    (tmp_path / "tbrm-n1" / "seed-0" / "checkpoint-2" / "tbrm_state_0.safetensors").unlink()  # half written
    again = llm_training.make_row(words, "tbrm-n1/seed-0", tmp_path)
    assert [again[key] for key in ("curve", "rewards")] == [first[key] for key in ("curve", "rewards")]


def test_too_few_problems_for_an_update_are_no_run(tmp_path: Path) -> None:
    words = command(tmp_path, "--pretraining_steps", "0", "--train_problems", "7")
    llm_training.make_row(words, "pretraining", tmp_path)
    with pytest.raises(InvalidInputError, match=r"^train_problems: 7 problems to train on and 8 in an update"):
        llm_training.make_row(words, "grpo-n4/seed-0", tmp_path)


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    words = command(tmp_path, "--model", str(tmp_path / "absent"))
    with pytest.raises(InvalidInputError, match=r"^model: .*absent: "):
        llm_training.make_row(words, "tbrm-n1/seed-0", tmp_path)


def test_the_trainer_gets_what_the_file_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(Exception): ...

    class Trainer:
        def __init__(self, **given: Any) -> None:
            self.__class__.given = given
            raise Stopped

        given: dict[str, Any]

    monkeypatch.setattr(run_training, "trainer_class", lambda _: Trainer)
    monkeypatch.setattr(run_training, "timed", lambda kind: kind)
    own = ["--critic_learning_rate", "0.5", "--gae_lambda", "0.7", "--entropy_coefficient", "0.3"]
    words = command(tmp_path, *own, "--model_init_kwargs", '{"attn_implementation": "eager"}', "--dtype", "bfloat16")
    run = next(run for run in read_runs(words) if run.name == "ppo-n1/seed-2")
    with pytest.raises(Stopped):
        run_training.train_run(run, tmp_path / "run", None if run.arguments.model else _start(words, tmp_path))
    given = Trainer.given
    assert (given["critic_learning_rate"], given["gae_lambda"], given["entropy_coefficient"]) == (0.5, 0.7, 0.3)
    assert given["args"].model_init_kwargs == {"attn_implementation": "eager", "dtype": "bfloat16"}
    assert given["model"] == str(tmp_path / "pretraining")
    drawn = build_dataset(run.arguments, seed=2).train["prompt"]
    assert given["train_dataset"]["prompt"] == drawn != build_dataset(run.arguments, seed=1).train["prompt"]


def _start(words: list[str], folder: Path) -> Path:
    llm_training.make_row([*words, "--pretraining_steps", "0"], "pretraining", folder)
    return folder / "pretraining"


def test_the_curve_counts_what_was_sampled_and_forgets_what_is_judged_again(tmp_path: Path) -> None:
    """Of two updates on each batch the second samples nothing; a run that goes on from a checkpoint is behind its curve."""
    run = next(run for run in read_runs(command(tmp_path, "--num_iterations", "2")) if run.name == "tbrm-n4/seed-0")
    for step in (0, 2, 3, 5, 4):
        run_training._keep(tmp_path, run, Judgement(step, [[1.0, 0.0]], [{"step": step}]))
    curve = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert [(row["step"], row["rollouts"]) for row in curve] == [(0, 0), (2, 8 * 4), (3, 2 * 8 * 4), (4, 2 * 8 * 4)]
    assert json.loads((tmp_path / "samples.jsonl").read_text()) == {"step": 4}


def test_the_first_logged_updates_warm_up() -> None:
    rows = [{f"seconds/{part}": seconds for part in PARTS} for seconds in (9.0, 1.0, 2.0)]
    assert run_training._seconds([*rows, {"train_runtime": 7.0}]) == dict.fromkeys(PARTS, 1.5)
    assert run_training._seconds(rows[:1]) == dict.fromkeys(PARTS, 9.0)


def test_a_full_disk_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write() -> None:
        with run_training.room_for(tmp_path / "not" / "yet"):
            raise RuntimeError("file write failed")

    with pytest.raises(RuntimeError, match="file write failed"):
        write()
    monkeypatch.setattr(run_training, "_NO_ROOM", shutil.disk_usage(tmp_path).total)
    with pytest.raises(OSError, match=r"No space left on device: .*yet") as caught:
        write()
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("name", ["ppo-n1", "grpo-n4"])
def test_a_run_that_was_cut_goes_on_from_its_last_checkpoint_and_ends_as_it_would(name: str, tmp_path: Path) -> None:
    own = ("--pretraining_steps", "0", "--save_strategy", "steps", "--save_steps", "1", "--max_steps", "3")
    words = command(tmp_path, *own, "--learning_rate", "0.01", "--lr_scheduler_type", "linear")
    llm_training.make_row(words, "pretraining", tmp_path)
    first = llm_training.make_row(words, f"{name}/seed-0", tmp_path)
    end = load_file(tmp_path / name / "seed-0" / "checkpoint-3" / "model.safetensors")
    path = tmp_path / name / "seed-0" / "curve.jsonl"
    marked = [json.loads(line) | {"accuracy": 0.125} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(point) + "\n" for point in marked))
    again = llm_training.make_row(words, f"{name}/seed-0", tmp_path)
    assert [point[-1] for point in again["curve"]] == [0.125] * 3 + [
        first["curve"][-1][-1]
    ]  # the last alone was judged
    assert again["rewards"] == first["rewards"]
    resumed = load_file(tmp_path / name / "seed-0" / "checkpoint-3" / "model.safetensors")
    assert all(torch.equal(table, resumed[key]) for key, table in end.items())


# -- the runs of a file ------------------------------------------------------------------------------------------------


def row(name: str, seed: int, *, last: float = 0.75, seconds: float = 1.0, peak: int = 100) -> dict[str, Any]:
    n = 4 if name.endswith("n4") else 1
    return {
        "cell": f"{name}/seed-{seed}",
        "name": name,
        "curve": [[0, 0, 0.5], [10, 320 * n, last]],
        "rewards": 30 * ([[1.0, 1.0], [1.0, 0.0]] if last == 0.75 else [[0.0, 0.0], [1.0, 0.0]]),
        "seconds_per_step": {"rollout": seconds / 4, "update": 3 * seconds / 4},
        "peak_bytes": peak,
        "models_held": 2,
        "parameters": 7,
    }


def test_the_summary_sets_ratios_beside_the_papers() -> None:
    rows = [
        {"cell": "pretraining", "steps": 25},
        row("tbrm-n1", 0),
        row("tbrm-n1", 1, last=0.25, seconds=3.0, peak=120),
        row("ppo-n1", 0, seconds=4.0, peak=240),
        row("grpo-n4", 0, seconds=8.0),
    ]
    summary = llm_training.summarise(rows, 1.0)
    assert summary["ratios"] == pytest.approx({"step/ppo-n1": 0.5, "step/grpo-n4": 0.25, "memory/ppo-n1": 0.5})
    assert summary["paper"] == {"step/ppo-n1": 0.77, "step/grpo-n4": 0.32, "memory/ppo-n1": 0.67}
    assert summary["accuracy"]["tbrm-n1"]["mean"] == pytest.approx(0.5)  # problems: (1 + 0)/2 and (½ + ½)/2
    assert summary["accuracy_by_seed"]["tbrm-n1"] == [0.75, 0.25]
    assert summary["rollouts_per_step"] == {"tbrm-n1": 32, "ppo-n1": 32, "grpo-n4": 128}
    assert summary["unexpected"] == ["tbrm-n1/seed-1: worse than at the start"]
    assert summary["pretraining_steps"] == 25
    for key in summary:
        assert f"`{key}`" in (llm_training.__doc__ or ""), key
    assert len(llm_training.tables(summary)) == 3


def test_a_fall_within_what_the_problems_explain_is_not_unexpected() -> None:
    fallen = row("tbrm-n1", 0) | {"curve": [[0, 0, 0.8], [10, 320, 0.75]]}
    interval = llm_training._accuracy([fallen])
    assert interval["low"] < 0.75 < interval["high"] < 0.85
    assert llm_training.summarise([fallen], 1.0)["unexpected"] == []
    fallen["curve"][0][-1] = 0.85
    assert llm_training.summarise([fallen], 1.0)["unexpected"] == ["tbrm-n1/seed-0: worse than at the start"]


def test_the_interval_is_over_problems() -> None:
    """Three of them, two responses to each, two seeds: problems' means of ¾, 0 and ¾."""
    rewards = ([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    low, high = bootstrap_interval([0.75, 0.0, 0.75], seed=0)
    found = llm_training._accuracy([{"rewards": paid} for paid in rewards])
    assert found == {"mean": 0.5, "low": low, "high": high}


def test_without_a_method_its_ratios_are_absent() -> None:
    assert llm_training.summarise([row("tbrm-n1", 0), row("grpo-n4", 0, seconds=2.0)], 0.0)["ratios"] == {
        "step/grpo-n4": 0.5
    }


def test_a_file_is_done_in_as_many_commands_as_one_likes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def instead(arguments: list[str], name: str, folder: Path) -> dict[str, Any]:
        asked.append(name)
        if name == "grpo-n4/seed-1" and asked.count(name) == 1:
            raise KeyboardInterrupt
        if name != "pretraining":
            return row(*_parts(name))
        (folder / name).mkdir()
        found = {"parameters": 7, "steps": 3, "accuracy": 0.5}
        kept = json.dumps({"made": found, "settings": pretraining._settings(read_runs(arguments)[0].arguments)})
        (folder / name / "pretrained.json").write_text(kept)
        return {"steps": 3}

    monkeypatch.setattr(llm_training, "_made", instead)
    assert llm_training.main(command(tmp_path, "--only", "tbrm-n1")) == 0
    assert asked == ["pretraining", "tbrm-n1/seed-0", "tbrm-n1/seed-1", "tbrm-n1/seed-2"]
    latest = tmp_path / "llm_run" / "latest"
    assert not (latest / "summary.json").exists()
    assert llm_training.main(command(tmp_path)) == 130
    assert llm_training.main(command(tmp_path)) == 0
    whole = [run.name for run in read_runs(command(tmp_path))]
    assert sorted(asked) == sorted([*whole, "pretraining", "grpo-n4/seed-1"])
    assert json.loads((latest / "summary.json").read_text())["unexpected"] == []


def _parts(name: str) -> tuple[str, int]:
    method, _, seed = name.partition("/seed-")
    return method, int(seed)


def test_several_processes_do_not_train_several_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = read_runs(command(tmp_path))
    monkeypatch.setattr(llm_training, "read_runs", lambda _: runs)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidInputError, match="--only"):
        llm_training.main(command(tmp_path))
    monkeypatch.setattr(llm_training, "read_runs", lambda _: runs[:1])
    with pytest.raises(InvalidInputError, match=r"^pretrained: one process makes the model"):
        llm_training.main(command(tmp_path))


@pytest.mark.slow
def test_of_two_processes_one_records(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    sizes = ["--pretraining_steps", "0", "--pretrained", str(tmp_path / "start"), "--per_device_train_batch_size", "4"]
    llm_training.make_row(command(tmp_path, *sizes), "pretraining", tmp_path)
    program = [str(ROOT / "experiments" / "llm_run.py"), *command(tmp_path, *sizes)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    path = tmp_path / "one.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(CONFIG.read_text()) | {"seeds": [0], "methods": {"tbrm-n1": {}}}))
    program[program.index(str(CONFIG))] = str(path)
    done = subprocess.run(
        [*launch, "--main_process_port", "0", *program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode in (0, 1), done.stderr[-3000:]  # 1: two steps may leave it worse
    (folder,) = (path for path in (tmp_path / "llm_run").iterdir() if not path.is_symlink())
    start, found = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    assert (start["cell"], found["cell"]) == ("pretraining", "tbrm-n1/seed-0")
    assert [point[:2] for point in found["curve"]] == [[0, 0], [1, 8], [2, 16]]
    assert (folder / "summary.json").exists()
    assert done.stdout.count("held-out problems") == 1


def test_every_run_has_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_training, "in_a_process", lambda *asked: {"asked": asked})
    asked = "tbrm-n1/seed-0", llm_training.make_row, command(tmp_path), "tbrm-n1/seed-0", tmp_path
    assert llm_training._made(command(tmp_path), "tbrm-n1/seed-0", tmp_path) == {"asked": asked}


# -- the figure --------------------------------------------------------------------------------------------------------


def test_curves_are_means_over_seeds_and_bars_stack_the_parts(tmp_path: Path) -> None:
    recorded = [row("tbrm-n1", 0), row("tbrm-n1", 1, last=0.25), row("grpo-n4", 0, seconds=8.0)]
    for cell in recorded:
        cell["seed"] = int(cell["cell"][-1])
        cell["seconds_per_step"] = dict.fromkeys(PARTS, 0.0) | cell["seconds_per_step"]
    rows = fig_llm_run.extract([{"cell": "pretraining", "steps": 25}, *recorded])
    assert [r["name"] for r in rows] == ["tbrm-n1", "tbrm-n1", "grpo-n4"]
    by_update, by_response, costs = fig_llm_run.draw(rows).axes
    curves = {str(line.get_label()): line.get_xydata().tolist() for line in by_update.get_lines()}
    assert curves == {"tbrm-n1": [[0, 0.5], [10, 0.5]], "grpo-n4": [[0, 0.5], [10, 0.75]]}
    assert by_response.get_lines()[1].get_xdata().tolist() == [0, 1280]
    assert [[bar.get_x(), bar.get_width()] for bar in costs.patches] == [[0, 0.25], [0, 2], [0.25, 0.75], [2, 6]]


def test_the_figure_is_redrawn_from_the_committed_table(tmp_path: Path) -> None:
    fig_llm_run.main(Options(out=tmp_path))
    assert (tmp_path / "llm_run.pdf").stat().st_size > 10_000
