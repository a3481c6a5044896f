"""Reading JSON strictly: every value knows its path, and a wrong one is refused with what was expected there.

Writing is atomic: a reader, or a run that is killed, finds the old file or the new one, never half of either.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from tbrm_theory.errors import InvalidInputError

__all__ = ["Field", "parse_json", "path_below", "read_json", "replacement", "write_json"]


def read_json(path: str | Path) -> Field:
    """Parse a UTF-8 JSON file; refuse duplicate keys, ``NaN`` and ``Infinity``, which JSON does not have.

    Raises:
        InvalidInputError: the file is not JSON; the message names the file, line and column.
        OSError: the file cannot be read.
    """
    name = str(path)
    try:
        return Field("", parse_json(Path(path).read_text(encoding="utf-8"), name))
    except UnicodeDecodeError as error:
        raise InvalidInputError(name, f"not a UTF-8 text file ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise InvalidInputError(
            name, f"not valid JSON, line {error.lineno} column {error.colno}: {error.msg}"
        ) from error


def parse_json(text: str, where: str) -> Any:
    """One JSON value, by the rules of :func:`read_json`.

    Raises:
        InvalidInputError: duplicate keys, ``NaN``, ``Infinity``, or nested too deeply; the message begins with ``where``.
        json.JSONDecodeError: any other text that is not JSON.
    """

    def refuse_constant(constant: str) -> NoReturn:
        raise InvalidInputError(where, f"{constant} is not a JSON number")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise InvalidInputError(where, f"the key {key!r} appears twice in one object")
            found[key] = value
        return found

    try:
        return json.loads(text, parse_int=_integer, parse_constant=refuse_constant, object_pairs_hook=unique)
    except RecursionError as error:
        raise InvalidInputError(where, "nested too deeply to be an instance") from error


def write_json(path: str | Path, document: Any) -> None:
    """Write one line of JSON in place of ``path``, atomically: on any failure the old file stays as it was.

    Raises:
        ValueError: the document holds a number that JSON does not have.
        OSError: the file cannot be written.
    """
    text = json.dumps(document, allow_nan=False) + "\n"
    with replacement(path) as file:
        file.write(text)


@contextlib.contextmanager
def replacement(path: str | Path, *, binary: bool = False) -> Iterator[IO[Any]]:
    """A new file that takes the place of ``path`` when the block ends; if it fails, the old one stays as it was.

    Raises:
        OSError: the file cannot be written.
    """
    target = Path(path).resolve()  # through a symbolic link, not in place of it
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb" if binary else "x", encoding=None if binary else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _integer(digits: str) -> int | float:
    """Python reads no integer of thousands of digits; it is ``inf`` here, and refused where it stands."""
    return int(digits) if len(digits) < 400 else float(digits)


def path_below(path: str, key: str) -> str:
    """The path of an entry: ``policies.mu``, but ``policies["a.b"]``, so that a path means one thing."""
    if not key.isprintable() or not key or set(key) & set('.[]" '):
        return f"{path}[{json.dumps(key)}]"
    return f"{path}.{key}" if path else key


@dataclass(frozen=True)
class Field:
    """A JSON value and where it stands, e.g. ``layers[1].reward[0][2]``."""

    path: str
    value: Any

    def refuse(self, expected: str) -> NoReturn:
        match self.value:
            case dict():
                found = "an object"
            case list():
                found = f"a list of {len(self.value)}"
            case _:
                shown = json.dumps(self.value, ensure_ascii=False)
                found = shown if len(shown) <= 60 else shown[:57] + "…"
        raise InvalidInputError(self.path or "the document", f"expected {expected}, found {found}")

    def __getitem__(self, key: str) -> Field:
        """The entry ``key`` of an object; refused when absent."""
        mapping = self.mapping()
        if key not in mapping:
            raise InvalidInputError(path_below(self.path, key), "missing")
        return mapping[key]

    def mapping(self) -> dict[str, Field]:
        if not isinstance(self.value, dict):
            self.refuse("an object")
        return {key: Field(path_below(self.path, key), value) for key, value in self.value.items()}

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
