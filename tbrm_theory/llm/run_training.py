"""One run of a method, from a pre-trained model to its learning curve and its costs."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import disable_progress_bars, enable_progress_bars
from transformers import AutoModelForCausalLM, PrinterCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as transformers_logging

from tbrm_theory.json_fields import replacement
from tbrm_theory.llm.boxed_answers import BoxedVerifier, math_reward
from tbrm_theory.llm.judging import Judge, Judgement
from tbrm_theory.llm.methods import METHODS, trainer_class
from tbrm_theory.llm.part_timer import PARTS
from tbrm_theory.llm.pretraining import pretrain
from tbrm_theory.llm.run_arguments import MATH, RunArguments
from tbrm_theory.llm.run_files import Run
from tbrm_theory.llm.run_parts import build_dataset, build_tokenizer, parameter_count
from tbrm_theory.llm.tasks import Reward, reasoning_gym_reward
from tbrm_theory.llm.timed import timed

__all__ = ["needs_pretraining", "pretrain_run", "train_run"]

Row = dict[str, Any]


def needs_pretraining(arguments: RunArguments) -> bool:
    """Whether the run starts from a model that has to be made first."""
    return arguments.model is None and arguments.pretraining_steps > 0


def pretrain_run(run: Run, folder: Path) -> Row:
    """The model that all runs of a file start from, saved in ``folder``; what it took."""
    started = time.perf_counter()
    with quiet(run), _reward(run.arguments) as reward:
        made = pretrain(run.arguments, folder, reward, tokens=_tokens(run), training=run.training)
    return vars(made) | {"seconds": time.perf_counter() - started}


def train_run(run: Run, folder: Path, start: Path | None) -> Row:
    """Train one method with one seed, from the model in ``start``; goes on from its last checkpoint if it has one.

    Returns:
        ``curve``: a list ``[update, rollouts, accuracy]`` by judgement; ``rewards``: the last judgement's, by problem and response;
        ``seconds_per_step`` by part (means over the updates); ``peak_bytes``: the most that was held at once, less what the process
        held before it made a model (on a GPU: what was allocated there); ``models_held``, ``parameters``.
    """
    arguments, training = run.arguments, run.training
    before = _resident_bytes()
    training.output_dir = str(folder)
    split = build_dataset(arguments, seed=training.seed)
    source = start or arguments.model
    assert source is not None
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, arguments.dtype), trust_remote_code=False)
    tokenizer = build_tokenizer(arguments)
    with quiet(run), _reward(arguments) as reward:
        trainer = timed(trainer_class(arguments.method))(
            model=model,
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
            after=lambda found: _keep(folder, run, found),
        )
        judge.attach(trainer)
        trainer.remove_callback(PrinterCallback)  # the log is kept in a file
        trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.exists() else None)
    _write_lines(folder / "log.jsonl", trainer.state.log_history)
    held = [trainer.model, getattr(trainer, "ref_model", None), getattr(trainer, "critic", None)]
    curve = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    return {
        "name": arguments.name,
        "method": arguments.method,
        "seed": training.seed,
        "rollouts": _rollouts(run),
        "curve": [[row["step"], row["rollouts"], row["accuracy"]] for row in curve],
        "rewards": judge.judgements[-1].rewards,
        "seconds_per_step": _seconds(trainer.state.log_history),
        "peak_bytes": _peak_bytes(before),
        "models_held": sum(each is not None for each in held),
        "parameters": parameter_count(model),
    }


def _further(arguments: RunArguments) -> dict[str, Any]:
    """What a trainer is told that its configuration has no field for."""
    if not METHODS[arguments.method].critic:
        return {}
    return {
        "critic_learning_rate": arguments.critic_learning_rate,
        "gae_lambda": arguments.gae_lambda,
        "entropy_coefficient": arguments.entropy_bonus,
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


def _tokens(run: Run) -> int:
    return int(run.training.max_completion_length)  # type: ignore[attr-defined]


def _rollouts(run: Run) -> int:
    return int(getattr(run.training, "num_generations", 1))


# -- what is kept --------------------------------------------------------------------------------------------------------


def _keep(folder: Path, run: Run, found: Judgement) -> None:
    """The judgement's point of the curve, and its samples; a run that goes on from a checkpoint judges some updates again."""
    path = folder / "curve.jsonl"
    kept = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rollouts = found.step * run.arguments.prompts_per_step * _rollouts(run)
    point = {"step": found.step, "rollouts": rollouts, "accuracy": found.accuracy}
    _write_lines(path, [row for row in kept if row["step"] < found.step] + [point])
    _write_lines(folder / "samples.jsonl", found.samples)


def _write_lines(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacement(path) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _seconds(log: list[dict[str, float]]) -> dict[str, float]:
    """Mean seconds of an update by part; the first logged updates also warm caches up, and are left out if there are others."""
    rows = [row for row in log if f"seconds/{PARTS[0]}" in row]
    rows = rows[1:] or rows
    return {part: fmean(row[f"seconds/{part}"] for row in rows) for part in PARTS} if rows else {}


def _resident_bytes() -> int:
    """The most memory that this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _peak_bytes(before: int) -> int:
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return _resident_bytes() - before
