"""Reading JSON strictly: every value knows its path, and a wrong one is refused with the path and what was expected there."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tbrm_theory.errors import InvalidInputError

__all__ = ["Field", "read_json"]


def read_json(path: str | Path) -> Field:
    """Parse a UTF-8 JSON file; refuse duplicate keys, ``NaN`` and ``Infinity``, which JSON does not have.

    Raises:
        InvalidInputError: the file is not JSON; the message names the file, line and column.
        OSError: the file cannot be read.
    """
    name = str(path)

    def refuse_constant(constant: str) -> NoReturn:
        raise InvalidInputError(name, f"{constant} is not a JSON number")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise InvalidInputError(name, f"the key {key!r} appears twice in one object")
            found[key] = value
        return found

    try:
        text = Path(path).read_text(encoding="utf-8")
        return Field("", json.loads(text, parse_constant=refuse_constant, object_pairs_hook=unique))
    except UnicodeDecodeError as error:
        raise InvalidInputError(name, f"not a UTF-8 text file ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise InvalidInputError(
            name, f"not valid JSON, line {error.lineno} column {error.colno}: {error.msg}"
        ) from error
    except RecursionError as error:
        raise InvalidInputError(name, "nested too deeply to be an instance") from error


@dataclass(frozen=True)
class Field:
    """A JSON value and where it stands, e.g. ``layers[1].reward[0][2]``."""

    path: str
    value: Any

    def refuse(self, expected: str) -> NoReturn:
        shown = "null" if self.value is None else repr(self.value)
        found = shown if len(shown) <= 60 else shown[:57] + "…"
        raise InvalidInputError(self.path or "the document", f"expected {expected}, found {found}")

    def __getitem__(self, key: str) -> Field:
        """The entry ``key`` of an object; refused when absent."""
        mapping = self.mapping()
        if key not in mapping:
            raise InvalidInputError(self._below(key), "missing")
        return mapping[key]

    def _below(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def mapping(self) -> dict[str, Field]:
        if not isinstance(self.value, dict):
            self.refuse("an object")
        return {key: Field(self._below(key), value) for key, value in self.value.items()}

    def only(self, *keys: str) -> None:
        """Refuse any key not listed: a misspelt optional key would otherwise be ignored in silence."""
        for key, field in self.mapping().items():
            if key not in keys:
                raise InvalidInputError(field.path, f"unknown key; expected one of {', '.join(keys)}")

    def items(self, length: int | None = None, of: str = "entries") -> list[Field]:
        """The entries of a non-empty list, of exactly ``length`` when given."""
        if not isinstance(self.value, list):
            self.refuse(f"a list of {of}")
        if length is not None and len(self.value) != length:
            raise InvalidInputError(self.path, f"expected {length} {of}, found {len(self.value)}")
        if not self.value:
            raise InvalidInputError(self.path, f"expected at least one of {of}, found an empty list")
        return [Field(f"{self.path}[{i}]", value) for i, value in enumerate(self.value)]

    def __iter__(self) -> Iterator[Field]:
        return iter(self.items())

    def number(self) -> float:
        """A finite double; an integer is one, ``true`` is not."""
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            self.refuse("a number")
        try:
            number = float(self.value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            self.refuse("a number that a double can hold")
        return number

    def probability(self) -> float:
        number = self.number()
        if number < 0:
            self.refuse("a probability, which is not negative")
        return number

    def index(self, size: int, of: str) -> int:
        """An integer in ``0 … size-1``."""
        if isinstance(self.value, bool) or not isinstance(self.value, int):
            self.refuse(f"the index of a {of}, an integer")
        if not 0 <= self.value < size:
            self.refuse(f"the index of a {of}, from 0 to {size - 1}")
        return int(self.value)

    def text(self) -> str:
        if not isinstance(self.value, str):
            self.refuse("a string")
        return self.value

    @property
    def is_null(self) -> bool:
        return self.value is None
