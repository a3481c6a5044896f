"""Every exact quantity against plain-Python enumeration (theory.md I1-I5, I7, B4), on every kind of transition."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import reference
import torch
from convert import plain
from problems import KINDS, random_logits, random_policy, random_problem

import tbrm_theory as tt
from tbrm_theory.behaviours import MixtureBehaviour
from tbrm_theory.bounds import corollary4
from tbrm_theory.dynamic_programming import regret_by_subtraction, relative_entropy
from tbrm_theory.losses import brm_residual, first_logit_residual, tbrm_residual
from tbrm_theory.occupancy import (
    enumerate_trajectories,
    flatten_tables,
    moment_matrix,
    moment_product,
    occupancy,
    unflatten_tables,
)
from tbrm_theory.population import noise_floor
from tbrm_theory.scores import table_scores
from tbrm_theory.trajectories import TrajectoryBatch, sample_trajectories

CASES = list(itertools.product(KINDS, range(4)))


def close(left: Any, right: Any, tolerance: float = 1e-12) -> bool:
    """Nested lists of numbers agree relative to their size; infinities agree exactly."""
    if isinstance(left, list):
        return len(left) == len(right) and all(close(a, b, tolerance) for a, b in zip(left, right, strict=True))
    return left == right or abs(left - right) <= tolerance * max(1.0, abs(right))


def probabilities(log_policy: tuple[torch.Tensor, ...]) -> list[Any]:
    return [table.exp().tolist() for table in log_policy]


@pytest.mark.parametrize(("kind", "seed"), CASES)
def test_optimum_is_the_enumerated_one(kind: str, seed: int) -> None:
    mdp = random_problem(kind, seed)
    solution, truth = tt.solve(mdp), plain(mdp)
    assert close([table.tolist() for table in solution.v], reference.optimal_values(truth))
    assert close([table.tolist() for table in solution.q], reference.optimal_q(truth))
    assert close(probabilities(solution.log_policy), reference.optimal_policy(truth))
    assert close(solution.objective.item(), reference.objective(truth, reference.optimal_policy(truth)))
    assert solution.certified


@pytest.mark.parametrize(("kind", "seed"), CASES)
def test_policy_quantities_are_the_enumerated_ones(kind: str, seed: int) -> None:
    mdp = random_problem(kind, seed)
    log_policy, truth = random_policy(mdp, seed), plain(mdp)
    policy = probabilities(log_policy)
    assert close(tt.objective(mdp, log_policy).item(), reference.objective(truth, policy))
    assert close(tt.evaluate(mdp, log_policy).objective.item(), reference.objective(truth, policy))
    assert close(tt.regret(mdp, log_policy).item(), reference.regret(truth, policy), 1e-11)
    assert close(regret_by_subtraction(mdp, log_policy).item(), reference.regret(truth, policy), 1e-11)
    law = reference.trajectory_law(truth, policy)
    d = occupancy(mdp, log_policy)
    assert close([table.tolist() for table in d.state_action], reference.occupancy_state_action(truth, law))


@pytest.mark.parametrize(("kind", "seed"), CASES)
def test_population_losses_are_the_enumerated_ones(kind: str, seed: int) -> None:
    mdp, truth = random_problem(kind, seed), plain(random_problem(kind, seed))
    logits, mu, nu = random_logits(mdp, seed), random_policy(mdp, seed + 1), random_policy(mdp, seed + 2)
    table = [layer.tolist() for layer in logits]
    law = reference.trajectory_law(truth, probabilities(mu))
    assert close(tt.population_loss(mdp, logits, mu).item(), reference.tbrm_loss(truth, table, law))
    assert close(tt.population_loss(mdp, logits, mu, loss="brm").item(), reference.brm_loss(truth, table, law))
    mixed = reference.mixture_law(truth, [(0.3, probabilities(mu)), (0.7, probabilities(nu))])
    mixture = MixtureBehaviour((0.3, 0.7), (mu, nu))
    assert close(tt.population_loss(mdp, logits, mixture).item(), reference.tbrm_loss(truth, table, mixed))
    listed = enumerate_trajectories(mdp)
    assert close(mixture.log_law(mdp, listed).exp().sum().item(), 1.0)
    assert close(noise_floor(mdp, mixture).item(), reference.noise_floor(truth, mixed))
    assert close(corollary4(mdp, logits).item(), reference.corollary4(truth, table), 1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_floor_is_the_loss_at_the_optimum(kind: str) -> None:
    """I7: zero on deterministic problems, down to rounding; positive on stochastic ones."""
    mdp = random_problem(kind, 1)
    loss = tt.population_loss(mdp, tt.solve(mdp).q, mdp.log_reference)
    if kind == "deterministic":
        assert 0 <= loss.item() < 1e-28
    else:
        assert loss.item() > 1e-3
        assert close(loss.item(), noise_floor(mdp, mdp.log_reference).item())


@pytest.mark.parametrize(("kind", "seed"), CASES)
def test_residuals_follow_the_definition(kind: str, seed: int) -> None:
    """I5: the definition, the telescoped form and Algorithm 1's form agree on every trajectory."""
    mdp, truth = random_problem(kind, seed), plain(random_problem(kind, seed))
    logits = random_logits(mdp, seed)
    listed = enumerate_trajectories(mdp)
    batch = TrajectoryBatch(listed.states, listed.actions, torch.ones_like(listed.states, dtype=torch.bool))
    scores = table_scores(logits, mdp.log_reference, mdp.reward, batch)
    table = [layer.tolist() for layer in logits]
    expected = [
        reference.residual(truth, table, tuple(zip(states, actions, strict=True)))
        for states, actions in zip(listed.states.tolist(), listed.actions.tolist(), strict=True)
    ]
    assert len(expected) > 8
    assert close(tbrm_residual(scores, beta=mdp.beta).tolist(), expected)
    assert close(first_logit_residual(scores, beta=mdp.beta).tolist(), expected)
    assert close(brm_residual(scores, beta=mdp.beta).sum(-1).tolist(), expected)


