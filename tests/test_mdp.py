"""The problem and its file format: what is read and written, and that everything malformed is refused."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.json_fields import Field, path_below, read_json, write_json
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.transitions import DenseTransition, DeterministicTransition, SparseTransition
from tests.documents import PROBLEM as DOCUMENT
from tests.documents import REMOVED, changed, longer, short_name, shorter


def load_text(text: str | bytes, folder: Path) -> RegularizedMDP:
    path = folder / "case.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return RegularizedMDP.load(path)


def load(document: Any, folder: Path) -> RegularizedMDP:
    return load_text(json.dumps(document), folder)


def layer(h: int, *keys: str | int) -> tuple[str | int, ...]:
    return ("layers", h, *keys)


def transition(h: int, *keys: str | int) -> tuple[str | int, ...]:
    return layer(h, "transition", *keys)


# -- reading -----------------------------------------------------------------------------------------------


def test_tables_are_those_of_the_file(tmp_path: Path) -> None:
    mdp = load(DOCUMENT, tmp_path)
    assert mdp.horizon == 4
    assert mdp.beta.item() == 0.5
    assert mdp.initial.tolist() == [0.25, 0.75]
    assert mdp.batch_shape == ()
    assert not mdp.is_deterministic
    assert mdp.rows(0, mdp.reference[0]) == [[0.3, 0.7, 0.0], [1.0]]
    assert mdp.rows(0, mdp.reward[0]) == [[0.0, 1.0, 0.0], [-2.5]]
    assert mdp.rows(2, mdp.reward[2]) == [[1.0, 2.0], [0.0, 0.25], [0.0]]  # the 9.0 was of no action
    assert mdp.valid[0].tolist() == [[True, True, False], [True, False, False]]
    assert mdp.valid[2].tolist() == [[True, True], [False, True], [True, False]]
    assert all(table.dtype == torch.float64 for table in (*mdp.reward, *mdp.reference, mdp.beta, mdp.initial))


def test_kernels_are_those_of_the_file(tmp_path: Path) -> None:
    mdp = load(DOCUMENT, tmp_path)
    first, second, third = mdp.transitions
    assert isinstance(first, DeterministicTransition)
    assert first.next_state.tolist() == [[0, 1, 0], [1, 0, 0]]  # padded with 0
    assert isinstance(second, SparseTransition)
    value = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    expected = [[0.2 * 100 + 0.8 * 10, 10.0], [1.0, 0.1 + 0.9 * 100]]
    assert torch.allclose(second.expect(value), torch.tensor(expected, dtype=torch.float64), rtol=1e-15)
    assert isinstance(third, DenseTransition)
    assert mdp.rows(2, third.probability)[2] == [[0.25, 0.75]]
    assert third.probability[1, 0].tolist() == [0.0, 0.0]  # a null row of an action that does not exist


def test_regularized_reward_is_r_over_beta_plus_log_reference(tmp_path: Path) -> None:
    mdp = load(DOCUMENT, tmp_path)
    assert mdp.regularized_reward[0][0].tolist() == [math.log(0.3), 2.0 + math.log(0.7), -math.inf]
    assert mdp.log_reference[0][1].tolist() == [0.0, -math.inf, -math.inf]


def test_a_problem_whose_transitions_are_all_successor_tables_is_deterministic(tmp_path: Path) -> None:
    document = copy.deepcopy(DOCUMENT)
    document["layers"] = document["layers"][:2]
    document["layers"][1]["transition"] = None
    assert load(document, tmp_path).is_deterministic


def test_repeated_sparse_entries_are_added_up(tmp_path: Path) -> None:
    third = 1 / 3
    repeated = {
        "kind": "sparse",
        "state": [0, 0, 0, 0, 1, 1],
        "action": [0, 0, 0, 1, 0, 1],
        "next_state": [2, 2, 2, 1, 0, 0],
        "probability": [third, third, third, 1.0, 1.0, 1.0],
    }
    kernel = load(changed(DOCUMENT, transition(1), repeated), tmp_path).transitions[1]
    assert isinstance(kernel, SparseTransition)
    assert kernel.probability.tolist() == [[[1.0], [1.0]], [[1.0], [1.0]]]
    assert kernel.next_state.tolist() == [[[2], [1]], [[0], [0]]]


def test_an_action_that_does_not_exist_may_have_any_reward_and_any_or_no_transition(tmp_path: Path) -> None:
    for probabilities in (None, [0.0, 0.0], [0.5, 0.5]):
        load(changed(DOCUMENT, transition(2, "probabilities", 1, 0), probabilities), tmp_path)
    load(changed(DOCUMENT, layer(2, "reward", 1, 0), None), tmp_path)
    load(changed(DOCUMENT, transition(0, "next_state", 0, 2), 1), tmp_path)
    sparse = changed(DOCUMENT, layer(1, "reference", 0), [1.0, 0.0])
    for column in ("state", "action", "next_state", "probability"):
        del sparse["layers"][1]["transition"][column][1]  # the only entry of action 1 of state 0
    kernel = load(sparse, tmp_path).transitions[1]
    assert kernel.expect(torch.ones(3, dtype=torch.float64)).tolist() == [[1.0, 0.0], [1.0, 1.0]]


def test_rows_that_sum_to_one_up_to_rounding_stay_and_others_are_divided(tmp_path: Path) -> None:
    tenths = [0.1] * 10  # sums to 1 - 1.1e-16 in some orders
    document = {
        **DOCUMENT,
        "initial": [1.0],
        "layers": [{"reward": [[0.0] * 10], "reference": [tenths], "transition": None}],
    }
    assert load(document, tmp_path).reference[0].tolist() == [tenths]
    off = [0.5 + 4e-10, 0.5 + 4e-10]
    document["layers"] = [{"reward": [[0.0] * 2], "reference": [off], "transition": None}]
    assert load(document, tmp_path).reference[0].tolist() == [[0.5, 0.5]]
    document["layers"][0]["reference"] = [[0.5 + 1e-9, 0.5 + 1e-9]]
    with pytest.raises(InvalidInputError, match=r"^layers\[0\]\.reference\[0\]: .*sum to 1.*1\.000000002"):
        load(document, tmp_path)


# -- refusing: every field, every way ----------------------------------------------------------------------

Malformed = tuple[tuple[str | int, ...], Any, str, str]

MALFORMED: list[Malformed] = [
    # the document
    (("format",), REMOVED, "format", "missing"),
    (("format",), "other", "format", 'expected "tbrm-instance", found "other"'),
    (("format",), 1, "format", "expected a string, found 1"),
    (("version",), REMOVED, "version", "missing"),
    (("version",), 2, "version", "expected version 1, found 2"),
    (("version",), "1", "version", 'expected version 1, found "1"'),
    (("version",), True, "version", "expected version 1, found true"),
    (("version",), [1], "version", "expected version 1, found a list of 1"),
    (("surplus",), 0, "surplus", "unknown key; expected one of format, version, beta"),
    (("two words",), 0, '["two words"]', "unknown key"),
    # beta
    (("beta",), REMOVED, "beta", "missing"),
    (("beta",), 0, "beta", "expected a positive temperature, found 0.0"),
    (("beta",), -0.5, "beta", "expected a positive temperature, found -0.5"),
    (("beta",), None, "beta", "expected a number, found null"),
    (("beta",), "0.5", "beta", 'expected a number, found "0.5"'),
    (("beta",), True, "beta", "expected a number, found true"),
    (("beta",), [0.5], "beta", "expected a number, found a list of 1"),
    (("beta",), {}, "beta", "expected a number, found an object"),
    (("beta",), 10**400, "beta", "expected a number that a double can hold"),
    (("beta",), 1e101, "beta", "expected a finite number of at most 1e+100 in magnitude, found 1e+101"),
    # initial
    (("initial",), REMOVED, "initial", "missing"),
    (("initial",), 1.0, "initial", "expected a list of states, found 1.0"),
    (("initial",), [], "initial", "expected 2 states, found 0"),
    (("initial",), [1.0], "initial", "expected 2 states, found 1"),
    (("initial",), longer, "initial", "expected 2 states, found 3"),
    (("initial",), [0.5, 0.6], "initial", "expected probabilities that sum to 1, found the sum 1.1"),
    (("initial",), [0.0, 0.0], "initial", "expected probabilities that sum to 1, found the sum 0.0"),
    (("initial", 1), -0.75, "initial[1]", "expected a probability, which is not negative, found -0.75"),
    (("initial", 0), None, "initial[0]", "expected a number, found null"),
    (("initial", 0), False, "initial[0]", "expected a number, found false"),
    # layers
    (("layers",), REMOVED, "layers", "missing"),
    (("layers",), [], "layers", "expected at least one of layers, found an empty list"),
    (("layers",), {}, "layers", "expected a list of layers, found an object"),
    (("layers",), None, "layers", "expected a list of layers, found null"),
    (layer(1), [], "layers[1]", "expected an object, found a list of 0"),
    (layer(1), None, "layers[1]", "expected an object, found null"),
    (
        layer(1, "rewards"),
        0,
        "layers[1].rewards",
        "unknown key; expected one of reward, reference, transition",
    ),
    # reward
    (layer(1, "reward"), REMOVED, "layers[1].reward", "missing"),
    (layer(1, "reward"), 0.0, "layers[1].reward", "expected a list of states, found 0.0"),
    (layer(1, "reward"), [], "layers[1].reward", "expected 2 states, found 0"),
    (layer(1, "reward"), shorter, "layers[1].reward", "expected 2 states, found 1"),
    (layer(1, "reward"), longer, "layers[1].reward", "expected 2 states, found 3"),
    (layer(1, "reward", 1), 0.5, "layers[1].reward[1]", "expected a list of actions, found 0.5"),
    (layer(1, "reward", 1), [], "layers[1].reward[1]", "expected 2 actions, found 0"),
    (layer(3, "reward", 0), longer, "layers[3].reward[0]", "expected 1 actions, found 2"),
    (layer(3, "reward", 1), shorter, "layers[3].reward[1]", "expected 3 actions, found 2"),
    (layer(1, "reward", 0, 1), None, "layers[1].reward[0][1]", "expected a number, found null"),
    (layer(1, "reward", 0, 1), "1", "layers[1].reward[0][1]", 'expected a number, found "1"'),
    (layer(1, "reward", 0, 1), "x" * 99, "layers[1].reward[0][1]", "x…"),
    (layer(1, "reward", 0, 1), True, "layers[1].reward[0][1]", "expected a number, found true"),
    (layer(1, "reward", 0, 1), [1.0], "layers[1].reward[0][1]", "expected a number, found a list of 1"),
    (layer(1, "reward", 0, 1), 10**400, "layers[1].reward[0][1]", "a number that a double can hold"),
    (
        layer(1, "reward", 0, 1),
        -2e100,
        "layers[1].reward[0][1]",
        "at most 1e+100 in magnitude, found -2e+100",
    ),
    (layer(1, "reward", 0, 1), 1e100, "layers[1].reward[0][1]", "expected |reward|/beta of at most 1e+100"),
    # reference
    (layer(1, "reference"), REMOVED, "layers[1].reference", "missing"),
    (layer(1, "reference"), "uniform", "layers[1].reference", 'expected a list of states, found "uniform"'),
    (
        layer(1, "reference"),
        [],
        "layers[1].reference",
        "expected at least one of states, found an empty list",
    ),
    (
        layer(1, "reference", 0),
        [],
        "layers[1].reference[0]",
        "expected at least one of actions, found an empty",
    ),
    (layer(1, "reference", 0), None, "layers[1].reference[0]", "expected a list of actions, found null"),
    (layer(1, "reference", 0), [0.0, 0.0], "layers[1].reference[0]", "sum to 1, found the sum 0.0"),
    (layer(1, "reference", 1), [0.9, 0.2], "layers[1].reference[1]", "sum to 1, found the sum 1.1"),
    (
        layer(1, "reference", 1),
        [0.9, 0.1 + 2e-9],
        "layers[1].reference[1]",
        "sum to 1, found the sum 1.00000000",
    ),
    (
        layer(3, "reference", 1),
        [-0.5, 1.0, 0.5],
        "layers[3].reference[1][0]",
        "expected a probability, found -0.5",
    ),
    (layer(1, "reference", 0, 0), None, "layers[1].reference[0][0]", "expected a number, found null"),
    (layer(1, "reference", 0, 0), True, "layers[1].reference[0][0]", "expected a number, found true"),
    (layer(1, "reference", 0, 0), "0.5", "layers[1].reference[0][0]", 'expected a number, found "0.5"'),
    (layer(1, "reference"), [[0.5, 0.5]], "layers[1].reward", "expected 1 states, found 2"),
    # transition, whatever its kind
    (transition(0), REMOVED, "layers[0].transition", "missing"),
    (transition(0), None, "layers[0].transition", "expected a transition to the next layer, found null"),
    (transition(0), [], "layers[0].transition", "expected an object, found a list of 0"),
    (transition(0), {}, "layers[0].transition.kind", "missing"),
    (transition(0, "kind"), REMOVED, "layers[0].transition.kind", "missing"),
    (transition(0, "kind"), "markov", "layers[0].transition.kind", '"dense" or "sparse", found "markov"'),
    (transition(0, "kind"), 3, "layers[0].transition.kind", "expected a string, found 3"),
    (
        transition(0, "kind"),
        "dense",
        "layers[0].transition.next_state",
        "unknown key; expected one of kind, prob",
    ),
    (
        transition(3),
        {"kind": "dense"},
        "layers[3].transition",
        "expected null, since nothing follows the last",
    ),
    (transition(3), REMOVED, "layers[3].transition", "missing"),
    # deterministic
    (transition(0, "next_state"), REMOVED, "layers[0].transition.next_state", "missing"),
    (transition(0, "next_state"), 0, "layers[0].transition.next_state", "expected a list of states, found 0"),
    (transition(0, "next_state"), shorter, "layers[0].transition.next_state", "expected 2 states, found 1"),
    (
        transition(0, "next_state", 1),
        longer,
        "layers[0].transition.next_state[1]",
        "expected 1 actions, found 2",
    ),
    (transition(0, "next_state", 0, 1), 2, "layers[0].transition.next_state[0][1]", "from 0 to 1, found 2"),
    (transition(0, "next_state", 0, 1), -1, "layers[0].transition.next_state[0][1]", "from 0 to 1, found -1"),
    (
        transition(0, "next_state", 0, 1),
        1.0,
        "layers[0].transition.next_state[0][1]",
        "an integer, found 1.0",
    ),
    (
        transition(0, "next_state", 0, 1),
        True,
        "layers[0].transition.next_state[0][1]",
        "an integer, found true",
    ),
    (
        transition(0, "next_state", 0, 1),
        None,
        "layers[0].transition.next_state[0][1]",
        "an integer, found null",
    ),
    (transition(0, "next_state", 0, 2), 7, "layers[0].transition.next_state[0][2]", "from 0 to 1, found 7"),
    (
        transition(0, "surplus"),
        0,
        "layers[0].transition.surplus",
        "unknown key; expected one of kind, next_state",
    ),
    # sparse
    (transition(1, "state"), REMOVED, "layers[1].transition.state", "missing"),
    (transition(1, "action"), REMOVED, "layers[1].transition.action", "missing"),
    (transition(1, "next_state"), REMOVED, "layers[1].transition.next_state", "missing"),
    (transition(1, "probability"), REMOVED, "layers[1].transition.probability", "missing"),
    (
        transition(1, "state"),
        [],
        "layers[1].transition.state",
        "at least one of entries, found an empty list",
    ),
    (transition(1, "state"), 0, "layers[1].transition.state", "expected a list of entries, found 0"),
    (transition(1, "action"), shorter, "layers[1].transition.action", "expected 6 entries, found 5"),
    (transition(1, "next_state"), longer, "layers[1].transition.next_state", "expected 6 entries, found 7"),
    (
        transition(1, "probability"),
        shorter,
        "layers[1].transition.probability",
        "expected 6 entries, found 5",
    ),
    (transition(1, "state", 2), 2, "layers[1].transition.state[2]", "index of a state, from 0 to 1, found 2"),
    (
        transition(1, "action", 2),
        2,
        "layers[1].transition.action[2]",
        "action of state 1, from 0 to 1, found 2",
    ),
    (
        transition(1, "action", 2),
        -1,
        "layers[1].transition.action[2]",
        "action of state 1, from 0 to 1, found -1",
    ),
    (transition(1, "next_state", 2), 3, "layers[1].transition.next_state[2]", "from 0 to 2, found 3"),
    (transition(1, "next_state", 2), 0.0, "layers[1].transition.next_state[2]", "an integer, found 0.0"),
    (
        transition(1, "probability", 2),
        -1.0,
        "layers[1].transition.probability[2]",
        "not negative, found -1.0",
    ),
    (
        transition(1, "probability", 2),
        True,
        "layers[1].transition.probability[2]",
        "expected a number, found true",
    ),
    (
        transition(1, "probability", 2),
        0.5,
        "layers[1].transition.probability",
        "action 0 of state 1 to sum to 1",
    ),
    (transition(1, "action", 1), 0, "layers[1].transition", "an entry for action 1 of state 0, which exists"),
    (transition(1, "surplus"), 0, "layers[1].transition.surplus", "unknown key"),
    # dense
    (transition(2, "probabilities"), REMOVED, "layers[2].transition.probabilities", "missing"),
    (
        transition(2, "probabilities"),
        None,
        "layers[2].transition.probabilities",
        "list of states, found null",
    ),
    (
        transition(2, "probabilities"),
        shorter,
        "layers[2].transition.probabilities",
        "expected 3 states, found 2",
    ),
    (
        transition(2, "probabilities", 0),
        shorter,
        "layers[2].transition.probabilities[0]",
        "expected 2 actions",
    ),
    (
        transition(2, "probabilities", 0, 1),
        longer,
        "layers[2].transition.probabilities[0][1]",
        "expected 2 states of the next layer, found 3",
    ),
    (
        transition(2, "probabilities", 0, 1),
        None,
        "layers[2].transition.probabilities[0][1]",
        "expected a list of states of the next layer, found null",
    ),
    (
        transition(2, "probabilities", 0, 1),
        [0.5, 0.4],
        "layers[2].transition.probabilities[0][1]",
        "expected probabilities that sum to 1, found the sum 0.9",
    ),
    (
        transition(2, "probabilities", 1, 0),
        [0.5, 0.4],
        "layers[2].transition.probabilities[1][0]",
        "expected probabilities that sum to 1, found the sum 0.9",
    ),
    (
        transition(2, "probabilities", 0, 0, 0),
        -0.1,
        "layers[2].transition.probabilities[0][0][0]",
        "expected a probability, which is not negative, found -0.1",
    ),
    (
        transition(2, "probabilities", 0, 0, 0),
        False,
        "layers[2].transition.probabilities[0][0][0]",
        "expected a number, found false",
    ),
    (transition(2, "surplus"), 0, "layers[2].transition.surplus", "unknown key"),
]


@pytest.mark.parametrize(("keys", "value", "where", "words"), MALFORMED, ids=short_name)
def test_a_malformed_field_is_refused_with_its_path_and_what_was_expected(
    keys: tuple[str | int, ...], value: Any, where: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        load(changed(DOCUMENT, keys, value), tmp_path)
    assert caught.value.where == where
    assert words in caught.value.problem
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("document", [None, 3, "text", [], True])
def test_a_document_that_is_no_object_is_refused(document: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"^the document: expected an object, found"):
        load(document, tmp_path)


def test_another_version_is_refused_as_such_and_not_for_its_unknown_keys(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"^version: expected version 1, found 2"):
        load({**DOCUMENT, "version": 2, "discount": 0.9}, tmp_path)


TEXT = json.dumps(DOCUMENT)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (TEXT.replace('"beta": 0.5', '"beta": NaN'), "NaN is not a JSON number"),
        (TEXT.replace('"beta": 0.5', '"beta": Infinity'), "Infinity is not a JSON number"),
        (TEXT.replace('"beta": 0.5', '"beta": -Infinity'), "-Infinity is not a JSON number"),
        (
            TEXT.replace('"beta": 0.5', '"beta": 0.5, "beta": 0.5'),
            "the key 'beta' appears twice in one object",
        ),
        (TEXT.replace('"kind": "dense"', '"kind": "dense", "kind": "dense"'), "the key 'kind' appears twice"),
        (TEXT[: len(TEXT) // 2], "not valid JSON, line 1 column"),
        (TEXT + "{}", "not valid JSON, line 1 column"),
        (TEXT.replace('"beta"', "beta"), "not valid JSON, line 1 column"),
        ("", "not valid JSON, line 1 column 1: Expecting value"),
        ("[" * 100_000, "nested too deeply"),
        (b"\xff\xfe{}", "not a UTF-8 text file"),
        (TEXT.encode("utf-16"), "not a UTF-8 text file"),
        (TEXT.encode("utf-8-sig"), "not valid JSON"),
        (bytes(range(256)), "not"),
    ],
)
def test_a_file_that_is_not_json_is_refused_with_its_name(text: str | bytes, words: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError) as caught:
        load_text(text, tmp_path)
    assert caught.value.where == str(tmp_path / "case.json")
    assert words in caught.value.problem


@pytest.mark.parametrize(
    ("number", "where"),
    [("1e999", "beta"), ("-1e999", "beta"), ("1" * 5000, "beta"), ("-" + "1" * 5000, "beta")],
)
def test_a_number_beyond_doubles_is_refused_where_it_stands(number: str, where: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=f"^{where}: expected a number that a double can hold"):
        load_text(TEXT.replace('"beta": 0.5', f'"beta": {number}'), tmp_path)


def test_a_deeply_nested_value_is_refused_where_it_stands(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"^beta: expected a number, found a list of 1$"):
        load_text(TEXT.replace('"beta": 0.5', f'"beta": {"[" * 400}{"]" * 400}'), tmp_path)


def test_a_missing_file_or_a_folder_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        RegularizedMDP.load(tmp_path / "nothing.json")
    with pytest.raises(IsADirectoryError):
        RegularizedMDP.load(tmp_path)


def test_a_path_stays_one_line_and_means_one_thing() -> None:
    assert path_below("", "beta") == "beta"
    assert path_below("policies", "mu") == "policies.mu"
    assert path_below("policies", "a.b") == 'policies["a.b"]'
    assert path_below("policies", "a\nb") == 'policies["a\\nb"]'
    assert path_below("policies", "") == 'policies[""]'
    assert [field.path for field in Field("x", [1, 2])] == ["x[0]", "x[1]"]


def test_an_error_survives_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(InvalidInputError("beta", "expected more")))
    assert (error.where, error.problem, str(error)) == ("beta", "expected more", "beta: expected more")


# -- writing -----------------------------------------------------------------------------------------------


def test_saving_and_loading_changes_no_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    document = copy.deepcopy(DOCUMENT)
    rows = torch.rand(2, generator=generator, dtype=torch.float64)
    document["layers"][3]["reference"][1] = [0.1, 0.2, 0.7 + 1e-10]  # is divided by its sum on loading
    document["layers"][1]["reference"][0] = [1 / 3, 2 / 3]
    document["layers"][1]["reward"][0] = rows.tolist()
    mdp = load(document, tmp_path)
    mdp.save(tmp_path / "copy.json")
    again = RegularizedMDP.load(tmp_path / "copy.json")
    assert torch.equal(again.beta, mdp.beta)
    assert torch.equal(again.initial, mdp.initial)
    for left, right in zip((*mdp.reward, *mdp.reference), (*again.reward, *again.reference), strict=True):
        assert torch.equal(left, right)
    for kernel, copied in zip(mdp.transitions, again.transitions, strict=True):
        assert type(kernel) is type(copied)
        for left, right in zip(kernel.edges(), copied.edges(), strict=True):
            assert torch.equal(left, right)
    assert again.action_counts == mdp.action_counts
    assert again.to_document() == mdp.to_document()


def test_the_written_file_has_the_shape_of_the_one_read(tmp_path: Path) -> None:
    written = load(DOCUMENT, tmp_path).to_document()
    expected = copy.deepcopy(DOCUMENT)
    expected["layers"][0]["reward"][0][2] = 0.0  # what is said of actions that do not exist is not kept
    expected["layers"][0]["transition"]["next_state"][0][2] = 0
    expected["layers"][2]["reward"][1][0] = 0.0
    expected["layers"][2]["transition"]["probabilities"][1][0] = [0.0, 0.0]
    expected["layers"][1]["transition"] = {  # in the order of states and actions
        "kind": "sparse",
        "state": [0, 0, 0, 1, 1, 1],
        "action": [0, 0, 1, 0, 1, 1],
        "next_state": [2, 1, 1, 0, 0, 2],
        "probability": [0.2, 0.8, 1.0, 1.0, 0.1, 0.9],
    }
    assert written == expected


def test_a_batch_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"^mdp: expected one problem, found a batch of shape \(3,\)"):
        problem(beta=torch.tensor([1.0, 2.0, 3.0])).save(tmp_path / "batch.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "case.json"
    path.write_text("old")

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os if call == "fsync" else Path, call, fail)
    with pytest.raises(OSError, match="No space left"):
        problem().save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["case.json"]
    assert path.read_text() == "old"


def test_a_write_is_all_or_nothing_and_goes_through_links(tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "case.json")
    write_json(tmp_path / "link.json", {"a": [1, None]})
    assert (tmp_path / "link.json").is_symlink()
    assert read_json(tmp_path / "case.json").value == {"a": [1, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "case.json", {"a": math.nan})
    with pytest.raises(IsADirectoryError):
        write_json(tmp_path, {})
    assert read_json(tmp_path / "case.json").value == {"a": [1, None]}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["case.json", "link.json"]


# -- from tensors ------------------------------------------------------------------------------------------


def table(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def two_to_two(*rows: list[int]) -> DeterministicTransition:
    return DeterministicTransition(torch.tensor(rows), 2)


TENSORS: dict[str, Any] = {
    "beta": 0.5,
    "initial": torch.tensor([0.5, 0.5]),
    "reward": [table([0.0, 1.0], [2.0, 3.0]), table([1.0], [2.0])],
    "reference": [table([0.5, 0.5], [1.0, 0.0]), table([1.0], [1.0])],
    "transitions": [two_to_two([0, 1], [1, 0])],
}


def problem(**fields: Any) -> RegularizedMDP:
    return RegularizedMDP(**{**TENSORS, **fields})


def sparse(next_state: list[list[list[int]]], probability: list[list[list[float]]]) -> SparseTransition:
    return SparseTransition(torch.tensor(next_state), torch.tensor(probability, dtype=torch.float64), 2)


@pytest.mark.parametrize(
    ("fields", "where", "words"),
    [
        ({"beta": 0.0}, "beta", "expected a positive temperature, found 0.0"),
        ({"beta": math.nan}, "beta", "expected a finite number of at most 1e+100 in magnitude, found nan"),
        ({"beta": math.inf}, "beta", "expected a finite number of at most 1e+100 in magnitude, found inf"),
        ({"beta": torch.tensor([1.0, -2.0])}, "beta", "expected a positive temperature, found -2.0"),
        ({"initial": torch.tensor([0.5, 0.4])}, "initial", "sum to 1, found the sum 0.9"),
        ({"initial": torch.tensor([1.5, -0.5])}, "initial[1]", "expected a probability, found -0.5"),
        ({"initial": torch.tensor([1.0, math.nan])}, "initial[1]", "expected a finite number"),
        ({"initial": torch.tensor([1.0])}, "initial", "expected 2 states, found 1"),
        ({"initial": torch.tensor([[0.5, 0.5], [0.5, 0.6]])}, "initial[1]", "sum to 1"),
        ({"reward": [], "reference": [], "transitions": []}, "layers", "expected at least one layer"),
        ({"reward": TENSORS["reward"][:1]}, "layers", "1 reward tables but 2 reference tables"),
        ({"transitions": []}, "layers", "expected 1 transitions between 2 layers, found 0"),
        ({"reward": [table([0.0, 1.0]), TENSORS["reward"][1]]}, "layers[0].reward", "(2, 2), found (1, 2)"),
        (
            {"reward": [torch.zeros(2, 0), TENSORS["reward"][1]]},
            "layers[0].reward",
            "expected shape (…, S, A)",
        ),
        (
            {"reward": [table([math.nan, 1.0], [2.0, 3.0]), TENSORS["reward"][1]]},
            "layers[0].reward[0][0]",
            "expected a finite number of at most 1e+100 in magnitude, found nan",
        ),
        (
            {"reward": [TENSORS["reward"][0], table([1.0], [-math.inf])]},
            "layers[1].reward[1][0]",
            "expected a finite number of at most 1e+100 in magnitude, found -inf",
        ),
        (
            {"reference": [table([0.5, 0.5], [1.5, -0.5]), TENSORS["reference"][1]]},
            "layers[0].reference[1][1]",
            "expected a probability, found -0.5",
        ),
        (
            {"reference": [table([0.5, 0.5], [0.0, 0.0]), TENSORS["reference"][1]]},
            "layers[0].reference[1]",
            "expected probabilities that sum to 1, found the sum 0.0",
        ),
        (
            {
                "reference": [TENSORS["reference"][0], table([1.0])],
                "reward": [TENSORS["reward"][0], table([1.0])],
            },
            "layers[1].reference",
            "expected 2 states, found 1",
        ),
        (
            {"transitions": [two_to_two([0, 1], [1, 2])]},
            "layers[0].transition.next_state[1][1]",
            "0 to 1, found 2",
        ),
        ({"transitions": [two_to_two([0, -1], [1, 0])]}, "layers[0].transition.next_state[0][1]", "found -1"),
        (
            {"transitions": [two_to_two([0], [1])]},
            "layers[0].transition",
            "expected (2, 2) pairs, found (2, 1)",
        ),
        (
            {"transitions": [DenseTransition(torch.full((2, 2, 2), 0.4))]},
            "layers[0].transition.probabilities[0][0]",
            "expected probabilities that sum to 1",
        ),
        (
            {"transitions": [DenseTransition(torch.full((2, 2, 3), 1 / 3, dtype=torch.float64))]},
            "layers[1].reference",
            "expected 3 states, found 2",
        ),
        (
            {"transitions": [sparse([[[0], [1]], [[5], [0]]], [[[1.0], [1.0]], [[1.0], [0.0]]])]},
            "layers[0].transition.next_state[1][0][0]",
            "expected a state from 0 to 1, found 5",
        ),
        (
            {"transitions": [sparse([[[0], [1]], [[1], [0]]], [[[1.0], [0.5]], [[1.0], [0.0]]])]},
            "layers[0].transition.probability[0][1]",
            "expected probabilities that sum to 1, found the sum 0.5",
        ),
        (
            {"beta": torch.ones(3), "initial": torch.full((2, 2), 0.5)},
            "initial",
            "expected batch dimensions that broadcast with (3,), found (2,)",
        ),
        (
            {"beta": torch.ones(3), "transitions": [DeterministicTransition(torch.zeros(4, 2, 2).long(), 2)]},
            "layers[0].transition.next_state",
            "expected batch dimensions that broadcast with (3,), found (4,)",
        ),
        ({"action_counts": [[2, 1]]}, "action_counts", "expected 2 layers, found 1"),
        ({"action_counts": []}, "action_counts", "expected 2 layers, found 0"),
        ({"action_counts": [[2], [1, 1]]}, "action_counts[0]", "expected 2 states, found 1"),
        ({"action_counts": [[2, 3], [1, 1]]}, "action_counts[0][1]", "expected a count from 1 to 2, found 3"),
        ({"action_counts": [[1, 1], [1, 1]]}, "action_counts[0][0]", "expected a count from 2 to 2, found 1"),
        ({"action_counts": [[2, 0], [1, 1]]}, "action_counts[0][1]", "expected a count from 1 to 2, found 0"),
    ],
    ids=short_name,
)
def test_malformed_tensors_are_refused_by_name(fields: dict[str, Any], where: str, words: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        problem(**fields)
    assert caught.value.where == where
    assert words in caught.value.problem


def broken(kernel: SparseTransition | DeterministicTransition, field: str, value: Tensor) -> Any:
    """A kernel as a caller without run-time shape checks can build it."""
    object.__setattr__(kernel, field, value)
    return kernel


@pytest.mark.parametrize(
    ("kernel", "where", "words"),
    [
        (
            lambda: broken(two_to_two([0, 1], [1, 0]), "next_state", torch.zeros(2, dtype=torch.int64)),
            "layers[0].transition.next_state",
            "expected 2 non-empty dimensions after the batch, found (2,)",
        ),
        (
            lambda: broken(two_to_two([0, 1], [1, 0]), "next_state", torch.zeros(2, 2)),
            "layers[0].transition.next_state",
            "expected integers, found torch.float32",
        ),
        (
            lambda: broken(sparse([[[0]]], [[[1.0]]]), "probability", torch.ones(2, 2, 3)),
            "layers[0].transition",
            "expected next_state and probability of one shape, found (1, 1, 1) and (2, 2, 3)",
        ),
    ],
)
def test_malformed_kernels_are_refused_by_name(kernel: Callable[[], Any], where: str, words: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        problem(transitions=[kernel()])
    assert caught.value.where == where
    assert words in caught.value.problem


def test_cells_of_actions_that_do_not_exist_may_hold_anything() -> None:
    mdp = problem(reward=[table([0.0, 1.0], [2.0, math.nan]), TENSORS["reward"][1]])
    assert mdp.reward[0].tolist() == [[0.0, 1.0], [2.0, 0.0]]
    assert mdp.regularized_reward[0][1].tolist() == [4.0, -math.inf]


def test_single_precision_and_short_integers_are_converted() -> None:
    kernel = DeterministicTransition(torch.tensor([[0, 1], [1, 0]], dtype=torch.int32), 2)
    mdp = problem(reward=[t.float() for t in TENSORS["reward"]], transitions=[kernel])
    assert mdp.reward[0].dtype == torch.float64
    assert next(iter(mdp.transitions[0].edges())).dtype == torch.int64


def test_layers_that_share_tensors_go_on_sharing_them() -> None:
    reward, reference = table([1.0, 0.0], [0.0, 2.0]), table([0.5, 0.5], [0.5, 0.5])
    kernel = two_to_two([0, 1], [1, 0])
    mdp = problem(reward=[reward] * 4, reference=[reference] * 4, transitions=[kernel] * 3)
    for here in (mdp, mdp.to("cpu")):
        for tables in (here.reward, here.reference, here.valid, here.log_reference, here.regularized_reward):
            assert len({id(layer_table) for layer_table in tables}) == 1
        assert len({id(shared) for shared in here.transitions}) == 1


@pytest.mark.parametrize(
    ("fields", "batch"),
    [
        ({}, ()),
        ({"beta": torch.ones(5)}, (5,)),
        ({"beta": torch.ones(4, 1), "initial": torch.full((5, 2), 0.5)}, (4, 5)),
        ({"reward": [torch.zeros(6, 2, 2), torch.zeros(2, 1)]}, (6,)),
        ({"transitions": [DeterministicTransition(torch.zeros(7, 2, 2).long(), 2)]}, (7,)),
        ({"transitions": [DenseTransition(torch.full((7, 2, 2, 2), 0.5))]}, (7,)),
        ({"transitions": [SparseTransition(torch.zeros(2, 2, 1).long(), torch.ones(7, 2, 2, 1), 2)]}, (7,)),
    ],
    ids=short_name,
)
def test_batch_shape_is_what_all_tables_broadcast_to(fields: dict[str, Any], batch: tuple[int, ...]) -> None:
    assert problem(**fields).batch_shape == batch
    assert problem(**fields).to("cpu").batch_shape == batch


def test_a_problem_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        problem().beta = torch.tensor(2.0)  # type: ignore[misc]
