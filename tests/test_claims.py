"""Every claim can fail: a bug planted in the code it checks turns its verdict. And what ``tbrm verify`` prints and returns."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_boundaries_optimisation
import test_convergence_claims
import test_coverage_boundary_claims
import test_coverage_claims
import test_family_claims
import test_noise_cost
import torch
from plants import Plant, check_that_the_verdict_turns, function, kernels, later_layers, scaled
from torch import Tensor

from tbrm_theory import dynamic_programming, losses, population
from tbrm_theory.claims import CLAIMS, Claim, Verdict, command, make_case, select, verify
from tbrm_theory.claims import cases as cases_module
from tbrm_theory.claims import loss_identities as loss_claims
from tbrm_theory.claims.cases import case_of, small_options
from tbrm_theory.claims.command import verify_command
from tbrm_theory.claims.comparison import EPSILON, Comparison
from tbrm_theory.claims.verification import Attempt, Outcome, by_number
from tbrm_theory.cli import main
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.families import FAMILIES, make
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.transitions import DenseTransition, SparseTransition

NUMBERS = [
    *(f"I{n}" for n in range(1, 15)),
    *(f"B{n}" for n in range(1, 8)),
    *(f"C{n}" for n in range(1, 5)),
    *(f"X{n}" for n in range(1, 8)),
    *(f"O{n}" for n in range(1, 8)),
    *(f"F{n}" for n in range(1, 8)),
]
FEW = ["chain", "garnet", "deterministic-tree"]


@pytest.fixture(autouse=True)
def _python_random_state() -> Iterator[None]:
    """rich draws identifiers of styles from Python's global generator; they are never printed."""
    state = random.getstate()
    yield
    random.setstate(state)


# -- planted bugs ----------------------------------------------------------------------------------------------------


def hard(q: Tensor) -> Tensor:
    return q.amax(-1)


def keeps_the_value(original: Any) -> Any:
    """The residual of a loss that forgot ``V_θ(s_1)``."""

    def residual(scores: losses.TrajectoryScores, *, beta: float | Tensor) -> Tensor:
        return original(scores, beta=beta) - scores.initial_value

    return residual


def sees_the_gauge(original: Any) -> Any:
    """A residual with 1.01 times the value of the states visited, as if the sum did not telescope."""

    def residual(scores: losses.TrajectoryScores, *, beta: float | Tensor) -> Tensor:
        assert scores.value is not None
        return original(scores, beta=beta) + 0.01 * scores.value[..., 1:].sum(-1)

    return residual


def two_values(original: Any) -> Any:
    def residual(scores: losses.TrajectoryScores, *, beta: float | Tensor) -> Tensor:
        return original(scores, beta=beta) * scores.initial_value

    return residual


def only_tbrm(original: Any) -> Any:
    """BRM computed as TBRM: blind to the gauge of later layers."""

    def loss(mdp: Any, logits: Any, behaviour: Any, *, loss: str = "tbrm") -> Tensor:
        return original(mdp, logits, behaviour)

    return loss


def no_noise(original: Any) -> Any:
    """The variance of the next state forgotten."""
    return lambda self, value: torch.zeros_like(original(self, value))


