"""The exact solver against the enumeration of ``reference.py``, decimal arithmetic, quantecon and its own gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import Phase, event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tbrm_theory import dynamic_programming as dp
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.occupancy import occupancy
from tbrm_theory.transitions import DenseTransition, DeterministicTransition, SparseTransition, Transition
from tests import reference as rf
from tests import strategies
from tests.convert import plain

EPSILON = torch.finfo(torch.float64).eps
ALL_BETAS = strategies.ORDINARY_BETAS + strategies.EXTREME_BETAS


def largest_term(mdp: RegularizedMDP) -> float:
    """What float64 errors of values are relative to: the largest ``Σ_h |R_β|``, and the entropies."""
    layers = [torch.where(valid, r, 0.0) for valid, r in zip(mdp.valid, mdp.regularized_reward, strict=True)]
    return sum(1 + layer.abs().max().item() for layer in layers)


def assert_close(found: Any, expected: Any, size: float) -> None:
    """Equal within the rounding of some 200 operations on terms of this size; nested lists and infinities allowed."""
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert_close(ours, theirs, size)
    elif math.isinf(expected):
        assert found == expected
    else:
        assert abs(found - expected) <= 200 * EPSILON * max(size, abs(expected))


def rows(mdp: RegularizedMDP, tables: tuple[Tensor, ...]) -> list[Any]:
    """Tables as nested lists, in the shape that ``plain`` gives the problem."""
    return [mdp.rows(h, table) for h, table in enumerate(tables)]


def random_problem(
    kind: str,
    *,
    seed: int = 0,
    horizon: int = 3,
    states: int = 4,
    actions: int = 3,
    batch: tuple[int, ...] = (),
    **fields: Any,
) -> RegularizedMDP:
    """Rewards of size 1, β = 0.5, actions missing here and there, one kernel for each layer."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def simplex(weight: Tensor) -> Tensor:
        return weight / weight.sum(-1, keepdim=True)

    def kernel() -> Transition:
        successors = torch.randint(states, (*batch, states, actions, 2), generator=generator)
        match kind:
            case "deterministic":
                return DeterministicTransition(successors[..., 0], states)
            case "sparse":
                return SparseTransition(successors, simplex(uniform(*successors.shape)), states)
            case _:
                return DenseTransition(simplex(uniform(*batch, states, actions, states)))

    pairs = (*batch, states, actions)
    keep_first = torch.arange(actions) == 0
    existing = [(uniform(*pairs) > 0.2) | keep_first for _ in range(horizon)]
    given: dict[str, Any] = {
        "beta": 0.5,
        "initial": simplex(uniform(*batch, states)),
        "reward": [uniform(*pairs) * 2 - 1 for _ in range(horizon)],
        "reference": [simplex((uniform(*pairs) + 0.1) * exists) for exists in existing],
        "transitions": [kernel() for _ in range(horizon - 1)],
    }
    return RegularizedMDP(**(given | fields))


def random_policy(mdp: RegularizedMDP, seed: int = 1, batch: tuple[int, ...] = ()) -> tuple[Tensor, ...]:
    """``log π`` on the actions that exist, the same for each batch element unless ``batch`` says otherwise."""
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(*batch, *valid.shape[-2:], generator=generator, dtype=torch.float64) for valid in mdp.valid]
    return tuple(dp.soft_policy(table) for table in dp.admissible_logits(mdp, tuple(logits)))


# -- against the reference -----------------------------------------------------------------------------------------


@given(strategies.problems(betas=ALL_BETAS))
def test_i1_i2_optimum_is_the_plain_recursion_and_the_enumerated_objective(mdp: RegularizedMDP) -> None:
    event(f"beta {mdp.beta.item():g}")
    solution, reference, size = dp.solve(mdp), plain(mdp), largest_term(mdp)
    assert_close(rows(mdp, solution.q), rf.optimal_q(reference), size)
    assert_close([layer.tolist() for layer in solution.v], rf.optimal_values(reference), size)
    # A probability is the exponential of a difference of values, whose errors are relative to the largest term.
    policy = rf.optimal_policy(reference)
    assert_close(rows(mdp, tuple(log.exp() for log in solution.log_policy)), policy, size)
    # At |Q| = 1e6 the reference's exp(Q - V) sums to 1 ± 1e-10, and J would be wrong by as much: divide by the sum.
    policy = [[[p / math.fsum(row) for p in row] for row in layer] for layer in policy]
    assert_close(solution.objective.item() / mdp.beta.item(), rf.objective(reference, policy) / mdp.beta.item(), size)
    assert solution.certified


