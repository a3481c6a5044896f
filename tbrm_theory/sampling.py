"""Drawing trajectories: cumulative probabilities inverted by binary search, for a block of trajectories at once.

One layer follows another; within a layer everything is a handful of operations on a whole block, small enough for its
intermediates to stay in the cache, and no table of trajectories × actions ever exists. An outcome of probability 0 is never drawn,
however the cumulative sums round. A seed gives the same bits at any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tbrm_theory.dynamic_programming import check_policy
from tbrm_theory.endings import finished
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.occupancy import occupancy
from tbrm_theory.shapes import PerLayerStateAction
from tbrm_theory.tables import first_index, per_distinct_layer
from tbrm_theory.transitions import DeterministicTransition, Transition

__all__ = ["ActionChoice", "CumulativeRows", "PolicyDraw", "check_can_act", "check_draw", "policy_batch", "roll_out"]

_BLOCK_ON_CPU = 1 << 14  # fits the cache, and torch keeps so few elements on one thread, without barriers
_LARGEST_BLOCK = 1 << 20

ActionChoice: TypeAlias = Callable[[int, slice, Tensor, Tensor | None], Tensor]
"""``choose(h, block, state, previous_action)`` gives the actions in layer ``h`` of a block of trajectories, which is a slice of all
of them with batch dimensions flattened. There is no previous action in the first layer."""


class CumulativeRows:
    """Draws from the rows of a table of probabilities.

    Outcome ``a`` is drawn when ``c[a-1] <= u < c[a]``. Adding a probability of 0 leaves the sum exactly as it is, and the sum up to
    the last outcome of positive probability is made infinite, so that none but these can be drawn.
    """

    def __init__(self, probability: Float[Tensor, "... outcomes"]) -> None:
        self.outcomes = probability.shape[-1]
        by_outcome = probability.reshape(-1, self.outcomes).T
        columns = by_outcome.clone(memory_format=torch.contiguous_format)
        positive = columns > 0
        for a in range(1, self.outcomes):  # one after another, so that the sums are the same on any device
            columns[a] += columns[a - 1]
        later = torch.zeros_like(positive[0])  # whether a later outcome has positive probability
        for a in range(self.outcomes - 1, -1, -1):
            columns[a].masked_fill_(~later, torch.inf)
            later |= positive[a]
        self._cumulative = columns.T.flatten()

    def draw(self, row: Int64[Tensor, " draws"], generator: torch.Generator) -> Int64[Tensor, " draws"]:
        """One outcome from each of the given rows, as its position in the flattened table, ``row · outcomes + outcome``."""
        position = row * self.outcomes
        if self.outcomes == 1:
            return position
        uniform = torch.rand(row.shape, generator=generator, dtype=torch.float64, device=row.device)
        candidates = self.outcomes  # those not ruled out yet, from `position` on
        while candidates > 1:
            half = candidates // 2
            beyond = self._cumulative[half - 1 :].index_select(0, position) <= uniform
            position.add_(beyond, alpha=half)
            candidates -= half
        return position


class PolicyDraw:
    """The :data:`ActionChoice` that draws from policies, each trajectory from one of them.

    Args:
        log_policies: tables ``log π``, whose leading dimensions broadcast to ``batch``.
        choice: which policy acts in each trajectory, ``(…, N)``; may be left out for a single policy.

    Raises:
        InvalidInputError: a malformed policy, or one that takes non-existent actions in a state that it reaches.
    """

    def __init__(
        self,
        mdp: RegularizedMDP,
        log_policies: Sequence[PerLayerStateAction],
        batch: torch.Size,
        count: int,
        generator: torch.Generator,
        choice: Int64[Tensor, "... trajectories"] | None = None,
    ) -> None:
        for i, log_policy in enumerate(log_policies):
            check_can_act(mdp, log_policy, "log_policy" if choice is None else f"log_policies[{i}]")

        def stacked(*logs: Tensor) -> CumulativeRows:
            tables = torch.stack([log.detach().expand(*batch, *log.shape[-2:]) for log in logs])
            return CumulativeRows(tables.exp())

        self._generator = generator
        self._rows = per_distinct_layer(stacked, *log_policies)
        self._states = [table.shape[-2] for table in mdp.reference]
        self._table: Tensor | None = None  # which of all tables, component by component, is a trajectory's
        if len(log_policies) * batch.numel() > 1:
            element = torch.arange(batch.numel(), device=mdp.initial.device).unsqueeze(-1)
            chosen = 0 if choice is None else choice.expand(*batch, count).reshape(-1, count)
            self._table = (chosen * batch.numel() + element).expand(-1, count).flatten()

    def __call__(self, h: int, block: slice, state: Tensor, previous_action: Tensor | None) -> Tensor:
        row = state if self._table is None else self._table[block] * self._states[h] + state
        return self._rows[h].draw(row, self._generator) - row * self._rows[h].outcomes


def roll_out(
    mdp: RegularizedMDP, batch: torch.Size, count: int, choose: ActionChoice, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """States, actions and mask, each ``(…, N, H)``, of ``count`` trajectories for each batch element.

    Raises:
        InvalidInputError: a batch of problems, ``count`` below 1, or a generator of another device.
    """
    check_draw(mdp, count, generator)
    device, total = mdp.initial.device, batch.numel() * count
    states = torch.empty(total, mdp.horizon, dtype=torch.int64, device=device)
    actions, mask = torch.empty_like(states), torch.ones_like(states, dtype=torch.bool)
    first = CumulativeRows(mdp.initial)
    move = per_distinct_layer(_move, mdp.transitions)
    goes_on = [~over for over in finished(mdp)]
    block_size = _BLOCK_ON_CPU if device.type == "cpu" else _LARGEST_BLOCK
    for start in range(0, total, block_size):
        block = slice(start, min(start + block_size, total))
        state = first.draw(torch.zeros(block.stop - start, dtype=torch.int64, device=device), generator)
        action: Tensor | None = None
        for h in range(mdp.horizon):
            if h > 0:
                mask[block, h] = goes_on[h].index_select(0, state)
            action = choose(h, block, state, action)
            states[block, h], actions[block, h] = state, action
            if h < mdp.horizon - 1:
                state = move[h](state * mdp.reference[h].shape[-1] + action, generator)
    shape = (*batch, count, mdp.horizon)
    return states.reshape(shape), actions.reshape(shape), mask.reshape(shape)


def _move(kernel: Transition) -> Callable[[Tensor, torch.Generator], Tensor]:
    """Successors of pairs given by their position ``s · A + a``."""
    next_state, probability = kernel.edges()
    successor = next_state.flatten()
    if isinstance(kernel, DeterministicTransition):
        return lambda pair, generator: successor.index_select(0, pair)
    rows = CumulativeRows(probability)
    return lambda pair, generator: successor.index_select(0, rows.draw(pair, generator))


# -- checks --------------------------------------------------------------------------------------------------------


def policy_batch(log_policies: Sequence[PerLayerStateAction]) -> torch.Size:
    """The batch shape of policies, to which the leading dimensions of all their tables broadcast.

    Raises:
        InvalidInputError: leading dimensions that do not broadcast.
    """
    shapes = [table.shape[:-2] for log_policy in log_policies for table in log_policy]
    try:
        return torch.Size(torch.broadcast_shapes(*shapes))
    except RuntimeError as error:
        found = ", ".join(str(tuple(shape)) for shape in dict.fromkeys(shapes))
        raise InvalidInputError("log_policy", f"expected batch dimensions that broadcast, found {found}") from error


def check_draw(mdp: RegularizedMDP, count: int, generator: torch.Generator) -> None:
    """Refuse a batch of problems, a ``count`` below 1, and a generator of another device.

    Raises:
        InvalidInputError: one of them.
    """
    if mdp.batch_shape:
        raise InvalidInputError("mdp", f"expected one problem, found a batch of shape {tuple(mdp.batch_shape)}")
    if count < 1:
        raise InvalidInputError("count", f"expected at least 1 trajectory, found {count}")
    if generator.device.type != mdp.initial.device.type:
        expected = f"expected one on {mdp.initial.device.type}, as the problem"
        raise InvalidInputError("generator", f"{expected}, found one on {generator.device.type}")


def check_can_act(
    mdp: RegularizedMDP, log_policy: PerLayerStateAction, where: str, *, visitor: PerLayerStateAction | None = None
) -> None:
    """Refuse a malformed policy and one that takes non-existent actions: no trajectory has them.

    Args:
        visitor: the policy whose states count, if others than the policy's own are visited.

    Raises:
        InvalidInputError: names the table and the pair, where its state is reached.
    """
    check_policy(mdp, log_policy, where)
    outside = [(log > -torch.inf) & ~valid for log, valid in zip(log_policy, mdp.valid, strict=True)]
    if not any(bool(table.any()) for table in outside):
        return
    for h, (mass, table) in enumerate(zip(occupancy(mdp, visitor or log_policy).state, outside, strict=True)):
        bad = table & (mass > 0).unsqueeze(-1)
        if bool(bad.any()):
            raise InvalidInputError(
                f"{where}[{h}]{first_index(bad)}",
                "expected -inf, since this action does not exist in a state reached",
            )
