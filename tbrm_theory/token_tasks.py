"""Verifiable token tasks: prompts, a vocabulary, and a checker that tells whether a finished response is correct.

The task itself is strings and nothing else, so that a language model can be trained on it;
:func:`token_task_mdp` makes it a problem. There a state is a prompt with the tokens written so far, so states
never merge; a prompt is a state of the first layer. The last token of the vocabulary ends a response, and only
a response ended so is checked: reward 1 for the token that ends a correct one, 0 for everything else, running
into the horizon included. An ended response goes on as a state of its own with a single action, that last
token again, and reward 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.shapes import StateActionTable
from tbrm_theory.transitions import DeterministicTransition

__all__ = ["TokenTask", "check_size", "token_task_mdp"]

_LARGEST = 20_000_000  # state-action pairs of one problem


@dataclass(frozen=True)
class TokenTask:
    """Prompts to be answered with tokens.

    Args:
        vocabulary: distinct tokens; the last one ends a response.
        prompts: distinct prompts, all equally likely.
        horizon: the most tokens in a response, the ending one included.
        checker: ``checker(prompt, response)``, whether a response is correct; the ending token is not passed.
    """

    vocabulary: tuple[str, ...]
    prompts: tuple[str, ...]
    horizon: int
    checker: Callable[[str, tuple[str, ...]], bool]

    def __post_init__(self) -> None:
        for name, least in (("vocabulary", 2), ("prompts", 1)):
            entries = getattr(self, name)
            if len(entries) < least or len(set(entries)) < len(entries) or "" in entries:
                raise InvalidInputError(name, f"expected at least {least} distinct non-empty strings, found {entries}")
        if self.horizon < 1:
            raise InvalidInputError("horizon", f"expected at least 1, found {self.horizon}")

    @property
    def end(self) -> int:
        """The token that ends a response."""
        return len(self.vocabulary) - 1

    def unfinished(self, layer: int) -> int:
        """How many states of a layer are unfinished responses: for every prompt, all strings of that length."""
        return len(self.prompts) * int(self.end**layer)

    def finished(self, layer: int) -> int:
        """How many states of a layer are finished responses; they follow the unfinished, the shorter first."""
        return sum(self.unfinished(length) for length in range(layer))

    def is_correct(self, prompt: int, tokens: Sequence[int]) -> bool:
        """Whether the tokens contain the ending one and what stands before it is a correct response."""
        tokens = list(tokens)
        if self.end not in tokens:
            return False
        response = tuple(self.vocabulary[token] for token in tokens[: tokens.index(self.end)])
        return bool(self.checker(self.prompts[prompt], response))

    def prefix(self, layer: int, state: int) -> tuple[int, tuple[int, ...]]:
        """The prompt and the tokens, the ending one included, that a state stands for."""
        if not (0 <= layer < self.horizon and 0 <= state < self.unfinished(layer) + self.finished(layer)):
            raise InvalidInputError(f"layers[{layer}]", f"there is no state {state}")
        length, ending = layer, tuple[int, ...]()
        if state >= self.unfinished(layer):
            state, length, ending = state - self.unfinished(layer), 0, (self.end,)
            while state >= self.unfinished(length):
                state, length = state - self.unfinished(length), length + 1
        tokens: list[int] = []
        for _ in range(length):
            state, token = divmod(state, self.end)
            tokens.insert(0, token)
        return state, (*tokens, *ending)

    def decode(self, tokens: Sequence[int]) -> str:
        """The response as a string, up to the token that ends it."""
        shown = list(tokens)
        if self.end in shown:
            shown = shown[: shown.index(self.end) + 1]
        return "".join(self.vocabulary[token] for token in shown)


def check_size(task: TokenTask) -> None:
    """Refuse a task whose problem has more than 20 million pairs of state and token; nothing is built to find out."""
    pairs = len(task.vocabulary) * sum(task.unfinished(h) + task.finished(h) for h in range(task.horizon))
    if pairs > _LARGEST:
        raise InvalidInputError("horizon", f"expected a task of at most {_LARGEST} pairs, found {pairs}")


def token_task_mdp(
    task: TokenTask, *, beta: float, reference: Sequence[Float[Tensor, "_ _"]] | None = None
) -> RegularizedMDP:
    """The task as a problem, level by level.

    Unfinished responses come in the order of ``itertools.product``: the state ``s`` followed by the token
    ``a`` is the state ``s (V-1) + a`` of the next layer.

    Args:
        reference: for each layer the probabilities of the next token after each unfinished response,
            ``(prompts (V-1)^h, V)``; uniform if not given.

    Raises:
        InvalidInputError: more than 20 million pairs, or a malformed reference.
    """
    horizon, width = task.horizon, len(task.vocabulary)
    check_size(task)
    if reference is None:
        reference = [torch.full((task.unfinished(h), width), 1 / width, dtype=torch.float64) for h in range(horizon)]
    if len(reference) != horizon:
        raise InvalidInputError("reference", f"expected {horizon} layers, found {len(reference)}")
    return RegularizedMDP(
        beta=beta,
        initial=torch.full((len(task.prompts),), 1 / len(task.prompts), dtype=torch.float64),
        reward=[_outcome_reward(task, h) for h in range(horizon)],
        reference=[_with_finished(task, h, table) for h, table in enumerate(reference)],
        transitions=[_append_token(task, h) for h in range(horizon - 1)],
    )


def _outcome_reward(task: TokenTask, layer: int) -> StateActionTable:
    """1 for ending a correct response of ``layer`` tokens."""
    reward = torch.zeros(task.unfinished(layer) + task.finished(layer), len(task.vocabulary), dtype=torch.float64)
    responses = list(product(task.vocabulary[:-1], repeat=layer))
    checked = [bool(task.checker(prompt, response)) for prompt in task.prompts for response in responses]
    reward[: len(checked), task.end] = torch.tensor(checked, dtype=torch.float64)
    return reward


def _with_finished(task: TokenTask, layer: int, table: Float[Tensor, "unfinished actions"]) -> StateActionTable:
    """The reference of a layer: a finished response has one action."""
    expected = (task.unfinished(layer), len(task.vocabulary))
    if tuple(table.shape) != expected:
        raise InvalidInputError(f"reference[{layer}]", f"expected shape {expected}, found {tuple(table.shape)}")
    only_end = torch.zeros(task.finished(layer), expected[1], dtype=torch.float64)
    only_end[:, task.end] = 1.0
    return torch.cat([table.to(torch.float64), only_end])


def _append_token(task: TokenTask, layer: int) -> DeterministicTransition:
    """Unfinished responses branch; those that end now go behind those that ended before."""
    unfinished, finished, end = task.unfinished(layer), task.finished(layer), task.end
    ended_before = task.unfinished(layer + 1) + torch.arange(finished)
    ended_now = task.unfinished(layer + 1) + finished + torch.arange(unfinished)
    table = torch.zeros(unfinished + finished, end + 1, dtype=torch.int64)
    table[:unfinished, :end] = torch.arange(unfinished * end).reshape(unfinished, end)
    table[:, end] = torch.cat([ended_now, ended_before])
    return DeterministicTransition(table, task.unfinished(layer + 1) + task.finished(layer + 1))