@given(st.data(), strategies.problems(betas=ALL_BETAS))
def test_i1_policy_values_objective_and_kl_are_sums_over_trajectories(data: st.DataObject, mdp: RegularizedMDP) -> None:
    """Any policy, those with mass on actions that do not exist included: ``-inf`` and ``inf``, never NaN."""
    tables = [
        strategies.table([data.draw(strategies.distributions(len(row))) for row in layer], reference.shape[-1])
        for layer, reference in zip(plain(mdp).reference, mdp.reference, strict=True)
    ]
    log_policy = tuple(policy.log() for policy in tables)
    reference, size, policy = plain(mdp), largest_term(mdp), rows(mdp, tuple(tables))
    evaluation, beta = dp.evaluate(mdp, log_policy), mdp.beta.item()
    event(f"finite objective: {math.isfinite(evaluation.objective)}")
    assert_close(rows(mdp, evaluation.q), rf.policy_q(reference, policy), size)
    expected = rf.objective(reference, policy) / beta
    assert_close(evaluation.objective.item() / beta, expected, size)
    assert_close(dp.objective(mdp, log_policy).item() / beta, expected, size)
    assert_close(dp.kl_to_reference(mdp, log_policy).item(), rf.kl_to_reference(reference, policy), size)
    optimum = math.fsum(p * rf.optimal_value(reference, 0, s) for s, p in enumerate(reference.initial) if p > 0)
    regret = optimum - expected
    assert_close(dp.regret(mdp, log_policy).item() / beta, regret, size)
    assert_close(dp.regret_by_subtraction(mdp, log_policy).item() / beta, regret, size)
    assert dp.regret(mdp, log_policy).item() >= 0


@given(st.data(), strategies.problems())
def test_i1_both_operators_are_one_step_of_the_definition(data: st.DataObject, mdp: RegularizedMDP) -> None:
    q = dp.admissible_logits(mdp, data.draw(strategies.tables_of(mdp)))
    log_policy = data.draw(strategies.log_policies(mdp))
    reference, table, policy = plain(mdp), rows(mdp, q), rows(mdp, tuple(log.exp() for log in log_policy))

    def policy_value(h: int, s: int) -> float:
        return math.fsum(p * (table[h][s][a] - math.log(p)) for a, p in enumerate(policy[h][s]) if p > 0)

    size = largest_term(mdp) + 10
    values = rf.soft_value(reference, table)
    assert_close(rows(mdp, dp.bellman_operator(mdp, q)), rf.backup(reference, lambda h, s: values[h][s]), size)
    assert_close(rows(mdp, dp.policy_bellman_operator(mdp, log_policy, q)), rf.backup(reference, policy_value), size)


@given(st.data(), strategies.problems(betas=ALL_BETAS))
def test_a_policy_is_at_kl_zero_from_itself_and_the_kl_is_that_of_the_laws(
    data: st.DataObject, mdp: RegularizedMDP
) -> None:
    p, q = (data.draw(strategies.log_policies(mdp)) for _ in range(2))
    laws = [rf.trajectory_law(plain(mdp), rows(mdp, tuple(log.exp() for log in logs))) for logs in (p, q)]
    divergence = rf.kl_trajectories(*laws)
    event(f"infinite: {divergence == math.inf}")
    assert_close(dp.policy_kl(mdp, p, q).item(), divergence, 10.0)
    assert dp.policy_kl(mdp, p, p).item() == 0


