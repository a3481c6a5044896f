"""Trains the tiny model for three steps and leaves what each process ended with: ``accelerate launch … THIS FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.tiny_language_models import Watched, letters, trainer


def sometimes(prompts: list[str], completions: list[str], trainer_state: Any, **unused: Any) -> list[float | None]:
    """No reward for the second half of the first batch (one process, or one micro-batch, has none at all), nor ever for ``bcd``."""
    rewards: list[float | None] = list(letters(completions))
    for i, prompt in enumerate(prompts):
        if prompt == "bcd" or (trainer_state.global_step == 0 and prompt in ("ci", "dddd", "g", "hab")):
            rewards[i] = None
    return rewards


def train(folder: Path, **options: Any) -> Watched:
    """Nothing random, so that the rows do not depend on how they are dealt out; plain steps, so that rounding stays small."""
    usual: dict[str, Any] = {
        "generation_kwargs": {"do_sample": False},
        "optim": "sgd",
        "learning_rate": 2e-3,
        "max_steps": 3,
    }
    usual |= {"num_iterations": 2, "reference_reset_steps": 1}  # the second update scores its rows by a new reference
    usual["max_grad_norm"] = 0.0  # clipping would hide a wrong scale
    run = trainer(folder, reward=sometimes, kind=Watched, fused_lm_head=True, **usual | options)
    assert isinstance(run, Watched)
    run.train()
    return run


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    run = train(folder, per_device_train_batch_size=4)
    accelerator = run.accelerator
    left = {name: table.contiguous() for name, table in accelerator.unwrap_model(run.model).state_dict().items()}
    left["rows"] = torch.tensor([len(run.inputs), *(len(inputs["prompt_ids"]) for inputs in run.inputs)])
    left["processes"] = torch.tensor(accelerator.num_processes)
    left["residual"] = torch.tensor(
        [entry["tbrm/residual"] for entry in run.state.log_history if "tbrm/residual" in entry]
    )
    save_file(left, folder / f"process_{accelerator.process_index}.safetensors")
