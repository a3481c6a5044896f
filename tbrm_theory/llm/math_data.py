"""Problems with a known final answer, such as DAPO-17k: a data set of the Hugging Face hub, or a local JSONL or Parquet file.

A bad row is refused by its number. The hub's DAPO-Math-17k holds each problem about a hundred times; repeated problems are dropped,
whatever the white space. What is held out is decided by a hash of the problem (:func:`tbrm_theory.llm.tasks.is_held_out`'s reason), so
that no held-out problem is ever trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.llm.tasks import PromptStyle, Split

__all__ = ["BOXED_INSTRUCTION", "math_split"]

BOXED_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
Row = dict[str, Any]


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
    for where, row in _rows(source, hub_split):
        problem, answer = _text(row, prompt_column, where), _text(row, answer_column, where)
        known = found.setdefault(" ".join(problem.split()), (problem, answer))
        if known[1] != answer:
            raise InvalidInputError(f"{where}.{answer_column}", f"{answer!r}, but {known[1]!r} where it stood before")
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