@pytest.mark.parametrize(("kind", "seed"), CASES)
def test_moment_matrix_is_the_enumerated_one(kind: str, seed: int) -> None:
    """I12's M: gᵀ M g = E_μ[(Σ g)²] by enumeration, and the product by sweeps is M g."""
    mdp, mu = random_problem(kind, seed), random_policy(random_problem(kind, seed), seed)
    listed = enumerate_trajectories(mdp)
    g = tuple(torch.where(v, table, 0.0) for v, table in zip(mdp.valid, random_logits(mdp, 9), strict=True))
    matrix, flat = moment_matrix(mdp, mu), flatten_tables(g)
    expected = (listed.log_law(mu).exp() * listed.sum_along(g).square()).sum()
    assert close((flat @ matrix @ flat).item(), expected.item())
    assert close(
        flatten_tables(moment_product(mdp, mu, unflatten_tables(mdp, flat))).tolist(), (matrix @ flat).tolist()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_occupancy_is_the_exact_one(kind: str) -> None:
    """Frequencies of 40,000 draws within six standard errors of the law; nothing impossible is drawn."""
    mdp, count = random_problem(kind, 1), 40_000
    mu = random_policy(mdp, 3)
    batch = sample_trajectories(mdp, mu, count, torch.Generator().manual_seed(0))
    for h, expected in enumerate(occupancy(mdp, mu).state_action):
        cells = batch.states[:, h] * expected.shape[-1] + batch.actions[:, h]
        seen = torch.bincount(cells, minlength=expected.numel()).double() / count
        error = (seen - expected.flatten()).abs()
        assert bool((error <= 6 * (expected.flatten() * (1 - expected.flatten()) / count).clamp(min=0).sqrt()).all())


def test_relative_entropy_keeps_its_digits_near_zero() -> None:
    """KL of a shift by 1e-12 is ½ Σ q x², twelve digits below what the plain sum can hold."""
    p = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    q = p + 1e-12 * torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    assert math.isclose(relative_entropy(p, q).item(), 0.5e-24, rel_tol=1e-3)


@pytest.mark.parametrize("beta", [1e-6, 1e-3, 1e3, 1e6])
def test_extreme_temperatures_stay_finite(beta: float) -> None:
    mdp = random_problem("dense", 1, beta=beta)
    solution = tt.solve(mdp)
    assert math.isfinite(solution.objective.item())
    assert tt.regret(mdp, mdp.log_reference).item() >= 0
    assert solution.certified
