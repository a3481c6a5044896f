"""Language-model runs: one YAML file says everything.

    python experiments/llm_run.py --config experiments/configs/arithmetic_cpu.yaml --dry-run
    accelerate launch --config_file experiments/configs/launch/fsdp_4gpu.yaml \\
        experiments/llm_run.py --config experiments/configs/qwen2.5-math-1.5b.yaml --only tbrm-n1

A file names its runs under ``methods`` and repeats them for its ``seeds``. ``--only NAME`` picks some, ``--key value`` overrides a
field in all of them, ``--key.inner value`` an entry of a mapping. Fields:
``tbrm_theory/llm/run_arguments.py``, and those of the trainer of each method (``tbrm_theory/llm/methods.py``).

``--dry-run`` needs neither network nor accelerator: it builds the arguments of every run, the architecture on the meta device, a few
problems, and parses the launch files with accelerate's own classes; then it prints what each run takes. Exit status 1: a run needs
more memory than its device has; 2: something in the file does not fit together, named.

With ``run: exact`` the file holds the settings of ``experiments/exact_transformer.py`` instead, and that is what is run.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while packages load, which some of them do not survive
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the libraries are imported

from rich.console import Console
from rich.table import Table

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.llm.launch_files import Launch, read_launch_file
from tbrm_theory.llm.methods import METHODS, configuration_class, trainer_class
from tbrm_theory.llm.run_arguments import MATH
from tbrm_theory.llm.run_estimates import Memory, Work, memory_estimate, work_estimate
from tbrm_theory.llm.run_files import Run, read_file, read_runs, read_settings, split_command_line
from tbrm_theory.llm.run_parts import build_dataset, build_tokenizer, model_configuration
from tbrm_theory.llm.tokenizer import check_readable
from tbrm_theory.program import run_program

_GIB = 2**30
_SAMPLED_PROBLEMS = 8


def dry_run(runs: Sequence[Run]) -> list[tuple[Run, Memory, Work]]:
    """Check every run as far as that goes without training it, and estimate what it takes; seeds do not differ in that."""
    launches = {path: read_launch_file(path) for run in runs for path in run.arguments.launch}
    first_seeds = {run.arguments.name: run for run in reversed(runs)}
    checked = []
    for run in reversed(first_seeds.values()):
        check_run(run, [launches[path] for path in run.arguments.launch])
        launch = launches[run.arguments.launch[0]] if run.arguments.launch else None
        checked.append((run, memory_estimate(run, launch), work_estimate(run)))
    return checked


def check_run(run: Run, launches: Sequence[Launch]) -> None:
    """That a run's arguments, classes, model, problems and launch files fit together."""
    arguments, training = run.arguments, run.training
    trainer, configuration = trainer_class(arguments.method), configuration_class(arguments.method)
    if not (isinstance(trainer, type) and type(training) is configuration):
        raise InvalidInputError("method", f"{arguments.method} was given a {type(training).__name__}")
    for launch in launches:
        if METHODS[arguments.method].critic and launch.stage > 0 and launch.fsdp != 2:
            raise InvalidInputError(
                "launch", f"{arguments.method} trains two models, DeepSpeed and FSDP 1 one: use FSDP 2 or DDP"
            )
        if launch.processes != arguments.processes:
            raise InvalidInputError(
                "launch", f"starts {launch.processes} processes, but `processes` is {arguments.processes}"
            )
        if launch.mixed_precision != ("bf16" if training.bf16 else "no"):
            raise InvalidInputError("launch", f"mixed precision {launch.mixed_precision}, but bf16 is {training.bf16}")
    longest = getattr(model_configuration(arguments), "max_position_embeddings", None)
    needed = arguments.prompt_tokens + (getattr(training, "max_completion_length", None) or 0)
    if longest is not None and needed > longest:
        raise InvalidInputError(
            "max_completion_length", f"{needed} tokens with the prompt; the model has {longest} positions"
        )
    if arguments.task != MATH or (arguments.data and Path(arguments.data).suffix):
        check_problems(run)


