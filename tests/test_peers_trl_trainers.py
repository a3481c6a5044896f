"""GRPO and RLOO in TRL's whole trainers: a tiny model generates, TRL rewards, normalises, buffers and updates.

At every update our loss is computed from raw rewards and from log-probabilities of our own reading of the logits; its value and its
gradient in all parameters are TRL's, on the first pass over a batch (ratio 1) and on the second (ratio not 1).
"""

from __future__ import annotations

import copy
import os
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tbrm_theory.losses import TrajectoryScores, grpo_loss, rloo_loss

trl = pytest.importorskip("trl", reason="TRL is not installed")
pytestmark = pytest.mark.slow

BETA, GROUP, LENGTH = 0.3, 3, 5
PROMPTS = ["a b", "c d"]
WORDS = ["<pad>", "<eos>", *"abcd"]


@pytest.fixture(autouse=True)
def global_state() -> Iterator[None]:
    """TRL seeds every generator there is."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  (read and restored)
    environment = dict(os.environ)
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
    os.environ.clear()
    os.environ.update(environment)


def reward_of(completion_ids: list[int]) -> float:
    """A number that differs between most responses."""
    return 0.1 * sum((h + 1) * token for h, token in enumerate(completion_ids)) % 1.7


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [reward_of(ids) for ids in completion_ids]


def tiny_model(folder: Path) -> Any:
    """With a name to load it by again: TRL makes its reference so."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder)


def tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def token_log_probabilities(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Of the response's tokens, from the plain forward pass."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    logits = model(input_ids=ids, attention_mask=attention).logits
    first = inputs["prompt_ids"].shape[1]
    return logits[:, first - 1 : -1].log_softmax(-1).gather(-1, ids[:, first:].unsqueeze(-1)).squeeze(-1)


class Comparison:
    """Both losses and both gradients at each update."""

    def __init__(self, loss: Any, start: Any) -> None:
        self.loss, self.reference, self.behaviour = loss, copy.deepcopy(start), copy.deepcopy(start)
        self.ratios: list[float] = []
        self.lengths: set[int] = set()

    def scores(self, model: Any, inputs: dict[str, Tensor]) -> TrajectoryScores:
        if len(self.ratios) % 2 == 0:
            # The first of two passes: this model has sampled the batch. (A copy of it would not do: its ``forward`` is
            # replaced by one that is bound to the original and its parameters.)
            self.behaviour.load_state_dict(model.state_dict())
        groups = inputs["prompt_ids"].sum(-1).argsort(stable=True)  # TRL shuffles; the two prompts have different sums
        own = {
            name: inputs[name][groups] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        }
        with torch.no_grad():
            reference, behaviour = (token_log_probabilities(m, own) for m in (self.reference, self.behaviour))
        log_policy = token_log_probabilities(model, own)
        mask = own["completion_mask"].bool()
        lengths = mask.sum(-1).tolist()
        returns = [reward_of(ids[:n]) for ids, n in zip(own["completion_ids"].tolist(), lengths, strict=True)]
        self.lengths.update(lengths)
        self.ratios.append((log_policy - behaviour)[mask].abs().max().item())
        return TrajectoryScores(
            log_policy=log_policy,
            log_reference=reference,
            mask=mask,
            initial_value=torch.zeros(len(lengths)),
            trajectory_return=torch.tensor(returns),
            behaviour_log_policy=behaviour,
        )

    def check(self, model: Any, inputs: dict[str, Tensor], theirs: Tensor) -> None:
        own = self.loss(self.scores(model, inputs))
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)
        parameters = list(model.parameters())
        expected = torch.autograd.grad(theirs, parameters, retain_graph=True)
        largest = max(gradient.abs().max().item() for gradient in expected)
        assert largest > 1e-3
        for one, other in zip(torch.autograd.grad(own, parameters), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * largest)


def train(trainer_class: Any, config_class: Any, loss: Any, folder: Path, **options: Any) -> Comparison:
    from datasets import Dataset

    model = tiny_model(folder / "model")
    comparison = Comparison(loss, model)

    class Compared(trainer_class):  # type: ignore[misc]
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            theirs = super()._compute_loss(model, inputs)
            comparison.check(model, inputs, theirs)
            return theirs

    config = config_class(
        output_dir=str(folder),
        beta=BETA,
        per_device_train_batch_size=2 * GROUP,
        num_generations=GROUP,
        num_iterations=2,
        steps_per_generation=1,
        max_completion_length=LENGTH,
        max_steps=4,
        learning_rate=0.01,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        disable_dropout=True,
        gradient_checkpointing=False,
        **options,
    )
    trainer = Compared(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    return comparison


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_a_whole_trainer_takes_our_steps(method: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if method == "grpo":  # with TRL's default KL term

            def loss(scores: TrajectoryScores) -> Tensor:
                return grpo_loss(scores, beta=BETA, group_size=GROUP, corrected_kl=True)

            comparison = train(trl.GRPOTrainer, trl.GRPOConfig, loss, tmp_path, loss_type="grpo")
        else:

            def loss(scores: TrajectoryScores) -> Tensor:
                return rloo_loss(scores, beta=BETA, group_size=GROUP)

            comparison = train(trl.RLOOTrainer, trl.RLOOConfig, loss, tmp_path)
    assert len(comparison.ratios) == 4
    assert max(comparison.ratios[0::2]) < 1e-5 < 0.01 < min(comparison.ratios[1::2])
    assert len(comparison.lengths) > 1
