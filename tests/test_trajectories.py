"""Trajectories: drawn frequencies against the enumerated law, what is refused, where a response is over."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import accumulate, product
from types import SimpleNamespace
from typing import Any

import jaxtyping
import pytest
import torch
from convert import plain
from drawn import KINDS, as_table, as_tuples, p_value, random_policy, random_problem, short_answers
from hypothesis import given
from hypothesis import strategies as st
from reference import PlainMDP, next_states, table_sum, trajectories, trajectory_law
from strategies import problems
from torch import Tensor

from tbrm_theory.endings import endings, finished
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.losses import RESIDUALS, brm_residual
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.sampling import CumulativeRows
from tbrm_theory.scores import table_scores
from tbrm_theory.shapes import PerLayerStateAction
from tbrm_theory.statistics import CHECK_FAILURE_RATE
from tbrm_theory.trajectories import (
    Dataset,
    TrajectoryBatch,
    check_trajectories,
    concatenate,
    sample_trajectories,
    trajectory_return,
)
from tbrm_theory.transitions import DeterministicTransition

LARGEST_UNIFORM = 1 - 2.0**-53  # what torch.rand can return at most; 0 is what it can return at least


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_of(*trajectories: list[tuple[int, int]], mask: list[list[bool]] | None = None) -> TrajectoryBatch:
    steps = torch.tensor(trajectories)
    full = torch.ones(steps.shape[:2], dtype=torch.bool)
    return TrajectoryBatch(steps[..., 0], steps[..., 1], full if mask is None else torch.tensor(mask))


def equal(left: TrajectoryBatch, right: TrajectoryBatch) -> bool:
    names = ("states", "actions", "mask")
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in names)


@pytest.fixture
def no_run_time_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users have it: the shape checks that come with pytest are off, the package's own must do."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


# -- the law of what is drawn --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_drawn_trajectories_have_the_law_of_the_policy(kind: str, seed: int):
    """50,000 draws against ``ρ Π π Π P`` by naive enumeration; the first block of draws is a third of them."""
    mdp = random_problem(kind, seed)
    policy = random_policy(mdp, seed)
    law = trajectory_law(plain(mdp), as_table(mdp, policy))
    assert len(law) > 10
    batch = sample_trajectories(mdp, policy, 50_000, seeded(seed))
    assert p_value(batch, law) > CHECK_FAILURE_RATE
    check_trajectories(mdp, batch)


def test_the_test_of_the_law_has_power():
    """The same counts are refused under a policy that differs by three per cent in one layer."""
    mdp = random_problem("dense")
    policy = random_policy(mdp, 0)
    tilted = policy[1] + 0.12 * torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    other = (policy[0], torch.log_softmax(tilted, dim=-1), *policy[2:])
    batch = sample_trajectories(mdp, policy, 50_000, seeded(0))
    assert p_value(batch, trajectory_law(plain(mdp), as_table(mdp, other))) < CHECK_FAILURE_RATE


def test_a_batch_of_policies_is_drawn_from_independently():
    """Leading dimensions (2, 3), on some layers only; each has the law of its own policy."""
    mdp = random_problem("sparse")
    policies = (*random_policy(mdp, 3, 2, 3)[:2], *random_policy(mdp, 4, 3)[2:3], *random_policy(mdp, 5)[3:])
    batch = sample_trajectories(mdp, policies, 10_000, seeded(0))
    assert batch.states.shape == (2, 3, 10_000, 4)
    for i in range(2):
        for j in range(3):
            own = (policies[0][i, j], policies[1][i, j], policies[2][j], policies[3])
            element = TrajectoryBatch(batch.states[i, j], batch.actions[i, j], batch.mask[i, j])
            assert p_value(element, trajectory_law(plain(mdp), as_table(mdp, own))) > CHECK_FAILURE_RATE
    assert not torch.equal(batch.actions[0, 0], batch.actions[1, 0])


@given(st.data())
def test_whatever_is_drawn_is_feasible(data: st.DataObject):
    """Any problem, any policy with holes: every draw has positive probability, step by step."""
    mdp = data.draw(problems())
    weights = [valid * torch.rand(valid.shape, generator=seeded(0), dtype=torch.float64) for valid in mdp.valid]
    policy = tuple((table / table.sum(-1, keepdim=True)).log() for table in weights)
    batch = sample_trajectories(mdp, policy, 50, seeded(1))
    check_trajectories(mdp, batch)
    assert set(as_tuples(batch.states, batch.actions)) <= set(trajectory_law(plain(mdp), as_table(mdp, policy)))


ADVERSARIAL = {
    "a sum below 1": [0.1] * 10,
    "zeros at both ends": [0.0, 0.0, 0.3, 0.7, 0.0],
    "a probability lost in rounding": [0.5, 1e-17, 0.5 - 1e-17, 0.0],
    "tiny ones first and last": [1e-17, 0.0, 1.0, 0.0, 1e-17, 0.0],
    "the smallest double": [5e-324, 1.0],
    "one of a thousand": [0.0] * 617 + [1.0] + [0.0] * 382,
    "a thousand, every second 0": [0.0, 1 / 500] * 500,
    "a sum a billionth too small": [0.5 - 1e-9, 0.5, 0.0],
    "a single outcome": [1.0],
}


@pytest.mark.parametrize("probability", ADVERSARIAL.values(), ids=ADVERSARIAL.keys())
def test_no_outcome_of_probability_zero_is_drawn(probability: list[float], monkeypatch: pytest.MonkeyPatch):
    """At the ends of the unit interval, at every cumulative sum and next to it; and the outcome is the one due there."""
    sums = [float(total) for total in accumulate(map(Fraction, probability))]
    near = [value for x in sums for value in (x, x - 2.0**-53, x + 2.0**-53) if 0 <= value <= LARGEST_UNIFORM]
    grid = torch.tensor([0.0, LARGEST_UNIFORM, *near], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda shape, **_: grid)
    drawn = CumulativeRows(torch.tensor(probability, dtype=torch.float64)).draw(
        torch.zeros(len(grid), dtype=torch.int64), seeded(0)
    )
    for u, outcome in zip(grid.tolist(), drawn.tolist(), strict=True):
        assert probability[outcome] > 0
        below, up_to = ([0.0, *sums][outcome], sums[outcome])
        assert below - 1e-12 <= u <= max(up_to, sums[-1] if not any(probability[outcome + 1 :]) else 0) + 2e-9


@pytest.mark.parametrize("outcomes", range(1, 18))
def test_binary_search_finds_the_first_sum_above_the_draw(outcomes: int, monkeypatch: pytest.MonkeyPatch):
    """Three rows of multiples of 1/64, whose sums are exact, at all 64 multiples."""
    weights = torch.randint(1, 4, (3, outcomes), generator=seeded(outcomes))
    weights[:, -1] = 64 - weights[:, :-1].sum(-1)
    grid = (torch.arange(64, dtype=torch.float64) / 64).repeat(3)
    row = torch.arange(3).repeat_interleave(64)
    monkeypatch.setattr(torch, "rand", lambda shape, **_: grid)
    drawn = CumulativeRows(weights.to(torch.float64) / 64).draw(row, seeded(0)) - row * outcomes
    sums = [list(accumulate(line)) for line in weights.tolist()]
    expected = [next(i for i, total in enumerate(line) if total > u) for line in sums for u in range(64)]
    assert drawn.tolist() == expected


def test_a_rare_successor_is_never_missed_for_an_impossible_one():
    """A deterministic policy on a dense kernel of probabilities 0 and 1 draws a single trajectory."""
    mdp = short_answers(slip=1.0)
    policy = tuple(torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]], dtype=torch.float64) for _ in range(3))
    batch = sample_trajectories(mdp, policy, 1000, seeded(0))
    assert set(as_tuples(batch.states, batch.actions)) == {((1, 1), (0, 0), (0, 0)), ((0, 0), (0, 0), (0, 0))}


# -- the same bits -------------------------------------------------------------------------------------------------


def wide_tree(vocabulary: int, horizon: int) -> RegularizedMDP:
    reference = [
        torch.rand(vocabulary**h, vocabulary, generator=seeded(h), dtype=torch.float64) for h in range(horizon)
    ]
    following = [torch.arange(vocabulary ** (h + 1)).reshape(vocabulary**h, vocabulary) for h in range(horizon - 1)]
    return RegularizedMDP(
        beta=1.0,
        initial=torch.ones(1),
        reward=[torch.zeros_like(table) for table in reference],
        reference=[table / table.sum(-1, keepdim=True) for table in reference],
        transitions=[DeterministicTransition(table, table.numel()) for table in following],
    )


def test_a_seed_gives_the_same_bits_at_any_number_of_threads():
    """Tables and draws large enough for torch to share them out among threads."""
    mdp = wide_tree(20, 4)
    assert mdp.reference[-1].numel() > 100_000
    threads = torch.get_num_threads()
    batches = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            batches.append(sample_trajectories(mdp, mdp.log_reference, 40_000, seeded(7)))
    finally:
        torch.set_num_threads(threads)
    assert equal(batches[0], batches[1])
    assert equal(batches[0], batches[2])


def test_another_seed_gives_other_trajectories():
    mdp = random_problem("dense")
    first, again, other = (sample_trajectories(mdp, mdp.log_reference, 100, seeded(seed)) for seed in (1, 1, 2))
    assert equal(first, again)
    assert not equal(first, other)


@pytest.mark.parametrize("kind", KINDS)
def test_drawing_changes_no_table(kind: str):
    mdp, untouched = random_problem(kind), random_problem(kind)
    policy, same_policy = random_policy(mdp, 0), random_policy(mdp, 0)
    sample_trajectories(mdp, policy, 100, seeded(0))
    assert mdp.to_document() == untouched.to_document()
    assert all(torch.equal(left, right) for left, right in zip(policy, same_policy, strict=True))


def test_no_gradient_flows_through_a_draw():
    mdp = random_problem("sparse")
    policy = tuple(table.clone().requires_grad_() for table in random_policy(mdp, 0))
    batch = sample_trajectories(mdp, policy, 5, seeded(0))
    assert not batch.states.requires_grad


# -- where a response is over --------------------------------------------------------------------------------------


def is_over(mdp: PlainMDP, h: int, s: int) -> bool:
    """One action, no reward, one successor, and so on: the definition, followed to the last layer."""
    existing = [a for a, probability in enumerate(mdp.reference[h][s]) if probability > 0]
    if len(existing) > 1 or mdp.reward[h][s][existing[0]] != 0:
        return False
    if h == len(mdp.reward) - 1:
        return True
    following = next_states(mdp, h, s, existing[0])
    return len(following) == 1 and is_over(mdp, h + 1, following[0][0])


@st.composite
def quiet_problems(draw: st.DrawFn) -> RegularizedMDP:
    """Few actions and few rewards, so that responses often end."""
    mdp = draw(problems(max_actions=2, min_horizon=2))
    kept = [draw(st.sampled_from([0.0, 0.0, 1.0])) for _ in mdp.reward]
    return RegularizedMDP(
        beta=mdp.beta,
        initial=mdp.initial,
        reward=[table * factor for table, factor in zip(mdp.reward, kept, strict=True)],
        reference=mdp.reference,
        transitions=mdp.transitions,
        action_counts=mdp.action_counts,
    )


@given(quiet_problems())
def test_a_response_is_over_where_all_is_forced_and_rewardless(mdp: RegularizedMDP):
    flat = plain(mdp)
    expected = [[is_over(flat, h, s) for s in range(len(layer))] for h, layer in enumerate(flat.reward)]
    assert [table.tolist() for table in finished(mdp)] == expected


@given(quiet_problems())
def test_what_is_forced_after_the_end_is_named(mdp: RegularizedMDP):
    """``endings``: where ``pair`` holds, ``successor`` is the only successor, and is over; ``action`` the only action."""
    flat, ends = plain(mdp), endings(mdp)
    for h in range(mdp.horizon):
        for s, row in enumerate(flat.reference[h]):
            if ends.state[h][s]:
                assert row[int(ends.action[h][s])] > 0
            for a, probability in enumerate(row):
                if probability > 0 and h < mdp.horizon - 1:
                    following = [state for state, _ in next_states(flat, h, s, a)]
                    expected = len(following) == 1 and is_over(flat, h + 1, following[0])
                    assert bool(ends.pair[h][s, a]) == expected
                    if expected:
                        assert ends.successor[h][s, a] == following[0]


def test_shared_layers_end_at_each_horizon():
    """The last layer's end may have two successors in the layers before: then it is no end there."""
    mdp = short_answers(horizon=4)
    assert [table.tolist() for table in finished(mdp)] == [[True, False]] * 4


