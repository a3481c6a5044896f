"""The one exception for bad input."""

from __future__ import annotations

__all__ = ["InvalidInputError"]


class InvalidInputError(ValueError):
    """Input that breaks a stated assumption; the message names what, where and what was expected.

    ``where`` is the path of the offending field, written as in the instance file:
    ``layers[1].reward[0][2]``.
    """

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}")
        self.where = where
        self.problem = problem

    def __reduce__(self) -> tuple[type[InvalidInputError], tuple[str, str]]:
        return type(self), (self.where, self.problem)