BUGS: dict[str, Plant] = {
    "I1.a": kernels("expect", scaled(1 + 1e-9)),
    "I1.b": function(dynamic_programming, "_policy_value", scaled(1 + 1e-9)),
    "I1.c": function(dynamic_programming, "soft_value", lambda original: lambda q: -original(q)),
    "I1.d": function(dynamic_programming, "bellman_operator", lambda original: lambda mdp, q: q),
    "I2.a": function(dynamic_programming, "soft_value", lambda original: hard),
    "I2.b": function(dynamic_programming, "soft_value", lambda original: hard),
    "I2.c": function(
        dynamic_programming, "soft_policy", lambda original: lambda q: torch.log_softmax(q * (1 + 1e-9), -1)
    ),
    "I2.d": kernels("expect", scaled(1 + 1e-9)),
    "I3.a": function(dynamic_programming, "policy_kl", scaled(1 + 1e-9)),
    "I3.b": kernels("push", scaled(1 + 1e-9)),
    "I4.a": function(dynamic_programming, "kl_to_reference", scaled(1 + 1e-9)),
    "I4.b": function(dynamic_programming, "_policy_value", scaled(1 + 1e-9)),
    "I5.a": function(losses, "tbrm_residual", keeps_the_value),
    "I5.b": function(losses, "first_logit_residual", scaled(1 + 1e-9)),
    "I5.c": function(losses, "brm_residual", scaled(1 + 1e-9)),
    "I5.d": function(population, "residual_terms", later_layers),
    "I6.a": function(losses, "tbrm_residual", sees_the_gauge),
    "I6.b": kernels("expect", scaled(1 + 1e-9)),
    "I7.a": kernels("expect", scaled(1 + 1e-9)),
    "I7.b": kernels("variance", scaled(1 + 1e-9)),
    "I7.c": function(population, "tbrm_residual", scaled(1 + 1e-9)),
    "I7.d": kernels("variance", no_noise),
    "I7.e": function(population, "residual_terms", later_layers),
    "I8.a": function(losses, "tbrm_residual", sees_the_gauge),
    "I8.b": function(losses, "tbrm_residual", keeps_the_value),
    "I8.c": function(population, "population_loss", only_tbrm),
    "I8.d": function(population, "population_loss", only_tbrm),
    "I9": function(dynamic_programming, "objective", scaled(1 + 1e-9)),
    "I10.a": function(losses, "tbrm_residual", two_values),
    "I10.b": function(losses, "tbrm_residual", two_values),
    "I11.a": function(
        population,
        "additive_moments",
        lambda original: lambda mdp, u, log: original(mdp, later_layers(lambda: u)(), log),
    ),
    "I11.b": function(
        loss_claims, "moment_product", lambda original: lambda mdp, log, g: later_layers(original)(mdp, log, g)
    ),
    "I11.c": function(population, "population_loss", scaled(1 + 1e-9)),
}


def test_a_bug_is_planted_for_every_claim() -> None:
    """Here and in the other modules that test claims."""
    elsewhere = (
        test_coverage_claims,
        test_coverage_boundary_claims,
        test_convergence_claims,
        test_boundaries_optimisation,
        test_noise_cost,
        test_family_claims,
    )
    planted = set(BUGS).union(*(module.BUGS for module in elsewhere))
    assert planted == set(CLAIMS)
    assert list(dict.fromkeys(claim.number for claim in CLAIMS.values())) == NUMBERS  # whatever the order of imports


