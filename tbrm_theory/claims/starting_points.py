"""X5 and X6: what the value of the first state does while one learns: frozen it traps, uncalibrated it pulls at the policy.

X5 is about the two-armed bandit with advantage ``a``: ``R_β = (a, 0)``, data uniform, ``V`` frozen at the logits
``(0, 0)``. X6 is about the problems of the families with their rewards taken away, and a reference model whose logits
are ``log π_ref + c(s)``.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from tbrm_theory import losses, population
from tbrm_theory.claims import by_hand
from tbrm_theory.claims.cases import Case, case_of, cases_in_turn
from tbrm_theory.claims.comparison import Comparison
from tbrm_theory.claims.identities import deterministic
from tbrm_theory.claims.registry import claim
from tbrm_theory.claims.residual_identities import leaves
from tbrm_theory.dynamic_programming import soft_policy
from tbrm_theory.families import make
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.objectives import SampleObjective
from tbrm_theory.optimisers import least_squares_plan
from tbrm_theory.random_tables import seeded
from tbrm_theory.scores import table_scores
from tbrm_theory.shapes import PerLayerStateAction, StateActionTable
from tbrm_theory.trajectories import TrajectoryBatch

__all__ = ["THRESHOLD", "bandit_scores", "without_reward"]

THRESHOLD = 1.8830884279366547
"""The positive root of ``a - a/√2 + log(1 + e^-a) = log 2``: from this advantage on the frozen value keeps the worse logits (X5.c)."""


# -- X5 ------------------------------------------------------------------------------------------------------------


def bandit_scores(
    mdp: RegularizedMDP, logits: PerLayerStateAction, loss: str, frozen: StateActionTable | None = None
) -> Tensor:
    """The loss of bandit logits ``(…, 1, 2)`` on uniform data.

    Args:
        frozen: the logits ``(…, 1, 2)`` whose value the iterative variant keeps; ``(0, 0)`` for None.
    """
    arms = torch.tensor([[0], [1]])
    both = TrajectoryBatch(torch.zeros_like(arms), arms, torch.ones_like(arms, dtype=torch.bool))
    kept = torch.zeros_like(mdp.reward[0]) if frozen is None else frozen
    scores = table_scores(logits, mdp.log_reference, mdp.reward, both, frozen_first_logits=kept)
    return losses.squared_loss(losses.RESIDUALS[loss](scores, beta=mdp.beta))


def _advantage(seed: int) -> float:
    """10 for seed 0, the paper's; others up to 40."""
    return 10.0 if seed == 0 else 40 * float(torch.rand((), generator=seeded(seed), dtype=torch.float64))


def _bandit(seed: int) -> Case:
    return case_of(make("two-armed-bandit", advantage=_advantage(seed)), "X5", seed)


def _unfolded_bandit(seed: int) -> Case:
    return case_of(make("two-armed-bandit", advantage=_advantage(seed), folded=False), "X5", seed)


def _paper_bandit(seed: int) -> Case:
    return _bandit(0)


def _pair_of_logits(case: Case) -> PerLayerStateAction:
    """The class ``{(0,0), (a,0)}``, a batch of two."""
    return (torch.tensor([[[0.0, 0.0]], [[_advantage(case.seed), 0.0]]], dtype=torch.float64),)


def _bandit_comparison(case: Case, expected: list[float], loss: str) -> Comparison:
    left = bandit_scores(case.mdp, _pair_of_logits(case), loss)
    right = torch.tensor(expected, dtype=torch.float64)
    return Comparison(left, right, torch.tensor((3 + 2 * _advantage(case.seed)) ** 2, dtype=torch.float64), 60)


