"""Tiny language models, a tokenizer and data sets made in code, and what a test needs to watch a trainer at work.

``naive_scores`` reads one row of ids by definition, without padding, batching or chunks: the other side of most equalities.
"""

from __future__ import annotations

import copy
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "CI": "1"}

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tbrm_theory.llm.language_scores import TokenScores
from tbrm_theory.llm.trainer import TBRMConfig, TBRMTrainer
from tbrm_theory.losses import TrajectoryScores

WORDS = ["<pad>", "<eos>", "<stop>", *"abcdefghi"]
PAD, EOS, STOP = 0, 1, 2

# What TRL, transformers and torch say of settings that are theirs.
WARNINGS = [
    "ignore::UserWarning",
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
]
language_model_test = [
    pytest.mark.usefixtures("own_randomness"),
    *(pytest.mark.filterwarnings(warning) for warning in WARNINGS),
]


@pytest.fixture
def own_randomness() -> Iterator[None]:
    """Trainers seed and draw from global generators; what they do there ends with the test."""
    torch_state, python_state = torch.random.get_rng_state(), random.getstate()
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
    torch.manual_seed(0)
    yield
    torch.random.set_rng_state(torch_state)
    random.setstate(python_state)
    np.random.set_state(numpy_state)  # noqa: NPY002


def tokenizer(*, pad: str = "<pad>") -> PreTrainedTokenizerFast:
    """One letter, one token."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<stop>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("<[a-z]+>|."), "isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=pad, eos_token="<eos>", unk_token="<stop>", padding_side="left"
    )


_ARCHITECTURES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    "gpt2": (GPT2Config, GPT2LMHeadModel),
}


def language_model(architecture: str = "llama", *, seed: int = 0, scale: float = 8.0, **options: Any) -> Any:
    """Hidden size 16, one layer, twelve words; ``scale`` times the usual weights, so that its distributions are not flat."""
    config, model = _ARCHITECTURES[architecture]
    names: dict[str, Any] = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD, "vocab_size": len(WORDS)}
    if architecture == "gpt2":
        names |= {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    else:
        names |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        names |= {"num_key_value_heads": 1, "max_position_embeddings": 32, "head_dim": 8}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = model(config(**names | {"initializer_range": 0.02 * scale} | options))
    return made


def prompts(number: int = 8) -> Dataset:
    """Of different lengths."""
    texts = ["a", "bcd", "ea", "fghib", "ci", "dddd", "g", "hab"]
    return Dataset.from_dict({"prompt": [texts[i % 8] for i in range(number)]})


def letters(completions: Sequence[str], **unused: Any) -> list[float]:
    """A reward that varies: the share of vowels."""
    return [sum(letter in "aei" for letter in text) / (1 + len(text)) for text in completions]


def settings(folder: Path, **options: Any) -> TBRMConfig:
    usual: dict[str, Any] = {
        "output_dir": str(folder),
        "beta": 0.5,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "max_completion_length": 5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "shuffle_dataset": False,
    }
    return TBRMConfig(**usual | options)


def trainer(
    folder: Path,
    model: Any = None,
    *,
    reward: Callable[..., Any] = letters,
    data: Dataset | None = None,
    words: PreTrainedTokenizerFast | None = None,
    kind: type[TBRMTrainer] = TBRMTrainer,
    trainer_options: dict[str, Any] | None = None,
    **options: Any,
) -> TBRMTrainer:
    return kind(
        language_model() if model is None else model,
        reward,
        settings(folder, **options),
        prompts() if data is None else data,
        processing_class=tokenizer() if words is None else words,
        **trainer_options or {},
    )


class Watched(TBRMTrainer):
    """Keeps what passed through: sampled ids, rows, scores, the losses' values, and the weights that each was made with."""

    current_gradient_accumulation_steps = 1  # the training loop sets it; a call from outside is a step of its own

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.inputs: list[dict[str, Tensor]] = []
        self.scores: list[TrajectoryScores] = []
        self.values: list[Tensor] = []
        self.losses: list[Tensor] = []
        self.policies: list[dict[str, Tensor]] = []
        self.samplers: list[dict[str, Tensor]] = []
        self.sampled: list[list[int]] = []
        self.forwards: list[str] = []
        super().__init__(*args, **kwargs)

    def _loss(self, scores: TrajectoryScores) -> Tensor:
        value = super()._loss(scores)
        self.scores.append(scores)
        self.values.append(value)
        return value

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        self.inputs.append({name: table.clone() for name, table in inputs.items()})
        self.policies.append(copy.deepcopy(self.model.state_dict()))
        before = len(self.scores)
        loss = super()._compute_loss(model, inputs)
        del self.scores[before + 1 :], self.values[before + 1 :]  # what diagnostics asked for
        self.losses.append(loss.detach())
        return loss

    def _forward(self, model: Any, ids: Tensor, attention_mask: Tensor, steps: int) -> tuple[TokenScores, Tensor]:
        self.forwards.append("reference" if model is self.ref_model else "policy")
        return super()._forward(model, ids, attention_mask, steps)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        self.samplers.append(copy.deepcopy(self.model.state_dict()))
        ids, extra = super()._generate_single_turn(*args, **kwargs)
        self.sampled.extend(ids)
        return ids, extra


def watched(folder: Path, model: Any = None, **options: Any) -> Watched:
    run = trainer(folder, model, kind=Watched, **options)
    assert isinstance(run, Watched)
    return run


def completions_of(inputs: dict[str, Tensor]) -> list[tuple[list[int], list[int]]]:
    """The ids of every row's prompt and completion."""

    def ids(part: str, i: int) -> list[int]:
        found: list[int] = inputs[f"{part}_ids"][i][inputs[f"{part}_mask"][i].bool()].tolist()
        return found

    return [(ids("prompt", i), ids("completion", i)) for i in range(len(inputs["prompt_ids"]))]


def naive_scores(model: Any, prompt: list[int], completion: list[int]) -> tuple[list[float], list[float]]:
    """``log π(a_h|s_h)`` and ``V(s_h)`` of one row, from the logits that its class's own forward returns."""
    model = copy.deepcopy(model).eval()  # without dropout
    with torch.no_grad():
        logits = type(model).forward(model, input_ids=torch.tensor([prompt + completion])).logits[0].double().tolist()
    log_policy, value = [], []
    for h, token in enumerate(completion):
        row = logits[len(prompt) - 1 + h]
        largest = max(row)
        value.append(largest + math.log(math.fsum(math.exp(logit - largest) for logit in row)))
        log_policy.append(row[token] - value[-1])
    return log_policy, value
