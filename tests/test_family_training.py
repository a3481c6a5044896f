"""Training every loss of the family: against a plain loop, one setting at a time, and against the known fixed points."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from test_laid_out import as_batch
from torch import Tensor

from tbrm_theory.dynamic_programming import regret
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.families import make
from tbrm_theory.family_training import Curves, Plan, Point, train, trained_besides
from tbrm_theory.laid_out import LaidOut, Rollouts, lay_out
from tbrm_theory.losses import LOSSES
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.scores import table_scores
from tbrm_theory.trajectories import TrajectoryBatch, trajectory_return

FLOATS = ("learning_rate", "companion_rate", "temperature", "scale", "epsilon")


def ends(curves: Curves) -> Tensor:
    """The final regret as a share of the initial one, ``(points, seeds)``."""
    return curves.regret[..., -1] / curves.regret[..., 0]


# -- against a plain loop ------------------------------------------------------------------------------------------


def plain_training(mdp: RegularizedMDP, loss: str, point: Point, seed: int, plan: Plan) -> list[float]:
    """One setting, one seed: a table for each layer, torch's own Adam, the scores of ``table_scores``; only rollouts are shared."""
    problem, generator = lay_out(mdp), torch.Generator().manual_seed(seed)
    logits = [table.clone().requires_grad_() for table in mdp.log_reference]
    first_states = mdp.reference[0].shape[0]
    log_partition, baseline = torch.zeros(2, first_states, dtype=torch.float64).unbind()
    critic = [torch.zeros(table.shape[0], dtype=torch.float64).requires_grad_() for table in mdp.reference]
    if loss == "a-star-po":
        baseline = plain_reference_values(mdp, seed, point.reference_rollouts)
    besides = [log_partition.requires_grad_(), *critic]
    if loss != "a-star-po":
        besides.append(baseline.requires_grad_())
    groups = [
        {"params": logits, "lr": point.learning_rate},
        {"params": besides, "lr": point.learning_rate * point.companion_rate},
    ]
    adam = torch.optim.Adam(groups)
    regrets = []
    for update in range(plan.updates + 1):
        policy = tuple(torch.log_softmax(table, dim=-1).detach() for table in logits)
        regrets.append(float(regret(mdp, policy)))
        if update % point.refresh == 0:
            frozen = tuple(table.detach().clone() for table in logits)
        drawn = torch.rand(plan.prompts, generator=generator, dtype=torch.float64)
        first = problem.first_states(drawn).repeat_interleave(plan.group_size)
        shape = (plan.prompts * plan.group_size, mdp.horizon, problem.draws)
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        cells = torch.cat(
            [
                torch.nn.functional.pad(t[s], (0, problem.log_reference.shape[-1] - t.shape[-1]), value=-torch.inf)
                for t, s in zip(policy, problem.states, strict=True)
            ]
        )
        batch = as_batch(problem, problem.roll_out(cells, first, uniform))
        scores = table_scores(
            tuple(logits),
            mdp.log_reference,
            mdp.reward,
            batch,
            reference_first_logits=mdp.log_reference[0],
            frozen_logits=frozen,
            behaviour_log_policy=policy,
            log_partition=log_partition,
            baseline=baseline,
            critic=tuple(critic),
            entropy=True,
        )
        group = {"group_size": plan.group_size} if LOSSES[loss].needs_group else {}
        adam.zero_grad()
        LOSSES[loss].function(scores, beta=mdp.beta * point.temperature, **group).backward()
        adam.step()
    return regrets


def plain_reference_values(mdp: RegularizedMDP, seed: int, count: int) -> Tensor:
    """``log mean exp(r/β)``, state by state."""
    problem = lay_out(mdp)
    states = len(problem.initial)
    generator = torch.Generator().manual_seed(seed + 2**31)
    shape = (count, states, mdp.horizon, problem.draws)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    value = torch.zeros(mdp.reference[0].shape[0], dtype=torch.float64)
    for i in range(states):
        first = torch.full((count,), i)
        batch: TrajectoryBatch = as_batch(problem, problem.roll_out(problem.log_reference, first, uniform[:, i]))
        scaled = trajectory_return(mdp, batch) / mdp.beta
        value[problem.states[0][i]] = math.log(sum(math.exp(float(x)) for x in scaled) / count)
    return value


