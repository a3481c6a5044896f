"""A checkpoint that is corrupt, or of another run, is refused by name; one that cannot be written leaves the last one in place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from problems import random_problem

from tbrm_theory.behaviours import MarkovBehaviour
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.objectives import PopulationObjective
from tbrm_theory.parametrisations import Tabular
from tbrm_theory.training import FitConfig, fit

MDP = random_problem("deterministic", 1)


def train(path: Path, mdp: RegularizedMDP = MDP, mode: str = "replay", behaviour: Any = None) -> Any:
    config = FitConfig(mode=mode, steps=6, seeds=2, checkpoint_every=3, evaluations=2)  # type: ignore[arg-type]
    objective = PopulationObjective(mdp, MarkovBehaviour(behaviour or mdp.log_reference))
    return fit(mdp, Tabular(mdp), config, objective=objective, checkpoint=path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    train(tmp_path / "run.safetensors")
    return tmp_path / "run.safetensors"


def edited(path: Path, edit: Callable[[dict[str, Any], dict[str, torch.Tensor]], object]) -> None:
    with safetensors.safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["run"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    edit(record, tensors)
    safetensors.torch.save_file(tensors, path, metadata={"run": json.dumps(record)})


@pytest.mark.parametrize(
    "edit",
    [
        lambda record, tensors: tensors.pop("theta"),
        lambda record, tensors: tensors.update(theta=torch.zeros(3)),
        lambda record, tensors: tensors["theta"].fill_(torch.nan),
        lambda record, tensors: tensors.update(generator=torch.zeros(3, dtype=torch.uint8)),
        lambda record, tensors: tensors.pop("buffer.mask"),
        lambda record, tensors: record.pop("config"),
        lambda record, tensors: record.pop("history"),
        lambda record, tensors: record.update(history={"loss": [], "regret": []}),
        lambda record, tensors: record.update(step="soon"),
    ],
)
def test_a_checkpoint_that_lacks_something_is_refused(edit: Callable[..., object], path: Path) -> None:
    edited(path, edit)
    with pytest.raises(InvalidInputError, match=r"run\.safetensors: not a checkpoint"):
        train(path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff" * 999])
def test_a_file_of_something_else_is_refused(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(InvalidInputError, match="not a checkpoint"):
        train(path)


@pytest.mark.parametrize("mode", ["replay", "population"])
def test_another_problem_of_the_same_shape_is_refused(mode: str, tmp_path: Path) -> None:
    train(tmp_path / "c", mode=mode)
    other = RegularizedMDP(
        beta=MDP.beta,
        initial=MDP.initial,
        reward=[table + torch.arange(table.shape[-1]) for table in MDP.reward],
        reference=MDP.reference,
        transitions=MDP.transitions,
    )
    with pytest.raises(InvalidInputError, match="its problem, data or parametrisation is another"):
        train(tmp_path / "c", other, mode=mode)


def test_other_data_on_the_same_problem_are_refused(tmp_path: Path) -> None:
    train(tmp_path / "c", mode="population")
    weights = [table * torch.arange(1, table.shape[-1] + 1) for table in MDP.reference]
    behaviour = tuple((table / table.sum(-1, keepdim=True)).log() for table in weights)
    with pytest.raises(InvalidInputError, match="its problem, data or parametrisation is another"):
        train(tmp_path / "c", mode="population", behaviour=behaviour)


def test_a_full_disk_names_the_checkpoint_and_keeps_the_last_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edited(path, lambda record, tensors: record.update(step=4))  # so that there is one more to write
    before = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"No space left on device.*run\.safetensors"):
        train(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
