"""Instance files as JSON data, ways to change them, and what they mean to ``reference.py``; nothing of the package.

``plain`` reads a document by the letter of the file format, so that tests of ``tbrm evaluate`` share no code with it.
"""

from __future__ import annotations

import copy
import random
from collections import defaultdict
from typing import Any

from tests.reference import PlainMDP, Table

# Every kind of transition, ragged layers, and actions that do not exist: action 2 of state 0 in layer 0 and
# action 0 of state 1 in layer 2.
PROBLEM: dict[str, Any] = {
    "format": "tbrm-instance",
    "version": 1,
    "beta": 0.5,
    "initial": [0.25, 0.75],
    "layers": [
        {
            "reward": [[0.0, 1.0, None], [-2.5]],
            "reference": [[0.3, 0.7, 0.0], [1.0]],
            "transition": {"kind": "deterministic", "next_state": [[0, 1, None], [1]]},
        },
        {
            "reward": [[0.5, 0], [0.1, 0.2]],
            "reference": [[0.5, 0.5], [0.9, 0.1]],
            "transition": {
                "kind": "sparse",
                "state": [0, 0, 1, 1, 1, 0],
                "action": [0, 1, 0, 1, 1, 0],
                "next_state": [2, 1, 0, 0, 2, 1],
                "probability": [0.2, 1.0, 1.0, 0.1, 0.9, 0.8],
            },
        },
        {
            "reward": [[1.0, 2.0], [9.0, 0.25], [0.0]],
            "reference": [[0.5, 0.5], [0.0, 1.0], [1.0]],
            "transition": {
                "kind": "dense",
                "probabilities": [[[0.1, 0.9], [1.0, 0.0]], [None, [0.5, 0.5]], [[0.25, 0.75]]],
            },
        },
        {"reward": [[1.0], [2.0, 3.0, 4.0]], "reference": [[1.0], [0.2, 0.3, 0.5]], "transition": None},
    ],
}


class REMOVED:
    """Stands for an entry that is taken out."""


def short_name(part: Any) -> str:
    """The name of a parameter in a test's name, the same in every process."""
    return str(getattr(part, "__name__", part))[:40]


