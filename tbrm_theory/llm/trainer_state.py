"""What a checkpoint must hold besides TRL's, so that a run resumed inside a generation window goes on bit for bit.

TRL counts micro-steps and keeps the generated batch of the window, and saves neither. One file for each process, safetensors
with a JSON header.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.llm.replay import Row

__all__ = ["TrainerState", "last_checkpoint", "load_state", "save_state"]


@dataclass(frozen=True)
class TrainerState:
    """Of one process."""

    step: int
    """Micro-steps so far."""
    reference_version: int
    """Resets of the reference so far."""
    replaying: bool
    """Whether the window's batches are replayed ones."""
    window: Sequence[dict[str, Tensor]]
    """The micro-batches of the generation window."""
    replay: Sequence[list[Row]] = ()
    """The buffer's groups of rows."""
    generator: Tensor | None = None
    """The state of the buffer's generator."""


def _path(folder: str | Path, process: int) -> Path:
    return Path(folder) / f"tbrm_state_{process}.safetensors"


def last_checkpoint(folder: Path, *, before: int, processes: int = 1, own: bool = True) -> str | None:
    """The newest checkpoint that was written to its end: every process writes its state last.

    Args:
        before: the run's number of updates. From a checkpoint of its last one transformers would take one update more.
        own: whether the trainer is one of this project's; of TRL's and transformers' the last file is ``trainer_state.json``.
    """
    ends = [_path("", process).name for process in range(processes)] if own else ["trainer_state.json"]
    whole = [path for path in folder.glob("checkpoint-*") if all((path / name).exists() for name in ends)]
    steps = {int(path.name.removeprefix("checkpoint-")): str(path) for path in whole}
    return steps[max(left)] if (left := [step for step in steps if step < before]) else None


def save_state(state: TrainerState, folder: str | Path, process: int) -> None:
    """Writes the file of one process into a checkpoint's folder; a file half written never takes its name."""
    tensors = {f"window.{i}.{name}": table for i, batch in enumerate(state.window) for name, table in batch.items()}
    for i, group in enumerate(state.replay):
        for j, row in enumerate(group):
            tensors |= {f"replay.{i}.{j}.{name}": table for name, table in row.items()}
    if state.generator is not None:
        tensors["generator"] = state.generator
    header = {
        "step": state.step,
        "reference_version": state.reference_version,
        "replaying": state.replaying,
        "batches": len(state.window),
        "groups": [len(group) for group in state.replay],
    }
    path = _path(folder, process)
    partial = path.with_suffix(".partial")
    copies = {name: table.detach().cpu().clone().contiguous() for name, table in tensors.items()}
    save_file(copies, partial, metadata={"tbrm": json.dumps(header)})
    os.replace(partial, path)


def load_state(
    folder: str | Path, process: int, *, processes: int = 1, device: torch.device | str = "cpu"
) -> TrainerState:
    """Reads it; the window's batches go to ``device``, the replayed rows stay on the CPU.

    Raises:
        InvalidInputError: the checkpoint has no file of this process, or one of a process that there is not.
    """
    path, beyond = _path(folder, process), _path(folder, processes)
    for wrong, what in (
        (not path.exists(), f"{path} is missing"),
        (beyond.exists(), f"{beyond} belongs to no process"),
    ):
        if wrong:
            raise InvalidInputError(
                "resume_from_checkpoint", f"{what}; resume with the trainer and the processes that saved it"
            )
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["tbrm"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dictionary)
    window: list[dict[str, Tensor]] = [{} for _ in range(header["batches"])]
    replay: list[list[Row]] = [[{} for _ in range(size)] for size in header["groups"]]
    for name, table in tensors.items():
        kind, *place = name.split(".")
        if kind == "window":
            window[int(place[0])][place[1]] = table.to(device)
        elif kind == "replay":
            replay[int(place[0])][int(place[1])][place[2]] = table
    return TrainerState(
        step=header["step"],
        reference_version=header["reference_version"],
        replaying=header["replaying"],
        window=window,
        replay=replay,
        generator=tensors.get("generator"),
    )
