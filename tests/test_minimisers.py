"""TBRM reaches the exact optimum from arbitrary off-policy data (C1, C2, I14), and fails where theory.md says so (X3)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import scipy.optimize
import scipy.sparse.linalg
import torch
from problems import random_logits, random_policy, random_problem

import tbrm_theory as tt
from tbrm_theory import optimisers
from tbrm_theory.behaviours import MarkovBehaviour, MixtureBehaviour
from tbrm_theory.dynamic_programming import solve
from tbrm_theory.objectives import PopulationObjective, SampleObjective
from tbrm_theory.occupancy import enumerate_trajectories
from tbrm_theory.optimisers import lbfgs, least_squares_plan, levenberg_marquardt
from tbrm_theory.parametrisations import Tabular
from tbrm_theory.training import FitConfig, exact_regret, fit
from tbrm_theory.trajectories import TrajectoryBatch


@pytest.mark.parametrize("dense_limit", [3000, 0])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_gauss_newton_reaches_the_optimum_off_policy(
    seed: int, dense_limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C1, C2: random full-support Markov data, four random starts; factorised and by conjugate gradients."""
    monkeypatch.setattr(optimisers, "DENSE_LIMIT", dense_limit)
    mdp = random_problem("deterministic", seed)
    tabular = Tabular(mdp)
    start = tabular.initial(4, torch.Generator().manual_seed(seed))
    objective = PopulationObjective(mdp, MarkovBehaviour(random_policy(mdp, seed)))
    before = exact_regret(mdp, tabular.logits(start), solve(mdp))
    minimum = levenberg_marquardt(objective, tabular, start)
    after = exact_regret(mdp, tabular.logits(minimum.theta), solve(mdp))
    assert bool((before > 1e-3).all())
    assert bool((minimum.loss < 1e-20).all())
    assert bool((after < 1e-10).all())


@pytest.mark.parametrize("loss", ["tbrm", "brm"])
def test_lbfgs_reaches_the_optimum_by_either_loss(loss: str) -> None:
    mdp = random_problem("deterministic", 1)
    tabular = Tabular(mdp, loss=loss)
    start = tabular.initial(2, torch.Generator().manual_seed(0))
    objective = PopulationObjective(mdp, MarkovBehaviour(random_policy(mdp, 5)))
    minimum = lbfgs(objective, tabular, start, loss=loss)
    assert torch.allclose(minimum.loss, objective.loss(tabular.logits(minimum.theta), loss), rtol=1e-6, atol=0.0)
    assert bool(minimum.converged.all())
    assert bool((exact_regret(mdp, tabular.logits(minimum.theta), solve(mdp)) < 1e-10).all())
    assert not bool(lbfgs(objective, tabular, start, loss=loss, iterations=3).converged.any())


def test_lbfgs_that_ran_out_of_evaluations_has_not_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    """SciPy has two limits; at that on evaluations, which line searches use up, the iterations are fewer than theirs."""
    minimise = scipy.optimize.minimize

    def few_evaluations(*arguments: Any, options: dict[str, Any], **others: Any) -> Any:
        return minimise(*arguments, options=options | {"maxfun": 3}, **others)

    monkeypatch.setattr(scipy.optimize, "minimize", few_evaluations)
    mdp = random_problem("deterministic", 1)
    tabular = Tabular(mdp)
    objective = PopulationObjective(mdp, MarkovBehaviour(random_policy(mdp, 5)))
    found = lbfgs(objective, tabular, tabular.initial(1, torch.Generator().manual_seed(0)), iterations=50)
    assert found.iterations < 50
    assert not bool(found.converged.any())


