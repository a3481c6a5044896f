"""Bounds on the regret against enumeration: Theorem 2, its centred form, the path of B7, masking to the data's support."""

from __future__ import annotations

import math

import pytest
import torch
from problems import random_logits, random_policy, random_problem
from torch import Tensor

from tbrm_theory import dynamic_programming as dp
from tbrm_theory.behaviours import HistoryBehaviour, MixtureBehaviour
from tbrm_theory.bounds import (
    centred_loss,
    path_policy,
    support_bound,
    support_problem,
    theorem2,
    theorem2_centred,
)
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.occupancy import enumerate_trajectories
from tests import reference as rf
from tests.convert import plain

Policy = tuple[Tensor, ...]


def table(mdp: RegularizedMDP, log_policy: Policy) -> rf.Table:
    return [mdp.rows(h, log.exp()) for h, log in enumerate(log_policy)]


def holes(mdp: RegularizedMDP, seed: int) -> Policy:
    kept = [torch.where(log >= log.amax(-1, keepdim=True) - 0.8, log, -torch.inf) for log in random_policy(mdp, seed)]
    return tuple(torch.log_softmax(log, -1) for log in kept)


@pytest.mark.parametrize("seed", range(4))
def test_theorem_2_by_its_parts(seed: int) -> None:
    mdp = random_problem("deterministic", seed)
    logits, mu = random_logits(mdp, seed + 1), random_policy(mdp, seed + 2)
    naive = plain(mdp)
    values = [mdp.rows(h, q) for h, q in enumerate(logits)]
    law = rf.trajectory_law(naive, table(mdp, mu))
    policies = (rf.optimal_policy(naive), rf.softmax_policy(naive, values))
    kappas = [rf.kappa_by_sup(rf.trajectory_law(naive, policy), law) for policy in policies]
    expected = mdp.beta.item() * sum(map(math.sqrt, kappas)) * math.sqrt(rf.tbrm_loss(naive, values, law))
    assert theorem2(mdp, logits, mu).item() == pytest.approx(expected, rel=1e-10)
    centred = theorem2_centred(mdp, logits, mu).item()
    by_start: dict[int, list[tuple[float, float]]] = {}
    for trajectory, p in law.items():
        by_start.setdefault(trajectory[0][0], []).append((p, rf.residual(naive, values, trajectory)))
    variance = 0.0
    for rows in by_start.values():
        mass = sum(p for p, _ in rows)
        mean = sum(p * f for p, f in rows) / mass
        variance += sum(p * (f - mean) ** 2 for p, f in rows)
    assert centred_loss(mdp, logits, mu).item() == pytest.approx(variance, rel=1e-10)
    shifted = mdp.beta.item() * sum(math.sqrt(kappa - 1) for kappa in kappas) * math.sqrt(variance)
    assert centred == pytest.approx(shifted, rel=1e-9)
    assert dp.regret(mdp, tuple(torch.log_softmax(q, -1) for q in logits)).item() < centred < expected


def test_the_centred_loss_of_mixtures_and_of_data_with_a_memory() -> None:
    """Two ways that share nothing: components, and the law on all trajectories."""
    mdp = random_problem("deterministic", 1)
    logits, parts = random_logits(mdp, 3), tuple(random_policy(mdp, i) for i in (4, 5))
    mixture = MixtureBehaviour((0.3, 0.7), parts)
    listed = enumerate_trajectories(mdp)
    f = listed.sum_along(logits) - listed.sum_along(mdp.regularized_reward)
    f = f - sum(torch.logsumexp(logits[h], -1)[listed.states[:, h]] for h in range(1, mdp.horizon))
    for behaviour in (mixture, HistoryBehaviour(parts[0], repeat=0.0), HistoryBehaviour(parts[0], repeat=0.5)):
        law = behaviour.log_law(mdp, listed).exp()
        expected = 0.0
        for start in listed.states[:, 0].unique():
            here = listed.states[:, 0] == start
            share = law[here] / law[here].sum()
            expected += law[here].sum() * (share @ f[here] ** 2 - (share @ f[here]) ** 2)
        assert centred_loss(mdp, logits, behaviour).item() == pytest.approx(float(expected), rel=1e-9)
    assert centred_loss(mdp, logits, HistoryBehaviour(parts[0], repeat=0.0)).item() == pytest.approx(
        centred_loss(mdp, logits, parts[0]).item(), rel=1e-10
    )