@pytest.mark.parametrize("claim_id", BUGS)
def test_a_planted_bug_turns_the_verdict(claim_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_the_verdict_turns(claim_id, BUGS[claim_id], monkeypatch, FEW)


# -- cases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_small_enough_to_list_and_its_cases_can_be_made_again(family: str) -> None:
    first, again = make_case(family, 3), make_case(family, 3)
    assert first.too_large is None
    for name in ("log_policy", "other_policy", "log_behaviour", "logits", "additive", "gauge"):
        for ours, theirs in zip(getattr(first, name), getattr(again, name), strict=True):
            assert torch.equal(ours, theirs), name
    assert all(torch.equal(x, y) for x, y in zip(first.mdp.reward, again.mdp.reward, strict=True))
    assert not torch.equal(first.logits[0], make_case(family, 4).logits[0])


def test_cases_are_what_the_claims_need_them_to_be() -> None:
    """Full support where it is promised, actions left out where that is, both draws different; over some seeds all options."""
    case = make_case("token-tree", 0)
    for valid, policy, other, behaviour in zip(
        case.mdp.valid, case.log_policy, case.other_policy, case.log_behaviour, strict=True
    ):
        assert bool((policy[:, valid] > -math.inf).all())
        assert bool((behaviour[:, valid] > -math.inf).all())
        assert bool((other[0][valid] > -math.inf).all())
        for tables in (policy, behaviour):
            assert not torch.equal(tables[0], tables[1])
            assert not torch.equal(tables[1].exp(), valid / valid.sum(-1, keepdim=True))  # no special law
    assert any(
        bool((other[1][valid] == -math.inf).any())
        for other, valid in zip(case.other_policy, case.mdp.valid, strict=True)
    )
    seen = [small_options("garnet", seed) for seed in range(40)]
    for option, values in (("ragged", {True, False}), ("missing", {0.0, 0.3}), ("reference", {"uniform", "dirichlet"})):
        assert {options[option] for options in seen} == values
    betas = [options["beta"] for options in seen]
    assert max(betas) / min(betas) > 4


def test_the_families_that_can_be_random_are() -> None:
    """Chain, lake and cliff are tried with and without noise."""
    for family, option in (("chain", "slip"), ("frozen-lake", "slippery"), ("cliff-walking", "slippery")):
        assert {bool(small_options(family, seed).get(option)) for seed in range(40)} == {True, False}


def test_a_problem_too_large_to_list_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases_module, "MOST_TRAJECTORIES", 10)
    outcome = verify(select(["I3.a"]), ["token-tree"], instances=2)["I3.a"]
    assert outcome.verdict is Verdict.NOT_EXERCISED
    assert outcome.skipped == {"more than 10 trajectories": 2}


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim_id", "family", "reason"),
    [
        ("I2.b", "dense-random", "stochastic transitions"),
        ("I6.a", "garnet", "stochastic transitions"),
        ("I7.a", "dense-random", "stochastic transitions"),
        ("I7.b", "token-tree", "deterministic transitions"),
        ("I7.e", "one-state", "deterministic transitions"),
        ("I8.a", "two-armed-bandit", "only one layer"),
    ],
)
def test_assumptions_are_checked_and_a_refusal_says_which(claim_id: str, family: str, reason: str) -> None:
    outcome = verify(select([claim_id]), [family], instances=4)[claim_id]
    assert outcome.verdict is Verdict.NOT_EXERCISED
    assert outcome.instances == 0
    assert outcome.worst is None
    assert outcome.skipped == {reason: 4}


def kernel_case(kernel: Any, reward: Tensor) -> Any:
    """One state, one action, then two states, of given rewards."""
    mdp = RegularizedMDP(
        beta=1.0,
        initial=torch.ones(1),
        reward=[torch.zeros(1, 1), reward],
        reference=[torch.ones(1, 1), torch.ones(2, 1)],
        transitions=[kernel],
    )
    return case_of(mdp, "by hand", 0)


def test_determinism_is_a_matter_of_probabilities_and_not_of_the_kind_of_kernel() -> None:
    certain = DenseTransition(torch.tensor([[[0.0, 1.0]]]))
    certain_sparse = SparseTransition(torch.tensor([[[1, 0]]]), torch.tensor([[[1.0, 0.0]]]), 2)
    coin = DenseTransition(torch.tensor([[[0.5, 0.5]]]))
    reward = torch.tensor([[1.0], [2.0]])
    for kernel in (certain, certain_sparse):
        case = kernel_case(kernel, reward)
        assert CLAIMS["I6.a"].requires(case) is None
        assert CLAIMS["I7.b"].requires(case) == "deterministic transitions"
        assert CLAIMS["I6.a"].check(case).holds
    case = kernel_case(coin, reward)
    assert CLAIMS["I6.a"].requires(case) == "stochastic transitions"
    assert CLAIMS["I7.d"].requires(case) is None
    assert CLAIMS["I10.a"].requires(case) is None
    # A coin between states of equal value makes no noise, and a floor that is not positive would be no violation.
    assert CLAIMS["I7.d"].requires(kernel_case(coin, torch.ones(2, 1))) == "V* the same at all successors"
    assert CLAIMS["I10.a"].requires(kernel_case(certain, reward)) == "one response to each prompt"


# -- comparisons -----------------------------------------------------------------------------------------------------


