"""The LLM runs' entry point: every file's dry run works offline, the paper's numbers stand in them, what does not fit is refused."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import Trainer, TrainingArguments

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.llm.launch_files import Launch, read_launch_file
from tbrm_theory.llm.methods import METHODS, configuration_class, trainer_class
from tbrm_theory.llm.run_arguments import RunArguments
from tbrm_theory.llm.run_estimates import layer_bytes, memory_estimate, work_estimate
from tbrm_theory.llm.run_files import Run, read_runs, read_settings
from tbrm_theory.llm.run_parts import build_dataset, build_model, build_tokenizer, model_configuration, parameter_count
from tbrm_theory.losses import LOSSES

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))

import llm_run  # noqa: E402

CONFIGS = ROOT / "experiments" / "configs"
FILES = [path for path in sorted(CONFIGS.glob("*.yaml")) if yaml.safe_load(path.read_text()).get("run") != "exact"]
ARCHITECTURE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
SMALL: dict[str, Any] = {
    "task": "gcd",
    "architecture": ARCHITECTURE,
    "prompt_tokens": 16,
    "max_completion_length": 4,
    "prompts_per_step": 8,
    "per_device_train_batch_size": 8,
    "max_steps": 3,
    "bf16": False,
    "activation_checkpointing": False,
    "train_problems": 4,
    "held_out_problems": 2,
}


@pytest.fixture(autouse=True)
def _in_the_root_and_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands are given in the root of the repository, and whatever reaches for the network fails."""

    def refuse(*_: Any) -> None:
        raise AssertionError("reached for the network")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def written(folder: Path, **changes: Any) -> str:
    """A small file with changes; ``None`` takes a key out."""
    made = {key: value for key, value in (SMALL | changes).items() if value is not None}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(made), encoding="utf-8")
    return str(path)


def runs_of(folder: Path, *words: str, **changes: Any) -> list[Run]:
    return read_runs(["--config", written(folder, **changes), "--dry-run", *words])


def setting(run: Run, name: str) -> Any:
    return getattr(run.training, name)


# -- the files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_has_a_dry_run_offline(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = {"qwen2.5-math-7b": ["ppo-n1"]}.get(path.stem, [])  # three models, sharded over 4 devices, do not fit
    assert llm_run.main(["--config", str(path), "--dry-run"]) == bool(large)
    printed = capsys.readouterr().out
    for name in yaml.safe_load(path.read_text())["methods"]:
        assert printed.count(f"{name} ") >= 2  # once in the memory table, once in that of the work
    assert [line.split()[1] for line in printed.splitlines() if "too much" in line] == large
    assert all(
        re.search(rf" {found[1]} of 80: too much", printed)
        for found in re.findall("(hold) ([0-9.]+) GiB", path.read_text())
    )


def test_the_larger_ppo_run_fits_as_its_file_says() -> None:
    words = [
        "--config",
        str(CONFIGS / "qwen2.5-math-7b.yaml"),
        "--dry-run",
        "--only",
        "ppo-n1",
        "--vllm_mode",
        "server",
    ]
    assert llm_run.main(words) == 1  # not with all logits of the reference at once
    assert llm_run.main([*words, "--fused_lm_head", "true"]) == 0


def test_there_is_a_file_for_every_run_that_was_planned() -> None:
    assert {path.stem for path in FILES} >= {
        "arithmetic_cpu",
        "reasoning_gym_gpu",
        "qwen2.5-math-1.5b",
        "qwen2.5-math-7b",
    }
    for path in FILES:
        methods = {own["method"] for own in yaml.safe_load(path.read_text())["methods"].values()}
        assert {"tbrm", "grpo", "ppo"} <= methods  # the twins


def test_the_rehearsal_in_the_file_can_be_run(monkeypatch: pytest.MonkeyPatch) -> None:
    path = CONFIGS / "reasoning_gym_gpu.yaml"
    (command,) = re.findall(r"python .*--results(?:.*\\\n)+.*", path.read_text())
    words = command.replace("\\\n#", "").split()
    assert words[:2] == ["python", "experiments/llm_run.py"]
    monkeypatch.chdir(ROOT)
    assert llm_run.main([*words[2:], "--dry-run"]) == 0
    assert len(read_runs([*words[2:], "--dry-run"])) == 8