def test_the_path_goes_from_the_optimum_to_the_policy_through_tilted_laws() -> None:
    mdp = random_problem("deterministic", 3)
    logits, solution = random_logits(mdp, 0), dp.solve(mdp)
    ends = path_policy(mdp, logits, torch.tensor([0.0, 1.0], dtype=torch.float64))
    listed = enumerate_trajectories(mdp)
    torch.testing.assert_close(listed.log_law(ends)[0], listed.log_law(solution.log_policy), rtol=1e-12, atol=1e-12)
    theta = tuple(torch.log_softmax(q, -1) for q in logits)
    torch.testing.assert_close(listed.log_law(ends)[1], listed.log_law(theta), rtol=1e-12, atol=1e-12)
    half = listed.log_law(path_policy(mdp, logits, torch.tensor(0.5, dtype=torch.float64)))
    f = listed.log_law(theta) - listed.log_law(solution.log_policy)  # up to a function of the first state
    gap = half - listed.log_law(solution.log_policy) - 0.5 * f
    for start in listed.states[:, 0].unique():
        here = gap[listed.states[:, 0] == start]
        assert (here - here[0]).abs().max() < 1e-12


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["deterministic", "dense"])
def test_the_support_problem_keeps_every_objective(seed: int, kind: str) -> None:
    mdp = random_problem(kind, seed)
    mu = holes(mdp, seed)
    inner = support_problem(mdp, mu)
    assert any(bool((inner.valid[h] != mdp.valid[h]).any()) for h in range(mdp.horizon))
    tilted = [torch.where(log > -torch.inf, log + 0.3 * torch.arange(log.shape[-1]), -torch.inf) for log in mu]
    for policy in (mu, tuple(torch.log_softmax(log, -1) for log in tilted)):
        assert dp.objective(inner, policy).item() == pytest.approx(dp.objective(mdp, policy).item(), rel=1e-12)
        assert dp.objective(inner, policy).item() == pytest.approx(rf.objective(plain(mdp), table(mdp, policy)))
    assert dp.solve(inner).objective < dp.solve(mdp).objective


@pytest.mark.parametrize("seed", range(6))
def test_the_support_bound_is_finite_where_theorem_2_is_not(seed: int) -> None:
    mdp = random_problem("deterministic", seed)
    mu, logits = holes(mdp, seed), random_logits(mdp, 9 + seed)
    assert theorem2(mdp, logits, mu).item() == math.inf
    bound = support_bound(mdp, logits, mu).item()
    masked = tuple(
        torch.log_softmax(torch.where(log > -torch.inf, q, -torch.inf), -1) for log, q in zip(mu, logits, strict=True)
    )
    lost = (dp.solve(mdp).objective - dp.solve(support_problem(mdp, mu)).objective).item()
    regret = dp.regret(mdp, masked).item()
    assert 0 < lost <= regret * (1 + 1e-12)  # equal where one action is left everywhere
    assert regret <= bound < math.inf


def test_what_the_bounds_refuse() -> None:
    dense = random_problem("dense", 0)
    logits = random_logits(dense, 0)
    for call in (theorem2, theorem2_centred, support_bound):
        with pytest.raises(InvalidInputError, match="deterministic"):
            call(dense, logits, dense.log_reference)
    with pytest.raises(InvalidInputError, match="deterministic"):
        path_policy(dense, logits, torch.tensor(0.5, dtype=torch.float64))
    mdp = random_problem("deterministic", 0)
    wrong = tuple(log - 1 for log in mdp.log_reference)
    with pytest.raises(InvalidInputError, match="log_mu"):
        support_problem(mdp, wrong)


def test_a_batch_of_behaviours_with_a_memory_is_one_by_one() -> None:
    mdp = random_problem("deterministic", 1)
    logits, parts = random_logits(mdp, 2), [random_policy(mdp, seed) for seed in (3, 4)]
    batch = tuple(torch.stack(tables) for tables in zip(*parts, strict=True))
    found = centred_loss(mdp, logits, HistoryBehaviour(batch, repeat=0.4))
    each = [centred_loss(mdp, logits, HistoryBehaviour(part, repeat=0.4)).item() for part in parts]
    assert found.tolist() == pytest.approx(each, rel=1e-12)


def test_data_with_actions_that_do_not_exist_bound_nothing() -> None:
    """Their residual is infinite. Left out, the centred bound came out finite, and so did the one on the support."""
    mdp, logits = random_problem("deterministic", 1), random_logits(random_problem("deterministic", 1), 2)
    good = random_policy(mdp, 3)
    bad = tuple(torch.full_like(table, -math.log(table.shape[-1])) for table in good)
    rare = (*good[:-1], torch.tensor([[math.log1p(-1e-30), math.log(1e-30)]] * 2, dtype=torch.float64))
    for data in (bad, rare, HistoryBehaviour(bad, repeat=0.3), MixtureBehaviour((0.5, 0.5), (good, bad))):
        assert theorem2(mdp, logits, data) == theorem2_centred(mdp, logits, data) == math.inf
        assert centred_loss(mdp, logits, data) == math.inf
    with pytest.raises(InvalidInputError, match="log_mu"):
        support_problem(mdp, bad)
    never = MixtureBehaviour((1.0, 0.0), (good, bad))
    assert centred_loss(mdp, logits, never).item() == pytest.approx(centred_loss(mdp, logits, good).item(), rel=1e-12)


@pytest.mark.parametrize("distance", [1e-3, 1e-7, 1e-12])
def test_beside_the_data_s_policy_the_centred_bound_is_twice_the_regret(distance: float) -> None:
    """Optimal data and logits a little off: ``κ - 1`` is of the size of ``distance²``, which 1 would swallow."""
    half = torch.full((1, 2), 0.5, dtype=torch.float64)
    mdp = RegularizedMDP(beta=1.0, initial=torch.ones(1), reward=[torch.zeros(1, 2)], reference=[half], transitions=[])
    logits = torch.tensor([[distance, 0.0]], dtype=torch.float64)
    bound = theorem2_centred(mdp, (logits,), (half.log(),))
    assert bound.item() == pytest.approx(distance**2 / 4, rel=1e-3, abs=0)