def check_own_code(run: Run) -> None:
    """That nothing is sent anywhere, and nothing run that came with a model."""
    if getattr(run.training, "trust_remote_code", False) or run.training.report_to not in ([], ["none"]):
        raise InvalidInputError("report_to", "nothing is reported, and no code of a model is run")


def check_problems(run: Run) -> None:
    """That some problems can be made, read by the tokenizer, and are no longer than said."""
    few = {"train_problems": _SAMPLED_PROBLEMS, "held_out_problems": 2} if run.arguments.task != MATH else {}
    arguments = type(run.arguments)(**(vars(run.arguments) | few))
    split = build_dataset(arguments)
    if arguments.model is None:
        texts = [text for side in split for column in ("prompt", "solution") for text in side[column]]
        tokenizer = build_tokenizer(arguments)
        check_readable("".join(tokenizer.get_vocab()), texts)
        longest = max(len(text) for side in split for text in side["prompt"])
        if longest > arguments.prompt_tokens:
            raise InvalidInputError(
                "prompt_tokens", f"a prompt has {longest} characters, more than {arguments.prompt_tokens}"
            )


def tables(checked: Sequence[tuple[Run, Memory, Work]]) -> list[Table]:
    """Memory on each device in GiB, and the work of each run."""
    parts = (
        "weights",
        "gradients",
        "optimiser",
        "reference",
        "critic",
        "gathered",
        "activations",
        "logits",
        "generation",
        "judging",
        "scoring",
    )
    memory = Table("run", *parts, "peak", title="GiB on each device (estimate)")
    work = Table(
        "run",
        "parameters",
        "updates",
        "problems",
        "rollouts",
        "tokens made",
        "operations",
        "models",
        title="work, at most",
    )
    for run, taken, done in checked:
        row = [f"{getattr(taken, part) / _GIB:.3g}" for part in parts]
        room = run.arguments.device_gib
        peak = (
            f"{taken.peak / _GIB:.3g}" + (f" of {room:g}" if room else "") + ("" if fits(run, taken) else ": too much")
        )
        memory.add_row(run.arguments.name, *row, peak)
        counts = (done.parameters, done.updates, done.problems, done.rollouts, done.generated_tokens)
        work.add_row(
            run.arguments.name, *(f"{count:,}" for count in counts), f"{done.operations:.2g}", str(done.models_held)
        )
    return [memory, work]


def main(arguments: Sequence[str]) -> int:
    """The whole program; returns the exit status."""
    if any(word in ("-h", "--help") for word in arguments):
        print(__doc__)
        return 0
    line = split_command_line(arguments)
    if read_file(line.config).get("run") == "exact":
        return run_exact(arguments)
    runs = read_runs(arguments)
    for run in runs:
        check_own_code(run)
    if not runs[0].arguments.dry_run:
        return train(arguments)
    console = Console(width=None if sys.stdout.isatty() else 200)
    checked = dry_run(runs)
    for table in tables(checked):
        console.print(table)
    for run in runs:
        if run.left_out:
            console.print(f"{run.name}: {type(run.training).__name__} has no {', '.join(run.left_out)}", markup=False)
    return 0 if all(fits(run, memory) for run, memory, _ in checked) else 1


def fits(run: Run, memory: Memory) -> bool:
    """Whether the estimate is below the memory of a device, where that is known."""
    return not run.arguments.device_gib or memory.peak <= run.arguments.device_gib * _GIB


def run_exact(arguments: Sequence[str]) -> int:
    """The experiment with an exact optimum, with the settings of the file."""
    exact = importlib.import_module("exact_transformer")  # beside this file
    wanted = [word for word in arguments if word != "--dry-run"]
    settings = read_settings(wanted, exact.Config)
    if len(wanted) < len(arguments):
        Console().print(settings, markup=False)
        return 0
    return int(exact.main(settings))


def train(arguments: Sequence[str]) -> int:
    """Train every run, as ``experiments/llm_training.py`` does."""
    training = importlib.import_module("experiments.llm_training" if __package__ else "llm_training")
    return int(training.main(arguments))


if __name__ == "__main__":
    sys.exit(run_program("llm_run", lambda: main(sys.argv[1:])))