@pytest.mark.parametrize("slip", [0.0, 0.4])
def test_padding_begins_with_the_first_state_that_is_over(slip: float):
    mdp = short_answers(slip=slip)
    batch = sample_trajectories(mdp, mdp.log_reference, 500, seeded(0))
    flat = plain(mdp)
    for states, mask in zip(batch.states.tolist(), batch.mask.tolist(), strict=True):
        assert mask == [h == 0 or not is_over(flat, h, s) for h, s in enumerate(states)]
    lengths = batch.mask.sum(-1)
    assert {1, 2, 3} == set(lengths.tolist())
    assert bool((batch.states[lengths == 1][:, 0] == 0).any())  # over from the start, yet its first step counts


@given(st.data())
def test_masking_what_is_forced_changes_no_trajectory_residual(data: st.DataObject):
    """Steps after the end have ``log π = log π_ref = r = 0``: the residuals are equal with and without them, bit for bit."""
    mdp = data.draw(quiet_problems())
    batch = sample_trajectories(mdp, mdp.log_reference, 20, seeded(0))
    unmasked = TrajectoryBatch(batch.states, batch.actions, torch.ones_like(batch.mask))
    logits = random_logits(mdp, 1)
    masked_scores, scores = (residual_inputs(mdp, logits, part) for part in (batch, unmasked))
    for name, residual in RESIDUALS.items():
        if not name.startswith(("brm", "sql", "pcl")):  # these regress the values after the end as well
            assert torch.equal(residual(masked_scores, beta=mdp.beta), residual(scores, beta=mdp.beta))