def test_least_squares_plan_is_the_optimum_on_covering_data_and_the_minimum_on_noisy() -> None:
    """I14."""
    mdp = random_problem("deterministic", 3)
    objective = SampleObjective.enumerated(mdp, MarkovBehaviour(random_policy(mdp, 1)))
    plan = least_squares_plan(objective)
    assert exact_regret(mdp, plan, solve(mdp)).item() < 1e-12
    noise = torch.randn(len(objective.returns), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noisy = dataclasses.replace(objective, observed_return=objective.returns + noise)
    tabular = Tabular(mdp)
    found = levenberg_marquardt(noisy, tabular, tabular.initial(3, torch.Generator().manual_seed(1))).loss
    assert noisy.loss(least_squares_plan(noisy)).item() > 1e-3
    assert torch.allclose(found, noisy.loss(least_squares_plan(noisy)).expand(3), rtol=1e-7)


def test_uncovered_actions_give_zero_loss_at_a_wrong_policy() -> None:
    """X3: data that never take one action say nothing about it."""
    mdp = random_problem("deterministic", 1)
    logits = list(random_logits(mdp, 0))
    logits[0] = logits[0].clone()
    logits[0][:, 1] = -torch.inf
    holes = MarkovBehaviour(tuple(torch.log_softmax(table, dim=-1) for table in logits))
    tabular = Tabular(mdp)
    start = tabular.initial(4, torch.Generator().manual_seed(0), scale=3.0)
    minimum = levenberg_marquardt(PopulationObjective(mdp, holes), tabular, start)
    assert bool((minimum.loss < 1e-20).all())
    assert bool((exact_regret(mdp, tabular.logits(minimum.theta), solve(mdp)) > 1e-3).all())


def test_full_support_mixture_still_identifies_the_optimum() -> None:
    """X1: only the bound fails there, not the method."""
    mdp = random_problem("deterministic", 1)
    replay = MixtureBehaviour((0.5, 0.5), (random_policy(mdp, 1), random_policy(mdp, 2)))
    tabular = Tabular(mdp)
    start = tabular.initial(3, torch.Generator().manual_seed(0))
    minimum = levenberg_marquardt(PopulationObjective(mdp, replay), tabular, start)
    assert bool((exact_regret(mdp, tabular.logits(minimum.theta), solve(mdp)) < 1e-10).all())


@pytest.mark.parametrize("mode", ["population", "offline", "online", "replay"])
@pytest.mark.parametrize("loss", ["tbrm", "brm"])
def test_adam_lowers_the_regret_in_every_mode(mode: str, loss: str) -> None:
    mdp = random_problem("deterministic", 1)
    objective = {
        "population": PopulationObjective(mdp, MarkovBehaviour(mdp.log_reference)),
        "offline": SampleObjective.enumerated(mdp, MarkovBehaviour(mdp.log_reference)),
    }.get(mode)
    config = FitConfig(mode=mode, loss=loss, steps=150, learning_rate=0.1, seeds=3, replay_capacity=300, evaluations=2)  # type: ignore[arg-type]
    _, history = fit(mdp, Tabular(mdp, loss=loss), config, objective=objective)
    assert max(history.regret[-1]) < 0.1 * min(history.regret[0])


@pytest.mark.parametrize("mode", ["population", "replay"])
def test_killed_run_resumes_to_the_same_bits(mode: str, tmp_path: Path) -> None:
    mdp = random_problem("deterministic", 1)
    objective = PopulationObjective(mdp, MarkovBehaviour(mdp.log_reference))
    config = FitConfig(mode=mode, steps=60, seeds=2, checkpoint_every=20, evaluations=6)  # type: ignore[arg-type]
    whole, history = fit(mdp, Tabular(mdp), config, objective=objective)

    class Killed(Exception):
        pass

    def kill(so_far: object) -> None:
        if history.step[4] in getattr(so_far, "step"):  # noqa: B009
            raise Killed

    path = tmp_path / "run.safetensors"
    with pytest.raises(Killed):
        fit(mdp, Tabular(mdp), config, objective=objective, checkpoint=path, after_evaluation=kill)
    resumed, again = fit(mdp, Tabular(mdp), config, objective=objective, checkpoint=path)
    assert torch.equal(whole, resumed)
    assert again == history
    with pytest.raises(tt.InvalidInputError, match="learning_rate"):
        fit(mdp, Tabular(mdp), dataclasses.replace(config, learning_rate=1.0), objective=objective, checkpoint=path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(tt.InvalidInputError, match="not a checkpoint"):
        fit(mdp, Tabular(mdp), config, objective=objective, checkpoint=path)


def test_a_checkpoint_of_a_problem_of_another_size_is_refused(tmp_path: Path) -> None:
    """One parameter for each seed would be broadcast over all of them."""
    path, config = tmp_path / "run.safetensors", FitConfig(mode="online", steps=2, seeds=2, evaluations=1)
    bandit = tt.make("one-state", horizon=1, actions=1)
    assert Tabular(bandit).size == 1
    fit(bandit, Tabular(bandit), config, checkpoint=path)
    mdp = random_problem("deterministic", 1)
    with pytest.raises(tt.InvalidInputError, match=r"expected parameters of shape \(2, \d+\), found \(2, 1\)"):
        fit(mdp, Tabular(mdp), config, checkpoint=path)


@pytest.mark.parametrize(
    ("field", "value"), [("mode", "off-line"), ("loss", "ppo"), ("learning_rate", float("inf")), ("learning_rate", 0.0)]
)
def test_settings_that_mean_nothing_are_refused(field: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mode misspelt would have trained on-policy."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the package's own checks must do
    with pytest.raises(tt.InvalidInputError, match=rf"^{field}: expected "):
        FitConfig(**{field: value})


def test_a_fit_that_does_not_converge_is_no_minimiser(monkeypatch: pytest.MonkeyPatch) -> None:
    mdp = random_problem("deterministic", 1)
    listed = enumerate_trajectories(mdp)
    mask = torch.ones_like(listed.states, dtype=torch.bool)
    objective = SampleObjective(mdp, TrajectoryBatch(listed.states, listed.actions, mask))
    whole = scipy.sparse.linalg.lsmr
    monkeypatch.setattr(scipy.sparse.linalg, "lsmr", lambda *a, **options: whole(*a, **(options | {"maxiter": 1})))
    with pytest.raises(tt.InvalidInputError, match="objective: expected data on which the fit converges"):
        least_squares_plan(objective)
