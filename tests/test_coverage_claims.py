"""I12-I14, B1-B5, B7, O3: a bug planted in the code that each checks turns its verdict; assumptions are checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from plants import Plant, check_that_the_verdict_turns, function, scaled
from torch import Tensor

from tbrm_theory import bounds, coverage, dynamic_programming, feature_coverage, optimisers, policy_class, population
from tbrm_theory.claims import CLAIMS, Verdict, select, verify
from tbrm_theory.claims.measure_change import sharp_family
from tbrm_theory.claims.regret_bounds import bandit_of_theorem_2, regret_by_hand
from tbrm_theory.objectives import SampleObjective

FEW = ["chain", "deterministic-tree", "combination-lock", "one-state", "deterministic-dag"]
Bug = Callable[[Any], Any]


def other_argument(position: int, change: Callable[[Any], Any]) -> Bug:
    """One argument changed before the call."""

    def bug(original: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            changed = [change(value) if i == position else value for i, value in enumerate(arguments)]
            return original(*changed, **options)

        return call

    return bug


def stretched(tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(1.001 * table for table in tables)


def stretched_result(original: Any) -> Any:
    return lambda *arguments: stretched(original(*arguments))


def small_variance(original: Any) -> Any:
    def moments(*arguments: Any) -> Any:
        found = original(*arguments)
        return replace(found, variance=1e-4 * found.variance)

    return moments


BUGS: dict[str, Plant] = {
    "I12.a": function(coverage, "kappa_closed_form", scaled(1 + 1e-9)),
    "I12.b": function(coverage, "kappa_closed_form", scaled(1 + 1e-9)),
    "I12.c": function(coverage, "kappa_closed_form", scaled(1 + 1e-9)),
    "I12.d": function(coverage, "kappa_closed_form", scaled(1e-3)),
    "I13": function(coverage, "kappa_closed_form", scaled(1 + 1e-9)),
    "I14.a": function(population, "soft_plan", other_argument(1, stretched)),
    "I14.b": function(population, "soft_plan", other_argument(1, stretched)),
    "I14.c": function(optimisers, "least_squares_plan", stretched_result),
    "I14.d": function(SampleObjective, "loss", scaled(1 + 1e-9)),
    "B1.a": function(coverage, "kappa_closed_form", scaled(10)),
    "B1.b": function(coverage, "lemma1", scaled(1 + 1e-9)),
    "B2.a": function(coverage, "lemma1", scaled(1e3)),
    "B2.b": function(coverage, "lemma1", scaled(1e3)),
    "B2.c": function(coverage, "kappa_closed_form", scaled(1e3)),
    "B2.d": function(coverage, "kappa_linear_solve", scaled(1 + 1e-9)),
    "B2.e": function(policy_class, "largest_c_inf", scaled(0.3)),
    "B3.a": function(coverage, "c_inf", scaled(0.1)),
    "B3.b": function(coverage, "second_moment", scaled(1 + 1e-9)),
    "B3.c": function(coverage, "second_moment", scaled(1 + 1e-9)),
    "B3.d": function(coverage, "second_moment", scaled(1 + 1e-9)),
    "B4.a": function(bounds, "corollary4", scaled(1 + 1e-9)),
    "B4.b": function(bounds, "corollary4", scaled(0.1)),
    "B5.a": function(bounds, "theorem2", scaled(0.1)),
    "B5.b": function(bounds, "theorem2_centred", scaled(0.1)),
    "B5.c": function(bounds, "theorem2", scaled(0.05)),
    "B5.d": function(bounds, "theorem2", scaled(2.0)),
    "B7.a": function(bounds, "path_policy", other_argument(2, torch.square)),
    "B7.b": function(population, "additive_moments", small_variance),
    "B7.c": function(coverage, "second_moment", scaled(1e-3)),
    "B7.d": function(coverage, "c_inf", scaled(1e-3)),
    "B7.e": function(coverage, "c_inf", scaled(1e-3)),
    "O3.a": function(dynamic_programming, "regret", scaled(1 + 1e-9)),
    "O3.b": function(bounds, "support_bound", scaled(0.2)),
    "O5.a": function(feature_coverage, "soft_plan", other_argument(1, stretched)),
    "O5.b": function(feature_coverage, "class_kappa", scaled(1 + 1e-9)),
    "O5.c": function(feature_coverage, "class_kappa", scaled(0.01)),
    "O5.d": function(feature_coverage, "class_second_moment", scaled(0.3)),
    "O5.e": function(feature_coverage, "class_kappa", scaled(3)),
    "O4": function(policy_class, "largest_c_inf", scaled(0.7)),
}


@pytest.mark.parametrize("claim_id", BUGS)
def test_a_planted_bug_turns_the_verdict(claim_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bounded = claim_id in (
        "I12.d",
        "B1.a",
        "B2.a",
        "B2.b",
        "B2.c",
        "B2.e",
        "B3.a",
        "B4.b",
        "B5.a",
        "B5.b",
        "B5.c",
        "B7.b",
    )
    families = FEW if bounded or claim_id.startswith(("B7", "O3")) else FEW[:3]
    check_that_the_verdict_turns(
        claim_id, BUGS[claim_id], monkeypatch, families, instances=8 if bounded or claim_id == "O4" else 4
    )


@pytest.mark.parametrize(
    ("claim_id", "family", "reason"),
    [
        ("I13", "deterministic-dag", "states merge"),
        ("I13", "dense-random", "stochastic transitions"),
        ("B5.a", "garnet", "stochastic transitions"),
        ("B3.a", "taxi", "more than 400 pairs"),
        ("O3.a", "dense-random", "stochastic transitions"),
    ],
)
def test_a_refusal_says_which_assumption_fails(claim_id: str, family: str, reason: str) -> None:
    outcome = verify(select([claim_id]), [family], instances=2)[claim_id]
    assert outcome.verdict is Verdict.NOT_EXERCISED
    assert outcome.skipped == {reason: 2}


@pytest.mark.parametrize("claim_id", ["B5.a", "B5.b", "B5.c", "B7.d", "O3.b"])
def test_a_bound_that_says_nothing_is_no_bound(claim_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = {"B5.b": "theorem2_centred", "B7.d": "c_inf", "O3.b": "support_bound"}.get(claim_id, "theorem2")
    module = coverage if claim_id == "B7.d" else bounds
    monkeypatch.setattr(module, name, lambda *_, **__: torch.full((2,), torch.inf, dtype=torch.float64))
    assert verify(select([claim_id]), FEW, instances=4)[claim_id].verdict is Verdict.VIOLATED


def test_own_statements_carry_their_proof() -> None:
    """Of those of this file's modules; the first parts of a statement may leave it to the last."""
    for claim in CLAIMS.values():
        if claim.id in BUGS and claim.source == "own":
            text = claim.check.__doc__ or ""
            assert "roof" in text or claim.id in ("I12.d", "B2.d", "B3.b", "B3.d"), claim.id


@pytest.mark.parametrize("horizon", [2, 3, 6])
@pytest.mark.parametrize("g", [1e-3, 1e-9, 1e-100])
def test_b3_is_sharp_however_small_g_is(horizon: int, g: float) -> None:
    mdp, pi, mu = sharp_family(horizon, 2.0, g)
    found = coverage.change_of_measure(mdp, pi, mu)
    assert found.c_inf.item() == pytest.approx(2.0, rel=1e-12)
    assert found.second_moment.item() == pytest.approx(2 * (horizon - (horizon - 1) * g), rel=1e-9)


@pytest.mark.parametrize(("largest", "share"), [(20.0, 0.95), (100.0, 0.99)])
def test_b5_is_sharp_on_a_bandit(largest: float, share: float) -> None:
    case = bandit_of_theorem_2(largest)
    ratio = (regret_by_hand(case) / bounds.theorem2(case.mdp, case.logits, case.log_behaviour)).item()
    assert share - 1e-6 < ratio < 1