CASES_WANTED: dict[str, Callable[[RegularizedMDP], bool]] = {
    "an action that does not exist": lambda mdp: any(not bool(valid.all()) for valid in mdp.valid),
    "a first state of probability 0 among several": lambda mdp: 1 < int((mdp.initial > 0).sum()) < len(mdp.initial),
    "rows of different lengths": lambda mdp: any(len(set(row)) > 1 for row in mdp.action_counts or ()),
    "layers of different sizes": lambda mdp: len({table.shape for table in mdp.reference}) > 1,
    "transitions of different kinds": lambda mdp: len({type(kernel) for kernel in mdp.transitions}) > 1,
    "one state and one action throughout": lambda mdp: all(table.numel() == 1 for table in mdp.reference),
    "beta 1e-6": lambda mdp: mdp.beta.item() == 1e-6,
    "beta 1e6": lambda mdp: mdp.beta.item() == 1e6,
}


def test_the_strategies_generate_the_interesting_cases() -> None:
    """Each of these occurs among 200 problems, or the tests above say less than they seem to."""
    seen: set[str] = set()

    @settings(max_examples=200, phases=[Phase.generate], database=None)
    @given(strategies.problems(betas=ALL_BETAS))
    def look(mdp: RegularizedMDP) -> None:
        seen.update(name for name, occurs in CASES_WANTED.items() if occurs(mdp))

    look()
    assert seen == set(CASES_WANTED)


# -- extremes ------------------------------------------------------------------------------------------------------

BETAS = torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6], dtype=torch.float64)


