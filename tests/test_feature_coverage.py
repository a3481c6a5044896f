"""κ and Λ of a linear class: what they are on indicator features, where they are infinite, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from problems import random_policy, random_problem
from torch import Tensor

from tbrm_theory import coverage
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.feature_coverage import class_kappa, class_logits, class_second_moment, feature_moments
from tbrm_theory.mdp import RegularizedMDP
from tests import reference as rf
from tests.convert import plain


def indicators(mdp: RegularizedMDP) -> tuple[Tensor, ...]:
    """One feature for each pair: the class of all additive functions."""
    sizes = [table.numel() for table in mdp.reference]
    rows = torch.eye(sum(sizes), dtype=torch.float64).split(sizes, dim=1)
    return tuple(row.reshape(-1, *table.shape) for row, table in zip(rows, mdp.reference, strict=True))


@pytest.mark.parametrize("kind", ["deterministic", "sparse", "dense"])
@pytest.mark.parametrize("seed", range(3))
def test_the_class_of_all_additive_functions_has_kappa_and_the_second_moment(kind: str, seed: int) -> None:
    mdp = random_problem(kind, seed)
    pi, mu, every = random_policy(mdp, 1 + seed), random_policy(mdp, 9 + seed), indicators(mdp)
    assert class_kappa(mdp, pi, mu, every).item() == pytest.approx(coverage.kappa(mdp, pi, mu).item(), rel=1e-9)
    full = coverage.second_moment(mdp, pi, mu).item()
    assert class_second_moment(mdp, pi, mu, every).item() == pytest.approx(full, rel=1e-9)


def test_moments_of_features_are_sums_over_trajectories() -> None:
    mdp, generator = random_problem("dense", 2), torch.Generator().manual_seed(0)
    features = tuple(torch.randn(3, *t.shape, generator=generator, dtype=torch.float64) for t in mdp.reference)
    policy = random_policy(mdp, 5)
    naive = plain(mdp)
    law = rf.trajectory_law(naive, [mdp.rows(h, log.exp()) for h, log in enumerate(policy)])
    mean, square = feature_moments(mdp, policy, features)
    for i in range(3):
        one = [mdp.rows(h, table[i]) for h, table in enumerate(features)]
        expected = rf.expectation(law, lambda tau, f=one: rf.table_sum(f, tau))
        assert mean[i].item() == pytest.approx(expected, rel=1e-12)
        for j in range(3):
            other = [mdp.rows(h, table[j]) for h, table in enumerate(features)]
            both = rf.expectation(law, lambda tau, f=one, g=other: rf.table_sum(f, tau) * rf.table_sum(g, tau))
            assert square[i, j].item() == pytest.approx(both, rel=1e-12)


def test_a_class_that_the_data_see_is_covered_though_actions_are_missing_and_one_they_do_not_see_is_not() -> None:
    mdp = random_problem("deterministic", 1)
    pi = random_policy(mdp, 3)
    mu = tuple(
        torch.log_softmax(torch.where(log == log.amax(-1, keepdim=True), log, -torch.inf), -1)
        for log in random_policy(mdp, 4)
    )
    assert coverage.kappa(mdp, pi, mu).item() == math.inf
    ones = tuple(torch.ones(1, *table.shape, dtype=torch.float64) for table in mdp.reference)
    assert class_kappa(mdp, pi, mu, ones).item() == pytest.approx(1)  # f is a constant
    assert class_second_moment(mdp, pi, mu, ones).item() == pytest.approx(1)
    unseen = tuple((log == -torch.inf).double().unsqueeze(0) for log in mu)
    assert class_kappa(mdp, pi, mu, unseen).item() == class_second_moment(mdp, pi, mu, unseen).item() == math.inf
    assert class_kappa(mdp, mu, mu, unseen).item() == 0  # neither do they see it, nor does the target
    assert class_second_moment(mdp, mu, mu, unseen).item() == 0


def test_logits_of_a_batch_of_weights_and_what_is_refused() -> None:
    mdp = random_problem("deterministic", 0)
    features = tuple(torch.ones(2, *table.shape, dtype=torch.float64) for table in mdp.reference)
    weights = torch.tensor([[0.0, 0.0], [1.0, -1.0], [2.0, 0.0]], dtype=torch.float64)
    logits = class_logits(mdp, features, weights)
    assert [table.shape[0] for table in logits] == [3] * mdp.horizon
    torch.testing.assert_close(logits[0][0], logits[0][1])  # both are R_β
    with pytest.raises(InvalidInputError, match=r"features\[1\]: expected \(k, "):
        feature_moments(mdp, mdp.log_reference, (features[0], features[1][0], *features[2:]))
    with pytest.raises(InvalidInputError, match="found a batch"):
        feature_moments(mdp, tuple(table.expand(2, -1, -1) for table in mdp.log_reference), features)
