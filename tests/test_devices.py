"""The oracle, data, losses and minimisers on another device than the CPU: there they stay, and give what they give here.

On every machine the device is simulated (``another_device.py``), and the numbers must agree to the last digits. Where there is a GPU
the same runs on it, and the numbers must agree to rounding.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from another_device import another_device, without_a_kernel_for
from convert import plain
from drawn import as_table, p_value, parametrisation
from problems import KINDS, random_logits, random_policy, random_problem
from reference import trajectory_law
from torch import Tensor

import tbrm_theory as tt
from tbrm_theory import (
    bounds,
    conditioning,
    coverage,
    dynamic_programming,
    feature_coverage,
    fixed_points,
    occupancy,
    policy_class,
    population,
)
from tbrm_theory.behaviours import FixedDataset
from tbrm_theory.control_variate import corrected_loss
from tbrm_theory.expected_updates import ExpectedUpdate
from tbrm_theory.family_training import Plan, Point, train
from tbrm_theory.gymnasium_import import from_gymnasium
from tbrm_theory.losses import LOSSES
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.named_behaviours import BEHAVIOURS
from tbrm_theory.noise_cost import best_data_on_tree, noise_cost
from tbrm_theory.objectives import PopulationObjective, SampleObjective
from tbrm_theory.optimisers import lbfgs, least_squares_plan, levenberg_marquardt
from tbrm_theory.policy_class import largest_chi_square, largest_reach
from tbrm_theory.scores import table_scores
from tbrm_theory.statistics import CHECK_FAILURE_RATE
from tbrm_theory.training import FitConfig, History, fit
from tbrm_theory.trajectories import TrajectoryBatch, check_trajectories, sample_trajectories
from tbrm_theory.trajectory_files import read_trajectories, write_trajectories

Tables = tuple[Tensor, ...]
Computation = Callable[[RegularizedMDP, Tables, Tables, TrajectoryBatch], Any]
"""Of a problem, the logits of a policy, the logarithms of one that gives data, and trajectories, all on one device."""


@pytest.fixture(
    params=[
        "simulated",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")),
    ]
)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cuda":
        yield "cuda"
    else:
        with another_device() as name:
            yield name
        assert without_a_kernel_for("CUDA") == set()


def parts(result: Any) -> list[Tensor | float]:
    """All tensors and numbers of a result, in order: it may be a dataclass or a sequence, and may hold more of both."""
    if isinstance(result, Tensor | int | float):
        return [result]
    if is_dataclass(result):
        return parts([getattr(result, field.name) for field in fields(result)])
    return [part for each in result for part in parts(each)] if isinstance(result, tuple | list) else []


def tensors(result: Any) -> list[Tensor]:
    return [part for part in parts(result) if isinstance(part, Tensor)]


def moved(tables: Tables, device: str) -> Tables:
    return tuple(table.to(device) for table in tables)


def gradient(mdp: RegularizedMDP, logits: Tables, value: Callable[[Tables], Tensor]) -> Tables:
    leaves = tuple(
        torch.where(valid, table, 0.0).requires_grad_() for valid, table in zip(mdp.valid, logits, strict=True)
    )
    return torch.autograd.grad(value(leaves).sum(), leaves)


def policy(logits: Tables) -> Tables:
    return tuple(torch.log_softmax(table, dim=-1) for table in logits)


def oracle(mdp: RegularizedMDP, logits: Tables, log_mu: Tables, _: TrajectoryBatch) -> Any:
    solution, evaluation = tt.solve(mdp), tt.evaluate(mdp, policy(logits))
    assert solution.certified
    return [
        (solution, solution.bellman_residual, solution.duality_gap, solution.scale, evaluation),
        tt.objective(mdp, log_mu),
        tt.regret(mdp, log_mu),
        dynamic_programming.regret_by_subtraction(mdp, log_mu),
        dynamic_programming.policy_kl(mdp, log_mu, policy(logits)),
        dynamic_programming.bellman_operator(mdp, logits),
        dynamic_programming.policy_bellman_operator(mdp, log_mu, logits),
        dynamic_programming.admissible_logits(mdp, logits),
        gradient(
            mdp, logits, lambda tables: tt.regret(mdp, policy(dynamic_programming.admissible_logits(mdp, tables)))
        ),
    ]


def laws(mdp: RegularizedMDP, logits: Tables, log_mu: Tables, _: TrajectoryBatch) -> Any:
    listed = occupancy.enumerate_trajectories(mdp)
    return [
        occupancy.occupancy(mdp, log_mu),
        occupancy.log_occupancy(mdp, log_mu),
        occupancy.moment_matrix(mdp, log_mu),
        occupancy.log_moment_matrix(mdp, log_mu),
        occupancy.moment_product(mdp, log_mu, mdp.reward),
        (listed, listed.log_law(log_mu), listed.sum_along(mdp.reward)),
    ]


def population_losses(mdp: RegularizedMDP, logits: Tables, log_mu: Tables, _: TrajectoryBatch) -> Any:
    behaviours = [row.make(mdp, 0) for row in BEHAVIOURS.values()]
    return [
        [tt.population_loss(mdp, logits, behaviour, loss=loss) for behaviour in behaviours for loss in ("tbrm", "brm")],
        population.noise_floor(mdp, log_mu),
        corrected_loss(mdp, logits, log_mu),
        gradient(mdp, logits, lambda tables: tt.population_loss(mdp, tables, log_mu)),
    ]


def sample_losses(mdp: RegularizedMDP, logits: Tables, log_mu: Tables, data: TrajectoryBatch) -> Any:
    """Every loss, with whatever tables its scores may be made of."""
    value = tuple(table.logsumexp(-1) for table in logits)

    def all_losses(tables: Tables) -> Tensor:
        scores = table_scores(
            dynamic_programming.admissible_logits(mdp, tables),
            mdp.log_reference,
            mdp.reward,
            data,
            reference_first_logits=logits[0],
            frozen_first_logits=logits[0],
            frozen_logits=logits,
            behaviour_log_policy=log_mu,
            log_partition=value[0],
            baseline=value[0],
            critic=value,
            entropy=True,
        )
        groups = {True: {"group_size": 4}, False: {}}
        return torch.stack([row.function(scores, beta=mdp.beta, **groups[row.needs_group]) for row in LOSSES.values()])

    return all_losses(logits), gradient(mdp, logits, all_losses)


def coverages(mdp: RegularizedMDP, logits: Tables, log_mu: Tables, _: TrajectoryBatch) -> Any:
    other = policy(logits)
    mixture, history = (BEHAVIOURS[name].make(mdp, 0) for name in ("replay", "history-dependent"))
    features = tuple(torch.stack([table, table.square()]) for table in mdp.reward)
    with mock.patch.object(coverage, "MOST_CONDITION", 0.0), mock.patch.object(policy_class, "MOST_POLICIES", 1):
        small = random_problem("sparse", seed=1, horizon=2).to(mdp.initial.device)
        in_rationals = coverage.kappa(small, small.log_reference, BEHAVIOURS["replay"].make(small, 0))
        searched = largest_chi_square(mdp, log_mu)
    return [
        (in_rationals, searched),
        [tt.change_of_measure(mdp, other, data) for data in (log_mu, mixture, BEHAVIOURS["with-holes"].make(mdp, 0))],
        coverage.kappa_closed_form(mdp, other, log_mu),
        coverage.kappa_linear_solve(mdp, other, log_mu),
        coverage.optimal_test_function(mdp, other, log_mu),
        largest_reach(mdp),
        [largest_chi_square(mdp, data) for data in (log_mu, policy(mdp.log_reference))],
        [measure(mdp, other, history) for measure in (coverage.kappa, coverage.lemma1, coverage.c_inf)],
        feature_coverage.class_kappa(mdp, other, log_mu, features),
        feature_coverage.class_second_moment(mdp, other, log_mu, features),
        bounds.corollary4(mdp, logits),
    ]


def deterministic_bounds(mdp: RegularizedMDP, logits: Tables, log_mu: Tables, _: TrajectoryBatch) -> Any:
    return [
        bounds.theorem2(mdp, logits, log_mu),
        bounds.theorem2_centred(mdp, logits, log_mu),
        bounds.support_bound(mdp, logits, log_mu),
        bounds.path_policy(mdp, logits, torch.tensor([0.0, 0.5], dtype=torch.float64, device=mdp.initial.device)),
        noise_cost(mdp, log_mu, noise_variance=0.5),
        best_data_on_tree(tt.make("token-tree", horizon=2, vocabulary=2).to(mdp.initial.device)),
    ]


def minimisers(mdp: RegularizedMDP, logits: Tables, log_mu: Tables, data: TrajectoryBatch) -> Any:
    objectives = PopulationObjective(mdp, BEHAVIOURS["uniform"].make(mdp, 0)), SampleObjective(mdp, data)
    tabular, linear, network = (parametrisation(sort, mdp) for sort in ("tabular", "linear", "network"))
    start = tabular.parameters(logits).unsqueeze(0)
    found = [levenberg_marquardt(objective, tabular, start) for objective in objectives]
    jacobians = [tabular.jacobian(start)]
    for model in (linear, network):
        begin = 0.1 * torch.ones(1, model.size, dtype=torch.float64, device=mdp.initial.device)
        found.append(levenberg_marquardt(objectives[1], model, begin, iterations=3))
        jacobians.append(model.jacobian(begin))
    return [found, jacobians, lbfgs(objectives[0], tabular, start, iterations=5), least_squares_plan(objectives[1])]


def expected(mdp: RegularizedMDP, logits: Tables, log_mu: Tables, _: TrajectoryBatch) -> Any:
    """Updates, their derivatives, and where one rests; the curvature of a loss."""
    found: list[Any] = [conditioning.gauss_newton_matrix(mdp, logits, log_mu, loss=loss) for loss in ("tbrm", "brm")]
    for name, data in (
        *((name, [(1.0, log_mu)]) for name in ("tbrm", "brm", "reval", "dpo", "a-star-po", "dapo", "ppo")),
        ("vargrad", None),
        ("ppo", None),
        ("a-star-po", None),
    ):
        update = ExpectedUpdate(mdp, name, data)
        point = update.optimum.unsqueeze(0)
        found.append([update(point), fixed_points.jacobian(update, point)])
    return [found, fixed_points.rest(ExpectedUpdate(mdp, "tbrm", [(1.0, log_mu)]), point, steps=2)]


def on_policy(mdp: RegularizedMDP, logits: Tables, log_mu: Tables, _: TrajectoryBatch) -> Any:
    """Losses with every kind of further table, trained for two updates."""
    plan, points = Plan(updates=2, prompts=4, group_size=2, evaluations=2), [Point(0.1), Point(0.3)]
    names = ("tbrm", "tbrm-iterative", "sql-one-step-q", "pcl-multi-step", "dro", "a-star-po", "grpo", "ppo")
    return [train(mdp, name, points, [0, 1], plan) for name in names]


def files(mdp: RegularizedMDP, logits: Tables, log_mu: Tables, data: TrajectoryBatch) -> Any:
    """What is written of a problem there is the file that is written here, and what is read of it can be moved."""
    with tempfile.TemporaryDirectory() as folder:
        mdp.save(Path(folder) / "problem.json")
        write_trajectories(Path(folder) / "data.jsonl", mdp, data)
        again = RegularizedMDP.load(Path(folder) / "problem.json").to(mdp.initial.device)
        read = read_trajectories(Path(folder) / "data.jsonl", again)
        written = [list((Path(folder) / name).read_bytes()) for name in ("problem.json", "data.jsonl")]
        fixed = FixedDataset(read.batch, read.trajectory_return)
        drawn = fixed.draw(again, 5, torch.Generator(mdp.initial.device).manual_seed(0)).batch.count
        made = RegularizedMDP(
            beta=0.7, initial=mdp.initial, reward=mdp.reward, reference=mdp.reference, transitions=mdp.transitions
        )
    return [written, again.reward, again.reference, read, drawn, tt.solve(made)]


COMPUTATIONS: dict[str, tuple[Computation, tuple[str, ...]]] = {
    "oracle": (oracle, KINDS),
    "laws": (laws, KINDS),
    "population losses": (population_losses, KINDS),
    "sample losses": (sample_losses, ("dense",)),
    "coverages": (coverages, ("sparse",)),
    "bounds": (deterministic_bounds, ("deterministic",)),
    "minimisers": (minimisers, ("deterministic",)),
    "expected updates": (expected, ("deterministic",)),
    "training on-policy": (on_policy, ("sparse",)),
    "files": (files, KINDS),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPUTATIONS)
def test_what_is_computed_there_stays_there_and_is_what_is_computed_here(name: str, device: str):
    compute, kinds = COMPUTATIONS[name]
    for kind in kinds:
        mdp = random_problem(kind, seed=1)
        logits, log_mu = random_logits(mdp, 2), random_policy(mdp, 3)
        data = sample_trajectories(mdp, log_mu, 32, torch.Generator().manual_seed(4))
        here = parts(compute(mdp, logits, log_mu, data))
        found = compute(mdp.to(device), moved(logits, device), moved(log_mu, device), data.to(device))
        assert {tensor.device.type for tensor in tensors(found)} == {device}
        there = [part.cpu() if isinstance(part, Tensor) else part for part in parts(found)]
        # A GPU adds in another order.
        rtol, atol = (1e-6, 1e-9) if device == "cuda" else (0.0, 0.0)
        torch.testing.assert_close(there, here, rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_there_has_the_law_of_the_policy(kind: str, device: str):
    """Against naive enumeration; every kind of behaviour, and the same bits from the same seed."""
    mdp = random_problem(kind, seed=1)
    log_mu = random_policy(mdp, 3)
    there = mdp.to(device)

    def drawn(log_policy: Any, count: int) -> TrajectoryBatch:
        return sample_trajectories(there, log_policy, count, torch.Generator(device).manual_seed(0))

    batch = drawn(moved(log_mu, device), 5_000)
    assert batch.states.device.type == device
    assert p_value(batch, trajectory_law(plain(mdp), as_table(mdp, log_mu))) > CHECK_FAILURE_RATE
    for row in BEHAVIOURS.values():
        one, same = (row.make(there, 0).sample(there, 50, torch.Generator(device).manual_seed(5)) for _ in range(2))
        check_trajectories(there, one)
        assert {tensor.device.type for tensor in tensors(one)} == {device}
        assert all(torch.equal(*pair) for pair in zip(tensors(one), tensors(same), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "sort"), [("population", "tabular"), ("online", "linear"), ("replay", "network")])
def test_training_there_learns_and_goes_on_after_an_interruption(mode: Any, sort: str, device: str, tmp_path: Path):
    mdp = random_problem("deterministic", seed=1).to(device)
    model = parametrisation(sort, mdp)
    objective = PopulationObjective(mdp, BEHAVIOURS["uniform"].make(mdp, 0)) if mode == "population" else None
    config = FitConfig(mode, steps=20, seeds=2, batch_size=32, replay_capacity=64, evaluations=4, checkpoint_every=5)
    theta, whole = fit(mdp, model, config, objective=objective)
    assert theta.device.type == device
    assert all(end < start for end, start in zip(whole.regret[-1], whole.regret[0], strict=True))

    def stop(history: History) -> None:
        if history.step[-1] == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(mdp, model, config, objective=objective, checkpoint=tmp_path / "c", after_evaluation=stop)
    resumed_theta, resumed = fit(mdp, model, config, objective=objective, checkpoint=tmp_path / "c")
    if device == "cuda":  # adds in any order
        torch.testing.assert_close(resumed_theta, theta, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(resumed.regret, whole.regret, rtol=1e-6, atol=1e-9)
    else:
        assert torch.equal(resumed_theta, theta)
        assert resumed == whole


def test_a_reference_for_gymnasium_s_problems_may_be_anywhere(device: str):
    reference = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    found, same = (
        from_gymnasium("FrozenLake-v1", horizon=2, beta=1.0, reference=given)
        for given in (reference.to(device), reference)
    )
    torch.testing.assert_close(found.reference, same.reference, rtol=0.0, atol=0.0)


def test_the_simulated_device_refuses_what_a_gpu_refuses():
    with another_device() as name:
        there, here = torch.tensor([1.0, 2.0], device=name), torch.ones(2)
        assert there.device.type == name
        assert (there + torch.tensor(1.0)).tolist() == [2.0, 3.0]  # one number may come from the CPU
        assert (there.cpu() + here).tolist() == [2.0, 3.0]
        for mixed in (
            lambda: there + here,
            lambda: torch.where(here > 0, there, 0.0),
            lambda: here[there.long()],
            lambda: torch.stack([there, here]),
            lambda: there.index_add_(0, torch.tensor([0]), there[:1]),
            lambda: torch.rand(2, generator=torch.Generator(), device=name),
            lambda: torch.rand(2, generator=torch.Generator(name)),
            lambda: torch.stack([there.sum(), torch.tensor(1.0)]),
            lambda: torch.zeros(()).add_(there.sum()),
            lambda: there.long() @ there.long(),
        ):
            with pytest.raises(RuntimeError, match="expected"):
                mixed()
        with pytest.raises(TypeError, match="can't convert meta"):
            there.numpy()


def test_an_operation_that_a_gpu_lacks_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("another_device.OPERATIONS", {"add.Tensor", "_linalg_eigh", "where.self", "mkldnn_linear"})
    assert without_a_kernel_for("CUDA") == {"mkldnn_linear"}
