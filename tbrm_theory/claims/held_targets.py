"""F6, F7: what is held decides: a frozen value at the state itself traps, a frozen target one step ahead does no harm.

Soft Q-learning in two readings of [Y] App. E. In the first the frozen ``V`` is all there is of the value and the
log-ratio is trained; in the second ("-q") the logit is trained and only what follows is held: ``V(s_{h+1})``
(one-step), the sum over the later steps (multi-step).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tbrm_theory.claims import by_hand
from tbrm_theory.claims.cases import Case, case_of
from tbrm_theory.claims.comparison import Comparison
from tbrm_theory.claims.points_of_rest import pair_masses
from tbrm_theory.claims.registry import claim
from tbrm_theory.claims.residual_identities import leaves, terms
from tbrm_theory.claims.small_problems import PROBLEMS, any_problem, draw_of, rows_of, update_of
from tbrm_theory.claims.starting_points import THRESHOLD
from tbrm_theory.expected_updates import ExpectedUpdate
from tbrm_theory.families import make
from tbrm_theory.losses import LOSSES
from tbrm_theory.random_tables import seeded
from tbrm_theory.scores import table_scores
from tbrm_theory.trajectories import TrajectoryBatch

__all__: list[str] = []

# -- F6 ------------------------------------------------------------------------------------------------------------

FROZEN = ("sql-one-step", "sql-multi-step", "tbrm-iterative")
FREE = ("sql-one-step-q", "sql-multi-step-q", "tbrm")


def _bandit(seed: int) -> Case:
    """X5's, every other one with an advantage below the threshold."""
    share = 1 - torch.rand((), generator=seeded(seed), dtype=torch.float64).item()
    advantage = share * THRESHOLD if seed % 2 else THRESHOLD + 40 * share
    return case_of(make("two-armed-bandit", advantage=advantage), "F6", seed)


def _advantage(case: Case) -> float:
    return case.mdp.regularized_reward[0][0, 0].item() - case.mdp.regularized_reward[0][0, 1].item()


def _bandit_losses(case: Case, names: tuple[str, ...]) -> Tensor:
    """Of the logits ``(0,0)`` and ``(a,0)`` on uniform data with V frozen at ``(0,0)``, ``(names, 2)``."""
    logits = (torch.tensor([[[0.0, 0.0]], [[_advantage(case), 0.0]]], dtype=torch.float64),)
    arms = torch.tensor([[0], [1]])
    both = TrajectoryBatch(torch.zeros_like(arms), arms, torch.ones_like(arms, dtype=torch.bool))
    start = (torch.zeros(1, 2, dtype=torch.float64),)
    scores = table_scores(logits, case.mdp.log_reference, case.mdp.reward, both, frozen_logits=start)
    return torch.stack([LOSSES[name].function(scores, beta=case.mdp.beta) for name in names])


@claim("F6.a", source="[Y] App. E, F; own", problem=_bandit, problems=PROBLEMS)
def frozen_values_score_alike(case: Case) -> Comparison:
    """X5's bandit: SQL, one-step and multi-step, and iterative TBRM give (0,0) a²/2 and (a,0) (a + log(1+e^-a) - log 2)²

    Left: the three losses. Right: the formulas. *Proof.* On one step with one value frozen they are one loss; X5.a. ∎
    """
    a = _advantage(case)
    kept, moved = a * a / 2, (a + math.log1p(math.exp(-a)) - math.log(2)) ** 2
    left = _bandit_losses(case, FROZEN)
    right = torch.tensor([kept, moved], dtype=torch.float64).expand_as(left)
    return Comparison(left, right, torch.tensor((3 + 2 * a) ** 2, dtype=torch.float64), 60)


