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

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.losses import TrajectoryScores

__all__ = ["TokenScores", "completion_scores", "position_ids", "token_scores"]

CHUNK = 2**26
"""Logits held in float32 at once: 256 MiB for each table made of them."""


class TokenScores(NamedTuple):
    """What the logits say at the completion's positions."""

    log_policy: Tensor
    """``log π_θ(a_h|s_h)`` of the token there, ``(B, C)``."""
    initial_value: Tensor
    """``V_θ(s_1)``, at the last position of the prompt, ``(B,)``."""
    value: Tensor | None
    """``V_θ(s_h) = logsumexp`` of the logits that chose the token, ``(B, C)``; None where they were never all at hand."""
    entropy: Tensor | None
    """``H(π_θ(·|s_h))`` in nats, ``(B, C)``; None if not asked for."""

    def rows(self, index: Tensor) -> TokenScores:
        """Those rows."""
        value, entropy = (None if table is None else table[index] for table in (self.value, self.entropy))
        return TokenScores(self.log_policy[index], self.initial_value[index], value, entropy)


def position_ids(attention_mask: Int[Tensor, "rows positions"]) -> Int[Tensor, "rows positions"]:
    """Each token's place in its own text, so that padding on the left shifts nothing; generation counts the same way."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def token_scores(
    logits: Float[Tensor, "rows steps words"],
    tokens: Int[Tensor, "rows steps"],
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk: int = CHUNK,
) -> TokenScores:
    """The scores of ``tokens`` under ``softmax(logits / temperature)``, in float32 or the logits' own float64.

    Args:
        chunk: logits handled at once; it changes the memory, not the result.

    Raises:
        InvalidInputError: no tokens.
    """
    if tokens.numel() == 0:
        raise InvalidInputError("tokens", f"expected at least one, found shape {tuple(tokens.shape)}")
    words = logits.shape[-1]
    rows = min(len(tokens), max(1, chunk // (tokens.shape[1] * words)))
    steps = max(1, chunk // (rows * words))  # all of them, if several rows fit
    scores: Callable[..., tuple[Tensor, ...]] = _chunk_scores
    if torch.is_grad_enabled() and logits.requires_grad:
        scores = partial(checkpoint, _chunk_scores, use_reentrant=False, preserve_rng_state=False)

    def block_scores(logits: Tensor, tokens: Tensor) -> list[Tensor]:
        pieces = zip(logits.split(steps, dim=1), tokens.split(steps, dim=1), strict=True)
        parts = [scores(*piece, temperature, entropy) for piece in pieces]
        return [torch.cat(tables, dim=1) for tables in zip(*parts, strict=True)]

    # Flattened, logits would be copied; and the gradients of slices would each be padded to the size of all.
    blocks = [block_scores(*block) for block in zip(logits.split(rows), tokens.split(rows), strict=True)]
    tables = [torch.cat(parts) for parts in zip(*blocks, strict=True)]
    return TokenScores(tables[0], tables[1][:, 0], tables[1], tables[2] if entropy else None)


def _chunk_scores(
    logits: Float[Tensor, "rows steps words"], tokens: Int[Tensor, "rows steps"], temperature: float, entropy: bool
) -> tuple[Tensor, ...]:
    logits = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    value = logits.logsumexp(-1)
    log_policy = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - value
    if not entropy:
        return log_policy, value
    mean_logit = (logits.softmax(-1) * torch.where(logits > -torch.inf, logits, 0.0)).sum(-1)
    return log_policy, value, value - mean_logit


def completion_scores(
    tokens: TokenScores,
    *,
    log_reference: Float[Tensor, "rows steps"],
    actions: Bool[Tensor, "rows steps"],
    trajectory_return: Float[Tensor, " rows"],
    **further: Tensor,
) -> TrajectoryScores:
    """The scores of rows whose actions are the positions where ``actions`` is True.

    Args:
        further: other fields of :class:`TrajectoryScores`, ``(B,)`` or ``(B, C)``; the latter move with the actions.

    Raises:
        InvalidInputError: a row without an action, or one whose first position is none: its start's value is not where it acts.
    """
    empty = ~actions.any(-1)
    if bool(empty.any()):
        raise InvalidInputError(f"actions[{int(empty.nonzero()[0])}]", "expected an action in every row, found none")
    late = ~actions[:, 0]
    if bool(late.any()):
        raise InvalidInputError(
            f"actions[{int(late.nonzero()[0])}, 0]", "expected an action first, found a tool's token"
        )
    # A stable sort brings the actions of a row to the front and keeps their order.
    order = (~actions).int().argsort(dim=-1, stable=True)[:, : int(actions.sum(-1).max())]
    dtype = tokens.log_policy.dtype

    def moved(table: Tensor) -> Tensor:
        return table.gather(-1, order) if table.dim() == 2 else table

    mask, log_policy = moved(actions), moved(tokens.log_policy)
    last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    trajectory_return = trajectory_return.to(dtype)
    return TrajectoryScores(
        log_policy=log_policy,
        log_reference=moved(log_reference).to(dtype),
        mask=mask,
        initial_value=tokens.initial_value,
        trajectory_return=trajectory_return,
        first_logit=tokens.initial_value + log_policy[:, 0],
        value=None if tokens.value is None else moved(tokens.value),
        reward=torch.where(last, trajectory_return.unsqueeze(-1), 0.0),  # the outcome is known with the last token
        entropy=None if tokens.entropy is None else moved(tokens.entropy),
        **{name: moved(table).to(dtype) for name, table in further.items()},
    )
