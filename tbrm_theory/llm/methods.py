"""The methods of an LLM run: which trainer, which configuration, and how many models each holds.

GRPO, RLOO, A*-PO and supervised fine-tuning are TRL's own trainers, untouched. The residual losses and PPO run on this project's
trainer, which calls :mod:`tbrm_theory.losses`.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tbrm_theory.errors import InvalidInputError

__all__ = ["METHODS", "Method", "configuration_class", "trainer_class"]


@dataclass(frozen=True)
class Method:
    """Where a method's classes are found (``module:name``), the settings that make it this method, and the models it holds."""

    trainer: str
    configuration: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    reference: bool = True
    critic: bool = False
    rollouts: bool = True


_TRAINER, _CONFIG = "tbrm_theory.llm.trainer:TBRMTrainer", "tbrm_theory.llm.config:TBRMConfig"

METHODS: dict[str, Method] = {
    "tbrm": Method(_TRAINER, _CONFIG, {"loss": "tbrm"}),
    "reval": Method(_TRAINER, _CONFIG, {"loss": "reval"}),
    "brm": Method(_TRAINER, _CONFIG, {"loss": "brm"}),
    "ppo": Method("tbrm_theory.llm.critic:PPOTrainer", _CONFIG, {"loss": "ppo"}, critic=True),
    # As published: TRL 1.16 by default averages over the tokens of the batch, as DAPO does, and multiplies the KL term by the ratio.
    "grpo": Method("trl:GRPOTrainer", "trl:GRPOConfig", {"loss_type": "grpo", "use_bias_correction_kl": False}),
    "rloo": Method("trl:RLOOTrainer", "trl:RLOOConfig"),
    "a2po": Method("trl.experimental.a2po:A2POTrainer", "trl.experimental.a2po:A2POConfig"),
    "sft": Method("trl:SFTTrainer", "trl:SFTConfig", reference=False, rollouts=False),
}


def trainer_class(method: str) -> type[Any]:
    """The trainer of a method."""
    return _found(_method(method).trainer)


def configuration_class(method: str) -> type[Any]:
    """The configuration of a method's trainer, a kind of ``transformers.TrainingArguments``."""
    return _found(_method(method).configuration)


def _method(name: str) -> Method:
    if name not in METHODS:
        raise InvalidInputError("method", f"expected one of {', '.join(METHODS)}; found {name}")
    return METHODS[name]


def _found(path: str) -> type[Any]:
    module, _, name = path.partition(":")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
        found: type[Any] = getattr(importlib.import_module(module), name)
    return found