def test_masking_what_is_forced_sets_the_value_after_the_end_to_zero_in_brm():
    """BRM regresses the values after the end as well; with masks they are 0, and it is equal where the logits there are 0."""
    mdp = short_answers()
    batch = sample_trajectories(mdp, mdp.log_reference, 50, seeded(0))
    unmasked = TrajectoryBatch(batch.states, batch.actions, torch.ones_like(batch.mask))
    logits = random_logits(mdp, 1)
    calm = (logits[0], *(torch.where(torch.tensor([[True], [False]]), 0.0, table) for table in logits[1:]))
    for tables, same in ((calm, True), (logits, False)):
        parts = [residual_inputs(mdp, tables, part) for part in (batch, unmasked)]
        left, right = (brm_residual(part, beta=mdp.beta).square().sum(-1) for part in parts)
        assert torch.allclose(left, right, rtol=1e-12, atol=0) == same


def random_logits(mdp: RegularizedMDP, seed: int) -> PerLayerStateAction:
    generator = seeded(seed)
    return tuple(torch.randn(table.shape, generator=generator, dtype=torch.float64) for table in mdp.reference)


def residual_inputs(mdp: RegularizedMDP, logits: PerLayerStateAction, batch: TrajectoryBatch):
    other = random_logits(mdp, 2)
    return table_scores(
        logits,
        mdp.log_reference,
        mdp.reward,
        batch,
        reference_first_logits=other[0],
        frozen_logits=other,
        log_partition=other[0].sum(-1),
        baseline=other[0].sum(-1),
        critic=tuple(table.sum(-1) for table in other),
    )


