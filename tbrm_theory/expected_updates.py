"""The expected update of every loss on data whose law is known: gradients summed over all trajectories, or over all pairs of them.

What a loss trains is a row of numbers: the logits of all existing actions, then what else it learns (``log Z`` or a baseline for
each first state, a critic for each state). Its update is ``E ∇ loss`` with everything held that the method holds: the law of
on-policy data, a frozen value, the log-probabilities of the policy that drew the data. So it is the gradient of one function only
where nothing that is held depends on the row; else it is a field, and where it vanishes the method rests.

A loss of groups sees two rollouts from one first state, drawn independently, and a batch is one group. Frozen values are the row's
own: a method that freezes ``V``, minimises and begins again can only stay where the update with ``V`` frozen *here* vanishes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from tbrm_theory.behaviours import Components
from tbrm_theory.dynamic_programming import Solution, soft_policy, solve
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.losses import LOSSES, TrajectoryScores
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.occupancy import Enumeration, enumerate_trajectories
from tbrm_theory.scores import table_scores
from tbrm_theory.shapes import PerLayerState, PerLayerStateAction
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

Rows: TypeAlias = Float[Tensor, "rows parameters"]


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
    listed: Enumeration | None = None
    """All trajectories, if they are listed already."""

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
        """``E loss``; where the method holds what depends on the row, its gradient alone means something."""
        loss = LOSSES[self.loss]
        logits, learned = self.logits(rows), rows[..., self.logit_count :]
        group = {"group_size": 2} if loss.needs_group else {}
        values = loss.function(self._scores(logits, learned), beta=self.mdp.beta, **group, **self.options)
        return (self._log_law(logits).exp() * values).sum(-1)

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

    # -- data ------------------------------------------------------------------------------------------------------

    @cached_property
    def _listed(self) -> Enumeration:
        return enumerate_trajectories(self.mdp) if self.listed is None else self.listed

    @cached_property
    def _rollouts(
        self,
    ) -> tuple[Int64[Tensor, " rollouts"], Float[Tensor, " rollouts"], Float[Tensor, "rollouts steps"]]:
        """Which trajectories data hold, one rollout for each policy that draws it; their log-law; ``log μ`` of each step.

        The last two mean nothing for data of ``π_θ`` itself.
        """
        listed = self._listed
        if self.data is None:
            unknown = listed.log_dynamics.new_zeros(listed.states.shape)
            return torch.arange(len(unknown), device=unknown.device), unknown[:, 0], unknown
        which, law, steps = [], [], []
        for weight, log_policy in self.data:
            log_law = listed.log_law(log_policy)
            drawn = (log_law > -torch.inf).nonzero().squeeze(-1)
            taken = zip(log_policy, listed.states[drawn].T, listed.actions[drawn].T, strict=True)
            which.append(drawn)
            law.append(math.log(weight) + log_law[drawn])
            steps.append(torch.stack([log[states, actions] for log, states, actions in taken], dim=-1))
        return torch.cat(which), torch.cat(law), torch.cat(steps)

    @cached_property
    def _groups(self) -> Int64[Tensor, "groups members"]:
        """Every batch, as indices of rollouts: one alone, or any two from one first state, in either order."""
        start = self._listed.states[self._rollouts[0], 0]
        if not LOSSES[self.loss].needs_group:
            return torch.arange(len(start), device=start.device).unsqueeze(-1)
        return (start.unsqueeze(-1) == start).nonzero()

    @property
    def batch_count(self) -> int:
        """Trajectories, or pairs of them, that an expectation sums over."""
        return len(self._groups)

    @cached_property
    def _batches(self) -> TrajectoryBatch:
        which = self._rollouts[0][self._groups]
        states = self._listed.states[which]
        return TrajectoryBatch(states, self._listed.actions[which], torch.ones_like(states, dtype=torch.bool))

    def _log_law(self, logits: PerLayerStateAction) -> Float[Tensor, "... groups"]:
        """The log-probability of every batch, held: the members are independent given their first state."""
        policy = tuple(soft_policy(table).detach() for table in logits)
        law = self._rollouts[1] if self.data is not None else self._listed.log_law(policy)
        start = self.mdp.initial[self._batches.states[..., 0, 0]].log()
        return law[..., self._groups].sum(-1) - (self._groups.shape[-1] - 1) * start

    # -- scores ----------------------------------------------------------------------------------------------------

    def _scores(self, logits: PerLayerStateAction, learned: Float[Tensor, "... learned"]) -> TrajectoryScores:
        """Of every batch, ``(rows, groups, members)`` and ``(rows, groups, members, steps)``."""
        reads, own = LOSSES[self.loss].fields, LEARNED.get(self.loss)
        tables, values = tuple(table.unsqueeze(-3) for table in logits), learned.unsqueeze(-2)
        held = tuple(table.detach() for table in tables)
        sizes = [len(valid) for valid in self.mdp.valid]
        scores = table_scores(
            tables,
            self.mdp.log_reference,
            self.mdp.reward,
            self._batches,
            reference_first_logits=self.mdp.log_reference[0] if "reference_initial_value" in reads else None,
            frozen_first_logits=held[0] if "frozen_initial_value" in reads else None,
            frozen_logits=held if "frozen_value" in reads else None,
            log_partition=values if own == "log_partition" else None,
            baseline=(values if own == "baseline" else self.reference_value) if "baseline" in reads else None,
            critic=values.split(sizes, dim=-1) if own == "critic" else None,
            entropy="entropy" in reads,
        )
        if "behaviour_log_policy" not in reads:
            return scores
        drawn_by_itself = self.data is None or self.ratio_one
        behaviour = scores.log_policy.detach() if drawn_by_itself else self._rollouts[2][self._groups]
        return replace(scores, behaviour_log_policy=behaviour)

    @cached_property
    def reference_value(self) -> Float[Tensor, " starts"]:
        """``log E_{π_ref}[exp(r/β) | s_1]``, which A*-PO estimates before it trains; ``V*(s_1)`` on deterministic transitions."""
        listed = self._listed
        exponent = listed.sum_along(self.mdp.reward) / self.mdp.beta + listed.log_law(self.mdp.log_reference)
        of_start = listed.states[:, 0] == torch.arange(len(self.mdp.initial), device=self.mdp.initial.device).unsqueeze(
            -1
        )
        joint = torch.where(of_start, exponent, -torch.inf).logsumexp(-1)
        return torch.where(self.mdp.initial > 0, joint - self.mdp.initial.log(), 0.0)