@pytest.mark.parametrize("loss", LOSSES)
def test_training_is_the_plain_loop(loss: str) -> None:
    mdp = make("modular-arithmetic", modulus=3, prompts=2)
    plan = Plan(updates=6, prompts=3, group_size=2, evaluations=6)
    point = Point(0.1, companion_rate=3.0, refresh=2, reference_rollouts=5, temperature=0.7)
    found = train(mdp, loss, [point], [7], plan).regret[0, 0]
    expected = plain_training(mdp, loss, point, 7, plan)
    assert max(expected) > 1.001 * min(expected)  # something was learned
    torch.testing.assert_close(found.tolist(), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("loss", ["tbrm", "ppo", "vargrad"])
def test_training_is_the_plain_loop_where_transitions_are_random(loss: str) -> None:
    mdp, plan = make("garnet", horizon=3, states=3), Plan(updates=5, prompts=4, group_size=2, evaluations=5)
    found = train(mdp, loss, [Point(0.1)], [1], plan).regret[0, 0]
    torch.testing.assert_close(found.tolist(), plain_training(mdp, loss, Point(0.1), 1, plan), rtol=1e-9, atol=0)


# -- a batch of settings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["tbrm", "sql-one-step", "trajectory-balance", "a-star-po", "grpo", "ppo"])
def test_points_and_seeds_do_not_see_each_other(loss: str) -> None:
    mdp, plan = make("deterministic-dag", horizon=3), Plan(updates=8, prompts=4, group_size=2, evaluations=4)
    points = [
        Point(0.02, companion_rate=1.0, refresh=1, reference_rollouts=3, temperature=1.0),
        Point(0.2, companion_rate=5.0, refresh=3, reference_rollouts=8, temperature=0.5),
    ]
    together = train(mdp, loss, points, [3, 4, 5], plan)
    assert together.regret.shape == (2, 3, 5)
    assert len({round(x, 9) for x in together.regret[..., -1].flatten().tolist()}) == 6
    for i, point in enumerate(points):
        for j, seed in enumerate([3, 4, 5]):
            alone = train(mdp, loss, [point], [seed], plan)
            torch.testing.assert_close(alone.regret[0, 0], together.regret[i, j], rtol=1e-9, atol=0)
            assert torch.equal(alone.samples[0], together.samples[i])


def test_samples_are_all_that_was_drawn() -> None:
    mdp = make("combination-lock")  # one of its two first states occurs
    plan = Plan(updates=4, prompts=3, group_size=2, evaluations=2)
    assert train(mdp, "tbrm", [Point(0.1)], [0], plan).samples.tolist() == [[0, 12, 24]]
    offline = train(mdp, "a-star-po", [Point(0.1, reference_rollouts=n) for n in (4, 10)], [0], plan)
    assert offline.samples.tolist() == [[4, 16, 28], [10, 22, 34]]
    prompts = train(make("modular-arithmetic"), "a-star-po", [Point(0.1, reference_rollouts=4)], [0], plan)
    assert prompts.samples[0, 0] == 4 * 4


def test_rollouts_of_the_reference_are_not_drawn_with_the_numbers_that_training_draws_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[Tensor] = []
    original = LaidOut.roll_out

    def noted(self: LaidOut, log_policy: Tensor, first: Tensor, uniform: Tensor) -> Rollouts:
        drawn.append(uniform)
        return original(self, log_policy, first, uniform)

    monkeypatch.setattr(LaidOut, "roll_out", noted)
    plan = Plan(updates=3, prompts=4)
    train(make("modular-arithmetic"), "a-star-po", [Point(0.1)], range(5), plan)
    of_reference, of_training = (torch.cat([x.flatten() for x in part]) for part in (drawn[:5], drawn[5:]))
    assert len(of_training) >= 5 * 3 * 4
    assert not bool(torch.isin(of_reference, of_training).any())


def test_everything_starts_at_the_reference_with_value_zero() -> None:
    mdp = make("modular-arithmetic", reference="dirichlet")
    curves = train(mdp, "tbrm", [Point(0.1)], [0, 1], Plan(updates=1, prompts=2))
    torch.testing.assert_close(curves.regret[0, :, 0], regret(mdp, mdp.log_reference).expand(2))


# -- where each method ends -------------------------------------------------------------------------------------------

ONE_METHOD: list[dict[str, float]] = [
    dict.fromkeys(("tbrm", "tbrm-first-logit", "reval", "brm", "sql-one-step-q", "sql-multi-step-q"), 1.0),
    dict.fromkeys(("tbrm-iterative", "sql-one-step", "sql-multi-step"), 1.0),
    dict.fromkeys(("trajectory-balance", "dro", "pcl-one-step", "pcl-multi-step"), 1.0),
    {"vargrad": 1.0, "pairwise": 0.5, "rloo": 2 / 0.2},
]
"""Losses that are one at a horizon of 1, each with the factor that makes its gradient that of the first."""


def bandit() -> RegularizedMDP:
    return make("one-state", horizon=1, actions=4, beta=0.2)


@pytest.mark.parametrize("losses", ONE_METHOD, ids=lambda losses: next(iter(losses)))
def test_losses_that_are_one_on_a_bandit_train_alike(losses: dict[str, float]) -> None:
    curves = [
        train(bandit(), loss, [Point(0.03)], [0, 1], Plan(10, 8, group_size=4, evaluations=10, scale=scale)).regret
        for loss, scale in losses.items()
    ]
    assert bool((curves[0][..., -1] / curves[0][..., 0] - 1).abs().min() > 1e-3)  # something moved
    for other in curves[1:]:
        torch.testing.assert_close(other, curves[0], rtol=1e-9, atol=0)


ENDS = {
    "tbrm": (0.0, 2e-3),
    "trajectory-balance": (0.0, 2e-4),
    "vargrad": (0.0, 1e-5),
    "a-star-po": (0.0, 1e-5),
    "dpo": (0.0, 1e-5),
    "ppo": (0.0, 1e-3),
    "tbrm-iterative": (1e-4, 0.1),
    "reinforce": (1e-4, 0.1),
    "kimi": (0.02, 0.1),
    "dr-grpo": (0.04, 0.2),
    "grpo": (0.5, 1.2),
    "dapo": (1.2, 2.0),
}
"""Where the median of five seeds ends, as a share of the initial regret. Squared residuals vanish at the optimum, and with them the
noise of their gradients. Without a baseline that is right, noise is all that is left there (iterative TBRM's frozen V is only a
baseline). The last four have their fixed points elsewhere: a value from four rollouts of the current policy, the other KL
divergence, rewards divided by their spread, no penalty at all."""


def test_every_loss_has_a_known_end() -> None:
    assert sorted({*ENDS, *(loss for losses in ONE_METHOD for loss in losses)}) == sorted(LOSSES)


@pytest.mark.parametrize("loss", ENDS)
def test_where_a_loss_ends_on_a_bandit(loss: str) -> None:
    point, plan = Point(0.05, reference_rollouts=5000), Plan(150, 16, group_size=4, evaluations=1)
    low, high = ENDS[loss]
    assert low < float(ends(train(bandit(), loss, [point], range(5), plan)).median()) < high


# -- settings ---------------------------------------------------------------------------------------------------------


def test_what_is_trained_besides_the_policy() -> None:
    trained = {loss: trained_besides(loss) for loss in LOSSES if trained_besides(loss)}
    assert trained == {
        "pcl-one-step": ("critic",),
        "pcl-multi-step": ("critic",),
        "trajectory-balance": ("log_partition",),
        "dro": ("baseline",),
        "ppo": ("critic",),
    }


@pytest.mark.parametrize(
    ("loss", "points", "seeds", "field"),
    [
        ("nothing", [Point(0.1)], [0], "loss"),
        ("vargrad", [Point(0.1)], [0], "group_size"),
        ("tbrm", [], [0], "points"),
        ("tbrm", [Point(0.1)], [], "seeds"),
        ("tbrm", [Point(0.1)], [-1], "seeds"),
        ("a-star-po", [Point(0.1)], [0, 2**31], "seeds"),  # those of the reference's rollouts of 0
    ],
)
def test_settings_that_make_no_sense_are_refused(
    loss: str, points: Sequence[Point], seeds: Sequence[int], field: str
) -> None:
    with pytest.raises(InvalidInputError, match=field):
        train(make("combination-lock"), loss, points, seeds, Plan(updates=1))


@pytest.mark.parametrize("name", ["learning_rate", "companion_rate", "temperature", "refresh", "reference_rollouts"])
def test_points_are_positive(name: str) -> None:
    with pytest.raises(InvalidInputError, match=name):
        Point(**({"learning_rate": 0.1} | {name: 0.0 if name in FLOATS else 0}))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["updates", "prompts", "group_size", "evaluations", "scale", "epsilon"])
def test_plans_are_positive(name: str) -> None:
    with pytest.raises(InvalidInputError, match=name):
        Plan(**{name: 0.0 if name in FLOATS else 0})  # type: ignore[arg-type]