# -- batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_return_is_the_sum_of_the_rewards(kind: str):
    mdp = random_problem(kind)
    batch = sample_trajectories(mdp, random_policy(mdp, 0, 2), 10, seeded(0))
    found = trajectory_return(mdp, batch)
    for i in range(2):
        expected = [table_sum(plain(mdp).reward, tau) for tau in as_tuples(batch.states[i], batch.actions[i])]
        assert found[i].tolist() == pytest.approx(expected, rel=1e-14)


def test_padding_adds_nothing_to_the_return():
    batch = batch_of([(1, 1), (1, 0), (1, 0)], mask=[[True, True, False]])
    assert trajectory_return(short_answers(), batch).tolist() == [0.0 + 2.0]


def test_rows_and_concatenation():
    mdp = random_problem("dense")
    batch = sample_trajectories(mdp, random_policy(mdp, 0, 2), 6, seeded(0))
    assert batch.count == 6
    assert batch.horizon == 4
    order = torch.tensor([5, 0, 0])
    assert torch.equal(batch.rows(order).states, batch.states[:, [5, 0, 0]])
    assert torch.equal(batch.rows(torch.tensor([False, True] * 3)).actions, batch.actions[:, 1::2])
    assert equal(concatenate([batch.rows(slice(0, 2)), batch.rows(slice(2, None))]), batch)
    assert equal(batch.to("cpu"), batch)
    data = Dataset(batch, trajectory_return(mdp, batch)).rows(order)
    assert torch.equal(data.trajectory_return, trajectory_return(mdp, data.batch))


def _sliced(states: Tensor, **changes: Tensor) -> TrajectoryBatch:
    parts = {"states": states, "actions": states, "mask": torch.ones_like(states, dtype=torch.bool)}
    return TrajectoryBatch(**(parts | changes))


