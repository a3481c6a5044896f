"""Tasks for a language model: problems with a right answer that a program recognises.

A reward is 1 where the official scorer of reasoning-gym gives exactly 1, else 0: its partial credit (a right answer somewhere in a
long text, a legal path that is not shortest) pays for guessing. Each problem is written in one of three ways:

* ``compact``: a few characters (:mod:`tbrm_theory.llm.compact_prompts`), answered by as few;
* ``full``: reasoning-gym's own question as plain text, the answer between ``<answer>`` and ``</answer>``;
* ``chat``: the same as messages, for a model with a chat template.

**Held-out problems are disjoint from training by construction**: a hash of the problem itself, not of where it was drawn, says to
which side it belongs. So no training seed ever meets a held-out problem, and all seeds and methods are judged on the same ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from datasets import Dataset

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.llm.arithmetic_answers import makes_target
from tbrm_theory.llm.compact_prompts import COMPACT, CompactForm, Entry

__all__ = [
    "HELD_OUT_SHARE",
    "INSTRUCTION",
    "PAPER_TASKS",
    "PromptStyle",
    "Reward",
    "Split",
    "is_held_out",
    "is_right",
    "reasoning_gym_reward",
    "reasoning_gym_split",
    "response_text",
]

PromptStyle = Literal["compact", "full", "chat"]
Reward = Callable[..., list[float]]
"""TRL's: ``reward(prompts, completions, **columns)``."""

PAPER_TASKS = ("course_schedule", "family_relationships", "largest_island", "quantum_lock", "shortest_path")
"""[Y] Table 4."""
HELD_OUT_SHARE = 0.2
INSTRUCTION = (
    "Think step by step, then write the final answer between <answer> and </answer>, in the format that is asked for and with nothing"
    " else between them."
)
_STREAM = (
    10**9
)  # the problems of one seed: reasoning-gym draws number i of seed s with seed s + i, so that seeds 0 and 1 overlap
_HELD_OUT_STREAM = 0
_PATIENCE = 20_000


class Split(NamedTuple):
    """Problems to train on and problems to judge by; columns ``prompt``, ``solution`` (a right response) and what the reward reads."""

    train: Dataset
    held_out: Dataset


def is_held_out(problem: str) -> bool:
    """Whether a problem belongs to the held-out fifth: a property of its text alone."""
    digest = hashlib.sha256(problem.encode()).digest()
    return int.from_bytes(digest[:8]) < HELD_OUT_SHARE * 2**64


def reasoning_gym_split(
    task: str,
    *,
    train: int,
    held_out: int,
    seed: int = 0,
    style: PromptStyle = "compact",
    difficulty: Mapping[str, Any] | None = None,
) -> Split:
    """``train`` problems drawn with ``seed`` and ``held_out`` others, which do not depend on it; all distinct.

    ``difficulty`` holds options of the task's configuration in reasoning-gym, such as ``max_terms``.
    """
    form = _form(task)
    if train < 1 or held_out < 1 or seed < 0:
        raise InvalidInputError("task", "expected at least one problem on each side, and a seed that is not negative")
    made = dict(difficulty or {})

    def side(count: int, stream: int, *, held: bool) -> Dataset:
        found: dict[str, Entry] = {}
        for drawn, entry in enumerate(_entries(task, stream, made)):
            if len(found) == count:
                break
            if drawn - len(found) > _PATIENCE:
                raise InvalidInputError("task", f"{task} has too few distinct problems: {len(found)} found of {count}")
            problem = form.prompt(entry)
            if is_held_out(problem) == held:
                found.setdefault(problem, entry)
        return Dataset.from_list([_row(form, entry, style) for entry in found.values()])

    return Split(side(train, seed + 1, held=False), side(held_out, _HELD_OUT_STREAM, held=True))


def _form(task: str) -> CompactForm:
    if task not in COMPACT:
        raise InvalidInputError("task", f"expected one of {', '.join(COMPACT)}; found {task}")
    return COMPACT[task]


def _generator(task: str, seed: int, difficulty: dict[str, Any]) -> Any:
    import reasoning_gym  # a second, which only those pay who use it

    try:
        return reasoning_gym.create_dataset(task, seed=seed, size=_STREAM, **difficulty)
    except (AssertionError, TypeError) as error:
        raise InvalidInputError("difficulty", f"{task} refuses {difficulty}: {error}") from error


def _entries(task: str, stream: int, difficulty: dict[str, Any]) -> Iterator[Entry]:
    problems = _generator(task, stream * _STREAM, difficulty)
    return (json.loads(json.dumps(problems[i])) for i in range(_STREAM))


def _row(form: CompactForm, entry: Entry, style: PromptStyle) -> dict[str, Any]:
    """A problem in the columns that TRL reads; the entry travels as JSON, for metadata differ from row to row."""
    text, kept = entry["question"].strip(), json.dumps(entry)
    if style == "compact":
        return {"prompt": form.prompt(entry), "solution": form.solution(entry), "entry": kept}
    answer = f"<answer>{entry['answer']}</answer>"
    if style == "full":
        return {"prompt": f"{INSTRUCTION}\n\n{text}\n", "solution": answer, "entry": kept}
    messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": text}]
    return {"prompt": messages, "solution": [{"role": "assistant", "content": answer}], "entry": kept}


# -- rewards -------------------------------------------------------------------------------------------------


def response_text(completion: str | list[dict[str, Any]]) -> str:
    """What the model wrote, given as text or as messages."""
    return completion if isinstance(completion, str) else "".join(turn["content"] or "" for turn in completion)


def is_right(task: str, response: str, entry: Entry, *, style: PromptStyle = "compact") -> bool:
    """Whether the official score of a response is exactly 1."""
    answer = _form(task).read(response.strip()) if style == "compact" else _between_tags(response)
    if not answer:
        return False
    numbers = entry["metadata"].get("numbers", [])
    if task == "countdown" and not makes_target(answer, numbers, entry["metadata"]["target"]):
        return False
    return float(_scorer(task).score_answer(answer, entry)) == 1.0


def _between_tags(response: str) -> str | None:
    """What stands between the last pair of tags."""
    before, closing, _ = response.rpartition("</answer>")
    _, opening, answer = before.rpartition("<answer>")
    return answer.strip() if opening and closing else None


_scorers: dict[str, Any] = {}


def _scorer(task: str) -> Any:
    if task not in _scorers:
        _scorers[task] = _generator(task, 0, {})
    return _scorers[task]


def reasoning_gym_reward(task: str, style: PromptStyle = "compact") -> Reward:
    """The reward of a task in TRL's convention; it reads the column ``entry``."""
    _form(task)

    def right_answer(prompts: Sequence[Any], completions: Sequence[Any], entry: Sequence[str], **_: Any) -> list[float]:
        pairs = zip(completions, entry, strict=True)
        return [float(is_right(task, response_text(text), json.loads(kept), style=style)) for text, kept in pairs]

    return right_answer