def compare(left: list[float], right: list[float], relation: Any = "equal", scale: float = 2.0) -> Comparison:
    sides = (torch.tensor(side, dtype=torch.float64) for side in (left, right))
    return Comparison(*sides, torch.tensor(scale, dtype=torch.float64), 10, relation)


def test_an_error_is_relative_to_the_scale_and_the_bound_is_rounding() -> None:
    comparison = compare([1.0, 3.0], [1.0, 2.0])
    assert comparison.error == 0.5
    assert comparison.bound == 10 * EPSILON
    assert not comparison.holds
    assert comparison.ratio is None
    assert compare([1.0], [1.0 + 18 * EPSILON]).holds
    assert not compare([1.0], [1.0 + 22 * EPSILON]).holds


def test_an_inequality_may_be_strict_and_its_ratio_says_how_tight() -> None:
    comparison = compare([1.0, -5.0, 0.0], [4.0, 2.0, 0.0], "at most")
    assert comparison.holds
    assert comparison.error == 0.0
    assert comparison.ratio == 0.25
    assert compare([4.0], [1.0], "at most").error == 1.5
    assert not compare([4.0], [1.0], "at most").holds
    assert compare([0.0], [0.0], "at most").ratio is None


@pytest.mark.parametrize("relation", ["equal", "at most"])
def test_nan_never_agrees_and_infinity_agrees_with_itself(relation: str) -> None:
    assert compare([math.nan], [1.0], relation).error == math.inf
    assert not compare([1.0], [math.nan], relation).holds
    assert not compare([math.inf], [1.0], relation).holds
    assert compare([math.inf], [math.inf], relation).holds
    assert compare([0.0], [0.0], relation, scale=0.0).holds


@pytest.mark.parametrize("relation", ["equal", "at most"])
@pytest.mark.parametrize("scale", [math.inf, math.nan, -1.0])
def test_a_scale_that_is_no_size_hides_nothing(relation: str, scale: float) -> None:
    """5 against 1 relative to infinity would be no error at all."""
    assert compare([5.0], [1.0], relation, scale).error == math.inf
    assert not compare([5.0], [1.0], relation, scale).holds
    assert compare([math.inf], [math.inf], relation, scale).holds
    assert compare([1.0], [math.inf], "at most", scale).holds


# -- verify ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_claim_gets_its_number_of_instances_from_all_families() -> None:
    outcomes = verify(select(None), instances=4)
    wanted = {claim.id: min(4, claim.problems or 4) for claim in select(None)}
    assert {claim_id: outcome.instances for claim_id, outcome in outcomes.items()} == wanted
    assert {str(outcome.verdict) for outcome in outcomes.values()} == {"holds"}
    for outcome in outcomes.values():
        assert outcome.worst is not None
        assert outcome.worst.error <= outcome.worst.bound < 1e-10
        assert outcome.seconds > 0


def test_claims_share_their_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, int]] = []

    def counted(family: str, seed: int) -> Any:
        made.append((family, seed))
        return make_case(family, seed)

    monkeypatch.setattr("tbrm_theory.claims.verification.make_case", counted)
    seen: list[tuple[int, int]] = []
    verify(
        select(["I1", "I5"]), ["chain", "garnet"], 4, seed=7, progress=lambda done, total: seen.append((done, total))
    )
    assert made == [("chain", 7), ("garnet", 7), ("chain", 8), ("garnet", 8)]
    assert seen == [(8, 32), (16, 32), (24, 32), (32, 32)]


def test_ids_select_parts_or_whole_numbers_in_the_order_of_the_theory() -> None:
    assert [claim.id for claim in select(["I7.c", "I1"])] == ["I1.a", "I1.b", "I1.c", "I1.d", "I7.c"]
    assert select(None) == list(CLAIMS.values())
    with pytest.raises(InvalidInputError, match="unknown claim 'I99'; expected one of I1, I2"):
        select(["I99"])
    with pytest.raises(InvalidInputError, match=r"unknown claim 'I1\.z'"):
        select(["I1.z"])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"families": ["no-such"]}, "unknown family 'no-such'"),
        ({"instances": 0}, "expected at least 1, found 0"),
        ({"families": []}, "families: expected at least one"),
        ({"claims": []}, "claims: expected at least one"),
    ],
)
def test_verify_refuses_what_it_cannot_do(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidInputError, match=problem):
        verify(**({"claims": select(["I1"])} | arguments))


