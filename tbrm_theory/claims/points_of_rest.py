"""F4, F7: which updates rest at the optimum, and where others rest.

Left: ``expected_updates``, gradients of ``losses`` summed over all trajectories or all pairs of them. Right: 0, or
the formula, by sums over listed trajectories. An update on-policy holds the law of the data; π* means ``θ* = Q*``,
with ``V*`` for whatever else is learned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tbrm_theory.claims import by_hand
from tbrm_theory.claims.cases import Case, case_of
from tbrm_theory.claims.comparison import Comparison
from tbrm_theory.claims.family import pair_weights, pairs_of
from tbrm_theory.claims.registry import claim
from tbrm_theory.claims.residual_identities import terms
from tbrm_theory.claims.small_problems import (
    PROBLEMS,
    any_problem,
    certain_problem,
    data_of,
    noisy_problem,
    rows_of,
    update_of,
)
from tbrm_theory.claims.starting_points import without_reward
from tbrm_theory.families import make
from tbrm_theory.random_tables import seeded
from tbrm_theory.shapes import PerLayerStateAction

__all__ = ["REST_ON_POLICY", "dr_grpo_rest", "pair_masses"]

REST_ON_POLICY = (
    "tbrm",
    "vargrad",
    "trajectory-balance",
    "rloo",
    "reinforce",
    "pairwise",
    "dro",
    "tbrm-iterative",
    "a-star-po",
    "sql-multi-step",
    "pcl-multi-step",
)
_AT_ONCE = 3
"""How many of these a problem is tried with, by turns."""


def pair_masses(case: Case, law: Tensor) -> PerLayerStateAction:
    """``d_h(s,a)``, the law of ``(s_h, a_h)``, summed over trajectories."""
    tables = []
    for h, reference in enumerate(case.mdp.reference):
        pair = case.listed.states[:, h] * reference.shape[-1] + case.listed.actions[:, h]
        mass = law.new_zeros(*law.shape[:-1], reference.numel()).index_add(-1, pair, law)
        tables.append(mass.unflatten(-1, reference.shape))
    return tuple(tables)


def _at_optimum(case: Case) -> Tensor:
    """The absolute terms of ``f`` at θ*, and those of the values on the way."""
    return terms(case, case.solution.q) + by_hand.magnitude(case, [case.solution.log_policy], [case.solution.v])


def _operations(case: Case) -> int:
    return 4 * case.sweep + 2 * len(pairs_of(case)[0]) + case.listing


# -- F4: on-policy -------------------------------------------------------------------------------------------------


@claim("F4.a", source="own", problem=noisy_problem, problems=PROBLEMS)
def rest_at_the_optimum_on_policy(case: Case) -> Comparison:
    """stochastic transitions, on-policy: TBRM, VarGrad, TB, RLOO, REINFORCE, pairs, … rest at π*

    (:data:`REST_ON_POLICY`, three for each problem): the bias of X2 is off-policy only. Left: the expected update at
    θ*. Right: 0. *Proof.* ``E g ∇log π_θ(τ) = -∇J_β/β`` (I9) vanishes at π*. Each update of the policy is a multiple
    of that, plus ``E b ∇log π_θ`` with ``b`` a function of ``s_1`` or of another, independent rollout, which is 0.
    For suffixes from layer ``h`` it is the same from ``s_h`` on. What is learned beside it has the gradient ``2 E[(V
    + g)|s_1]``, 0 at ``V = V* = -E_{π*}[g|s_1]``. ∎
    """
    log_law = case.listed.log_law(case.solution.log_policy)
    found = []
    for turn in range(_AT_ONCE):
        update = update_of(case, REST_ON_POLICY[(case.seed // 2 * _AT_ONCE + turn) % len(REST_ON_POLICY)], None)
        unit = case.mdp.beta if update.loss in ("rloo", "reinforce") else 1.0
        found.append(update(update.optimum.unsqueeze(0)).squeeze(0) / unit)
    scale = 4 * case.mdp.horizon * by_hand.size(log_law, _at_optimum(case))
    left = torch.cat(found)
    return Comparison(left, torch.zeros_like(left), scale, _operations(case))


@claim("F4.b", source="own", problem=noisy_problem, problems=PROBLEMS)
def brm_does_not_rest(case: Case) -> Comparison:
    """stochastic transitions, any data: the slope of BRM at θ* along c_h(s) = V*(s), h ≥ 2, is 2 Σ_h E Var(V*(s_{h+1})|s_h,a_h)

    which is twice TBRM's noise floor (I7.d), and positive unless V* is constant there: over the successors of
    every pair visited. So BRM does not rest at θ*, not even on-policy. Left: the update by ``brm_loss`` at θ*,
    on-policy and on other data, along c. Right: sums of variances over all trajectories. *Proof.* At θ* the residual of a
    step is ``n_h = E[V*(s_{h+1})|s_h,a_h] - V*(s_{h+1})``, of mean 0 given ``(s_h,a_h)``, and moving by c changes it
    by ``c(s_h) - c(s_{h+1})``: the slope is ``-2 Σ E n_h V*(s_{h+1}) = 2 Σ E n_h²``. ∎
    """
    along = [torch.zeros_like(case.solution.v[0]), *case.solution.v[1:]]
    left, laws = [], []
    for data in (None, [(1.0, data_of(case))]):
        update = update_of(case, "brm", data)
        direction = update.row(
            tuple(c.unsqueeze(-1).expand_as(q) for c, q in zip(along, case.solution.q, strict=True)), ()
        )
        left.append((update(update.optimum.unsqueeze(0)).squeeze(0) * direction).sum())
        laws.append(case.listed.log_law(case.solution.log_policy if data is None else data_of(case)))
    log_law = torch.stack(laws)
    spread = case.listed.sum_along(by_hand.successor_variance(case, case.solution.v))
    right = 2 * by_hand.expectation(log_law, spread)
    scale = 2 * by_hand.size(log_law, _at_optimum(case).square())
    return Comparison(torch.stack(left), right, scale, _operations(case))


# -- F4: Dr. GRPO ----------------------------------------------------------------------------------------------------


def dr_grpo_rest(case: Case) -> PerLayerStateAction:
    """``log π`` of ``π(a|s) = 2β π_ref(a|s)/(λ(s) - Q(s,a))``, ``Q`` the expected return of π, backwards over the layers.

    ``λ > max Q`` is where the probabilities sum to 1; the sum is convex and falls, so Newton's method rises to it
    from the left.
    """
    policies: list[Tensor] = []
    value = torch.zeros(())
    for h in reversed(range(case.mdp.horizon)):
        q = torch.where(case.mdp.valid[h], case.mdp.reward[h], -torch.inf)
        if h < case.mdp.horizon - 1:
            successors, probability = case.mdp.transitions[h].edges()
            q = q + (probability * value[successors]).sum(-1)
        gap = q.amax(-1, keepdim=True) - q
        weight = 2 * case.mdp.beta * case.mdp.reference[h]
        x = (weight - gap).amax(-1, keepdim=True)
        for _ in range(60):
            share = weight / (x + gap)
            x = x + (share.sum(-1, keepdim=True) - 1) / (share / (x + gap)).sum(-1, keepdim=True)
        share = weight / (x + gap)
        policies.append((share / share.sum(-1, keepdim=True)).log())
        value = torch.where(case.mdp.valid[h], share * torch.where(case.mdp.valid[h], q, 0.0), 0.0).sum(-1)
    return tuple(reversed(policies))


@claim("F4.c", source="own", problem=any_problem, problems=PROBLEMS)
def where_dr_grpo_rests(case: Case) -> Comparison:
    """Dr. GRPO, two rollouts, on-policy: rests at π = 2β π_ref/(λ(s) - Q^π(s,a)), Q^π the return without the KL

    for any transitions; on one step ``2β π_ref/(λ - r)``, where π* is ``∝ π_ref e^{r/β}``. Left: the expected update
    by ``dr_grpo_loss`` there. Right: 0. *Proof.* A group mean includes the rollout, so ``A_i = ½(r_i - r_j)`` and the
    update is ``-½ ∇E r`` plus that of β k3 (F4.d): at ``(s,a)`` it is ``d(s)`` times ``-½ π (Q^π - V^π) + β (π -
    π_ref)``. That vanishes iff ``π (2β + V^π - Q^π) = 2β π_ref``; call ``2β + V^π`` λ. ∎
    """
    log_policy = dr_grpo_rest(case)
    update = update_of(case, "dr-grpo", None)
    left = update(update.row(log_policy, ()).unsqueeze(0))
    rewards = (
        by_hand.magnitude(case, [case.mdp.reward]).amax()
        + case.mdp.beta * by_hand.magnitude(case, [log_policy, case.mdp.log_reference]).amax()
    )
    scale = 4 * case.mdp.horizon * rewards
    return Comparison(left, torch.zeros_like(left), scale, _operations(case))


@claim("F4.d", source="own", problem=any_problem, problems=PROBLEMS)
def divergence_of_k3(case: Case) -> Comparison:
    """on-policy, GRPO's k3 penalty pulls along KL(π_ref ‖ π_θ) in the states visited; times the ratio, along KL(π_θ ‖ π_ref)

    Its gradient is ``β d(s) (π - π_ref)(a|s)``, and ``β d(s) π(a|s) (log π/π_ref - KL)`` with ``corrected_kl``. Left:
    the expected update by ``dr_grpo_loss`` without rewards. Right: the formulas, ``d`` by sums over trajectories.
    *Proof.* With ``x = log π_ref/π``, ``∇k3 = (1 - e^x) ∇log π``, of mean ``-E_{π_ref} ∇log π``; and ``∇(w k3) = (k3
    + 1 - e^x) ∇log π = -x ∇log π`` at ``w = 1``. ∎
    """
    calm = without_reward(case)
    updates = [update_of(calm, "dr-grpo", None, options={"corrected_kl": corrected}) for corrected in (False, True)]
    rows = rows_of(updates[0], case)
    left = torch.stack([update(rows) for update in updates])
    masses = pair_masses(case, case.listed.log_law(case.soft_policy).exp())
    forward, reverse = [], []
    for mass, log, log_ref, ref in zip(
        masses, case.soft_policy, case.mdp.log_reference, case.mdp.reference, strict=True
    ):
        ratio = torch.where(ref > 0, log - log_ref, 0.0)
        state = mass.sum(-1, keepdim=True)
        forward.append(mass - state * ref)
        reverse.append(mass * ratio - mass * (log.exp() * ratio).sum(-1, keepdim=True))
    sides = [by_hand.existing(case, tuple(side)) for side in (forward, reverse)]
    right = case.mdp.beta * torch.stack(sides)
    ratios = tuple(
        torch.where(ref > 0, log - log_ref, 0.0)
        for log, log_ref, ref in zip(case.soft_policy, case.mdp.log_reference, case.mdp.reference, strict=True)
    )
    size = by_hand.magnitude(case, [ratios, case.soft_policy]) + by_hand.magnitude(
        case, [tuple((-ratio).exp() for ratio in ratios)]
    )
    scale = 2 * case.mdp.beta * by_hand.size(case.listed.log_law(case.soft_policy), size).unsqueeze(-1)
    return Comparison(left, right, scale, _operations(case))


def two_arms(seed: int) -> Case:
    """A bandit with a uniform reference; the advantage in units of β is between 1e-3 and 30."""
    exponent = 4.5 * torch.rand((), generator=seeded(seed), dtype=torch.float64).item()
    return case_of(make("two-armed-bandit", advantage=1e-3 * 10**exponent, folded=False), "two arms", seed)


@claim("F4.e", source="own", problem=two_arms, problems=PROBLEMS)
def dr_grpo_leaves_the_optimum(case: Case) -> Comparison:
    """two arms, uniform reference: at π* Dr. GRPO's update pulls the better arm down by more than ½ β (π* - ½) > 0

    so π* is not its point of rest, whatever the rewards. Left: the bound, with ``π* = σ(Δr/β)``. Right: the expected
    update by ``dr_grpo_loss``, on-policy, in the better arm's logit. *Proof.* With ``x = Δr/β`` it is ``β [(π* - ½) -
    ½ π*(1-π*) x]`` (F4.c), ``π* - ½ = ½ tanh(x/2)`` and ``π*(1-π*) = ¼ sech²(x/2)``: the share of the second term is
    ``x/(2 sinh x) < ½``. ∎ For other references there are rewards for which it does rest at π*.
    """
    x = (case.mdp.reward[0][0, 0] - case.mdp.reward[0][0, 1]) / case.mdp.beta
    update = update_of(case, "dr-grpo", None)
    pull = update(update.optimum.unsqueeze(0))[0, 0]
    scale = case.mdp.beta * (2 + x.abs())
    return Comparison(0.5 * case.mdp.beta * (torch.sigmoid(x) - 0.5), pull, scale, 200, "at most")


# -- F4: Kimi --------------------------------------------------------------------------------------------------------


def _slope_of_kimi(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The update at π* along the logits' derivative in a factor on the reward; the returns of pairs over β; their weights."""
    update = update_of(case, "kimi", None)
    ahead: list[Tensor] = []
    for h in reversed(range(case.mdp.horizon)):
        table = torch.where(case.mdp.valid[h], case.mdp.reward[h] / case.mdp.beta, 0.0)
        if ahead:
            successors, probability = case.mdp.transitions[h].edges()
            policy = case.solution.log_policy[h + 1].exp()
            table = table + (probability * (policy * ahead[-1]).sum(-1)[successors]).sum(-1)
        ahead.append(torch.where(case.mdp.valid[h], table, 0.0))
    direction = update.row(tuple(reversed(ahead)), ())
    slope = (update(update.optimum.unsqueeze(0)).squeeze(0) * direction).sum()
    one, other = pairs_of(case)
    x = by_hand.return_in_beta(case)
    log_law = case.listed.log_law(case.solution.log_policy)
    return slope, x[one], x[other], pair_weights(case, log_law)


