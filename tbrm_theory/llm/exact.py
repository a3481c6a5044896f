"""A language model as an exact problem: the tree of all responses to some prompts, with the model itself as the reference.

A state is a prompt with the tokens written so far, so states never merge, until one of the ending tokens is written: from then on
the response is in the one absorbing state of its layer, whose only action is the first ending token, of reward 0. It carries no
decision, hence nothing of ``f``, ``V``, ``κ``, ``Λ`` or ``C_∞``, and I13 holds as on the whole tree (only Lemma 1's right side is
smaller than with one absorbing state for each response). A response of ``horizon`` tokens without an ending one is truncated.

The model is asked block by block, depth first, with the keys and values of the block before: every prefix costs one token of
compute, every prompt its own length once, and the caches held are one block's for each layer. Prompts of one length share a block,
so nothing is ever padded, and positions are whatever the model makes of an unpadded prompt.

Where one prompt begins another, two states are one text, and a model has the same logits in both: an optimum that tells them apart
is out of its reach. Prompts that end with a mark of their own avoid it.

Everything else is the package's own: ``solve(mdp)`` is the exact optimum for this model, ``regret(mdp, tree.log_policy(other))``
that of another one, ``kappa`` and ``theorem2`` take their tables.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, PreTrainedModel

from tbrm_theory.dynamic_programming import soft_policy
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.shapes import PerLayerStateAction, StateActionTable
from tbrm_theory.trajectories import TrajectoryBatch
from tbrm_theory.transitions import DeterministicTransition

__all__ = ["Reward", "TokenTree"]

LARGEST = 100_000_000
"""State-action pairs of one tree."""

Reward: TypeAlias = Callable[[Int[Tensor, " responses"], Int[Tensor, "responses length"]], Float[Tensor, " responses"]]
"""``reward(prompt, tokens)``: the rewards of finished responses of one length, whose prompts are given by their index. The last
token is an ending one, or the response was truncated."""


@dataclass(frozen=True)
class TokenTree:
    """All responses to some prompts, and how the states of each layer are numbered.

    Unfinished responses come in the order of ``itertools.product`` over the tokens that do not end a response: with ``c`` such
    tokens, the state ``s`` followed by the ``k``-th is the state ``s c + k`` of the next layer. The absorbing state is the last.

    Args:
        prompts: distinct and not empty, as token ids; all equally likely.
        horizon: the most tokens in a response, the ending one included.
        vocabulary: how many tokens there are, padding and the like included: whatever the model gives a logit.
        end: the tokens that end a response; there may be none.

    Raises:
        InvalidInputError: any of that broken, or a tree of more than 100 million pairs.
    """

    prompts: tuple[tuple[int, ...], ...]
    horizon: int
    vocabulary: int
    end: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, least in (("horizon", 1), ("vocabulary", 1)):
            if getattr(self, name) < least:
                raise InvalidInputError(name, f"expected at least {least}, found {getattr(self, name)}")
        if not self.prompts or len(set(self.prompts)) < len(self.prompts):
            raise InvalidInputError("prompts", f"expected at least one, and no two alike, found {len(self.prompts)}")
        for i, prompt in enumerate(self.prompts):
            if not prompt or not all(0 <= token < self.vocabulary for token in prompt):
                expected = f"expected tokens from 0 to {self.vocabulary - 1}, at least one"
                raise InvalidInputError(f"prompts[{i}]", f"{expected}, found {prompt}")
        if not all(0 <= token < self.vocabulary for token in self.end) or len(set(self.end)) < len(self.end):
            raise InvalidInputError("end", f"expected distinct tokens below {self.vocabulary}, found {self.end}")
        if len(self.end) == self.vocabulary:
            raise InvalidInputError("end", "expected at least one token that does not end a response")
        pairs = self.vocabulary * sum(self.states(layer) for layer in range(self.horizon))
        if pairs > LARGEST:
            raise InvalidInputError("horizon", f"expected a tree of at most {LARGEST} pairs, found {pairs}")

    # -- states --------------------------------------------------------------------------------------------------------

    @cached_property
    def going_on(self) -> Int[Tensor, " tokens"]:
        """The tokens that do not end a response."""
        return torch.tensor([token for token in range(self.vocabulary) if token not in self.end])

    def unfinished(self, layer: int) -> int:
        """How many states of a layer are unfinished responses."""
        return len(self.prompts) * int((self.vocabulary - len(self.end)) ** layer)

    def states(self, layer: int) -> int:
        """``S_h``: the unfinished responses, and from the second layer on the absorbing state, if responses end at all."""
        return self.unfinished(layer) + (layer > 0 and len(self.end) > 0)

    def responses(self, layer: int) -> tuple[Int[Tensor, " states"], Int[Tensor, "states {layer}"]]:
        """The prompt's index and the tokens so far of every unfinished response of a layer."""
        state, width = torch.arange(self.unfinished(layer)), len(self.going_on)
        tokens = []
        for _ in range(layer):
            tokens.append(self.going_on[state % width])
            state = state // width
        written = torch.stack(tokens[::-1], dim=-1) if tokens else state.new_empty(len(state), 0)
        return state, written

    def trajectories(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> TrajectoryBatch:
        """Responses of any source as trajectories of this tree, ``(N, H)``; what follows an ending token is masked.

        Args:
            prompts: the token ids of each response's prompt.
            responses: the token ids up to the ending one, or ``horizon`` of them.

        Raises:
            InvalidInputError: no responses, an unknown prompt, or one that this tree does not hold.
        """
        if len(prompts) != len(responses) or not responses:
            raise InvalidInputError("responses", f"expected one for each of {len(prompts)} prompts, at least one")
        number = {prompt: i for i, prompt in enumerate(self.prompts)}
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            if tuple(prompt) not in number:
                raise InvalidInputError(f"prompts[{i}]", f"expected one of the tree's, found {tuple(prompt)}")
            self._check_response(response, f"responses[{i}]")
        state = torch.tensor([number[tuple(prompt)] for prompt in prompts])
        padding = self.end[0] if self.end else 0
        rows = [torch.tensor(response) for response in responses]
        actions = pad_sequence([torch.full((self.horizon,), padding), *rows], batch_first=True, padding_value=padding)[
            1:
        ]
        lengths = torch.tensor([len(response) for response in responses])
        rank = torch.full((self.vocabulary,), -1).index_copy(0, self.going_on, torch.arange(len(self.going_on)))
        states = [state]
        for layer in range(1, self.horizon):
            following = states[-1] * len(self.going_on) + rank[actions[:, layer - 1]]
            states.append(torch.where(layer < lengths, following, self.unfinished(layer)))
        mask = torch.arange(self.horizon) < lengths.unsqueeze(-1)
        return TrajectoryBatch(torch.stack(states, dim=-1), actions, mask)

    def _check_response(self, response: Sequence[int], where: str) -> None:
        if not 1 <= len(response) <= self.horizon or not all(0 <= token < self.vocabulary for token in response):
            expected = f"expected 1 to {self.horizon} tokens from 0 to {self.vocabulary - 1}"
            raise InvalidInputError(where, f"{expected}, found {tuple(response)}")
        ended = [token in self.end for token in response]
        if any(ended[:-1]) or not (ended[-1] or len(response) == self.horizon):
            raise InvalidInputError(where, f"expected an ending token at the end alone, found {tuple(response)}")

    # -- a model on the tree -------------------------------------------------------------------------------------------

    def logits(self, model: PreTrainedModel, *, block: int = 4096) -> PerLayerStateAction:
        """The model's logits of the next token after every unfinished response, in float64; 0 in the absorbing state.

        Args:
            block: how many prefixes are asked at once.

        Raises:
            InvalidInputError: a model of another vocabulary, with fewer positions, without a cache, or with logits that are no
                numbers.
        """
        _check_positions(model, max(map(len, self.prompts)) + self.horizon - 1)
        tables = [torch.zeros(self.states(h), self.vocabulary, dtype=torch.float64) for h in range(self.horizon)]
        by_length: dict[int, list[int]] = {}
        for i, prompt in enumerate(self.prompts):
            by_length.setdefault(len(prompt), []).append(i)
        with _judging(model):
            for rows in by_length.values():
                prompts = torch.tensor([self.prompts[i] for i in rows])
                parts = zip(torch.tensor(rows).split(block), prompts.split(block), strict=True)
                for state, tokens in parts:
                    for layer, states, answer in self._blocks(model, state, tokens, block):
                        tables[layer][states] = answer
        return tuple(tables)

    def log_policy(self, model: PreTrainedModel, *, block: int = 4096) -> PerLayerStateAction:
        """``log π`` of the model at temperature 1, with a single action in the absorbing state."""
        return self.log_policy_of(self.logits(model, block=block))

    def log_policy_of(self, logits: PerLayerStateAction) -> PerLayerStateAction:
        """``log π`` of logits on this tree."""
        return tuple(self._with_absorbing(h, soft_policy(table), -torch.inf) for h, table in enumerate(logits))

    def _with_absorbing(self, layer: int, table: StateActionTable, elsewhere: float) -> StateActionTable:
        """The table with one action in the absorbing state: 0 there, ``elsewhere`` at the others."""
        if self.states(layer) == self.unfinished(layer):
            return table
        only = table.new_full((1, self.vocabulary), elsewhere)
        only[:, self.end[0]] = 0.0
        return torch.cat([table[: self.unfinished(layer)], only])

    def _blocks(
        self, model: PreTrainedModel, states: Tensor, tokens: Tensor, block: int
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The layer, the states and the logits of one block of prompts and of all that follows it, depth first."""
        width = len(self.going_on)
        pending: list[tuple[int, Tensor, Tensor, Cache | None, Tensor]] = [(0, states, tokens, None, states)]
        while pending:
            layer, states, tokens, cache, parents = pending.pop()
            answer, cache = self._ask(model, tokens, _rows(cache, parents))
            yield layer, states, answer
            if layer + 1 == self.horizon:
                continue
            child = torch.arange(len(states) * width)
            for part in child.split(block):
                parents, token = part // width, part % width
                following = states[parents] * width + token
                pending.append((layer + 1, following, self.going_on[token].unsqueeze(-1), cache, parents))

    def _ask(self, model: PreTrainedModel, tokens: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        known = 0 if cache is None else cache.get_seq_length()
        everything = torch.ones(len(tokens), known + tokens.shape[-1], dtype=torch.int64, device=model.device)
        output = model(
            input_ids=tokens.to(model.device), attention_mask=everything, past_key_values=cache, use_cache=True
        )
        last = output.logits[:, -1].to("cpu", torch.float64)
        if last.shape[-1] != self.vocabulary:
            raise InvalidInputError("model", f"expected {self.vocabulary} logits, found {last.shape[-1]}")
        if bool((last.isnan() | (last == torch.inf) | (last.amax(-1, keepdim=True) == -torch.inf)).any()):
            raise InvalidInputError("model", "expected logits that are numbers, -inf for tokens that do not exist")
        cache = output.get("past_key_values")
        if not isinstance(cache, Cache):
            raise InvalidInputError("model", "expected one that returns past_key_values")
        return last, cache

    # -- the problem ---------------------------------------------------------------------------------------------------

    def mdp(self, reference: PerLayerStateAction, reward: Reward, *, beta: float) -> RegularizedMDP:
        """The problem whose reference policy has these logits: those of the initial model, ``tree.logits(model)``.

        A token whose probability is below the smallest double does not exist.

        Raises:
            InvalidInputError: logits of another tree, or a reward of another shape or not finite.
        """
        if [tuple(table.shape) for table in reference] != [
            (self.states(h), self.vocabulary) for h in range(self.horizon)
        ]:
            raise InvalidInputError("reference", "expected logits of this tree")
        return RegularizedMDP(
            beta=beta,
            initial=torch.full((len(self.prompts),), 1 / len(self.prompts), dtype=torch.float64),
            reward=[self._outcome(h, reward) for h in range(self.horizon)],
            reference=[log.exp() for log in self.log_policy_of(reference)],
            transitions=[self._append(h) for h in range(self.horizon - 1)],
        )

    def _outcome(self, layer: int, reward: Reward) -> StateActionTable:
        """The reward of the token that ends a response; in the last layer every one does."""
        prompt, written = self.responses(layer)
        last = range(self.vocabulary) if layer == self.horizon - 1 else self.end
        table = torch.zeros(self.states(layer), self.vocabulary, dtype=torch.float64)
        for token in last:
            values = reward(prompt, torch.cat([written, torch.full((len(written), 1), token)], dim=-1))
            if values.shape != prompt.shape:
                expected = f"expected one number for each of {len(prompt)} responses"
                raise InvalidInputError("reward", f"{expected}, found shape {tuple(values.shape)}")
            table[: len(written), token] = values.to(torch.float64)
        return table

    def _append(self, layer: int) -> DeterministicTransition:
        """Tokens that go on branch; ending ones, and everything in the absorbing state, lead to the absorbing state."""
        absorbing, states = self.unfinished(layer + 1), self.states(layer + 1)
        table = torch.full((self.states(layer), self.vocabulary), min(absorbing, states - 1))
        branches = torch.arange(absorbing).reshape(self.unfinished(layer), len(self.going_on))
        table[: self.unfinished(layer), self.going_on] = branches
        return DeterministicTransition(table, states)


def _rows(cache: Cache | None, rows: Tensor) -> Cache | None:
    """A copy of some rows, repetitions included; the original serves the other children."""
    if cache is None:
        return None
    cache = copy.deepcopy(cache)
    cache.reorder_cache(cast(torch.LongTensor, rows))
    return cache


def _check_positions(model: PreTrainedModel, needed: int) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and positions < needed:
        raise InvalidInputError("horizon", f"expected at most {positions} positions, as the model has, found {needed}")


@contextmanager
def _judging(model: PreTrainedModel) -> Iterator[None]:
    """The model without dropout or gradients; afterwards every part of it trains again that did."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
