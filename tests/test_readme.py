"""What the README shows works as it says: its example of an instance file, what it says is refused, its Python, its commands."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tbrm_theory import cli
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.evaluation import evaluate_instance
from tbrm_theory.instance import Instance

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TRANSITION = ("layers", 0, "transition")


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return str(found)


def load(text: str, folder: Path) -> Instance:
    (folder / "case.json").write_text(text, encoding="utf-8")
    return Instance.load(folder / "case.json")


def test_the_example_of_an_instance_file_loads_and_is_evaluated(tmp_path: Path) -> None:
    found = evaluate_instance(load(block("json"), tmp_path))
    assert found["policies"].keys() == {"mu", "reference", "optimal"}
    assert found["losses"]["theta"]["by_behaviour"].keys() == {"mu", "reference", "optimal", "replay"}
    assert found["q_star"][0][0][2] == "-inf"  # the action that does not exist
    assert len(found["q_star"][1][1]) == 1


@pytest.mark.parametrize(
    "transition",
    [
        {"kind": "dense", "probabilities": [[[1.0, 0.0], [0.0, 1.0], None]]},
        {
            "kind": "sparse",
            "state": [0, 0, 0],
            "action": [0, 1, 1],
            "next_state": [0, 1, 1],
            "probability": [1, 0.5, 0.5],
        },
    ],
)
def test_every_kind_of_transition_is_written_as_described(transition: Any, tmp_path: Path) -> None:
    document = json.loads(block("json"))
    deterministic = evaluate_instance(load(json.dumps(document), tmp_path))
    document["layers"][0]["transition"] = transition
    same = evaluate_instance(load(json.dumps(document), tmp_path))
    assert same["v_star"] == deterministic["v_star"]
    assert same["policies"] == deterministic["policies"]


def test_the_three_sections_may_be_absent_and_mass_on_no_action_is_an_infinite_regret(tmp_path: Path) -> None:
    document = json.loads(block("json"))
    document["policies"]["mu"][0] = [[0.3, 0.6, 0.1]]
    assert evaluate_instance(load(json.dumps(document), tmp_path))["policies"]["mu"]["regret"] == "inf"
    for section in ("policies", "mixtures", "logits"):
        del document[section]
    assert load(json.dumps(document), tmp_path).mdp.horizon == 2


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        (("layers", 1, "reference", 0), [0.9, 0.2], "layers[1].reference[0]"),
        (("layers", 1, "reference", 0), [1.1, -0.1], "layers[1].reference[0][1]"),
        (("layers", 1, "reward", 0), [0.0], "layers[1].reward[0]"),
        (("layers", 1, "reward", 0, 1), None, "layers[1].reward[0][1]"),
        ((*TRANSITION, "next_state", 0, 1), 2, "layers[0].transition.next_state[0][1]"),
        (("beta",), 0, "beta"),
        (("layers", 1, "reward", 0, 1), 1e101, "layers[1].reward[0][1]"),
        (("layers", 1, "reward", 0, 1), float("nan"), "case.json"),
        (("layers", 1, "reward", 0, 1), float("inf"), "case.json"),
        (("layers", 1, "rewards"), 0, "layers[1].rewards"),
        (("mixtures", "replay", 0, 1), "nu", "mixtures.replay[0][1]"),
        (("logits", ""), [], 'logits[""]'),
        (("mixtures", "a|b"), [[1, "mu"]], "mixtures.a|b"),
        (("mixtures", "optimal"), [[1, "mu"]], "mixtures.optimal"),
        (("mixtures", "mu"), [[1, "mu"]], "mixtures.mu"),
        (("format",), "other", "format"),
        (("version",), 2, "version"),
    ],
)
def test_what_it_says_is_refused_is_refused_there(
    path: tuple[Any, ...], value: Any, where: str, tmp_path: Path
) -> None:
    document = copy.deepcopy(json.loads(block("json")))
    *parents, last = path
    place = document
    for key in parents:
        place = place[key]
    place[last] = value
    if path[:1] == ("logits",):
        place[last] = place["theta"]
    with pytest.raises(InvalidInputError) as caught:
        load(json.dumps(document), tmp_path)
    assert caught.value.where.endswith(where)


def test_a_repeated_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="'beta' appears twice"):
        load(block("json").replace('"beta": 0.5', '"beta": 0.5, "beta": 1'), tmp_path)


def test_its_python_runs() -> None:
    exec(compile(block("python"), "README.md", "exec"), {})


def test_its_commands_exist() -> None:
    subcommands = re.findall(r"\.venv/bin/tbrm (\w+)", README)
    assert set(subcommands) == cli.COMMANDS.keys()
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(re.findall(r"\bmake ([a-z]+)\b", README)) <= {*targets}
