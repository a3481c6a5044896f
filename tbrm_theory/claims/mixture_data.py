"""X1: data that mix policies from episode to episode, where Lemma 1 and Theorem 2's constant stop holding.

One side is ``coverage``, ``population`` and ``dynamic_programming``; the other is rational arithmetic over listed trajectories
(``exact_moments``), sums over them (``by_hand``), or a closed form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from tbrm_theory import coverage, dynamic_programming, population
from tbrm_theory.behaviours import Behaviour, MixtureBehaviour
from tbrm_theory.claims import by_hand
from tbrm_theory.claims.cases import Case, case_of
from tbrm_theory.claims.comparison import Comparison
from tbrm_theory.claims.exact_moments import exact_kappa, in_rationals
from tbrm_theory.claims.identities import deterministic
from tbrm_theory.claims.registry import claim
from tbrm_theory.families import make
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.moments import moment_form
from tbrm_theory.random_tables import draw_simplex, seeded
from tbrm_theory.shapes import PerLayerStateAction
from tbrm_theory.tables import safe_log

__all__ = [
    "MixtureProblem",
    "flipped",
    "flipped_kappa",
    "harmonic_bound",
    "opposite_policies",
    "unseen_change",
]

INSTANCES = 40
"""Problems of each claim here: tens of milliseconds each, most of them to solve for κ."""
_WRONG = 1e-3  # a regret, in units of β, that is no rounding


@dataclass(frozen=True, eq=False)
class MixtureProblem:
    """A problem, a target policy, data that mix policies, and an additive function that vanishes on unflipped data."""

    mdp: RegularizedMDP
    log_policy: PerLayerStateAction
    behaviour: MixtureBehaviour
    unseen: PerLayerStateAction


def opposite_policies(seed: int) -> MixtureProblem:
    """One state per layer; component i always plays "its" action of each layer, the target changes sides.

    Seed 0 is theory.md's ``H = 2, μ = ½(0,0) + ½(1,1), π = (0,1), f_1 = (1,-1), f_2 = (-1,1)``. Other seeds draw 2 to 4 layers, 2 or
    3 actions with a component for each, and whose action is which. ``unseen`` is 1 for the first component's action and -1 for all
    others in layer 1, and the negative of that in layer 2.
    """
    generator = seeded(seed)
    horizon, actions = (2, 2) if seed == 0 else _draw(generator, (2, 5), (2, 4))
    owner = [torch.randperm(actions, generator=generator) if seed else torch.arange(actions) for _ in range(horizon)]
    side = [0, 1, *torch.randint(actions, (horizon - 2,), generator=generator).tolist()]
    components = tuple(tuple(_always(owned[i], actions) for owned in owner) for i in range(actions))
    unseen = [torch.zeros(1, actions, dtype=torch.float64) for _ in range(horizon)]
    for h, sign in ((0, 1.0), (1, -1.0)):
        unseen[h][0, :] = -sign
        unseen[h][0, owner[h][0]] = sign
    return MixtureProblem(
        mdp=make("one-state", seed=seed, horizon=horizon, actions=actions),
        log_policy=tuple(_always(owned[i], actions) for owned, i in zip(owner, side, strict=True)),
        behaviour=MixtureBehaviour((1 / actions,) * actions, components),
        unseen=tuple(unseen),
    )


def flipped(horizon: int, flip: float, *, seed: int = 0) -> MixtureProblem:
    """``½(0,0,…) + ½(1,1,…)`` with every action flipped independently with probability ``flip``, and ``π = (0,1,0,…)``.

    At ``flip = ½`` both components are uniform: Markov data.
    """
    p = safe_log(torch.tensor([[1 - flip, flip]], dtype=torch.float64))
    sign = [1.0 if h % 2 == 0 else -1.0 for h in range(horizon)]
    return MixtureProblem(
        mdp=make("one-state", seed=seed, horizon=horizon),
        log_policy=tuple(_always(torch.tensor(h % 2), 2) for h in range(horizon)),
        behaviour=MixtureBehaviour((0.5, 0.5), ((p,) * horizon, (p.flip(-1),) * horizon)),
        unseen=tuple(torch.tensor([[s, -s]], dtype=torch.float64) for s in sign),
    )


def flipped_kappa(horizon: int, flip: Fraction) -> Fraction | float:
    """``κ`` of :func:`flipped`: ``1 + H/(1-m²) - m² s² / ((1-m²)(1 + (H-1)m²))``, ``m = 1 - 2 flip``, ``s = H mod 2`` (X1.e)."""
    if horizon == 1:
        return Fraction(2)
    square = (1 - 2 * flip) ** 2
    if square == 1:
        return math.inf
    return 1 + (horizon - square * (horizon % 2) / (1 + (horizon - 1) * square)) / (1 - square)


def harmonic_bound(mdp: RegularizedMDP, log_policy: PerLayerStateAction, behaviour: MixtureBehaviour) -> Tensor:
    """``1/Σ_i (w_i/κ(π,μ_i))``, a bound of ``κ`` of the mixture (X1.d); ``inf`` if no component covers π, ``(…)``."""
    parts = [weight / coverage.kappa(mdp, log_policy, part) for weight, part in behaviour.components]
    return 1 / torch.stack(torch.broadcast_tensors(*parts)).sum(0)


def unseen_change(case: Case, data: Behaviour, f: PerLayerStateAction, losses: Sequence[str]) -> Comparison:
    """Losses that are 0, and the regret that is not, of logits with ``f_θ = f`` for an ``f`` that vanishes on the data.

    Left: ``population_loss`` and ``regret`` of the soft plan of ``R_β + f``. Right: 0 for each loss, and ``β KL(P_θ ‖
    P_{π*})`` over all trajectories with ``P_{π*} ∝ exp ΣR_β`` and ``P_θ ∝ exp Σ(R_β + f)``.
    """
    logits = planned(case, f)
    found = [population.population_loss(case.mdp, logits, data, loss=loss) for loss in losses]
    policy = tuple(dynamic_programming.soft_policy(table) for table in logits)
    found.append(dynamic_programming.regret(case.mdp, policy, solution=case.solution) / case.mdp.beta)
    right = [torch.zeros_like(found[-1])] * len(losses) + [gibbs_regret(case, f)]
    terms = by_hand.magnitude(case, [case.mdp.regularized_reward, f, case.solution.q]).max()
    return Comparison(torch.stack(found), torch.stack(right), terms.square(), case.sweep + case.listing)


def planned(case: Case, f: PerLayerStateAction) -> PerLayerStateAction:
    """Logits with ``f_θ = f``: the soft plan of ``R_β + f`` (I14)."""
    plans = (reward + change for reward, change in zip(case.mdp.regularized_reward, f, strict=True))
    return population.soft_plan(case.mdp, tuple(plans))


def gibbs_regret(case: Case, f: PerLayerStateAction) -> Tensor:
    """``E_ρ KL`` between ``P_θ ∝ P_{π*} e^f`` and ``P_{π*}``, over all trajectories; deterministic transitions."""
    listed, start = case.listed, case.listed.states[:, 0]
    optimal = listed.sum_along(case.mdp.regularized_reward)
    changed = optimal + listed.sum_along(f)
    log_star = optimal - by_hand.log_sum_by_start(case, optimal)[start]
    log_theta = changed - by_hand.log_sum_by_start(case, changed)[..., start]
    return by_hand.expectation(case.mdp.initial.log()[start] + log_theta, log_theta - log_star)


def _draw(generator: torch.Generator, *ranges: tuple[int, int]) -> list[int]:
    return [int(torch.randint(low, high, (), generator=generator)) for low, high in ranges]


def _always(action: Tensor, actions: int) -> Tensor:
    """``log`` of the policy of one state that takes one action."""
    return safe_log(torch.nn.functional.one_hot(action, actions).to(torch.float64)).unsqueeze(0)


# -- deterministic components ----------------------------------------------------------------------------------------


def _opposite(seed: int) -> Case:
    return case_of(opposite_policies(seed).mdp, "X1", seed)


@claim("X1.a", source="own", problem=_opposite, problems=INSTANCES)
def infinite_kappa(case: Case) -> Comparison:
    """mixture of A opposite policies: κ = ∞ where Lemma 1's right side is 1 + H(A-1), Cor. 6's HA

    Left: ``coverage``. Right: ``exact_kappa`` and the closed forms. *Proof.* Every (h,a) has probability
    ``1/A``, and π takes one action in each layer. The ``f`` of :func:`opposite_policies` is 0 on every component and
    not under π. ∎
    """
    problem = opposite_policies(case.seed)
    pair = case.mdp, problem.log_policy, problem.behaviour
    horizon, actions = case.mdp.horizon, case.mdp.reference[0].shape[-1]
    left = torch.stack([coverage.kappa(*pair), coverage.lemma1(*pair), horizon * coverage.c_inf(*pair)])
    kappa = exact_kappa(case.listed, *_laws(case, problem))
    right = torch.tensor([float(kappa), 1 + horizon * (actions - 1), horizon * actions], dtype=torch.float64)
    return Comparison(left, right, left[2], case.sweep)


def _regret_is_no_rounding(case: Case) -> str | None:
    return None if gibbs_regret(case, _direction(case)) > _WRONG else f"regret below {_WRONG}"


def _direction(case: Case) -> PerLayerStateAction:
    """X1's ``f``, 1 to 3 times."""
    size = 1 + 2 * torch.rand((), generator=seeded(case.seed), dtype=torch.float64)
    return tuple(size * table for table in opposite_policies(case.seed).unseen)


