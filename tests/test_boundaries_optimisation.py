"""X2, X5, X6, X7 and O2: a planted bug for each claim, and what the claims' own problems must look like."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from plants import Plant, check_that_the_verdict_turns, function, kernels, later_layers, scaled
from problems import KINDS, random_logits, random_policy, random_problem
from torch import Tensor

from tbrm_theory import conditioning, control_variate, coverage, dynamic_programming, losses, population
from tbrm_theory.behaviours import HistoryBehaviour, MixtureBehaviour
from tbrm_theory.claims import CLAIMS, starting_points
from tbrm_theory.claims.noisy_transitions import lottery
from tbrm_theory.claims.outcome_reward import one_state_condition
from tbrm_theory.claims.starting_points import THRESHOLD, bandit_scores
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.families import make
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.objectives import PopulationObjective
from tbrm_theory.occupancy import enumerate_trajectories, flatten_tables, occupancy
from tbrm_theory.optimisers import levenberg_marquardt
from tbrm_theory.parametrisations import Tabular
from tbrm_theory.random_tables import draw_simplex, seeded
from tbrm_theory.transitions import DenseTransition

FEW = ["chain", "garnet", "deterministic-tree"]


# -- planted bugs ----------------------------------------------------------------------------------------------------


def residual(name: str, instead: str) -> Plant:
    """A loss that is another one under its name."""
    return lambda monkeypatch: monkeypatch.setitem(losses.RESIDUALS, name, losses.RESIDUALS[instead])


def always(loss: str) -> Any:
    def computed(original: Any) -> Any:
        return lambda mdp, logits, behaviour, **options: original(mdp, logits, behaviour, loss=loss)

    return computed


def a_little_more(original: Any) -> Any:
    """A matrix with a billionth of the identity on top."""

    def matrix(*arguments: Any) -> Tensor:
        found = original(*arguments)
        return found + 1e-9 * torch.eye(len(found), dtype=torch.float64)

    return matrix


def stretched(original: Any) -> Any:
    return lambda objective: tuple(table * (1 + 1e-9) for table in original(objective))


def nothing(original: Any) -> Any:
    """Zeros of the right shape."""

    def zeros(*arguments: Any, **options: Any) -> Any:
        found = original(*arguments, **options)
        return tuple(0 * table for table in found) if isinstance(found, tuple) else 0 * found

    return zeros


def forgets_the_reference(original: Any) -> Any:
    return losses.tbrm_residual


BUGS: dict[str, Plant] = {
    "X2.a": function(population, "noise_floor", scaled(0.5)),
    "X2.b": function(control_variate, "noise_before", nothing),
    "X2.c": kernels("variance", nothing),
    "X2.d": function(dynamic_programming, "policy_kl", scaled(1 + 1e-9)),
    "X5.a": residual("tbrm-iterative", "tbrm"),
    "X5.b": residual("tbrm", "tbrm-iterative"),
    "X5.c": residual("tbrm-iterative", "tbrm"),
    "X5.d": residual("tbrm-iterative", "tbrm"),
    "X5.e": residual("tbrm", "tbrm-iterative"),
    "X6.a": function(population, "population_loss", scaled(1 + 1e-9)),
    "X6.b": function(losses, "reval_residual", forgets_the_reference),
    "X6.c": function(losses, "reval_residual", forgets_the_reference),
    "X6.d": function(starting_points, "least_squares_plan", stretched),
    "X7.a": function(conditioning, "moment_matrix", scaled(1 + 1e-9)),
    "X7.b": kernels("push", scaled(1 + 1e-9)),
    "X7.c": function(conditioning, "moment_matrix", a_little_more),
    "X7.d": function(population, "population_loss", always("tbrm")),
    "X7.e": function(population, "population_loss", scaled(1 + 1e-9)),
    "X7.f": function(population, "population_loss", always("brm")),
    "O2.a": function(control_variate, "soft_value", scaled(1 + 1e-9)),
    "O2.b": function(control_variate, "bellman_error", later_layers),
    "O2.c": function(control_variate, "bellman_error", nothing),
    "O2.d": function(coverage, "kappa", nothing),
    "O2.e": function(control_variate, "soft_value", scaled(1 + 1e-9)),
    "O2.f": kernels("variance", nothing),
}


@pytest.mark.parametrize("claim_id", BUGS)
def test_a_planted_bug_turns_the_verdict(claim_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few = 5 if CLAIMS[claim_id].problem is not None else 3
    few = min(few, CLAIMS[claim_id].problems or few)
    check_that_the_verdict_turns(claim_id, BUGS[claim_id], monkeypatch, FEW, few)


def test_every_claim_of_these_sections_is_here() -> None:
    assert set(BUGS) == {claim_id for claim_id in CLAIMS if claim_id.startswith(("X2", "X5", "X6", "X7", "O2"))}


# -- X2 and O2 -------------------------------------------------------------------------------------------------------


def test_a_lottery_has_luck_and_a_policy_that_is_wrong() -> None:
    for seed in range(20):
        made = lottery(seed)
        assert made.luck.abs().max() > 1e-3
        policy = tuple(torch.log_softmax(q, -1) for q in made.logits)
        assert dynamic_programming.regret(made.mdp, policy) > 1e-6


def test_the_minimiser_of_a_lottery_is_below_the_noise_floor() -> None:
    """Where the luck is small the stationary point of X2.c is what minimisation from θ* finds."""
    made = lottery(3)
    tabular, objective = Tabular(made.mdp), PopulationObjective(made.mdp, _markov(made.mdp))
    start = tabular.parameters(dynamic_programming.solve(made.mdp).q).unsqueeze(0)
    found = levenberg_marquardt(objective, tabular, start)
    floor = population.noise_floor(made.mdp, made.mdp.log_reference)
    assert found.loss[0] < floor
    policy = torch.log_softmax(tabular.logits(found.theta)[1][0], -1)
    assert torch.allclose(policy, torch.log_softmax(made.logits[1], -1), atol=1e-6)


def _markov(mdp: RegularizedMDP) -> Any:
    return MixtureBehaviour((1.0,), (mdp.log_reference,))


@pytest.mark.parametrize("seed", range(3))
def test_two_fresh_next_states_have_the_corrected_loss_for_their_mean(seed: int) -> None:
    """Every outcome of the actual trajectory and of both fresh draws, one by one; the actual state with one fresh one is off."""
    mdp, logits, log_mu = (draw(seed) for draw in (_tiny, lambda s: random_logits(_tiny(s), s), _tiny_policy))
    v = [torch.logsumexp(q, -1) for q in logits]
    listed = enumerate_trajectories(mdp)
    two, one = 0.0, 0.0
    for states, actions, log_law in zip(listed.states, listed.actions, listed.log_law(log_mu), strict=True):
        steps = range(mdp.horizon)
        own = sum(float((logits[h] - mdp.regularized_reward[h])[states[h], actions[h]]) for h in steps)
        draws = [mdp.transitions[h].edges()[1][states[h], actions[h]] for h in range(mdp.horizon - 1)]
        outcomes = []  # probability and residual of each way that the fresh states can fall
        for fresh in itertools.product(*(range(len(row)) for row in draws)):
            probability = math.prod(float(row[s]) for row, s in zip(draws, fresh, strict=True))
            outcomes.append((probability, own - sum(float(v[h + 1][s]) for h, s in enumerate(fresh))))
        actual = own - sum(float(v[h][states[h]]) for h in range(1, mdp.horizon))
        law = math.exp(float(log_law))
        two += law * sum(p * x * q * y for p, x in outcomes for q, y in outcomes)
        one += law * sum(p * x * actual for p, x in outcomes)
    corrected = float(control_variate.corrected_loss(mdp, logits, log_mu))
    assert two == pytest.approx(corrected, rel=1e-12)
    assert abs(one - corrected) > 1e-3


def _tiny(seed: int) -> RegularizedMDP:
    generator = seeded(seed)
    return RegularizedMDP(
        beta=0.7,
        initial=torch.ones(1),
        reward=[torch.randn(s, 2, generator=generator, dtype=torch.float64) for s in (1, 2, 2)],
        reference=[draw_simplex((s, 2), generator) for s in (1, 2, 2)],
        transitions=[DenseTransition(draw_simplex((s, 2, 2), generator)) for s in (1, 2)],
    )


def _tiny_policy(seed: int) -> tuple[Tensor, ...]:
    return random_policy(_tiny(seed), seed + 10)


def test_a_mixture_is_the_weighted_sum_and_other_behaviour_is_refused() -> None:
    mdp = random_problem("dense", 0)
    logits = random_logits(mdp, 0)
    one, other = random_policy(mdp, 1), random_policy(mdp, 2)
    parts = [control_variate.corrected_loss(mdp, logits, log_mu) for log_mu in (one, other)]
    both = control_variate.corrected_loss(mdp, logits, MixtureBehaviour((0.25, 0.75), (one, other)))
    assert both.item() == pytest.approx((0.25 * parts[0] + 0.75 * parts[1]).item(), rel=1e-14)
    with pytest.raises(InvalidInputError, match="behaviour"):
        control_variate.corrected_loss(mdp, logits, HistoryBehaviour(one, repeat=0.5))


def test_without_noise_the_correction_changes_nothing() -> None:
    mdp = random_problem("deterministic", 1)
    logits, log_mu = random_logits(mdp, 1), random_policy(mdp, 2)
    corrected = control_variate.corrected_loss(mdp, logits, log_mu)
    assert corrected.item() == pytest.approx(population.population_loss(mdp, logits, log_mu).item(), rel=1e-13)


# -- X5 --------------------------------------------------------------------------------------------------------------


def test_the_numbers_of_the_paper() -> None:
    logits = (torch.tensor([[[0.0, 0.0]], [[10.0, 0.0]]], dtype=torch.float64),)
    folded, unfolded = (make("two-armed-bandit", advantage=10.0, folded=folded) for folded in (True, False))
    assert bandit_scores(folded, logits, "tbrm-iterative").tolist() == pytest.approx([50.0, 86.618354], abs=5e-7)
    assert bandit_scores(folded, logits, "tbrm")[1] < 1e-30
    assert bandit_scores(unfolded, logits, "tbrm-iterative").tolist() == pytest.approx([43.55, 74.20], abs=5e-3)
    assert bandit_scores(unfolded, logits, "tbrm")[1].item() == pytest.approx(0.48, abs=5e-3)


def test_the_threshold_is_the_root() -> None:
    def g(a: float) -> float:
        return a * (1 - 1 / math.sqrt(2)) + math.log1p(math.exp(-a)) - math.log(2)

    assert g(THRESHOLD * (1 - 1e-14)) < 1e-16
    assert g(THRESHOLD * (1 + 1e-14)) > -1e-16
    assert g(1.0) < 0 < g(3.0)


# -- X7 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", population.LOSSES)
@pytest.mark.parametrize("kind", KINDS)
def test_gauss_newton_matrices_are_second_moments_of_gradients(kind: str, loss: str) -> None:
    """Against autograd of the residuals of every trajectory."""
    mdp = random_problem(kind, 3)
    logits, log_mu = random_logits(mdp, 3), random_policy(mdp, 4)
    listed = enumerate_trajectories(mdp)
    own = [torch.where(valid, q, 0.0).requires_grad_() for q, valid in zip(logits, mdp.valid, strict=True)]
    q = [torch.where(valid, table, -torch.inf) for table, valid in zip(own, mdp.valid, strict=True)]
    steps = []
    for h in range(mdp.horizon):
        step = q[h][listed.states[:, h], listed.actions[:, h]]
        if h < mdp.horizon - 1:
            step = step - torch.logsumexp(q[h + 1], -1)[listed.states[:, h + 1]]
        steps.append(step)
    residuals = steps if loss == "brm" else [torch.stack(steps).sum(0)]
    law = listed.log_law(log_mu).exp()
    expected = torch.zeros(*2 * [sum(table.numel() for table in own)], dtype=torch.float64)
    for residual in residuals:
        for probability, value in zip(law, residual, strict=True):
            slope = torch.autograd.grad(value, own, retain_graph=True, allow_unused=True, materialize_grads=True)
            flat = flatten_tables(tuple(slope))
            expected += probability.item() * torch.outer(flat, flat)
    found = conditioning.gauss_newton_matrix(mdp, logits, log_mu, loss=loss)
    assert torch.allclose(found, expected, rtol=0, atol=1e-14)


def test_numbers_of_theory_md() -> None:
    """TBRM 1.0 and BRM 175 with one state per layer at H = 10; 64 against 321 on a binary tree at H = 7."""
    for family, horizon, expected in (("one-state", 10, (1.0, 175.09)), ("deterministic-tree", 7, (64.0, 321.26))):
        mdp = make(family, horizon=horizon, actions=2)
        zero = tuple(torch.zeros_like(table) for table in mdp.reference)
        for loss, condition in zip(population.LOSSES, expected, strict=True):
            eigenvalues = conditioning.spectrum(mdp, zero, mdp.log_reference, loss=loss)
            assert (eigenvalues[-1] / eigenvalues[0]).item() == pytest.approx(condition, rel=1e-4)
    assert one_state_condition(10) == pytest.approx(175.0866, rel=1e-6)


def test_the_spectrum_leaves_out_the_gauge_and_what_has_no_data() -> None:
    mdp = make("combination-lock", horizon=3)
    zero = tuple(torch.zeros_like(table) for table in mdp.reference)
    pairs = int(sum((mass > 0).sum() for mass in occupancy(mdp, mdp.log_reference).state_action))
    assert pairs == 10  # the wrong state of the first layer cannot be reached
    assert len(conditioning.spectrum(mdp, zero, mdp.log_reference, loss="brm")) == 10
    assert len(conditioning.spectrum(mdp, zero, mdp.log_reference)) == 6  # less four later states


def test_a_batch_or_an_unknown_loss_is_refused() -> None:
    mdp = make("one-state", horizon=2)
    zero = tuple(torch.zeros_like(table) for table in mdp.reference)
    with pytest.raises(InvalidInputError, match="loss"):
        conditioning.gauss_newton_matrix(mdp, zero, mdp.log_reference, loss="huber")
    with pytest.raises(InvalidInputError, match="batch"):
        conditioning.gauss_newton_matrix(mdp, tuple(t.unsqueeze(0) for t in zero), mdp.log_reference)


def test_actions_that_do_not_exist_are_not_taken_for_data() -> None:
    mdp = random_problem("deterministic", 1)
    logits, good = random_logits(mdp, 2), random_policy(mdp, 3)
    bad = tuple(torch.full_like(table, -math.log(table.shape[-1])) for table in good)
    assert control_variate.corrected_loss(mdp, logits, bad) == math.inf
    never = control_variate.corrected_loss(mdp, logits, MixtureBehaviour((1.0, 0.0), (good, bad)))
    assert never.item() == pytest.approx(control_variate.corrected_loss(mdp, logits, good).item(), rel=1e-12)
    for loss in population.LOSSES:
        with pytest.raises(InvalidInputError, match="log_behaviour"):
            conditioning.gauss_newton_matrix(mdp, logits, bad, loss=loss)


def test_mass_on_actions_that_do_not_exist_carries_no_luck_on() -> None:
    half = torch.full((1, 2), 0.5, dtype=torch.float64)
    mdp = RegularizedMDP(
        beta=1.0,
        initial=torch.ones(1),
        reward=[torch.zeros(1, 2), torch.tensor([[0.0, 0.0], [3.0, 1.0]])],
        reference=[torch.tensor([[1.0, 0.0]]), torch.full((2, 2), 0.5)],
        transitions=[DenseTransition(torch.tensor([[[0.5, 0.5], [0.1, 0.9]]], dtype=torch.float64))],
    )
    data = (half.log(), half.log().expand(2, 2))
    luck = control_variate.noise_before(mdp, data)[1]
    swing = float(dynamic_programming.solve(mdp).v[1].diff()) / 2
    assert luck.tolist() == pytest.approx([0.25 * swing, -0.25 * swing], rel=1e-12)


def test_a_spectrum_of_data_that_leave_out_actions_is_refused() -> None:
    mdp = random_problem("deterministic", 1)
    one = tuple(
        torch.where(log == log.amax(-1, keepdim=True), 0.0, -torch.inf).double() for log in random_policy(mdp, 3)
    )
    with pytest.raises(InvalidInputError, match=r"log_behaviour\[0\]: expected every action"):
        conditioning.spectrum(mdp, random_logits(mdp, 2), one)