SIZES = {  # hidden, inner, layers, heads, key-value heads, vocabulary, tied; and the count that the model card prints
    "qwen2.5-math-1.5b": ((1536, 8960, 28, 12, 2, 151936, True), 1.54e9),
    "qwen2.5-math-7b": ((3584, 18944, 28, 28, 4, 152064, False), 7.62e9),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_architectures_have_the_published_number_of_parameters(name: str) -> None:
    arguments = read_runs(["--config", str(CONFIGS / f"{name}.yaml"), "--dry-run", "--only", "tbrm-n1"])[0].arguments
    (hidden, inner, layers, heads, pairs, vocabulary, tied), printed = SIZES[name]
    narrow = hidden // heads * pairs
    attention = 2 * hidden * hidden + 2 * hidden * narrow + hidden + 2 * narrow  # queries, keys and values have a bias
    count = layers * (attention + 3 * hidden * inner + 2 * hidden) + hidden + vocabulary * hidden * (1 if tied else 2)
    model = build_model(arguments, device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert parameter_count(model) == count
    assert abs(count - printed) < 0.005e9


@pytest.mark.parametrize("name", SIZES)
def test_the_paper_s_settings_stand_in_the_files(name: str) -> None:
    """theory.md §6."""
    runs = {run.name: run for run in read_runs(["--config", str(CONFIGS / f"{name}.yaml"), "--dry-run"])}
    rate = {"qwen2.5-math-1.5b": 2.5e-6, "qwen2.5-math-7b": 2e-6}[name]
    one, four, grpo, ppo, reval = (runs[key] for key in ("tbrm-n1", "tbrm-n4", "grpo-n4", "ppo-n1", "reval-n8"))
    for run, group in ((one, 1), (four, 4), (grpo, 4), (ppo, 1), (reval, 8)):
        assert (run.arguments.model or "").lower() == f"qwen/{name}"
        assert run.arguments.data == "BytedTsinghua-SIA/DAPO-Math-17k"
        assert (run.arguments.processes, run.arguments.prompts_per_step) == (4, 128)
        rows = setting(run, "per_device_train_batch_size") * setting(run, "gradient_accumulation_steps") * 4
        assert rows == 128 * group
        assert setting(run, "num_generations") == group
        assert (setting(run, "max_completion_length"), setting(run, "temperature")) == (2048, 1.0)
        assert setting(run, "max_steps") == 760
        assert setting(run, "bf16")
        assert setting(run, "use_vllm")
    for run in (one, four, reval):
        assert setting(run, "beta") == 0.002
    assert (setting(one, "learning_rate"), setting(four, "learning_rate")) == (rate, 2.5e-6)
    assert setting(one, "num_iterations") == 1
    assert (setting(grpo, "loss_type"), setting(grpo, "scale_rewards")) == ("grpo", "group")  # not TRL's default, DAPO
    assert not setting(grpo, "use_bias_correction_kl")
    for run in (grpo, ppo):
        assert (setting(run, "learning_rate"), setting(run, "beta")) == (1e-6, 0.001)
    assert (setting(grpo, "epsilon"), LOSSES["ppo"].options["clip"]) == (0.2, 0.2)
    assert not setting(grpo, "vllm_importance_sampling_correction")
    assert (ppo.arguments.critic_learning_rate, ppo.arguments.entropy_coefficient) == (1e-5, 0.001)
    assert [Path(path).stem for path in ppo.arguments.launch] == ["fsdp_4gpu"]
    assert (setting(reval, "replay_capacity"), setting(reval, "num_iterations")) == (5120, 2)
    assert setting(reval, "reference_reset_steps") == 200
    assert setting(reval, "group_mean_reward")


def test_the_paper_s_settings_of_reasoning_gym() -> None:
    run, *_ = read_runs(["--config", str(CONFIGS / "reasoning_gym_gpu.yaml"), "--dry-run", "--only", "tbrm-n4"])
    assert (run.arguments.train_problems, run.arguments.held_out_problems) == (2000, 100)
    assert (run.arguments.prompts_per_step, setting(run, "num_generations"), setting(run, "max_steps")) == (
        1024,
        4,
        100,
    )
    assert 30e6 < parameter_count(build_model(run.arguments, device="meta")) < 100e6


def test_the_vllm_server_is_one_override_away() -> None:
    words = ["--config", str(CONFIGS / "qwen2.5-math-1.5b.yaml"), "--dry-run", "--only", "tbrm-n1"]
    (beside,), (server,) = read_runs(words), read_runs([*words, "--vllm_mode", "server"])
    launch = Launch(processes=4, stage=3, mixed_precision="bf16")
    assert (setting(beside, "vllm_mode"), setting(server, "vllm_mode")) == ("colocate", "server")
    assert memory_estimate(beside, launch).generation == int(0.3 * 80 * 2**30)
    assert memory_estimate(server, launch).generation == 0
    awake = memory_estimate(read_runs([*words, "--vllm_enable_sleep_mode", "false"])[0], launch)
    asleep = memory_estimate(beside, launch)
    assert awake.peak - asleep.peak == min(asleep.generation, asleep.activations + asleep.logits)


# -- methods -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_trainer_and_its_configuration(method: str, tmp_path: Path) -> None:
    (run,) = runs_of(tmp_path, method=method, num_generations=None if method == "a2po" else 2)
    assert issubclass(trainer_class(method), Trainer)
    assert type(run.training) is configuration_class(method)
    assert issubclass(type(run.training), TrainingArguments)
    assert setting(run, "report_to") == []
    assert not getattr(run.training, "trust_remote_code", False)
    assert setting(run, "output_dir").endswith(f"results/llm_run/small/{method}")
    if (loss := METHODS[method].settings.get("loss")) is not None:
        assert setting(run, "loss") == loss == method
        assert ("critic" in LOSSES[loss].fields) == METHODS[method].critic
        assert trainer_class(method).__module__.startswith("tbrm_theory.")
    else:
        assert trainer_class(method).__module__.startswith("trl.")
    assert work_estimate(run).models_held == {"ppo": 3}.get(method, 2)


# -- command lines -------------------------------------------------------------------------------------------

METHODS_OF_TWO = {"a": {"method": "tbrm", "beta": 0.5}, "b": {"method": "grpo", "num_generations": 2}}


def test_files_methods_seeds_and_the_command_line_override_each_other_in_turn(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, methods=METHODS_OF_TWO, seeds=[3, 4], beta=0.1, learning_rate="1e-6")
    assert [run.name for run in runs] == ["a/seed-3", "a/seed-4", "b/seed-3", "b/seed-4"]
    assert [setting(run, "seed") for run in runs] == [3, 4, 3, 4]
    assert [setting(run, "beta") for run in runs] == [0.5, 0.5, 0.1, 0.1]
    assert all(setting(run, "learning_rate") == 1e-6 for run in runs)
    assert [run.arguments.name for run in runs] == ["a", "a", "b", "b"]
    assert len({setting(run, "output_dir") for run in runs}) == 4
    (run,) = runs_of(tmp_path, "--results", "elsewhere", name="nobody")
    assert (setting(run, "output_dir"), run.arguments.name) == ("elsewhere/llm_run/small/tbrm", "tbrm")
    assert setting(runs_of(tmp_path, output_dir="here")[0], "output_dir") == "here"
    words = ["--only", "b", "--beta=0.7", "--architecture.hidden_size", "8", "--difficulty.max_value=50"]
    runs = runs_of(tmp_path, *words, methods=METHODS_OF_TWO)
    assert [(run.name, setting(run, "beta"), run.arguments.sizes["hidden_size"]) for run in runs] == [("b", 0.7, 8)]
    assert runs[0].arguments.options == {"max_value": 50}
    assert runs[0].arguments.sizes["num_hidden_layers"] == 2  # the rest of the mapping stays


def test_a_setting_that_one_method_lacks_is_left_out_there_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = {"a": {"method": "tbrm"}, "z": {"method": "a2po", "num_value_samples": 4}}
    runs = runs_of(tmp_path, methods=methods, beta=0.3)
    assert [run.left_out for run in runs] == [(), ("beta",)]
    words = ["--config", written(tmp_path, methods=methods, beta=0.3), "--dry-run"]
    assert [run.left_out for run in read_runs([*words, "--only", "z"])] == [("beta",)]
    assert llm_run.main(words) == 0
    assert "z: A2POConfig has no beta" in capsys.readouterr().out


def test_the_batch_is_the_same_on_any_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for processes in (1, 2, 4):
        (run,) = runs_of(tmp_path, prompts_per_step=32, per_device_train_batch_size=4, processes=processes)
        assert setting(run, "gradient_accumulation_steps") * 4 * processes == 32
    (run,) = runs_of(tmp_path, "--num_generations", "4", per_device_train_batch_size=4)
    assert setting(run, "gradient_accumulation_steps") == 8 * 4 / 4


REFUSED: list[tuple[dict[str, Any], list[str], str]] = [
    ({"learning_rat": 1.0}, [], r"small\.yaml: learning_rat: no field"),
    ({"methods": {"a": {"method": "a2po", "beta": 1.0}}}, [], r"methods\.a\.beta: no field of a run"),
    ({"methods": {"a": {"method": "dqn"}}}, [], r"^method: expected one of tbrm, "),
    ({"methods": [1]}, [], r"^methods: expected a mapping"),
    ({"seeds": ["one"]}, [], r"^seeds: expected integers"),
    ({"seeds": []}, [], r"^seeds: expected integers"),
    ({}, ["--only", "x"], r"^--only: expected some of tbrm; found x"),
    ({}, ["--only"], r"^--only: expected a value"),
    ({}, ["--architecture.hidden_size"], r"^--architecture\.hidden_size: expected a value"),
    ({}, ["--task.inner", "1"], r"^--task\.inner: task is not a mapping"),
    ({}, ["--learning_rat", "1"], r"^arguments: --learning_rat is no field"),
    ({}, ["--learning_ra", "1"], r"^arguments: "),  # no abbreviations
    ({}, ["--beta", "much"], r"^arguments: argument --beta: invalid float value"),
    ({}, ["--method", "grpo"], r"^--method: use --only"),
    ({"beta": 0.0}, [], r"^beta: expected a positive temperature"),
    ({"style": "prose"}, [], r"^style: expected one of compact, full, chat; found 'prose'"),
    ({}, ["--style", "prose"], r"^arguments: argument --style: invalid choice"),
    ({"prompts_per_step": 9}, [], r"^prompts_per_step: 9 problems × 1 rollouts do not divide"),
    ({"gradient_accumulation_steps": 2}, [], r"^gradient_accumulation_steps: follows from"),
    ({"task": "sudoku"}, [], r"^task: expected math or one of"),
    ({"task": "math"}, [], r"^task: math needs `data`"),
    ({"data": "x.jsonl"}, [], r"^data: belongs to the task math"),
    ({"architecture": None}, [], r"^model: expected `model`, `architecture`"),
    ({"architecture": "{"}, [], r"^architecture: not YAML"),
    ({"architecture": [1]}, [], r"^architecture: expected a mapping"),
    ({"held_out_problems": 0}, [], r"^held_out_problems: expected at least 2"),
    ({"evaluation_rows": 0}, [], r"^evaluation_rows: expected at least 1"),
    ({"gae_lambda": 2.0}, [], r"^gae_lambda: expected a number from 0 to 1"),
    ({"held_out_problems": 1}, [], r"^held_out_problems: expected at least 2"),  # one has no interval
    ({"pretraining_problems": 0}, [], r"^pretraining_problems: expected at least 1"),
    ({"pretraining_steps": -1}, [], r"^pretraining_steps: expected at least 0"),
    ({"per_device_train_batch_size": 0}, [], r"^per_device_train_batch_size: expected at least 1"),
    ({"max_steps": -1}, [], r"^max_steps: expected a positive number"),
    ({"style": "chat"}, [], r"^style: chat needs a `model`"),
    ({"beta": [1.0]}, [], r"^beta: expected float, found \[1\.0\]"),
    ({"prompts_per_step": {"a": 8}}, [], r"^prompts_per_step: expected int, found"),
    ({"method": "grpo", "num_generations": 1}, [], r"^grpo: GRPO requires at least 2 generations"),
    ({"lr_scheduler_type": "sideways"}, [], r"^tbrm: sideways is not a valid SchedulerType"),
    ({"method": ["grpo"]}, [], r"^method: expected one of tbrm, "),
    ({"methods": {}}, [], r"^methods: expected at least one"),
    ({"methods": {"../a": {}}}, [], r"^methods\.\.\./a: expected a name of letters"),
    ({"methods": {"pretraining": {}}}, [], r"^methods\.pretraining: expected a name of letters"),
    ({"methods": {"a": {"model": "x"}, "b": {}}}, [], r"methods\.a\.model: the methods of a file have this in common"),
    ({"methods": {"a": {}, "b": {"held_out_problems": 3}}}, [], r"methods\.b\.held_out_problems: the methods"),
    ({"seeds": [1, 1]}, [], r"^seeds: expected each of them once"),
    ({"seeds": [1, 2]}, ["--seed", "3"], r"^--seed: the file has `seeds`"),
    ({}, ["--name", "x"], r"^--name: use --only"),
    ({}, ["--architectur.hidden_size", "8"], r"^--architectur\.hidden_size: no field"),
    ({}, ["--methods.tbrm.beta", "1"], r"^--methods\.tbrm\.beta: no field"),
]


@pytest.mark.parametrize(("changes", "words", "message"), REFUSED)
def test_what_does_not_fit_is_named(changes: dict[str, Any], words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=message):
        runs_of(tmp_path, *words, **changes)


REFUSED_BY_THE_DRY_RUN: list[tuple[dict[str, Any], str]] = [
    ({"architecture": ARCHITECTURE | {"model_type": "gpt9"}}, "^architecture: "),
    ({"architecture": {"hidden_size": 8}}, r"^architecture\.model_type: expected a name"),
    ({"architecture": ARCHITECTURE | {"hiden_size": 8}}, r"^architecture\.hiden_size: llama has no such size"),
    ({"max_completion_length": 17}, r"^max_completion_length: 33 tokens with the prompt; the model has 32"),
    ({"prompt_tokens": 8}, r"^prompt_tokens: a prompt has 1\d characters, more than 8"),
    ({"alphabet": "0123456789gcd=,"}, "is not in the alphabet"),
    ({"difficulty": {"maximum": 1}}, "^difficulty: gcd refuses"),
    ({"report_to": "wandb"}, "^report_to: nothing is reported"),
    ({"trust_remote_code": True}, "^report_to: .* no code of a model is run"),
    ({"architecture": ARCHITECTURE | {"hidden_size": "wide"}}, "^architecture: .*hidden_size"),
    ({"architecture": ARCHITECTURE | {"hidden_size": 18}}, "^architecture: .*hidden"),
    ({"launch": ["experiments/configs/launch/fsdp_4gpu.yaml"]}, "^launch: starts 4 processes, but `processes` is 1"),
    (
        {"launch": ["experiments/configs/launch/fsdp_4gpu.yaml"], "processes": 4, "per_device_train_batch_size": 2},
        "^launch: mixed precision bf16, but bf16 is False",
    ),
    (
        {"method": "ppo", "launch": ["experiments/configs/launch/deepspeed_4gpu.yaml"]},
        "^launch: ppo trains two models",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED_BY_THE_DRY_RUN)
def test_the_dry_run_names_what_does_not_fit(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=message):
        llm_run.main(["--config", written(tmp_path, **changes), "--dry-run"])


def test_a_seed_without_a_list_of_them_is_a_field_like_others(tmp_path: Path) -> None:
    assert setting(runs_of(tmp_path, "--seed", "5", seed=3)[0], "seed") == 5


def test_a_value_that_was_left_empty_is_refused(tmp_path: Path) -> None:
    path = Path(written(tmp_path))
    path.write_text(f"{path.read_text()}beta:\n")
    with pytest.raises(InvalidInputError, match=r"^beta: expected float, found None"):
        read_runs(["--config", str(path)])


@pytest.mark.parametrize(("name", "value"), [("report_to", "wandb"), ("trust_remote_code", True)])
def test_a_real_run_refuses_them_too(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"^report_to: "):
        llm_run.main(["--config", written(tmp_path, use_cpu=True, results=str(tmp_path), **{name: value})])
    assert not (tmp_path / "llm_run").exists()


def test_a_run_that_needs_more_memory_than_there_is_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", written(tmp_path, device_gib=1e-6), "--dry-run"]
    assert llm_run.main(words) == 1
    assert "too much" in capsys.readouterr().out
    assert llm_run.main([*words, "--device_gib", "1"]) == 0


def test_files_are_read_safely(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    made = tmp_path / "made"
    for text in (f"task: !!python/object/apply:os.mkdir [{made}]", "a: [", "- 1", "1: 2", "a: 2026-99-99", "a: é"):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(InvalidInputError, match=r"bad\.yaml: "):
            read_runs(["--config", str(path)])
    assert not made.exists()
    with pytest.raises(InvalidInputError, match=r"^--config: expected a YAML file"):
        read_runs(["--dry-run"])
    with pytest.raises(FileNotFoundError):
        read_runs(["--config", str(tmp_path / "absent.yaml")])


@pytest.mark.slow
def test_the_script_ends_with_the_status_of_its_runs_and_says_nothing_else() -> None:
    command = [sys.executable, str(ROOT / "experiments" / "llm_run.py"), "--dry-run"]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    expected = (2, "", "llm_run: error: --config: expected a YAML file\n")
    assert (ended.returncode, ended.stdout, ended.stderr) == expected


def test_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert llm_run.main(["--help"]) == 0
    assert "--dry-run" in capsys.readouterr().out


# -- the experiment with an exact optimum --------------------------------------------------------------------


@dataclass(frozen=True)
class ExactConfig:
    """Settings such as that experiment has."""

    horizon: int = 3
    rate: float = 0.1
    rates: tuple[float, ...] = (0.1, 0.2)
    results: Path = Path("results")


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> list[ExactConfig]:
    called: list[ExactConfig] = []

    def main(config: ExactConfig) -> int:
        called.append(config)
        return 7

    monkeypatch.setitem(sys.modules, "exact_transformer", SimpleNamespace(Config=ExactConfig, main=main))
    return called


def test_the_files_of_the_exact_experiment_are_settings_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever files there are; ``FILES`` are the others."""
    for path in set(CONFIGS.glob("*.yaml")) - set(FILES):
        assert llm_run.main(["--config", str(path), "--dry-run"]) == 0
        assert "Config(" in capsys.readouterr().out


def test_an_exact_run_calls_that_experiment(exact: list[ExactConfig], tmp_path: Path) -> None:
    path = tmp_path / "exact.yaml"
    path.write_text("run: exact\nhorizon: 5\nrates: [1.0]\nrate: 1\nresults: here")
    assert llm_run.main(["--config", str(path), "--horizon", "6"]) == 7
    assert exact == [ExactConfig(horizon=6, rate=1.0, rates=(1.0,), results=Path("here"))]
    assert llm_run.main(["--config", str(path), "--dry-run"]) == 0
    assert len(exact) == 1
    path.write_text("run: exact\nhorizont: 5")
    with pytest.raises(InvalidInputError, match=r"exact\.yaml: horizont: expected some of horizon, rate"):
        read_settings(["--config", str(path)], ExactConfig)
    with pytest.raises(InvalidInputError, match=r"^arguments: expected --key value"):
        read_settings(["--config", str(path), "--horizon"], ExactConfig)
    for text, message in (
        ("horizon: many", r"^horizon: expected int, found 'many'"),
        ("horizon: 1.5", r"^horizon: expected int"),
        ("horizon: true", r"^horizon: expected int"),
        ("rate: fast", r"^rate: expected float, found 'fast'"),
        ("rates: [0.1, x]", r"^rates\[1\]: expected float, found 'x'"),
        ("rates: 0.1", r"^rates: expected"),
        ("results:", r"^results: expected"),
    ):
        path.write_text(f"run: exact\n{text}")
        with pytest.raises(InvalidInputError, match=message):
            read_settings(["--config", str(path)], ExactConfig)


# -- models --------------------------------------------------------------------------------------------------


def test_a_model_is_drawn_from_its_seed_and_read_back_from_a_folder(tmp_path: Path) -> None:
    (run,) = runs_of(tmp_path)
    one, again, other = (build_model(run.arguments, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    model, tokenizer = build_model(run.arguments), build_tokenizer(run.arguments)
    assert (model.config.vocab_size, model.config.eos_token_id) == (len(tokenizer), tokenizer.eos_token_id)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    stored = RunArguments(model=str(tmp_path / "model"))
    assert all(torch.equal(one[name], value) for name, value in build_model(stored).state_dict().items())
    assert build_tokenizer(stored)("12=").input_ids == tokenizer("12=").input_ids


def test_problems_come_from_the_arguments(tmp_path: Path) -> None:
    (run,) = runs_of(tmp_path, difficulty={"max_value": 30})
    split = build_dataset(run.arguments, seed=5)
    assert (len(split.train), len(split.held_out)) == (4, 2)
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(f'{{"prompt": "{i}?", "reward_model": {{"ground_truth": "{i}"}}}}' for i in range(5)))
    math = RunArguments(task="math", style="full", data=str(path), held_out_problems=2, model="a")
    split = build_dataset(math)
    assert (len(split.train), len(split.held_out)) == (3, 2)


# -- estimates -----------------------------------------------------------------------------------------------


def test_what_lies_in_memory_is_counted_to_the_byte(tmp_path: Path) -> None:
    (run,) = runs_of(tmp_path)
    model = build_model(run.arguments)
    optimiser = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()  # type: ignore[union-attr]
    optimiser.step()
    moments = [state[name] for state in optimiser.state.values() for name in ("exp_avg", "exp_avg_sq")]
    taken = memory_estimate(run)
    assert taken.weights == taken.reference == sum(parameter.nbytes for parameter in model.parameters())
    assert taken.gradients == sum(
        parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None
    )
    assert taken.optimiser == sum(moment.nbytes for moment in moments)
    assert taken.critic == taken.gathered == 0
    cache = model(torch.zeros(3, 20, dtype=torch.long), use_cache=True).past_key_values
    cached = sum(table.nbytes for layer in cache.layers for table in (layer.keys, layer.values))
    (run,) = runs_of(tmp_path, evaluation_rows=3)
    assert memory_estimate(run).judging == cached


def kept_for_backward(arguments: RunArguments, rows: int, *, mixed: bool) -> int:
    """Bytes that autograd holds after a forward pass, the weights themselves left out."""
    model = build_model(arguments)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed),
    ):
        model(torch.zeros(rows, 8, dtype=torch.long), use_cache=False).logits.sum()
    return sum(storage.nbytes() for place, storage in kept.items() if place not in weights)


@pytest.mark.parametrize("precision", ["float32", "mixed", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "hidden", "inner", "pairs"), [("llama", 32, 96, 4), ("qwen2", 32, 32, 2), ("llama", 16, 128, 1)]
)
def test_a_layer_keeps_what_is_said(kind: str, hidden: int, inner: int, pairs: int, precision: Any) -> None:
    """Twice differenced, in layers and in rows: embedding, head and what is held once cancel."""
    kept = {}
    for layers in (1, 2):
        sizes: dict[str, Any] = {"model_type": kind, "num_hidden_layers": layers, "num_key_value_heads": pairs}
        sizes |= {"hidden_size": hidden, "intermediate_size": inner}
        arguments = RunArguments(
            architecture=ARCHITECTURE | sizes, dtype="bfloat16" if precision == "bfloat16" else "float32"
        )
        for rows in (2, 4):
            kept[layers, rows] = kept_for_backward(arguments, rows, mixed=precision == "mixed")
    tokens = 2 * 8
    measured = (kept[2, 4] - kept[2, 2] - kept[1, 4] + kept[1, 2]) / tokens
    assert layer_bytes(model_configuration(arguments), precision) == measured


def test_a_model_without_key_value_heads_of_its_own_is_estimated_too(tmp_path: Path) -> None:
    sizes = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
    (run,) = runs_of(tmp_path, architecture=sizes)
    llama = ARCHITECTURE | {"intermediate_size": 64, "num_key_value_heads": 4}
    (other,) = runs_of(tmp_path, architecture=llama)
    for part in ("judging", "activations"):
        assert getattr(memory_estimate(run), part) == getattr(memory_estimate(other), part)


def test_sharding_divides_what_it_shards(tmp_path: Path) -> None:
    (run,) = runs_of(tmp_path, method="ppo")
    whole, gradients, everything = (memory_estimate(run, Launch(2, stage, "no")) for stage in (0, 2, 3))
    assert (gradients.weights, gradients.gradients * 2, gradients.optimiser * 2) == (
        whole.weights,
        whole.gradients,
        whole.optimiser,
    )
    assert (everything.weights * 2, everything.critic * 2) == (whole.weights, whole.critic)
    assert everything.gathered > 0 == whole.gathered
    assert whole.critic == whole.weights + whole.gradients + whole.optimiser
    (one_model,) = runs_of(tmp_path, method="tbrm")
    assert everything.gathered == 2 * memory_estimate(one_model, Launch(2, 3, "no")).gathered


def test_a_reference_under_fsdp_2_is_gathered_whole(tmp_path: Path) -> None:
    (run,) = runs_of(tmp_path)
    of_a_layer, whole = (memory_estimate(run, Launch(2, 3, "no", fsdp)) for fsdp in (0, 2))
    read = setting(run, "per_device_train_batch_size") * 4 * model_configuration(run.arguments).vocab_size
    assert (of_a_layer.scoring, whole.scoring) == (0, memory_estimate(run).weights + read * (4 + 4))
    large = replace(whole, scoring=10**9)
    assert large.peak == 10**9 + sum(
        getattr(whole, part) for part in ("weights", "gradients", "optimiser", "reference")
    )


def test_work_is_counted_at_most(tmp_path: Path) -> None:
    (run,) = runs_of(tmp_path, "--num_generations", "2")
    done = work_estimate(run)
    tokens = 8 * 2 * (16 + 4)
    assert (done.problems, done.rollouts, done.generated_tokens, done.updates) == (8, 16, 64, 3)
    # sampling and the reference read every token once, an update costs three times as much
    assert done.operations == done.parameters * 3 * tokens * (2 + 2 + 6)
    (ppo,) = runs_of(tmp_path, method="ppo", num_iterations=3)
    assert work_estimate(ppo).operations == done.parameters * tokens / 2 * (2 + 2 + 3 * 12)


# -- launch files --------------------------------------------------------------------------------------------


def test_launch_files_are_read_by_accelerate(tmp_path: Path) -> None:
    for name, stage, fsdp in (("fsdp_4gpu", 3, 2), ("deepspeed_4gpu", 3, 0), ("ddp_4gpu", 0, 0)):
        path = CONFIGS / "launch" / f"{name}.yaml"
        assert read_launch_file(path) == Launch(processes=4, stage=stage, mixed_precision="bf16", fsdp=fsdp)
    bad = tmp_path / "bad.yaml"
    good = (CONFIGS / "launch" / "fsdp_4gpu.yaml").read_text()
    for old, new, message in (
        ("num_machines", "num_machine", "num_machine"),
        ("fsdp_reshard_after_forward", "fsdp_reshard_afterwards", "accelerate refuses fsdp_config"),
        ("fsdp_version: 2", "fsdp_version: 7", "fsdp_version: expected 1 or 2"),
    ):
        bad.write_text(good.replace(old, new))
        with pytest.raises(InvalidInputError, match=message):
            read_launch_file(bad)
    bad.write_text(good.replace("fsdp_reshard_after_forward: true", "fsdp_reshard_after_forward: false"))
    assert read_launch_file(bad).stage == 2
    first = good.replace("fsdp_version: 2", "fsdp_version: 1")
    bad.write_text(first.replace("fsdp_reshard_after_forward: true", "fsdp_reshard_after_forward: FULL_SHARD"))
    assert read_launch_file(bad).fsdp == 1
    deep = (CONFIGS / "launch" / "deepspeed_4gpu.yaml").read_text()
    bad.write_text(deep.replace("zero3.json", "zero4.json"))
    with pytest.raises(InvalidInputError, match="accelerate refuses deepspeed_config"):
        read_launch_file(bad)
    bad.write_text(deep.replace("deepspeed_config_file: experiments/configs/launch/zero3.json", "zero_stage: 2"))
    assert read_launch_file(bad).stage == 2
    bad.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nnum_processes: 2\nmixed_precision: 'no'\n"
    )
    assert read_launch_file(bad) == Launch(2, 0, "no")
