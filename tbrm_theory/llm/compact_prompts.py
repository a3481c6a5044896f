"""reasoning-gym problems in a few characters, for models that are too small to read prose.

A compact prompt holds all that decides the answer and ends in ``=``: ``4-1-7=``, ``gcd(12,18)=``, ``3,5,8>16=``. What follows is the
answer in as few characters, which is translated into the notation of the official scorer; anything else translates into nothing. What
has no order (numbers to choose from, prerequisites, families) is sorted, so that two prompts are equal if the two problems are.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tbrm_theory.errors import InvalidInputError

__all__ = ["COMPACT", "CompactForm", "Entry"]

Entry = dict[str, Any]
"""A problem of reasoning-gym: ``question``, ``answer`` and ``metadata``."""

_MOVES = {"U": "up", "D": "down", "L": "left", "R": "right"}
_SIGNS = {"add": "+", "subtract": "-", "multiply": "*"}
_STORY = re.compile(r"(\w+) is married to (\w+)\.(?: They have (?:a child|children) called ([^.]+)\.)?")


@dataclass(frozen=True)
class CompactForm:
    """How a task is written compactly, and how an answer is read.

    ``prompt`` and ``solution`` take an entry; ``answer`` is the pattern of a well-formed response, ``official`` that response in the
    scorer's notation.
    """

    prompt: Callable[[Entry], str]
    answer: re.Pattern[str]
    solution: Callable[[Entry], str] = lambda entry: entry["answer"]
    official: Callable[[str], str] = lambda answer: answer

    def read(self, response: str) -> str | None:
        """A response in the notation of the official scorer; ``None`` where it is malformed."""
        return self.official(response) if self.answer.fullmatch(response) else None


def _courses(entry: Entry) -> str:
    """``3:0<1,1<2=``: of three courses, 0 comes before 1 and 1 before 2."""
    meta = entry["metadata"]
    order = sorted((before, course) for course, before in meta["prerequisites"])
    return f"{len(meta['courses'])}:" + ",".join(f"{before}<{course}" for before, course in order) + "="


def _family(entry: Entry) -> str:
    """``Bob+Ann>Cid,Dan;Dan+Eva>Fay;Ann?Fay=``: couples and their children, and who is what to whom.

    The metadata name the two people alone; the family stands in the question only.
    """
    story, _, _ = entry["question"].partition("\n\n")
    couples = []
    for one, other, children in _STORY.findall(story):
        names = sorted(re.split(", | and ", children)) if children else []
        couples.append(f"{one}+{other}" + (">" + ",".join(names) if names else ""))
    if _STORY.sub("", story).strip():
        raise InvalidInputError("entry.question", f"not the story of a family: {story!r}")
    return ";".join(sorted(couples)) + f";{entry['metadata']['person1']}?{entry['metadata']['person2']}="


def _rows(table: list[list[Any]]) -> str:
    return "/".join("".join(map(str, row)) for row in table) + "="


def _lock(entry: Entry) -> str:
    """``0r>8 A-2g B+2 C+1r=``: from 0, in red light, to 8; A subtracts 2 when green, B adds 2 always."""
    meta = entry["metadata"]
    light = {"red": "r", "green": "g", "any": ""}
    buttons = [f"{b['name']}{_SIGNS[b['type']]}{b['value']}{light[b['active_state']]}" for b in meta["buttons"]]
    start = f"{meta['initial_value']}{light[meta['initial_state']]}>{meta['target_value']}"
    return f"{start} {' '.join(buttons)}="


def _numbers(entry: Entry) -> str:
    return ",".join(map(str, sorted(entry["metadata"]["numbers"])))


def _expression(entry: Entry) -> str:
    return entry["metadata"]["expression"].replace(" ", "") + "="


_INTEGER = re.compile(r"-?[0-9]+")

COMPACT: dict[str, CompactForm] = {
    "course_schedule": CompactForm(
        prompt=_courses,
        answer=re.compile("[TF]"),
        solution=lambda entry: entry["answer"][0],
        official=lambda answer: {"T": "True", "F": "False"}[answer],
    ),
    "family_relationships": CompactForm(prompt=_family, answer=re.compile("[a-z-]+")),
    "largest_island": CompactForm(prompt=lambda entry: _rows(entry["metadata"]["grid"]), answer=_INTEGER),
    "quantum_lock": CompactForm(
        prompt=_lock,
        answer=re.compile("[ABC]+"),
        solution=lambda entry: "".join(entry["metadata"]["solution_path"]),
        official=" → ".join,
    ),
    "shortest_path": CompactForm(
        prompt=lambda entry: _rows(entry["metadata"]["matrix"]),
        answer=re.compile("-|[UDLR]+"),
        solution=lambda entry: "".join(move[0].upper() for move in entry["metadata"]["solution"]) or "-",
        official=lambda answer: "infeasible" if answer == "-" else " ".join(_MOVES[move] for move in answer),
    ),
    "chain_sum": CompactForm(prompt=_expression, answer=_INTEGER),
    "gcd": CompactForm(prompt=lambda entry: f"gcd({_numbers(entry)})=", answer=_INTEGER),
    "basic_arithmetic": CompactForm(prompt=_expression, answer=_INTEGER),
    "countdown": CompactForm(
        prompt=lambda entry: f"{_numbers(entry)}>{entry['metadata']['target']}=",
        answer=re.compile(r"[0-9+*/()-]+"),
        solution=lambda entry: entry["answer"].replace(" ", ""),
    ),
}
"""By reasoning-gym's name: the five tasks of [Y] Table 4, then four of arithmetic."""
