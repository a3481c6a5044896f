"""One run of a method, from a pre-trained model to its learning curve and its costs."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from datasets import disable_progress_bars, enable_progress_bars
from safetensors import SafetensorError
from transformers import PrinterCallback
from transformers.utils import logging as transformers_logging

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.json_fields import replacement
from tbrm_theory.llm.boxed_answers import BoxedVerifier, math_reward
from tbrm_theory.llm.judging import Judge, Judgement
from tbrm_theory.llm.methods import METHODS, trainer_class
from tbrm_theory.llm.part_timer import PARTS
from tbrm_theory.llm.peak_memory import PeakMemory
from tbrm_theory.llm.pretraining import found_pretrained, pretrain
from tbrm_theory.llm.reference_trainer import ReferenceTrainer
from tbrm_theory.llm.run_arguments import MATH, RunArguments
from tbrm_theory.llm.run_files import Run
from tbrm_theory.llm.run_parts import build_dataset, build_tokenizer, loading, parameter_count
from tbrm_theory.llm.tasks import Reward, reasoning_gym_reward
from tbrm_theory.llm.timed import timed
from tbrm_theory.llm.trainer_state import last_checkpoint

__all__ = ["pretrain_run", "starts_from_nothing", "train_run"]

Row = dict[str, Any]
_NO_ROOM = 2**20
"""Bytes; what was half written has taken the rest."""


def starts_from_nothing(arguments: RunArguments) -> bool:
    """Whether the model that a run starts from has to be made first."""
    return arguments.model is None


def pretrain_run(run: Run, folder: Path) -> Row:
    """The model that all runs of a file start from, saved in ``folder``, or found there; what it took."""
    started = time.perf_counter()
    if (found := found_pretrained(folder, run.arguments)) is not None:
        return vars(found) | {"seconds": 0.0}
    with quiet(run), _reward(run.arguments) as reward, room_for(folder):
        made = pretrain(run.arguments, folder, reward, tokens=_tokens(run), training=run.training)
    return vars(made) | {"seconds": time.perf_counter() - started}


def train_run(run: Run, folder: Path, start: Path | None) -> Row:
    """Train one method with one seed; goes on from its last checkpoint if it has one.

    Of several processes all train and judge, and the main one alone writes.

    Args:
        start: the folder of a model with its tokenizer; without it ``model`` is read.

    Returns:
        ``curve``: a list ``[update, rollouts, accuracy]`` by judgement; ``rewards``: the last judgement's, by problem and response;
        ``seconds_per_step`` by part (means over the updates); ``peak_bytes``: the most that was held at once, while nothing was judged
        (:mod:`tbrm_theory.llm.peak_memory`); ``models_held``, ``parameters``. Nothing, in a process that is not the main one.
    """
    arguments, training = run.arguments, run.training
    memory = PeakMemory()
    training.output_dir = str(folder)
    given = training.model_init_kwargs or {}  # type: ignore[attr-defined]
    training.model_init_kwargs = given | {"dtype": arguments.dtype}  # type: ignore[attr-defined]
    split = build_dataset(arguments, seed=training.seed)
    tokenizer = build_tokenizer(arguments, start)
    with quiet(run), _reward(arguments) as reward, room_for(folder):
        with loading(source := str(start or arguments.model)):
            trainer = timed(trainer_class(arguments.method))(
                model=source,  # it reads the model itself, for it knows what is sharded
                reward_funcs=reward,
                args=training,
                train_dataset=split.train,
                processing_class=tokenizer,
                **_further(arguments),
            )
        judge = Judge(
            split.held_out,
            reward,
            tokenizer,
            samples=arguments.evaluation_samples,
            tokens=_tokens(run),
            every=arguments.evaluation_steps,
            rows=arguments.evaluation_rows,
            after=lambda found: _keep(folder, run, found) if trainer.is_world_process_zero() else None,
            around=memory.beside,
        )
        judge.attach(trainer)
        trainer.remove_callback(PrinterCallback)  # the log is kept in a file
        own = isinstance(trainer, ReferenceTrainer)
        processes, updates = training.world_size, training.max_steps
        checkpoint = last_checkpoint(folder, before=updates, processes=processes, own=own)
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except ValueError as error:
            if len(trainer.train_dataset):
                raise
            raise InvalidInputError(
                "filter_all_incorrect",
                "no training problem was answered right before training; expected one, or `false`",
            ) from error
    if trainer.state.global_step < updates:  # TRL drops a batch that is not full, and with no other ends without a word
        found = f"{len(trainer.train_dataset)} problems to train on and {arguments.prompts_per_step} in an update"
        raise InvalidInputError("train_problems", f"{found}: training ended after {trainer.state.global_step} updates")
    if not trainer.is_world_process_zero():
        return {}
    _write_lines(folder / "log.jsonl", trainer.state.log_history)
    held = [trainer.model, getattr(trainer, "ref_model", None), getattr(trainer, "critic", None)]
    curve = _read_lines(folder / "curve.jsonl")
    return {
        "name": arguments.name,
        "method": arguments.method,
        "seed": training.seed,
        "rollouts": _rollouts(run),
        "curve": [[row["step"], row["rollouts"], row["accuracy"]] for row in curve],
        "rewards": judge.judgements[-1].rewards,
        "seconds_per_step": _seconds(trainer.state.log_history),
        "peak_bytes": memory.bytes(),
        "models_held": sum(each is not None for each in held),
        "parameters": parameter_count(trainer.accelerator.unwrap_model(trainer.model)),
    }


def _further(arguments: RunArguments) -> dict[str, Any]:
    """What a trainer is told that its configuration has no field for."""
    if not METHODS[arguments.method].critic:
        return {}
    return {
        "critic_learning_rate": arguments.critic_learning_rate,
        "gae_lambda": arguments.gae_lambda,
        "entropy_coefficient": arguments.entropy_coefficient,
    }


@contextmanager
def _reward(arguments: RunArguments) -> Iterator[Reward]:
    if arguments.task != MATH:
        yield reasoning_gym_reward(arguments.task, arguments.style)
        return
    with BoxedVerifier() as verifier:
        yield math_reward(verifier)


@contextmanager
def quiet(run: Run) -> Iterator[None]:
    """The libraries' bars and advice stay out of the way: progress is the experiment's."""
    run.training.disable_tqdm = True
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
        enable_progress_bars()


@contextmanager
def room_for(folder: Path) -> Iterator[None]:
    """A full disk is said to be one: what writes weights says something of its own."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if shutil.disk_usage(place).free > _NO_ROOM:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error


