"""A YAML file and a command line, read into the runs they ask for.

The file holds the fields of :class:`~tbrm_theory.llm.run_arguments.RunArguments` and of the trainer's configuration side by side. Its
key ``methods`` names the runs and what is particular to each; ``seeds`` repeats them. So the twins of a run (GRPO and PPO beside TBRM)
stand in one file, and what they share is written once.

* ``--only NAME``: these methods alone (repeatable).
* ``--key value`` overrides a field in every run, ``--key.inner value`` an entry of a mapping, as ``--architecture.hidden_size 64``.
* A shared key that one method's configuration lacks (``num_generations`` of A*-PO) is left out there, and listed in ``Run.left_out``;
  a key that no method knows, or that is given under a method that lacks it, is an error.
* What makes runs comparable (the problems, the model they start from, how they are judged: ``SHARED``) is not given under a method.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_args, get_origin, get_type_hints

import yaml
from transformers import TrainingArguments
from trl.scripts.utils import TrlParser

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.llm.methods import METHODS, configuration_class
from tbrm_theory.llm.run_arguments import SHARED, RunArguments, check_values

__all__ = ["Run", "read_file", "read_runs", "read_settings", "split_command_line"]

Fields = dict[str, Any]
_NAME = re.compile(r"\w[\w.-]*", re.ASCII)


class Run(NamedTuple):
    """One run: a method with a seed."""

    name: str
    arguments: RunArguments
    training: TrainingArguments
    left_out: tuple[str, ...]


class CommandLine(NamedTuple):
    """A command line, taken apart: the file, ``--only``, dotted overrides, and what the parser reads."""

    config: Path
    only: list[str]
    dotted: Fields
    rest: list[str]


def read_runs(arguments: Sequence[str]) -> list[Run]:
    """All runs that a command line asks for, in the order of the file."""
    line = split_command_line(arguments)
    shared = read_file(line.config)
    methods, seeds = _methods(shared), _seeds(shared)
    known = {name: _fields(own.get("method", shared.get("method", "tbrm"))) for name, own in methods.items()}
    _check_keys(line, shared, methods, known)
    for name in line.only:
        if name not in methods:
            raise InvalidInputError("--only", f"expected some of {', '.join(methods)}; found {name}")
    runs = []
    for name, own in methods.items():
        if line.only and name not in line.only:
            continue
        for seed in seeds:
            merged: Fields = {**copy.deepcopy(shared), **copy.deepcopy(own), "name": name}
            if seed is not None:
                merged["seed"] = seed
            _override(merged, line.dotted)
            left_out = tuple(sorted(set(merged) - known[name]))
            given = {key: value for key, value in merged.items() if key not in left_out}
            full_name = name if seed is None else f"{name}/seed-{seed}"
            runs.append(_run(full_name, seed, line, given, left_out))
    return runs


def _check_keys(line: CommandLine, shared: Fields, methods: dict[str, Fields], known: dict[str, set[str]]) -> None:
    """That every key of the file, and the first name of every dotted override, is a field of what it is given to."""
    dotted = {path.partition(".")[0]: f"--{path}" for path in line.dotted}
    for key, where in ({key: f"{line.config}: {key}" for key in shared} | dotted).items():
        if not any(key in fields for fields in known.values()):
            raise InvalidInputError(where, "no field of a run, nor of a trainer of this file")
    for name, own in methods.items():
        for key in sorted(own):
            where = f"{line.config}: methods.{name}.{key}"
            if key not in known[name]:
                raise InvalidInputError(where, "no field of a run, nor of its trainer")
            if key in SHARED and len(methods) > 1:
                raise InvalidInputError(where, "the methods of a file have this in common; give it once, for all")


def split_command_line(arguments: Sequence[str]) -> CommandLine:
    """Take ``--config FILE``, ``--only NAME …`` and ``--a.b value`` out of a command line; ``--key=value`` is ``--key value``."""
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--") else [word])]
    config, only, dotted, rest = None, [], {}, []
    position = 0
    while position < len(words):
        word = words[position]
        if word in ("--config", "--only") or (word.startswith("--") and "." in word):
            if position + 1 == len(words) or words[position + 1].startswith("--"):
                raise InvalidInputError(word, "expected a value")
            value = words[position + 1]
            if word == "--config":
                config = Path(value)
            elif word == "--only":
                only.append(value)
            else:
                dotted[word.removeprefix("--").replace("-", "_")] = _yaml(word, value)
            position += 2
        else:
            rest.append(word)
            position += 1
    if config is None:
        raise InvalidInputError("--config", "expected a YAML file")
    return CommandLine(config, only, dotted, rest)


def read_file(path: Path) -> Fields:
    """The mapping of a YAML file, read safely."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInputError(str(path), f"not a UTF-8 text file: {error.reason}") from error
    return _checked_mapping(str(path), _yaml(str(path), text))


