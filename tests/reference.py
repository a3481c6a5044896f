"""A naive reference for finite layered KL-regularised MDPs: enumeration and definitions, nothing clever.

The package solves these problems with dynamic programming and closed forms; this file lists every trajectory
and sums. It imports nothing from the package and shares no idea with it, so their agreement says something.

Conventions (theory.md, section 0)
* Layers, states and actions count from 0; a table is `[h][s][a]`, and its rows may differ in length.
* `reference == 0` means that the action does not exist: no trajectory takes it, and its logit is ignored.
* A trajectory is `((s_0, a_0), …, (s_{H-1}, a_{H-1}))`; a law maps each trajectory it can produce to its
  probability, so the keys are the support.
* Values, residuals and losses are in units of β; objective, regret and their bounds in units of reward.
* Probabilities may be `Fraction`s: laws, `kappa_by_sup` and `second_moment_at_most` are then exact.
* Costs are exponential in the horizon, and probabilities are kept as they are, so they must not underflow.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

Table = list[list[list[float]]]
Trajectory = tuple[tuple[int, int], ...]
Law = dict[Trajectory, float]


@dataclass(frozen=True)
class PlainMDP:
    """A layered MDP with a reference policy and a temperature (section 0)."""

    beta: float
    initial: list[float]  # [s]
    reward: Table  # [h][s][a]
    reference: Table  # [h][s][a] probabilities, 0 = action does not exist
    successors: list[list[list[dict[int, float]]]]  # [h][s][a] -> {s': p}, for layers 0..H-2


def tabulate(shape: Table, function: Callable[[int, int, int], float]) -> Table:
    """The table of `function(h, s, a)`, in the shape of another table."""
    return [
        [[function(h, s, a) for a in range(len(row))] for s, row in enumerate(layer)] for h, layer in enumerate(shape)
    ]


def log_sum_exp(values: Sequence[float]) -> float:
    """log Σ exp, shifted by the maximum; −∞ entries are allowed if one entry is finite."""
    largest = max(values)
    return largest + math.log(math.fsum(math.exp(value - largest) for value in values))


def soft_reward(mdp: PlainMDP, h: int, s: int, a: int) -> float:
    """R_β = r/β + log π_ref (section 0); −∞ where the action does not exist."""
    probability = mdp.reference[h][s][a]
    return mdp.reward[h][s][a] / mdp.beta + math.log(probability) if probability > 0 else -math.inf


def next_states(mdp: PlainMDP, h: int, s: int, a: int) -> list[tuple[int, float]]:
    """The (s', P_h(s'|s,a)) of positive probability; none after the last layer or a missing action."""
    if h == len(mdp.reward) - 1 or mdp.reference[h][s][a] == 0:
        return []
    return [(state, p) for state, p in mdp.successors[h][s][a].items() if p > 0]


def expected_next(mdp: PlainMDP, h: int, s: int, a: int, value: Callable[[int, int], float]) -> float:
    """E_{s'~P_h(s,a)} value(h+1, s'); 0 after the last layer."""
    return math.fsum(p * value(h + 1, state) for state, p in next_states(mdp, h, s, a))


# --- Trajectories and their laws ----------------------------------------------------------------------------


def suffixes(mdp: PlainMDP, h: int, s: int) -> Iterator[tuple[Trajectory, float]]:
    """Every feasible ((s_h, a_h), …, (s_{H-1}, a_{H-1})) with `s_h = s`, and its ΠP (no policy in it)."""
    for a, exists in enumerate(mdp.reference[h][s]):
        if exists and h == len(mdp.reward) - 1:
            yield ((s, a),), 1
        for next_state, probability in next_states(mdp, h, s, a):
            for suffix, rest in suffixes(mdp, h + 1, next_state):
                yield ((s, a), *suffix), probability * rest


def trajectories(mdp: PlainMDP) -> Law:
    """Every feasible trajectory with its dynamics probability ρ·ΠP; these do not sum to 1."""
    starts = [(s, start) for s, start in enumerate(mdp.initial) if start > 0]
    return {trajectory: start * rest for s, start in starts for trajectory, rest in suffixes(mdp, 0, s)}


def history_law(mdp: PlainMDP, rule: Callable[[Trajectory, int], Sequence[float]]) -> Law:
    """Law of history-dependent behaviour; `rule(history, s)` gives the action probabilities at s."""
    law = {}
    for trajectory, dynamics in trajectories(mdp).items():
        steps = [rule(trajectory[:h], s)[a] for h, (s, a) in enumerate(trajectory)]
        if all(step > 0 for step in steps):
            law[trajectory] = dynamics * math.prod(steps)
    return law


def action_probability(policy: Table, trajectory: Trajectory) -> float:
    """Π_h π(a_h|s_h)."""
    return math.prod(policy[h][s][a] for h, (s, a) in enumerate(trajectory))


def policy_probability(mdp: PlainMDP, policy: Table, trajectory: Trajectory) -> float:
    """P_π(τ) = ρ(s_1) Π π(a_h|s_h) Π P(s_{h+1}|s_h,a_h); 0 if τ is not feasible."""
    return trajectories(mdp).get(trajectory, 0) * action_probability(policy, trajectory)


def trajectory_law(mdp: PlainMDP, policy: Table) -> Law:
    """P_π. It sums to less than 1 if π reaches an action that does not exist."""
    return history_law(mdp, lambda history, s: policy[len(history)][s])


def mixture_law(mdp: PlainMDP, components: Sequence[tuple[float, Table]]) -> Law:
    """Law of a mixture of policies, one of them drawn once per episode."""
    law: Law = defaultdict(int)
    for weight, policy in components:
        for trajectory, probability in trajectory_law(mdp, policy).items():
            law[trajectory] += weight * probability
    return {trajectory: probability for trajectory, probability in law.items() if probability > 0}


def expectation(law: Law, function: Callable[[Trajectory], float]) -> float:
    """E_{τ~law} function(τ)."""
    return math.fsum(probability * function(trajectory) for trajectory, probability in law.items())


def table_sum(table: Table, trajectory: Trajectory, start: int = 0) -> float:
    """Σ_{h≥start} table_h(s_h, a_h)."""
    return math.fsum(table[h][s][a] for h, (s, a) in enumerate(trajectory) if h >= start)


def occupancy_state(mdp: PlainMDP, law: Law) -> list[list[float]]:
    """d_h(s), the mass of the trajectories through s."""
    return [
        [math.fsum(p for trajectory, p in law.items() if trajectory[h][0] == s) for s in range(len(layer))]
        for h, layer in enumerate(mdp.reward)
    ]


def occupancy_state_action(mdp: PlainMDP, law: Law) -> Table:
    """d_h(s,a), the mass of the trajectories through (s,a)."""
    return tabulate(
        mdp.reward, lambda h, s, a: math.fsum(p for trajectory, p in law.items() if trajectory[h] == (s, a))
    )


def kl_trajectories(law_p: Law, law_q: Law) -> float:
    """KL(p ‖ q) on trajectories, with 0 log 0 = 0; ∞ if q misses one that p has."""
    support = {trajectory: p for trajectory, p in law_p.items() if p > 0}
    if any(law_q.get(trajectory, 0) == 0 for trajectory in support):
        return math.inf
    return expectation(support, lambda trajectory: math.log(support[trajectory] / law_q[trajectory]))


# --- Objective, policy values, optimum ----------------------------------------------------------------------


def takes_missing_action(mdp: PlainMDP, policy: Table, h: int, s: int) -> bool:
    """Whether π, started from `s_h = s`, ever has mass on an action that does not exist."""
    return any(
        mdp.reference[h][s][a] == 0
        or any(takes_missing_action(mdp, policy, h + 1, state) for state, _ in next_states(mdp, h, s, a))
        for a, probability in enumerate(policy[h][s])
        if probability > 0
    )


def kl_to_reference(mdp: PlainMDP, policy: Table) -> float:
    """KL(P_π ‖ P_ref) (section 0); ∞ if π reaches an action that does not exist."""
    if any(start > 0 and takes_missing_action(mdp, policy, 0, s) for s, start in enumerate(mdp.initial)):
        return math.inf
    return kl_trajectories(trajectory_law(mdp, policy), trajectory_law(mdp, mdp.reference))


def objective(mdp: PlainMDP, policy: Table) -> float:
    """J_β(π) = E_π[r(τ)] − β KL(P_π ‖ P_ref) (section 0)."""
    mean_return = expectation(trajectory_law(mdp, policy), lambda trajectory: table_sum(mdp.reward, trajectory))
    return mean_return - mdp.beta * kl_to_reference(mdp, policy)


def policy_q(mdp: PlainMDP, policy: Table) -> Table:
    """Q^π(s,a) = R_β(s,a) + E_π Σ_{k>h} [R_β − log π](s_k,a_k), over every continuation (I1)."""

    def gain(h: int, s: int, a: int) -> float:
        return soft_reward(mdp, h, s, a) - math.log(policy[h][s][a]) if policy[h][s][a] > 0 else 0.0

    gains = tabulate(mdp.reward, gain)

    def continuation(h: int, s: int) -> float:
        if takes_missing_action(mdp, policy, h, s):
            return -math.inf
        return math.fsum(
            dynamics * action_probability(policy[h:], suffix) * table_sum(gains[h:], suffix)
            for suffix, dynamics in suffixes(mdp, h, s)
        )

    return backup(mdp, continuation)


def backup(mdp: PlainMDP, value: Callable[[int, int], float]) -> Table:
    """R_β(s,a) + E_{s'} value(s'): both Bellman operators of section 0 have this form."""
    return tabulate(mdp.reward, lambda h, s, a: soft_reward(mdp, h, s, a) + expected_next(mdp, h, s, a, value))


def optimal_value(mdp: PlainMDP, h: int, s: int) -> float:
    """V*(s) = log Σ_a exp(R_β(s,a) + E V*(s')) by plain recursion, nothing remembered (I1)."""

    def value(k: int, state: int) -> float:
        return optimal_value(mdp, k, state)

    actions = range(len(mdp.reward[h][s]))
    return log_sum_exp([soft_reward(mdp, h, s, a) + expected_next(mdp, h, s, a, value) for a in actions])


def optimal_values(mdp: PlainMDP) -> list[list[float]]:
    """V* as `[h][s]` (I1)."""
    return [[optimal_value(mdp, h, s) for s in range(len(layer))] for h, layer in enumerate(mdp.reward)]


def optimal_q(mdp: PlainMDP) -> Table:
    """Q* = R_β + E V* (I1)."""
    return backup(mdp, lambda h, s: optimal_value(mdp, h, s))


def optimal_policy(mdp: PlainMDP) -> Table:
    """π* = exp(Q* − V*) (section 0)."""
    return softmax_policy(mdp, optimal_q(mdp))


def gibbs_value(mdp: PlainMDP, h: int, s: int) -> float:
    """V*(s) = log Σ_τ exp Σ R_β over the continuations from s; deterministic transitions only (I2)."""
    if any(dynamics != 1 for _, dynamics in suffixes(mdp, h, s)):
        raise ValueError("the Gibbs form needs deterministic transitions")
    soft_rewards = tabulate(mdp.reward, lambda k, state, a: soft_reward(mdp, k, state, a))
    return log_sum_exp([table_sum(soft_rewards[h:], suffix) for suffix, _ in suffixes(mdp, h, s)])


def regret(mdp: PlainMDP, policy: Table) -> float:
    """J_β(π*) − J_β(π), the left side of I3."""
    return objective(mdp, optimal_policy(mdp)) - objective(mdp, policy)


# --- Logits as Q: residuals, losses and their identities ----------------------------------------------------


def state_value(mdp: PlainMDP, logits: Table, h: int, s: int) -> float:
    """V_θ(s) = log Σ_a exp logit_θ(s,a) over the actions that exist ([Y] Eq. 2)."""
    return log_sum_exp([logit for logit, p in zip(logits[h][s], mdp.reference[h][s], strict=True) if p > 0])


def soft_value(mdp: PlainMDP, logits: Table) -> list[list[float]]:
    """V_θ as `[h][s]` ([Y] Eq. 2)."""
    return [[state_value(mdp, logits, h, s) for s in range(len(layer))] for h, layer in enumerate(mdp.reward)]


def softmax_policy(mdp: PlainMDP, logits: Table) -> Table:
    """π_θ = exp(logit_θ − V_θ), 0 where the action does not exist ([Y] Eq. 2)."""

    def probability(h: int, s: int, a: int) -> float:
        exists = mdp.reference[h][s][a] > 0
        return math.exp(logits[h][s][a] - state_value(mdp, logits, h, s)) if exists else 0.0

    return tabulate(mdp.reward, probability)


def step_residuals(mdp: PlainMDP, logits: Table, trajectory: Trajectory) -> list[float]:
    """logit_θ(s_h,a_h) − R_β(s_h,a_h) − V_θ(s_{h+1}) for each h, s_{h+1} as sampled ([Y] Eq. 3)."""
    values = [state_value(mdp, logits, h, s) for h, (s, _) in enumerate(trajectory)] + [0.0]
    return [logits[h][s][a] - soft_reward(mdp, h, s, a) - values[h + 1] for h, (s, a) in enumerate(trajectory)]


def residual(mdp: PlainMDP, logits: Table, trajectory: Trajectory) -> float:
    """f_θ(τ) = Σ_h [logit_θ − R_β − V_θ(s_{h+1})], its definition (section 0)."""
    return math.fsum(step_residuals(mdp, logits, trajectory))


def residual_telescoped(mdp: PlainMDP, logits: Table, trajectory: Trajectory) -> float:
    """f_θ(τ) = V_θ(s_1) + log π_θ(τ)/π_ref(τ) − r(τ)/β (I5)."""
    policy = softmax_policy(mdp, logits)
    ratios = [policy[h][s][a] / mdp.reference[h][s][a] for h, (s, a) in enumerate(trajectory)]
    log_ratio = math.fsum(math.log(ratio) for ratio in ratios)
    initial_value = state_value(mdp, logits, 0, trajectory[0][0])
    return initial_value + log_ratio - table_sum(mdp.reward, trajectory) / mdp.beta


def tbrm_loss(mdp: PlainMDP, logits: Table, law: Law) -> float:
    """E_{τ~law} f_θ(τ)² ([Y] Eq. 4)."""
    return expectation(law, lambda trajectory: residual(mdp, logits, trajectory) ** 2)


def brm_loss(mdp: PlainMDP, logits: Table, law: Law) -> float:
    """E_{τ~law} Σ_h (step residual)², next state sampled ([Y] Eq. 3)."""
    return expectation(law, lambda trajectory: math.fsum(step**2 for step in step_residuals(mdp, logits, trajectory)))


def noise_floor(mdp: PlainMDP, law: Law) -> float:
    """Σ_h E Var(V*(s_{h+1}) | s_h, a_h), the TBRM loss of θ* (I7)."""
    values = optimal_values(mdp)

    def variance(h: int, s: int, a: int) -> float:
        mean = expected_next(mdp, h, s, a, lambda k, state: values[k][state])
        return expected_next(mdp, h, s, a, lambda k, state: (values[k][state] - mean) ** 2)

    variances = tabulate(mdp.reward, variance)
    return expectation(law, lambda trajectory: table_sum(variances, trajectory))


def corollary4(mdp: PlainMDP, logits: Table) -> float:
    """β{E_{π*} Σ_h (T_β Q_θ − Q_θ) + E_{π_θ} Σ_h (Q_θ − T_β Q_θ)}, the right side of [Y] Cor. 4 (B4)."""
    bellman = backup(mdp, lambda h, s: state_value(mdp, logits, h, s))

    def excess(trajectory: Trajectory) -> float:
        return table_sum(bellman, trajectory) - table_sum(logits, trajectory)

    law_optimal = trajectory_law(mdp, optimal_policy(mdp))
    law_softmax = trajectory_law(mdp, softmax_policy(mdp, logits))
    return mdp.beta * (expectation(law_optimal, excess) - expectation(law_softmax, excess))


def performance_difference(mdp: PlainMDP, f_table: Table, policy_dagger: Table, policy: Table) -> float:
    """I4's right side for J_β(π†) − J_β(π), with any reference function f ([Y] Lemma 3)."""

    def value(of: Table, h: int, s: int) -> float:
        return math.fsum(p * (f_table[h][s][a] - math.log(p)) for a, p in enumerate(of[h][s]) if p > 0)

    bellman = backup(mdp, lambda h, s: value(policy, h, s))

    def excess(trajectory: Trajectory) -> float:
        return table_sum(bellman, trajectory) - table_sum(f_table, trajectory)

    def advantage(trajectory: Trajectory) -> float:
        return math.fsum(value(policy_dagger, h, s) - value(policy, h, s) for h, (s, _) in enumerate(trajectory))

    law_dagger, law = trajectory_law(mdp, policy_dagger), trajectory_law(mdp, policy)
    mean_excess = expectation(law_dagger, excess) - expectation(law, excess)
    return mdp.beta * (mean_excess + expectation(law_dagger, advantage))


def martingale_split(mdp: PlainMDP, f_table: Table, policy: Table) -> tuple[float, float]:
    """Both sides of I11 ([Y] Eq. 9), f̄(s_h) being the conditional mean of Σ_{k≥h} f given s_h under P_μ."""
    law = trajectory_law(mdp, policy)

    def mean(h: int, s: int) -> float:
        through = {trajectory: p for trajectory, p in law.items() if trajectory[h][0] == s}
        total = expectation(through, lambda trajectory: table_sum(f_table, trajectory, start=h))
        return total / math.fsum(through.values())

    def squares(trajectory: Trajectory) -> float:
        means = [mean(h, s) for h, (s, _) in enumerate(trajectory)] + [0.0]
        deltas = [f_table[h][s][a] + means[h + 1] - means[h] for h, (s, a) in enumerate(trajectory)]
        return means[0] ** 2 + math.fsum(delta**2 for delta in deltas)

    left = expectation(law, lambda trajectory: table_sum(f_table, trajectory) ** 2)
    return left, expectation(law, squares)


def finite_difference(function: Callable[[Table], float], logits: Table, step: float = 1e-5) -> Table:
    """∂function/∂logit by central differences."""

    def moved(index: tuple[int, int, int], change: float) -> Table:
        return tabulate(logits, lambda h, s, a: logits[h][s][a] + change * ((h, s, a) == index))

    return tabulate(logits, lambda *index: (function(moved(index, step)) - function(moved(index, -step))) / (2 * step))


# --- Coverage -----------------------------------------------------------------------------------------------


def density_ratio(p: float, q: float) -> float:
    """p/q with 0/0 = 0 and p/0 = ∞."""
    return 0.0 if p == 0 else p / q if q > 0 else math.inf


def chi_square(p: Sequence[float], q: Sequence[float]) -> float:
    """χ²(p‖q) = Σ p²/q − 1 (section 0)."""
    return math.fsum(x * density_ratio(x, y) for x, y in zip(p, q, strict=True)) - 1


def chi_square_occupancy(mdp: PlainMDP, law_pi: Law, law_mu: Law) -> tuple[list[float], list[float]]:
    """(χ²(d^π_h(s,a) ‖ d^μ_h(s,a)) for each h, χ²(d^π_h(s) ‖ d^μ_h(s)) for each h) (I12)."""
    states_pi, states_mu = occupancy_state(mdp, law_pi), occupancy_state(mdp, law_mu)
    pairs_pi, pairs_mu = (
        [[entry for row in layer for entry in row] for layer in occupancy_state_action(mdp, law)]
        for law in (law_pi, law_mu)
    )
    state_action = [chi_square(p, q) for p, q in zip(pairs_pi, pairs_mu, strict=True)]
    return state_action, [chi_square(p, q) for p, q in zip(states_pi, states_mu, strict=True)]


def lemma1(mdp: PlainMDP, law_pi: Law, law_mu: Law) -> float:
    """1 + Σ_h χ²(d^π_h(s,a) ‖ d^μ_h(s,a)), the right side of [Y] Lemma 1 (B1)."""
    return 1 + math.fsum(chi_square_occupancy(mdp, law_pi, law_mu)[0])


def c_infinity(mdp: PlainMDP, law_pi: Law, law_mu: Law) -> float:
    """C_∞ = max d^π_h(s,a)/d^μ_h(s,a) over the pairs with d^π > 0 (B2)."""
    pi, mu = occupancy_state_action(mdp, law_pi), occupancy_state_action(mdp, law_mu)
    ratios = tabulate(mdp.reward, lambda h, s, a: density_ratio(pi[h][s][a], mu[h][s][a]))
    return max(entry for layer in ratios for row in layer for entry in row)


def moments(law: Law, pairs: Sequence[tuple[int, int, int]]) -> tuple[list[Fraction], list[list[Fraction]]]:
    """v = E φ and M = E[φφᵀ] exactly, φ(τ) having a 1 for each (h, s, a) of `pairs` that τ visits (I12)."""

    def mass(*visited: tuple[int, int, int]) -> Fraction:
        through = [p for trajectory, p in law.items() if all(trajectory[h] == (s, a) for h, s, a in visited)]
        return sum(map(Fraction, through), Fraction(0))

    return [mass(pair) for pair in pairs], [[mass(pair, other) for other in pairs] for pair in pairs]


def visited_pairs(*laws: Law) -> list[tuple[int, int, int]]:
    """Every (h, s, a) that one of the laws visits."""
    return sorted({(h, s, a) for law in laws for trajectory in law for h, (s, a) in enumerate(trajectory)})


def pivots(matrix: list[list[Fraction]]) -> list[Fraction] | None:
    """Pivots of symmetric Gaussian elimination, in order; None at a zero pivot whose row is not zero."""
    rows, found = [row[:] for row in matrix], []
    for i, row in enumerate(rows):
        found.append(row[i])
        if row[i] == 0 and any(row[i:]):
            return None
        for j in range(i + 1, len(rows)):
            if rows[j][i] != 0:
                factor = rows[j][i] / row[i]
                rows[j] = [x - factor * y for x, y in zip(rows[j], row, strict=True)]
    return found


def kappa_by_sup(law_pi: Law, law_mu: Law) -> Fraction | float:
    """κ = sup_f (E_π Σf)²/E_μ[(Σf)²] = vᵀM⁺v for any two laws, ∞ if v is not in the range of M (I12).

    Eliminating M from [[M, v], [vᵀ, 0]] leaves −vᵀM⁺v in the corner. Exact: give `Fraction` laws where π
    visits trajectories that μ does not, since rounding could then push v out of the range of M.
    """
    pairs = visited_pairs(law_pi, law_mu)
    v, m = moments(law_pi, pairs)[0], moments(law_mu, pairs)[1]
    found = pivots([[*row, entry] for row, entry in zip(m, v, strict=True)] + [[*v, Fraction(0)]])
    return math.inf if found is None else -found[-1]


def second_moment_at_most(law_pi: Law, law_mu: Law, bound: Fraction | float) -> bool:
    """Whether E_π[(Σf)²] ≤ bound·E_μ[(Σf)²] for every f, that is Λ ≤ bound, decided exactly (B3)."""
    pairs = visited_pairs(law_pi, law_mu)
    m_pi, m_mu = moments(law_pi, pairs)[1], moments(law_mu, pairs)[1]
    size = range(len(pairs))
    found = pivots([[Fraction(bound) * m_mu[i][j] - m_pi[i][j] for j in size] for i in size])
    return found is not None and min(found) >= 0
