"""F1-F3, F5: the losses of the family are one another's: TBRM, trajectory balance, VarGrad, pairs, leave-one-out policy gradients.

One side is ``expected_updates`` on all trajectories or on all pairs of them, hence ``losses``; the other is
``by_hand``, or autograd through it or through the solver. ``g_θ = log π_θ/π_ref - r/β``, so ``f_θ = V_θ(s_1) + g_θ``
(I5).
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from tbrm_theory import dynamic_programming
from tbrm_theory.claims import by_hand
from tbrm_theory.claims.cases import Case
from tbrm_theory.claims.comparison import Comparison
from tbrm_theory.claims.registry import claim
from tbrm_theory.claims.residual_identities import leaves, terms
from tbrm_theory.claims.small_problems import PROBLEMS, any_problem, data_of, rows_of, update_of
from tbrm_theory.losses import LOSSES, TrajectoryScores
from tbrm_theory.random_tables import seeded
from tbrm_theory.scores import table_scores
from tbrm_theory.shapes import PerLayerStateAction
from tbrm_theory.trajectories import TrajectoryBatch

__all__ = ["pair_weights", "pairs_of"]


def pairs_of(case: Case) -> tuple[Tensor, Tensor]:
    """All ``(τ, τ')`` from one first state."""
    start = case.listed.states[:, 0]
    one, other = (start.unsqueeze(-1) == start).nonzero(as_tuple=True)
    return one, other


def pair_weights(case: Case, log_law: Tensor) -> Tensor:
    """The log-probability of every pair: independent given the first state."""
    one, other = pairs_of(case)
    start = case.mdp.initial[case.listed.states[one, 0]].log()
    return log_law[..., one] + log_law[..., other] - start


@lru_cache(maxsize=4)
def _expected(case: Case, loss: str) -> Tensor:
    """The loss on the data of :func:`data_of`, for both draws of logits."""
    update = update_of(case, loss, [(1.0, data_of(case))])
    return update.expected_loss(rows_of(update, case))


def _law(case: Case) -> Tensor:
    return case.listed.log_law(data_of(case))


def _pair_scale(case: Case) -> Tensor:
    """``E (|f| + |f'|)²`` over pairs, in absolute terms."""
    one, other = pairs_of(case)
    size = terms(case, case.logits)
    return by_hand.size(pair_weights(case, _law(case)), (size[..., one] + size[..., other]).square())


def _pair_operations(case: Case) -> int:
    return 2 * case.sweep + 2 * len(pairs_of(case)[0]) + case.listing


# -- F1 ------------------------------------------------------------------------------------------------------------


@claim("F1.a", source="own", problem=any_problem, problems=PROBLEMS)
def vargrad_is_the_variance(case: Case) -> Comparison:
    """E over groups of VarGrad = min_c E_μ(f_θ + c(s_1))² = E Var_μ(g_θ|s_1)

    Left: ``vargrad_loss`` on all pairs of trajectories. Right: the conditional variance over all trajectories.
    *Proof.* The (n-1)-variance of n independent draws has the variance as its mean; ``f_θ`` is ``g_θ`` plus a
    function of ``s_1``, and of all numbers to subtract the mean is the best. ∎
    """
    f, log_law = by_hand.residual(case, case.logits), _law(case)
    mean = by_hand.mean_by_start(case, log_law, f)[..., case.listed.states[:, 0]]
    right = by_hand.expectation(log_law, (f - mean).square())
    return Comparison(_expected(case, "vargrad"), right, _pair_scale(case), _pair_operations(case))


@claim("F1.b", source="own", problem=any_problem, problems=PROBLEMS)
def tbrm_is_vargrad_and_an_offset(case: Case) -> Comparison:
    """L_μ(θ + c) = E VarGrad(θ) + E (c(s_1) + E_μ[f_θ|s_1])² for any c on the logits of layer 1

    so VarGrad is what is left of TBRM at the best offset, and TBRM also trains the value. Left: ``tbrm_loss`` on all
    trajectories. Right: ``vargrad_loss`` on all pairs, and the conditional mean by hand. *Proof.* I8.b, and ``E X² =
    Var X + (E X)²``. ∎
    """
    update = update_of(case, "tbrm", [(1.0, data_of(case))])
    shift = case.gauge[0]
    moved = (case.logits[0] + shift.unsqueeze(-1), *case.logits[1:])
    rows = torch.stack([update.row(tuple(table[i] for table in moved), ()) for i in range(len(shift))])
    mean = by_hand.mean_by_start(case, _law(case), by_hand.residual(case, case.logits))
    right = _expected(case, "vargrad") + (case.mdp.initial * (mean + shift).square()).sum(-1)
    scale = _pair_scale(case) + 2 * by_hand.size(_law(case), terms(case, moved).square())
    return Comparison(update.expected_loss(rows), right, scale, _pair_operations(case))


# -- F2 ------------------------------------------------------------------------------------------------------------


@claim("F2", source="own", problem=any_problem, problems=PROBLEMS)
def tied_trajectory_balance(case: Case) -> Comparison:
    """trajectory balance with log Z tied to V_θ(s_1) is TBRM, value and gradient

    Left: ``trajectory_balance_loss`` on all trajectories, ``log Z`` the ``logsumexp`` of the logits differentiated
    by. Right: the square of the definition of ``f_θ``, and autograd through that. *Proof.* I5. ∎
    """
    log_law = case.listed.log_law(case.log_behaviour)
    own, again = leaves(case, case.logits), leaves(case, case.logits)
    q = dynamic_programming.admissible_logits(case.mdp, own)
    scores = _scores(case, q, _every(case).unsqueeze(-1), log_partition=torch.logsumexp(q[0], dim=-1).unsqueeze(-2))
    balance = LOSSES["trajectory-balance"].function(scores, beta=case.mdp.beta)
    f = by_hand.residual(case, dynamic_programming.admissible_logits(case.mdp, again))
    left = _value_and_gradient(case, by_hand.expectation(log_law, balance), own)
    right = _value_and_gradient(case, by_hand.expectation(log_law, f.square()), again)
    scale = 2 * by_hand.size(log_law, terms(case, case.logits).square()).unsqueeze(-1)
    return Comparison(left, right, scale, 4 * case.sweep + 2 * case.listing)


def _every(case: Case) -> Tensor:
    return torch.arange(len(case.listed.states))


def _scores(case: Case, q: PerLayerStateAction, batches: Tensor, **learned: Tensor) -> TrajectoryScores:
    """Of batches of listed trajectories, ``(draws, batches, members)``."""
    states, actions = case.listed.states[batches], case.listed.actions[batches]
    batch = TrajectoryBatch(states, actions, torch.ones_like(states, dtype=torch.bool))
    tables = tuple(table.unsqueeze(-3) for table in q)
    return table_scores(tables, case.mdp.log_reference, case.mdp.reward, batch, **learned)  # type: ignore[arg-type]


def _value_and_gradient(case: Case, loss: Tensor, logits: PerLayerStateAction) -> Tensor:
    """Of each draw in a row, ``(draws, 1 + cells)``."""
    gradient = torch.autograd.grad(loss.sum(), logits, allow_unused=True, materialize_grads=True)
    return torch.cat([loss.detach().unsqueeze(-1), by_hand.existing(case, gradient)], dim=-1)


# -- F3 ------------------------------------------------------------------------------------------------------------


@claim("F3.a", source="[Y] App. E; own", problem=any_problem, problems=PROBLEMS)
def pairs_are_differences(case: Case) -> Comparison:
    """E(g - g')² = E(f_θ(τ) - f_θ(τ'))² = 2 E VarGrad, two responses to one prompt

    Left: ``pairwise_loss`` on all pairs, once as it is and once against ``vargrad_loss``. Right: differences of
    residuals by their definition, and twice VarGrad. *Proof.* I10; the variance of two numbers is half the square of
    their difference. ∎
    """
    one, other = pairs_of(case)
    f = by_hand.residual(case, case.logits)
    weights = pair_weights(case, _law(case))
    pairwise = _expected(case, "pairwise")
    left = torch.stack([pairwise, pairwise])
    right = torch.stack(
        [by_hand.expectation(weights, (f[..., one] - f[..., other]).square()), 2 * _expected(case, "vargrad")]
    )
    return Comparison(left, right, _pair_scale(case), _pair_operations(case))


@claim("F3.b", source="own", problem=any_problem, problems=PROBLEMS)
def on_policy_gradients_of_groups(case: Case) -> Comparison:
    """on-policy, the law held: ∇VarGrad = ½∇E(g - g')² = -(2/β) ∇J_β(π_θ)

    as for TBRM's policy (I9), with no value in it. Left: ``vargrad_loss`` and ``pairwise_loss`` on all pairs. Right:
    autograd through ``objective``. *Proof.* ``∇½E(g - g')² = E(g - g')(∇log π_θ(τ) - ∇log π_θ(τ')) = 2 E g ∇log
    π_θ(τ)``: the scores have mean 0 given ``s_1``, and the two draws are independent. And ``E g ∇log π_θ = -∇J_β/β``
    (I9). ∎
    """
    left = []
    for loss, factor in (("vargrad", 1.0), ("pairwise", 0.5)):
        update = update_of(case, loss, None)
        left.append(factor * update(rows_of(update, case)))
    own = leaves(case, case.logits)
    q = dynamic_programming.admissible_logits(case.mdp, own)
    policy = tuple(dynamic_programming.soft_policy(table) for table in q)
    value = dynamic_programming.objective(case.mdp, policy).sum()
    gradient = by_hand.existing(case, torch.autograd.grad(value, own))
    one, other = pairs_of(case)
    size = terms(case, case.logits) + by_hand.magnitude(case, [case.soft_policy])
    weights = pair_weights(case, case.listed.log_law(case.soft_policy))
    scale = 8 * by_hand.size(weights, size[..., one] + size[..., other]).unsqueeze(-1)
    return Comparison(torch.stack(left), -2 / case.mdp.beta * gradient, scale, 2 * _pair_operations(case))


# -- F5 ------------------------------------------------------------------------------------------------------------

GROUP = 4


@claim("F5", source="own", problem=any_problem, problems=PROBLEMS)
def leave_one_out_is_vargrad(case: Case) -> Comparison:
    """RLOO at ratio 1, the KL in the reward: its gradient is (β/2) ∇VarGrad, for any rollouts

    in groups of four, drawn at random among all trajectories of a first state. Left: autograd through ``rloo_loss``.
    Right: autograd through the sample variance of ``f_θ`` by its definition. *Proof.* The advantage is ``R_i -
    mean_{j≠i} R_j = n/(n-1) (R_i - R̄)`` with ``R = -β g``, so the gradient is ``-(1/n) Σ A_i ∇log π(τ_i) = β/(n-1) Σ
    (g_i - ḡ) ∇g_i``; and that of ``Σ (g_i - ḡ)²/(n-1)`` is ``2/(n-1) Σ (g_i - ḡ) ∇g_i``. Nothing was asked of the
    rollouts. ∎ In units of β.
    """
    groups = _random_groups(case)
    own, again = leaves(case, case.logits), leaves(case, case.logits)
    scores = _scores(case, dynamic_programming.admissible_logits(case.mdp, own), groups)
    scores = replace(scores, behaviour_log_policy=scores.log_policy.detach())
    rloo = LOSSES["rloo"].function(scores, beta=case.mdp.beta, group_size=GROUP).mean(-1) / case.mdp.beta
    f = by_hand.residual(case, dynamic_programming.admissible_logits(case.mdp, again))[..., groups]
    spread = (f - f.mean(-1, keepdim=True)).square().sum(-1) / (GROUP - 1)
    left = torch.autograd.grad(rloo.sum(), own)
    right = torch.autograd.grad(0.5 * spread.mean(-1).sum(), again)
    scale = GROUP * 2 * terms(case, case.logits)[..., groups].amax((-1, -2)).unsqueeze(-1)
    operations = 4 * case.sweep + 8 * groups.numel()
    return Comparison(by_hand.existing(case, left), by_hand.existing(case, right), scale, operations)


def _random_groups(case: Case, count: int = 8) -> Tensor:
    """Indices of listed trajectories, ``(count, GROUP)``, those of a row from one first state."""
    start, generator = case.listed.states[:, 0], seeded(case.seed)
    first = torch.randint(len(start), (count,), generator=generator)
    order = start.argsort(stable=True)
    sizes = start.bincount(minlength=len(case.mdp.initial))
    begins = (sizes.cumsum(0) - sizes)[start[first]].unsqueeze(-1)
    share = torch.rand(count, GROUP, generator=generator, dtype=torch.float64)
    within = (share * sizes[start[first]].unsqueeze(-1)).to(torch.int64)
    return order[begins + within]
