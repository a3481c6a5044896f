"""Files of trajectories: what is written is read again, and every way to be wrong is named with its line."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn import KINDS, as_tuples, random_policy, random_problem, short_answers
from hypothesis import given
from hypothesis import strategies as st
from strategies import problems

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.trajectories import TrajectoryBatch, sample_trajectories, trajectory_return
from tbrm_theory.trajectory_files import read_trajectories, write_trajectories
from tbrm_theory.transitions import DeterministicTransition, SparseTransition


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_same(found: TrajectoryBatch, expected: TrajectoryBatch) -> None:
    for name in ("states", "actions", "mask"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def written(path: Path, *lines: str | dict[str, Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def line(*steps: tuple[int, int], **more: Any) -> dict[str, Any]:
    return {"states": [s for s, _ in steps], "actions": [a for _, a in steps]} | more


# -- round trip ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_again(kind: str, tmp_path: Path):
    mdp = random_problem(kind)
    batch = sample_trajectories(mdp, random_policy(mdp, 0), 50, seeded(0))
    write_trajectories(tmp_path / "data.jsonl", mdp, batch)
    found = read_trajectories(tmp_path / "data.jsonl", mdp)
    assert_same(found.batch, batch)
    assert torch.equal(found.trajectory_return, trajectory_return(mdp, batch))


@given(st.data())
def test_every_problem_round_trips(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    """Few rewards and few actions, so that many lines are short."""
    mdp = data.draw(problems(max_actions=2, min_horizon=2))
    quiet = RegularizedMDP(
        beta=mdp.beta,
        initial=mdp.initial,
        reward=[table * data.draw(st.sampled_from([0.0, 1.0])) for table in mdp.reward],
        reference=mdp.reference,
        transitions=mdp.transitions,
    )
    batch = sample_trajectories(quiet, quiet.log_reference, 10, seeded(0))
    path = tmp_path_factory.mktemp("round") / "data.jsonl"
    write_trajectories(path, quiet, batch)
    assert_same(read_trajectories(path, quiet).batch, batch)


@pytest.mark.parametrize("slip", [0.0, 0.4])
def test_a_response_that_ended_makes_a_short_line(slip: float, tmp_path: Path):
    """The end token alone ends; a word that may be lost needs one more step to tell whether it was."""
    mdp = short_answers(slip=slip, horizon=5)
    batch = sample_trajectories(mdp, mdp.log_reference, 200, seeded(0))
    path = tmp_path / "data.jsonl"
    write_trajectories(path, mdp, batch)
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    lengths = set()
    for steps, found in zip(as_tuples(batch.states, batch.actions), lines, strict=True):
        ends = [h for h, pair in enumerate(steps) if pair in ((1, 0), (0, 0))]  # both lead to the end for certain
        expected = ends[0] + 1 if ends else 5
        assert list(zip(found["states"], found["actions"], strict=True)) == list(steps[:expected])
        lengths.add(expected)
    assert lengths == {1, 2, 3, 4, 5}
    assert_same(read_trajectories(path, mdp).batch, batch)


def test_noisy_returns_are_kept(tmp_path: Path):
    """Observed ones as they are, to the last bit; where the line has none, the sum of the rewards."""
    mdp = short_answers()
    batch = sample_trajectories(mdp, mdp.log_reference, 3, seeded(0))
    noisy = trajectory_return(mdp, batch) + torch.tensor([0.1, -1e-17, 1 / 3], dtype=torch.float64)
    write_trajectories(tmp_path / "data.jsonl", mdp, batch, noisy)
    assert torch.equal(read_trajectories(tmp_path / "data.jsonl", mdp).trajectory_return, noisy)
    path = written(tmp_path / "data.jsonl", line((1, 1), (1, 0)), line((1, 0), **{"return": -7}))
    assert read_trajectories(path, mdp).trajectory_return.tolist() == [2.0, -7.0]


def test_what_a_short_line_leaves_out_is_filled_in(tmp_path: Path):
    """A full line, a short one, one that is over from the start; no line break at the very end; Windows' line breaks."""
    mdp = short_answers()
    path = tmp_path / "data.jsonl"
    path.write_bytes(
        b'{"states": [1, 1, 1], "actions": [1, 1, 0]}\r\n {"actions":[0],"states":[1]}\r\n{"states": [0], "actions": [0]}'
    )
    data = read_trajectories(path, mdp)
    assert data.batch.states.tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert data.batch.actions.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert data.batch.mask.tolist() == [[True] * 3, [True, False, False], [True, False, False]]
    assert data.trajectory_return.tolist() == [0.0 + 0.1 + 3.0, 1.0, 0.0]