def test_ten_thousand_steps_and_rewards_of_a_million_at_every_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two states that never change, a tie and a choice: ``V* = H·size/β`` and ``H·log cosh(size/β)``, up to 1e16.

    There ``Q - V`` would give both actions of the tie probability 1: their sum, 2, is no distribution.
    """
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # 10⁵ checks of shapes take longer than the test
    horizon, beta, size = 10_000, BETAS, torch.tensor([[1.0], [1e6]], dtype=torch.float64)
    reference = torch.full((2, 2), 0.5, dtype=torch.float64)
    reward = size[..., None, None] * torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    mdp = RegularizedMDP(
        beta=beta,
        initial=torch.tensor([0.5, 0.5]),
        reward=[reward] * horizon,
        reference=[reference] * horizon,
        transitions=[DeterministicTransition(torch.tensor([[0, 0], [1, 1]]), 2)] * (horizon - 1),
    )
    solution = dp.solve(mdp)
    scaled = size / beta
    log_cosh = torch.where(  # exact near 0, where the regret is of second order, and without overflow
        scaled < 1,
        torch.log1p(2 * torch.sinh(scaled.clamp(max=1) / 2) ** 2),
        scaled.abs() + torch.log1p(torch.exp(-2 * scaled)) - math.log(2),
    )
    step = torch.stack([scaled, log_cosh], -1)
    rounding = 2 * horizon * EPSILON
    torch.testing.assert_close(solution.v[0], horizon * step, rtol=rounding, atol=rounding)
    assert solution.scale.max().item() == pytest.approx(1e16)
    assert solution.certified
    for log_policy in solution.log_policy:
        assert bool((log_policy[..., 0, :] == math.log(0.5)).all())
    dp.check_policy(mdp, solution.log_policy)
    regret = dp.regret(mdp, mdp.log_reference, solution=solution)
    exact = 0.5 * horizon * beta * log_cosh  # the reference has J = 0 in the second state, and is right in the first
    torch.testing.assert_close(regret, exact, rtol=1e-9, atol=rounding)
    assert bool((dp.evaluate(mdp, mdp.log_reference).objective.isfinite()).all())


@pytest.mark.parametrize("beta", BETAS.tolist())
@pytest.mark.parametrize("kind", strategies.KINDS)
def test_random_problems_at_extreme_temperatures_agree_with_decimal_arithmetic(kind: str, beta: float) -> None:
    mdp = random_problem(kind, horizon=6, states=3, beta=beta)
    solution, size = dp.solve(mdp), largest_term(mdp)
    for found, exact in zip(solution.v[0].tolist(), decimal_optimum(mdp)[0], strict=True):
        assert abs(Decimal(found) - exact) <= 50 * Decimal(EPSILON) * Decimal(size)


def decimal_optimum(mdp: RegularizedMDP) -> list[list[Decimal]]:
    """``V*`` with 60 digits, from the very doubles of the problem."""
    with localcontext() as context:
        context.prec = 60
        beta, value = Decimal(mdp.beta.item()), [[Decimal(0)]]
        for h in range(mdp.horizon - 1, -1, -1):
            layer = []
            for s, row in enumerate(mdp.reference[h].tolist()):
                logs = []
                for a, probability in enumerate(row):
                    if probability == 0:
                        continue
                    here = Decimal(mdp.reward[h][s, a].item()) / beta + Decimal(probability).ln()
                    if h < mdp.horizon - 1:
                        target, weight = mdp.transitions[h].edges()
                        pairs = zip(target[s, a].tolist(), weight[s, a].tolist(), strict=True)
                        here += sum((Decimal(p) * value[0][t] for t, p in pairs), Decimal(0))
                    logs.append(here)
                top = max(logs)
                layer.append(top + sum(((q - top).exp() for q in logs), Decimal(0)).ln())
            value.insert(0, layer)
        return value[:-1]


@pytest.mark.parametrize("size", [1e-2, 1e-6, 1e-9, 1e-12])
def test_i3_regret_is_accurate_where_subtraction_has_no_digits_left(size: float) -> None:
    """π at distance ``size`` from π*: the regret is of order ``size²``, 1e-25 at the smallest, and exact to ``ε/size``."""
    mdp = random_problem("sparse", horizon=4)
    generator = torch.Generator().manual_seed(3)
    solution = dp.solve(mdp)
    shifted = tuple(
        dp.soft_policy(log + size * torch.randn(log.shape, generator=generator, dtype=torch.float64))
        for log in solution.log_policy
    )
    regret, exact = dp.regret(mdp, shifted).item(), decimal_regret(mdp, shifted, solution.log_policy)
    assert 1e-3 * size**2 < float(exact) < size**2
    assert regret == pytest.approx(float(exact), rel=64 * EPSILON / size + 1e-13, abs=0)
    if size == 1e-12:
        assert abs(dp.regret_by_subtraction(mdp, shifted).item() - regret) > regret  # what I3 is needed for


def decimal_regret(mdp: RegularizedMDP, log_p: tuple[Tensor, ...], log_q: tuple[Tensor, ...]) -> Decimal:
    """``β E_p Σ_h KL(p ‖ q)`` with 60 digits, both policies divided by their exact sums."""

    def normalised(logs: list[float]) -> list[Decimal]:
        weights = [Decimal(log).exp() if log > -math.inf else Decimal(0) for log in logs]
        return [weight / sum(weights) for weight in weights]

    with localcontext() as context:
        context.prec = 60
        total, mass = Decimal(0), [Decimal(p) for p in mdp.initial.tolist()]
        for h in range(mdp.horizon):
            following = [Decimal(0)] * 4
            for s, here in enumerate(mass):
                p, q = normalised(log_p[h][s].tolist()), normalised(log_q[h][s].tolist())
                total += here * sum((x * (x / y).ln() for x, y in zip(p, q, strict=True) if x), Decimal(0))
                for a, x in enumerate(p):
                    if x and h < mdp.horizon - 1:
                        target, weight = (table[s, a].tolist() for table in mdp.transitions[h].edges())
                        for t, w in zip(target, weight, strict=True):
                            following[t] += here * x * Decimal(w)
            mass = following
        return Decimal(mdp.beta.item()) * total


@given(st.data(), strategies.problems(betas=ALL_BETAS), st.floats(-20, 0))
def test_regret_is_never_negative_and_never_nan(data: st.DataObject, mdp: RegularizedMDP, exponent: float) -> None:
    solution = dp.solve(mdp)
    change = data.draw(strategies.tables_of(mdp))
    near = tuple(dp.soft_policy(q + 10**exponent * x) for q, x in zip(solution.log_policy, change, strict=True))
    regret = dp.regret(mdp, near, solution=solution).item()
    assert 0 <= regret < math.inf
    assert dp.regret(mdp, solution.log_policy).item() == 0


@pytest.mark.parametrize("x", [0.0, 1e-300, 1e-17, -1e-9, 0.0499999, 0.0500001, -0.05, 0.3, 5.0])
def test_relative_entropy_keeps_its_digits(x: float) -> None:
    """Two outcomes against 60 digits: the terms are O(x²), where the plain sum has errors O(ε)."""
    q = torch.log_softmax(torch.tensor([[0.7, 0.0]], dtype=torch.float64), -1)
    p = q + torch.tensor([[x, -x * math.exp(0.7)]], dtype=torch.float64)
    with localcontext() as context:
        context.prec = 60
        exact_p, exact_q = ([Decimal(log).exp() for log in logs.tolist()[0]] for logs in (p, q))
        exact = sum((u * (u / w).ln() - u + w for u, w in zip(exact_p, exact_q, strict=True)), Decimal(0))
    assert dp.relative_entropy(p, q).item() == pytest.approx(float(exact), rel=1e-12, abs=0)


# -- infinities ----------------------------------------------------------------------------------------------------


def test_mass_on_a_missing_action_costs_everything_where_it_is_reached() -> None:
    """State 1 of the second layer lacks action 1; the first action leads away from it."""
    mdp = RegularizedMDP(
        beta=1.0,
        initial=torch.tensor([1.0]),
        reward=[torch.zeros(1, 2), torch.zeros(2, 2)],
        reference=[torch.tensor([[0.5, 0.5]]), torch.tensor([[0.5, 0.5], [1.0, 0.0]])],
        transitions=[DeterministicTransition(torch.tensor([[0, 1]]), 2)],
    )
    forbidden = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).double().log()
    reached = (torch.tensor([[0.5, 0.5]]).double().log(), forbidden)
    avoided = (torch.tensor([[1.0, 0.0]]).double().log(), forbidden)
    assert dp.objective(mdp, reached).item() == dp.evaluate(mdp, reached).objective.item() == -math.inf
    assert dp.regret(mdp, reached).item() == dp.kl_to_reference(mdp, reached).item() == math.inf
    assert dp.evaluate(mdp, reached).q[0].tolist() == [[math.log(0.5), -math.inf]]
    assert dp.evaluate(mdp, reached).v[0].item() == -math.inf
    assert dp.regret(mdp, avoided).item() == pytest.approx(math.log(2))
    assert dp.evaluate(mdp, avoided).v[1].tolist() == [0.0, -math.inf]
    assert dp.regret_by_subtraction(mdp, reached).item() == math.inf
    both = tuple(torch.stack(pair) for pair in zip(reached, avoided, strict=True))
    assert dp.regret(mdp, both).tolist() == [math.inf, pytest.approx(math.log(2))]


# -- gradients -----------------------------------------------------------------------------------------------------


def gradcheck(function: Callable[..., Any], *arguments: Tensor) -> None:
    assert torch.autograd.gradcheck(function, [argument.requires_grad_() for argument in arguments], atol=1e-7)


def test_everything_is_differentiable_in_rewards_transitions_temperature_and_logits() -> None:
    """gradcheck compares autograd with finite differences; transitions, being rows that sum to 1, as softmax of logits."""
    base = random_problem("dense", states=2, actions=2, horizon=2)
    logits = tuple(torch.randn(2, 2, generator=torch.Generator().manual_seed(h)).double() for h in range(2))

    def problem(reward: Tensor, kernel: Tensor, beta: Tensor) -> RegularizedMDP:
        return RegularizedMDP(
            beta=beta,
            initial=base.initial,
            reward=[reward, base.reward[1]],
            reference=base.reference,
            transitions=[DenseTransition(torch.softmax(kernel, -1))],
        )

    def all_values(reward: Tensor, kernel: Tensor, beta: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        mdp = problem(reward, kernel, beta)
        policy = tuple(dp.soft_policy(table) for table in dp.admissible_logits(mdp, (first, second)))
        solution = dp.solve(mdp)
        return (
            solution.objective,
            dp.objective(mdp, policy),
            dp.evaluate(mdp, policy).objective,
            dp.regret(mdp, policy),
            dp.kl_to_reference(mdp, policy),
        )

    kernel = torch.randn(2, 2, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    gradcheck(all_values, base.reward[0].clone(), kernel, torch.tensor(0.5, dtype=torch.float64), *logits)


@pytest.mark.parametrize("kind", strategies.KINDS)
def test_the_gradient_of_an_objective_in_the_rewards_is_the_occupancy(kind: str) -> None:
    """``∂J_β(π)/∂r_h(s,a) = d^π_h(s,a)``, and by the envelope theorem ``∂J_β(π*)/∂r = d^{π*}``."""
    mdp = random_problem(kind)
    rewards = [table.clone().requires_grad_() for table in mdp.reward]
    tracked = RegularizedMDP(
        beta=mdp.beta, initial=mdp.initial, reward=rewards, reference=mdp.reference, transitions=mdp.transitions
    )
    solution, policy = dp.solve(tracked), random_policy(mdp)
    optimal = tuple(log.detach() for log in solution.log_policy)
    for value, log_policy in (
        (solution.objective, optimal),
        (dp.evaluate(tracked, policy).objective, policy),
        (dp.objective(tracked, policy), policy),
    ):
        gradient = torch.autograd.grad(value, rewards, retain_graph=True)
        for found, expected in zip(gradient, occupancy(mdp, log_policy).state_action, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_the_gradient_at_zero_regret_is_zero_and_not_nan() -> None:
    mdp = random_problem("dense")
    logits = tuple(
        torch.where(valid, log, 0.0).requires_grad_() for valid, log in zip(mdp.valid, dp.solve(mdp).q, strict=True)
    )
    policy = tuple(dp.soft_policy(table) for table in dp.admissible_logits(mdp, logits))
    for gradient in torch.autograd.grad(dp.regret(mdp, policy), logits):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-15)


# -- batches and shared tables ---------------------------------------------------------------------------------------


def quantities(mdp: RegularizedMDP, log_policy: tuple[Tensor, ...]) -> list[Tensor]:
    solution, evaluation = dp.solve(mdp), dp.evaluate(mdp, log_policy)
    return [
        solution.objective,
        solution.v[0],
        solution.q[-1],
        solution.log_policy[0],
        solution.bellman_residual,
        evaluation.objective,
        evaluation.q[0],
        dp.objective(mdp, log_policy),
        dp.kl_to_reference(mdp, log_policy),
        dp.regret(mdp, log_policy),
        dp.regret_by_subtraction(mdp, log_policy),
    ]


@pytest.mark.parametrize("kind", strategies.KINDS)
def test_a_batch_of_problems_is_a_loop_over_them(kind: str) -> None:
    betas = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    mdp = random_problem(kind, batch=(3,), beta=betas)
    policies = random_policy(mdp, batch=(3,))
    together = quantities(mdp, policies)
    for i in range(3):
        for found, expected in zip(
            together, quantities(strategies.one_of(mdp, i), tuple(log[i] for log in policies)), strict=True
        ):
            torch.testing.assert_close(found.expand(3, *expected.shape)[i], expected, rtol=1e-13, atol=1e-14)
    assert dp.solve(mdp).certified


@pytest.mark.parametrize("kind", strategies.KINDS)
def test_batches_broadcast_both_ways(kind: str) -> None:
    """One policy on many problems, many policies on one problem, and one table batched among tables that are not."""
    many, one = random_problem(kind, batch=(3,)), random_problem(kind)
    single, several = random_policy(one), random_policy(one, batch=(2, 1))
    full = tuple(torch.full((4, 3), 1 / 3, dtype=torch.float64).log() for _ in range(3))
    everywhere = random_problem(kind, batch=(3,), reference=[torch.full((4, 3), 1 / 3, dtype=torch.float64)] * 3)
    assert dp.objective(everywhere, full).shape == (3,)
    assert dp.objective(one, several).shape == (2, 1)
    for i in range(3):
        torch.testing.assert_close(dp.regret(everywhere, full)[i], dp.regret(strategies.one_of(everywhere, i), full))
    for i in range(2):
        torch.testing.assert_close(dp.regret(one, several)[i, 0], dp.regret(one, tuple(log[i, 0] for log in several)))
    rewards = [table * torch.tensor([1.0, 2.0]).double()[:, None, None] for table in one.reward[:1]] + [*one.reward[1:]]
    scaled = RegularizedMDP(
        beta=one.beta, initial=one.initial, reward=rewards, reference=one.reference, transitions=one.transitions
    )
    assert dp.solve(scaled).objective.shape == (2,)
    torch.testing.assert_close(dp.objective(scaled, single)[0], dp.objective(one, single))
    assert many.batch_shape == (3,)


@pytest.mark.parametrize("kind", strategies.KINDS)
def test_layers_that_share_tables_are_layers_with_copies(kind: str) -> None:
    base = random_problem(kind)
    kernel = base.transitions[0]

    def unrolled(copy: bool) -> RegularizedMDP:
        def table(tensor: Tensor) -> Tensor:
            return tensor.clone() if copy else tensor

        return RegularizedMDP(
            beta=base.beta,
            initial=base.initial,
            reward=[table(base.reward[0]) for _ in range(7)],
            reference=[table(base.reference[0]) for _ in range(7)],
            transitions=[kernel.to("cpu") if not copy else strategies.one_of(base, 0).transitions[0] for _ in range(6)],
        )

    policy = random_policy(base)[0]
    shared, copied = unrolled(False), unrolled(True)
    assert shared.regularized_reward[0] is shared.regularized_reward[6]
    assert copied.regularized_reward[0] is not copied.regularized_reward[6]
    for ours, theirs in zip(quantities(shared, (policy,) * 7), quantities(copied, (policy,) * 7), strict=True):
        assert torch.equal(ours, theirs)


# -- certificate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "bug"),
    [
        ("expect", lambda original: lambda self, value: 1.001 * original(self, value)),
        ("push", lambda original: lambda self, mass: original(self, mass).flip(-1)),
    ],
)
@pytest.mark.parametrize("kernel", [DeterministicTransition, SparseTransition, DenseTransition])
def test_a_solution_with_a_planted_bug_is_not_certified(
    monkeypatch: pytest.MonkeyPatch, kernel: type, method: str, bug: Callable[[Any], Any]
) -> None:
    kinds = {DeterministicTransition: "deterministic", SparseTransition: "sparse", DenseTransition: "dense"}
    mdp = random_problem(kinds[kernel])
    assert dp.solve(mdp).certified
    monkeypatch.setattr(kernel, method, bug(getattr(kernel, method)))
    assert not dp.solve(mdp).certified


def test_a_wrong_soft_value_is_not_certified(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hard maximum in place of the soft one is consistent with itself: the duality gap is what shows it."""
    mdp = random_problem("dense")
    monkeypatch.setattr(dp, "soft_value", lambda q: q.amax(-1))
    solution = dp.solve(mdp)
    assert solution.bellman_residual.item() <= 1e-15
    assert not solution.certified