def test_a_number_is_as_good_as_the_worst_of_its_parts() -> None:
    case = make_case("chain", 0)
    parts: list[Claim] = select(["I2"])
    outcomes = {claim.id: Outcome() for claim in parts}
    outcomes["I2.a"].add(Attempt.of(compare([1.0], [1.0]), case))
    outcomes["I2.a"].add(Attempt.of(compare([1.0], [1.0 + 4 * EPSILON]), case))
    for claim in parts[1:]:
        outcomes[claim.id].add(Attempt.of(compare([1.0], [1.0]), case))
    assert by_number(parts, outcomes)["I2"].verdict is Verdict.HOLDS
    assert by_number(parts, outcomes)["I2"].instances == 1
    assert by_number(parts, outcomes)["I2"].worst == outcomes["I2.a"].worst
    outcomes["I2.b"] = Outcome()
    outcomes["I2.b"].skipped["stochastic transitions"] = 3
    assert by_number(parts, outcomes)["I2"].verdict is Verdict.NOT_EXERCISED
    assert by_number(parts, outcomes)["I2"].skipped == {"stochastic transitions": 3}
    outcomes["I2.c"].add(Attempt.of(compare([1.0], [2.0]), case))
    assert by_number(parts, outcomes)["I2"].verdict is Verdict.VIOLATED


def test_of_parts_without_an_error_the_tightest_is_the_worst() -> None:
    case = make_case("chain", 0)
    parts = select(["B2.a", "B2.b"])
    outcomes = {claim.id: Outcome() for claim in parts}
    for outcome, left in zip(outcomes.values(), (1.0, 3.0), strict=True):
        outcome.add(Attempt.of(compare([left], [4.0], "at most"), case))
    assert by_number(parts, outcomes)["B2"].worst == outcomes["B2.b"].worst


