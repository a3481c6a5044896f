"""Small problems to draw from, and counts of what was drawn against a naive law."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import torch
from reference import Law, Table, Trajectory
from torch import Tensor

from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.parametrisations import Linear, Network, Parametrisation, Tabular, linear_features
from tbrm_theory.shapes import PerLayerStateAction
from tbrm_theory.statistics import chi_square_p_value
from tbrm_theory.trajectories import TrajectoryBatch
from tbrm_theory.transitions import DenseTransition, DeterministicTransition, SparseTransition, Transition

KINDS = ("deterministic", "sparse", "dense")


def random_problem(kind: str, seed: int = 0) -> RegularizedMDP:
    """Four ragged layers, three first states of which the second is impossible, and actions that do not exist.

    A sparse kernel lists one successor twice, and one with probability 0.
    """
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    sizes = [(3, 2), (2, 3), (4, 2), (2, 2)]
    reference = [rand(*size) + 0.1 for size in sizes]
    reference[0][2, 0] = reference[1][0, 2] = reference[1][1, 0] = reference[2][3, 1] = 0.0
    transitions: list[Transition] = []
    for (s, a), (t, _) in pairwise(sizes):
        target = torch.randint(t, (s, a, 4), generator=generator)
        weight = rand(s, a, 4 if kind == "sparse" else t)
        if kind == "deterministic":
            transitions.append(DeterministicTransition(target[..., 0], t))
        elif kind == "sparse":
            target[..., 1], weight[..., 2] = target[..., 0], 0.0
            transitions.append(SparseTransition(target, weight / weight.sum(-1, keepdim=True), t))
        else:
            weight[..., 0] *= weight[..., 0] > 0.5
            transitions.append(DenseTransition(weight / weight.sum(-1, keepdim=True)))
    return RegularizedMDP(
        beta=0.5,
        initial=torch.tensor([0.3, 0.0, 0.7], dtype=torch.float64),
        reward=[rand(*size) for size in sizes],
        reference=[table / table.sum(-1, keepdim=True) for table in reference],
        transitions=transitions,
    )


def random_policy(mdp: RegularizedMDP, seed: int, *batch: int) -> PerLayerStateAction:
    """Any policies with full support, with leading dimensions."""
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(*batch, *valid.shape, generator=generator, dtype=torch.float64) for valid in mdp.valid]
    return tuple(
        torch.log_softmax(torch.where(valid, table, -torch.inf), dim=-1)
        for valid, table in zip(mdp.valid, logits, strict=True)
    )


def short_answers(*, slip: float = 0.0, horizon: int = 3) -> RegularizedMDP:
    """Say 1 and go on, or 0 and end, which pays; state 0 is the end, state 1 goes on. A 1 is lost with probability ``slip``.

    The first layer has both states too, so a response may be over before it begins.
    """
    reference = torch.tensor([[1.0, 0.0], [0.25, 0.75]], dtype=torch.float64)
    rewards = [torch.tensor([[0.0, 0.0], [h + 1.0, 0.1 * h]], dtype=torch.float64) for h in range(horizon)]
    kernel: Transition = DeterministicTransition(torch.tensor([[0, 0], [0, 1]]), 2)
    if slip > 0:
        probability = torch.tensor([[[1, 0], [1, 0]], [[1, 0], [slip, 1 - slip]]], dtype=torch.float64)
        kernel = SparseTransition(torch.tensor([[[0, 1]] * 2] * 2), probability, 2)
    return RegularizedMDP(
        beta=0.5,
        initial=torch.tensor([0.25, 0.75], dtype=torch.float64),
        reward=rewards,
        reference=[reference] * horizon,
        transitions=[kernel] * (horizon - 1),
    )


def as_table(mdp: RegularizedMDP, log_policy: PerLayerStateAction) -> Table:
    """A policy as the nested lists of probabilities that ``reference.py`` takes."""
    return [mdp.rows(h, log.exp()) for h, log in enumerate(log_policy)]


def as_tuples(states: Tensor, actions: Tensor) -> list[Trajectory]:
    """Trajectories ``(N, H)`` as ``reference.py`` writes them."""
    return [tuple(zip(s, a, strict=True)) for s, a in zip(states.tolist(), actions.tolist(), strict=True)]


def p_value(batch: TrajectoryBatch, law: Law) -> float:
    """Of the counts of a batch ``(N, H)`` under a law; 0 if something impossible was drawn."""
    counts = Counter(as_tuples(batch.states, batch.actions))
    if not set(counts) <= set(law):
        return 0.0
    return chi_square_p_value([counts[trajectory] for trajectory in law], [float(p) for p in law.values()])


def parametrisation(sort: str, mdp: RegularizedMDP) -> Parametrisation:
    """A small one: ``tabular``, ``linear`` or ``network``, the same at every call."""

    def generator() -> torch.Generator:
        return torch.Generator(mdp.initial.device).manual_seed(0)

    match sort:
        case "tabular":
            return Tabular(mdp)
        case "linear":
            return Linear(mdp, linear_features(mdp, 5, generator(), realisable=True))
        case _:
            return Network(mdp, generator(), features=3, width=4)