def test_values_that_were_tampered_with_are_not_certified() -> None:
    mdp = random_problem("sparse")
    solution = dp.solve(mdp)
    q = (solution.q[0], solution.q[1] + 1e-9, solution.q[2])
    tampered = dp.Solution(mdp, q, solution.v, solution.log_policy, solution.objective)
    assert not tampered.certified
    assert tampered.bellman_residual.item() == pytest.approx(1e-9 / solution.scale.item(), rel=1e-5)
    assert not dp.Solution(mdp, solution.q, solution.v, solution.log_policy, solution.objective * math.nan).certified


# -- a peer ----------------------------------------------------------------------------------------------------------


def test_as_beta_vanishes_the_values_are_those_of_hard_backward_induction() -> None:
    """``V_hard - β H log(1/min π_ref) ≤ β V* ≤ V_hard`` against quantecon, and the greedy policies agree."""
    from quantecon.markov import DiscreteDP
    from quantecon.markov.ddp import backward_induction

    horizon, states, actions, beta = 6, 5, 3, 1e-6
    mdp = random_problem("dense", horizon=2, states=states, actions=actions)
    uniform = torch.full((states, actions), 1 / actions, dtype=torch.float64)
    mdp = RegularizedMDP(
        beta=beta,
        initial=mdp.initial,
        reward=[mdp.reward[0]] * horizon,
        reference=[uniform] * horizon,
        transitions=mdp.transitions * (horizon - 1),
    )
    kernel = mdp.transitions[0]
    assert isinstance(kernel, DenseTransition)
    peer = DiscreteDP(mdp.reward[0].numpy(), kernel.probability.numpy(), 1 - 1e-15)
    hard_value, hard_policy = backward_induction(peer, horizon)
    solution = dp.solve(mdp)
    for h in range(horizon):
        gap = torch.from_numpy(hard_value[h]) - beta * solution.v[h]
        assert bool((gap >= -1e-12).all())
        assert bool((gap <= beta * (horizon - h) * math.log(actions) + 1e-12).all())
        assert solution.q[h].argmax(-1).tolist() == hard_policy[h].tolist()