@claim("F6.b", source="own", problem=_bandit, problems=PROBLEMS)
def frozen_values_trap_alike(case: Case) -> Comparison:
    """so all three keep (0,0) if and only if a ≥ 1.88308…; SQL on logits and TBRM move to (a,0) at any a

    Left: the loss of the logits that win: with a frozen value ``(0,0)`` from the threshold on and ``(a,0)`` below;
    else ``(a,0)``. Right: that of the others. *Proof.* X5.c; on one step SQL on logits is TBRM (F7.b). ∎
    """
    a = _advantage(case)
    frozen, free = _bandit_losses(case, FROZEN), _bandit_losses(case, FREE)
    winner = 0 if a >= THRESHOLD else 1
    left = torch.cat([frozen[:, winner], free[:, 1]])
    right = torch.cat([frozen[:, 1 - winner], free[:, 0]])
    return Comparison(left, right, torch.tensor((3 + 2 * a) ** 2, dtype=torch.float64), 60, "at most")


# -- F7 ------------------------------------------------------------------------------------------------------------


def _mixture(case: Case) -> tuple[list[tuple[float, tuple[Tensor, ...]]], Tensor]:
    """One of two policies for each episode, one of which leaves out actions in some cases; and the law of the trajectories."""
    parts = [(0.25, draw_of(case, case.log_policy)), (0.75, draw_of(case, case.other_policy))]
    law = sum((weight * case.listed.log_law(policy).exp() for weight, policy in parts), torch.tensor(0.0))
    return parts, law


@claim("F7.a", source="own", problem=any_problem, problems=PROBLEMS)
def frozen_target_is_fitted_iteration(case: Case) -> Comparison:
    """SQL on logits, one-step: its update is 2 d^μ_h(s,a) (Q_θ - T_β Q_θ)(s,a), for any data and any transitions

    a mixture too: μ enters only through the mass of pairs. So on data that have every pair, κ = ∞ or not, it rests
    exactly where Q = T_β Q, at Q* (I1). Left: the expected update by ``sql_one_step_q_loss``. Right: masses by sums
    over trajectories, ``T_β`` over the edges. *Proof.* The target is held, so the gradient is ``2 E[1{s_h=s, a_h=a}
    (logit - R_β - V_θ(s_{h+1}))]``, and given ``(s_h,a_h)`` the next state is drawn from P whoever acts. ∎
    """
    parts, law = _mixture(case)
    update = update_of(case, "sql-one-step-q", parts)
    left = update(rows_of(update, case))
    masses, backed_up = pair_masses(case, law), by_hand.backup(case, by_hand.values(case.logits))
    right = tuple(
        2 * mass * torch.where(valid, q - target, 0.0)
        for mass, valid, q, target in zip(masses, case.mdp.valid, case.logits, backed_up, strict=True)
    )
    size = case.mdp.horizon * by_hand.size(law.log(), terms(case, case.logits)).unsqueeze(-1)
    return Comparison(left, by_hand.existing(case, right), 2 * size, 4 * case.sweep + case.listing)


@claim("F7.b", source="own", problem=any_problem, problems=PROBLEMS)
def frozen_target_on_one_step(case: Case) -> Comparison:
    """on one step SQL on logits, one-step and multi-step, is TBRM: value and gradient

    Tried on the last layer of the problems alone, every pair once. Left: ``sql_one_step_q_loss`` and
    ``sql_multi_step_q_loss``. Right: the mean of ``(logit - R_β)²``, and autograd through it. *Proof.* Nothing
    follows the last step, so nothing is frozen. ∎
    """
    valid = case.mdp.valid[-1]
    states, actions = valid.nonzero(as_tuple=True)
    batch = TrajectoryBatch(states.unsqueeze(-1), actions.unsqueeze(-1), torch.ones(len(states), 1, dtype=torch.bool))
    left = []
    for name in ("sql-one-step-q", "sql-multi-step-q"):
        own = leaves(case, case.logits)[-1]
        q = (torch.where(valid, own, -torch.inf),)
        scores = table_scores(q, case.mdp.log_reference[-1:], case.mdp.reward[-1:], batch, frozen_logits=q)
        left.append(_with_gradient(LOSSES[name].function(scores, beta=case.mdp.beta), own))
    again = leaves(case, case.logits)[-1]
    residual = again[:, states, actions] - case.mdp.regularized_reward[-1][states, actions]
    right = _with_gradient(residual.square().mean(-1), again)
    size = by_hand.magnitude(case, [case.logits, tuple(table / case.mdp.beta for table in case.mdp.reward)])
    scale = 2 * (size + by_hand.magnitude(case, [case.mdp.log_reference])).square().amax()
    return Comparison(torch.stack(left), right, scale, 2 * case.sweep + len(states))


