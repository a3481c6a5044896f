"""What TBRM's loss costs at the head of a language model with a large vocabulary, by three ways to get its scores.

One evaluation is a pass through the model (Qwen2's architecture, random weights, one narrow block, so that the head is nearly all
there is to do), the TBRM loss, and its gradient with respect to the hidden states and the head's weight. The scores come from

* `naive`: `torch.log_softmax` over all logits in float32;
* `chunked`: `tbrm_theory.llm.language_scores.token_scores` on the model's logits: float32 for `--chunk` logits at a time, computed
  again in the backward pass (what the trainer does by default);
* `fused`: TRL's head, which never holds the logits (`tbrm_theory.llm.fused_head`; the trainer's `fused_lm_head`).

All three are called in turn, and times are medians. Bytes are the most that one evaluation held beside the model: on a GPU what torch
says was allocated, on a CPU every allocation that torch's profiler saw. Losses and gradients must agree; a difference is relative to
the largest entry of `naive`'s.

It runs on a GPU where there is one, else on the CPU. The committed table is of one thread of a CPU, where TRL's head has no Triton
kernel: it scores the prompt too, works on a tile of 32,768 words for all positions at once, and holds several tables of that size.
No GPU was at hand; for one: --rows 8 --completion 1024 --width 896 --chunk 67108864.

summary.json: `vocabulary` (the largest one, of which the ratios are), `seconds_ratio` and `bytes_ratio` (of each way over `naive`),
`largest_difference` (of the loss and of the gradients, over all vocabularies), `unexpected`, `verdict`, `seconds`. Exit status 1 if
a loss or gradient differs by more than 1e-5 in float32 or 1e-2 in bfloat16.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

if __name__ == "__main__":  # Ctrl-C while packages load, which some of them do not survive
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
os.environ.setdefault(
    "KINETO_LOG_LEVEL", "6"
)  # torch's profiler would report on standard error that it starts and stops

import torch
import tyro
from rich.table import Table
from timing import seconds
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2Config, Qwen2ForCausalLM

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.experiment import run_experiment
from tbrm_theory.llm.fused_head import add_start_logits, fused_token_scores
from tbrm_theory.llm.language_scores import TokenScores, completion_scores, token_scores
from tbrm_theory.losses import tbrm_loss
from tbrm_theory.program import run_program
from tbrm_theory.random_tables import seeded

BETA = 0.5
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}

Row = dict[str, Any]


@dataclass(frozen=True)
class Config:
    """Sizes of the model and of a batch."""

    vocabularies: tuple[int, ...] = (4_096, 16_384, 65_536, 151_936)
    """Words; the last is Qwen2.5's."""
    width: int = 128
    """Of the hidden states; a multiple of 4."""
    rows: int = 4
    prompt: int = 8
    """Tokens of a prompt."""
    completion: int = 96
    """Tokens of a completion."""
    chunk: int = 2**22
    """Logits that `chunked` handles at once: as small beside this batch as its default of 2^26 beside one of 6,144 positions."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the model and its logits."""
    repeats: int = 3
    seed: int = 0
    results: Path = Path("results")

    def __post_init__(self) -> None:
        least = {"rows": 1, "prompt": 1, "completion": 1, "chunk": 1, "repeats": 1, "width": 4}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise InvalidInputError(name, f"expected at least {number}, found {getattr(self, name)}")
        if self.width % 4:
            raise InvalidInputError("width", f"expected a multiple of 4, found {self.width}")
        if not self.vocabularies or min(self.vocabularies) < 2:
            raise InvalidInputError("vocabularies", f"expected numbers of at least 2, found {self.vocabularies}")


# -- three ways to the scores ----------------------------------------------------------------------------------------


class Texts(NamedTuple):
    """A batch: ``tokens`` ``(B, P + C)``, nowhere padded, of which the last ``steps`` = C are the completions."""

    tokens: Tensor
    steps: int

    @property
    def actions(self) -> Tensor:
        return self.tokens[:, -self.steps :]

    @property
    def attention_mask(self) -> Tensor:
        return torch.ones_like(self.tokens)


def completion_logits(model: Any, texts: Texts) -> Tensor:
    """Those that choose the completions' tokens, ``(B, C, W)``, as the trainer asks for them."""
    output = model(
        input_ids=texts.tokens, attention_mask=texts.attention_mask, logits_to_keep=texts.steps + 1, use_cache=False
    )
    return output.logits[:, :-1]


def naive(model: Any, texts: Texts, config: Config) -> TokenScores:
    """``V_θ(s_1)`` is a logit less its log-probability, which keeps no table alive as a log-sum-exp of a view would."""
    logits = completion_logits(model, texts).float()
    actions = texts.actions.unsqueeze(-1)
    log_policy = torch.log_softmax(logits, -1).gather(-1, actions).squeeze(-1)
    initial_value = logits[:, 0].gather(-1, actions[:, 0]).squeeze(-1) - log_policy[:, 0]
    return TokenScores(log_policy, initial_value, None, None)


def chunked(model: Any, texts: Texts, config: Config) -> TokenScores:
    return token_scores(completion_logits(model, texts), texts.actions, chunk=config.chunk)


def fused(model: Any, texts: Texts, config: Config) -> TokenScores:
    return fused_token_scores(model, texts.tokens, texts.attention_mask, texts.steps)


WAYS: dict[str, Callable[[Any, Texts, Config], TokenScores]] = {"naive": naive, "chunked": chunked, "fused": fused}


# -- one evaluation --------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What an evaluation gives."""

    loss: Tensor
    hidden: Tensor
    """Gradient with respect to the hidden states, ``(B, P + C, width)``."""
    head: Tensor
    """Gradient with respect to the head's weight, ``(W, width)``."""


