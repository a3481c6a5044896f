"""From tables of logits to :class:`TrajectoryScores`, and nothing of the problem beyond plain tensors.

All layers are laid side by side, so one gather reads what a batch of trajectories needs. Batch dimensions of tables and of
trajectories broadcast.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.losses import TrajectoryScores
from tbrm_theory.occupancy import flatten_tables
from tbrm_theory.shapes import PerLayerState, PerLayerStateAction, StateActionTable, StateTable
from tbrm_theory.tables import check_shapes, first_index, side_by_side
from tbrm_theory.trajectories import TrajectoryBatch

__all__ = ["pair_index", "table_scores"]


def pair_index(tables: PerLayerStateAction, trajectories: TrajectoryBatch) -> Int[Tensor, "... trajectories steps"]:
    """Position of every ``(h, s_h, a_h)`` in ``flatten_tables(tables)``.

    Raises:
        InvalidInputError: trajectories of another horizon, or an index outside its layer, padding included.
    """
    states, actions = _sizes(tables, trajectories)
    _check_indices("states", trajectories.states, states)
    _check_indices("actions", trajectories.actions, actions)
    return _starts(states * actions) + actions * trajectories.states + trajectories.actions


def _sizes(tables: PerLayerStateAction, trajectories: TrajectoryBatch) -> Int[Tensor, "2 steps"]:
    """``S_h`` and ``A_h`` of every layer."""
    steps = trajectories.states.shape[-1]
    if steps != len(tables):
        raise InvalidInputError("trajectories", f"expected {len(tables)} steps, one for each layer, found {steps}")
    return torch.tensor([table.shape[-2:] for table in tables], device=trajectories.states.device).T


def _starts(sizes: Int[Tensor, " steps"]) -> Int[Tensor, " steps"]:
    """Where each layer begins when pieces of these sizes are laid side by side."""
    return sizes.cumsum(0) - sizes


def _check_indices(field: str, index: Int[Tensor, "... trajectories steps"], sizes: Int[Tensor, " steps"]) -> None:
    """An index outside its layer would silently read another one."""
    outside = (index < 0) | (index >= sizes)
    if bool(outside.any()):
        largest = sizes.expand_as(index)[outside][0].item() - 1
        raise InvalidInputError(
            f"trajectories.{field}{first_index(outside)}",
            f"expected an index from 0 to {largest}, found {index[outside][0].item()}",
        )


def _read(
    flat: Float[Tensor, "... cells"], index: Int[Tensor, "... trajectories steps"]
) -> Float[Tensor, "... trajectories steps"]:
    """``flat[…, index]``, batch dimensions broadcast."""
    batch = torch.broadcast_shapes(flat.shape[:-1], index.shape[:-2])
    cells = index.expand(*batch, *index.shape[-2:]).flatten(-2)
    return flat.expand(*batch, flat.shape[-1]).gather(-1, cells).unflatten(-1, index.shape[-2:])


def table_scores(
    logits: PerLayerStateAction,
    log_reference: PerLayerStateAction,
    reward: PerLayerStateAction,
    trajectories: TrajectoryBatch,
    *,
    trajectory_return: Float[Tensor, "... trajectories"] | None = None,
    reference_first_logits: StateActionTable | None = None,
    frozen_first_logits: StateActionTable | None = None,
    frozen_logits: PerLayerStateAction | None = None,
    behaviour_log_policy: PerLayerStateAction | None = None,
    log_partition: StateTable | None = None,
    baseline: StateTable | None = None,
    critic: PerLayerState | None = None,
    entropy: bool = False,
) -> TrajectoryScores:
    """The scores of tabular logits on a batch of trajectories.

    Args:
        logits: one table for each layer; logits of actions with ``log_reference = -inf`` are ignored.
        log_reference, reward: tables of the same sizes; rewards in reward units.
        trajectory_return: observed returns when they are not the sum of the rewards (noisy ones).
        reference_first_logits: first-layer logits of the reference model, for ReVal.
        frozen_first_logits: first-layer logits at frozen parameters, for the iterative variant; taken from ``frozen_logits``
            if these are given alone.
        frozen_logits: logits at frozen parameters of every layer, for soft Q-learning.
        behaviour_log_policy: the policy that sampled, for ratios.
        log_partition, baseline: one number for each state of the first layer.
        critic: values of every state, of a model of their own.
        entropy: whether to compute ``H(π_θ(·|s_h))`` too.

    Raises:
        InvalidInputError: tables or trajectories that do not fit together, or an index outside its layer.
    """
    check_shapes(logits, log_reference, "logits")
    check_shapes(reward, log_reference, "reward")
    pairs = pair_index(log_reference, trajectories)
    states = _starts(_sizes(log_reference, trajectories)[0]) + trajectories.states
    first_states, first_pairs = states[..., :1], pairs[..., :1]

    def admitted(table: StateActionTable, log: StateActionTable) -> StateActionTable:
        return torch.where(log > -torch.inf, table, -torch.inf)

    def values(tables: PerLayerStateAction, name: str) -> list[StateTable]:
        check_shapes(tables, log_reference, name)
        return [torch.logsumexp(admitted(q, log), dim=-1) for q, log in zip(tables, log_reference, strict=True)]

    q = [admitted(table, log) for table, log in zip(logits, log_reference, strict=True)]
    v = [torch.logsumexp(table, dim=-1) for table in q]
    log_policy = tuple(table - value.unsqueeze(-1) for table, value in zip(q, v, strict=True))
    value = _read(side_by_side(v), states)
    step_reward = _read(flatten_tables(reward), pairs)
    if trajectory_return is None:
        trajectory_return = torch.where(trajectories.mask, step_reward, 0.0).sum(-1)
    if frozen_first_logits is None and frozen_logits is not None:
        frozen_first_logits = frozen_logits[0]
    if behaviour_log_policy is not None:
        check_shapes(behaviour_log_policy, log_reference, "behaviour_log_policy")
    if critic is not None:
        _check_states(critic, log_reference, "critic")

    def initial_value(table: StateActionTable | None) -> Float[Tensor, "... trajectories"] | None:
        if table is None:
            return None
        return _read(torch.logsumexp(admitted(table, log_reference[0]), dim=-1), first_states).squeeze(-1)

    def of_first_state(table: StateTable | None, name: str) -> Float[Tensor, "... trajectories"] | None:
        if table is None:
            return None
        _check_states((table,), log_reference[:1], name)
        return _read(table, first_states).squeeze(-1)

    return TrajectoryScores(
        log_policy=_read(flatten_tables(log_policy), pairs),
        log_reference=_read(flatten_tables(log_reference), pairs),
        mask=trajectories.mask,
        initial_value=value[..., 0],
        trajectory_return=trajectory_return,
        first_logit=_read(q[0].flatten(-2), first_pairs).squeeze(-1),
        value=value,
        reward=step_reward,
        reference_initial_value=initial_value(reference_first_logits),
        frozen_initial_value=initial_value(frozen_first_logits),
        behaviour_log_policy=None
        if behaviour_log_policy is None
        else _read(flatten_tables(behaviour_log_policy), pairs),
        log_partition=of_first_state(log_partition, "log_partition"),
        baseline=of_first_state(baseline, "baseline"),
        critic=None if critic is None else _read(side_by_side(critic), states),
        frozen_value=None
        if frozen_logits is None
        else _read(side_by_side(values(frozen_logits, "frozen_logits")), states),
        entropy=_read(side_by_side([_entropy(table) for table in log_policy]), states) if entropy else None,
    )


def _check_states(tables: PerLayerState, log_reference: PerLayerStateAction, name: str) -> None:
    """One number for each state of each layer; a table of one state would be read as another layer's."""
    if len(tables) != len(log_reference):
        raise InvalidInputError(name, f"expected {len(log_reference)} layers, found {len(tables)}")
    for h, (table, pattern) in enumerate(zip(tables, log_reference, strict=True)):
        if table.shape[-1:] != pattern.shape[-2:-1]:
            expected, found = pattern.shape[-2], tuple(table.shape)
            raise InvalidInputError(
                f"{name}[{h}]", f"expected shape (…, {expected}), one for each state, found {found}"
            )


def _entropy(log_policy: StateActionTable) -> StateTable:
    """``-Σ_a π log π`` with ``0 log 0 = 0``, and no gradient from actions that do not exist."""
    exists = log_policy > -torch.inf
    finite = torch.where(exists, log_policy, 0.0)
    return -torch.where(exists, finite.exp() * finite, 0.0).sum(-1)