@claim("X1.b", source="own", requires=[_regret_is_no_rounding], problem=_opposite, problems=INSTANCES)
def zero_loss_at_a_wrong_policy(case: Case) -> Comparison:
    """κ = ∞: some θ with L_μ(θ) = 0 is not optimal, though Lemma 1's right side is finite

    so that B5 with that right side would say 0. See :func:`unseen_change` for the sides.
    """
    return unseen_change(case, opposite_policies(case.seed).behaviour, _direction(case), ["tbrm"])


@claim("X1.c", source="own", requires=[deterministic], problem=_opposite, problems=INSTANCES)
def brm_is_not_fooled(case: Case) -> Comparison:
    """any data: BRM(θ) ≥ [regret/β / (√K(π*,μ) + √K(π_θ,μ))]², K = Σ_h E_μ[(d^π_h/d^μ_h)²]

    deterministic transitions. For the mixture of X1.a, at the θ of X1.b and at random logits. Left: over all
    trajectories. Right: ``population_loss`` of BRM. *Proof.* By B4 the regret is at most ``β (E_{π*} + E_{π_θ})
    Σ_h |Q_θ - T_β Q_θ|``, and ``E_π Σ_h |ρ_h| ≤ Σ_h √(E_μ (d^π_h/d^μ_h)²) √(E_μ ρ_h²) ≤ √K √BRM`` by Cauchy-Schwarz
    twice. Each term is about one pair, so only occupancies enter: mixtures do no harm. ``K`` is Lemma 1's right side
    plus ``H - 1``. ∎
    """
    fooled = tuple(table.unsqueeze(0) for table in planned(case, _direction(case)))
    logits = tuple(torch.cat(pair) for pair in zip(fooled, case.logits, strict=True))
    data = opposite_policies(case.seed).behaviour
    listed, law_mu = case.listed, data.log_law(case.mdp, case.listed).exp()
    log_star = listed.sum_along(case.mdp.regularized_reward)
    log_star = log_star - by_hand.log_sum_by_start(case, log_star)[0]  # a single first state
    log_theta = listed.sum_along(logits) - by_hand.sum_over_states(case, by_hand.values(logits))
    regret = by_hand.expectation(log_theta, log_theta - log_star)
    roots = _coverage_of_pairs(case, log_star.exp(), law_mu).sqrt()
    roots = roots + _coverage_of_pairs(case, log_theta.exp(), law_mu).sqrt()
    right = population.population_loss(case.mdp, logits, data, loss="brm")
    terms = by_hand.magnitude(case, [case.mdp.regularized_reward, logits], [by_hand.values(logits)])
    scale = terms.square().amax(-1)
    return Comparison((regret / roots).square(), right, scale, 2 * case.sweep + 2 * case.listing, "at most")