def _yaml(where: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that there is not
        raise InvalidInputError(where, f"not YAML: {error}") from error


def _checked_mapping(where: str, value: Any) -> Fields:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise InvalidInputError(where, "expected a mapping with names as keys")
    return value


def _methods(shared: Fields) -> dict[str, Fields]:
    """The runs of a file by name; a file without ``methods`` is one run, named after its method."""
    if "methods" not in shared:
        return {str(shared.get("method", "tbrm")): {}}
    named = _checked_mapping("methods", shared.pop("methods"))
    if not named:
        raise InvalidInputError("methods", "expected at least one")
    for name in named:
        if not _NAME.fullmatch(name) or name == "pretraining":  # folders are called after it
            raise InvalidInputError(
                f"methods.{name}", "expected a name of letters, digits, _, - and dots within, other than pretraining"
            )
    return {name: _checked_mapping(f"methods.{name}", own or {}) for name, own in named.items()}


def _seeds(shared: Fields) -> list[int | None]:
    seeds = shared.pop("seeds", [None])
    if not isinstance(seeds, list) or not seeds or not all(seed is None or type(seed) is int for seed in seeds):
        raise InvalidInputError("seeds", f"expected integers, found {seeds!r}")
    if len(set(seeds)) < len(seeds):
        raise InvalidInputError("seeds", f"expected each of them once, found {seeds!r}")
    return seeds


def _fields(method: Any) -> set[str]:
    if not isinstance(method, str) or method not in METHODS:
        raise InvalidInputError("method", f"expected one of {', '.join(METHODS)}; found {method}")
    classes = (RunArguments, configuration_class(method))
    return {field.name for made in classes for field in dataclasses.fields(made) if field.init}


def _override(merged: Fields, dotted: Fields) -> None:
    for path, value in dotted.items():
        *outer, last = path.split(".")
        place = merged
        for name in outer:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise InvalidInputError(f"--{path}", f"{name} is not a mapping")
        place[last] = value


def read_settings(arguments: Sequence[str], settings: type[Any]) -> Any:
    """A dataclass of settings from a file without methods (``run: exact``) and a command line; lists become tuples."""
    line = split_command_line(arguments)
    given = read_file(line.config)
    given.pop("run", None)
    _override(given, line.dotted)
    if len(line.rest) % 2 or any(not key.startswith("--") for key in line.rest[::2]):
        raise InvalidInputError("arguments", f"expected --key value, found {' '.join(line.rest)}")
    for key, value in zip(line.rest[::2], line.rest[1::2], strict=True):
        given[key.removeprefix("--").replace("-", "_")] = _yaml(key, value)
    known = get_type_hints(settings)
    for key, value in given.items():
        if key not in known:
            raise InvalidInputError(f"{line.config}: {key}", f"expected some of {', '.join(known)}")
        given[key] = _converted(key, value, known[key])
    return settings(**given)


def _converted(where: str, value: Any, kind: Any) -> Any:
    """A value of a YAML file as the annotation of its field has it: a path, a number, text, or a tuple of them."""
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_converted(f"{where}[{i}]", entry, get_args(kind)[0]) for i, entry in enumerate(value))
    takes: dict[Any, Any] = {int: int, float: (int, float, str), str: str, Path: str}
    if kind not in takes or not isinstance(value, takes[kind]) or isinstance(value, bool):
        raise InvalidInputError(where, f"expected {getattr(kind, '__name__', kind)}, found {value!r}")
    try:
        return kind(value)  # YAML takes 1e-6 for text
    except ValueError as error:
        raise InvalidInputError(where, f"expected {kind.__name__}, found {value!r}") from error


