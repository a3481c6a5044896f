"""A model to start from where no weights can be had: trained on solved problems until it answers some of them right.

With no steps its weights stay as they were drawn. Otherwise TRL's ``SFTTrainer`` trains it on the responses alone; it stops at the
first judgement at which the wanted share of training problems is answered right by sampling. It is saved as any model is, beside its
place, and moved there when all is written: a folder with ``pretrained.json`` in it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.json_fields import write_json
from tbrm_theory.llm.judging import Judge
from tbrm_theory.llm.run_arguments import MATH, RunArguments
from tbrm_theory.llm.run_parts import build_dataset, build_model, build_tokenizer, parameter_count
from tbrm_theory.llm.tasks import Reward

__all__ = ["Pretrained", "found_pretrained", "pretrain"]

_MARK = "pretrained.json"
_MADE_OF = (
    *("task", "style", "difficulty", "architecture", "alphabet", "dtype"),
    *(f"pretraining_{what}" for what in ("steps", "batch_size", "learning_rate", "problems", "accuracy")),
)
_JUDGED_PROBLEMS = 256
_JUDGEMENTS = 80


@dataclass(frozen=True)
class Pretrained:
    """What came out."""

    parameters: int
    steps: int
    accuracy: float | None
    """At the end, on training problems."""


def found_pretrained(folder: Path, arguments: RunArguments) -> Pretrained | None:
    """What was pre-trained there and saved to its end, if anything was.

    Raises:
        InvalidInputError: it was made with other settings than ``arguments``; the message names one.
    """
    mark = folder / _MARK
    if not mark.exists():
        return None
    try:
        kept = json.loads(mark.read_text(encoding="utf-8"))
        made, settings = Pretrained(**kept["made"]), kept["settings"]
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidInputError(str(mark), "not what pre-training writes here; name a new folder") from error
    for name, wanted in _settings(arguments).items():
        if settings.get(name) != wanted:
            raise InvalidInputError(
                "pretrained",
                f"the model in {folder} was made with {name} {settings.get(name)!r}, and {wanted!r} is asked for",
            )
    return made


def _settings(arguments: RunArguments) -> dict[str, Any]:
    """What the model is made of."""
    return {name: getattr(arguments, name) for name in _MADE_OF}


def pretrain(arguments: RunArguments, folder: Path, reward: Reward, *, tokens: int, training: Any) -> Pretrained:
    """Train the model of ``arguments`` on solved problems and save it, with its tokenizer, in ``folder``.

    Args:
        tokens: the longest response.
        training: the settings of the run that follows, of which the device and the precision are taken.

    Raises:
        InvalidInputError: the task has no solutions, the wanted accuracy was not reached, or ``folder`` is in use.
    """
    if folder.exists() and any(folder.iterdir()):
        raise InvalidInputError(
            "pretrained", f"expected a new folder or a model pre-trained here; found files in {folder}"
        )
    aside = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    tokenizer, model = build_tokenizer(arguments), build_model(arguments)
    made = Pretrained(parameter_count(model), 0, None)
    if arguments.pretraining_steps:
        made = _trained(model, tokenizer, arguments, aside / "checkpoints", reward, tokens=tokens, training=training)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    write_json(aside / _MARK, {"made": vars(made), "settings": _settings(arguments)})
    os.replace(aside, folder)
    return made


def _trained(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arguments: RunArguments,
    folder: Path,
    reward: Reward,
    *,
    tokens: int,
    training: Any,
) -> Pretrained:
    if arguments.task == MATH:
        raise InvalidInputError("pretraining_steps", "the problems of `data` have answers and no worked solutions")
    split = build_dataset(arguments, train_problems=arguments.pretraining_problems)
    solved = split.train.select_columns(["prompt", "solution"]).rename_column("solution", "completion")
    settings = SFTConfig(
        output_dir=str(folder),
        max_steps=arguments.pretraining_steps,
        per_device_train_batch_size=arguments.pretraining_batch_size,
        learning_rate=arguments.pretraining_learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=min(50, arguments.pretraining_steps),
        max_length=None,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=training.disable_tqdm,
        use_cpu=training.use_cpu,
        bf16=training.bf16,
        activation_checkpointing=False,
        dataset_num_proc=None,
        seed=0,
    )
    trainer = SFTTrainer(model=model, args=settings, train_dataset=solved, processing_class=tokenizer)
    judged = split.train.select(range(min(_JUDGED_PROBLEMS, len(split.train))))
    every = max(1, arguments.pretraining_steps // _JUDGEMENTS)
    judge = Judge(
        judged,
        reward,
        tokenizer,
        samples=1,
        tokens=tokens,
        every=every,
        rows=arguments.evaluation_rows,
        stop_at=arguments.pretraining_accuracy,
    )
    judge.attach(trainer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    last = judge.judgements[-1]
    if last.accuracy < arguments.pretraining_accuracy:
        found = f"expected {arguments.pretraining_accuracy:.0%} of training problems answered right"
        raise InvalidInputError(
            "pretraining_steps", f"{found} within {arguments.pretraining_steps} updates, found {last.accuracy:.0%}"
        )
    return Pretrained(parameter_count(model), last.step, last.accuracy)
