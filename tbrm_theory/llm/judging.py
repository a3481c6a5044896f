"""How good a model is on held-out problems: Avg@k, the mean reward of k sampled responses to each, and the samples themselves.

Judging draws from a generator state of its own and gives the global one back, so that a run trains the same whether it is
judged or not.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl.models.utils import unwrap_model_for_generation

from tbrm_theory.llm.tasks import Reward, response_text

__all__ = ["Judge", "Judgement", "responses"]


@dataclass(frozen=True)
class Judgement:
    """What k responses to every problem were worth."""

    step: int
    rewards: list[list[float]]
    """By problem and response."""
    samples: list[dict[str, Any]] = field(repr=False)
    """The first response to every problem, with its reward."""

    @property
    def accuracy(self) -> float:
        """Avg@k."""
        return sum(map(sum, self.rewards)) / sum(map(len, self.rewards))


def responses(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Any],
    *,
    tokens: int,
    temperature: float,
    seed: int,
    rows: int,
) -> list[str]:
    """One sampled response to each prompt, text or messages, at most ``tokens`` long; ``rows`` of them at a time.

    They are samples of the model at ``temperature``, whatever its generation settings advise. Whatever ends a response in training
    ends it here: every token that the model declares, and the tokenizer's.
    """
    declared = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])} - {None}
    texts = [
        prompt
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        for prompt in prompts
    ]
    written: list[str] = []
    devices = [model.device] if model.device.type == "cuda" else []
    training = model.training
    model.eval()
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed(seed)
        for start in range(0, len(texts), rows):
            batch = tokenizer(
                texts[start : start + rows],
                return_tensors="pt",
                padding=True,
                padding_side="left",
                add_special_tokens=False,
            ).to(model.device)
            made = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=tokens,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=sorted(ends),
            )
            completions = made[:, batch["input_ids"].shape[1] :]
            written += tokenizer.batch_decode(completions, skip_special_tokens=True)
    model.train(training)
    return written


class Judge(TrainerCallback):
    """Judges at the start, every ``every`` updates and at the end; ``stop_at`` ends training at that accuracy."""

    def __init__(
        self,
        problems: Dataset,
        reward: Reward,
        tokenizer: PreTrainedTokenizerBase,
        *,
        samples: int,
        tokens: int,
        every: int,
        temperature: float = 1.0,
        rows: int = 512,
        stop_at: float | None = None,
        after: Callable[[Judgement], None] | None = None,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.problems, self.reward, self.tokenizer = problems, reward, tokenizer
        self.samples, self.tokens, self.every = samples, tokens, every
        self.temperature, self.rows, self.stop_at = temperature, rows, stop_at
        self.after, self.around = after, around
        self.trainer: Any = None
        self.judgements: list[Judgement] = []

    def attach(self, trainer: Any) -> None:
        """Judge the model of this trainer while it trains."""
        self.trainer = trainer
        trainer.add_callback(self)

    def judge(self, model: Any, step: int) -> Judgement:
        columns = {name: list(self.problems[name]) for name in self.problems.column_names}
        repeated = {name: [value for value in column for _ in range(self.samples)] for name, column in columns.items()}
        prompts = repeated.pop("prompt")
        written = responses(
            model,
            self.tokenizer,
            prompts,
            tokens=self.tokens,
            temperature=self.temperature,
            seed=step,
            rows=self.rows,
        )
        completions: list[Any] = (
            written if isinstance(prompts[0], str) else [[{"role": "assistant", "content": text}] for text in written]
        )
        paid = self.reward(prompts, completions, **repeated)
        rewards = [paid[i : i + self.samples] for i in range(0, len(paid), self.samples)]
        shown = [
            {"step": step, "prompt": prompts[i], "response": response_text(completions[i]), "reward": paid[i]}
            for i in range(0, len(paid), self.samples)
        ]
        return Judgement(step, rewards, shown)

    def _judged(self, step: int) -> Judgement:
        with self.around(), unwrap_model_for_generation(self.trainer.model_wrapped, self.trainer.accelerator) as model:
            found = self.judge(model, step)
        self.judgements.append(found)
        if self.after is not None:
            self.after(found)
        return found

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._judged(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            found = self._judged(state.global_step)
            if self.stop_at is not None and found.accuracy >= self.stop_at:
                control.should_training_stop = True