# -- one run -------------------------------------------------------------------------------------------------


class _Parser(TrlParser):
    """TRL's parser, with errors of this project; abbreviations of a field are not accepted."""

    def error(self, message: str) -> NoReturn:
        raise InvalidInputError("arguments", message)


def _parser(method: str) -> TrlParser:
    classes: list[Any] = [RunArguments, configuration_class(method)]
    return _Parser(classes, allow_abbrev=False)


def _run(name: str, seed: int | None, line: CommandLine, given: Fields, left_out: tuple[str, ...]) -> Run:
    method = given.get("method", "tbrm")
    parser = _parser(method)
    values: Fields = {"report_to": "none"}
    values |= METHODS[method].settings
    values |= given
    check_values(values, (RunArguments, configuration_class(method)))
    # Text is converted and checked by the type of its field; YAML takes 1e-6 for text, and 1 for no float.
    parser.set_defaults_with_config(**{key: _text(value) for key, value in values.items()})
    try:
        arguments, training = parser.parse_args_into_dataclasses(
            [*line.rest, *_derived(parser, line, method, name)], look_for_args_file=False
        )
    except InvalidInputError:
        raise
    except ValueError as error:  # what TRL and transformers refuse
        raise InvalidInputError(name, " ".join(str(error).split())) from error
    if (arguments.method, arguments.name) != (method, given["name"]):
        raise InvalidInputError(
            "--name" if arguments.method == method else "--method", "use --only with a name of the file"
        )
    if seed is not None and training.seed != seed:
        raise InvalidInputError("--seed", "the file has `seeds`, a run for each of them; change them there")
    if training.max_steps < 1:
        raise InvalidInputError("max_steps", f"expected a positive number of updates, found {training.max_steps}")
    return Run(name, arguments, training, left_out)


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, bool | int | float) else value


def _derived(parser: TrlParser, line: CommandLine, method: str, name: str) -> Iterator[str]:
    """What follows from the other settings, as words of a command line.

    Gradient accumulation, such that an update sees ``prompts_per_step`` problems on any number of processes; the folder. A dry run
    keeps away from devices: what is meant for several GPUs is built on a CPU.
    """
    known, rest = parser.parse_known_args(line.rest)
    if rest:
        raise InvalidInputError("arguments", f"{rest[0]} is no field of a run, nor of the trainer of {known.name}")
    if known.gradient_accumulation_steps != 1:
        raise InvalidInputError("gradient_accumulation_steps", "follows from prompts_per_step; leave it out")
    sizes = ("prompts_per_step", "num_generations", "per_device_train_batch_size", "processes")
    for size in sizes:
        if (getattr(known, size, 1) or 0) < 1:
            raise InvalidInputError(size, f"expected at least 1, found {getattr(known, size)}")
    rollouts = getattr(known, "num_generations", 1)
    processes = known.processes if known.dry_run else int(os.environ.get("WORLD_SIZE", "1"))
    rows, step = known.prompts_per_step * rollouts, known.per_device_train_batch_size * processes
    if rows % step:
        raise InvalidInputError(
            "prompts_per_step",
            f"{known.prompts_per_step} problems × {rollouts} rollouts do not divide into {processes} processes ×"
            f" {known.per_device_train_batch_size} rows",
        )
    yield from ("--gradient_accumulation_steps", str(rows // step))
    if known.output_dir is None:
        yield from ("--output_dir", str(Path(known.results) / "llm_run" / line.config.stem / name))
    if known.dry_run:
        yield from ("--use_cpu", "true")
