"""What an LLM run is told beside the settings of its trainer: method, problems, model, pre-training, judging.

Everything else (``learning_rate``, ``beta``, ``num_generations``, ``max_steps``, …) are the fields of the trainer's own configuration,
and stand in the same YAML file beside these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.llm.compact_prompts import COMPACT

__all__ = ["MATH", "SHARED", "MethodName", "RunArguments", "check_values"]

MethodName = Literal["tbrm", "reval", "brm", "grpo", "rloo", "a2po", "ppo"]
MATH = "math"
"""The task whose problems come from ``data``, with answers in a box."""
SHARED = frozenset(
    {"run", "dry_run", "results", "task", "style", "difficulty", "data", "prompt_column", "answer_column"}
    | {"held_out_problems", "evaluation_samples", "model", "architecture", "alphabet", "dtype", "pretrained"}
    | {f"pretraining_{what}" for what in ("steps", "batch_size", "learning_rate", "problems", "accuracy")}
)
"""Fields that all methods of a file have in common: they start from the same model and answer the same problems."""
_LEAST = {
    **dict.fromkeys(("prompts_per_step", "prompt_tokens", "processes", "train_problems"), 1),
    **dict.fromkeys(("evaluation_samples", "evaluation_rows", "evaluation_steps"), 1),
    **dict.fromkeys(("pretraining_batch_size", "pretraining_problems"), 1),
    "held_out_problems": 2,  # one has no interval
    "pretraining_steps": 0,
    "device_gib": 0,
}


@dataclass
class RunArguments:
    """Fields of an LLM run; ``TrlParser`` fills them from a YAML file and a command line."""

    # What is run.
    run: Literal["train", "exact"] = field(
        default="train", metadata={"help": "train a method, or the experiment with an exact optimum"}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "build all arguments, check them, print memory and work, and train nothing"}
    )
    method: MethodName = field(default="tbrm", metadata={"help": "which trainer and loss"})
    name: str = field(default="", metadata={"help": "the name of the method in the file's `methods`"})
    prompts_per_step: int = field(
        default=128, metadata={"help": "problems in one update ([Y] §4: 128); gradient accumulation follows from it"}
    )

    # Problems.
    task: str = field(default="chain_sum", metadata={"help": f"one of {', '.join(COMPACT)}, or {MATH}"})
    style: Literal["compact", "full", "chat"] = field(default="compact", metadata={"help": "how a problem is written"})
    difficulty: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "options of the task in reasoning-gym, such as max_terms"}
    )
    data: str | None = field(
        default=None, metadata={"help": "of `math`: a .jsonl or .parquet file, or a data set on the hub"}
    )
    prompt_column: str = field(
        default="prompt", metadata={"help": "of `data`: text or messages; a dot leads into a nested column"}
    )
    answer_column: str = field(default="reward_model.ground_truth", metadata={"help": "of `data`: the known answer"})
    train_problems: int = field(default=2000, metadata={"help": "of a task of reasoning-gym ([Y] App. H.4: 2,000)"})
    held_out_problems: int = field(default=100, metadata={"help": "never trained on ([Y] App. H.4: 100)"})
    prompt_tokens: int = field(default=256, metadata={"help": "the longest prompt, for the estimates"})

    # The model: a name (or a folder), or an architecture to train from nothing.
    model: str | None = field(
        default=None,
        metadata={"help": "a folder, or a name on the hub; without it the model is made from `architecture`"},
    )
    architecture: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "model_type and its sizes; what the dry run builds"}
    )
    alphabet: str | None = field(
        default=None, metadata={"help": "the characters of the tokenizer made in code; default: printable ASCII"}
    )
    dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "of the weights; bf16 says in what they are multiplied"}
    )

    # Pre-training on solved problems, for a model that starts from nothing.
    pretraining_steps: int = field(default=0, metadata={"help": "at most; 0: none, the weights stay as drawn"})
    pretraining_batch_size: int = field(default=128, metadata={"help": "solved problems in one update"})
    pretraining_learning_rate: float = field(default=1e-3, metadata={"help": "highest, after the warm-up"})
    pretraining_problems: int = field(
        default=20000, metadata={"help": "solved problems, distinct and none of them held out"}
    )
    pretraining_accuracy: float = field(
        default=0.4, metadata={"help": "stops once this share of training problems is answered right"}
    )
    pretrained: str | None = field(
        default=None, metadata={"help": "folder of the model made first: read if it is there, else made and kept"}
    )

    # Judging on held-out problems: Avg@k, the mean over k sampled responses each.
    evaluation_samples: int = field(default=4, metadata={"help": "k"})
    evaluation_steps: int = field(default=50, metadata={"help": "updates between two judgements"})
    evaluation_rows: int = field(default=512, metadata={"help": "responses sampled at once, on each device"})

    # PPO's critic, a model of its own.
    critic_learning_rate: float = field(default=1e-5, metadata={"help": "[Y] App. G: 1e-5"})
    gae_lambda: float = field(default=1.0, metadata={"help": "of generalised advantage estimation"})
    entropy_coefficient: float = field(default=0.001, metadata={"help": "[Y] App. G: 0.001"})

    # Where it is meant to run.
    processes: int = field(
        default=1, metadata={"help": "how many the estimates assume; `accelerate launch` decides in a run"}
    )
    device_gib: float = field(default=0.0, metadata={"help": "memory of one device; 0: unknown"})
    launch: list[str] = field(
        default_factory=list, metadata={"help": "files for `accelerate launch`, the first by default"}
    )
    results: str = field(default="results", metadata={"help": "folder of the results"})

    def __post_init__(self) -> None:
        self.difficulty = _mapping("difficulty", self.difficulty)
        self.architecture = _mapping("architecture", self.architecture)
        if self.task != MATH and self.task not in COMPACT:
            raise InvalidInputError("task", f"expected {MATH} or one of {', '.join(COMPACT)}; found {self.task}")
        if self.task == MATH and (not self.data or self.style == "compact"):
            raise InvalidInputError("task", "math needs `data`, and style chat or full")
        if self.task != MATH and self.data:
            raise InvalidInputError("data", f"belongs to the task math, not to {self.task}")
        if not self.model and not self.architecture:
            raise InvalidInputError("model", "expected `model`, `architecture` or both")
        if not self.model and self.style == "chat":
            raise InvalidInputError("style", "chat needs a `model` whose tokenizer has a template for messages")
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise InvalidInputError(name, f"expected at least {least}, found {getattr(self, name)}")
        for name in ("pretraining_accuracy", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidInputError(name, f"expected a number from 0 to 1, found {getattr(self, name)}")

    @property
    def sizes(self) -> dict[str, Any]:
        """``architecture`` as a mapping."""
        assert not isinstance(self.architecture, str)
        return dict(self.architecture or {})

    @property
    def options(self) -> dict[str, Any]:
        """``difficulty`` as a mapping."""
        assert not isinstance(self.difficulty, str)
        return dict(self.difficulty or {})


def check_values(values: dict[str, Any], classes: Sequence[type[Any]]) -> None:
    """What a YAML file gives; of a command line, and of text, the parser checks the rest.

    Args:
        values: by the fields of ``classes``.
    """
    hints = {name: hint for made in classes for name, hint in get_type_hints(made).items()}
    for name, value in values.items():
        hint = hints[name]
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise InvalidInputError(name, f"expected one of {', '.join(get_args(hint))}; found {value!r}")
        if hint in (bool, int, float, str) and not isinstance(value, bool | int | float | str):
            raise InvalidInputError(name, f"expected {hint.__name__}, found {value!r}")
    for name in ("difficulty", "architecture"):
        _mapping(name, values.get(name))


def _mapping(name: str, value: Any) -> dict[str, Any] | None:
    """A mapping, which a command line gives as text."""
    if isinstance(value, str):
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InvalidInputError(name, f"not YAML: {value!r}") from error
    if value is not None and not (isinstance(value, dict) and all(isinstance(key, str) for key in value)):
        raise InvalidInputError(name, f"expected a mapping, found {value!r}")
    return value
