"""Token tasks: the checkers against brute force, the states against the strings they stand for, the optimum by Gibbs.

Brute force lists all strings and decides by another idea than the checker: it generates the correct ones.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tbrm_theory.dynamic_programming import solve
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.families import make
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.token_tasks import TokenTask, token_task_mdp
from tbrm_theory.transitions import DeterministicTransition
from tbrm_theory.verifiable_tasks import (
    END,
    balanced_brackets_task,
    is_balanced,
    is_right_sum,
    is_shortest_path,
    modular_arithmetic_task,
    shortest_path_task,
)
from tests import reference as rf
from tests.convert import plain

approx = pytest.approx

TASKS: dict[str, Callable[[], TokenTask]] = {
    "modular-arithmetic": lambda: modular_arithmetic_task(1, modulus=3, prompts=4),
    "balanced-brackets": lambda: balanced_brackets_task(pairs=2),
    "shortest-path": lambda: shortest_path_task(1, nodes=4, prompts=3),
}
EVERY_TASK = pytest.mark.parametrize("name", TASKS)


def strings(tokens: str, longest: int) -> Iterator[tuple[str, ...]]:
    """All strings of at most ``longest`` tokens."""
    for length in range(longest + 1):
        yield from itertools.product(tokens, repeat=length)


def correct_responses(task: TokenTask, longest: int) -> list[tuple[str, set[tuple[str, ...]]]]:
    """For every prompt the strings that the checker accepts."""
    found = []
    for prompt in task.prompts:
        candidates = strings("".join(task.vocabulary[:-1]), longest)
        found.append((prompt, {response for response in candidates if task.checker(prompt, response)}))
    return found


# --- Checkers against brute force -----------------------------------------------------------------------------


@pytest.mark.parametrize("modulus", [1, 2, 7, 11])
def test_sums_have_one_right_answer(modulus: int) -> None:
    """The answer is found by counting up from a, b times; written in decimal digits and no other way."""
    task = modular_arithmetic_task(0, modulus=modulus, prompts=modulus**2, horizon=None)
    assert len(task.prompts) == modulus**2
    clock = list(range(modulus)) * 3
    for prompt, accepted in correct_responses(task, 3):
        a, b = (int(number) for number in prompt.split(" mod ")[0].split("+"))
        assert prompt == f"{a}+{b} mod {modulus}"
        assert accepted == {tuple(str(clock[a + b]))}
    assert task.horizon == len(str(modulus - 1)) + 1


def balanced(pairs: int, kinds: tuple[str, ...]) -> dict[str, int]:
    """Every balanced string of that many pairs with its depth: empty, or ``(inner)rest``."""
    if pairs == 0:
        return {"": 0}
    return {
        kind[0] + inner + kind[1] + rest: max(deep + 1, flat)
        for kind in kinds
        for within in range(pairs)
        for inner, deep in balanced(within, kinds).items()
        for rest, flat in balanced(pairs - 1 - within, kinds).items()
    }


@pytest.mark.parametrize(
    ("pairs", "kinds", "count"), [(4, ("()",), 14), (3, ("()", "[]"), 40), (2, ("()", "[]", "{}"), 18)]
)
def test_brackets_are_those_that_the_grammar_generates(pairs: int, kinds: tuple[str, ...], count: int) -> None:
    """Catalan number × kinds^pairs of the full length, split by depth."""
    task = balanced_brackets_task(pairs=pairs, kinds=len(kinds))
    assert "".join(task.vocabulary[:-1]) == "".join(kinds)
    assert task.prompts == tuple(f"length {2 * n}, depth {d}" for n in range(1, pairs + 1) for d in range(1, n + 1))
    total = 0
    for prompt, accepted in correct_responses(task, 2 * pairs):
        length, depth = (int(word) for word in prompt.replace(",", "").split()[1::2])
        expected = {s for s, d in balanced(length // 2, kinds).items() if d == depth}
        assert {"".join(response) for response in accepted} == expected
        assert expected
        total += len(expected) if length == 2 * pairs else 0
    assert total == count


@pytest.mark.parametrize("seed", range(6))
def test_paths_are_the_shortest_of_all_walks(seed: int) -> None:
    """All walks from the start, by length; the first length that meets the goal is accepted, and every walk of it."""
    nodes = 5
    task = shortest_path_task(seed, nodes=nodes, density=0.3, prompts=20)
    assert len(set(task.prompts)) == 20
    longest = 0
    for prompt, accepted in correct_responses(task, nodes - 1):
        edges, _, ends = prompt.removeprefix("edges ").partition("; from ")
        start, _, goal = ends.partition(" to ")
        steps = {tuple(edge) for pair in edges.split(", ") for edge in (pair, pair[::-1])}
        walks: set[tuple[str, ...]] = {()}
        while not (expected := {walk for walk in walks if (start, *walk)[-1] == goal}):
            walks = {(*walk, v) for walk in walks for u, v in steps if u == (start, *walk)[-1]}
        assert accepted == expected
        longest = max(longest, len(next(iter(expected))))
    assert task.horizon == longest + 1


def test_some_prompt_has_several_shortest_paths() -> None:
    """So that the case of the test above occurred: a square has two ways across."""
    assert is_shortest_path("edges AB, BC, CD, AD; from A to C", ("B", "C"))
    assert is_shortest_path("edges AB, BC, CD, AD; from A to C", ("D", "C"))
    assert not is_shortest_path("edges AB, BC, CD, AD; from A to C", ("C",))
    assert not is_shortest_path("edges AB, BC, CD, AD; from A to B", ("D", "C", "B"))


def test_graphs_are_connected_and_differ() -> None:
    """A tree has n−1 edges; density 1 has all of them."""
    edge_counts = {
        density: {
            task.prompts[0].count(",") + 1
            for task in (shortest_path_task(s, nodes=6, density=density) for s in range(9))
        }
        for density in (0.0, 0.5, 1.0)
    }
    assert edge_counts[0.0] == {5}
    assert edge_counts[1.0] == {15}
    assert len(edge_counts[0.5]) > 2
    assert len({shortest_path_task(s, nodes=6).prompts for s in range(9)}) == 9


@pytest.mark.parametrize(
    ("checker", "prompt", "right", "wrong"),
    [
        (is_right_sum, "3+4 mod 5", "2", ["", "02", "7", "22", "3"]),
        (is_balanced, "length 4, depth 2", "(())", ["()()", "((", "))((", "(()))", "()", ""]),
        (is_balanced, "length 4, depth 2", "([])", ["([)]", "(]])"]),
        (is_shortest_path, "edges AB, BC; from A to C", "BC", ["C", "ABC", "B", "", "BCBC"]),
    ],
)
def test_checkers_on_examples(checker: Any, prompt: str, right: str, wrong: list[str]) -> None:
    assert checker(prompt, tuple(right))
    assert not any(checker(prompt, tuple(response)) for response in wrong)


# --- The tree -------------------------------------------------------------------------------------------------


@EVERY_TASK
def test_states_are_prefixes(name: str) -> None:
    """Layer h has P·C^h unfinished states and P·(C^h−1)/(C−1) finished ones, C = V−1, each a string of its own.

    Walking every sequence of tokens from every prompt meets exactly the states that ``prefix`` names.
    """
    task = TASKS[name]()
    mdp = token_task_mdp(task, beta=0.2)
    prompts, content = len(task.prompts), len(task.vocabulary) - 1
    for h in range(task.horizon):
        finished = prompts * (content**h - 1) // (content - 1) if content > 1 else prompts * h
        assert (task.unfinished(h), task.finished(h)) == (prompts * content**h, finished)
        assert mdp.reward[h].shape == (prompts * content**h + finished, content + 1)
        prefixes = [task.prefix(h, s) for s in range(len(mdp.reward[h]))]
        assert len(set(prefixes)) == len(prefixes)
        assert all(len(tokens) <= h and task.end not in tokens[:-1] for _, tokens in prefixes)
    reached: dict[int, tuple[int, tuple[int, ...]]] = {p: (p, ()) for p in range(prompts)}
    for h, kernel in enumerate(mdp.transitions):
        assert isinstance(kernel, DeterministicTransition)
        assert reached == {s: task.prefix(h, s) for s in range(len(mdp.reward[h]))}
        following = {}
        for s, (prompt, tokens) in reached.items():
            for a in mdp.valid[h][s].nonzero().flatten().tolist():
                target = int(kernel.next_state[s, a])
                assert target not in following  # states never merge
                following[target] = (prompt, tokens if task.end in tokens else (*tokens, a))
        reached = following


@EVERY_TASK
def test_a_finished_response_has_one_action_and_no_reward(name: str) -> None:
    task = TASKS[name]()
    mdp = token_task_mdp(task, beta=0.2)
    for h in range(1, task.horizon):
        ended = [s for s in range(len(mdp.reward[h])) if task.end in task.prefix(h, s)[1]]
        assert len(ended) == task.finished(h)
        assert mdp.valid[h].sum(-1).eq(1).nonzero().flatten().tolist() == ended
        assert mdp.valid[h][ended, task.end].all()
        assert not mdp.reward[h][ended].any()


@EVERY_TASK
def test_reward_is_the_checkers_word_on_the_finished_string(name: str) -> None:
    """On every trajectory; running into the horizon is worth nothing."""
    task = TASKS[name]()
    naive = plain(token_task_mdp(task, beta=0.2))
    outcomes: Counter[tuple[bool, float]] = Counter()
    for trajectory in rf.trajectories(naive):
        prompt, tokens = trajectory[0][0], [a for _, a in trajectory]
        words = [task.vocabulary[token] for token in tokens]
        finished = END in words
        expected = float(finished and task.checker(task.prompts[prompt], tuple(itertools.takewhile(END.__ne__, words))))
        assert rf.table_sum(naive.reward, trajectory) == expected
        assert task.is_correct(prompt, tokens) == bool(expected)
        outcomes[finished, expected] += 1
    assert set(outcomes) == {(False, 0.0), (True, 0.0), (True, 1.0)}
    assert sum(outcomes.values()) == sum(
        len(task.prompts) * task.end**length for length in (*range(task.horizon), task.horizon)
    )


@EVERY_TASK
@pytest.mark.parametrize("kind", ["uniform", "dirichlet"])
def test_optimum_is_the_gibbs_form(name: str, kind: str) -> None:
    """V*(x) = log E_{y~π_ref} exp(r(x,y)/β) (I2), the share of correct responses from enumeration."""
    task = TASKS[name]()
    drawn = [torch.ones(task.unfinished(h), task.end + 1, dtype=torch.float64) for h in range(task.horizon)]
    if kind == "dirichlet":
        generator = torch.Generator().manual_seed(4)
        drawn = [torch.rand(table.shape, generator=generator, dtype=torch.float64) for table in drawn]
    mdp = token_task_mdp(task, beta=0.25, reference=[table / table.sum(-1, keepdim=True) for table in drawn])
    naive = plain(mdp)
    solution = solve(mdp)
    law = rf.trajectory_law(naive, naive.reference)
    for prompt in range(len(task.prompts)):
        correct = math.fsum(p for t, p in law.items() if t[0][0] == prompt and rf.table_sum(naive.reward, t) == 1)
        value = math.log1p(correct * len(task.prompts) * math.expm1(4))
        assert solution.v[0][prompt].item() == approx(value, rel=1e-12)
        assert rf.gibbs_value(naive, 0, prompt) == approx(value, rel=1e-12)
    assert solution.objective.item() == approx(rf.objective(naive, rf.optimal_policy(naive)), rel=1e-10)


@EVERY_TASK
def test_families_are_these_tasks(name: str) -> None:
    options: dict[str, Any] = {
        "modular-arithmetic": {"modulus": 3, "prompts": 4},
        "balanced-brackets": {"pairs": 2},
        "shortest-path": {"nodes": 4, "prompts": 3},
    }[name]
    assert plain(make(name, seed=1, beta=0.2, **options)) == plain(token_task_mdp(TASKS[name](), beta=0.2))


def test_longer_horizon_than_needed() -> None:
    """Room to ramble: the optimum is what counts, and rambling is never right."""
    tight, loose = (make("balanced-brackets", pairs=1, horizon=h, beta=0.2) for h in (None, 5))
    assert (tight.horizon, loose.horizon) == (3, 5)
    assert solve(tight).v[0].tolist() == approx([math.log1p(math.expm1(5) / 27)])
    assert solve(loose).v[0].tolist() == approx([math.log1p(math.expm1(5) / 27)])


# --- For people -----------------------------------------------------------------------------------------------


def test_prefixes_are_readable() -> None:
    task = balanced_brackets_task(pairs=2)

    def text(layer: int, state: int) -> str:
        prompt, tokens = task.prefix(layer, state)
        return f"{task.prompts[prompt]}: {task.decode(tokens)}"

    assert [text(0, s) for s in range(3)] == ["length 2, depth 1: ", "length 4, depth 1: ", "length 4, depth 2: "]
    assert text(2, 5) == "length 4, depth 1: ()"
    assert text(2, task.unfinished(2)) == "length 2, depth 1: <end>"
    assert text(2, task.unfinished(2) + task.finished(2) - 1) == "length 4, depth 2: )<end>"
    assert task.decode([0, 1, task.end, task.end]) == "()<end>"


def test_tasks_are_strings() -> None:
    task = modular_arithmetic_task(0, modulus=5, prompts=4)
    assert task.vocabulary == ("0", "1", "2", "3", "4", "<end>")
    assert task.checker is is_right_sum
    assert modular_arithmetic_task(0, modulus=12, horizon=None).vocabulary == (*"0123456789", "<end>")
    assert modular_arithmetic_task(1).prompts != modular_arithmetic_task(0).prompts


# --- What is refused ------------------------------------------------------------------------------------------


def always(prompt: str, response: tuple[str, ...]) -> bool:
    return True


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabulary": ("a",)}, "vocabulary: expected at least 2 distinct non-empty strings"),
        ({"vocabulary": ("a", "b", "a")}, "vocabulary: expected at least 2 distinct"),
        ({"vocabulary": ("", "b")}, "vocabulary: expected at least 2 distinct"),
        ({"prompts": ()}, "prompts: expected at least 1 distinct"),
        ({"prompts": ("x", "x")}, "prompts: expected at least 1 distinct"),
        ({"horizon": 0}, "horizon: expected at least 1, found 0"),
    ],
)
def test_malformed_tasks_are_refused(changes: dict[str, Any], message: str) -> None:
    sound: dict[str, Any] = {"vocabulary": ("a", END), "prompts": ("x",), "horizon": 2, "checker": always}
    assert TokenTask(**sound).is_correct(0, [1])
    with pytest.raises(InvalidInputError, match=message):
        TokenTask(**(sound | changes))


def test_malformed_references_are_refused() -> None:
    task = TokenTask(("a", "b", END), ("x", "y"), 2, always)
    first, second = (torch.full((n, 3), 1 / 3, dtype=torch.float64) for n in (2, 4))
    assert isinstance(token_task_mdp(task, beta=1.0, reference=[first, second]), RegularizedMDP)
    for reference, message in [
        ([first], "reference: expected 2 layers, found 1"),
        ([first, first], r"reference\[1\]: expected shape \(4, 3\), found \(2, 3\)"),
        ([first, second[:, :2]], r"reference\[1\]: expected shape \(4, 3\), found \(4, 2\)"),
        ([first, 2 * second], r"layers\[1\]\.reference\[0\]: expected probabilities that sum to 1"),
    ]:
        with pytest.raises(InvalidInputError, match=message):
            token_task_mdp(task, beta=1.0, reference=reference)


@pytest.mark.parametrize(("layer", "state"), [(0, 1), (1, 3), (2, 0), (-1, 0), (0, -1)])
def test_states_that_are_not_there_are_refused(layer: int, state: int) -> None:
    task = TokenTask(("a", "b", END), ("x",), 2, always)
    with pytest.raises(InvalidInputError, match=f"there is no state {state}"):
        task.prefix(layer, state)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "modular-arithmetic",
            {"modulus": 2, "prompts": 5},
            "modular-arithmetic.prompts: expected an integer from 1 to 4, found 5",
        ),
        ("modular-arithmetic", {"modulus": 11, "horizon": 2}, "modular-arithmetic.horizon: expected at least 3"),
        ("balanced-brackets", {"pairs": 2, "horizon": 4}, "balanced-brackets.horizon: expected at least 5"),
        (
            "shortest-path",
            {"nodes": 2, "prompts": 3},
            "shortest-path.prompts: expected an integer from 1 to 2, found 3",
        ),
        ("shortest-path", {"horizon": 1}, "shortest-path.horizon: expected at least"),
        ("balanced-brackets", {"pairs": 9, "kinds": 3}, "horizon: expected a task of at most 20000000 pairs, found"),
    ],
)
def test_options_that_do_not_fit_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        make(name, **options)


def test_tasks_check_their_arguments_themselves() -> None:
    for wrong, message in [
        (
            lambda: modular_arithmetic_task(0, modulus=0),
            "modular-arithmetic.modulus: expected an integer from 1 to 1000000",
        ),
        (lambda: modular_arithmetic_task(0, prompts=0), "modular-arithmetic.prompts: expected an integer from 1 to 25"),
        (lambda: balanced_brackets_task(kinds=4), "balanced-brackets.kinds: expected an integer from 1 to 3, found 4"),
        (lambda: balanced_brackets_task(pairs=0), "prompts: expected at least 1"),
        (lambda: shortest_path_task(0, nodes=27), "shortest-path.nodes: expected an integer from 2 to 26, found 27"),
    ]:
        with pytest.raises(InvalidInputError, match=message):
            wrong()