ZEROS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.usefixtures("no_run_time_shapes")
@pytest.mark.parametrize(
    ("make", "where"),
    [
        (lambda: _sliced(ZEROS.double()), "trajectories.states"),
        (lambda: _sliced(ZEROS, actions=ZEROS.to(torch.int32)), "trajectories.actions"),
        (lambda: _sliced(ZEROS, mask=ZEROS), "trajectories.mask"),
        (lambda: _sliced(ZEROS[0]), "trajectories.states"),
        (lambda: _sliced(ZEROS[:0]), "trajectories.states"),
        (lambda: _sliced(ZEROS[:, :0]), "trajectories.states"),
        (lambda: _sliced(ZEROS, actions=ZEROS[:1]), "trajectories.actions"),
        (lambda: concatenate([]), "batches"),
        (lambda: concatenate([_sliced(ZEROS), _sliced(ZEROS[:, :2])]), "batches[1]"),
        (lambda: concatenate([_sliced(ZEROS), _sliced(ZEROS.expand(4, 2, 3))]), "batches[1]"),
        (lambda: Dataset(_sliced(ZEROS), torch.zeros(3)), "trajectory_return"),
        (lambda: Dataset(_sliced(ZEROS), torch.tensor([0.0, torch.nan])), "trajectory_return[1]"),
    ],
)
def test_a_malformed_batch_is_named(make: Callable[[], object], where: str):
    with pytest.raises(InvalidInputError) as error:
        make()
    assert error.value.where == where


# -- against a problem ---------------------------------------------------------------------------------------------

GOOD = [(1, 1), (1, 1), (1, 0)]
WRONG = {
    "a state out of range": ([(2, 0), (0, 0), (0, 0)], None, "states[0]", "a state of layer 0, from 0 to 1, found 2"),
    "a negative state": ([(1, 1), (-1, 0), (0, 0)], None, "states[1]", "from 0 to 1, found -1"),
    "an action out of range": ([(1, 1), (1, 1), (1, 2)], None, "actions[2]", "from 0 to 1, found 2"),
    "an action that does not exist": ([(0, 1), (0, 0), (0, 0)], None, "actions[0]", "exists in this state"),
    "an impossible successor": ([(1, 0), (1, 0), (0, 0)], None, "states[1]", "possible successor"),
    "padding from the start": ([(0, 0), (0, 0), (0, 0)], [False] * 3, "mask[0]", "never padding, found False"),
    "padding before the end": ([(1, 1), (1, 1), (1, 0)], [True, True, False], "mask[2]", "not all is forced"),
    "going on after padding": ([(1, 0), (0, 0), (0, 0)], [True, False, True], "mask[2]", "as in the step before"),
}


@pytest.mark.parametrize(("steps", "mask", "field", "text"), WRONG.values(), ids=WRONG.keys())
def test_the_trajectory_and_the_step_that_is_wrong_are_named(
    steps: list[tuple[int, int]], mask: list[bool] | None, field: str, text: str
):
    everything = [True] * 3
    batch = batch_of(GOOD, GOOD, steps, mask=[everything, everything, mask or everything])
    with pytest.raises(InvalidInputError) as error:
        check_trajectories(short_answers(), batch)
    assert error.value.where == f"trajectories[2].{field}"
    assert text in error.value.problem
    stacked = TrajectoryBatch(*(part.expand(2, -1, -1) for part in (batch.states, batch.actions, batch.mask)))
    with pytest.raises(InvalidInputError, match=r"trajectories\[0\]\[2\]"):
        check_trajectories(short_answers(), stacked)


def test_an_impossible_first_state_is_refused():
    mdp = random_problem("dense")
    batch = sample_trajectories(mdp, mdp.log_reference, 3, seeded(0))
    batch.states[1, 0] = 1
    with pytest.raises(InvalidInputError, match=r"trajectories\[1\]\.states\[0\]: expected a first state of positive"):
        check_trajectories(mdp, batch)


@pytest.mark.parametrize("kind", KINDS)
def test_exactly_the_feasible_trajectories_pass(kind: str):
    """All pairs of steps that the tables have room for, against the enumeration."""
    long = random_problem(kind)
    mdp = RegularizedMDP(
        beta=long.beta,
        initial=long.initial,
        reward=long.reward[:2],
        reference=long.reference[:2],
        transitions=long.transitions[:1],
    )
    possible, passed, tried = set(trajectories(plain(mdp))), set(), 0
    for first, second in product(product(range(3), range(2)), product(range(2), range(3))):
        tried += 1
        try:
            check_trajectories(mdp, batch_of([first, second]))
            passed.add((first, second))
        except InvalidInputError as error:
            assert str(error).startswith("trajectories[0].")  # noqa: PT017 - whether it is raised is the question
    assert passed == possible
    assert 0 < len(passed) < tried


