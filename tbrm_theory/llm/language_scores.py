"""From a language model's logits to :class:`TrajectoryScores`: a prompt is ``s_1``, a token an action.

Shapes: ``B`` rows (one prompt and one completion each), ``C`` completion positions, ``W`` words in the vocabulary. The
logits that choose the completion's tokens are those *before* each token: the first row of them stands at the last position
of the prompt, and its log-sum-exp is ``V_θ(s_1)`` ([Y] Eq. 2). A completion's end-of-sequence token is an action like the
others; what follows it is padding. Tokens that a tool wrote are no actions: the actions around them move together, and
``V_θ(s_{h+1})`` is then the value where the model speaks again.

Log-sum-exp and log-probabilities are taken in float32 at least, whatever the logits come in, a chunk of positions at a time;
the backward pass recomputes a chunk rather than keep it.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.losses import TrajectoryScores

__all__ = ["completion_scores", "position_ids", "token_scores"]

CHUNK = 4096
"""Numbers of logits in float32 held at once: this many positions times the vocabulary."""


def position_ids(attention_mask: Int[Tensor, "rows positions"]) -> Int[Tensor, "rows positions"]:
    """Each token's place in its own text, so that padding on the left shifts nothing; generation counts the same way."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def token_scores(
    logits: Float[Tensor, "rows steps words"], tokens: Int[Tensor, "rows steps"], *, chunk: int = CHUNK
) -> tuple[Float[Tensor, "rows steps"], Float[Tensor, "rows steps"]]:
    """``log π_θ(a_h|s_h)`` and ``V_θ(s_h) = logsumexp(logits)``, both ``(B, C)``, in float32 or the logits' own float64."""
    flat, chosen = logits.flatten(0, 1), tokens.flatten()
    pieces = [
        _chunk_scores(flat[start : start + chunk], chosen[start : start + chunk])
        if not (torch.is_grad_enabled() and logits.requires_grad)
        else checkpoint(
            _chunk_scores, flat[start : start + chunk], chosen[start : start + chunk], use_reentrant=False,
            preserve_rng_state=False,
        )
        for start in range(0, len(chosen), chunk)
    ]  # fmt: skip
    log_policy, value = (torch.cat(parts).view(tokens.shape) for parts in zip(*pieces, strict=True))
    return log_policy, value


def _chunk_scores(
    logits: Float[Tensor, "positions words"], tokens: Int[Tensor, " positions"]
) -> tuple[Float[Tensor, " positions"], Float[Tensor, " positions"]]:
    precise = logits if logits.dtype == torch.float64 else logits.float()
    value = precise.logsumexp(-1)
    return precise.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - value, value


def completion_scores(
    log_policy: Float[Tensor, "rows steps"],
    value: Float[Tensor, "rows steps"],
    *,
    log_reference: Float[Tensor, "rows steps"],
    actions: Bool[Tensor, "rows steps"],
    trajectory_return: Float[Tensor, " rows"],
    **per_trajectory: Any,
) -> TrajectoryScores:
    """The scores of rows whose actions are the positions where ``actions`` is True.

    Args:
        per_trajectory: further fields of :class:`TrajectoryScores`; those of shape ``(B, C)`` are moved like the rest.

    Raises:
        InvalidInputError: a row without an action.
    """
    if not bool(actions.any(-1).all()):
        row = int((~actions.any(-1)).nonzero()[0])
        raise InvalidInputError(f"actions[{row}]", "expected an action in every row, found none")
    steps = int(actions.sum(-1).max())
    # A stable sort moves the actions of a row to the front and keeps their order.
    order = (~actions).int().argsort(dim=-1, stable=True)[:, :steps]

    def moved(table: Tensor) -> Tensor:
        return table.gather(-1, order) if table.dim() == 2 else table

    mask = moved(actions)
    value, log_policy = moved(value), moved(log_policy)
    last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    trajectory_return = trajectory_return.to(value.dtype)
    return TrajectoryScores(
        log_policy=log_policy,
        log_reference=moved(log_reference).to(value.dtype),
        mask=mask,
        initial_value=value[:, 0],
        trajectory_return=trajectory_return,
        first_logit=value[:, 0] + log_policy[:, 0],
        value=value,
        reward=torch.where(last, trajectory_return.unsqueeze(-1), 0.0),  # the outcome is known with the last token
        **{name: moved(table).to(value.dtype) for name, table in per_trajectory.items()},
    )
