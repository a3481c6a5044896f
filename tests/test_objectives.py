"""Population and sample objectives: losses and moment matrices against exact enumeration and against each other."""

from __future__ import annotations

import math
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

from tbrm_theory.behaviours import Behaviour, HistoryBehaviour, MarkovBehaviour, MixtureBehaviour
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.families import make
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.objectives import Objective, PopulationObjective, SampleObjective
from tbrm_theory.occupancy import flatten_tables
from tbrm_theory.population import residual_terms
from tbrm_theory.trajectories import TrajectoryBatch, sample_trajectories
from tests import reference as rf
from tests.convert import plain
from tests.drawn import KINDS, as_table, as_tuples, random_policy, random_problem, short_answers

CLOSE: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-14}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_loss = pytest.mark.parametrize("loss", ["tbrm", "brm"])


def draw_logits(mdp: RegularizedMDP, *batch: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*batch, *valid.shape, generator=generator, dtype=torch.float64) for valid in mdp.valid)


def behaviours(mdp: RegularizedMDP) -> dict[str, tuple[Behaviour, rf.Law]]:
    mu, nu = random_policy(mdp, 1), random_policy(mdp, 2)
    problem = plain(mdp)
    parts = [(0.3, as_table(mdp, mu)), (0.7, as_table(mdp, nu))]
    return {
        "markov": (MarkovBehaviour(mu), rf.trajectory_law(problem, as_table(mdp, mu))),
        "mixture": (MixtureBehaviour((0.3, 0.7), (mu, nu)), rf.mixture_law(problem, parts)),
    }


def exact_moments(mdp: RegularizedMDP, law: rf.Law) -> Tensor:
    """``M = E[φφᵀ]`` over all pairs in the order of the flat tables, from rational arithmetic."""
    sizes = [table.shape for table in mdp.reference]
    pairs = [(h, s, a) for h, (states, actions) in enumerate(sizes) for s in range(states) for a in range(actions)]
    _, matrix = rf.moments(law, pairs)
    return torch.tensor([[float(entry) for entry in row] for row in matrix], dtype=torch.float64)


