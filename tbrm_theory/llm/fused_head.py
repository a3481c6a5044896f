"""Log-probabilities by TRL's fused head, which never holds the logits, with the one row of true logits that TBRM needs besides.

``V_θ(s_1)`` must come from the logits that the model itself would return: some architectures cap or scale them after the head
(Gemma 2, Granite). So the class's own forward runs on the backbone's output at that position, and whatever it does is done.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, no_type_check

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from tbrm_theory.llm.language_scores import TokenScores

__all__ = ["add_start_logits", "fused_token_scores"]


@no_type_check  # wrappers rebuild it from a dictionary in the place of its first field
@dataclass
class StartOutput(FusedCausalLMOutput):
    """TRL's output and the logits of one position: a declared field, for wrappers rebuild outputs from declared fields."""

    start_logits: Tensor | None = None


def add_start_logits(model: PreTrainedModel, *, entropy: bool = False) -> None:
    """After this ``model(…, labels=…, fused_lm_head=True, start_position=p)`` returns a :class:`StartOutput` at temperature 1."""
    add_fused_lm_head(model, temperature=1.0, outputs=("log_probs", "entropy") if entropy else ("log_probs",))
    fused = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, start_position: int | None = None, **kwargs: Any) -> Any:
        if start_position is None:
            return fused(*args, **kwargs)
        kept: list[Any] = []
        hook = self.base_model.register_forward_hook(lambda module, given, out: kept.append(out))
        try:
            output = fused(*args, **kwargs)
        finally:
            hook.remove()
        start = dict(kept[0]) | {"last_hidden_state": kept[0].last_hidden_state[:, start_position, None]}
        with _backbone_says(self.base_model, type(kept[0])(**start)):
            own = type(self).forward(self, input_ids=kwargs["input_ids"], use_cache=False)
        return StartOutput(**output, start_logits=own.logits[:, 0])

    model.forward = types.MethodType(forward, model)


@contextmanager
def _backbone_says(backbone: Any, output: Any) -> Iterator[None]:
    """The backbone returns this and computes nothing."""
    own = backbone.__dict__.get("forward")
    backbone.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if own is None:
            del backbone.forward
        else:
            backbone.forward = own


def fused_token_scores(model: Any, tokens: Tensor, attention_mask: Tensor, steps: int, **inputs: Any) -> TokenScores:
    """What :func:`~tbrm_theory.llm.language_scores.token_scores` says of the last ``steps`` tokens, values after ``s_1`` left out."""
    labels = tokens.masked_fill(attention_mask == 0, -100)
    labels[:, :-steps] = -100
    output = model(
        input_ids=tokens,
        attention_mask=attention_mask,
        labels=labels,
        fused_lm_head=True,
        start_position=tokens.shape[1] - steps - 1,
        **inputs,
    )
    start = output.start_logits
    initial_value = (start if start.dtype == torch.float64 else start.float()).logsumexp(-1)
    entropy = None if output.entropy is None else output.entropy[:, -steps:]
    return TokenScores(output.log_probs[:, -steps:], initial_value, None, entropy)