def test_the_tightest_instance_of_an_inequality_is_kept() -> None:
    outcome = Outcome()
    for seed, left in enumerate((1.0, 3.0, 2.0)):
        outcome.add(Attempt.of(compare([left], [4.0], "at most"), make_case("chain", seed)))
    assert outcome.worst is not None
    assert (outcome.worst.ratio, outcome.worst.seed) == (0.75, 1)


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statements are wrapped at 80 columns where there is no terminal."""
    monkeypatch.setenv("COLUMNS", "200")


def test_status_0_one_line_for_each_claim_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "outcomes.json"
    assert (
        main(
            ["verify", "--claims", "I1", "I3", "--families", "chain", "garnet", "--instances", "3", "--json", str(path)]
        )
        == 0
    )
    printed = capsys.readouterr()
    lines = [line for line in printed.out.splitlines() if line.strip().startswith("I")]
    assert [line.split()[0] for line in lines] == ["I1.a", "I1.b", "I1.c", "I1.d", "I3.a", "I3.b"]
    assert all(line.split()[-1] == "holds" for line in lines)
    assert "J_β(π*) - J_β(π) = β KL(P_π ‖ P_{π*})" in lines[-1]
    assert printed.err == ""
    document = json.loads(path.read_text(encoding="utf-8"))
    assert list(document) == ["I1", "I1.a", "I1.b", "I1.c", "I1.d", "I3", "I3.a", "I3.b"]
    found = document["I3"]
    assert found["verdict"] == "holds"
    assert found["instances"] == 3
    assert found["skipped"] == 0
    assert 0 <= found["worst_error"] <= found["bound"] < 1e-10
    assert found["family"] in ("chain", "garnet")
    assert found["seed"] in (0, 1)
    assert found["seconds"] >= 0
    assert document["I1.c"]["worst_ratio"] <= 1
    assert (
        f"l/r {document['I1.c']['worst_ratio']:.4g}" in lines[2]
    )  # an inequality's slack, not only that it has no error
    assert [entry.name for entry in tmp_path.iterdir()] == ["outcomes.json"]


def test_status_1_on_a_violation_with_the_command_that_shows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    BUGS["I3.a"](monkeypatch)
    path = tmp_path / "outcomes.json"
    arguments = ["verify", "--claims", "I3", "I6", "--families", "chain", "--instances", "2", "--json", str(path)]
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    assert "I3.a is violated on 2 of 2 instances" in printed
    command = printed[printed.index("tbrm verify --claims I3.a") :].splitlines()[0].split()
    assert main(command[1:]) == 1
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["I3"]["verdict"] == document["I3.a"]["verdict"] == "violated"
    assert document["I6"]["verdict"] == "holds"


def test_status_2_on_a_claim_that_was_never_exercised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "outcomes.json"
    assert verify_command(["I6", "I1"], ["dense-random"], instances=2, json=path) == 2
    printed = capsys.readouterr().out
    assert "I6.a was never exercised" in printed
    assert "2 stochastic transitions" in printed
    found = json.loads(path.read_text(encoding="utf-8"))["I6"]
    assert found == {
        "verdict": "not exercised",
        "instances": 0,
        "skipped": 4,
        "skip_reasons": {"stochastic transitions": 4},
        "worst_error": None,
        "bound": None,
        "worst_ratio": None,
        "family": None,
        "seed": None,
        "seconds": found["seconds"],
    }


def test_a_violation_outweighs_a_claim_never_exercised(monkeypatch: pytest.MonkeyPatch) -> None:
    BUGS["I3.a"](monkeypatch)
    assert verify_command(["I3", "I6"], ["dense-random"], instances=3) == 1


def test_an_infinite_error_is_a_string_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        dynamic_programming, "policy_kl", lambda *arguments: torch.tensor(math.nan, dtype=torch.float64)
    )
    path = tmp_path / "outcomes.json"
    assert verify_command(["I3.b"], ["chain"], instances=1, json=path) == 1
    assert json.loads(path.read_text(encoding="utf-8"))["I3.b"]["worst_error"] == "inf"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--claims", "I99"], "claims: unknown claim 'I99'"),
        (["--families", "lake"], "families: unknown family 'lake'"),
        (["--instances", "0"], "instances: expected at least 1, found 0"),
        (["--json", "/no/such/folder/out.json"], "json: no folder /no/such/folder"),
        (["--json", "/"], "json: expected a file to write, found the folder /"),
    ],
)
def test_bad_arguments_are_one_line_on_stderr(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert problem in printed.err


def test_the_number_of_threads_is_left_as_it_was() -> None:
    before = torch.get_num_threads()
    assert verify_command(["I1.a"], ["chain"], instances=1) == 0
    assert torch.get_num_threads() == before


def test_the_statements_are_one_line_with_a_source() -> None:
    for claim in CLAIMS.values():
        assert claim.statement
        assert "\n" not in claim.statement
        assert claim.source
    proofs = [
        claim
        for claim in CLAIMS.values()
        if claim.number in ("I6", "I7", "I8", "I9") and claim.source.startswith("own")
    ]
    for claim in proofs:
        text = claim.check.__doc__ or ""
        assert "*Proof.*" in text or "proof" in text or "none negative" in text, claim.id


def test_made_problems_are_those_of_the_families() -> None:
    """``make_case`` adds nothing to the problem: it is ``make`` with the options of the seed."""
    problem = make("garnet", seed=5, **small_options("garnet", 5))
    for ours, theirs in zip(make_case("garnet", 5).mdp.reward, problem.reward, strict=True):
        assert torch.equal(ours, theirs)


def test_a_full_disk_costs_the_file_and_not_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full_disk(path: Path, document: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(command, "write_json", full_disk)
    assert main(["verify", "--claims", "I1", "--instances", "1", "--json", str(tmp_path / "out.json")]) == 2
    out, err = capsys.readouterr()
    assert "I1.a" in out
    assert err == f"tbrm: error: {tmp_path / 'out.json'}: No space left on device\n"
