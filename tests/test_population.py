"""Exact population losses against enumeration, finite differences and fifty-digit arithmetic (theory.md §0, I7, I11, I14)."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from torch import Tensor

from tbrm_theory.behaviours import Behaviour, HistoryBehaviour, MarkovBehaviour, MixtureBehaviour
from tbrm_theory.dynamic_programming import solve
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.families import make
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.occupancy import enumerate_trajectories
from tbrm_theory.population import additive_moments, noise_floor, population_loss, residual_terms, soft_plan
from tests import reference as rf
from tests import strategies
from tests.convert import plain
from tests.drawn import KINDS, as_table, random_policy, random_problem

LOSSES = {"tbrm": rf.tbrm_loss, "brm": rf.brm_loss}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_loss = pytest.mark.parametrize("loss", LOSSES)


def draw_logits(mdp: RegularizedMDP, *batch: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(*batch, *table.shape[-2:]) for table in mdp.reference]
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def rows(mdp: RegularizedMDP, tables: tuple[Tensor, ...]) -> rf.Table:
    return [mdp.rows(h, table) for h, table in enumerate(tables)]


def repeating_law(mdp: RegularizedMDP, log_policy: tuple[Tensor, ...], repeat: float) -> rf.Law:
    """The law of a ``HistoryBehaviour``: the action before again with probability ``repeat``, where it exists."""
    problem, policy = plain(mdp), as_table(mdp, log_policy)

    def rule(history: rf.Trajectory, s: int) -> list[float]:
        h = len(history)
        fresh = policy[h][s]
        before = history[-1][1] if history else -1
        if not history or before >= len(fresh) or problem.reference[h][s][before] == 0:
            return fresh
        return [repeat * (a == before) + (1 - repeat) * p for a, p in enumerate(fresh)]

    return rf.history_law(problem, rule)


# -- against enumeration -------------------------------------------------------------------------------------------------


@every_loss
@given(data=st.data())
def test_a_markov_loss_is_the_enumerated_one(data: st.DataObject, loss: str) -> None:
    """Every kind of transition, ragged layers, missing actions, policies with holes."""
    mdp = data.draw(strategies.problems())
    logits = data.draw(strategies.tables_of(mdp))
    log_policy = data.draw(strategies.log_policies(mdp))
    event("deterministic" if mdp.is_deterministic else "stochastic")
    problem = plain(mdp)
    expected = LOSSES[loss](problem, rows(mdp, logits), rf.trajectory_law(problem, as_table(mdp, log_policy)))
    found = population_loss(mdp, logits, log_policy, loss=loss)
    assert found.shape == ()
    assert found.item() == pytest.approx(expected, rel=1e-12, abs=1e-24)
    assert found == population_loss(mdp, logits, MarkovBehaviour(log_policy), loss=loss)


@every_loss
@every_kind
def test_a_mixture_is_the_weighted_sum_over_its_components(kind: str, loss: str) -> None:
    """One policy is drawn for each episode; a component without weight does not count, whatever it does."""
    mdp = random_problem(kind)
    problem, logits = plain(mdp), draw_logits(mdp)
    policies = [random_policy(mdp, seed) for seed in range(2)]
    impossible = tuple(torch.zeros_like(log).log_softmax(-1) for log in policies[0])
    mixture = MixtureBehaviour((0.3, 0.7, 0.0), (*policies, impossible))
    found = population_loss(mdp, logits, mixture, loss=loss).item()
    law = rf.mixture_law(problem, [(w, as_table(mdp, p)) for w, p in zip((0.3, 0.7), policies, strict=True)])
    assert found == pytest.approx(LOSSES[loss](problem, rows(mdp, logits), law), rel=1e-12)
    alone = [population_loss(mdp, logits, policy, loss=loss).item() for policy in policies]
    assert found == pytest.approx(0.3 * alone[0] + 0.7 * alone[1], rel=1e-14)


@every_loss
@every_kind
def test_history_dependent_behaviour_is_enumerated(kind: str, loss: str) -> None:
    mdp = random_problem(kind)
    logits, log_policy = draw_logits(mdp), random_policy(mdp, 1)
    found = population_loss(mdp, logits, HistoryBehaviour(log_policy, 0.6), loss=loss).item()
    law = repeating_law(mdp, log_policy, 0.6)
    assert math.fsum(law.values()) == pytest.approx(1)
    assert found == pytest.approx(LOSSES[loss](plain(mdp), rows(mdp, logits), law), rel=1e-12)
    # The history matters; without repetition it does not, and both ways to the loss agree.
    assert found != pytest.approx(population_loss(mdp, logits, log_policy, loss=loss).item(), rel=1e-3)
    fresh = population_loss(mdp, logits, HistoryBehaviour(log_policy, 0.0), loss=loss).item()
    assert fresh == pytest.approx(population_loss(mdp, logits, log_policy, loss=loss).item(), rel=1e-12)


@every_loss
@pytest.mark.parametrize("family", ["dense-random", "garnet", "deterministic-dag"])
def test_a_batch_of_problems_is_a_loop(family: str, loss: str) -> None:
    """Problems, logits and behaviours, each with the batch dimension or without it."""
    mdp = make(family, horizon=3, states=3, actions=2, missing=0.2, batch=3)
    several, one, own = draw_logits(mdp, 3), draw_logits(mdp), draw_logits(mdp, 3, seed=1)
    log_policy = tuple(
        torch.where(valid, table, -torch.inf).log_softmax(-1) for valid, table in zip(mdp.valid, own, strict=True)
    )
    for logits, batched in ((several, True), (one, False)):
        found = population_loss(mdp, logits, log_policy, loss=loss)
        assert found.shape == (3,)
        for i in range(3):
            problem = plain(mdp, i)
            law = rf.trajectory_law(problem, [log[i].exp().tolist() for log in log_policy])
            table = [(layer[i] if batched else layer).tolist() for layer in logits]
            assert found[i].item() == pytest.approx(LOSSES[loss](problem, table, law), rel=1e-12)


@every_loss
def test_a_batch_of_logits_and_one_of_behaviours_make_a_table(loss: str) -> None:
    mdp = random_problem("sparse")
    logits, log_policy = draw_logits(mdp, 4, 1), random_policy(mdp, 0, 3)
    found = population_loss(mdp, logits, log_policy, loss=loss)
    assert found.shape == (4, 3)
    for i in range(4):
        for j in range(3):
            one = population_loss(mdp, tuple(q[i, 0] for q in logits), tuple(log[j] for log in log_policy), loss=loss)
            assert found[i, j].item() == pytest.approx(one.item(), rel=1e-13)


@given(st.data())
def test_the_terms_add_up_to_the_residual(data: st.DataObject) -> None:
    """Additivity (§0): f = Σ_h u_h, with u_1 = logit − R_β and u_h = log π_θ − R_β later; 0 for missing actions."""
    mdp = data.draw(strategies.problems())
    logits = data.draw(strategies.tables_of(mdp))
    terms, listed, problem = residual_terms(mdp, logits), enumerate_trajectories(mdp), plain(mdp)
    for valid, term in zip(mdp.valid, terms, strict=True):
        assert not term[~valid].any()
    trajectories = zip(listed.states.tolist(), listed.actions.tolist(), listed.sum_along(terms).tolist(), strict=True)
    for states, actions, found in trajectories:
        expected = rf.residual(problem, rows(mdp, logits), tuple(zip(states, actions, strict=True)))
        assert found == pytest.approx(expected, rel=1e-11, abs=1e-11)


@given(st.data())
def test_moments_are_those_of_the_enumerated_law(data: st.DataObject) -> None:
    """I11: the mean and the variance of any additive function, given the first state."""
    mdp = data.draw(strategies.problems())
    g = data.draw(strategies.tables_of(mdp))
    log_policy = data.draw(strategies.log_policies(mdp))
    problem, table = plain(mdp), rows(mdp, g)
    law = rf.trajectory_law(problem, as_table(mdp, log_policy))
    moments = additive_moments(mdp, g, log_policy)
    for s, start in enumerate(problem.initial):
        if start > 0:
            given_s = {tau: p / start for tau, p in law.items() if tau[0][0] == s}
            sums = [(p, rf.table_sum(table, tau)) for tau, p in given_s.items()]
            mean = math.fsum(p * x for p, x in sums)
            variance = math.fsum(p * (x - mean) ** 2 for p, x in sums)
            assert moments.mean[s].item() == pytest.approx(mean, rel=1e-12, abs=1e-12)
            assert moments.variance[s].item() == pytest.approx(variance, rel=1e-12, abs=1e-24)


# -- near the optimum ----------------------------------------------------------------------------------------------------


def precise_loss(mdp: RegularizedMDP, logits: tuple[Tensor, ...], log_policy: tuple[Tensor, ...]) -> Decimal:
    """``E_μ f²`` at exactly the given doubles, with fifty digits, by enumeration."""
    with localcontext() as context:
        context.prec = 50
        beta = Decimal(mdp.beta.item())

        def along(i: int, table_of: Callable[[int], Tensor]) -> list[Decimal]:
            pairs = enumerate(zip(listed.states[i].tolist(), listed.actions[i].tolist(), strict=True))
            return [Decimal(table_of(h)[s, a].item()) for h, (s, a) in pairs]

        def value(h: int, s: int) -> Decimal:
            return sum((Decimal(q).exp() for q in logits[h][s][mdp.valid[h][s]].tolist()), Decimal(0)).ln()

        listed = enumerate_trajectories(mdp)
        total = Decimal(0)
        for i, states in enumerate(listed.states.tolist()):
            own, reward = along(i, logits.__getitem__), along(i, mdp.reward.__getitem__)
            reference = along(i, mdp.reference.__getitem__)
            following = [value(h, s) for h, s in enumerate(states) if h > 0] + [Decimal(0)]
            parts = zip(own, reward, reference, following, strict=True)
            f = sum((q - r / beta - p.ln() - v for q, r, p, v in parts), Decimal(0))
            probability = (sum(along(i, log_policy.__getitem__), Decimal(listed.log_dynamics[i].item()))).exp()
            total += probability * f * f
        return total


@every_kind
@pytest.mark.parametrize("distance", [0.0, 1e-15, 1e-12, 1e-8, 1e-4, 1.0])
def test_the_loss_keeps_its_digits_near_the_optimum(kind: str, distance: float) -> None:
    """√L is right to a few units of rounding of the terms of f, hence L is at 1e-30 too; and L is never negative."""
    mdp = random_problem(kind)
    noise = draw_logits(mdp)
    optimal = tuple(torch.where(valid, q, 0.0) for valid, q in zip(mdp.valid, solve(mdp).q, strict=True))
    logits = tuple(q + distance * d for q, d in zip(optimal, noise, strict=True))
    log_policy = random_policy(mdp, 3)
    found = population_loss(mdp, logits, log_policy).item()
    exact = precise_loss(mdp, logits, log_policy)
    rounding = 8 * torch.finfo(torch.float64).eps * max(table.abs().max().item() for table in logits)
    assert found >= 0
    assert math.sqrt(found) == pytest.approx(float(exact.sqrt()), rel=1e-13, abs=rounding)
    if kind == "deterministic" and distance <= 1e-12:
        assert found < 1e-22  # the case is the one meant
    if kind == "deterministic" and distance == 1e-8:
        assert found == pytest.approx(float(exact), rel=1e-6)


def test_a_loss_is_never_negative() -> None:
    """The raw second moment came out as −7e-18 here and there; a sum of squares does not."""
    mdp = make("deterministic-dag", horizon=6, states=4, actions=3, batch=200)
    noise = 1e-9 * torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = tuple(q + noise[:, None, None] for q in solve(mdp).q)
    losses = population_loss(mdp, logits, mdp.log_reference)
    assert (losses >= 0).all()
    torch.testing.assert_close(losses.sqrt(), noise.abs(), rtol=0.0, atol=1e-13)  # f = c: the gauge of layer 1


# -- gradients -----------------------------------------------------------------------------------------------------------


@every_loss
@every_kind
def test_the_gradient_is_that_of_the_enumerated_loss(kind: str, loss: str) -> None:
    """By central differences of the plain enumeration; logits of missing actions have none."""
    mdp = random_problem(kind)
    problem, log_policy = plain(mdp), random_policy(mdp, 1)
    law = rf.trajectory_law(problem, as_table(mdp, log_policy))
    leaves = tuple(table.requires_grad_() for table in draw_logits(mdp))
    gradients = torch.autograd.grad(population_loss(mdp, leaves, log_policy, loss=loss), leaves)
    expected = rf.finite_difference(
        lambda table: LOSSES[loss](problem, table, law), rows(mdp, tuple(leaf.detach() for leaf in leaves))
    )
    for gradient, layer, valid in zip(gradients, expected, mdp.valid, strict=True):
        torch.testing.assert_close(gradient, torch.tensor(layer, dtype=torch.float64), rtol=1e-6, atol=1e-7)
        assert not gradient[~valid].any()
    # The same through the enumeration of the package, which is another path.
    listed = torch.autograd.grad(population_loss(mdp, leaves, HistoryBehaviour(log_policy, 0.0), loss=loss), leaves)
    for own, other in zip(gradients, listed, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-11, atol=1e-12)


@every_loss
def test_the_gradient_of_a_batch_and_of_a_mixture_is_that_of_finite_differences(loss: str) -> None:
    mdp = random_problem("sparse")
    mixture = MixtureBehaviour((0.25, 0.75), (random_policy(mdp, 0), random_policy(mdp, 1)))
    leaves = [table.requires_grad_() for table in draw_logits(mdp, 2)]
    assert torch.autograd.gradcheck(
        lambda *logits: population_loss(mdp, logits, mixture, loss=loss), leaves, atol=1e-6, rtol=1e-5, fast_mode=True
    )


# -- the floor (I7) ------------------------------------------------------------------------------------------------------


def behaviours(mdp: RegularizedMDP) -> dict[str, tuple[Behaviour, rf.Law]]:
    """One of each sort, with its law by enumeration."""
    mu, nu = random_policy(mdp, 1), random_policy(mdp, 2)
    problem = plain(mdp)
    return {
        "markov": (MarkovBehaviour(mu), rf.trajectory_law(problem, as_table(mdp, mu))),
        "mixture": (
            MixtureBehaviour((0.4, 0.6), (mu, nu)),
            rf.mixture_law(problem, [(0.4, as_table(mdp, mu)), (0.6, as_table(mdp, nu))]),
        ),
        "history": (HistoryBehaviour(mu, 0.6), repeating_law(mdp, mu, 0.6)),
    }


@every_kind
@pytest.mark.parametrize("sort", ["markov", "mixture", "history"])
def test_the_floor_is_the_loss_at_the_optimum(kind: str, sort: str) -> None:
    """I7, for any behaviour: Σ_h E Var(V*(s') | s, a), which is L(θ*); 0 exactly if transitions are deterministic."""
    mdp = random_problem(kind)
    behaviour, law = behaviours(mdp)[sort]
    floor = noise_floor(mdp, behaviour).item()
    assert floor == pytest.approx(rf.noise_floor(plain(mdp), law), rel=1e-12, abs=1e-30)
    assert floor == pytest.approx(population_loss(mdp, solve(mdp).q, behaviour).item(), rel=1e-11, abs=1e-28)
    assert floor == 0 if kind == "deterministic" else floor > 1e-3


@given(st.data())
def test_the_floor_of_any_policy_is_the_enumerated_one(data: st.DataObject) -> None:
    mdp = data.draw(strategies.problems(kinds=("sparse", "dense"), min_horizon=2))
    log_policy = data.draw(strategies.log_policies(mdp))
    law = rf.trajectory_law(plain(mdp), as_table(mdp, log_policy))
    assert noise_floor(mdp, log_policy).item() == pytest.approx(rf.noise_floor(plain(mdp), law), rel=1e-11, abs=1e-26)


def test_floors_of_a_batch() -> None:
    mdp = make("dense-random", horizon=3, states=3, actions=2, batch=3)
    floors = noise_floor(mdp, mdp.log_reference)
    for i in range(3):
        problem = plain(mdp, i)
        law = rf.trajectory_law(problem, problem.reference)
        assert floors[i].item() == pytest.approx(rf.noise_floor(problem, law), rel=1e-12)


def test_the_reference_model_has_the_loss_of_its_values() -> None:
    """X6: at θ = θ_ref and r = 0 the population loss is E V_ref(s_1)²."""
    mdp = random_problem("dense")
    idle = RegularizedMDP(
        beta=mdp.beta,
        initial=mdp.initial,
        reward=[torch.zeros_like(table) for table in mdp.reward],
        reference=mdp.reference,
        transitions=mdp.transitions,
    )
    value = torch.tensor([0.5, -3.0, 2.0], dtype=torch.float64)
    logits = (idle.log_reference[0] + value.unsqueeze(-1), *idle.log_reference[1:])
    found = population_loss(idle, logits, random_policy(idle, 0)).item()
    assert found == pytest.approx((mdp.initial * value.square()).sum().item(), rel=1e-13)
    assert found > 1


# -- soft plans (I14) ----------------------------------------------------------------------------------------------------


@given(st.data())
def test_a_soft_plan_represents_any_additive_function(data: st.DataObject) -> None:
    """I14: V_θ(s_1) + log π_θ(τ) = Σ_h g_h on every trajectory, if transitions are deterministic."""
    mdp = data.draw(strategies.problems(kinds=("deterministic",)))
    g = data.draw(strategies.tables_of(mdp))
    problem, logits = plain(mdp), rows(mdp, soft_plan(mdp, g))
    policy = rf.softmax_policy(problem, logits)
    for trajectory in rf.trajectories(problem):
        found = rf.state_value(problem, logits, 0, trajectory[0][0])
        found += math.fsum(math.log(policy[h][s][a]) for h, (s, a) in enumerate(trajectory))
        assert found == pytest.approx(rf.table_sum(rows(mdp, g), trajectory), rel=1e-11, abs=1e-11)


@given(st.data())
def test_the_soft_plan_of_the_regularised_reward_is_optimal(data: st.DataObject) -> None:
    """Whatever the transitions; rewards of missing actions are not looked at."""
    mdp = data.draw(strategies.problems())
    g = tuple(torch.where(v, r, math.nan) for v, r in zip(mdp.valid, mdp.regularized_reward, strict=True))
    expected = rf.optimal_q(plain(mdp))
    for found, layer in zip(rows(mdp, soft_plan(mdp, g)), expected, strict=True):
        for own, row in zip(found, layer, strict=True):
            assert own == pytest.approx(row, rel=1e-11, abs=1e-11)


# -- what does not exist, and errors -------------------------------------------------------------------------------------


def with_mass(log_policy: tuple[Tensor, ...], h: int, s: int) -> tuple[Tensor, ...]:
    """All actions alike in one state, existing or not."""
    table = log_policy[h].clone()
    table[s] = -math.log(table.shape[-1])
    return (*log_policy[:h], table, *log_policy[h + 1 :])


@every_loss
@every_kind
def test_data_with_actions_that_do_not_exist_have_infinite_loss(kind: str, loss: str) -> None:
    mdp = random_problem(kind)
    logits, log_policy = draw_logits(mdp), random_policy(mdp, 0)
    impossible = with_mass(log_policy, 0, 2)
    assert not mdp.valid[0][2].all()
    assert mdp.initial[2] > 0
    for behaviour in (
        impossible,
        MarkovBehaviour(impossible),
        MixtureBehaviour((0.999, 0.001), (log_policy, impossible)),
        HistoryBehaviour(impossible, 0.5),
    ):
        assert population_loss(mdp, logits, behaviour, loss=loss) == math.inf
        assert noise_floor(mdp, behaviour) == math.inf


@every_loss
def test_only_states_that_are_reached_count(loss: str) -> None:
    """Probability of a missing action where nothing leads is no harm; a batch is infinite only where it must be."""
    problem = random_problem("dense")
    mdp = RegularizedMDP(
        beta=problem.beta,
        initial=torch.tensor([1.0, 0.0, 0.0]),
        reward=problem.reward,
        reference=problem.reference,
        transitions=problem.transitions,
    )
    logits, log_policy = draw_logits(mdp), random_policy(mdp, 0)
    unreached = with_mass(log_policy, 0, 2)
    expected = population_loss(mdp, logits, log_policy, loss=loss)
    assert torch.isfinite(expected)
    assert population_loss(mdp, logits, unreached, loss=loss) == expected
    assert noise_floor(mdp, unreached) == noise_floor(mdp, log_policy)
    both = tuple(torch.stack(pair) for pair in zip(log_policy, with_mass(log_policy, 1, 0), strict=True))
    assert population_loss(mdp, logits, both, loss=loss).tolist() == [pytest.approx(expected.item()), math.inf]


def test_an_infinite_loss_has_no_gradient_that_is_not_a_number() -> None:
    mdp = random_problem("sparse")
    leaves = tuple(table.requires_grad_() for table in draw_logits(mdp))
    loss = population_loss(mdp, leaves, with_mass(random_policy(mdp, 0), 0, 2))
    assert all(not gradient.any() for gradient in torch.autograd.grad(loss, leaves))


def test_an_unknown_loss_is_refused() -> None:
    mdp = random_problem("dense")
    for behaviour in (mdp.log_reference, HistoryBehaviour(mdp.log_reference, 0.5)):
        with pytest.raises(InvalidInputError, match=r"^loss: expected one of tbrm, brm, found 'ppo'"):
            population_loss(mdp, mdp.reward, behaviour, loss="ppo")


def test_bad_logits_and_policies_are_named() -> None:
    mdp = random_problem("dense")
    logits = list(draw_logits(mdp))
    logits[1] = logits[1].clone()
    logits[1][1, 1] = math.nan
    for behaviour in (mdp.log_reference, HistoryBehaviour(mdp.log_reference, 0.5)):
        for loss in LOSSES:
            with pytest.raises(InvalidInputError, match=r"^logits\[1\]\[1\]\[1\]: expected a finite number"):
                population_loss(mdp, tuple(logits), behaviour, loss=loss)
    short = tuple(log - 1e-6 for log in mdp.log_reference)
    for function in (lambda b: population_loss(mdp, mdp.reward, b), lambda b: noise_floor(mdp, b)):
        with pytest.raises(InvalidInputError, match=r"^behaviour\[0\]\[0\]: expected log-probabilities"):
            function(short)
        with pytest.raises(InvalidInputError, match=r"^behaviour: expected 4 layers, found 3"):
            function(mdp.log_reference[:3])


def test_what_cannot_be_listed_is_refused() -> None:
    """Two million trajectories of behaviour that is no mixture of Markov policies."""
    mdp = make("chain", horizon=21)
    with pytest.raises(InvalidInputError, match=r"^mdp: expected at most 1000000 trajectories"):
        population_loss(mdp, mdp.reward, HistoryBehaviour(mdp.log_reference, 0.5))