def _kimi_scale(case: Case) -> Tensor:
    one, other = pairs_of(case)
    size = _at_optimum(case)
    weights = pair_weights(case, case.listed.log_law(case.solution.log_policy))
    return 4 * case.mdp.horizon * by_hand.size(weights, (size[one] + size[other]).square())


@claim("F4.f", source="own", problem=certain_problem, problems=PROBLEMS)
def kimi_knows_the_rollout(case: Case) -> Comparison:
    """deterministic, on-policy: at π* Kimi's update of two rollouts has the slope E[V̂ (x + x' - 2 E x)], V̂ = log ½(e^x + e^x')

    along ``d/dt`` of the optimal logits for the rewards ``(1+t) r``, with ``x = r/β``. Left: the expected update by
    ``kimi_loss``. Right: the sum over all pairs. *Proof.* At π* ``g = -V*(s_1)``, and along that direction ``∇log
    π(τ)`` is ``x - E[x|s_1]`` (I2). The slope is ``2 E (V̂ + g) (x - E x)``, in which g cancels, and V̂ does not: it
    knows x. ∎
    """
    slope, one, other, weights = _slope_of_kimi(case)
    x = by_hand.return_in_beta(case)
    mean = by_hand.mean_by_start(case, case.listed.log_law(case.solution.log_policy), x)
    start = case.listed.states[pairs_of(case)[0], 0]
    baseline = torch.logaddexp(one, other) - torch.tensor(2.0, dtype=torch.float64).log()
    right = by_hand.expectation(weights, baseline * (one + other - 2 * mean[start]))
    return Comparison(slope, right, _kimi_scale(case), _operations(case))


@claim("F4.g", source="own", problem=certain_problem, problems=PROBLEMS)
def kimi_does_not_rest(case: Case) -> Comparison:
    """… and it is at least ½ E (x - x')² P(r'' ≤ min(r, r')), positive as soon as two returns to a prompt differ

    so π* is no point of rest: rewards are valued too little. Left: the bound, over all pairs. Right: the slope by
    ``kimi_loss``. *Proof.* The slope of F4.f is ``2 Cov(h(x), x) = E (h(x) - h(x'))(x - x')`` with ``h(x) = E log
    ½(e^x + e^x'')``, and ``h' = E σ(x - x'') ≥ ½ P(x'' ≤ x)``. ∎
    """
    slope, x, y, weights = _slope_of_kimi(case)
    one, other = pairs_of(case)
    log_law = case.listed.log_law(case.solution.log_policy)
    given_start = (log_law - case.mdp.initial[case.listed.states[:, 0]].log()).exp()
    below = torch.zeros_like(log_law).index_add(0, one, torch.where(y <= x, given_start[other], 0.0))
    left = by_hand.expectation(weights, 0.5 * (x - y).square() * torch.minimum(below[one], below[other]))
    return Comparison(left, slope, _kimi_scale(case), _operations(case), "at most")
