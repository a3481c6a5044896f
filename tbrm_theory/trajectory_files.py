"""Trajectories in a file: one JSON object a line (JSONL), ``{"states": […], "actions": […], "return": x}``.

A line shorter than the horizon is a response that ended: everything after it must be forced and rewardless (``endings``), and is
filled in when read. ``return`` is the observed return in reward units; one that is not the sum of the rewards, a noisy one, is kept
as it is, and where it is left out the sum of the rewards takes its place. Anything else is refused with the number of the line.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from tbrm_theory.endings import Endings, endings
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.feasibility import first_problem
from tbrm_theory.json_fields import Field, parse_json, replacement
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.tables import LARGEST
from tbrm_theory.trajectories import Dataset, TrajectoryBatch, check_trajectories, trajectory_return

__all__ = ["read_trajectories", "write_trajectories"]


def write_trajectories(
    path: str | Path,
    mdp: RegularizedMDP,
    batch: TrajectoryBatch,
    observed_return: Float[Tensor, " trajectories"] | None = None,
) -> None:
    """Write a batch ``(N, H)`` in place of ``path``, atomically; steps after the end of a response are left out.

    Args:
        observed_return: returns in reward units, such as noisy ones; the sums of the rewards if not given.

    Raises:
        InvalidInputError: batch dimensions, trajectories that the problem cannot produce, or returns that do not fit them.
        OSError: the file cannot be written; the old one then stays as it was.
    """
    check_trajectories(mdp, batch)
    if batch.states.dim() != 2:
        expected = "expected shape (trajectories, steps)"
        raise InvalidInputError("trajectories", f"{expected}, found {tuple(batch.states.shape)}")
    returns = trajectory_return(mdp, batch) if observed_return is None else observed_return
    data = Dataset(batch, returns)
    lengths = _lengths(endings(mdp), batch)
    columns = (batch.states.tolist(), batch.actions.tolist(), data.trajectory_return.tolist(), lengths.tolist())
    with replacement(path) as file:
        for states, actions, total, length in zip(*columns, strict=True):
            line = {"states": states[:length], "actions": actions[:length], "return": total}
            file.write(json.dumps(line, allow_nan=False) + "\n")


def read_trajectories(path: str | Path, mdp: RegularizedMDP) -> Dataset:
    """Read a file of trajectories of ``mdp``, ``(N, H)``, and check every one against it.

    Raises:
        InvalidInputError: names the file, a line, the field in it, and what was expected there.
        OSError: the file cannot be read.
    """
    ends = endings(mdp)
    lines = _read_lines(path, [tuple(table.shape) for table in mdp.reference])
    device, horizon = mdp.initial.device, mdp.horizon
    states = torch.tensor([line.states + [0] * (horizon - line.steps) for line in lines], device=device)
    actions = torch.tensor([line.actions + [0] * (horizon - line.steps) for line in lines], device=device)
    unfinished = _fill_in(ends, states, actions, torch.tensor([line.steps for line in lines], device=device))
    mask = ~torch.stack([ends.state[h][states[:, h]] for h in range(horizon)], dim=-1)
    mask[:, 0] = True
    problem = first_problem(mdp, states, actions, mask)
    if problem is not None and problem.step < lines[problem.trajectory[0]].steps:
        where = f"{path}, line {problem.trajectory[0] + 1}: {problem.field}[{problem.step}]"
        raise InvalidInputError(where, problem.text)
    if bool(unfinished.any()):
        bad = int(unfinished.nonzero()[0])
        expected = f"expected {horizon} steps, or an end after which all is forced and rewardless"
        raise InvalidInputError(f"{path}, line {bad + 1}: states", f"{expected}, found {lines[bad].steps}")
    batch = TrajectoryBatch(states, actions, mask)
    exact = trajectory_return(mdp, batch).tolist()
    observed = [
        r if line.observed_return is None else line.observed_return for line, r in zip(lines, exact, strict=True)
    ]
    return Dataset(batch, torch.tensor(observed, dtype=torch.float64, device=device))


# -- the end of a response -----------------------------------------------------------------------------------------


def _lengths(ends: Endings, batch: TrajectoryBatch) -> Tensor:
    """How many steps of each trajectory there are up to the first pair after which everything is forced and rewardless."""
    last = [pair[batch.states[:, h], batch.actions[:, h]] for h, pair in enumerate(ends.pair)]
    return torch.stack(last, dim=-1).to(torch.int8).argmax(-1) + 1


def _fill_in(ends: Endings, states: Tensor, actions: Tensor, lengths: Tensor) -> Tensor:
    """Put what is forced in place of the steps from ``lengths`` on; returns which trajectories stop before their end."""
    unfinished = torch.zeros_like(lengths, dtype=torch.bool)
    for h in range(1, len(ends.state)):
        row = (lengths <= h).nonzero().squeeze(-1)
        before = states[row, h - 1], actions[row, h - 1]
        unfinished[row] |= ~ends.pair[h - 1][before]
        states[row, h] = ends.successor[h - 1][before].clamp(min=0)
        actions[row, h] = ends.action[h][states[row, h]]
    return unfinished


# -- lines ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    states: list[int]
    actions: list[int]
    observed_return: float | None

    @property
    def steps(self) -> int:
        return len(self.states)


def _read_lines(path: str | Path, sizes: list[tuple[int, ...]]) -> list[_Line]:
    """Every line of a file; ``sizes`` are the numbers of states and of actions of each layer."""
    content = Path(path).read_bytes()
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InvalidInputError(f"{path}, line {line}", f"not UTF-8 text ({error.reason})") from error
    complete = lines[-1] == ""  # the last line, too, ends with a line break
    if complete:
        lines.pop()
    if not lines:
        raise InvalidInputError(str(path), "expected at least one trajectory, found an empty file")
    parsed = []
    for n, text in enumerate(lines, start=1):
        where = f"{path}, line {n}"
        try:
            document = parse_json(text, where)
        except json.JSONDecodeError as error:
            problem = f"not valid JSON, column {error.colno}: {error.msg}"
            if not text.strip():
                problem = "expected a trajectory, found a blank line"
            elif n == len(lines) and not complete:
                problem += "; this last line is cut off"
            raise InvalidInputError(where, problem) from error
        try:
            parsed.append(_read_line(Field("", document), sizes))
        except InvalidInputError as error:
            raise InvalidInputError(f"{where}: {error.where}", error.problem) from error
    return parsed


def _read_line(document: Field, sizes: list[tuple[int, ...]]) -> _Line:
    document.only("states", "actions", "return")
    states = _indices(document["states"], [size[0] for size in sizes], "state")
    actions = _indices(document["actions"], [size[1] for size in sizes], "action", len(states))
    if "return" not in document.value:
        return _Line(states, actions, None)
    observed_return = document["return"].number()
    if abs(observed_return) > LARGEST:
        document["return"].refuse(f"a return of at most {LARGEST:g} in magnitude")
    return _Line(states, actions, observed_return)


def _indices(field: Field, sizes: list[int], of: str, length: int | None = None) -> list[int]:
    """The indices in a list, one for each layer as far as it goes."""
    values = field.value
    if (
        isinstance(values, list)
        and 0 < len(values) <= len(sizes)
        and len(values) == (length or len(values))
        and all(type(v) is int and 0 <= v < size for v, size in zip(values, sizes, strict=False))
    ):
        return values
    entries = field.items(length, f"{of}s")  # the slow way, which says what is wrong
    if len(entries) > len(sizes):
        raise InvalidInputError(field.path, f"expected at most {len(sizes)} steps, found {len(entries)}")
    return [entry.index(size, of) for entry, size in zip(entries, sizes, strict=False)]
