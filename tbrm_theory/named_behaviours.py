"""The behaviours that the experiments compare, as functions of the problem; :data:`BEHAVIOURS` lists them by name.

"Full support" means that every valid action has positive probability in every state, whatever came before. Without it zero loss
does not identify the optimum (X1, X3). Whatever is random is drawn from a seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tbrm_theory.behaviours import Behaviour, HistoryBehaviour, MarkovBehaviour, MixtureBehaviour
from tbrm_theory.dynamic_programming import solve
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.random_tables import draw_reference, seeded
from tbrm_theory.shapes import PerLayerStateAction
from tbrm_theory.tables import per_distinct_layer, safe_log

__all__ = [
    "BEHAVIOURS",
    "NamedBehaviour",
    "anti_optimal",
    "epsilon_optimal",
    "history_dependent",
    "on_policy",
    "random_markov",
    "reference_behaviour",
    "replay",
    "replay_of_deterministic",
    "uniform",
    "with_holes",
]

LEAST_PROBABILITY = 1e-3
"""No valid action of a random policy is rarer, unless a state has more than 500 of them."""


# -- full support, Markov ------------------------------------------------------------------------------------------


def reference_behaviour(mdp: RegularizedMDP) -> MarkovBehaviour:
    """The reference policy."""
    return MarkovBehaviour(mdp.log_reference)


def uniform(mdp: RegularizedMDP) -> MarkovBehaviour:
    """All valid actions of a state alike."""
    return MarkovBehaviour(per_distinct_layer(_log_uniform, mdp.valid))


def on_policy(log_policy: PerLayerStateAction) -> MarkovBehaviour:
    """The policy that is being trained."""
    return MarkovBehaviour(log_policy)


def anti_optimal(mdp: RegularizedMDP, *, strength: float = 3.0) -> MarkovBehaviour:
    """The worse an action, the likelier: softmax of ``-(Q* - V*)``, scaled by the largest gap between two actions of one state.

    Args:
        strength: log-odds of the worst against the best action where they are furthest apart. Positive; up to some 500, beyond
            which the best action's probability is no longer a positive double.
    """
    if not 0 < strength <= 500:
        raise InvalidInputError("strength", f"expected more than 0 and at most 500, found {strength}")
    optimum = solve(mdp).log_policy
    lags = [  # how far an action is behind the best one of its state
        torch.where(valid, log.amax(-1, keepdim=True) - log, 0.0) for valid, log in zip(mdp.valid, optimum, strict=True)
    ]
    widest = torch.stack(torch.broadcast_tensors(*(lag.amax((-2, -1)) for lag in lags))).amax(0)
    scale = torch.where(widest > 0, widest, 1.0)[..., None, None]
    logits = [
        torch.where(valid, strength * lag / scale, -torch.inf) for valid, lag in zip(mdp.valid, lags, strict=True)
    ]
    return MarkovBehaviour(tuple(torch.log_softmax(table, dim=-1) for table in logits))


def random_markov(mdp: RegularizedMDP, seed: int) -> MarkovBehaviour:
    """In every state a point of the simplex, drawn uniformly and moved inwards to probabilities of at least 1e-3."""
    return MarkovBehaviour(_random_policy(mdp, seeded(seed)))


def epsilon_optimal(mdp: RegularizedMDP, *, epsilon: float = 0.5) -> MarkovBehaviour:
    """ε-mixture with the optimum, drawn anew in every step and hence Markov: ``(1-ε) π_ref + ε π*``.

    Full support for ``epsilon < 1``, as far as the reference has it.
    """
    if not 0 <= epsilon <= 1:
        raise InvalidInputError("epsilon", f"expected a probability, found {epsilon}")
    share = safe_log(mdp.beta.new_tensor([1 - epsilon, epsilon]))
    parts = zip(mdp.log_reference, solve(mdp).log_policy, strict=True)
    return MarkovBehaviour(tuple(torch.logaddexp(share[0] + log, share[1] + star) for log, star in parts))


# -- others --------------------------------------------------------------------------------------------------------


def with_holes(mdp: RegularizedMDP, seed: int, *, share: float = 0.5) -> MarkovBehaviour:
    """Uniform over some valid actions only: each is omitted with probability ``share``, but one of each state never is (X3).

    At least one action is omitted in a state that can be reached. With ``share = 1`` the behaviour is deterministic.

    Raises:
        InvalidInputError: ``share`` outside ``[0, 1]``, a batch of problems, or none with two actions in a state that can be
            reached.
    """
    if not 0 <= share <= 1:
        raise InvalidInputError("share", f"expected a probability, found {share}")
    if mdp.batch_shape:
        raise InvalidInputError("mdp", f"expected one problem, found a batch of shape {tuple(mdp.batch_shape)}")
    generator = seeded(seed)
    choosable = [reached & (valid.sum(-1) > 1) for reached, valid in zip(_reachable(mdp), mdp.valid, strict=True)]
    places = [(h, s) for h, layer in enumerate(choosable) for s in layer.nonzero().flatten().tolist()]
    if not places:
        raise InvalidInputError("mdp", "expected a state that can be reached and has two actions, found none")
    certain = places[int(torch.randint(len(places), (), generator=generator))]
    tables = []
    for h, valid in enumerate(mdp.valid):
        order = _random_order(valid, generator)
        omitted = torch.rand(valid.shape, generator=generator, dtype=torch.float64).to(valid.device) < share
        if h == certain[0]:
            omitted[certain[1]] |= order[certain[1]] == 1
        tables.append(_log_uniform(valid & ~(omitted & (order > 0))))
    return MarkovBehaviour(tuple(tables))


def replay(mdp: RegularizedMDP, seed: int, *, count: int = 4) -> MixtureBehaviour:
    """A replay buffer of ``count`` random policies with full support, one drawn for each episode.

    Zero loss identifies the optimum; what fails is Theorem 2's constant, slowly (X1).
    """
    _check_count(count)
    generator = seeded(seed)
    return MixtureBehaviour((1 / count,) * count, tuple(_random_policy(mdp, generator) for _ in range(count)))


def replay_of_deterministic(
    mdp: RegularizedMDP, *, seed: int | None = None, count: int | None = None
) -> MixtureBehaviour:
    """A replay buffer of deterministic policies, one drawn for each episode (X1).

    Policy ``i`` takes the ``i``-th valid action of every state, counted around. Together they try every action of the states that
    they share, and yet ``κ = ∞`` in general, unless no episode has two decisions to make. With one state in each layer and two
    actions this is X1's ``½(0,0,…) + ½(1,1,…)``.

    Args:
        seed: draws the order of the actions in every state; their own order if not given.
        count: number of policies; as many as the state with the most actions has, if not given.
    """
    if count is None:
        count = max(int(valid.sum(-1).max()) for valid in mdp.valid)
    _check_count(count)
    generator = None if seed is None else seeded(seed)
    order = [_random_order(valid, generator) for valid in mdp.valid]
    policies = [
        tuple(
            torch.where(valid & (rank == i % valid.sum(-1, keepdim=True)), 0.0, -torch.inf).to(torch.float64)
            for valid, rank in zip(mdp.valid, order, strict=True)
        )
        for i in range(count)
    ]
    return MixtureBehaviour((1 / count,) * count, tuple(policies))


def history_dependent(mdp: RegularizedMDP, *, repeat: float = 0.5) -> HistoryBehaviour:
    """The reference policy, but with probability ``repeat`` the last action again: not Markov in the state."""
    return HistoryBehaviour(mdp.log_reference, repeat)


# -- by name -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NamedBehaviour:
    """A row of :data:`BEHAVIOURS`."""

    name: str
    summary: str
    full_support: bool
    markov: bool
    make: Callable[[RegularizedMDP, int], Behaviour]
    """``make(mdp, seed)``; the seed counts only where something is drawn."""


BEHAVIOURS: dict[str, NamedBehaviour] = {
    row.name: row
    for row in (
        NamedBehaviour("reference", "the reference policy", True, True, lambda mdp, seed: reference_behaviour(mdp)),
        NamedBehaviour("uniform", "all valid actions alike", True, True, lambda mdp, seed: uniform(mdp)),
        NamedBehaviour(
            "anti-optimal", "the worse an action, the likelier", True, True, lambda mdp, seed: anti_optimal(mdp)
        ),
        NamedBehaviour("random-markov", "a random policy", True, True, random_markov),
        NamedBehaviour(
            "epsilon-optimal",
            "in each step the optimum with probability ½, else the reference",
            True,
            True,
            lambda mdp, seed: epsilon_optimal(mdp),
        ),
        NamedBehaviour("with-holes", "uniform, but omits about half of the actions", False, True, with_holes),
        NamedBehaviour("replay", "four random policies, one for each episode", True, False, replay),
        NamedBehaviour(
            "replay-of-deterministic",
            "deterministic policies, one for each episode",
            False,
            False,
            lambda mdp, seed: replay_of_deterministic(mdp, seed=seed),
        ),
        NamedBehaviour(
            "history-dependent",
            "the reference, but with probability ½ the last action again",
            True,
            False,
            lambda mdp, seed: history_dependent(mdp),
        ),
    )
}
"""By name. On-policy data and files of trajectories are behaviours too, but no functions of the problem alone."""


# -- parts ---------------------------------------------------------------------------------------------------------


def _check_count(count: int) -> None:
    if count < 1:
        raise InvalidInputError("count", f"expected at least 1 policy, found {count}")


def _log_uniform(allowed: Tensor) -> Tensor:
    """``log`` of the uniform distribution over the allowed actions of each state."""
    return safe_log(allowed.to(torch.float64) / allowed.sum(-1, keepdim=True))


def _random_policy(mdp: RegularizedMDP, generator: torch.Generator) -> PerLayerStateAction:
    tables = []
    for valid in mdp.valid:
        drawn = draw_reference("dirichlet", valid.cpu(), generator).to(valid.device)
        actions = valid.sum(-1, keepdim=True)
        least = torch.clamp(1 / (2 * actions.to(torch.float64)), max=LEAST_PROBABILITY)
        tables.append(safe_log(torch.where(valid, least + (1 - actions * least) * drawn, 0.0)))
    return tuple(tables)


def _random_order(valid: Tensor, generator: torch.Generator | None) -> Tensor:
    """The rank of each valid action, 0, 1, …, in a random order of those of its state, or in their own order."""
    if generator is None:
        return valid.cumsum(-1) - 1
    score = torch.rand(valid.shape, generator=generator, dtype=torch.float64).to(valid.device)
    return torch.where(valid, score, torch.inf).argsort(-1).argsort(-1)


def _reachable(mdp: RegularizedMDP) -> tuple[Tensor, ...]:
    """Which states some sequence of valid actions can lead to."""
    reached = [mdp.initial > 0]
    for valid, kernel in zip(mdp.valid, mdp.transitions, strict=False):
        reached.append(kernel.push((reached[-1].unsqueeze(-1) & valid).to(torch.float64)) > 0)
    return tuple(reached)
