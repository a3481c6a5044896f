"""Policies, mixtures and logits of an instance file: what is read and written, and that everything malformed is refused."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tbrm_theory.dynamic_programming import soft_policy
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.instance import Instance
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.tables import safe_log
from tests.documents import INSTANCE as DOCUMENT
from tests.documents import REMOVED, changed, longer, short_name, shorter


def load(document: Any, folder: Path) -> Instance:
    path = folder / "case.json"
    path.write_text(json.dumps(document))
    return Instance.load(path)


# -- reading -----------------------------------------------------------------------------------------------


def test_parts_are_those_of_the_file(tmp_path: Path) -> None:
    instance = load(DOCUMENT, tmp_path)
    assert list(instance.policies) == ["mu", "stray"]
    for name, tables in DOCUMENT["policies"].items():
        for h, rows in enumerate(tables):
            assert instance.mdp.rows(h, instance.probabilities[name][h]) == rows
            logs = [[math.log(p) if p > 0 else -math.inf for p in row] for row in rows]
            found = instance.mdp.rows(h, instance.policies[name][h])
            assert [[pytest.approx(log, rel=1e-15) for log in row] for row in logs] == found
    assert instance.mixtures["replay"] == [(0.25, "mu"), (0.75, "reference")]
    assert instance.mixtures["thirds"] == [(1 / 3, "mu"), (1 / 3, "optimal"), (1 / 3, "mu")]
    theta = instance.logits["theta"]
    assert instance.mdp.rows(0, theta[0]) == [[0.1, -0.2, -math.inf], [3.0]]
    assert instance.mdp.rows(1, theta[1]) == [[0.0, 1e9], [-1.5, 2.0]]
    assert instance.mdp.rows(2, theta[2]) == [[0.0, 0.0], [-math.inf, 1.0], [0.5]]
    assert theta[0][1].tolist() == [3.0, -math.inf, -math.inf]  # padding


@pytest.mark.parametrize("part", ["policies", "mixtures", "logits"])
def test_every_part_may_be_absent_or_empty(part: str, tmp_path: Path) -> None:
    without = changed(changed(DOCUMENT, ("mixtures",), {}), (part,), REMOVED)
    assert getattr(load(without, tmp_path), part) == {}
    assert getattr(load({**without, part: {}}, tmp_path), part) == {}


def test_rows_and_weights_that_sum_to_one_within_1e_9_are_divided_by_their_sum(tmp_path: Path) -> None:
    near = [0.5 + 4e-10, 0.5 + 4e-10]
    document = changed(DOCUMENT, ("policies", "mu", 1, 0), near)
    document["mixtures"]["replay"] = [[near[0], "mu"], [near[1], "reference"]]
    instance = load(document, tmp_path)
    assert instance.probabilities["mu"][1][0].tolist() == [0.5, 0.5]
    assert instance.mixtures["replay"] == [(0.5, "mu"), (0.5, "reference")]


def test_names_may_be_any_text_that_is_not_reserved(tmp_path: Path) -> None:
    names = ["θ.1 [new]", "\n", " ", "Reference", "policy"]
    document = {**DOCUMENT, "policies": dict.fromkeys(names, DOCUMENT["policies"]["mu"]), "mixtures": {}}
    document["logits"] = {"optimal": DOCUMENT["logits"]["theta"], "mu": DOCUMENT["logits"]["theta"]}
    instance = load(document, tmp_path)
    assert list(instance.policies) == names
    assert list(instance.logits) == ["optimal", "mu"]


# -- refusing ----------------------------------------------------------------------------------------------

MALFORMED: list[tuple[tuple[str | int, ...], Any, str, str]] = [
    # policies
    (("policies",), None, "policies", "expected an object, found null"),
    (("policies",), [], "policies", "expected an object, found a list of 0"),
    (("policies", "mu"), None, "policies.mu", "expected a list of layers, found null"),
    (("policies", "mu"), {}, "policies.mu", "expected a list of layers, found an object"),
    (("policies", "mu"), [], "policies.mu", "expected 4 layers, found 0"),
    (("policies", "mu"), shorter, "policies.mu", "expected 4 layers, found 3"),
    (("policies", "mu"), longer, "policies.mu", "expected 4 layers, found 5"),
    (("policies", "mu", 2), 1.0, "policies.mu[2]", "expected a list of states, found 1.0"),
    (("policies", "mu", 2), shorter, "policies.mu[2]", "expected 3 states, found 2"),
    (("policies", "mu", 2), longer, "policies.mu[2]", "expected 3 states, found 4"),
    (("policies", "mu", 0, 1), [], "policies.mu[0][1]", "expected 1 actions, found 0"),
    (("policies", "mu", 0, 1), longer, "policies.mu[0][1]", "expected 1 actions, found 2"),
    (("policies", "mu", 0, 0), shorter, "policies.mu[0][0]", "expected 3 actions, found 2"),
    (("policies", "mu", 0, 0), 1.0, "policies.mu[0][0]", "expected a list of actions, found 1.0"),
    (("policies", "mu", 0, 0, 2), None, "policies.mu[0][0][2]", "expected a number, found null"),
    (("policies", "mu", 0, 0, 2), "0", "policies.mu[0][0][2]", 'expected a number, found "0"'),
    (("policies", "mu", 0, 0, 2), False, "policies.mu[0][0][2]", "expected a number, found false"),
    (("policies", "mu", 0, 0, 2), 10**400, "policies.mu[0][0][2]", "a number that a double can hold"),
    (("policies", "mu", 1, 0), [1.5, -0.5], "policies.mu[1][0][1]", "expected a probability, found -0.5"),
    (("policies", "mu", 1, 0), [0.3, 0.6], "policies.mu[1][0]", "sum to 1, found the sum 0.89999"),
    (("policies", "mu", 1, 0), [0.0, 0.0], "policies.mu[1][0]", "sum to 1, found the sum 0.0"),
    (("policies", "mu", 1, 1), [1.0, 2e-9], "policies.mu[1][1]", "sum to 1, found the sum 1.000000002"),
    # logits
    (("logits",), None, "logits", "expected an object, found null"),
    (("logits", "theta"), shorter, "logits.theta", "expected 4 layers, found 3"),
    (("logits", "theta"), 0.0, "logits.theta", "expected a list of layers, found 0.0"),
    (("logits", "theta", 1), longer, "logits.theta[1]", "expected 2 states, found 3"),
    (("logits", "theta", 3, 1), shorter, "logits.theta[3][1]", "expected 3 actions, found 2"),
    (("logits", "theta", 3, 0), longer, "logits.theta[3][0]", "expected 1 actions, found 2"),
    (("logits", "theta", 0, 0, 0), None, "logits.theta[0][0][0]", "expected a number, found null"),
    (("logits", "theta", 0, 1, 0), None, "logits.theta[0][1][0]", "expected a number, found null"),
    (("logits", "theta", 0, 0, 0), "-inf", "logits.theta[0][0][0]", 'expected a number, found "-inf"'),
    (("logits", "theta", 0, 0, 2), "-inf", "logits.theta[0][0][2]", 'expected a number, found "-inf"'),
    (("logits", "theta", 0, 0, 0), True, "logits.theta[0][0][0]", "expected a number, found true"),
    (
        ("logits", "theta", 0, 0, 0),
        1e200,
        "logits.theta[0][0][0]",
        "at most 1e+100 in magnitude, found 1e+200",
    ),
    # mixtures
    (("mixtures",), [], "mixtures", "expected an object, found a list of 0"),
    (("mixtures", "replay"), {}, "mixtures.replay", "list of [weight, policy] pairs, found an object"),
    (("mixtures", "replay"), [], "mixtures.replay", "at least one of [weight, policy] pairs, found an empty"),
    (("mixtures", "replay", 0), "mu", "mixtures.replay[0]", 'list of entries, [weight, policy], found "mu"'),
    (
        ("mixtures", "replay", 0),
        [0.25],
        "mixtures.replay[0]",
        "expected 2 entries, [weight, policy], found 1",
    ),
    (
        ("mixtures", "replay", 0),
        longer,
        "mixtures.replay[0]",
        "expected 2 entries, [weight, policy], found 3",
    ),
    (("mixtures", "replay", 0, 0), "0.25", "mixtures.replay[0][0]", 'expected a number, found "0.25"'),
    (("mixtures", "replay", 0, 0), True, "mixtures.replay[0][0]", "expected a number, found true"),
    (("mixtures", "replay", 0, 0), -0.25, "mixtures.replay[0][0]", "which is not negative, found -0.25"),
    (("mixtures", "replay", 0, 0), 0.2, "mixtures.replay", "sum to 1, found the sum 0.95"),
    (("mixtures", "replay", 0, 1), 0, "mixtures.replay[0][1]", "expected a string, found 0"),
    (
        ("mixtures", "replay", 1, 1),
        "nu",
        "mixtures.replay[1][1]",
        "expected the name of a policy (mu, stray, reference, optimal), found 'nu'",
    ),
    (("mixtures", "replay", 1, 1), "thirds", "mixtures.replay[1][1]", "expected the name of a policy"),
    (("mixtures", "replay", 1, 1), "theta", "mixtures.replay[1][1]", "expected the name of a policy"),
    # names
    (
        ("policies", "reference"),
        DOCUMENT["policies"]["mu"],
        "policies.reference",
        "every instance has the policy",
    ),
    (
        ("policies", "optimal"),
        DOCUMENT["policies"]["mu"],
        "policies.optimal",
        "every instance has the policy",
    ),
    (
        ("mixtures", "reference"),
        [[1.0, "mu"]],
        "mixtures.reference",
        "every instance has the policy 'reference'",
    ),
    (("mixtures", "optimal"), [[1.0, "mu"]], "mixtures.optimal", "every instance has the policy 'optimal'"),
    (("mixtures", "mu"), [[1.0, "mu"]], "mixtures.mu", "expected another name: 'mu' is a policy already"),
    (("policies", "a|b"), DOCUMENT["policies"]["mu"], "policies.a|b", 'expected a name without "|"'),
    (("mixtures", "a|b"), [[1.0, "mu"]], "mixtures.a|b", 'expected a name without "|"'),
    (("logits", "a|b"), DOCUMENT["logits"]["theta"], "logits.a|b", 'expected a name without "|"'),
    (("policies", ""), DOCUMENT["policies"]["mu"], 'policies[""]', "expected a name, found an empty one"),
    (("mixtures", ""), [[1.0, "mu"]], 'mixtures[""]', "expected a name, found an empty one"),
    (("logits", ""), DOCUMENT["logits"]["theta"], 'logits[""]', "expected a name, found an empty one"),
    # the problem
    (("beta",), 0, "beta", "expected a positive temperature"),
    (
        ("policy",),
        {},
        "policy",
        "unknown key; expected one of format, version, beta, initial, layers, policies",
    ),
]


@pytest.mark.parametrize(("keys", "value", "where", "words"), MALFORMED, ids=short_name)
def test_a_malformed_field_is_refused_with_its_path_and_what_was_expected(
    keys: tuple[str | int, ...], value: Any, where: str, words: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        load(changed(DOCUMENT, keys, value), tmp_path)
    assert caught.value.where == where
    assert words in caught.value.problem


def test_a_name_given_twice_is_refused(tmp_path: Path) -> None:
    text = json.dumps(DOCUMENT).replace('"stray":', '"mu":')
    (tmp_path / "case.json").write_text(text)
    with pytest.raises(InvalidInputError, match="the key 'mu' appears twice in one object"):
        Instance.load(tmp_path / "case.json")


# -- writing -----------------------------------------------------------------------------------------------


def test_saving_and_loading_changes_no_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    document = copy.deepcopy(DOCUMENT)
    for rows in document["policies"]["mu"]:
        for row in rows:
            weights = torch.rand(len(row), generator=generator, dtype=torch.float64)
            row[:] = (weights / weights.sum()).tolist()
    document["policies"]["mu"][1][0] = [1e-300, 1.0]
    instance = load(document, tmp_path)
    assert instance.probabilities["mu"][1][0].tolist() == [1e-300, 1.0]
    logs = instance.policies["mu"]
    rounded = [torch.equal(log.exp(), p) for log, p in zip(logs, instance.probabilities["mu"], strict=True)]
    assert not all(rounded)  # so that keeping log π alone would not do
    instance.save(tmp_path / "copy.json")
    again = Instance.load(tmp_path / "copy.json")
    for name in document["policies"]:
        for h, rows in enumerate(document["policies"][name]):
            assert again.mdp.rows(h, again.probabilities[name][h]) == rows
            assert torch.equal(again.policies[name][h], instance.policies[name][h])
    assert again.mixtures == instance.mixtures
    assert all(
        torch.equal(left, right) for left, right in zip(again.logits["theta"], instance.logits["theta"], strict=True)
    )
    assert again.to_document() == instance.to_document()


def test_the_written_file_has_the_shape_of_the_one_read(tmp_path: Path) -> None:
    instance = load(DOCUMENT, tmp_path)
    instance.save(tmp_path / "copy.json")
    written = json.loads((tmp_path / "copy.json").read_text())
    assert written["policies"] == DOCUMENT["policies"]
    assert written["mixtures"] == DOCUMENT["mixtures"]
    assert written["logits"] == changed(DOCUMENT, ("logits", "theta", 2, 1, 0), None)["logits"]
    RegularizedMDP.load(tmp_path / "copy.json")  # the problem of an instance file can be read alone


def test_an_instance_made_of_logs_is_written_with_sums_that_stay_as_they_are(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    reference = torch.full((1, 50), 0.02, dtype=torch.float64)
    mdp = RegularizedMDP(beta=1.0, initial=torch.ones(1), reward=[reference], reference=[reference], transitions=[])
    logits = (20 * torch.rand(1, 50, generator=generator, dtype=torch.float64),)
    policy = (soft_policy(logits[0]) + 1e-12,)  # within what is accepted, and more than rounding
    instance = Instance(mdp, {"soft": policy}, {"alone": [(1.0, "soft")]}, {"theta": logits})
    instance.save(tmp_path / "case.json")
    again = Instance.load(tmp_path / "case.json")
    assert torch.equal(again.probabilities["soft"][0], instance.probabilities["soft"][0])
    assert torch.allclose(again.probabilities["soft"][0], policy[0].exp(), rtol=2e-12)
    assert torch.equal(again.logits["theta"][0], logits[0])


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instance = load(DOCUMENT, tmp_path)
    before = (tmp_path / "case.json").read_text()

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        instance.save(tmp_path / "case.json")
    assert [entry.name for entry in tmp_path.iterdir()] == ["case.json"]
    assert (tmp_path / "case.json").read_text() == before


# -- from tensors ------------------------------------------------------------------------------------------


def tables(document: dict[str, Any], folder: Path) -> tuple[RegularizedMDP, tuple[Tensor, ...]]:
    instance = load(document, folder)
    return instance.mdp, instance.policies["mu"]


def test_malformed_parts_are_refused_by_name(tmp_path: Path) -> None:
    mdp, policy = tables(DOCUMENT, tmp_path)

    def replaced(h: int, table: Tensor) -> tuple[Tensor, ...]:
        return (*policy[:h], table, *policy[h + 1 :])

    not_normalised = policy[1] + torch.tensor(0.1, dtype=torch.float64)
    padding = safe_log(torch.tensor([[0.1, 0.9, 0.0], [0.5, 0.5, 0.0]], dtype=torch.float64))
    nan = torch.where(mdp.valid[1], torch.nan, 0.0)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"policies": {"mu": policy[:3]}}, r"^policies\.mu: expected 4 layers, found 3"),
        ({"policies": {"mu": replaced(1, policy[2])}}, r"^policies\.mu\[1\]: expected \(states, actions\)"),
        (
            {"policies": {"mu": replaced(1, not_normalised)}},
            r"^policies\.mu\[1\]\[0\]: expected log-probabil",
        ),
        (
            {"policies": {"a b": replaced(1, nan)}},
            r'^policies\["a b"\]\[1\]\[0\]\[0\]: expected a number, found nan',
        ),
        (
            {"policies": {"mu": replaced(1, policy[1][None])}},
            r"^policies\.mu\[1\]: expected shape \(states, ac",
        ),
        (
            {"policies": {"mu": replaced(0, padding)}},
            r"^policies\.mu\[0\]\[1\]\[1\]: expected no mass beyond",
        ),
        ({"logits": {"theta": policy[:3]}}, r"^logits\.theta: expected 4 layers, found 3"),
        ({"logits": {"theta": replaced(1, nan)}}, r"^logits\.theta\[1\]\[0\]\[0\]: expected a finite number"),
        ({"logits": {"theta": replaced(1, policy[1][None])}}, r"^logits\.theta\[1\]: expected shape"),
        ({"mixtures": {"m": []}}, r"^mixtures\.m: expected at least one \(weight, policy\) pair"),
        ({"mixtures": {"m": [(1.0, "mu")]}}, r"^mixtures\.m\[0\]\[1\]: expected the name of a policy"),
        ({"mixtures": {"m": [(0.5, "optimal")]}}, r"^mixtures\.m: expected probabilities that sum to 1"),
        (
            {"mixtures": {"m": [(2.0, "optimal"), (-1.0, "optimal")]}},
            r"^mixtures\.m\[1\]: expected a probabil",
        ),
        ({"mixtures": {"m": [(math.nan, "optimal")]}}, r"^mixtures\.m\[0\]: expected a finite number"),
    ]
    for parts, message in refused:
        with pytest.raises(InvalidInputError, match=message):
            Instance(mdp, **parts)


def test_a_batch_of_problems_is_no_instance(tmp_path: Path) -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    mdp = RegularizedMDP(beta=torch.ones(2), initial=torch.ones(1), reward=[one], reference=[one], transitions=[])
    with pytest.raises(InvalidInputError, match=r"^mdp: expected one problem, found a batch of \(2,\)"):
        Instance(mdp)


def test_an_instance_keeps_its_own_tables(tmp_path: Path) -> None:
    mdp, policy = tables(DOCUMENT, tmp_path)
    given = {"mu": policy}
    instance = Instance(mdp, given)
    given["nu"] = policy
    assert list(instance.policies) == ["mu"]
    with pytest.raises(AttributeError):
        instance.policies = {}  # type: ignore[misc]
