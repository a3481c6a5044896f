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
from tests.train_across_processes import left, train

pytestmark = [*language_model_test, pytest.mark.slow]

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What three steps of 8 rows at once leave."""
    state = torch.random.get_rng_state()
    run = train(tmp_path_factory.mktemp("whole"), per_device_train_batch_size=8)
    torch.random.set_rng_state(state)
    return left(run)


def test_8x1_is_4x2_is_2x4(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    moved = max((whole[name] - table).abs().max().item() for name, table in language_model().state_dict().items())
    assert moved > 0.01
    for rows, steps in ((4, 2), (2, 4)):
        run = train(tmp_path, per_device_train_batch_size=rows, gradient_accumulation_steps=steps)
        assert len(run.inputs) == 3 * steps
        for name, table in run.model.state_dict().items():
            torch.testing.assert_close(table, whole[name], rtol=0, atol=2e-6)


def launch_options(kind: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Arguments of ``accelerate launch`` for two processes over gloo, and what the environment must say besides."""
    # `--cpu --num_processes 2` starts one process and says nothing; this way there are two.
    if kind == "ddp":
        return ["--multi_gpu", "--num_processes", "2"], {"ACCELERATE_USE_CPU": "true"}
    options = yaml.safe_load((ROOT / "experiments/configs/launch/fsdp_4gpu.yaml").read_text())
    options |= {"num_processes": 2, "mixed_precision": "no"}
    options["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"] = "LlamaDecoderLayer"
    file = folder / "launch.yaml"
    file.write_text(yaml.safe_dump(options))
    return ["--config_file", str(file)], {"ACCELERATE_TORCH_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "share"), [("ddp", 1.0), ("fsdp", 0.5)])
def test_two_processes_of_4_are_one_of_8(
    whole: dict[str, torch.Tensor], tmp_path: Path, kind: str, share: float
) -> None:
    """Replicated (DDP) or sharded (FSDP 2), in one go or resumed after the first step.

    Also trap 5: the start's logits come through the wrapper; and trap 9: one process has no reward at all.
    """
    options, environment = launch_options(kind, tmp_path)
    launch = [sys.executable, "-m", "accelerate.commands.launch", *options, "--main_process_port", "0"]
    command = [*launch, "--module", "tests.train_across_processes", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, rows in (("whole", [4, 4, 4]), ("resumed", [4, 4])):
        first, second = (load_file(tmp_path / f"{name}_{i}.safetensors") for i in range(2))
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        told = {"processes": torch.tensor(2), "rows": torch.tensor(rows), "held here": torch.tensor([share, share])}
        torch.testing.assert_close(first, whole | told, rtol=0, atol=5e-6)
    for i in range(2):  # in mixed precision log-probabilities are not rounded, and the reference starts as the policy
        mixed = load_file(tmp_path / f"mixed_{i}.safetensors")
        assert mixed["log_policy"].dtype == torch.float32
        assert bool((mixed["log_policy"] != mixed["log_policy"].bfloat16()).any())
        torch.testing.assert_close(mixed["log_policy"], mixed["log_reference"], rtol=0, atol=5e-6)