@claim("X5.a", source="[Y] App. F; own", problem=_bandit, problems=50)
def frozen_value_scores(case: Case) -> Comparison:
    """V frozen at (0,0): the loss of (0,0) is a²/2 and that of (a,0) is (a + log(1+e^-a) - log 2)²

    At ``a = 10`` 50 and 86.618354. Left: ``iterative_residual``, squared. Right: the formula. *Proof.* ``f = log 2 +
    log π - R_β``. At (0,0) that is ``(-a, 0)``; at ``(a,0)``, ``log π = (-s, -a-s)`` with ``s = log(1+e^-a)``, it is
    ``log 2 - a - s`` for both arms. ∎
    """
    a = _advantage(case.seed)
    right = [a * a / 2, (a + math.log1p(math.exp(-a)) - math.log(2)) ** 2]
    return _bandit_comparison(case, right, "tbrm-iterative")


@claim("X5.b", source="[Y] App. F; own", problem=_bandit, problems=50)
def free_value_scores(case: Case) -> Comparison:
    """TBRM: the loss of (0,0) is a²/2 and that of (a,0) is 0

    Left: ``tbrm_residual``, squared. Right: the formula. *Proof.* ``logit - R_β``. ∎
    """
    a = _advantage(case.seed)
    return _bandit_comparison(case, [a * a / 2, 0.0], "tbrm")


@claim("X5.c", source="own", problem=_bandit, problems=50)
def frozen_value_traps(case: Case) -> Comparison:
    """the frozen value keeps (0,0) if and only if a ≥ 1.88308…, TBRM never

    Left: the loss of the logits that win, by ``iterative_residual``: ``(0,0)`` from the threshold on, ``(a,0)``
    below. Right: that of the others. *Proof.* ``(0,0)`` wins iff ``g(a) = a(1 - 1/√2) + log(1+e^-a) - log 2 ≥ 0``
    (X5.a). ``g(0) = 0``; ``g'`` is negative until ``e^a = 1 + √2`` and positive after, so there is one positive root.
    ∎
    """
    scores = bandit_scores(case.mdp, _pair_of_logits(case), "tbrm-iterative")
    a = _advantage(case.seed)
    left, right = scores if a >= THRESHOLD else scores.flip(0)
    return Comparison(left, right, torch.tensor((3 + 2 * a) ** 2, dtype=torch.float64), 60, "at most")


@claim("X5.d", source="[Y] App. F; own", problem=_unfolded_bandit, problems=50)
def unfolded_scores(case: Case) -> Comparison:
    """r/β = (a,0), uniform reference: ½[(a - log 2)² + log² 2] and (a + log(1+e^-a) - 2 log 2)², TBRM log² 2 for (a,0)

    At ``a = 10`` 43.55, 74.20 and 0.48. Left: both residuals, squared. Right: the formulas: X5.a with ``R_β`` less
    ``log 2``.
    """
    a, ln2 = _advantage(case.seed), math.log(2)
    zero = ((a - ln2) ** 2 + ln2**2) / 2
    frozen = _bandit_comparison(case, [zero, (a + math.log1p(math.exp(-a)) - 2 * ln2) ** 2], "tbrm-iterative")
    free = _bandit_comparison(case, [zero, ln2**2], "tbrm")
    left, right = (torch.cat(sides) for sides in ((frozen.left, free.left), (frozen.right, free.right)))
    return Comparison(left, right, frozen.scale, frozen.operations)


@claim("X5.e", source="[Y] App. F", problem=_paper_bandit, problems=1)
def numbers_of_the_paper(case: Case) -> Comparison:
    """a = 10: 50.0 and 86.618354, TBRM 0; unfolded 43.55, 74.20 and 0.48, all to their last digit

    Left: the distance from the printed numbers. Right: half a unit of their last digit.
    """
    logits = _pair_of_logits(case)
    frozen, free = (bandit_scores(case.mdp, logits, loss) for loss in ("tbrm-iterative", "tbrm"))
    unfolded = make("two-armed-bandit", advantage=10.0, folded=False)
    other, other_free = (bandit_scores(unfolded, logits, loss) for loss in ("tbrm-iterative", "tbrm"))
    found = torch.stack([*frozen, free[1], *other, other_free[1]])
    printed = torch.tensor([50.0, 86.618354, 0.0, 43.55, 74.20, 0.48], dtype=torch.float64)
    digit = torch.tensor([0.1, 1e-6, 1e-6, 0.01, 0.01, 0.01], dtype=torch.float64)
    return Comparison((found - printed).abs(), digit / 2, torch.tensor(600.0, dtype=torch.float64), 60, "at most")


