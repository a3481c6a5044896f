"""From the package's problems to those of ``reference.py``, so that the two can be asked the same question."""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor

from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.transitions import Transition
from tests.reference import PlainMDP


def plain(mdp: RegularizedMDP, *index: int) -> PlainMDP:
    """One problem as nested lists, in the file's own shape; ``index`` picks it from a batch.

    Repeated successors are added up and those of probability 0 left out.
    """
    batch = mdp.batch_shape
    if len(index) != len(batch):
        raise ValueError(f"expected {len(batch)} indices into a batch of shape {tuple(batch)}, found {index}")

    def pick(table: Tensor, own: int) -> Tensor:
        return table.expand((*batch, *table.shape[table.dim() - own :]))[index]

    def successors(h: int, kernel: Transition) -> list[list[dict[int, float]]]:
        target, probability = (pick(table, 3) for table in kernel.edges())
        return [
            [_accumulated(*pair) for pair in zip(*rows, strict=True)]
            for rows in zip(mdp.rows(h, target), mdp.rows(h, probability), strict=True)
        ]

    return PlainMDP(
        beta=pick(mdp.beta, 0).item(),
        initial=pick(mdp.initial, 1).tolist(),
        reward=[mdp.rows(h, pick(table, 2)) for h, table in enumerate(mdp.reward)],
        reference=[mdp.rows(h, pick(table, 2)) for h, table in enumerate(mdp.reference)],
        successors=[successors(h, kernel) for h, kernel in enumerate(mdp.transitions)],
    )


def _accumulated(targets: list[int], probabilities: list[float]) -> dict[int, float]:
    total: dict[int, float] = defaultdict(float)
    for target, probability in zip(targets, probabilities, strict=True):
        if probability > 0:
            total[target] += probability
    return dict(total)