def changed(document: dict[str, Any], keys: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """A copy with the entry at ``keys`` replaced, removed, or, by a function, computed from the old one."""
    result = copy.deepcopy(document)
    parent: Any = result
    for key in keys[:-1]:
        parent = parent[key]
    if value is REMOVED:
        del parent[keys[-1]]
    else:
        parent[keys[-1]] = value(parent[keys[-1]]) if callable(value) else value
    return result


def longer(entries: list[Any]) -> list[Any]:
    return [*entries, entries[-1]]


def shorter(entries: list[Any]) -> list[Any]:
    return entries[:-1]


# Layers 0 and 3 are ragged; action 2 of state 0 in layer 0 and action 0 of state 1 in layer 2 do not exist.
INSTANCE: dict[str, Any] = {
    **PROBLEM,
    "policies": {
        "mu": [
            [[0.1, 0.9, 0.0], [1.0]],
            [[0.3, 0.7], [1.0, 0.0]],
            [[1 / 3, 2 / 3], [0.0, 1.0], [1.0]],
            [[1.0], [0.2, 0.3, 0.5]],
        ],
        "stray": [  # takes both actions that do not exist
            [[0.1, 0.7, 0.2], [1.0]],
            [[0.3, 0.7], [1.0, 0.0]],
            [[0.5, 0.5], [0.25, 0.75], [1.0]],
            [[1.0], [0.2, 0.3, 0.5]],
        ],
    },
    "mixtures": {
        "replay": [[0.25, "mu"], [0.75, "reference"]],
        "thirds": [[1 / 3, "mu"], [1 / 3, "optimal"], [1 / 3, "mu"]],
    },
    "logits": {
        "theta": [
            [[0.1, -0.2, None], [3.0]],
            [[0, 1e9], [-1.5, 2.0]],
            [[0.0, 0.0], [7.0, 1.0], [0.5]],  # the 7.0 is of no action
            [[1.0], [0.2, 0.3, 0.5]],
        ]
    },
}


# -- what a document means ---------------------------------------------------------------------------------


def plain(document: dict[str, Any]) -> PlainMDP:
    """The problem of a document, as `reference.py` takes it."""
    layers = document["layers"]
    return PlainMDP(
        beta=document["beta"],
        initial=document["initial"],
        reward=[numbers(layer["reward"]) for layer in layers],
        reference=[layer["reference"] for layer in layers],
        successors=[successors(layer["transition"], layer["reference"]) for layer in layers[:-1]],
    )


def numbers(rows: list[list[float | None]]) -> list[list[float]]:
    """Rows with 0 for `null`, which stands where an action does not exist."""
    return [[0.0 if entry is None else entry for entry in row] for row in rows]


def logits_of(document: dict[str, Any], name: str) -> Table:
    return [numbers(layer) for layer in document["logits"][name]]


def successors(transition: dict[str, Any], reference: list[list[float]]) -> list[list[dict[int, float]]]:
    """`[s][a] -> {s': p}` of a transition of any kind."""
    found: list[list[dict[int, float]]] = [[defaultdict(float) for _ in row] for row in reference]
    for s, row in enumerate(reference):
        for a, exists in enumerate(row):
            if exists and transition["kind"] == "deterministic":
                found[s][a][transition["next_state"][s][a]] = 1
            if exists and transition["kind"] == "dense":
                found[s][a].update(enumerate(transition["probabilities"][s][a]))
    if transition["kind"] == "sparse":
        columns = (transition[name] for name in ("state", "action", "next_state", "probability"))
        for s, a, next_state, probability in zip(*columns, strict=True):
            found[s][a][next_state] += probability
    return found


# -- random documents --------------------------------------------------------------------------------------


def simplex(draw: random.Random, size: int) -> list[float]:
    weights = [draw.expovariate(1) + 0.01 for _ in range(size)]
    return [weight / sum(weights) for weight in weights]


def random_document(
    seed: int,
    kind: str,
    *,
    beta: float = 0.7,
    missing: float = 0.3,
    ragged: bool = True,
    sizes: tuple[int, ...] = (2, 3, 2),
) -> dict[str, Any]:
    """A problem with `len(sizes)` layers of those many states, two policies, two mixtures and logits.

    Action 0 always exists, and every other does not with probability `missing`. The last state of layer 0 is no start.
    """
    draw = random.Random(seed)
    layers: list[dict[str, Any]] = []
    for h, states in enumerate(sizes):
        rows = [draw.randint(1, 3) if ragged else 3 for _ in range(states)]
        exists = [[a == 0 or draw.random() >= missing for a in range(count)] for count in rows]
        reference = [spread(draw, row) for row in exists]
        reward = [[draw.gauss(0, 1) if here else None for here in row] for row in exists]
        following = None if h == len(sizes) - 1 else random_transition(draw, kind, exists, sizes[h + 1])
        layers.append({"reward": reward, "reference": reference, "transition": following})
    shape = [layer["reference"] for layer in layers]
    starts = simplex(draw, sizes[0] - 1)
    return {
        "format": "tbrm-instance",
        "version": 1,
        "beta": beta,
        "initial": [*starts, 0.0],
        "layers": layers,
        "policies": {
            "full": [[spread(draw, [p > 0 for p in row]) for row in rows] for rows in shape],
            "narrow": [[spread(draw, only_one(draw, row)) for row in rows] for rows in shape],
        },
        "mixtures": {
            "replay": [[0.3, "full"], [0.7, "narrow"]],
            "all": [[0.25, "reference"], [0.25, "optimal"], [0.5, "full"]],
        },
        "logits": {
            "theta": [[[draw.gauss(0, 1) if p else None for p in row] for row in rows] for rows in shape],
            "ignored": [[[draw.gauss(0, 3) for _ in row] for row in rows] for rows in shape],
        },
    }


def spread(draw: random.Random, on: list[bool]) -> list[float]:
    """Random probabilities on the given cells, 0 elsewhere."""
    masses = iter(simplex(draw, sum(on)))
    return [next(masses) if here else 0.0 for here in on]


def only_one(draw: random.Random, reference: list[float]) -> list[bool]:
    chosen = draw.choice([a for a, p in enumerate(reference) if p > 0])
    return [a == chosen for a in range(len(reference))]


def random_transition(draw: random.Random, kind: str, exists: list[list[bool]], next_states: int) -> dict[str, Any]:
    if kind == "deterministic":
        rows = [[draw.randrange(next_states) if here else None for here in row] for row in exists]
        return {"kind": kind, "next_state": rows}
    if kind == "dense":
        table = [[simplex(draw, next_states) if here else None for here in row] for row in exists]
        return {"kind": kind, "probabilities": table}
    entries = [
        (s, a, draw.randrange(next_states), probability)
        for s, row in enumerate(exists)
        for a, here in enumerate(row)
        for probability in (simplex(draw, 3) if here else [])
    ]
    draw.shuffle(entries)
    columns = [list(column) for column in zip(*entries, strict=True)]
    return {"kind": kind, **dict(zip(("state", "action", "next_state", "probability"), columns, strict=True))}
