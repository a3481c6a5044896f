"""Behaviours: exact laws and drawn frequencies against naive enumeration, and what the named ones promise."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction

import pytest
import torch
from convert import plain
from drawn import KINDS, as_table, as_tuples, p_value, random_policy, random_problem, short_answers
from hypothesis import given
from hypothesis import strategies as st
from reference import (
    Law,
    PlainMDP,
    Table,
    Trajectory,
    history_law,
    kappa_by_sup,
    mixture_law,
    optimal_policy,
    tabulate,
    trajectory_law,
)
from strategies import problems

from tbrm_theory.behaviours import (
    Behaviour,
    FixedDataset,
    HistoryBehaviour,
    MarkovBehaviour,
    MixtureBehaviour,
)
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.named_behaviours import (
    BEHAVIOURS,
    LEAST_PROBABILITY,
    anti_optimal,
    epsilon_optimal,
    history_dependent,
    on_policy,
    random_markov,
    reference_behaviour,
    replay,
    replay_of_deterministic,
    uniform,
    with_holes,
)
from tbrm_theory.occupancy import Enumeration, enumerate_trajectories
from tbrm_theory.shapes import PerLayerStateAction
from tbrm_theory.statistics import CHECK_FAILURE_RATE
from tbrm_theory.trajectories import TrajectoryBatch, check_trajectories, sample_trajectories, trajectory_return
from tbrm_theory.trajectory_files import read_trajectories, write_trajectories
from tbrm_theory.transitions import DeterministicTransition

DRAWS = 20_000


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_state(horizon: int, actions: int) -> RegularizedMDP:
    """X1's problem: a single state in every layer, so that everything merges."""
    reward = torch.arange(actions, dtype=torch.float64).unsqueeze(0)
    return RegularizedMDP(
        beta=1.0,
        initial=torch.ones(1),
        reward=[reward] * horizon,
        reference=[torch.full((1, actions), 1 / actions, dtype=torch.float64)] * horizon,
        transitions=[DeterministicTransition(torch.zeros(1, actions, dtype=torch.int64), 1)] * (horizon - 1),
    )


def law_of(behaviour: Behaviour, mdp: RegularizedMDP) -> Law:
    """The package's own law, the impossible trajectories left out."""
    listed = enumerate_trajectories(mdp)
    law = behaviour.log_law(mdp, listed).exp().tolist()
    return {tau: p for tau, p in zip(as_tuples(listed.states, listed.actions), law, strict=True) if p > 0}


def repeating(mdp: PlainMDP, policy: Table, repeat: float) -> Callable[[Trajectory, int], Sequence[float]]:
    """The rule of history-dependent behaviour, in words: do it again if that exists here, else draw."""

    def rule(history: Trajectory, s: int) -> list[float]:
        h = len(history)
        fresh = list(policy[h][s])
        if not history:
            return fresh
        again = history[-1][1]
        if again >= len(fresh) or mdp.reference[h][s][again] == 0:
            return fresh
        return [(1 - repeat) * p + (repeat if a == again else 0.0) for a, p in enumerate(fresh)]

    return rule


def holey(policy: PerLayerStateAction) -> PerLayerStateAction:
    """Without the most likely action of the last state of every layer, where another one remains."""
    tables = []
    for log in policy:
        probability = log.exp()
        row = probability[-1]
        if int((row > 0).sum()) > 1:
            row[row.argmax()] = 0.0
        tables.append((probability / probability.sum(-1, keepdim=True)).log())
    return tuple(tables)


def assert_law(found: Law, expected: Law) -> None:
    assert set(found) == set(expected)
    assert list(found.values()) == pytest.approx([float(expected[tau]) for tau in found], rel=1e-12)


