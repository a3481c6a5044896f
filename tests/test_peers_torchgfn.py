"""Trajectory balance and VarGrad against torchgfn's own classes, on sampled trajectories of its hyper-grid (a DAG, states merge).

The target is a law on trajectories: ``log π_ref`` is torchgfn's backward policy, ``r/β`` its log-reward, and ``log Z`` its own.
torchgfn computes in single precision, so its digits are what equality is asked to.
"""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tbrm_theory.losses import TrajectoryScores, trajectory_balance_loss, trajectory_balance_residual, vargrad_loss

BETA = 0.7
HEIGHT, COUNT = 3, 24
SINGLE = 1e-5  # relative; torchgfn's sums are in float32


class _AnyType:
    """Stands for ``torchtyping.TensorType``, which is used in annotations alone."""

    def __class_getitem__(cls, item: object) -> type[_AnyType]:
        return cls


@pytest.fixture(scope="module")
def gfn() -> Iterator[types.SimpleNamespace]:
    """torchgfn without torchtyping: that does not import under this torch, and annotates only."""
    stub: Any = types.ModuleType("torchtyping")
    stub.TensorType = _AnyType
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setitem(sys.modules, "torchtyping", stub)
        pytest.importorskip("gfn", reason="torchgfn is not installed")
        import gfn.gflownet
        import gfn.gym
        import gfn.modules

        yield types.SimpleNamespace(
            grid=gfn.gym.HyperGrid,
            balance=gfn.gflownet.TBGFlowNet,
            variance=gfn.gflownet.LogPartitionVarianceGFlowNet,
            estimator=gfn.modules.DiscretePolicyEstimator,
        )


class Logits(torch.nn.Module):
    """A table of logits, read by the number of the state."""

    def __init__(self, states: int, actions: int, generator: torch.Generator) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(states, actions, generator=generator))
        self.input_dim = 1

    def forward(self, index: Tensor) -> Tensor:
        return self.table[index.long().squeeze(-1)]


@dataclass(frozen=True)
class Sample:
    """torchgfn's objects, and what its trajectories consist of."""

    env: Any
    forward: Logits
    backward: Logits
    forward_estimator: Any
    backward_estimator: Any
    trajectories: Any


