"""Expressions that a model wrote, evaluated as arithmetic and as nothing else.

reasoning-gym's scorer of ``countdown`` hands the model's text to sympy, which runs it as Python, and finds the numbers that were used
by searching that text: ``4+6+0xe`` makes 24 of 4 and 6, and a call of any function makes anything. Here only integers in decimal,
``+ - * /``, a sign and brackets exist, and the numbers that are counted are those that are computed with.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

__all__ = ["evaluate_expression", "makes_target"]

_LONGEST = 200
_ALLOWED = re.compile(r"[0-9+\-*/() ]+")
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def evaluate_expression(text: str) -> tuple[Fraction, list[int]] | None:
    """The exact value of an expression and the integers in it, in their order; ``None`` if it is none or has no value."""
    if len(text) > _LONGEST or not _ALLOWED.fullmatch(text):
        return None
    numbers: list[int] = []

    def value(node: ast.expr) -> Fraction:
        match node:
            case ast.Constant(value=int(number)):
                numbers.append(number)
                return Fraction(number)
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                return -value(inner)
            case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _OPERATORS:
                return _OPERATORS[type(sign)](value(left), value(right))
        raise ValueError("not arithmetic")

    try:
        return value(ast.parse(text.strip(), mode="eval").body), numbers
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def makes_target(text: str, numbers: list[int], target: int) -> bool:
    """Whether an expression is worth ``target`` and uses each of ``numbers`` once, and nothing else."""
    found = evaluate_expression(text)
    return found is not None and found[0] == target and sorted(found[1]) == sorted(numbers)
