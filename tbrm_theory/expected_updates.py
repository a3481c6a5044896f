"""The expected update of every loss on data whose law is known: gradients summed over all trajectories, or over all pairs of them.

What a loss trains is a row of numbers: the logits of all existing actions, then what else it learns (``log Z`` or a baseline for
each first state, a critic for each state). Its update is ``E ∇ loss`` with everything held that the method holds: the law of
on-policy data, a frozen value, the log-probabilities of the policy that drew the data. So it is the gradient of one function only
where nothing that is held depends on the row; else it is a field, and where it vanishes the method rests.

A loss of groups sees two rollouts from one first state, drawn independently, and a batch is one group. Frozen values are the row's
own: a method that freezes ``V``, minimises and begins again can only stay where the update with ``V`` frozen *here* vanishes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tbrm_theory.behaviours import Components
from tbrm_theory.dynamic_programming import Solution, soft_policy, soft_value, solve
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.losses import LOSSES, TrajectoryScores
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.occupancy import Enumeration, enumerate_trajectories
from tbrm_theory.scores import table_scores
from tbrm_theory.shapes import PerLayerState, PerLayerStateAction
from tbrm_theory.tables import side_by_side
from tbrm_theory.trajectories import TrajectoryBatch

__all__ = ["LEARNED", "ExpectedUpdate"]

LEARNED = {
    "trajectory-balance": "log_partition",
    "dro": "baseline",
    "pcl-one-step": "critic",
    "pcl-multi-step": "critic",
    "ppo": "critic",
}
"""What a loss trains beside the logits."""

Rows = Float[Tensor, "rows parameters"]
Groups = Int64[Tensor, "groups members"]


@dataclass(frozen=True, eq=False)
class ExpectedUpdate:
    """``E ∇ loss`` as a function of everything that the loss trains.

    Raises:
        InvalidInputError: no such loss, data without components, or a batch of problems.
    """

    mdp: RegularizedMDP
    loss: str
    """A name of ``LOSSES``."""
    data: Components | None
    """The policies that draw the data, with their weights, one for each trajectory; None for ``π_θ`` itself, its law held."""
    ratio_one: bool = False
    """Take data for the policy's own, whoever drew them: all ratios are 1."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Those of the loss."""

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise InvalidInputError("loss", f"expected one of {', '.join(LOSSES)}, found {self.loss!r}")
        if self.data is not None and not self.data:
            raise InvalidInputError("data", "expected at least one policy")

    def __call__(self, rows: Rows) -> Rows:
        """The update at each row; a step of gradient descent subtracts a multiple of it."""
        rows = rows.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.expected_loss(rows).sum(), rows)
        return gradient

    def expected_loss(self, rows: Rows) -> Float[Tensor, " rows"]:
        """``E loss``; only its gradient means something where the method holds what depends on the row."""
        loss = LOSSES[self.loss]
        logits, learned = self._parts(rows)
        scores = self._scores(logits, learned)
        size = {"group_size": 2} if loss.needs_group else {}
        values = loss.function(scores, beta=self.mdp.beta, **size, **self.options)
        weight = self._log_law(logits)[..., self._groups]
        given_start = weight[..., 1:].sum(-1) - self._log_start[self._groups[..., 1:]].sum(-1)
        return (values * (weight[..., 0] + given_start).exp()).sum(-1)

    # -- rows ------------------------------------------------------------------------------------------------------

    @cached_property
    def solution(self) -> Solution:
        return solve(self.mdp)

    @property
    def logit_count(self) -> int:
        """How many of a row's numbers are logits; they come first."""
        return sum(int(valid.sum()) for valid in self.mdp.valid)

    def row(self, logits: PerLayerStateAction, values: PerLayerState) -> Float[Tensor, " parameters"]:
        """The row with these logits, and with these values as what else is learned."""
        kept = [table[valid] for table, valid in zip(logits, self.mdp.valid, strict=True)]
        learned = LEARNED.get(self.loss)
        return torch.cat([*kept, *([] if learned is None else values if learned == "critic" else values[:1])])

    @cached_property
    def optimum(self) -> Float[Tensor, " parameters"]:
        """``Q*`` as logits, ``V*`` as what else is learned."""
        return self.row(self.solution.q, self.solution.v)

    def logits(self, rows: Float[Tensor, "... parameters"]) -> PerLayerStateAction:
        """The logits of rows as tables, ``-inf`` where the action does not exist."""
        tables, start = [], 0
        for valid in self.mdp.valid:
            count = int(valid.sum())
            table = rows.new_full((*rows.shape[:-1], *valid.shape), -torch.inf)
            table[..., valid] = rows[..., start : start + count]
            tables.append(table)
            start += count
        return tuple(tables)

    def log_policy(self, rows: Float[Tensor, "... parameters"]) -> PerLayerStateAction:
        """``log π_θ`` of rows."""
        return tuple(soft_policy(table) for table in self.logits(rows))

    def _parts(self, rows: Rows) -> tuple[PerLayerStateAction, Tensor]:
        return self.logits(rows), rows[..., self.logit_count :]

    # -- data ------------------------------------------------------------------------------------------------------

    @cached_property
    def _listed(self) -> Enumeration:
        return enumerate_trajectories(self.mdp)

    @cached_property
    def _rollouts(self) -> tuple[Int64[Tensor, " rollouts"], Float[Tensor, " rollouts"], Float[Tensor, "rollouts steps"]]:
        """What data hold: trajectories as indices, one for each policy that draws it; their log-law; ``log μ`` of each step."""
        if self.data is None:
            every = torch.arange(len(self._listed.states))
            return every, torch.zeros(len(every), dtype=torch.float64), torch.zeros_like(self._listed.states, dtype=torch.float64)
        which, law, steps = [], [], []
        for weight, log_policy in self.data:
            log_law = self._listed.log_law(log_policy)
            drawn = (log_law > -torch.inf).nonzero().squeeze(-1)
            which.append(drawn)
            law.append(log_law[drawn] + torch.tensor(weight, dtype=torch.float64).log())
            states, actions = self._listed.states[drawn], self._listed.actions[drawn]
            steps.append(torch.stack([log[states[:, h], actions[:, h]] for h, log in enumerate(log_policy)], dim=-1))
        return torch.cat(which), torch.cat(law), torch.cat(steps)

    @cached_property
    def _log_start(self) -> Float[Tensor, " rollouts"]:
        """``log ρ(s_1)`` of every rollout."""
        return self.mdp.initial[self._listed.states[self._rollouts[0], 0]].log()

    @cached_property
    def _groups(self) -> Groups:
        """Every group as indices of rollouts: one alone, or two from one first state, in both orders and with themselves."""
        count = len(self._rollouts[0])
        if not LOSSES[self.loss].needs_group:
            return torch.arange(count).unsqueeze(-1)
        start = self._listed.states[self._rollouts[0], 0]
        return (start.unsqueeze(-1) == start).nonzero()

    def _log_law(self, logits: PerLayerStateAction) -> Float[Tensor, "... rollouts"]:
        """``log P(rollout)``, a constant."""
        if self.data is not None:
            return self._rollouts[1]
        return self._listed.log_law(tuple(soft_policy(table).detach() for table in logits))

    # -- scores ----------------------------------------------------------------------------------------------------

    def _scores(self, logits: PerLayerStateAction, learned: Tensor) -> TrajectoryScores:
        """Of every group as a batch of its own: fields ``(rows, groups, members)`` or ``(rows, groups, members, steps)``."""
        which, _, log_behaviour = self._rollouts
        states = self._listed.states[which]
        batch = TrajectoryBatch(states, self._listed.actions[which], torch.ones_like(states, dtype=torch.bool))
        scores = table_scores(logits, self.mdp.log_reference, self.mdp.reward, batch)
        reads = LOSSES[self.loss].fields
        extra: dict[str, Tensor] = {}
        if "behaviour_log_policy" in reads:
            own = self.data is None or self.ratio_one
            extra["behaviour_log_policy"] = scores.log_policy.detach() if own else log_behaviour
        if "frozen_value" in reads:
            assert scores.value is not None
            extra["frozen_value"] = scores.value.detach()
        if "frozen_initial_value" in reads:
            extra["frozen_initial_value"] = scores.initial_value.detach()
        if "reference_initial_value" in reads:  # a reference model whose logits are normalised
            extra["reference_initial_value"] = torch.zeros_like(scores.trajectory_return)
        if "entropy" in reads:
            extra["entropy"] = _of_states([_entropy(table) for table in logits], states)
        if "critic" in reads:
            sizes = [len(valid) for valid in self.mdp.valid]
            extra["critic"] = _of_states(learned.split(sizes, dim=-1), states)
        for name in {"log_partition", "baseline"} & set(reads):
            known = learned if name == LEARNED.get(self.loss) else self._partition
            extra[name] = known[..., states[:, 0]]
        return _grouped(replace(scores, **extra), self._groups)

    @cached_property
    def _partition(self) -> Float[Tensor, " starts"]:
        """``log E_{π_ref}[exp(r/β) | s_1]``, what A*-PO estimates before training; ``V*(s_1)`` on deterministic transitions."""
        exponent = self._listed.sum_along(self.mdp.reward) / self.mdp.beta + self._listed.log_law(self.mdp.log_reference)
        mine = self._listed.states[:, 0] == torch.arange(len(self.mdp.initial)).unsqueeze(-1)
        total = torch.where(mine, exponent, -torch.inf).logsumexp(-1)
        return torch.where(self.mdp.initial > 0, total - self.mdp.initial.log(), 0.0)


def _entropy(logits: Tensor) -> Tensor:
    """``H(π_θ(·|s)) = V - E_π logit``."""
    probability = soft_policy(logits).exp()
    finite = torch.where(logits > -torch.inf, logits, 0.0)
    return soft_value(logits) - (probability * finite).sum(-1)


def _of_states(values: Any, states: Tensor) -> Tensor:
    """One value for every state visited, ``(…, rollouts, steps)``."""
    return torch.stack([value[..., states[:, h]] for h, value in enumerate(values)], dim=-1)


def _grouped(scores: TrajectoryScores, groups: Groups) -> TrajectoryScores:
    def pick(name: str, table: Tensor) -> Tensor:
        per_step = name in PER_STEP
        return table[..., groups, :] if per_step else table[..., groups]

    return TrajectoryScores(**{name: pick(name, table) for name, table in scores.given().items()})


PER_STEP = {"log_policy", "log_reference", "mask", "value", "reward", "behaviour_log_policy", "critic", "frozen_value", "entropy"}