def test_what_is_filled_in_need_not_be_action_zero(tmp_path: Path):
    """The only action and the only successor have other indices than 0."""
    reference = torch.tensor([[0.0, 0.0, 1.0], [0.5, 0.5, 0.0]], dtype=torch.float64)
    ends = torch.tensor([[0, 0, 1], [0, 0, 0]])
    mdp = RegularizedMDP(
        beta=1.0,
        initial=torch.tensor([0.0, 1.0]),
        reward=[torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(2, 3)],
        reference=[reference, reference, reference.flip(0)],
        transitions=[DeterministicTransition(ends, 2), DeterministicTransition(ends, 2)],
    )
    data = read_trajectories(written(tmp_path / "data.jsonl", line((1, 1))), mdp)
    assert data.batch.states.tolist() == [[1, 0, 1]]
    assert data.batch.actions.tolist() == [[1, 2, 2]]
    assert data.batch.mask.tolist() == [[True, False, False]]


# -- every way to be wrong -----------------------------------------------------------------------------------------

GOOD = line((1, 1), (1, 1), (1, 0))
WRONG: dict[str, tuple[str | dict[str, Any], str]] = {
    "blank": ("", "expected a trajectory, found a blank line"),
    "spaces only": ("  \t", "expected a trajectory, found a blank line"),
    "no JSON": ("{'states': [0]}", "not valid JSON, column 2"),
    "two values": ('{"states": [1], "actions": [0]} {}', "not valid JSON, column 33"),
    "NaN": ('{"states": [1], "actions": [0], "return": NaN}', "NaN is not a JSON number"),
    "infinity": ('{"states": [1], "actions": [0], "return": -Infinity}', "-Infinity is not a JSON number"),
    "a number too large": (
        '{"states": [1], "actions": [0], "return": 1e999}',
        "return: expected a number that a double",
    ),
    "a return that would overflow": (
        '{"states": [1], "actions": [0], "return": 1e101}',
        "return: expected a return of at",
    ),
    "a return in words": (line((1, 0), **{"return": "1.0"}), "return: expected a number"),
    "a return that is a truth value": (line((1, 0), **{"return": True}), "return: expected a number, found true"),
    "no return after all": (line((1, 0), **{"return": None}), "return: expected a number, found null"),
    "a key twice": ('{"states": [1], "actions": [0], "states": [1]}', "'states' appears twice"),
    "an unknown key": (line((1, 0), reward=1.0), "reward: unknown key; expected one of states, actions, return"),
    "no states": ({"actions": [0]}, "states: missing"),
    "no actions": ({"states": [1]}, "actions: missing"),
    "a list": ("[[1, 0]]", "the document: expected an object, found a list of 1"),
    "null": ("null", "the document: expected an object, found null"),
    "states that are no list": ({"states": 1, "actions": [0]}, "states: expected a list of states, found 1"),
    "no steps": ({"states": [], "actions": []}, "states: expected at least one of states, found an empty list"),
    "fewer actions": ({"states": [1, 1], "actions": [1]}, "actions: expected 2 actions, found 1"),
    "too long": (line(*[(1, 1)] * 4), "states: expected at most 3 steps, found 4"),
    "a truth value": (
        {"states": [True], "actions": [0]},
        "states[0]: expected the index of a state, an integer, found true",
    ),
    "a fraction": (
        {"states": [1.0], "actions": [0]},
        "states[0]: expected the index of a state, an integer, found 1.0",
    ),
    "a negative index": (
        {"states": [1], "actions": [-1]},
        "actions[0]: expected the index of a action, from 0 to 1, found -1",
    ),
    "beyond the layer": (
        {"states": [1, 2], "actions": [1, 0]},
        "states[1]: expected the index of a state, from 0 to 1, found 2",
    ),
    "beyond 64 bits": ({"states": [10**30], "actions": [0]}, "states[0]: expected the index of a state, from 0 to 1"),
    "thousands of digits": (
        '{"states": [' + "9" * 5000 + '], "actions": [0]}',
        "states[0]: expected the index of a state",
    ),
    "nested too deeply": ("[" * 100_000, "nested too deeply"),
    "an action of reference 0": (line((1, 0), (0, 1), (0, 0)), "actions[1]: expected an action that exists"),
    "an impossible transition": (line((1, 0), (1, 0), (0, 0)), "states[1]: expected a possible successor"),
    "an impossible transition to the end": (line((1, 1), (0, 0)), "states[1]: expected a possible successor"),
    "not over yet": (
        line((1, 1), (1, 1)),
        "states: expected 3 steps, or an end after which all is forced and rewardless, found 2",
    ),
}


