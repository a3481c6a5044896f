"""Every number of ``tbrm evaluate`` against enumeration (``reference.py``), its shape and form, and what must not change it."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from tbrm_theory.bounds import corollary4
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.evaluation import evaluate_instance
from tbrm_theory.instance import Instance
from tbrm_theory.mdp import RegularizedMDP
from tests import convert
from tests import reference as rf
from tests.documents import INSTANCE, changed, logits_of, plain, random_document

EXAMPLE: dict[str, Any] = json.loads("""
{"format": "tbrm-instance", "version": 1, "beta": 0.5, "initial": [1.0],
 "layers": [{"reward": [[0.0, 1.0]], "reference": [[0.5, 0.5]],
             "transition": {"kind": "deterministic", "next_state": [[0, 1]]}},
            {"reward": [[0.0, 1.0], [0.5, 0.0]], "reference": [[0.5, 0.5], [0.9, 0.1]], "transition": null}],
 "policies": {"mu": [[[0.5, 0.5]], [[0.3, 0.7], [1.0, 0.0]]]},
 "mixtures": {"replay": [[0.5, "mu"], [0.5, "reference"]]},
 "logits": {"theta": [[[0.1, -0.2]], [[0.0, 0.0], [1.0, 2.0]]]}}
""")  # of design.md
KINDS = ["deterministic", "sparse", "dense"]
Object = dict[str, Any]


def evaluate(document: Object, folder: Path) -> Object:
    """The object as a reader of the printed JSON sees it."""
    path = folder / "case.json"
    path.write_text(json.dumps(document))
    text = json.dumps(evaluate_instance(Instance.load(path)), allow_nan=False)
    result: Object = json.loads(text)
    return result


# -- what it should be, by enumeration ---------------------------------------------------------------------


def expected(document: Object, *, exactly: bool = True) -> Object:
    """The object of design.md from definitions, as nested lists and floats with real infinities.

    Coverage is found in rationals, which takes long on all but the smallest problems: only if ``exactly``.
    """
    mdp = plain(document)
    policies: dict[str, rf.Table] = dict(document["policies"])
    policies |= {"reference": mdp.reference, "optimal": rf.optimal_policy(mdp)}
    components = {name: [(1.0, policy)] for name, policy in policies.items()}
    for name, parts in document["mixtures"].items():
        components[name] = [(weight, policies[policy]) for weight, policy in parts]
    return {
        "v_star": [[mdp.beta * v for v in layer] for layer in rf.optimal_values(mdp)],
        "q_star": rf.tabulate(mdp.reward, lambda h, s, a: mdp.beta * rf.optimal_q(mdp)[h][s][a]),
        "policy_star": rf.optimal_policy(mdp),
        "objective_star": rf.objective(mdp, rf.optimal_policy(mdp)),
        "policies": {name: expected_of_policy(mdp, policy) for name, policy in policies.items()},
        "losses": {
            name: expected_of_logits(mdp, logits_of(document, name), components, exactly) for name in document["logits"]
        },
        "coverage": {
            f"{pi}|{mu}": expected_coverage(mdp, policy, parts) if exactly else UNCHECKED
            for pi, policy in policies.items()
            for mu, parts in components.items()
        },
    }


def rational(row: Sequence[float]) -> list[Fraction]:
    exact = [Fraction(entry) for entry in row]
    return [entry / (sum(exact) or 1) for entry in exact]


def rational_law(mdp: rf.PlainMDP, parts: list[tuple[float, rf.Table]]) -> rf.Law:
    """The law of a mixture with probabilities that sum to 1 exactly."""
    successors = [
        [[dict(zip(cell, rational(list(cell.values())), strict=True)) for cell in row] for row in layer]
        for layer in mdp.successors
    ]
    exact = rf.PlainMDP(mdp.beta, rational(mdp.initial), mdp.reward, mdp.reference, successors)
    weights = rational([weight for weight, _ in parts])
    tables = [[[rational(row) for row in layer] for layer in policy] for _, policy in parts]
    return rf.mixture_law(exact, list(zip(weights, tables, strict=True)))


class SecondMoment:
    """Λ of two laws: decided exactly, not computed."""

    def __init__(self, law_pi: rf.Law, law_mu: rf.Law) -> None:
        self.laws = (law_pi, law_mu)

    def is_about(self, value: float) -> bool:
        if math.isinf(value):
            return not rf.second_moment_at_most(*self.laws, 1e200)
        above, below = Fraction(value * (1 + 1e-8)), Fraction(value * (1 - 1e-8))
        return rf.second_moment_at_most(*self.laws, above) and not rf.second_moment_at_most(*self.laws, below)


UNCHECKED = object()
"""Of policies that take actions that do not exist; see the tests of these."""


def expected_coverage(mdp: rf.PlainMDP, policy: rf.Table, parts: list[tuple[float, rf.Table]]) -> Any:
    if any(math.isinf(rf.kl_to_reference(mdp, table)) for table in [policy, *(table for _, table in parts)]):
        return UNCHECKED
    law_pi, law_mu = rational_law(mdp, [(1.0, policy)]), rational_law(mdp, parts)
    c_inf = float(rf.c_infinity(mdp, law_pi, law_mu))
    return {
        "kappa": float(rf.kappa_by_sup(law_pi, law_mu)),
        "lemma1": float(rf.lemma1(mdp, law_pi, law_mu)),
        "corollary6": len(mdp.reward) * c_inf,
        "c_inf": c_inf,
        "second_moment": SecondMoment(law_pi, law_mu),
    }


def expected_theorem2(mdp: rf.PlainMDP, policy: rf.Table, parts: list[tuple[float, rf.Table]], loss: float) -> Any:
    """None for stochastic transitions."""
    existing = [
        cell
        for layer, references in zip(mdp.successors, mdp.reference, strict=False)
        for row, reference in zip(layer, references, strict=True)
        for cell, p in zip(row, reference, strict=True)
        if p > 0
    ]
    if any(max(cell.values()) < 1 for cell in existing):
        return None
    if math.isinf(loss):
        return UNCHECKED
    law = rational_law(mdp, parts)
    both = [rf.kappa_by_sup(rational_law(mdp, [(1.0, table)]), law) for table in (rf.optimal_policy(mdp), policy)]
    roots = sum(math.sqrt(kappa) for kappa in both)
    return roots if math.isinf(roots) else mdp.beta * roots * math.sqrt(loss)


def expected_of_policy(mdp: rf.PlainMDP, policy: rf.Table) -> Object:
    return {
        "objective": rf.objective(mdp, policy),
        "regret": rf.regret(mdp, policy),
        "kl_to_reference": rf.kl_to_reference(mdp, policy),
    }


def expected_of_logits(
    mdp: rf.PlainMDP, logits: rf.Table, components: dict[str, list[tuple[float, rf.Table]]], exactly: bool
) -> Object:
    policy = rf.softmax_policy(mdp, logits)
    by_behaviour = {}
    for name, parts in components.items():
        tbrm = expected_loss(mdp, parts, lambda law: rf.tbrm_loss(mdp, logits, law))
        by_behaviour[name] = {
            "tbrm": tbrm,
            "brm": expected_loss(mdp, parts, lambda law: rf.brm_loss(mdp, logits, law)),
            "theorem2": expected_theorem2(mdp, policy, parts, tbrm) if exactly else UNCHECKED,
        }
    return {
        "objective": rf.objective(mdp, policy),
        "regret": rf.regret(mdp, policy),
        "corollary4": rf.corollary4(mdp, logits),
        "by_behaviour": by_behaviour,
    }


def expected_loss(mdp: rf.PlainMDP, parts: list[tuple[float, rf.Table]], loss: Callable[[rf.Law], float]) -> float:
    """Infinite if the behaviour takes an action that does not exist."""
    if any(weight > 0 and math.isinf(rf.kl_to_reference(mdp, policy)) for weight, policy in parts):
        return math.inf
    return loss(rf.mixture_law(mdp, parts))


def assert_agrees(found: Any, wanted: Any, scale: float, where: str = "") -> None:
    """Same keys, same lengths, same numbers up to rounding of terms of size `scale` (its square for losses)."""
    if wanted is UNCHECKED or wanted is None:
        assert wanted is UNCHECKED or found is None, where
    elif isinstance(wanted, SecondMoment):
        assert wanted.is_about(float(found)), where
    elif isinstance(wanted, dict):
        assert set(found) == set(wanted), where
        for key in wanted:
            assert_agrees(found[key], wanted[key], scale, f"{where}.{key}")
    elif isinstance(wanted, list):
        assert isinstance(found, list), where
        assert len(found) == len(wanted), where
        for i, (left, right) in enumerate(zip(found, wanted, strict=True)):
            assert_agrees(left, right, scale, f"{where}[{i}]")
    elif math.isinf(wanted):
        assert found == ("inf" if wanted > 0 else "-inf"), where
    else:
        assert isinstance(found, float), where
        size = scale**2 if where.endswith("brm") else scale
        assert found == pytest.approx(wanted, rel=1e-9, abs=1e-12 * size), where


def largest(document: Object) -> float:
    """A bound on the sizes of values in units of β and of reward: what rounding errors are relative to."""
    mdp, horizon = plain(document), len(document["layers"])
    soft = [
        rf.soft_reward(mdp, h, s, a)
        for h, layer in enumerate(mdp.reference)
        for s, row in enumerate(layer)
        for a, p in enumerate(row)
        if p > 0
    ]
    return horizon * (10 + max(map(abs, soft))) * max(1.0, mdp.beta)


def check(document: Object, folder: Path, *, exactly: bool = False) -> Object:
    found = evaluate(document, folder)
    assert_agrees(found, expected(document, exactly=exactly), largest(document))
    return found


# -- every number ------------------------------------------------------------------------------------------


def test_the_example_of_the_design(tmp_path: Path) -> None:
    found = check(EXAMPLE, tmp_path, exactly=True)
    # By hand: V* of layer 1 is log(½ + ½e²) and log(0.9e + 0.1); V*(s_1) = log(½e^V + ½e^(2+V')).
    left, right = math.log(0.5 + 0.5 * math.exp(2)), math.log(0.9 * math.e + 0.1)
    first = math.log(0.5 * math.exp(left) + 0.5 * math.exp(2 + right))
    assert found["v_star"] == [[pytest.approx(0.5 * first)], [pytest.approx(0.5 * left), pytest.approx(0.5 * right)]]
    assert found["objective_star"] == pytest.approx(0.5 * first)
    assert found["policies"]["reference"]["kl_to_reference"] == 0.0
    assert found["policies"]["optimal"]["regret"] == 0.0
    assert list(found["policies"]) == ["mu", "reference", "optimal"]
    assert list(found["losses"]["theta"]["by_behaviour"]) == ["mu", "reference", "optimal", "replay"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_random_ragged_instances_with_missing_actions(kind: str, seed: int, tmp_path: Path) -> None:
    check(random_document(seed, kind), tmp_path, exactly=seed == 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_instance_without_missing_actions(kind: str, tmp_path: Path) -> None:
    check(random_document(9, kind, missing=0.0, ragged=False), tmp_path)


@pytest.mark.parametrize("sizes", [(2,), (2, 1, 3, 2)])
def test_one_layer_and_many(sizes: tuple[int, ...], tmp_path: Path) -> None:
    check(random_document(3, "sparse", sizes=sizes), tmp_path)


def test_an_instance_with_every_kind_of_transition(tmp_path: Path) -> None:
    document = changed(INSTANCE, ("logits", "theta", 1, 0), [0.0, 2.0])
    found = check(document, tmp_path)
    stray = found["policies"]["stray"]
    assert stray == {"objective": "-inf", "regret": "inf", "kl_to_reference": "inf"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [1e-6, 1e6])
def test_extreme_temperatures(kind: str, beta: float, tmp_path: Path) -> None:
    document = random_document(5, kind, beta=beta)
    found = check(document, tmp_path, exactly=kind == "sparse")
    if beta < 1:  # where exp underflows: a policy of 0s and 1s
        assert all(entry in (0, 1) for layer in found["policy_star"] for row in layer for entry in row)


@pytest.mark.parametrize("scale", [1e100, 1e-300])
def test_numbers_at_the_ends_of_the_range_give_no_nan(scale: float, tmp_path: Path) -> None:
    document = random_document(6, "dense", beta=1.0)
    for layer in document["layers"]:
        layer["reward"] = [[None if r is None else math.tanh(r) * scale for r in row] for row in layer["reward"]]
    for name, tables in document["logits"].items():
        document["logits"][name] = [
            [[None if x is None else math.tanh(x) * scale for x in row] for row in rows] for rows in tables
        ]
    found = evaluate(document, tmp_path)  # refuses NaN
    assert found["losses"]["theta"]["by_behaviour"]["full"]["tbrm"] >= 0


# -- actions that do not exist -----------------------------------------------------------------------------


def test_cells_of_actions_that_do_not_exist(tmp_path: Path) -> None:
    found = evaluate(INSTANCE, tmp_path)
    assert found["q_star"][0][0][2] == found["q_star"][2][1][0] == "-inf"
    assert found["policy_star"][0][0][2] == found["policy_star"][2][1][0] == 0


def test_a_logit_of_an_action_that_does_not_exist_is_ignored(tmp_path: Path) -> None:
    one, other = (changed(INSTANCE, ("logits", "theta", 2, 1, 0), logit) for logit in (7.0, None))
    assert evaluate(one, tmp_path) == evaluate(other, tmp_path)


def test_a_policy_that_takes_them_costs_everything(tmp_path: Path) -> None:
    document = changed(INSTANCE, ("mixtures", "tainted"), [[0.001, "stray"], [0.999, "mu"]])
    document["mixtures"]["clean"] = [[0.0, "stray"], [1.0, "mu"]]
    found = check(document, tmp_path)
    by_behaviour = found["losses"]["theta"]["by_behaviour"]
    assert by_behaviour["stray"] == by_behaviour["tainted"] == {"tbrm": "inf", "brm": "inf", "theorem2": None}
    assert by_behaviour["clean"] == by_behaviour["mu"]


def test_a_policy_that_would_take_them_where_it_never_comes_costs_nothing(tmp_path: Path) -> None:
    document = copy.deepcopy(EXAMPLE)
    document["layers"][1]["reference"][0] = [1.0, 0.0]
    careful = [[[0.0, 1.0]], [[0.5, 0.5], [0.4, 0.6]]]  # never goes to state 0
    document["policies"] = {"mu": careful, "plain": changed({"x": careful}, ("x", 1, 0), [1.0, 0.0])["x"]}
    found = check(document, tmp_path)
    assert found["policies"]["mu"] == found["policies"]["plain"]
    assert found["losses"]["theta"]["by_behaviour"]["mu"] == found["losses"]["theta"]["by_behaviour"]["plain"]


def test_a_start_of_probability_zero_has_values_and_costs_nothing(tmp_path: Path) -> None:
    document = copy.deepcopy(EXAMPLE)
    first = document["layers"][0]
    document["initial"] = [1.0, 0.0]
    first["reward"].append([5.0, 0.0])
    first["reference"].append([1.0, 0.0])
    first["transition"]["next_state"].append([1, None])
    document["policies"]["mu"][0].append([0.5, 0.5])
    document["logits"]["theta"][0].append([0.0, None])
    found, without = check(document, tmp_path), evaluate(EXAMPLE, tmp_path)
    assert found["v_star"][0][1] == pytest.approx(5 + without["v_star"][1][1])
    for key in ("objective_star", "policies", "losses"):
        assert found[key] == without[key]


# -- form --------------------------------------------------------------------------------------------------


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict | list):
        return [leaf for entry in (value.values() if isinstance(value, dict) else value) for leaf in leaves(entry)]
    return [value]


def test_every_leaf_is_a_number_or_the_name_of_an_infinity(tmp_path: Path) -> None:
    found = leaves(evaluate(INSTANCE, tmp_path))
    assert {leaf for leaf in found if not isinstance(leaf, float)} == {"inf", "-inf", None}
    assert all(math.isfinite(leaf) for leaf in found if isinstance(leaf, float))


def test_numbers_are_those_of_the_solution_to_the_last_bit(tmp_path: Path) -> None:
    path = tmp_path / "case.json"
    path.write_text(json.dumps(EXAMPLE))
    found = json.loads(json.dumps(evaluate_instance(Instance.load(path))))
    mdp = RegularizedMDP.load(path)
    last = mdp.regularized_reward[-1]
    assert found["q_star"][-1] == (mdp.beta * last).tolist()
    assert found["v_star"][-1] == (mdp.beta * torch.logsumexp(last, -1)).tolist()


def test_tables_have_the_shape_of_the_file(tmp_path: Path) -> None:
    document = random_document(2, "dense")
    found = evaluate(document, tmp_path)
    shape = [[len(row) for row in layer["reference"]] for layer in document["layers"]]
    assert len({count for layer in shape for count in layer}) > 1
    assert [[len(row) for row in layer] for layer in found["q_star"]] == shape
    assert [[len(row) for row in layer] for layer in found["policy_star"]] == shape
    assert [len(layer) for layer in found["v_star"]] == [len(layer) for layer in shape]


def test_an_instance_without_parts_has_the_two_policies_and_no_losses(tmp_path: Path) -> None:
    document = {key: EXAMPLE[key] for key in ("format", "version", "beta", "initial", "layers")}
    found = evaluate(document, tmp_path)
    assert list(found["policies"]) == ["reference", "optimal"]
    assert found["losses"] == {}


def test_nan_is_never_let_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nan = torch.tensor(math.nan, dtype=torch.float64)
    monkeypatch.setattr("tbrm_theory.evaluation.corollary4", lambda *arguments, **options: nan)
    with pytest.raises(ArithmeticError, match="NaN"):
        evaluate(EXAMPLE, tmp_path)


# -- what must not change the numbers ----------------------------------------------------------------------


def permuted(document: Object, order: list[int]) -> Object:
    """Layer 1 (of a dense instance) with its states in another order."""
    result = copy.deepcopy(document)
    before, here = result["layers"][0]["transition"]["probabilities"], result["layers"][1]
    for row in before:
        row[:] = [p and [p[s] for s in order] for p in row]
    tables = [here["reward"], here["reference"], here["transition"]["probabilities"]]
    tables += [policy[1] for policy in result["policies"].values()]
    tables += [logits[1] for logits in result["logits"].values()]
    for table in tables:
        table[:] = [table[s] for s in order]
    return result


def test_the_order_of_states_does_not_matter(tmp_path: Path) -> None:
    document, order = random_document(7, "dense"), [2, 0, 1]
    one, other = evaluate(document, tmp_path), evaluate(permuted(document, order), tmp_path)
    for key in ("v_star", "q_star", "policy_star"):
        one[key][1] = [one[key][1][s] for s in order]
    assert_same(one, other)


def assert_same(one: Any, other: Any) -> None:
    for left, right in zip(leaves(one), leaves(other), strict=True):
        assert left == (pytest.approx(right, rel=1e-10, abs=1e-12) if isinstance(right, float) else right)


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_added_to_every_reward_of_a_layer_moves_values_alone(kind: str, tmp_path: Path) -> None:
    document, constant = random_document(8, kind), 3.7
    moved = copy.deepcopy(document)
    moved["layers"][1]["reward"] = [
        [r if r is None else r + constant for r in row] for row in document["layers"][1]["reward"]
    ]
    before, after = evaluate(document, tmp_path), evaluate(moved, tmp_path)
    for h, shift in enumerate((constant, constant, 0.0)):
        assert after["v_star"][h] == [pytest.approx(v + shift) for v in before["v_star"][h]]
    assert_same(before["policy_star"], after["policy_star"])
    assert after["objective_star"] == pytest.approx(before["objective_star"] + constant)
    for section in ("policies", "losses"):
        for name, found in after[section].items():
            assert found["objective"] == pytest.approx(before[section][name]["objective"] + constant)
            assert found["regret"] == pytest.approx(before[section][name]["regret"], abs=1e-12)


@pytest.mark.parametrize("kind", ["deterministic", "dense"])
def test_an_action_split_in_two_that_do_the_same_changes_nothing(kind: str, tmp_path: Path) -> None:
    document, share = random_document(11, kind), 0.3
    split = copy.deepcopy(document)
    h, s = 0, 0

    def halve(row: list[Any], parts: Callable[[Any], list[Any]]) -> None:
        row[:1] = parts(row[0])

    layer = split["layers"][h]
    (table,) = (value for key, value in layer["transition"].items() if key != "kind")
    halve(layer["reward"][s], lambda r: [r, r])
    halve(table[s], lambda t: [t, copy.deepcopy(t)])
    for policy in (layer["reference"], *(policy[h] for policy in split["policies"].values())):
        halve(policy[s], lambda p: [share * p, (1 - share) * p])
    for logits in split["logits"].values():
        halve(logits[h][s], lambda x: [x + math.log(share), x + math.log(1 - share)])
    one, other = evaluate(document, tmp_path), check(split, tmp_path)
    assert other["policy_star"][h][s][0] / other["policy_star"][h][s][1] == pytest.approx(share / (1 - share))
    for key in ("v_star", "objective_star", "policies", "losses"):
        assert_same(one[key], other[key])


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_has_the_weighted_losses_of_its_components(kind: str, tmp_path: Path) -> None:
    losses = evaluate(random_document(12, kind), tmp_path)["losses"]["theta"]["by_behaviour"]
    for loss in ("tbrm", "brm"):
        mixed = 0.3 * losses["full"][loss] + 0.7 * losses["narrow"][loss]
        assert losses["replay"][loss] == pytest.approx(mixed, rel=1e-13)


# -- corollary 4 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_b4_is_an_equality_with_slack_beta_kl(kind: str, seed: int, tmp_path: Path) -> None:
    document = random_document(20 + seed, kind, missing=0.0)
    found = evaluate(document, tmp_path)["losses"]["theta"]
    mdp = plain(document)
    optimal = rf.trajectory_law(mdp, rf.optimal_policy(mdp))
    softmax = rf.trajectory_law(mdp, rf.softmax_policy(mdp, logits_of(document, "theta")))
    slack = mdp.beta * rf.kl_trajectories(optimal, softmax)
    assert slack > 1e-3
    assert found["corollary4"] - found["regret"] == pytest.approx(slack, rel=1e-9)


def test_corollary4_of_the_optimum_is_zero_and_of_a_batch_is_each_one() -> None:
    document = random_document(30, "dense", ragged=False)
    mdp = RegularizedMDP.from_field(_field(document))
    generator = torch.Generator().manual_seed(0)
    batch = tuple(torch.randn(5, *table.shape, generator=generator, dtype=torch.float64) for table in mdp.reference)
    together = corollary4(mdp, batch)
    assert together.shape == (5,)
    for i in range(5):
        alone = corollary4(mdp, tuple(table[i] for table in batch))
        assert alone.item() == pytest.approx(together[i].item(), rel=1e-13)
        tables = [mdp.rows(h, table[i]) for h, table in enumerate(batch)]
        assert alone.item() == pytest.approx(rf.corollary4(convert.plain(mdp), tables), rel=1e-10)
    q_star = tuple(torch.tensor(rows, dtype=torch.float64) for rows in rf.optimal_q(convert.plain(mdp)))
    assert corollary4(mdp, q_star).item() == pytest.approx(0.0, abs=1e-13)


def test_corollary4_is_differentiable() -> None:
    mdp = RegularizedMDP.from_field(_field(random_document(31, "sparse")))
    generator = torch.Generator().manual_seed(0)
    logits = tuple(
        torch.randn(table.shape, generator=generator, dtype=torch.float64).requires_grad_() for table in mdp.reference
    )
    assert torch.autograd.gradcheck(lambda *tables: corollary4(mdp, tables), logits)


def test_corollary4_refuses_what_is_no_table_of_logits() -> None:
    mdp = RegularizedMDP.from_field(_field(EXAMPLE))
    logits = tuple(torch.zeros_like(table) for table in mdp.reference)
    with pytest.raises(InvalidInputError, match=r"^logits: expected 2 layers, found 1"):
        corollary4(mdp, logits[:1])
    with pytest.raises(InvalidInputError, match=r"^logits\[1\]\[0\]\[0\]: expected a finite number"):
        corollary4(mdp, (logits[0], logits[1] + math.nan))


def _field(document: Object) -> Any:
    from tbrm_theory.json_fields import Field

    return Field("", document)
