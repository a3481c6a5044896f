"""Random problems of every kind of transition, small enough to enumerate."""

from __future__ import annotations

import torch
from torch import Tensor

from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.transitions import DenseTransition, DeterministicTransition, SparseTransition, Transition

KINDS = ("deterministic", "sparse", "dense")


def random_problem(kind: str, seed: int, *, horizon: int = 3, beta: float = 0.7) -> RegularizedMDP:
    """Ragged layers, two starts of which one may have probability 0, and one action that does not exist."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    states = [2, 3, 2, 4, 3][:horizon]
    actions = [2, 3, 2, 2, 3][:horizon]
    reference = [rand(s, a) + 0.1 for s, a in zip(states, actions, strict=True)]
    reference[-1][0, -1] = 0.0
    transitions: list[Transition] = []
    for s, a, t in zip(states, actions, states[1:], strict=False):
        if kind == "deterministic":
            transitions.append(DeterministicTransition(torch.randint(t, (s, a), generator=generator), t))
        elif kind == "sparse":
            weight = rand(s, a, 2)
            successors = torch.randint(t, (s, a, 2), generator=generator)
            transitions.append(SparseTransition(successors, weight / weight.sum(-1, keepdim=True), t))
        else:
            weight = rand(s, a, t)
            transitions.append(DenseTransition(weight / weight.sum(-1, keepdim=True)))
    start = torch.tensor([0.4, 0.6] if seed % 2 else [1.0, 0.0], dtype=torch.float64)
    return RegularizedMDP(
        beta=beta,
        initial=start,
        reward=[4 * rand(*table.shape) - 2 for table in reference],
        reference=[table / table.sum(-1, keepdim=True) for table in reference],
        transitions=transitions,
    )


def random_logits(mdp: RegularizedMDP, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.where(valid, torch.randn(valid.shape, generator=generator, dtype=torch.float64), -torch.inf)
        for valid in mdp.valid
    )


def random_policy(mdp: RegularizedMDP, seed: int) -> tuple[Tensor, ...]:
    return tuple(torch.log_softmax(table, dim=-1) for table in random_logits(mdp, seed))