def test_trajectories_of_another_horizon_are_refused():
    with pytest.raises(InvalidInputError, match="expected 4 steps, found 3"):
        check_trajectories(short_answers(horizon=4), batch_of(GOOD))
    with pytest.raises(InvalidInputError, match="expected 4 steps, found 3"):
        trajectory_return(short_answers(horizon=4), batch_of(GOOD))


def test_a_batch_of_problems_is_refused():
    mdp = short_answers()
    many = RegularizedMDP(
        beta=torch.tensor([0.5, 1.0]),
        initial=mdp.initial,
        reward=mdp.reward,
        reference=mdp.reference,
        transitions=mdp.transitions,
    )
    for call in (
        lambda: sample_trajectories(many, mdp.log_reference, 1, seeded(0)),
        lambda: check_trajectories(many, batch_of(GOOD)),
        lambda: trajectory_return(many, batch_of(GOOD)),
        lambda: finished(many),
    ):
        with pytest.raises(InvalidInputError, match="expected one problem, found a batch"):
            call()


# -- what cannot be drawn ------------------------------------------------------------------------------------------


def test_drawing_nothing_is_refused():
    mdp = short_answers()
    with pytest.raises(InvalidInputError, match="count: expected at least 1 trajectory, found 0"):
        sample_trajectories(mdp, mdp.log_reference, 0, seeded(0))


@pytest.mark.usefixtures("no_run_time_shapes")
def test_a_generator_of_another_device_is_refused():
    elsewhere: Any = SimpleNamespace(device=torch.device("cuda"))
    mdp = short_answers()
    with pytest.raises(InvalidInputError, match="generator: expected one on cpu, as the problem, found one on cuda"):
        sample_trajectories(mdp, mdp.log_reference, 1, elsewhere)


def test_a_policy_that_takes_actions_that_do_not_exist_is_refused_where_it_gets_there():
    mdp = short_answers()
    ends_at_once = torch.tensor([[0.0, -torch.inf], [0.0, -torch.inf]], dtype=torch.float64)
    wrong = torch.tensor([[-torch.inf, 0.0], [-torch.inf, 0.0]], dtype=torch.float64)
    with pytest.raises(InvalidInputError, match=r"log_policy\[1\]\[0\]\[1\]: expected -inf"):
        sample_trajectories(mdp, (ends_at_once, wrong, wrong), 10, seeded(0))
    never_begins_there = RegularizedMDP(
        beta=1.0,
        initial=torch.tensor([0.0, 1.0]),
        reward=mdp.reward,
        reference=mdp.reference,
        transitions=mdp.transitions,
    )
    only_unreached = torch.tensor([[-torch.inf, 0.0], [0.0, -torch.inf]], dtype=torch.float64)
    batch = sample_trajectories(never_begins_there, (only_unreached, ends_at_once, ends_at_once), 10, seeded(0))
    assert set(as_tuples(batch.states, batch.actions)) == {((1, 0), (0, 0), (0, 0))}


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda tables: tables[:2], "log_policy"),
        (lambda tables: (tables[0] + 0.1, *tables[1:]), r"log_policy\[0\]\[0\]"),
        (lambda tables: (tables[0] * torch.nan, *tables[1:]), r"log_policy\[0\]\[0\]"),
        (lambda tables: (tables[0][:1], *tables[1:]), r"log_policy\[0\]"),
        (
            lambda tables: (tables[0].expand(2, -1, -1), tables[1].expand(3, -1, -1), tables[2]),
            "log_policy: .*broadcast",
        ),
    ],
)
def test_a_malformed_policy_is_refused(change: Callable[[PerLayerStateAction], PerLayerStateAction], where: str):
    mdp = short_answers()
    with pytest.raises(InvalidInputError, match=where):
        sample_trajectories(mdp, change(mdp.log_reference), 3, seeded(0))


def test_successive_pairs_are_what_the_kernel_says():
    """A tree never merges, so a state is the base-20 number of the actions so far."""
    mdp = wide_tree(20, 4)
    batch = sample_trajectories(mdp, mdp.log_reference, 100, seeded(0))
    for states, actions in zip(batch.states.tolist(), batch.actions.tolist(), strict=True):
        for (here, action), following in zip(zip(states, actions, strict=True), states[1:], strict=False):
            assert following == 20 * here + action
