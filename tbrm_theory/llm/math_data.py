"""Problems with a known final answer, such as DAPO-17k: a data set of the Hugging Face hub, or a local JSONL or Parquet file.

A bad row is refused by its number. The hub's DAPO-Math-17k holds each problem about a hundred times; repeated problems are
dropped, whatever the white space, and so is a problem that comes with two answers; what it says about the form of the answer gives
way to the instruction of this project's verifier. What is held out is decided by a hash of the
problem, for the reasons given in :mod:`tbrm_theory.llm.tasks`: no held-out problem is ever trained on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.llm.tasks import PromptStyle, Split

__all__ = ["BOXED_INSTRUCTION", "math_split"]

BOXED_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
_OF_DAPO = re.compile(
    r"\A(Solve the following math problem step by step\.\s*)?The last line of your response should be of the form Answer:"
    r".*?is the answer to the problem\.\s*|\s*Remember to put your answer on its own line after \"Answer:\"\.?\Z",
    re.DOTALL,
)
"""What DAPO-Math-17k writes before and behind every problem."""
Row = dict[str, Any]
logger = logging.getLogger(__name__)


def math_split(
    source: str,
    *,
    held_out: int,
    prompt_column: str = "prompt",
    answer_column: str = "reward_model.ground_truth",
    style: PromptStyle = "chat",
    hub_split: str = "train",
) -> Split:
    """All problems of ``source``, ``held_out`` of them held out.

    Args:
        source: a path that ends in ``.jsonl`` or ``.parquet``, or a name on the hub.
        held_out: how many problems are kept for judging: those with the smallest hash, in any order of the rows.
        prompt_column: where the problem stands, as text or as messages of which the last one is taken.
        answer_column: where its answer stands; a dot leads into a nested column.
        style: ``chat`` or ``full``.
        hub_split: which part of a data set on the hub.
    """
    if style == "compact":
        raise InvalidInputError("style", "problems in prose have no compact form; expected chat or full")
    found: dict[str, tuple[str, str]] = {}
    contradicted: set[str] = set()
    for where, row in _rows(source, hub_split):
        problem, answer = _OF_DAPO.sub("", _text(row, prompt_column, where)), _text(row, answer_column, where)
        if not problem.strip():
            raise InvalidInputError(f"{where}.{prompt_column}", "expected a problem beside the instructions")
        key = " ".join(problem.split())
        if found.setdefault(key, (problem, answer))[1] != answer:
            contradicted.add(key)
    if contradicted:
        logger.warning("%s: %d problems with two answers left out, as %r", source, len(contradicted), min(contradicted))
    for key in contradicted:
        del found[key]
    if not 1 <= held_out < len(found):
        raise InvalidInputError("held_out", f"expected 1 to {len(found) - 1}: {source} has {len(found)} problems")
    order = sorted(found, key=lambda problem: hashlib.sha256(problem.encode()).digest())
    judged = set(order[:held_out])
    sides = [[_row(*found[key], style) for key in found if (key in judged) == side] for side in (False, True)]
    return Split(*map(Dataset.from_list, sides))


def _rows(source: str, hub_split: str) -> Iterator[tuple[str, Row]]:
    """The rows, each with how to call it in an error."""
    path = Path(source)
    if path.suffix == ".jsonl":
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InvalidInputError(f"{source}:{number}", f"not JSON: {error}") from error
            if not isinstance(row, dict):
                raise InvalidInputError(f"{source}:{number}", "expected a JSON object")
            yield f"{source}:{number}", row
        return
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            rows: Any = pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.ArrowInvalid as error:
            raise InvalidInputError(source, f"not Parquet: {error}") from error
    else:
        rows = load_dataset(source, split=hub_split)
    for number, row in enumerate(rows, start=1):
        yield f"{source}, row {number}", row


def _text(row: Row, column: str, where: str) -> str:
    value: Any = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise InvalidInputError(f"{where}.{column}", "expected text, or messages, that are not empty")
    return value.strip()


def _row(problem: str, answer: str, style: PromptStyle) -> Row:
    text = f"{problem}\n\n{BOXED_INSTRUCTION}"
    response = f"\\boxed{{{answer}}}"
    if style == "full":
        return {"prompt": f"{text}\n", "solution": response, "answer": answer}
    messages, solved = [{"role": "user", "content": text}], [{"role": "assistant", "content": response}]
    return {"prompt": messages, "solution": solved, "answer": answer}