# -- X6 ------------------------------------------------------------------------------------------------------------


def without_reward(case: Case) -> Case:
    """The case with reward 0 and, for logits, those of a reference model: ``log π_ref + c(s)``, ``c`` the case's gauge."""
    mdp = RegularizedMDP(
        beta=case.mdp.beta,
        initial=case.mdp.initial,
        reward=[torch.zeros_like(table) for table in case.mdp.reward],
        reference=case.mdp.reference,
        transitions=case.mdp.transitions,
    )
    logits = tuple(log + c.unsqueeze(-1) for log, c in zip(mdp.log_reference, case.gauge, strict=True))
    return replace(case, mdp=mdp, logits=logits)


def small_and_deterministic(case: Case) -> str | None:
    """The exact minimiser exists for deterministic transitions; its rounding is judged by singular values."""
    if len(case.listed.states) > 400:
        return "more than 400 trajectories"
    return deterministic(case)


def _without_reward(seed: int) -> Case:
    return without_reward(next(cases_in_turn(seed)))


def _small_without_reward(seed: int) -> Case:
    return without_reward(next(case for case in cases_in_turn(seed) if not small_and_deterministic(case)))


def _start_value(case: Case) -> Tensor:
    """``V_ref(s_1) = c(s_1)``, for every trajectory."""
    return case.gauge[0][..., case.listed.states[:, 0]]


@claim("X6.a", source="[R] Prop. 1", problem=_without_reward, problems=50)
def loss_at_the_reference(case: Case) -> Comparison:
    """r = 0: L_μ(θ_ref) = E V_ref(s_1)², for any data

    with ``V_ref = c`` of logits ``log π_ref + c(s)``. Left: ``population_loss``. Right: the mean of ``c²``. *Proof.*
    I5 at ``π_θ = π_ref``. ∎
    """
    left = population.population_loss(case.mdp, case.logits, case.log_behaviour)
    right = (case.mdp.initial * case.gauge[0].square()).sum(-1)
    return Comparison(left, right, _size(case).square(), 2 * case.sweep + case.listing)


@claim("X6.b", source="[R] Prop. 1", problem=_without_reward, problems=50)
def reval_at_the_reference(case: Case) -> Comparison:
    """r = 0: ReVal's residual, with V_θ - V_ref for V_θ, is 0 at θ_ref on every trajectory

    Left: ``reval_residual``. Right: 0. *Proof.* I5 again. ∎
    """
    left = losses.reval_residual(_reference_scores(case, case.logits), beta=case.mdp.beta)
    return Comparison(left, torch.zeros_like(left), _size(case).unsqueeze(-1), 2 * case.sweep)


@claim("X6.c", source="own", problem=_without_reward, problems=50)
def spurious_first_gradient(case: Case) -> Comparison:
    """r = 0: ½∇L_μ(θ_ref) is E_μ[c(s_1) 1{s_1=s, a_1=a}] in layer 1, later e_h(s,a) - π_ref(a|s) e_h(s)

    with ``e_h = E_μ[c(s_1) 1{s_h=s, a_h=a}]``: 0 in later layers on data of π_ref, and never in the first, where it
    acts on the likely actions most and so moves the policy unless π_ref is uniform; ReVal's gradient is 0. Left:
    autograd through ``population_loss``, and through ``reval_residual²``. Right: sums over all trajectories, and 0.
    *Proof.* ``f = c(s_1)`` (X6.a), in C1's ``½∇L``. ∎
    """
    own = leaves(case, case.logits)
    loss = population.population_loss(case.mdp, own, case.log_behaviour)
    gradient = torch.autograd.grad(loss.sum() / 2, own, allow_unused=True, materialize_grads=True)
    log_law = case.listed.log_law(case.log_behaviour)
    squares = losses.reval_residual(_reference_scores(case, own), beta=case.mdp.beta).square()
    calm = by_hand.expectation(log_law, squares).sum() / 2
    reval = torch.autograd.grad(calm, own, allow_unused=True, materialize_grads=True)
    left = torch.stack([by_hand.existing(case, gradient), by_hand.existing(case, reval)])
    weighted = log_law.exp() * _start_value(case)
    right = []
    for h, reference in enumerate(case.mdp.reference):
        states, actions = reference.shape
        pair = case.listed.states[:, h] * actions + case.listed.actions[:, h]
        e = weighted.new_zeros(len(weighted), states * actions).index_add(-1, pair, weighted)
        e = e.unflatten(-1, (states, actions))
        right.append(e if h == 0 else e - reference * e.sum(-1, keepdim=True))
    expected = by_hand.existing(case, tuple(right))
    both = torch.stack([expected, torch.zeros_like(expected)])
    return Comparison(left, both, _size(case).unsqueeze(-1), 3 * case.sweep + 2 * case.listing)