# -- refusals --------------------------------------------------------------------------------------------------------

HALF = torch.full((1, 2), 0.5, dtype=torch.float64)
TWO_LAYERS = RegularizedMDP(
    beta=1.0,
    initial=torch.ones(1),
    reward=[torch.zeros(1, 2)] * 2,
    reference=[HALF, torch.tensor([[1.0, 0.0]])],
    transitions=[DeterministicTransition(torch.zeros(1, 2, dtype=torch.int64), 1)],
)
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("tables", "where", "problem"),
    [
        ([[[0.5, 0.5]]], "policy", "expected 2 layers, found 1"),
        ([[[0.5, 0.5]], [[1.0]]], "policy[1]", "found (1, 1)"),
        ([[[0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5]]], "policy[1]", "found (2, 2)"),
        ([[[0.5, 0.4]], [[1.0, 0.0]]], "policy[0][0]", "found the sum 0.9"),
        ([[[0.5, 0.5]], [[0.0, 0.0]]], "policy[1][0]", "found the sum 0.0"),
        ([[[0.5, 0.5]], [[NAN, 1.0]]], "policy[1][0][0]", "expected a number, found nan"),
        ([[[0.5, 0.5]], [[INF, 0.0]]], "policy[1][0]", "found the sum inf"),
        ([[[0.5, 0.5 + 1e-8]], [[1.0, 0.0]]], "policy[0][0]", "found the sum 1.00000001"),
    ],
)
@pytest.mark.parametrize("function", [dp.evaluate, dp.objective, dp.regret, dp.kl_to_reference])
def test_what_is_no_policy_is_refused(
    function: Callable[..., Any], tables: list[list[list[float]]], where: str, problem: str
) -> None:
    log_policy = tuple(torch.tensor(layer, dtype=torch.float64).log() for layer in tables)
    with pytest.raises(InvalidInputError) as refused:
        function(TWO_LAYERS, log_policy)
    assert refused.value.where == where
    assert problem in refused.value.problem


