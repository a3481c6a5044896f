"""From tables of logits to :class:`TrajectoryScores`, and nothing of the problem beyond plain tensors.

All layers are laid side by side, so one gather reads what a batch of trajectories of any horizon needs.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tbrm_theory.losses import TrajectoryScores
from tbrm_theory.occupancy import flatten_tables
from tbrm_theory.shapes import PerLayerState, PerLayerStateAction, StateActionTable
from tbrm_theory.tables import side_by_side
from tbrm_theory.trajectories import TrajectoryBatch

__all__ = ["pair_index", "table_scores"]


def pair_index(tables: PerLayerStateAction, trajectories: TrajectoryBatch) -> Int[Tensor, "... trajectories steps"]:
    """Position of every ``(h, s_h, a_h)`` in ``flatten_tables(tables)``."""
    sizes = [table.shape[-2:] for table in tables]
    device = trajectories.states.device
    start = torch.tensor([0] + [size.numel() for size in sizes[:-1]], device=device).cumsum(0)
    width = torch.tensor([size[1] for size in sizes], device=device)
    return start + width * trajectories.states + trajectories.actions


def _state_index(tables: PerLayerState, trajectories: TrajectoryBatch) -> Int[Tensor, "... trajectories steps"]:
    sizes = [0] + [table.shape[-1] for table in tables[:-1]]
    return torch.tensor(sizes, device=trajectories.states.device).cumsum(0) + trajectories.states


def _read(flat: Float[Tensor, "... cells"], index: Int[Tensor, "... trajectories steps"]) -> Tensor:
    """``flat[…, index]``, batch dimensions broadcast."""
    if index.dim() == 2:
        return flat[..., index]
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
) -> TrajectoryScores:
    """The scores of tabular logits on a batch of trajectories.

    Args:
        logits: one table for each layer; logits of actions with ``log_reference = -inf`` are ignored.
        log_reference, reward: tables of the same sizes; rewards in reward units.
        trajectory_return: observed returns when they are not the sum of the rewards (noisy ones).
        reference_first_logits: first-layer logits of the reference model, for ReVal.
        frozen_first_logits: first-layer logits at frozen parameters, for the iterative variant.
    """
    q = tuple(
        torch.where(log > -torch.inf, table, -torch.inf) for table, log in zip(logits, log_reference, strict=True)
    )
    v = tuple(torch.logsumexp(table, dim=-1) for table in q)
    log_policy = tuple(table - value.unsqueeze(-1) for table, value in zip(q, v, strict=True))
    pairs, first_states = pair_index(log_reference, trajectories), trajectories.states[..., :1]
    value = _read(side_by_side(v), _state_index(v, trajectories))
    step_reward = _read(flatten_tables(reward), pairs)
    if trajectory_return is None:
        trajectory_return = torch.where(trajectories.mask, step_reward, 0.0).sum(-1)

    def initial_value(table: StateActionTable | None, reference: StateActionTable) -> Tensor | None:
        if table is None:
            return None
        masked = torch.where(reference > -torch.inf, table, -torch.inf)
        return _read(torch.logsumexp(masked, dim=-1), first_states).squeeze(-1)

    return TrajectoryScores(
        log_policy=_read(flatten_tables(log_policy), pairs),
        log_reference=_read(flatten_tables(log_reference), pairs),
        mask=trajectories.mask,
        initial_value=value[..., 0],
        trajectory_return=trajectory_return,
        first_logit=_read(q[0].flatten(-2), pairs[..., :1]).squeeze(-1),
        value=value,
        reward=step_reward,
        reference_initial_value=initial_value(reference_first_logits, log_reference[0]),
        frozen_initial_value=initial_value(frozen_first_logits, log_reference[0]),
    )