def check_moments(objective: Objective, expected: Tensor) -> None:
    """The matrix, its diagonal and its products, the last two for a batch of vectors too."""
    torch.testing.assert_close(objective.moment_matrix(), expected, **CLOSE)
    torch.testing.assert_close(objective.pair_mass(), expected.diagonal(), **CLOSE)
    vectors = torch.randn(2, 3, len(expected), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(objective.moment_product(vectors), vectors @ expected, **CLOSE)
    torch.testing.assert_close(objective.moment_product(vectors[1, 2]), vectors[1, 2] @ expected, **CLOSE)


@every_kind
@pytest.mark.parametrize("sort", ["markov", "mixture"])
def test_moments_of_behaviour_are_the_enumerated_ones(kind: str, sort: str) -> None:
    mdp = random_problem(kind)
    behaviour, law = behaviours(mdp)[sort]
    expected = exact_moments(mdp, law)
    check_moments(PopulationObjective(mdp, behaviour), expected)
    check_moments(SampleObjective.enumerated(mdp, behaviour), expected)


@every_loss
@every_kind
@pytest.mark.parametrize("sort", ["markov", "mixture"])
def test_listing_all_trajectories_is_the_population(kind: str, sort: str, loss: str) -> None:
    mdp = random_problem(kind)
    behaviour, _ = behaviours(mdp)[sort]
    logits = draw_logits(mdp, 4)
    population = PopulationObjective(mdp, behaviour).loss(logits, loss)
    assert population.shape == (4,)
    torch.testing.assert_close(SampleObjective.enumerated(mdp, behaviour).loss(logits, loss), population, **CLOSE)


@every_loss
def test_history_dependent_behaviour_can_be_listed(loss: str) -> None:
    mdp = random_problem("dense")
    behaviour = HistoryBehaviour(random_policy(mdp, 1), 0.6)
    objective = SampleObjective.enumerated(mdp, behaviour)
    logits = draw_logits(mdp)
    expected = PopulationObjective(mdp, MarkovBehaviour(behaviour.log_policy)).loss(logits, loss)
    assert objective.loss(logits, loss).item() != pytest.approx(expected.item(), rel=1e-3)
    law = dict(
        zip(
            as_tuples(objective.trajectories.states, objective.trajectories.actions),
            objective.trajectory_weights.tolist(),
            strict=True,
        )
    )
    check_moments(objective, exact_moments(mdp, law))
    reference = {"tbrm": rf.tbrm_loss, "brm": rf.brm_loss}[loss]
    table = [mdp.rows(h, layer) for h, layer in enumerate(logits)]
    assert objective.loss(logits, loss).item() == pytest.approx(reference(plain(mdp), table, law), rel=1e-12)


@every_kind
def test_a_sample_is_its_empirical_law(kind: str) -> None:
    """Repeated trajectories count as often as they occur; given weights take the place of 1/N."""
    mdp = random_problem(kind)
    batch = sample_trajectories(mdp, mdp.log_reference, 40, torch.Generator().manual_seed(0))
    listed = as_tuples(batch.states, batch.actions)
    assert len(set(listed)) < len(listed)
    weights = torch.rand(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = weights / weights.sum()
    problem, logits = plain(mdp), draw_logits(mdp)
    table = [mdp.rows(h, layer) for h, layer in enumerate(logits)]
    for given, each in ((None, [1 / 40] * 40), (weights, weights.tolist())):
        objective = SampleObjective(mdp, batch, given)
        law: rf.Law = {}
        for trajectory, weight in zip(listed, each, strict=True):
            law[trajectory] = law.get(trajectory, 0.0) + weight
        check_moments(objective, exact_moments(mdp, law))
        assert objective.loss(logits).item() == pytest.approx(rf.tbrm_loss(problem, table, law), rel=1e-12)
        assert objective.loss(logits, "brm").item() == pytest.approx(rf.brm_loss(problem, table, law), rel=1e-12)


def test_observed_returns_move_the_residual_by_the_noise() -> None:
    """f with the return y is f with the exact one, less (y − r)/β; BRM has rewards per step and does not see y."""
    mdp = random_problem("sparse")
    batch = sample_trajectories(mdp, mdp.log_reference, 30, torch.Generator().manual_seed(0))
    exact = SampleObjective(mdp, batch)
    noise = torch.randn(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noisy = SampleObjective(mdp, batch, observed_return=exact.returns + noise)
    logits, problem = draw_logits(mdp), plain(mdp)
    table = [mdp.rows(h, layer) for h, layer in enumerate(logits)]
    residuals = [
        rf.residual(problem, table, trajectory) - xi / mdp.beta.item()
        for trajectory, xi in zip(as_tuples(batch.states, batch.actions), noise.tolist(), strict=True)
    ]
    assert noisy.loss(logits).item() == pytest.approx(math.fsum(f**2 for f in residuals) / 30, rel=1e-12)
    assert torch.equal(noisy.loss(logits, "brm"), exact.loss(logits, "brm"))
    assert torch.equal(noisy.returns, exact.returns + noise)


def test_padding_is_no_data() -> None:
    """Steps after the end have no features; TBRM's loss does not notice whether they are cut off."""
    mdp = short_answers()
    batch = sample_trajectories(mdp, mdp.log_reference, 60, torch.Generator().manual_seed(0))
    whole = TrajectoryBatch(batch.states, batch.actions, torch.ones_like(batch.mask))
    assert not batch.mask.all()
    cut, uncut = SampleObjective(mdp, batch), SampleObjective(mdp, whole)
    logits = draw_logits(mdp)
    torch.testing.assert_close(cut.loss(logits), uncut.loss(logits), **CLOSE)
    assert cut.features.sum() == batch.mask.sum()
    matrix = cut.moment_matrix()
    check_moments(cut, matrix)
    after_the_end = torch.cat(
        [torch.zeros(4, dtype=torch.bool), *[torch.tensor([True, True, False, False])] * (mdp.horizon - 1)]
    )  # state 0 is the end; in the first layer it is not padding
    assert not matrix[after_the_end].any()
    torch.testing.assert_close(
        matrix[~after_the_end][:, ~after_the_end], uncut.moment_matrix()[~after_the_end][:, ~after_the_end], **CLOSE
    )
    assert uncut.pair_mass()[after_the_end].any()


def test_the_quadratic_form_of_the_moments_is_the_loss() -> None:
    """E f² = uᵀ M u for f = φᵀ u, whatever the data."""
    mdp = random_problem("sparse")
    logits = draw_logits(mdp)
    u = flatten_tables(residual_terms(mdp, logits))
    batch = sample_trajectories(mdp, mdp.log_reference, 30, torch.Generator().manual_seed(0))
    objectives: list[Objective] = [SampleObjective(mdp, batch)]
    objectives += [PopulationObjective(mdp, behaviour) for behaviour, _ in behaviours(mdp).values()]
    for objective in objectives:
        torch.testing.assert_close(u @ objective.moment_product(u), objective.loss(logits), rtol=1e-11, atol=0.0)


# -- errors --------------------------------------------------------------------------------------------------------------


def test_a_population_needs_a_mixture_of_markov_policies() -> None:
    mdp = random_problem("dense")
    with pytest.raises(InvalidInputError, match=r"^behaviour: expected a Markov policy or a mixture"):
        PopulationObjective(mdp, HistoryBehaviour(mdp.log_reference, 0.5))


def test_behaviour_without_any_finite_loss_is_refused() -> None:
    mdp = random_problem("dense")
    impossible = tuple(torch.zeros_like(log).log_softmax(-1) for log in mdp.log_reference)
    for behaviour in (
        MarkovBehaviour(impossible),
        MixtureBehaviour((0.5, 0.5), (mdp.log_reference, impossible)),
    ):
        with pytest.raises(InvalidInputError, match=r"^behaviour: expected actions that exist"):
            PopulationObjective(mdp, behaviour)
        with pytest.raises(InvalidInputError, match=r"^weights: expected probabilities that sum to 1"):
            SampleObjective.enumerated(mdp, behaviour)


def test_batches_of_problems_and_behaviours_are_refused() -> None:
    mdp = random_problem("dense")
    with pytest.raises(InvalidInputError, match=r"^behaviour: expected one problem and one behaviour, found \(3,\)"):
        PopulationObjective(mdp, MarkovBehaviour(random_policy(mdp, 0, 3)))
    many = make("dense-random", horizon=2, batch=2)
    with pytest.raises(InvalidInputError, match=r"^behaviour: expected one problem and one behaviour, found \(2,\)"):
        PopulationObjective(many, MarkovBehaviour(many.log_reference))
    batch = sample_trajectories(mdp, mdp.log_reference, 5, torch.Generator().manual_seed(0))
    seeds = TrajectoryBatch(*(table.expand(2, -1, -1) for table in (batch.states, batch.actions, batch.mask)))
    with pytest.raises(InvalidInputError, match=r"^trajectories: expected shape \(trajectories, steps\)"):
        SampleObjective(mdp, seeds)


def test_bad_samples_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the package's own checks must do
    mdp = random_problem("dense")
    batch = sample_trajectories(mdp, mdp.log_reference, 5, torch.Generator().manual_seed(0))
    impossible = TrajectoryBatch(batch.states, torch.full_like(batch.actions, 7), batch.mask)
    with pytest.raises(InvalidInputError, match=r"^trajectories\[0\]\.actions\[0\]: expected an action"):
        SampleObjective(mdp, impossible)
    vector = torch.full((5,), 0.2, dtype=torch.float64)
    for field, bad, message in (
        ("weights", vector[:4], r"weights: expected shape \(5,\)"),
        ("weights", vector.unsqueeze(-1), r"weights: expected shape \(5,\)"),
        ("weights", 2 * vector, r"weights: expected probabilities that sum to 1"),
        ("weights", vector * math.nan, r"weights\[0\]: expected a finite number"),
        ("observed_return", vector[:1], r"observed_return: expected shape \(5,\)"),
        ("observed_return", vector * math.inf, r"observed_return\[0\]: expected a finite number"),
    ):
        with pytest.raises(InvalidInputError, match=rf"^{message}"):
            SampleObjective(mdp, batch, **{field: bad})


def test_an_unknown_loss_is_refused() -> None:
    mdp = random_problem("dense")
    batch = sample_trajectories(mdp, mdp.log_reference, 5, torch.Generator().manual_seed(0))
    for objective in (SampleObjective(mdp, batch), PopulationObjective(mdp, MarkovBehaviour(mdp.log_reference))):
        with pytest.raises(InvalidInputError, match=r"^loss: expected one of tbrm, brm, found 'ppo'"):
            objective.loss(mdp.reward, "ppo")