class Problem:
    """A model and a batch whose reference is the model itself, as at the beginning of training."""

    def __init__(self, vocabulary: int, config: Config) -> None:
        self.config, self.device = config, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = language_model(vocabulary, config).to(self.device)
        add_start_logits(self.model)  # changes nothing where nobody asks for it
        self.model.base_model.register_forward_hook(lambda _, given, output: self._hidden.append(output[0]))
        self._hidden: list[Tensor] = []
        size = (config.rows, config.prompt + config.completion)
        tokens = torch.randint(vocabulary, size, generator=seeded(config.seed))
        self.texts = Texts(tokens.to(self.device), config.completion)
        with torch.no_grad():
            log_reference = naive(self.model, self.texts, config).log_policy
        self._given = {
            "log_reference": log_reference,
            "actions": torch.ones_like(self.texts.actions, dtype=torch.bool),
            "trajectory_return": torch.linspace(0, 1, config.rows, device=self.device),
        }

    def evaluate(self, way: str) -> Outcome:
        """The loss and its gradients; beyond the head nothing is differentiated."""
        self._hidden.clear()
        scores = completion_scores(WAYS[way](self.model, self.texts, self.config), **self._given)
        loss = tbrm_loss(scores, beta=BETA)
        # TRL's head runs the model's own forward once more, for one position of what the first pass left behind.
        first, head = self._hidden[0], self.model.get_output_embeddings().weight
        self._hidden.clear()
        return Outcome(loss.detach(), *torch.autograd.grad(loss, (first, head)))


def language_model(vocabulary: int, config: Config) -> Qwen2ForCausalLM:
    """Equal settings, equal weights; its logits spread by about 2, so that the policy is far from uniform."""
    settings = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=config.width,
        intermediate_size=config.width,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=config.prompt + config.completion,
        initializer_range=2 / config.width**0.5,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = Qwen2ForCausalLM(settings)
    return model.to(getattr(torch, config.dtype))


# -- what it costs ---------------------------------------------------------------------------------------------------


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most that ``function`` held at once, beside what was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    gc.collect(1)  # cycles that the evaluation before left are not freed in the middle of this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    # What torch makes of these events adds up the allocations within an operation, and the peak there is lost.
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def difference(found: Tensor, expected: Tensor) -> float:
    """Relative to the largest entry."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def run_cell(vocabulary: int, config: Config) -> Row:
    """One vocabulary, the three ways beside each other."""
    problem = Problem(vocabulary, config)
    expected = problem.evaluate("naive")
    differences = {
        way: dict(zip(Outcome._fields, map(difference, problem.evaluate(way), expected), strict=True))
        for way in WAYS
        if way != "naive"
    }
    evaluations = [partial(problem.evaluate, way) for way in WAYS]
    return {
        "vocabulary": vocabulary,
        "positions": problem.texts.actions.numel(),
        "dtype": config.dtype,
        "device": torch.cuda.get_device_name() if problem.device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "logits_bytes": problem.texts.actions.numel() * vocabulary * getattr(torch, config.dtype).itemsize,
        "seconds": dict(zip(WAYS, seconds(*evaluations, repeats=config.repeats), strict=True)),
        "bytes": {way: peak_bytes(each, problem.device) for way, each in zip(WAYS, evaluations, strict=True)},
        "differences": differences,
    }


# -- what it says ----------------------------------------------------------------------------------------------------


def unexpected(rows: list[Row]) -> list[str]:
    """Where the ways disagree; a difference that is no number does, too."""
    return [
        f"{row['cell']}: {way}'s {name} differs by {found:.1e}"
        for row in rows
        for way, each in row["differences"].items()
        for name, found in each.items()
        if not found <= TOLERANCE[row["dtype"]]
    ]


def summarise(rows: list[Row], taken: float) -> Row:
    """The headline numbers; keys are explained in ``--help``."""
    largest = max(rows, key=lambda row: row["vocabulary"])
    found = [each for row in rows for each in row["differences"].values()]
    bad = unexpected(rows)
    return {
        "vocabulary": largest["vocabulary"],
        **{
            f"{kind}_ratio": {way: round(number / largest[kind]["naive"], 3) for way, number in largest[kind].items()}
            for kind in ("seconds", "bytes")
        },
        "largest_difference": {name: max(each[name] for each in found) for name in Outcome._fields},
        "unexpected": bad,
        "verdict": "as predicted" if not bad else "NOT as predicted",
        "seconds": round(taken, 1),
    }


def table(rows: list[Row]) -> Table:
    """One row for each vocabulary and way."""
    first = rows[0]
    title = f"{first['positions']} positions, {first['dtype']}, {first['device']}, threads: {first['threads']}"
    view = Table("vocabulary", "way", "seconds", "/ naive", "MiB", "/ naive", "difference", title=title)
    for row in rows:
        for way in WAYS:
            time, held = row["seconds"][way], row["bytes"][way]
            apart = max(row["differences"].get(way, {"": 0.0}).values())
            view.add_row(
                f"{row['vocabulary']:,}",
                way,
                f"{time:.3f}",
                f"{time / row['seconds']['naive']:.2f}",
                f"{held / 2**20:,.0f}",
                f"{held / row['bytes']['naive']:.2f}",
                f"{apart:.0e}",
            )
    return view


def main(config: Config) -> int:
    cells = {str(vocabulary): partial(run_cell, vocabulary, config) for vocabulary in config.vocabularies}
    return run_experiment("lm_head", config, cells, summarise, lambda rows, _: [table(rows)])


if __name__ == "__main__":
    sys.exit(run_program("lm_head", lambda: main(tyro.cli(Config, description=__doc__))))