def _coverage_of_pairs(case: Case, law_pi: Tensor, law_mu: Tensor) -> Tensor:
    """``Σ_h Σ_{s,a} d^π_h(s,a)²/d^μ_h(s,a)`` from trajectories."""
    total = torch.zeros(law_pi.shape[:-1], dtype=torch.float64)
    for h, table in enumerate(case.mdp.reference):
        pair = case.listed.states[:, h] * table.shape[-1] + case.listed.actions[:, h]
        mass_pi = law_pi.new_zeros(*law_pi.shape[:-1], table.numel()).index_add(-1, pair, law_pi)
        mass_mu = law_mu.new_zeros(table.numel()).index_add(-1, pair, law_mu)
        ratio = torch.where(mass_pi > 0, mass_pi.square() / mass_mu, 0.0)
        total = total + ratio.sum(-1)
    return total


def _laws(case: Case, problem: MixtureProblem) -> tuple[list[Fraction], list[Fraction]]:
    law_pi = case.listed.log_law(problem.log_policy).exp()
    return in_rationals(law_pi), in_rationals(problem.behaviour.log_law(case.mdp, case.listed).exp())


# -- components with full support ------------------------------------------------------------------------------------


def _random_mixture(seed: int) -> Case:
    """Two or three layers of small random problems, every fourth with stochastic transitions; the case's two ``μ`` are mixed."""
    return _small(("one-state", "deterministic-dag", "garnet", "deterministic-tree")[seed % 4], seed)


