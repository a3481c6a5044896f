"""The task of `exact_transformer.py`, its settings, and the initial model's tree with its exact optimum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import tbrm_theory as tt
from tbrm_theory.dynamic_programming import Solution
from tbrm_theory.llm.exact import TokenTree
from tbrm_theory.llm.tokenizer import character_tokenizer
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.shapes import PerLayerStateAction
from tbrm_theory.training import exact_regret

__all__ = ["Config", "Problem"]

PAD, END, MARK = 0, 1, "="
"""Of ``character_tokenizer``, which has the digits next and the mark last. The end alone ends a response; padding and the mark are
tokens like the others that nothing rewards."""


@dataclass(frozen=True)
class Config:
    """Settings of the experiment; those of the committed run are in experiments/configs/exact_cpu.yaml."""

    prompts: tuple[str, ...] = ("0", "1", "42", "13", "214", "303")
    """Without the mark."""
    digits: int = 5
    """The vocabulary is these, the mark, the end and padding."""
    horizon: int = 5
    beta: float = 0.35
    seed: int = 0
    hidden_size: int = 64
    intermediate_size: int = 128
    layers: int = 2
    heads: int = 4
    initializer_range: float = 0.1
    steps: int = 400
    """Updates of each run."""
    batch_size: int = 384
    """Responses for each update, the prompts in turn."""
    learning_rate: float = 5e-3
    """Adam's, after a warm-up and falling to 0 in a straight line."""
    adam_beta2: float = 0.98
    """Gradients shrink a hundredfold with the residual; at the usual 0.999 their early size would hold the late steps back."""
    warmup_steps: int = 20
    replay_capacity: int = 1536
    """Responses kept."""
    evaluations: int = 20
    """How often the exact regret is computed in each run, besides the start."""
    checkpoint_every: int = 40
    table_learning_rate: float = 0.05
    target: float = 0.02
    """The largest share of the initial regret that may be left."""
    results: Path = Path("results")

    def __post_init__(self) -> None:
        for name in ("digits", "horizon", "steps", "batch_size", "evaluations", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise tt.InvalidInputError(name, f"expected at least 1, found {getattr(self, name)}")
        if self.digits > 10:
            raise tt.InvalidInputError("digits", f"expected at most 10, found {self.digits}")
        for i, prompt in enumerate(self.prompts):
            if not prompt or not set(prompt) <= set(self.known_digits):
                raise tt.InvalidInputError(f"prompts[{i}]", f"expected digits of {self.known_digits}, found {prompt!r}")

    @property
    def known_digits(self) -> str:
        return "0123456789"[: self.digits]


class Problem:
    """The task of a configuration, and the initial model's tree with its exact optimum."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.tokenizer = character_tokenizer(config.known_digits + MARK)
        self.texts = [prompt + MARK for prompt in config.prompts]
        prompts = tuple(tuple(self.tokenizer(text)["input_ids"]) for text in self.texts)
        self.tree = TokenTree(prompts, config.horizon, len(self.tokenizer), (END,))
        self.parity = torch.tensor([prompt[-2] % 2 for prompt in prompts])

    def model(self) -> PreTrainedModel:
        """The initial model, the same at every call."""
        config = self.config
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            return LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=self.tree.vocabulary,
                    hidden_size=config.hidden_size,
                    intermediate_size=config.intermediate_size,
                    num_hidden_layers=config.layers,
                    num_attention_heads=config.heads,
                    max_position_embeddings=64,
                    initializer_range=config.initializer_range,
                    bos_token_id=None,
                    eos_token_id=END,
                    pad_token_id=PAD,
                )
            )

    def reward(self, prompt: Tensor, tokens: Tensor) -> Tensor:
        """1 where the last token before the end is a digit of the prompt's parity; ``tokens`` are of one length."""
        if tokens.shape[-1] == 1:
            return torch.zeros(len(tokens), dtype=torch.float64)
        answer = tokens[:, -2]
        is_digit = (answer > END) & (answer < self.tree.vocabulary - 1)
        right = (tokens[:, -1] == END) & is_digit & (answer % 2 == self.parity[prompt])
        return right.to(torch.float64)

    def score(self, prompts: Sequence[str], completion_ids: Sequence[Sequence[int]], **unused: Any) -> list[float]:
        """The same reward as TRL asks for it: from sampled token ids, of any lengths."""
        prompt = torch.tensor([self.texts.index(text) for text in prompts])
        lengths = torch.tensor([len(ids) for ids in completion_ids])
        found = torch.zeros(len(lengths), dtype=torch.float64)
        for length in set(lengths.tolist()):
            rows = (lengths == length).nonzero().squeeze(-1)
            found[rows] = self.reward(prompt[rows], torch.tensor([completion_ids[i] for i in rows.tolist()]))
        return found.tolist()

    @cached_property
    def initial_logits(self) -> PerLayerStateAction:
        return self.tree.logits(self.model())

    @cached_property
    def mdp(self) -> RegularizedMDP:
        return self.tree.mdp(self.initial_logits, self.reward, beta=self.config.beta)

    @cached_property
    def solution(self) -> Solution:
        return tt.solve(self.mdp)

    def regret(self, model: PreTrainedModel) -> float:
        return exact_regret(self.mdp, self.tree.logits(model), self.solution).item()