@pytest.fixture
def sample(gfn: types.SimpleNamespace) -> Sample:
    env = gfn.grid(ndim=2, height=HEIGHT, preprocessor_name="Enum")
    generator = torch.Generator().manual_seed(0)
    forward, backward = Logits(HEIGHT**2, 3, generator), Logits(HEIGHT**2, 2, generator)
    forward_estimator = gfn.estimator(forward, n_actions=3, preprocessor=env.preprocessor)
    backward_estimator = gfn.estimator(backward, n_actions=3, preprocessor=env.preprocessor, is_backward=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sampler = gfn.balance(forward_estimator, backward_estimator)
        trajectories = sampler.sample_trajectories(env, n_samples=COUNT)
    return Sample(env, forward, backward, forward_estimator, backward_estimator, trajectories)


def scores_of(sample: Sample, forward: Tensor, backward: Tensor, log_partition: Tensor) -> TrajectoryScores:
    """By loops over the cells visited: moves are actions 0 and 1 of a coordinate that can still grow, action 2 is the exit."""
    states, actions = sample.trajectories.states.tensor, sample.trajectories.actions.tensor.squeeze(-1)
    steps = actions.shape[0]
    log_policy, log_reference, mask, log_reward = [], [], [], []
    for i in range(COUNT):
        ours, theirs = [], []
        for h in range(steps):
            cell, action = states[h, i].tolist(), int(actions[h, i])
            if action < 0 or min(cell) < 0:
                break
            allowed = torch.tensor([cell[0] < HEIGHT - 1, cell[1] < HEIGHT - 1, True])
            row = forward[HEIGHT * cell[0] + cell[1]]
            ours.append(torch.where(allowed, row, -torch.inf).log_softmax(-1)[action])
            if action == 2:
                theirs.append(torch.zeros((), dtype=torch.float64))  # the exit is undone in one way
                log_reward.append(reward(cell).log())
                break
            cell[action] += 1
            allowed = torch.tensor([cell[0] > 0, cell[1] > 0])
            row = backward[HEIGHT * cell[0] + cell[1]]
            theirs.append(torch.where(allowed, row, -torch.inf).log_softmax(-1)[action])
        padding = [torch.zeros((), dtype=torch.float64)] * (steps - len(ours))
        log_policy.append(torch.stack(ours + padding))
        log_reference.append(torch.stack(theirs + padding))
        mask.append([h < len(ours) for h in range(steps)])
    return TrajectoryScores(
        log_policy=torch.stack(log_policy),
        log_reference=torch.stack(log_reference),
        mask=torch.tensor(mask),
        initial_value=torch.zeros(COUNT, dtype=torch.float64),
        trajectory_return=BETA * torch.stack(log_reward),
        log_partition=log_partition.expand(COUNT),
    )


def reward(cell: list[int]) -> Tensor:
    """The hyper-grid's, at its defaults: 0.1, 0.5 more outside the middle half, 2 more in a ring that height 3 does not have."""
    distance = [abs(x / (HEIGHT - 1) - 0.5) for x in cell]
    value = 0.1 + 0.5 * all(d > 0.25 for d in distance) + 2.0 * all(0.3 < d < 0.4 for d in distance)
    return torch.tensor(value, dtype=torch.float64)


def compare(sample: Sample, peer: Any, loss: Any, *, log_partition: float, factor: float) -> None:
    """Values, and gradients in both tables and in ``log Z``."""
    leaves = [module.table.detach().double().requires_grad_() for module in (sample.forward, sample.backward)]
    own_partition = torch.tensor(log_partition, dtype=torch.float64, requires_grad=True)
    scores = scores_of(sample, leaves[0], leaves[1], own_partition)
    assert len(set(scores.mask.sum(-1).tolist())) >= 2
    own = factor * loss(scores)
    their_parameters = [sample.forward.table, sample.backward.table]
    if loss is balance:
        their_parameters.append(peer.logZ)
    theirs = peer.loss(sample.env, sample.trajectories, recalculate_all_logprobs=True)
    assert own.item() == pytest.approx(theirs.item(), rel=SINGLE)
    expected = torch.autograd.grad(theirs, their_parameters)
    found = torch.autograd.grad(own, [*leaves, own_partition], allow_unused=True)
    for one, other in zip(found, expected, strict=False):
        assert one is not None
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other.double(), rtol=SINGLE, atol=SINGLE * other.abs().max().item())


def balance(scores: TrajectoryScores) -> Tensor:
    return trajectory_balance_loss(scores, beta=BETA)


def variance(scores: TrajectoryScores) -> Tensor:
    return vargrad_loss(scores, beta=BETA, group_size=COUNT)


def test_trajectory_balance_is_torchgfns(gfn: types.SimpleNamespace, sample: Sample) -> None:
    peer = gfn.balance(sample.forward_estimator, sample.backward_estimator, logZ=0.8)
    compare(sample, peer, balance, log_partition=0.8, factor=1.0)


def test_vargrad_is_torchgfns_up_to_the_divisor(gfn: types.SimpleNamespace, sample: Sample) -> None:
    """torchgfn divides by n where VarGrad has the unbiased n - 1: a factor, 23/24 here."""
    peer = gfn.variance(sample.forward_estimator, sample.backward_estimator)
    compare(sample, peer, variance, log_partition=0.8, factor=(COUNT - 1) / COUNT)
    own = variance(scores_of(sample, sample.forward.table.double(), sample.backward.table.double(), torch.zeros(())))
    theirs = peer.loss(sample.env, sample.trajectories, recalculate_all_logprobs=True)
    assert abs(own.item() / theirs.item() - 1) > 0.03  # and so the two differ


def test_the_least_trajectory_balance_over_log_z_is_torchgfns_variance(
    gfn: types.SimpleNamespace, sample: Sample
) -> None:
    """I6 across the two code bases: with ``log Z = -mean g`` our trajectory balance is their log-partition variance."""
    peer = gfn.variance(sample.forward_estimator, sample.backward_estimator)
    tables = [module.table.detach().double() for module in (sample.forward, sample.backward)]
    free = trajectory_balance_residual(
        scores_of(sample, tables[0], tables[1], torch.zeros((), dtype=torch.float64)), beta=BETA
    )
    least = balance(scores_of(sample, tables[0], tables[1], -free.mean()))
    theirs = peer.loss(sample.env, sample.trajectories, recalculate_all_logprobs=True)
    assert least.item() == pytest.approx(theirs.item(), rel=SINGLE)
