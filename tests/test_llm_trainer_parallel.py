"""A batch may be cut into micro-batches and spread over processes in any way (trap 14)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_language_models import language_model, language_model_test, own_randomness  # noqa: F401
from tests.train_across_processes import train

pytestmark = [*language_model_test, pytest.mark.slow]

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights after three steps of 8 rows at once, and the residuals logged."""
    state = torch.random.get_rng_state()
    run = train(tmp_path_factory.mktemp("whole"), per_device_train_batch_size=8)
    torch.random.set_rng_state(state)
    logged = [entry["tbrm/residual"] for entry in run.state.log_history if "tbrm/residual" in entry]
    return {**run.model.state_dict(), "residual": torch.tensor(logged)}


def test_8x1_is_4x2_is_2x4(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    moved = max((whole[name] - table).abs().max().item() for name, table in language_model().state_dict().items())
    assert moved > 0.01
    for rows, steps in ((4, 2), (2, 4)):
        run = train(tmp_path, per_device_train_batch_size=rows, gradient_accumulation_steps=steps)
        assert len(run.inputs) == 3 * steps
        for name, table in run.model.state_dict().items():
            torch.testing.assert_close(table, whole[name], rtol=0, atol=2e-6)


@pytest.mark.slow
def test_two_processes_of_4_are_one_of_8(whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Also trap 5: the start's logits come through ``DistributedDataParallel``; and trap 9: one process has no reward at all."""
    # `--cpu --num_processes 2` starts one process and says nothing; this way there are two, over gloo.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [*launch, "--main_process_port", "0", "--module", "tests.train_across_processes", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (load_file(tmp_path / f"process_{i}.safetensors") for i in range(2))
    assert first["processes"] == second["processes"] == 2
    assert first["rows"].tolist() == second["rows"].tolist() == [3, 4, 4, 4]
    for name, table in first.items():
        if name not in ("rows", "processes"):
            torch.testing.assert_close(table, second[name], rtol=0, atol=0)
            torch.testing.assert_close(table, whole[name], rtol=0, atol=5e-6)
