"""The tokenizer, the model and the problems of a run.

A model is read from a folder or the hub, or made from the architecture in the YAML file.

Code that comes with a model is never run (``trust_remote_code`` stays off).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.llm.run_arguments import MATH, RunArguments
from tbrm_theory.llm.tasks import Split, reasoning_gym_split
from tbrm_theory.llm.tokenizer import PRINTABLE, character_tokenizer

__all__ = ["build_dataset", "build_model", "build_tokenizer", "loading", "model_configuration", "parameter_count"]


@contextmanager
def loading(source: str | Path) -> Iterator[None]:
    """What transformers says where there is no model, which names no file, is said of ``model``."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise
        raise InvalidInputError("model", f"{source}: {' '.join(str(error).split())}") from error


def build_tokenizer(arguments: RunArguments, start: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that comes with ``start`` or ``model``, else one token for each character of ``alphabet``."""
    if source := start or arguments.model:
        with loading(source):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                source, padding_side="left", trust_remote_code=False
            )
        return tokenizer
    return character_tokenizer(arguments.alphabet or PRINTABLE)


def model_configuration(arguments: RunArguments) -> PreTrainedConfig:
    """The configuration of ``architecture``; without a vocabulary of its own it has the tokenizer's."""
    sizes = arguments.sizes
    kind = sizes.pop("model_type", None)
    if not isinstance(kind, str):
        raise InvalidInputError("architecture.model_type", "expected a name that transformers knows, such as qwen2")
    if not arguments.model:
        tokenizer = build_tokenizer(arguments)
        sizes = {"vocab_size": len(tokenizer)} | sizes
        special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
        sizes = special | sizes
    try:
        made = AutoConfig.for_model(kind, **sizes)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise InvalidInputError("architecture", " ".join(str(error).split())) from error
    if unknown := sorted(key for key in sizes if key not in type(made)().to_dict()):
        raise InvalidInputError(f"architecture.{unknown[0]}", f"{kind} has no such size")
    return made


def build_model(arguments: RunArguments, *, seed: int = 0, device: str = "cpu") -> PreTrainedModel:
    """The model: from ``model`` if that is given, else from ``architecture`` with weights drawn from ``seed``.

    On the device ``meta`` it has shapes and no numbers, always comes from ``architecture``, and needs neither memory nor network.
    """
    dtype = getattr(torch, arguments.dtype)
    if arguments.model and device != "meta":
        with loading(arguments.model):
            stored: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype, trust_remote_code=False)
        return stored.to(device)
    configuration = model_configuration(arguments)
    state = torch.Generator().manual_seed(seed).get_state()
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.random.set_rng_state(state)
        made: PreTrainedModel = AutoModelForCausalLM.from_config(configuration, dtype=dtype)
    return made


def parameter_count(model: torch.nn.Module) -> int:
    """How many numbers are trained; tied weights count once, and those that ZeRO-3 holds elsewhere count too."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters())


def build_dataset(arguments: RunArguments, *, seed: int = 0, train_problems: int | None = None) -> Split:
    """The problems to train on, drawn with ``seed``, and the held-out ones, which do not depend on it."""
    if arguments.task == MATH:
        from tbrm_theory.llm.math_data import math_split

        assert arguments.data is not None
        return math_split(
            arguments.data,
            held_out=arguments.held_out_problems,
            prompt_column=arguments.prompt_column,
            answer_column=arguments.answer_column,
            style=arguments.style,
        )
    return reasoning_gym_split(
        arguments.task,
        train=arguments.train_problems if train_problems is None else train_problems,
        held_out=arguments.held_out_problems,
        seed=seed,
        style=arguments.style,
        difficulty=arguments.options,
    )