def _tokens(run: Run) -> int:
    return int(run.training.max_completion_length)  # type: ignore[attr-defined]


def _rollouts(run: Run) -> int:
    return int(getattr(run.training, "num_generations", 1))


# -- what is kept --------------------------------------------------------------------------------------------------------


def _keep(folder: Path, run: Run, found: Judgement) -> None:
    """The judgement's point of the curve, and its samples; a run that goes on from a checkpoint judges some updates again."""
    path = folder / "curve.jsonl"
    kept = _read_lines(path) if path.exists() else []
    # Of the `num_iterations` updates on a batch the first alone has it sampled.
    batches = math.ceil(found.step / getattr(run.training, "num_iterations", 1))
    rollouts = batches * run.arguments.prompts_per_step * _rollouts(run)
    point = {"step": found.step, "rollouts": rollouts, "accuracy": found.accuracy}
    _write_lines(folder / "samples.jsonl", found.samples)
    _write_lines(path, [row for row in kept if row["step"] < found.step] + [point])


def _read_lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _write_lines(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacement(path) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _seconds(log: list[dict[str, float]]) -> dict[str, float]:
    """Mean seconds of an update by part; the first logged updates also warm caches up, and are left out if there are others."""
    rows = [row for row in log if f"seconds/{PARTS[0]}" in row]
    rows = rows[1:] or rows
    return {part: fmean(row[f"seconds/{part}"] for row in rows) for part in PARTS} if rows else {}