def _with_gradient(loss: Tensor, table: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss.sum(), table)
    return torch.cat([loss.detach().unsqueeze(-1), gradient.flatten(1)], dim=-1)


@claim("F7.c", source="own", problem=any_problem, problems=PROBLEMS)
def where_ppo_rests(case: Case) -> Comparison:
    """PPO at ratio 1, no entropy: at (π*, V* + c) its update is β c(s) [d(s,a) - π*(a|s) d(s)], in the critic 2 c(s) d(s)

    for any data, noise, mixtures and omitted actions included, and any c, with λ = 1. So it rests at ``(π*, V*)``,
    where TBRM does not (X2); a critic that is wrong pulls only off-policy. Left: the expected update by ``ppo_loss``.
    Right: masses by sums over trajectories. *Proof.* At π* ``r_k/β - log π*/π_ref = V*(s_k) - E V*(s_{k+1})``,
    whichever action was taken, so the advantage is ``-c(s_h)`` plus noise of mean 0 given ``(s_h, a_h)``. The
    policy's update is ``-β E A_h ∇log π(a_h|s_h)`` and the critic's ``-2 E A_h``. ∎
    """
    parts, law = _mixture(case)
    update = update_of(case, "ppo", parts, ratio_one=True, options={"entropy_coefficient": 0.0})
    gauge = tuple(table[0] for table in case.gauge)
    left = _ppo(update, case, gauge)
    policy, critic = [], []
    for mass, log, c in zip(pair_masses(case, law), case.solution.log_policy, gauge, strict=True):
        state = mass.sum(-1)
        policy.append(c.unsqueeze(-1) * (mass - log.exp() * state.unsqueeze(-1)))
        critic.append(2 * c * state)
    right = torch.cat([by_hand.existing(case, tuple(policy)), *critic])
    return Comparison(left, right, _ppo_scale(case, law), 4 * case.sweep + case.listing)


@claim("F7.d", source="own", problem=any_problem, problems=PROBLEMS)
def ppo_rests_for_any_lambda(case: Case) -> Comparison:
    """… and at (π*, V*) it rests for any λ, whoever drew the data, and on-policy

    Left: the expected update by ``ppo_loss`` at λ = ½ of the mixture, and at λ = 0 on-policy. Right: 0. *Proof.* Each
    ``δ_k = r_k/β - log π*/π_ref + V*(s_{k+1}) - V*(s_k)`` has mean 0 given ``(s_k, a_k)`` and all before, hence the
    advantage too. ∎
    """
    parts, law = _mixture(case)
    nothing = tuple(torch.zeros_like(table) for table in case.solution.v)
    left = []
    for data, decay in ((parts, 0.5), (None, 0.0)):
        options = {"entropy_coefficient": 0.0, "gae_lambda": decay}
        left.append(_ppo(update_of(case, "ppo", data, ratio_one=True, options=options), case, nothing))
    found = torch.stack(left)
    own = case.listed.log_law(case.solution.log_policy).exp()
    scale = _ppo_scale(case, law) + _ppo_scale(case, own)
    return Comparison(found, torch.zeros_like(found), scale, 4 * case.sweep + case.listing)


def _ppo(update: ExpectedUpdate, case: Case, c: tuple[Tensor, ...]) -> Tensor:
    """The update at π* and ``V* + c``, that of the policy in units of β."""
    row = update.row(case.solution.q, tuple(value + own for value, own in zip(case.solution.v, c, strict=True)))
    policy, critic = update(row.unsqueeze(0)).squeeze(0).split([update.logit_count, len(row) - update.logit_count])
    return torch.cat([policy / case.mdp.beta, critic])


def _ppo_scale(case: Case, law: Tensor) -> Tensor:
    tables = [
        case.solution.log_policy,
        case.mdp.log_reference,
        tuple(table / case.mdp.beta for table in case.mdp.reward),
    ]
    values = [case.solution.v, tuple(table[0] for table in case.gauge)]
    return 4 * case.mdp.horizon * by_hand.size(law.log(), by_hand.magnitude(case, tables, values))