@pytest.mark.parametrize(("bad", "expected"), WRONG.values(), ids=WRONG.keys())
def test_a_bad_line_is_named_by_its_number(bad: str | dict[str, Any], expected: str, tmp_path: Path):
    path = written(tmp_path / "data.jsonl", GOOD, GOOD, bad, GOOD)
    with pytest.raises(InvalidInputError) as error:
        read_trajectories(path, short_answers())
    assert str(error.value).startswith(f"{path}, line 3: ")
    assert expected in str(error.value)


def test_an_impossible_first_state_is_named(tmp_path: Path):
    mdp = random_problem("dense")
    batch = sample_trajectories(mdp, mdp.log_reference, 2, seeded(0))
    path = tmp_path / "data.jsonl"
    write_trajectories(path, mdp, batch)
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    lines[1]["states"][0] = 1
    with pytest.raises(InvalidInputError, match=r"line 2: states\[0\]: expected a first state of positive probability"):
        read_trajectories(written(path, *lines), mdp)


def test_a_line_whose_end_is_not_certain_is_refused(tmp_path: Path):
    """After a word that may have been lost the response may be over or not, and a short line does not tell."""
    path = written(tmp_path / "data.jsonl", line((1, 1)))
    with pytest.raises(InvalidInputError, match="line 1: states: expected 3 steps, or an end"):
        read_trajectories(path, short_answers(slip=0.4))


def test_a_line_whose_end_has_two_forms_is_refused(tmp_path: Path):
    """Two states are both over, but which of them follows is not written down."""
    reference = torch.tensor([[1.0], [1.0]], dtype=torch.float64)
    stay = DeterministicTransition(torch.tensor([[0], [1]]), 2)
    half = torch.full((2, 1, 2), 0.5, dtype=torch.float64)
    mdp = RegularizedMDP(
        beta=1.0,
        initial=torch.tensor([0.5, 0.5]),
        reward=[torch.zeros(2, 1)] * 3,
        reference=[reference] * 3,
        transitions=[SparseTransition(torch.tensor([[[0, 1]]] * 2), half, 2), stay],
    )
    with pytest.raises(InvalidInputError, match="line 1: states: expected 3 steps, or an end"):
        read_trajectories(written(tmp_path / "data.jsonl", line((0, 0))), mdp)
    batch = sample_trajectories(mdp, mdp.log_reference, 20, seeded(0))
    write_trajectories(tmp_path / "data.jsonl", mdp, batch)
    assert_same(read_trajectories(tmp_path / "data.jsonl", mdp).batch, batch)