# -- laws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_markov_behaviour_has_the_law_of_its_policy(kind: str):
    mdp = random_problem(kind)
    policy = random_policy(mdp, 0)
    behaviour = MarkovBehaviour(policy)
    law = trajectory_law(plain(mdp), as_table(mdp, policy))
    assert_law(law_of(behaviour, mdp), law)
    assert p_value(behaviour.sample(mdp, DRAWS, seeded(1)), law) > CHECK_FAILURE_RATE
    assert behaviour.components == [(1.0, policy)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_is_drawn_once_for_each_episode(kind: str):
    """Three components, one of weight 0 and one with holes; the law is no product over steps."""
    mdp = random_problem(kind)
    policies = (random_policy(mdp, 0), random_policy(mdp, 1), holey(random_policy(mdp, 2)))
    behaviour = MixtureBehaviour((0.25, 0.0, 0.75), policies)
    law = mixture_law(plain(mdp), [(w, as_table(mdp, p)) for w, p in zip((0.25, 0.0, 0.75), policies, strict=True)])
    assert_law(law_of(behaviour, mdp), law)
    assert p_value(behaviour.sample(mdp, DRAWS, seeded(2)), law) > CHECK_FAILURE_RATE
    assert behaviour.components == list(zip((0.25, 0.0, 0.75), policies, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("repeat", [0.3, 1.0])
def test_history_dependent_behaviour_repeats_what_exists(kind: str, repeat: float):
    """The last action's index may not exist in the next state, or be beyond its layer."""
    mdp = random_problem(kind)
    policy = random_policy(mdp, 0)
    behaviour = HistoryBehaviour(policy, repeat)
    flat = plain(mdp)
    law = history_law(flat, repeating(flat, as_table(mdp, policy), repeat))
    assert math.fsum(law.values()) == pytest.approx(1, rel=1e-12)
    assert_law(law_of(behaviour, mdp), law)
    assert p_value(behaviour.sample(mdp, DRAWS, seeded(3)), law) > CHECK_FAILURE_RATE
    assert behaviour.components is None


def test_history_dependence_is_not_markov():
    """With one state in each layer the next action depends on the last: no Markov policy has this law."""
    mdp = one_state(2, 2)
    law = law_of(history_dependent(mdp, repeat=0.5), mdp)
    assert law == pytest.approx(
        {((0, 0), (0, 0)): 3 / 8, ((0, 0), (0, 1)): 1 / 8, ((0, 1), (0, 0)): 1 / 8, ((0, 1), (0, 1)): 3 / 8}
    )


def test_never_repeating_is_markov():
    mdp = random_problem("dense")
    policy = random_policy(mdp, 0)
    assert_law(law_of(HistoryBehaviour(policy, 0.0), mdp), law_of(MarkovBehaviour(policy), mdp))


def test_fixed_data_have_the_law_of_their_shares():
    """Rows drawn with replacement; the law counts how often each trajectory is there, padded ones included."""
    mdp = short_answers()
    batch = sample_trajectories(mdp, mdp.log_reference, 30, seeded(0))
    behaviour = FixedDataset(batch)
    times = Counter(as_tuples(batch.states, batch.actions))
    law = {tau: times[tau] / 30 for tau in times}
    assert len(law) > 4
    assert_law(law_of(behaviour, mdp), law)
    drawn = behaviour.sample(mdp, DRAWS, seeded(1))
    assert p_value(drawn, law) > CHECK_FAILURE_RATE
    check_trajectories(mdp, drawn)
    assert behaviour.components is None


def test_fixed_data_keep_their_noisy_returns(tmp_path):
    """A return is drawn together with its own trajectory, from a file on."""
    mdp = short_answers()
    batch = sample_trajectories(mdp, mdp.log_reference, 10, seeded(0))
    noisy = torch.arange(10, dtype=torch.float64) + 0.5
    write_trajectories(tmp_path / "data.jsonl", mdp, batch, noisy)
    data = read_trajectories(tmp_path / "data.jsonl", mdp)
    drawn = FixedDataset(data.batch, data.trajectory_return).draw(mdp, 100, seeded(1))
    row = (drawn.trajectory_return - 0.5).to(torch.int64)
    assert set(row.tolist()) == set(range(10))
    assert torch.equal(drawn.batch.states, batch.states[row])
    assert torch.equal(drawn.batch.actions, batch.actions[row])
    exact = FixedDataset(batch).draw(mdp, 100, seeded(1))
    assert torch.equal(exact.trajectory_return, trajectory_return(mdp, exact.batch))


@given(st.data())
def test_every_law_sums_to_one_on_every_problem(data: st.DataObject):
    """All named behaviours on any problem, against the naive law of their components where there are some."""
    mdp = data.draw(problems())
    name = data.draw(st.sampled_from(sorted(BEHAVIOURS)))
    if name == "with-holes" and not has_a_choice(mdp):
        return
    behaviour = BEHAVIOURS[name].make(mdp, 3)
    law = law_of(behaviour, mdp)
    assert math.fsum(law.values()) == pytest.approx(1, rel=1e-9)
    if behaviour.components is not None:
        expected = mixture_law(plain(mdp), [(w, as_table(mdp, log)) for w, log in behaviour.components])
        assert_law(law, expected)


@pytest.mark.parametrize("name", BEHAVIOURS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_named_behaviour_is_drawn_by_its_law(kind: str, name: str):
    mdp = random_problem(kind, seed=1)
    behaviour = BEHAVIOURS[name].make(mdp, 5)
    assert isinstance(behaviour, Behaviour)
    batch = behaviour.sample(mdp, DRAWS, seeded(4))
    assert p_value(batch, law_of(behaviour, mdp)) > CHECK_FAILURE_RATE
    check_trajectories(mdp, batch)


@pytest.mark.parametrize(
    "make", [MarkovBehaviour, lambda p: MixtureBehaviour((0.5, 0.5), (p, p)), lambda p: HistoryBehaviour(p, 0.5)]
)
def test_a_batch_of_behaviours(make: Callable[[PerLayerStateAction], Behaviour]):
    """Leading dimensions of the policies lead the draws and the laws; each element has its own."""
    mdp = random_problem("sparse")
    policies = random_policy(mdp, 0, 2)
    batch = make(policies).sample(mdp, DRAWS, seeded(5))
    laws = make(policies).log_law(mdp, enumerate_trajectories(mdp))
    assert batch.states.shape == (2, DRAWS, 4)
    assert laws.shape[0] == 2
    for i in range(2):
        own = make(tuple(table[i] for table in policies))
        assert torch.allclose(laws[i], own.log_law(mdp, enumerate_trajectories(mdp)), rtol=1e-12, atol=0)
        element = TrajectoryBatch(batch.states[i], batch.actions[i], batch.mask[i])
        assert p_value(element, law_of(own, mdp)) > CHECK_FAILURE_RATE


def test_components_of_a_mixture_may_differ_in_their_batches():
    """A single policy and a batch of two: the element's own component, or the common one."""
    mdp = random_problem("deterministic")
    common, several = random_policy(mdp, 0), random_policy(mdp, 1, 2)
    behaviour = MixtureBehaviour((0.5, 0.5), (common, several))
    batch = behaviour.sample(mdp, DRAWS, seeded(6))
    laws = behaviour.log_law(mdp, enumerate_trajectories(mdp))
    for i in range(2):
        own = tuple(table[i] for table in several)
        law = mixture_law(plain(mdp), [(0.5, as_table(mdp, common)), (0.5, as_table(mdp, own))])
        element = TrajectoryBatch(batch.states[i], batch.actions[i], batch.mask[i])
        assert p_value(element, law) > CHECK_FAILURE_RATE
        assert laws[i].exp().sum() == pytest.approx(1, rel=1e-12)


# -- what the named ones promise -------------------------------------------------------------------------------------


def has_a_choice(mdp: RegularizedMDP) -> bool:
    listed = enumerate_trajectories(mdp)
    columns = [valid.sum(-1)[listed.states[:, h]] for h, valid in enumerate(mdp.valid)]
    return bool((torch.stack(columns) > 1).any())


def probabilities(behaviour: MarkovBehaviour) -> list[torch.Tensor]:
    return [log.exp() for log in behaviour.log_policy]


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_full_support_means_every_trajectory(name: str):
    """A behaviour with full support gives each feasible trajectory positive probability, one without leaves some out."""
    row = BEHAVIOURS[name]
    assert row.name == name
    assert row.summary
    for seed in range(5):
        mdp = random_problem("deterministic", seed=seed)
        law = law_of(row.make(mdp, seed), mdp)
        assert (len(law) == len(enumerate_trajectories(mdp).states)) == row.full_support


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_markov_means_one_component(name: str):
    behaviour = BEHAVIOURS[name].make(random_problem("dense"), 0)
    assert BEHAVIOURS[name].markov == (behaviour.components is not None and len(behaviour.components) == 1)


@pytest.mark.parametrize("name", ["random-markov", "with-holes", "replay", "replay-of-deterministic"])
def test_the_seed_decides_what_is_random(name: str):
    mdp = random_problem("dense")
    listed = enumerate_trajectories(mdp)
    one, again, other = (BEHAVIOURS[name].make(mdp, seed).log_law(mdp, listed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_reference_uniform_and_on_policy():
    mdp = random_problem("dense")
    for found, expected in zip(probabilities(reference_behaviour(mdp)), mdp.reference, strict=True):
        assert torch.allclose(found, expected, rtol=1e-14, atol=0)
    for found, valid in zip(probabilities(uniform(mdp)), mdp.valid, strict=True):
        for row, exists in zip(found.tolist(), valid.tolist(), strict=True):
            assert row == pytest.approx([1 / sum(exists) if there else 0.0 for there in exists])
    policy = random_policy(mdp, 0)
    assert on_policy(policy).log_policy is policy


def test_anti_optimal_prefers_the_worse_action():
    """The order of probabilities is the reverse of the optimum's in every state, and the widest log-odds are ``strength``."""
    mdp = random_problem("dense")
    star = optimal_policy(plain(mdp))
    widest = 0.0
    for h, table in enumerate(probabilities(anti_optimal(mdp, strength=3.0))):
        for s, row in enumerate(table.tolist()):
            existing = [a for a, p in enumerate(star[h][s]) if p > 0]
            assert sorted(existing, key=lambda a: row[a]) == sorted(existing, key=lambda a: -star[h][s][a])
            assert all(row[a] > 0 for a in existing)
            widest = max(widest, math.log(max(row[a] for a in existing) / min(row[a] for a in existing)))
    assert widest == pytest.approx(3.0, rel=1e-12)


@pytest.mark.parametrize("beta", [1e-6, 1e6])
def test_anti_optimal_has_full_support_at_any_temperature(beta: float):
    """``π*`` is as good as deterministic at small beta; its opposite is not."""
    warm = random_problem("dense")
    mdp = RegularizedMDP(
        beta=beta,
        initial=warm.initial,
        reward=warm.reward,
        reference=warm.reference,
        transitions=warm.transitions,
    )
    for table, valid in zip(probabilities(anti_optimal(mdp)), mdp.valid, strict=True):
        assert float(table[valid].min()) > 0.01


def test_anti_optimal_of_a_problem_without_choices_is_the_only_policy():
    behaviour = anti_optimal(one_state(3, 1))
    assert [table.tolist() for table in behaviour.log_policy] == [[[0.0]]] * 3


def test_random_policies_have_a_floor():
    """200 states with 5 actions: a uniform point of the simplex goes far below 1e-3, the policy never does."""
    reference = torch.full((200, 5), 0.2, dtype=torch.float64)
    reference[:100] = torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0])
    mdp = RegularizedMDP(
        beta=1.0,
        initial=torch.full((200,), 1 / 200, dtype=torch.float64),
        reward=[torch.zeros(200, 5)],
        reference=[reference],
        transitions=[],
    )
    (table,) = probabilities(random_markov(mdp, 0))
    assert torch.allclose(table.sum(-1), torch.ones(200, dtype=torch.float64), rtol=1e-12)
    assert bool((table[mdp.valid[0]] >= LEAST_PROBABILITY * (1 - 1e-12)).all())
    assert bool((table[~mdp.valid[0]] == 0).all())
    assert float(table[mdp.valid[0]].min()) < 3 * LEAST_PROBABILITY
    assert float(table[100:].mean(0).min()) > 0.1  # no action is neglected


def test_epsilon_optimal_mixes_in_every_step():
    mdp = random_problem("dense")
    star = optimal_policy(plain(mdp))
    reference = plain(mdp).reference
    expected = tabulate(reference, lambda h, s, a: 0.75 * reference[h][s][a] + 0.25 * star[h][s][a])
    for h, table in enumerate(probabilities(epsilon_optimal(mdp, epsilon=0.25))):
        for row, wanted in zip(table.tolist(), expected[h], strict=True):
            assert row == pytest.approx(wanted, rel=1e-10)
    assert_law(law_of(epsilon_optimal(mdp, epsilon=0.0), mdp), law_of(reference_behaviour(mdp), mdp))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_holes_are_where_they_can_be_reached(share: float):
    """At least one valid action of a reachable state is omitted, never all of a state; ``share = 1`` is deterministic."""
    for seed in range(20):
        mdp = random_problem("deterministic", seed=seed)
        tables = probabilities(with_holes(mdp, seed, share=share))
        for table, valid in zip(tables, mdp.valid, strict=True):
            assert bool(((table > 0) <= valid).all())
            kept = (table > 0).sum(-1)
            assert bool((kept >= 1).all())
            if share == 1.0:
                assert bool((kept == 1).all())
        listed = enumerate_trajectories(mdp)
        missing = [t[listed.states[:, h], listed.actions[:, h]] == 0 for h, t in enumerate(tables)]
        assert bool(torch.stack(missing).any())
        if share == 0.0:
            assert sum(int((valid & (t == 0)).sum()) for valid, t in zip(mdp.valid, tables, strict=True)) == 1


def test_holes_are_never_only_in_a_state_that_cannot_be_reached():
    """The only state with a choice that can be reached is one of a hundred with a choice."""
    reference = torch.full((100, 2), 0.5, dtype=torch.float64)
    nowhere = torch.zeros(1, 1, dtype=torch.int64)
    mdp = RegularizedMDP(
        beta=1.0,
        initial=torch.ones(1),
        reward=[torch.zeros(1, 1), torch.zeros(100, 2)],
        reference=[torch.ones(1, 1), reference],
        transitions=[DeterministicTransition(nowhere, 100)],
    )
    for seed in range(5):
        tables = probabilities(with_holes(mdp, seed, share=0.0))
        assert sorted(tables[1][0].tolist()) == [0.0, 1.0]
        assert bool((tables[1][1:] == 0.5).all())


def test_replay_has_as_many_policies_as_asked_for():
    mdp = random_problem("dense")
    behaviour = replay(mdp, 0, count=3)
    assert [weight for weight, _ in behaviour.components] == [1 / 3] * 3
    first, second, third = (log_policy for _, log_policy in behaviour.components)
    assert not torch.equal(first[1], second[1])
    assert not torch.equal(second[1], third[1])


# -- X1 ------------------------------------------------------------------------------------------------------------


def test_x1_is_the_replay_of_deterministic_policies():
    """``½(0,0) + ½(1,1)`` on one state per layer: every pair has probability ½ and yet ``κ = ∞`` for ``π = (0,1)``."""
    mdp = one_state(2, 2)
    behaviour = replay_of_deterministic(mdp)
    law = law_of(behaviour, mdp)
    assert law == {((0, 0), (0, 0)): 0.5, ((0, 1), (0, 1)): 0.5}
    exact = {tau: Fraction(p) for tau, p in law.items()}
    assert kappa_by_sup({((0, 0), (0, 1)): Fraction(1)}, exact) == math.inf
    markov = dict.fromkeys(trajectory_law(plain(mdp), plain(mdp).reference), Fraction(1, 4))
    assert kappa_by_sup({((0, 0), (0, 1)): Fraction(1)}, markov) == 3


def test_the_order_of_deterministic_policies_can_be_drawn():
    """Still two trajectories that share no pair, as in X1, but not always the same ones."""
    mdp = one_state(3, 2)
    laws = [law_of(replay_of_deterministic(mdp, seed=seed), mdp) for seed in range(10)]
    assert len({tuple(law) for law in laws}) > 1
    for law in laws:
        first, second = law
        assert all(a != b for (_, a), (_, b) in zip(first, second, strict=True))
        assert set(law.values()) == {0.5}


@pytest.mark.parametrize("kind", ["deterministic", "sparse"])
def test_deterministic_policies_together_try_every_action(kind: str):
    """Each takes one valid action in every state; as many as a state has actions take all of them."""
    mdp = random_problem(kind)
    policies = [policy for _, policy in replay_of_deterministic(mdp, seed=0).components]
    assert len(policies) == max(int(valid.sum(-1).max()) for valid in mdp.valid)
    for h, valid in enumerate(mdp.valid):
        tables = torch.stack([policy[h].exp() for policy in policies])
        assert bool((tables.sum(-1) == 1).all())
        assert bool(((tables.amax(0) > 0) == valid).all())


def test_the_number_of_deterministic_policies_can_be_chosen():
    behaviour = replay_of_deterministic(one_state(2, 3), count=5)
    taken = [int(policy[0].argmax()) for _, policy in behaviour.components]
    assert taken == [0, 1, 2, 0, 1]


# -- what is refused -----------------------------------------------------------------------------------------------

MDP = short_answers()
BATCH = sample_trajectories(MDP, MDP.log_reference, 2, seeded(0))
POLICY = MDP.log_reference
MANY = RegularizedMDP(
    beta=torch.tensor([0.5, 1.0]),
    initial=MDP.initial,
    reward=MDP.reward,
    reference=MDP.reference,
    transitions=MDP.transitions,
)
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "no policies": (lambda: MixtureBehaviour((), ()), "weights: .* at least one, found 0"),
    "a weight too few": (lambda: MixtureBehaviour((1.0,), (POLICY, POLICY)), "weights: expected one for each of 2"),
    "weights of sum 0.9": (lambda: MixtureBehaviour((0.5, 0.4), (POLICY, POLICY)), "weights: .* sum to 1, found"),
    "a negative weight": (
        lambda: MixtureBehaviour((1.5, -0.5), (POLICY, POLICY)),
        r"weights\[1\]: expected a probability",
    ),
    "a weight that is no number": (
        lambda: MixtureBehaviour((math.nan,), (POLICY,)),
        r"weights\[0\]: expected a finite",
    ),
    "repeat above 1": (lambda: HistoryBehaviour(POLICY, 1.5), "repeat: expected a probability, found 1.5"),
    "repeat that is no number": (lambda: HistoryBehaviour(POLICY, math.nan), "repeat: expected a probability"),
    "strength 0": (lambda: anti_optimal(MDP, strength=0.0), "strength: expected more than 0"),
    "strength that underflows": (lambda: anti_optimal(MDP, strength=1000.0), "strength: .* at most 500"),
    "epsilon above 1": (lambda: epsilon_optimal(MDP, epsilon=2.0), "epsilon: expected a probability"),
    "share below 0": (lambda: with_holes(MDP, 0, share=-0.1), "share: expected a probability"),
    "holes in many problems": (lambda: with_holes(MANY, 0), "mdp: expected one problem, found a batch"),
    "no policies to replay": (lambda: replay(MDP, 0, count=0), "count: expected at least 1 policy"),
    "no deterministic policies": (lambda: replay_of_deterministic(MDP, count=0), "count: expected at least 1 policy"),
    "nothing to omit": (lambda: with_holes(one_state(3, 1), 0), "mdp: expected a state that can be reached"),
    "a layer too few": (lambda: MarkovBehaviour(POLICY[:2]).sample(MDP, 1, seeded(0)), "log_policy: expected 3 layers"),
    "the law of a layer too few": (lambda: law_of(MarkovBehaviour(POLICY[:2]), MDP), "log_policy: expected 3 layers"),
    "a component of a layer too few": (
        lambda: MixtureBehaviour((0.5, 0.5), (POLICY, POLICY[:2])).sample(MDP, 1, seeded(0)),
        r"log_policies\[1\]: expected 3 layers",
    ),
    "the law of such a component": (
        lambda: law_of(MixtureBehaviour((0.5, 0.5), (POLICY, POLICY[:2])), MDP),
        r"log_policies\[1\]: expected 3 layers",
    ),
    "history of a layer too few": (lambda: law_of(HistoryBehaviour(POLICY[:2], 0.5), MDP), "log_policy: expected 3"),
    "no draws of a mixture": (lambda: MixtureBehaviour((1.0,), (POLICY,)).sample(MDP, 0, seeded(0)), "count: expected"),
    "no draws with history": (lambda: HistoryBehaviour(POLICY, 0.5).sample(MDP, 0, seeded(0)), "count: expected"),
    "no draws of data": (lambda: FixedDataset(BATCH).sample(MDP, 0, seeded(0)), "count: expected at least 1"),
    "data of another horizon": (
        lambda: FixedDataset(BATCH).draw(short_answers(horizon=4), 1, seeded(0)),
        "expected 4 steps",
    ),
    "returns that do not fit": (
        lambda: FixedDataset(BATCH, torch.zeros(3)),
        r"trajectory_return: expected shape \(2,\)",
    ),
    "data with batch dimensions": (
        lambda: FixedDataset(sample_trajectories(MDP, random_policy(MDP, 0, 2), 2, seeded(0))),
        "trajectories: expected shape",
    ),
}


@pytest.mark.parametrize(("call", "expected"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_named(call: Callable[[], object], expected: str):
    with pytest.raises(InvalidInputError, match=expected):
        call()


def test_data_that_the_problem_cannot_produce_have_no_law():
    listed: Enumeration = enumerate_trajectories(MDP)
    wrong = TrajectoryBatch(
        torch.full((1, 3), 7), torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool)
    )
    with pytest.raises(InvalidInputError, match=r"trajectories\[0\]\.states\[0\]"):
        FixedDataset(wrong).log_law(MDP, listed)


def test_repeating_may_lead_to_states_that_the_policy_never_sees() -> None:
    """There a non-existent action is as impossible as anywhere: half of these trajectories would have taken one."""
    half = torch.full((1, 2), 0.5, dtype=torch.float64)
    mdp = RegularizedMDP(
        beta=1.0,
        initial=torch.ones(1),
        reward=[torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(2, 2)],
        reference=[half, half, torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)],
        transitions=[
            DeterministicTransition(torch.tensor([[0, 0]]), 1),
            DeterministicTransition(torch.tensor([[0, 1]]), 2),
        ],
    )
    always_0 = torch.tensor([[0.0, -math.inf]], dtype=torch.float64)
    policy = (half.log(), always_0, half.log().expand(2, 2))
    assert HistoryBehaviour(policy, 0.0).sample(mdp, 20, torch.Generator().manual_seed(0)).count == 20
    with pytest.raises(InvalidInputError, match=r"^log_policy\[2\]\[1\]\[1\]: expected -inf, since this action"):
        HistoryBehaviour(policy, 0.5).sample(mdp, 20, torch.Generator().manual_seed(0))
