"""Three verifiable token tasks: modular arithmetic, balanced brackets, shortest paths.

A checker reads strings alone: everything that decides whether a response is correct stands in the prompt. The
tasks serve a language model as they are; the families of the same names are their problems.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import chain, combinations, pairwise
from typing import Annotated

import torch

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.random_tables import ReferenceKind, draw_reference, draw_subset, seeded
from tbrm_theory.registry import Count, Interval, Temperature, family
from tbrm_theory.token_tasks import TokenTask, check_size, token_task_mdp

__all__ = [
    "END",
    "balanced_brackets_task",
    "is_balanced",
    "is_right_sum",
    "is_shortest_path",
    "modular_arithmetic_task",
    "shortest_path_task",
]

END = "<end>"
_LARGEST_MODULUS = 1_000_000


def _family_problem(task: TokenTask, seed: int, beta: float, kind: ReferenceKind) -> RegularizedMDP:
    check_size(task)
    every = [torch.ones(task.unfinished(h), len(task.vocabulary), dtype=torch.bool) for h in range(task.horizon)]
    generator = seeded(seed)
    return token_task_mdp(task, beta=beta, reference=[draw_reference(kind, table, generator) for table in every])


def _check_between(low: int, value: int, high: int, where: str) -> None:
    if not low <= value <= high:
        raise InvalidInputError(where, f"expected an integer from {low} to {high}, found {value}")


def _checked_horizon(horizon: int | None, longest: int, name: str) -> int:
    """The horizon, by default just what the longest right answer and its ending token need."""
    if horizon is not None and horizon < longest + 1:
        raise InvalidInputError(f"{name}.horizon", f"expected at least {longest + 1}, for the longest right answer")
    return horizon or longest + 1


# -- modular arithmetic --------------------------------------------------------------------------------------


def modular_arithmetic_task(seed: int, *, modulus: int = 5, prompts: int = 4, horizon: int | None = 3) -> TokenTask:
    """Prompts such as ``3+4 mod 5``, drawn with ``seed``; the answer in decimal, without leading zeros."""
    _check_between(1, modulus, _LARGEST_MODULUS, "modular-arithmetic.modulus")
    _check_between(1, prompts, modulus**2, "modular-arithmetic.prompts")
    chosen = draw_subset((prompts,), modulus**2, seeded(seed)).sort().values.tolist()
    return TokenTask(
        vocabulary=(*map(str, range(min(modulus, 10))), END),
        prompts=tuple(f"{k // modulus}+{k % modulus} mod {modulus}" for k in chosen),
        horizon=_checked_horizon(horizon, len(str(modulus - 1)), "modular-arithmetic"),
        checker=is_right_sum,
    )


def is_right_sum(prompt: str, response: tuple[str, ...]) -> bool:
    """Whether ``response`` is the answer to a prompt such as ``3+4 mod 5``."""
    total, _, modulus = prompt.partition(" mod ")
    return "".join(response) == str(sum(map(int, total.split("+"))) % int(modulus))


@family("modular-arithmetic", deterministic=True)
def modular_arithmetic(
    seed: int,
    *,
    modulus: Annotated[int, Interval(1, _LARGEST_MODULUS)] = 5,
    prompts: Count = 4,
    horizon: Count | None = 3,
    beta: Temperature = 0.2,
    reference: ReferenceKind = "uniform",
) -> RegularizedMDP:
    """Token task: answer 3+4 mod 5 in digits, then end; 1 if correct. The horizon leaves room to ramble."""
    task = modular_arithmetic_task(seed, modulus=modulus, prompts=prompts, horizon=horizon)
    return _family_problem(task, seed, beta, reference)


# -- balanced brackets ---------------------------------------------------------------------------------------

_CLOSING = {"(": ")", "[": "]", "{": "}"}


def balanced_brackets_task(*, pairs: int = 3, kinds: int = 1, horizon: int | None = None) -> TokenTask:
    """A prompt for every length up to ``pairs`` pairs and every depth it allows: ``length 4, depth 2``."""
    _check_between(1, kinds, len(_CLOSING), "balanced-brackets.kinds")
    return TokenTask(
        vocabulary=(*chain.from_iterable(list(_CLOSING.items())[:kinds]), END),
        prompts=tuple(f"length {2 * n}, depth {d}" for n in range(1, pairs + 1) for d in range(1, n + 1)),
        horizon=_checked_horizon(horizon, 2 * pairs, "balanced-brackets"),
        checker=is_balanced,
    )


def is_balanced(prompt: str, response: tuple[str, ...]) -> bool:
    """Whether ``response`` is balanced, and of the length and nesting depth that ``prompt`` asks for."""
    length, depth = (int(part.split()[1]) for part in prompt.split(", "))
    awaited: list[str] = []
    deepest = 0
    for bracket in response:
        if bracket in _CLOSING:
            awaited.append(_CLOSING[bracket])
            deepest = max(deepest, len(awaited))
        elif not awaited or awaited.pop() != bracket:
            return False
    return not awaited and len(response) == length and deepest == depth


@family("balanced-brackets", deterministic=True)
def balanced_brackets(
    seed: int,
    *,
    pairs: Count = 3,
    kinds: Annotated[int, Interval(1, 3)] = 1,
    horizon: Count | None = None,
    beta: Temperature = 0.1,
    reference: ReferenceKind = "uniform",
) -> RegularizedMDP:
    """Token task: write balanced brackets of the length and depth asked for, then end; 1 if correct."""
    return _family_problem(balanced_brackets_task(pairs=pairs, kinds=kinds, horizon=horizon), seed, beta, reference)


# -- shortest paths ------------------------------------------------------------------------------------------


def shortest_path_task(
    seed: int, *, nodes: int = 5, density: float = 0.2, prompts: int = 4, horizon: int | None = None
) -> TokenTask:
    """One random connected graph, a prompt for each of some pairs of nodes: ``edges AB, BC; from A to C``.

    The answer lists the nodes after the start. A random tree makes the graph connected, and each further edge
    is there with probability ``density``.
    """
    _check_between(2, nodes, 26, "shortest-path.nodes")
    _check_between(1, prompts, nodes * (nodes - 1), "shortest-path.prompts")
    generator = seeded(seed)
    parents = [int(torch.randint(node, (), generator=generator)) for node in range(1, nodes)]
    tree = {(parent, node) for node, parent in enumerate(parents, start=1)}
    extra = torch.rand(nodes, nodes, generator=generator) < density
    edges = [edge for edge in combinations(range(nodes), 2) if edge in tree or extra[edge]]
    name = [chr(ord("A") + node) for node in range(nodes)]
    listed = ", ".join(name[u] + name[v] for u, v in edges)
    ordered = [(u, v) for u in name for v in name if u != v]
    chosen = draw_subset((prompts,), len(ordered), generator).sort().values.tolist()
    texts = tuple(f"edges {listed}; from {ordered[k][0]} to {ordered[k][1]}" for k in chosen)
    longest = max(_read_graph(text)[2] for text in texts)
    return TokenTask((*name, END), texts, _checked_horizon(horizon, longest, "shortest-path"), is_shortest_path)


def is_shortest_path(prompt: str, response: tuple[str, ...]) -> bool:
    """Whether the nodes of ``response`` lead from the start to the goal of ``prompt`` in the fewest steps."""
    edges, (start, goal), distance = _read_graph(prompt)
    path = (start, *response)
    return path[-1] == goal and len(response) == distance and all(frozenset(step) in edges for step in pairwise(path))


@lru_cache(maxsize=64)
def _read_graph(prompt: str) -> tuple[frozenset[frozenset[str]], tuple[str, str], int]:
    """The edges, start and goal of a prompt, and the distance of these two, by breadth-first search."""
    listed, _, ends = prompt.removeprefix("edges ").partition("; from ")
    start, _, goal = ends.partition(" to ")
    edges = frozenset(map(frozenset, listed.split(", ")))
    reached, steps = {start}, 0
    while goal not in reached:
        reached |= {node for edge in edges if edge & reached for node in edge}
        steps += 1
    return edges, (start, goal), steps


@family("shortest-path", deterministic=True)
def shortest_path(
    seed: int,
    *,
    nodes: Annotated[int, Interval(2, 26)] = 5,
    density: Annotated[float, Interval(0, 1)] = 0.2,
    prompts: Count = 4,
    horizon: Count | None = None,
    beta: Temperature = 0.1,
    reference: ReferenceKind = "uniform",
) -> RegularizedMDP:
    """Token task: name the nodes of a shortest path on a random graph, then end; 1 if correct."""
    task = shortest_path_task(seed, nodes=nodes, density=density, prompts=prompts, horizon=horizon)
    return _family_problem(task, seed, beta, reference)