def _random_deterministic_mixture(seed: int) -> Case:
    return _small(("one-state", "deterministic-dag", "deterministic-tree")[seed % 3], seed)


def _small(family: str, seed: int) -> Case:
    sizes = {"states": 2} if family in ("deterministic-dag", "garnet") else {}
    return case_of(make(family, seed=seed, horizon=2 + seed % 2, actions=2, **sizes), "X1", seed)


def _mixed(case: Case) -> MixtureBehaviour:
    weights = draw_simplex((2,), seeded(case.seed)).tolist()
    return MixtureBehaviour(tuple(weights), tuple(tuple(t[i] for t in case.log_behaviour) for i in range(2)))


@claim("X1.d", source="own", problem=_random_mixture, problems=INSTANCES)
def kappa_of_a_mixture(case: Case) -> Comparison:
    """μ = Σ w_i μ_i: κ(π,μ) ≤ 1/Σ_i (w_i/κ(π,μ_i))

    full support; four targets π. Left: ``exact_kappa`` over all trajectories. Right: the closed forms of the
    components. *Proof.* ``E_μ F² = Σ_i w_i E_{μ_i} F² ≥ Σ_i w_i (E_π F)²/κ(π,μ_i)`` for every additive ``F``. ∎
    """
    data, left, right = _mixed(case), [], []
    law = in_rationals(data.log_law(case.mdp, case.listed).exp())
    for policy in (case.log_policy, case.other_policy):
        for draw in range(2):
            target = tuple(table[draw] for table in policy)
            left.append(float(exact_kappa(case.listed, in_rationals(case.listed.log_law(target).exp()), law)))
            right.append(harmonic_bound(case.mdp, target, data))
    sides = torch.tensor(left, dtype=torch.float64), torch.stack(right)
    return Comparison(*sides, sides[1] * _log_size(case), case.sweep + case.listing, "at most")


@claim("X1.e", source="own", problem=_random_mixture, problems=INSTANCES)
def kappa_by_linear_solve(case: Case) -> Comparison:
    """mixtures: κ = vᵀ M⁺ v, in floating point as in rationals

    full support; four targets π. Left: ``coverage.kappa``. Right: ``exact_kappa`` over all trajectories. A solve
    multiplies rounding by the condition number of ``M`` scaled to unit diagonal.
    """
    data, left, right = _mixed(case), [], []
    law = in_rationals(data.log_law(case.mdp, case.listed).exp())
    for policy in (case.log_policy, case.other_policy):
        left.append(coverage.kappa(case.mdp, policy, data))
        laws = case.listed.log_law(policy).exp()
        right += [float(exact_kappa(case.listed, in_rationals(target), law)) for target in laws]
    condition = moment_form(case.mdp, data).condition
    sides = torch.cat(left), torch.tensor(right, dtype=torch.float64)
    return Comparison(*sides, condition * sides[1] * _log_size(case), case.sweep + case.listing)


def _log_size(case: Case) -> Tensor:
    """A probability inherits the absolute error of its logarithm."""
    tables = [case.log_behaviour, case.log_policy, case.other_policy]
    return by_hand.magnitude(case, tables).max()


def _flipped(seed: int) -> Case:
    horizon, flip = _flips(seed)
    return case_of(flipped(horizon, float(flip), seed=seed).mdp, "X1", seed)


