"""`tbrm evaluate` against plain-Python enumeration, number by number, on design.md's example."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import reference
from convert import plain

from tbrm_theory.cli import main
from tbrm_theory.mdp import RegularizedMDP

CASE: dict[str, Any] = {
    "format": "tbrm-instance",
    "version": 1,
    "beta": 0.5,
    "initial": [1.0],
    "layers": [
        {
            "reward": [[0.0, 1.0]],
            "reference": [[0.5, 0.5]],
            "transition": {"kind": "deterministic", "next_state": [[0, 1]]},
        },
        {"reward": [[0.0, 1.0], [0.5]], "reference": [[0.5, 0.5], [1.0]], "transition": None},
    ],
    "policies": {"mu": [[[0.5, 0.5]], [[0.3, 0.7], [1.0]]]},
    "mixtures": {"replay": [[0.5, "mu"], [0.5, "reference"]]},
    "logits": {"theta": [[[0.1, -0.2]], [[0.0, 0.3], [1.0]]]},
}


@pytest.fixture(autouse=True)
def _tyro_draws() -> Iterator[None]:
    """tyro empties its cache at random, with Python's global generator; nothing that is printed depends on it."""
    state = random.getstate()
    yield
    random.setstate(state)


@pytest.fixture
def case(tmp_path: Path) -> Path:
    path = tmp_path / "case.json"
    path.write_text(json.dumps(CASE))
    return path


def refuse(constant: str) -> NoReturn:
    raise AssertionError(f"{constant} is not JSON")


def test_every_number_of_the_object_is_the_enumerated_one(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(case), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    truth = plain(RegularizedMDP.load(case))
    optimal, mu, ref = reference.optimal_policy(truth), CASE["policies"]["mu"], truth.reference
    assert [len(row) for row in found["q_star"][1]] == [2, 1]  # the file's own shape, no padding
    for layer, rows in enumerate(reference.optimal_q(truth)):
        for s, row in enumerate(rows):
            assert found["q_star"][layer][s] == pytest.approx(row)
            assert found["policy_star"][layer][s] == pytest.approx(optimal[layer][s])
        assert found["v_star"][layer] == pytest.approx(reference.optimal_values(truth)[layer])
    for name, policy in {"mu": mu, "reference": ref, "optimal": optimal}.items():
        assert found["policies"][name]["objective"] == pytest.approx(reference.objective(truth, policy))
        assert found["policies"][name]["regret"] == pytest.approx(reference.regret(truth, policy), abs=1e-12)
        assert found["policies"][name]["kl_to_reference"] == pytest.approx(reference.kl_to_reference(truth, policy))
    theta, logits = found["losses"]["theta"], CASE["logits"]["theta"]
    assert theta["regret"] == pytest.approx(reference.regret(truth, reference.softmax_policy(truth, logits)))
    assert theta["corollary4"] == pytest.approx(reference.corollary4(truth, logits))
    laws = {name: reference.trajectory_law(truth, policy) for name, policy in (("mu", mu), ("reference", ref))}
    laws["optimal"] = reference.trajectory_law(truth, optimal)
    laws["replay"] = reference.mixture_law(truth, [(0.5, mu), (0.5, ref)])
    assert set(theta["by_behaviour"]) == set(laws)
    for name, law in laws.items():
        assert theta["by_behaviour"][name]["tbrm"] == pytest.approx(reference.tbrm_loss(truth, logits, law))
        assert theta["by_behaviour"][name]["brm"] == pytest.approx(reference.brm_loss(truth, logits, law))


def test_a_policy_on_a_missing_action_is_infinitely_bad(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(case.read_text())
    document["layers"][1]["reference"][0] = [1.0, 0.0]
    case.write_text(json.dumps(document))
    assert main(["evaluate", str(case), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found["policies"]["mu"] == {"objective": "-inf", "regret": "inf", "kl_to_reference": "inf"}
    assert found["q_star"][1][0][1] == "-inf"
    assert found["policy_star"][1][0] == [1.0, 0.0]
    assert found["losses"]["theta"]["by_behaviour"]["mu"] == {"tbrm": "inf", "brm": "inf"}


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        (["beta"], 0.0, "beta"),
        (["beta"], True, "beta"),
        (["initial"], [0.5], "initial"),
        (["layers", 0, "reference", 0, 0], 0.6, "layers[0].reference[0]"),
        (["layers", 0, "reference", 0, 0], -0.5, "layers[0].reference[0][0]"),
        (["layers", 0, "transition", "next_state", 0, 1], 2, "layers[0].transition.next_state[0][1]"),
        (["layers", 1, "reward", 1], [], "layers[1].reward[1]"),
        (["policies", "mu", 0, 0, 0], 0.4, "policies.mu[0][0]"),
        (["policies", "optimal"], [[[1.0, 0.0]], [[1.0, 0.0], [1.0]]], "policies.optimal"),
        (["mixtures", "replay", 0, 1], "nobody", "mixtures.replay[0]"),
        (["logits", "theta", 1, 0, 0], None, "logits.theta[1][0][0]"),
        (["surprise"], 1, "surprise"),
    ],
)
def test_malformed_field_is_refused_by_its_path(
    case: Path, path: list[Any], value: Any, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads(case.read_text())
    target = document
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    case.write_text(json.dumps(document))
    assert main(["evaluate", str(case), "--json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert where in err
    assert err.count("\n") == 1


def test_solve_and_tables_print_and_missing_file_is_named(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["solve", str(case)]) == 0
    assert main(["evaluate", str(case)]) == 0
    assert "regret" in capsys.readouterr().out
    assert main(["evaluate", str(case) + ".missing", "--json"]) == 2
    assert "missing" in capsys.readouterr().err


def test_module_runs_as_a_program(case: Path) -> None:
    command = [sys.executable, "-m", "tbrm_theory", "evaluate", str(case), "--json"]
    assert "v_star" in json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
