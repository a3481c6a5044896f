"""Trains the tiny model for three steps and leaves what each process ended with: ``accelerate launch … THIS FOLDER``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import DistributedType, PartialState
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.utils import strtobool
from trl.trainer import grpo_trainer
from trl.trainer.utils import create_model_from_path

from tbrm_theory.llm.critic import PPOTrainer
from tests.tiny_language_models import Watched, letters, trainer


class WatchedPPO(Watched, PPOTrainer):
    """Two models that train."""


METHODS: dict[str, dict[str, Any]] = {
    "tbrm": {"kind": Watched},
    # Rates at which all weights move, in the critic's layers from the second step on: its head starts at 0.
    "ppo": {
        "kind": WatchedPPO,
        "loss": "ppo",
        "learning_rate": 0.1,
        "trainer_options": {"critic_learning_rate": 0.02},
    },
}


def sometimes(prompts: list[str], completions: list[str], trainer_state: Any, **unused: Any) -> list[float | None]:
    """No reward for the second half of the first batch (one process, or one micro-batch, has none at all), nor ever for ``bcd``.

    Those of the other half are above 0, so that the critic has something to learn from them.
    """
    rewards: list[float | None] = [0.5 + reward for reward in letters(completions)]
    for i, prompt in enumerate(prompts):
        if prompt == "bcd" or (trainer_state.global_step == 0 and prompt in ("ci", "dddd", "g", "hab")):
            rewards[i] = None
    return rewards


def train(
    folder: Path, model: str | None = None, *, method: str = "tbrm", resume: str | None = None, **options: Any
) -> Watched:
    """Nothing random, so that the rows do not depend on how they are dealt out; plain steps, so that rounding stays small."""
    usual: dict[str, Any] = {
        "reward": sometimes,
        "generation_kwargs": {"do_sample": False},
        "optim": "sgd",
        "optim_args": "momentum=0.5",  # torch resumes no sharded optimizer that has no state
        "learning_rate": 2e-3,
        "max_steps": 3,
        "fused_lm_head": True,
    }
    usual |= {"num_iterations": 2, "reference_reset_steps": 1}  # the second update scores its rows by a new reference
    usual["max_grad_norm"] = 0.0  # clipping would hide a wrong scale
    run = trainer(folder, model, **usual | METHODS[method] | options)
    assert isinstance(run, Watched)
    run.train(resume_from_checkpoint=resume)
    return run


def processors_as_accelerators() -> None:
    """accelerate shards over processes of an accelerator only; those over gloo pass for such from here on."""
    PartialState._prepare_backend = lambda self, *unused: ("gloo", DistributedType.MULTI_GPU)
    torch.distributed.init_process_group("gloo")  # accelerate starts none where `use_cpu` is set


def whole(table: Tensor) -> Tensor:
    """All of a table, wherever its parts are."""
    return (table.full_tensor() if isinstance(table, DTensor) else table).detach().contiguous()


def held_here(model: torch.nn.Module) -> float:
    """The share of a model's numbers that this process holds, to one digit: a bias of one number lies with one process."""
    held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())
    return round(held / sum(p.numel() for p in model.parameters()), 1)


def gathers_layers_alone(model: torch.nn.Module) -> bool:
    """Whether FSDP gathers one layer of a model at a time."""
    return any(isinstance(module, FSDPModule) for name, module in model.named_modules() if name.endswith("layers.0"))


def left(run: Watched) -> dict[str, Tensor]:
    """The weights of all models, the residuals logged, and what says how they came about."""
    models = {"policy": run.model, "reference": run.ref_model}
    if isinstance(run, WatchedPPO):
        models["critic"] = run.critic
    found: dict[str, Tensor] = {}
    for key, model in models.items():
        weights = run.accelerator.unwrap_model(model).state_dict()
        found |= {f"{key}.{name}": whole(table) for name, table in weights.items()}
    found["residual"] = torch.tensor([entry["tbrm/residual"] for entry in run.state.log_history[:-1]])
    found["processes"] = torch.tensor(run.accelerator.num_processes)
    found["rows"] = torch.tensor([len(inputs["prompt_ids"]) for inputs in run.inputs])
    found["held here"] = torch.tensor([held_here(model) for model in models.values()])
    found["layers alone"] = torch.tensor([gathers_layers_alone(model) for model in models.values()])
    return found


def train_and_leave(folder: Path, method: str) -> None:
    """In one go, resumed after the first step, and one step in mixed precision."""
    rank, checkpoint = os.environ["RANK"], str(folder / "checkpoint-1")
    usual: dict[str, Any] = {"method": method, "per_device_train_batch_size": 4}

    run = train(folder, **usual, fused_lm_head=False, save_strategy="steps", save_steps=1)
    save_file(left(run), folder / f"whole_{rank}.safetensors")

    # What was gathered for a forward pass stays so.
    with patch.dict(os.environ, FSDP_RESHARD_AFTER_FORWARD="false"):
        run = train(folder, **usual, resume=checkpoint)
    save_file(left(run), folder / f"resumed_{rank}.safetensors")

    # The model by its path, in mixed precision. `auto` would place it, and the reference, on all devices of the machine.
    with patch.object(grpo_trainer, "create_model_from_path", wraps=create_model_from_path) as loaded:
        run = train(folder, checkpoint, **usual, bf16=True, activation_checkpointing=True, reward=letters, max_steps=1)
    assert [call.kwargs["device_map"] for call in loaded.call_args_list] == [None, None]
    scores = {"log_policy": run.scores[0].log_policy, "log_reference": run.scores[0].log_reference}
    if isinstance(run, WatchedPPO):
        assert run._values is not None
        scores["values"] = run._values
    save_file({name: table.detach() for name, table in scores.items()}, folder / f"mixed_{rank}.safetensors")


if __name__ == "__main__":
    if strtobool(os.environ.get("ACCELERATE_USE_FSDP", "false")):
        processors_as_accelerators()
    for method in METHODS:
        train_and_leave(Path(sys.argv[1]) / method, method)