def test_a_policy_within_1e_9_of_a_distribution_is_accepted() -> None:
    log_policy = (torch.tensor([[0.5, 0.5 + 5e-10]], dtype=torch.float64).log(), TWO_LAYERS.log_reference[1])
    dp.check_policy(TWO_LAYERS, log_policy)


def test_both_arguments_of_a_divergence_are_checked() -> None:
    bad = (HALF.log() + 1, TWO_LAYERS.log_reference[1])
    for pair in ((bad, TWO_LAYERS.log_reference), (TWO_LAYERS.log_reference, bad)):
        with pytest.raises(InvalidInputError):
            dp.policy_kl(TWO_LAYERS, *pair)


@pytest.mark.parametrize(
    ("tables", "where", "problem"),
    [
        ([[[0.0, 0.0]]], "logits", "expected 2 layers, found 1"),
        ([[[0.0, 0.0]], [[0.0]]], "logits[1]", "found (1, 1)"),
        ([[[0.0, NAN]], [[0.0, 0.0]]], "logits[0][0][1]", "found nan"),
        ([[[0.0, -INF]], [[0.0, 0.0]]], "logits[0][0][1]", "found -inf"),
        ([[[0.0, 0.0]], [[1e101, 0.0]]], "logits[1][0][0]", "found 1e+101"),
    ],
)
def test_logits_that_are_not_finite_are_refused(tables: list[list[list[float]]], where: str, problem: str) -> None:
    with pytest.raises(InvalidInputError) as refused:
        dp.admissible_logits(TWO_LAYERS, tuple(torch.tensor(layer, dtype=torch.float64) for layer in tables))
    assert refused.value.where == where
    assert problem in refused.value.problem


@pytest.mark.parametrize("ignored", [7.0, NAN, INF, -INF])
def test_the_logit_of_a_missing_action_is_ignored_whatever_it_holds(ignored: float) -> None:
    logits = (torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[3.0, ignored]], dtype=torch.float64))
    assert dp.admissible_logits(TWO_LAYERS, logits)[1].tolist() == [[3.0, -INF]]
