"""The command line: what it prints and where, its exit status, and that bad input costs one line and no traceback."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tbrm_theory import cli
from tbrm_theory.dynamic_programming import Solution, solve
from tbrm_theory.evaluation import evaluate_instance
from tbrm_theory.instance import Instance
from tbrm_theory.mdp import RegularizedMDP
from tests.documents import INSTANCE, changed, random_document


@pytest.fixture(autouse=True)
def _python_random_state() -> Iterator[None]:
    """rich draws identifiers of styles from Python's global generator; they are never printed."""
    state = random.getstate()
    yield
    random.setstate(state)


@pytest.fixture
def case(tmp_path: Path) -> Path:
    return written(INSTANCE, tmp_path)


def written(document: Any, folder: Path, name: str = "case.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(document))
    return path


def strict(text: str) -> Any:
    """JSON without the ``NaN`` and ``Infinity`` that Python reads."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


# -- evaluate ----------------------------------------------------------------------------------------------


def test_evaluate_json_prints_the_object_and_nothing_else(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(case), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    assert strict(out) == evaluate_instance(Instance.load(case))


def test_evaluate_prints_every_name_and_number_of_a_small_case(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(case)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = evaluate_instance(Instance.load(case))
    names = [*found["policies"], *found["losses"], *INSTANCE["mixtures"], "corollary4", "kl_to_reference"]
    assert all(name in out for name in names)
    numbers = [found["objective_star"], found["v_star"][0][1], found["losses"]["theta"]["corollary4"]]
    numbers += [found["policies"]["mu"]["regret"], found["losses"]["theta"]["by_behaviour"]["replay"]["brm"]]
    assert all(f"{number:.8g}" in out for number in numbers)
    assert "horizon 4" in out
    assert "-inf" in out


def test_evaluate_without_logits_prints_no_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", str(written({**INSTANCE, "logits": {}}, tmp_path))]) == 0
    assert "losses" not in capsys.readouterr().out


def test_a_large_case_is_cut_for_people_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = written(random_document(0, "dense", sizes=(2, 70, 2)), tmp_path)
    assert cli.main(["evaluate", str(case)]) == 0
    assert "… and 14 more states; --json prints all" in capsys.readouterr().out
    assert cli.main(["solve", str(case)]) == 0
    assert "1 of 3 layers left out" in capsys.readouterr().out
    case = written(random_document(0, "dense", sizes=(80, 2)), tmp_path)
    assert cli.main(["solve", str(case)]) == 0
    assert "… and 19 more first states" in capsys.readouterr().out


def test_names_are_printed_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = copy.deepcopy(INSTANCE)
    document["policies"]["[bold]β[/bold]"] = document["policies"]["mu"]
    document["policies"]["\ud800"] = document["policies"]["mu"]  # half of a pair: no text encoding has it
    case = written(document, tmp_path)
    assert cli.main(["evaluate", str(case)]) == 0
    assert "[bold]β[/bold]" in capsys.readouterr().out
    assert cli.main(["evaluate", str(case), "--json"]) == 0
    assert "\ud800" in strict(capsys.readouterr().out)["policies"]


# -- solve and families ------------------------------------------------------------------------------------


def test_solve_prints_the_optimum_and_its_certificate(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["solve", str(case)]) == 0
    out, err = capsys.readouterr()
    found = evaluate_instance(Instance.load(case))
    assert err == ""
    assert f"Optimal objective {found['objective_star']:.8g}" in out
    assert f"{found['v_star'][0][0]:.8g}" in out
    assert f"{found['policy_star'][3][1][1]:.8g}" in out
    assert "within float64 rounding" in out
    assert "yes" in out


def test_solve_says_when_a_solution_is_not_certified(
    case: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(mdp: RegularizedMDP) -> Solution:
        solution = solve(mdp)
        return dataclasses.replace(solution, q=tuple(q + torch.tensor(1e-9) for q in solution.q))

    monkeypatch.setattr(cli, "solve_exactly", wrong)
    assert cli.main(["solve", str(case)]) == 1
    assert "NO" in capsys.readouterr().out


def test_solve_reads_the_problem_alone(tmp_path: Path) -> None:
    assert cli.main(["solve", str(written({**INSTANCE, "policies": 3}, tmp_path))]) == 0


def test_families_lists_every_family_with_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    from tbrm_theory.families import FAMILIES  # imports gymnasium, which no other test here needs

    assert cli.main(["families"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert FAMILIES
    for name, family in FAMILIES.items():
        assert name in out
        assert all(f"{option}=" in out for option in family.options)
    assert "deterministic" in out
    assert "stochastic" in out


# -- errors ------------------------------------------------------------------------------------------------


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error, after checking that it is one and that nothing else was printed."""
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1
    return err[:-1]


@pytest.mark.parametrize("command", ["evaluate", "solve"])
def test_a_malformed_file_costs_one_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = written(changed(INSTANCE, ("layers", 1, "reward", 0, 1), None), tmp_path)
    wanted = f"tbrm: error: {bad}: layers[1].reward[0][1]: expected a number, found null"
    assert error_of([command, str(bad)], capsys) == wanted


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_other_bad_files_cost_one_line(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(path: Path) -> str:
        return error_of(["evaluate", str(path), *flags], capsys).removeprefix(f"tbrm: error: {path}: ")

    assert error(tmp_path / "nothing.json") == "No such file or directory"
    assert error(tmp_path) == "Is a directory"
    assert error(written(None, tmp_path)) == "the document: expected an object, found null"
    (tmp_path / "text.json").write_text("beta = 1\n")
    assert error(tmp_path / "text.json") == "not valid JSON, line 1 column 1: Expecting value"
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    assert error(tmp_path / "binary.json").startswith("not a UTF-8 text file")
    strange = written({**INSTANCE, "policies": {"a\nb\u2028": {}}}, tmp_path, "two\nlines.json")
    assert error_of(["solve", str(strange) + "\x1b"], capsys).endswith(
        "two\\nlines.json\\x1b: No such file or directory"
    )
    assert 'policies["a\\nb\\u2028"]: expected a list of layers' in error_of(["evaluate", str(strange)], capsys)


@pytest.mark.parametrize(
    "arguments", [[], ["evaluate"], ["evolve"], ["solve", "case.json", "--json"], ["evaluate", "a", "b"]]
)
def test_bad_usage_has_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err != ""


@pytest.mark.parametrize("command", [None, *cli.COMMANDS])
def test_every_command_has_help(command: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"] if command is None else [command, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "usage: tbrm" in out
    assert "Args:" not in out  # every argument's text was found, and stands beside it
    assert command is not None or all(name in out for name in cli.COMMANDS)


def test_an_interrupt_has_status_130(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path) -> Instance:
        raise KeyboardInterrupt

    monkeypatch.setattr(Instance, "load", interrupted)
    assert cli.main(["evaluate", str(case)]) == 130


# -- pipes and processes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_pipe_that_its_reader_closed_is_silent(
    flags: list[str], case: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does when it has enough
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert status_of(["evaluate", str(case), *flags]) == 1
        monkeypatch.undo()
    # Closing flushed what was left, as the interpreter does at its end, and found somewhere to put it.
    assert capsys.readouterr().err == ""


def status_of(arguments: list[str]) -> int | str | None:
    try:
        return cli.main(arguments)
    except SystemExit as end:  # rich's way of ending on a closed pipe
        return end.code


def test_as_a_module_it_prints_the_same_object(case: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tbrm_theory", "evaluate", str(case), "--json"],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert strict(done.stdout.decode()) == evaluate_instance(Instance.load(case))