def _flips(seed: int) -> tuple[int, Fraction]:
    """``H`` from 2 to 6 and a flip probability up to 9/64; seed 0 is theory.md's ``H = 2`` and 1/64."""
    return (2 + seed % 5, Fraction(1 + seed // 5 % 9, 64) / 2 ** (seed // 45))


@claim("X1.f", source="own", problem=_flipped, problems=INSTANCES)
def kappa_of_flipped_policies(case: Case) -> Comparison:
    """every action flipped with probability p: κ = 1 + 1/(2p(1-p)) at H = 2; 2111/63 at p = 1/64

    and the formula of :func:`flipped_kappa` for every H. Left: ``coverage.kappa``. Right: the formula. *Proof.* With
    signs ``x_h = ±1`` additive functions are ``c + Σ α_h x_h``, and ``E x_h = 0``, ``E x_h x_k = m²``, ``m = 1 - 2p``:
    ``M = diag(1, (1-m²) I + m² 11ᵀ)``, ``v = (1, 1, -1, 1, …)``. Sherman-Morrison. ∎
    """
    horizon, flip = _flips(case.seed)
    problem = flipped(horizon, float(flip), seed=case.seed)
    left = coverage.kappa(case.mdp, problem.log_policy, problem.behaviour)
    right = torch.tensor(float(flipped_kappa(horizon, flip)), dtype=torch.float64)
    condition = moment_form(case.mdp, problem.behaviour).condition
    return Comparison(left, right, condition * right * _log_size(case), case.sweep + case.listing)


@claim("X1.g", source="own", problem=_flipped, problems=INSTANCES)
def lemma1_fails(case: Case) -> Comparison:
    """full support: Lemma 1's right side 1 + H and Cor. 6's 2H are below κ, strictly

    Left: ``lemma1`` and ``c_inf`` of ``coverage``. Right: ``exact_kappa`` over all trajectories, less a thousandth.
    """
    horizon, flip = _flips(case.seed)
    problem = flipped(horizon, float(flip), seed=case.seed)
    kappa = float(exact_kappa(case.listed, *_laws(case, problem))) * 0.999
    lemma1, c_inf = (of(case.mdp, problem.log_policy, problem.behaviour) for of in (coverage.lemma1, coverage.c_inf))
    left = torch.stack([lemma1, horizon * c_inf])
    return Comparison(left, torch.tensor(kappa, dtype=torch.float64), left, case.sweep, "at most")


@claim("X1.h", source="own", requires=[deterministic], problem=_random_deterministic_mixture, problems=INSTANCES)
def theorem2_with_the_mixture_s_own_kappa(case: Case) -> Comparison:
    """mixtures: regret ≤ β(√κ(π*,μ) + √κ(π_θ,μ)) √L_μ(θ) with κ of the mixture itself

    full support, random logits. Left: over all trajectories. Right: ``coverage.kappa`` and ``population_loss``.
    *Proof.* B5's proof uses ``(E_π f)² ≤ κ E_μ f²`` alone, which is the definition of κ whatever μ is. ∎
    """
    data = _mixed(case)
    log_star = case.solution.log_policy
    kappas = [coverage.kappa(case.mdp, policy, data) for policy in (log_star, case.soft_policy)]
    loss = population.population_loss(case.mdp, case.logits, data)
    log_theta = case.listed.log_law(case.soft_policy)
    left = by_hand.expectation(log_theta, log_theta - case.listed.log_law(log_star))
    right = (kappas[0].sqrt() + kappas[1].sqrt()) * loss.sqrt()
    terms = by_hand.magnitude(case, [case.logits, case.mdp.regularized_reward, log_star])
    scale = by_hand.size(log_theta, terms) + right * moment_form(case.mdp, data).condition
    return Comparison(left, right, scale, 2 * case.sweep + case.listing, "at most")


def _contrary(seed: int) -> Case:
    """:func:`flipped` at ``H = 2`` and 1/64 or less, with rewards against π: ``R_β = -a (1,-1), -a (-1,1) + const``."""
    problem = _rarely_flipped(seed)
    size = 3 + 3 * torch.rand((), generator=seeded(seed), dtype=torch.float64)
    mdp = RegularizedMDP(
        beta=problem.mdp.beta,
        initial=problem.mdp.initial,
        reward=[-size * problem.mdp.beta * table for table in problem.unseen],
        reference=problem.mdp.reference,
        transitions=problem.mdp.transitions,
    )
    return case_of(mdp, "X1", seed)


def _rarely_flipped(seed: int) -> MixtureProblem:
    return flipped(2, 2.0 ** (-6 - seed % 10))


@claim("X1.i", source="own", problem=_contrary, problems=INSTANCES)
def theorem2_with_lemma1_fails(case: Case) -> Comparison:
    """full support, κ < ∞: at some θ regret > β(√λ(π*) + √λ(π_θ)) √L_μ(θ), λ Lemma 1's right side

    Flipped policies, ``H = 2``: π* all but never plays (0,1), and ``f_θ = F (1,-1), F (-1,1)`` makes π_θ play it. Left:
    ``coverage.lemma1`` and ``population_loss``. Right: the regret over all trajectories, less a thousandth. It is the
    bound that fails: by C2 zero loss still identifies π*.
    """
    problem = _rarely_flipped(case.seed)
    f = tuple(1.5 * u - r / case.mdp.beta for u, r in zip(problem.unseen, case.mdp.reward, strict=True))
    logits = planned(case, f)
    loss = population.population_loss(case.mdp, logits, problem.behaviour)
    policies = (case.solution.log_policy, tuple(dynamic_programming.soft_policy(table) for table in logits))
    roots = [coverage.lemma1(case.mdp, policy, problem.behaviour).sqrt() for policy in policies]
    left = (roots[0] + roots[1]) * loss.sqrt()
    right = 0.999 * gibbs_regret(case, f)
    return Comparison(left, right, 1 + left, case.sweep + case.listing, "at most")