def test_a_last_line_that_a_crash_cut_off_is_named_as_such(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD)[:-9])
    with pytest.raises(InvalidInputError, match=r"line 2: not valid JSON, .*; this last line is cut off"):
        read_trajectories(path, short_answers())


def test_other_encodings_are_named_with_their_line(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\xff\xfe\n")
    with pytest.raises(InvalidInputError, match=r"line 2: not UTF-8 text"):
        read_trajectories(path, short_answers())


@pytest.mark.parametrize("content", ["", "\n"])
def test_a_file_without_trajectories_is_refused(content: str, tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    with pytest.raises(InvalidInputError, match=r"expected (at least one|a) trajectory"):
        read_trajectories(path, short_answers())


def test_a_missing_file_is_an_error_of_the_system(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        read_trajectories(tmp_path / "none.jsonl", short_answers())


# -- what cannot be written, and writing that fails -------------------------------------------------------------------


def test_trajectories_that_the_problem_cannot_produce_are_not_written(tmp_path: Path):
    mdp = short_answers()
    batch = sample_trajectories(mdp, mdp.log_reference, 2, seeded(0))
    path = tmp_path / "data.jsonl"
    many = sample_trajectories(mdp, random_policy(mdp, 0, 2), 2, seeded(0))
    with pytest.raises(InvalidInputError, match=r"expected shape \(trajectories, steps\), found \(2, 2, 3\)"):
        write_trajectories(path, mdp, many)
    with pytest.raises(InvalidInputError, match=r"trajectory_return: expected shape \(2,\)"):
        write_trajectories(path, mdp, batch, torch.zeros(3))
    with pytest.raises(InvalidInputError, match=r"trajectory_return\[1\]: expected a finite number"):
        write_trajectories(path, mdp, batch, torch.tensor([0.0, math.nan]))
    batch.states[1, 0] = 7
    with pytest.raises(InvalidInputError, match=r"trajectories\[1\]\.states\[0\]"):
        write_trajectories(path, mdp, batch)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mdp = short_answers()
    batch = sample_trajectories(mdp, mdp.log_reference, 5, seeded(0))
    path = tmp_path / "data.jsonl"
    write_trajectories(path, mdp, batch)
    before = path.read_bytes()

    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_trajectories(path, mdp, batch.rows(slice(0, 1)))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


KILLED_WHILE_WRITING = """
    import json, os, signal, sys, torch
    from drawn import short_answers
    from tbrm_theory.trajectories import sample_trajectories
    from tbrm_theory.trajectory_files import write_trajectories

    lines, dumps = 0, json.dumps
    def dump_until_killed(*arguments, **options):
        global lines
        lines += 1
        if lines == 10_000:
            os.kill(os.getpid(), signal.SIGKILL)
        return dumps(*arguments, **options)

    json.dumps = dump_until_killed
    mdp = short_answers()
    batch = sample_trajectories(mdp, mdp.log_reference, 20_000, torch.Generator().manual_seed(1))
    write_trajectories(sys.argv[1], mdp, batch)
"""


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path: Path):
    """Killed by the system half-way through 20,000 lines, most of which are on the disk by then."""
    mdp = short_answers()
    path = tmp_path / "data.jsonl"
    old = sample_trajectories(mdp, mdp.log_reference, 3, seeded(0))
    write_trajectories(path, mdp, old)
    command = [sys.executable, "-c", textwrap.dedent(KILLED_WHILE_WRITING), str(path)]
    folders = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    killed = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (half_written,) = (other for other in tmp_path.iterdir() if other != path)
    assert half_written.stat().st_size > 100_000
    assert_same(read_trajectories(path, mdp).batch, old)
