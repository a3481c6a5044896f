"""A batch may be cut into micro-batches and spread over processes in any way (trap 14)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.tiny_language_models import language_model, language_model_test, own_randomness  # noqa: F401
from tests.train_across_processes import METHODS, left, train

pytestmark = [*language_model_test, pytest.mark.slow]

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """What three steps of 8 rows at once leave, by method."""
    state = torch.random.get_rng_state()
    runs = {name: train(tmp_path_factory.mktemp(name), method=name, per_device_train_batch_size=8) for name in METHODS}
    torch.random.set_rng_state(state)
    return {name: left(run) for name, run in runs.items()}


@pytest.mark.parametrize("method", METHODS)
def test_8x1_is_4x2_is_2x4(method: str, whole: dict[str, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    expected = {name: table for name, table in whole[method].items() if name.startswith(("policy.", "critic."))}
    start = {f"policy.{name}": table for name, table in language_model().state_dict().items()}
    start |= {f"critic.network.{name}": table for name, table in language_model().model.state_dict().items()}
    moved = {name: (table - start.get(name, 0)).abs().max().item() for name, table in expected.items()}
    assert max(moved.values()) > 0.01
    assert all(far > 1e-3 for name, far in moved.items() if name.startswith("critic."))
    for rows, steps in ((4, 2), (2, 4)):
        run = train(tmp_path, method=method, per_device_train_batch_size=rows, gradient_accumulation_steps=steps)
        assert len(run.inputs) == 3 * steps
        found = left(run)
        torch.testing.assert_close({name: found[name] for name in expected}, expected, rtol=0, atol=2e-6)


def launch_options(kind: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Arguments of ``accelerate launch`` for two processes over gloo, and what the environment must say besides."""
    # `--cpu --num_processes 2` starts one process and says nothing; this way there are two.
    if kind == "ddp":
        return ["--multi_gpu", "--num_processes", "2"], {"ACCELERATE_USE_CPU": "true"}
    options = yaml.safe_load((ROOT / "experiments/configs/launch/fsdp_4gpu.yaml").read_text())
    options |= {"num_processes": 2, "mixed_precision": "no"}
    del options["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"]  # the model says which
    file = folder / "launch.yaml"
    file.write_text(yaml.safe_dump(options))
    return ["--config_file", str(file)], {"ACCELERATE_TORCH_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.parametrize(("kind", "share"), [("ddp", 1.0), ("fsdp", 0.5)])
def test_two_processes_of_4_are_one_of_8(
    whole: dict[str, dict[str, torch.Tensor]], tmp_path: Path, kind: str, share: float
) -> None:
    """Replicated (DDP) or sharded (FSDP 2), in one go or resumed after the first step, with one model that trains or two.

    Also trap 5: the start's logits come through the wrapper; and trap 9: one process has no reward at all.
    """
    options, environment = launch_options(kind, tmp_path)
    launch = [sys.executable, "-m", "accelerate.commands.launch", *options, "--main_process_port", "0"]
    command = [*launch, "--module", "tests.train_across_processes", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    for method, expected in whole.items():
        for name, rows in (("whole", [4, 4, 4]), ("resumed", [4, 4])):
            first, second = (load_file(tmp_path / method / f"{name}_{i}.safetensors") for i in range(2))
            torch.testing.assert_close(first, second, rtol=0, atol=0)
            told = {"processes": torch.tensor(2), "rows": torch.tensor(rows)}
            told["held here"] = torch.full_like(expected["held here"], share)
            told["layers alone"] = torch.tensor([kind == "fsdp", False, kind == "fsdp"])[: len(expected["held here"])]
            torch.testing.assert_close(first, expected | told, rtol=0, atol=5e-6)
        for i in range(
            2
        ):  # in mixed precision log-probabilities are not rounded, and the reference starts as the policy
            mixed = load_file(tmp_path / method / f"mixed_{i}.safetensors")
            assert all(table.dtype == torch.float32 for table in mixed.values())
            assert bool((mixed["log_policy"] != mixed["log_policy"].bfloat16()).any())
            torch.testing.assert_close(mixed["log_policy"], mixed["log_reference"], rtol=0, atol=5e-6)