@claim("X6.d", source="own", requires=[small_and_deterministic], problem=_small_without_reward, problems=50)
def both_minimisers_keep_the_reference(case: Case) -> Comparison:
    """r = 0, full support: TBRM's minimiser is π_ref with V(s_1) = 0, ReVal's is π_ref with V = V_ref

    so the spurious gradients of X6.c cancel in the end. Left: the exact minimiser, ``least_squares_plan`` on all
    trajectories; for ReVal with the return ``β V_ref(s_1)``, which makes TBRM's residual ReVal's. Right: ``log
    π_ref`` and ``0`` or ``c(s_1)``. *Proof.* ``π* = π_ref`` and ``V* = 0`` for ``r = 0``; C2, and the same with ``V_θ
    - V_ref``. ∎ Solving a least-squares problem multiplies rounding by its condition number, and by the size of the
    solution, whose error reaches ``log π`` through sums along a trajectory.
    """
    log_law = case.listed.log_law(case.log_behaviour)[0]
    offsets = torch.stack([torch.zeros_like(case.gauge[0][0]), case.gauge[0][0]])
    left, right = [], []
    for offset in offsets:
        observed = case.mdp.beta * offset[case.listed.states[:, 0]]
        objective = SampleObjective(case.mdp, case.trajectories, log_law.exp(), observed)
        plan = least_squares_plan(objective)
        first = by_hand.log_sum_exp(plan[0])
        left.append(torch.cat([_reached(case, tuple(soft_policy(q) for q in plan)), first[case.mdp.initial > 0]]))
        right.append(torch.cat([_reached(case, case.mdp.log_reference), offset[case.mdp.initial > 0]]))
    visits = torch.from_numpy(objective.features.toarray())
    weighted = objective.trajectory_weights.sqrt().unsqueeze(-1) * visits
    mass = objective.pair_mass()
    singular = torch.linalg.svdvals(weighted[:, mass > 0] * mass[mass > 0].rsqrt())
    positive = singular[singular > 1e-10 * singular[0]]
    condition = positive[0] / positive[-1] * mass[mass > 0].min().rsqrt()
    scale = condition * case.mdp.horizon * _size(case).max()
    return Comparison(torch.stack(left), torch.stack(right), scale, case.sweep * case.mdp.horizon + case.listing)


def _reached(case: Case, tables: PerLayerStateAction) -> Tensor:
    """The entries of the pairs that lie on some trajectory."""
    cells = []
    for h, table in enumerate(tables):
        seen = torch.zeros(table.shape, dtype=torch.bool)
        seen[case.listed.states[:, h], case.listed.actions[:, h]] = True
        cells.append(table[seen])
    return torch.cat(cells)


def _reference_scores(case: Case, logits: PerLayerStateAction) -> losses.TrajectoryScores:
    reference = torch.where(case.mdp.valid[0], case.logits[0].detach(), 0.0)
    return table_scores(
        logits, case.mdp.log_reference, case.mdp.reward, case.trajectories, reference_first_logits=reference
    )


def _size(case: Case) -> Tensor:
    """The largest terms of a residual along any trajectory."""
    return by_hand.magnitude(case, [case.logits, case.mdp.log_reference], [case.gauge]).amax(-1)
