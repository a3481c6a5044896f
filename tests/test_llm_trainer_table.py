"""The trainer runs the very losses that the toy problems check: a transformer whose logits are a table's gives the table's numbers."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

import tbrm_theory as tt
from tbrm_theory.errors import InvalidInputError
from tbrm_theory.losses import LOSSES, RESIDUALS
from tbrm_theory.scores import table_scores
from tbrm_theory.trajectories import TrajectoryBatch
from tests import reference as rf
from tests.convert import plain
from tests.tiny_language_models import Watched, language_model_test, own_randomness, trainer  # noqa: F401

pytestmark = language_model_test

HORIZON, ACTIONS, FIRST_WORD = 3, 3, 3


class TableModel(PreTrainedModel, GenerationMixin):
    """A causal language model by table: the logits after a prefix of action tokens are that state's row of a token tree."""

    config_class = PreTrainedConfig
    _supports_sdpa = True

    def __init__(self, tables: list[Tensor]) -> None:
        super().__init__(PreTrainedConfig.from_dict({"vocab_size": 12, "pad_token_id": 0, "eos_token_id": 1}))
        self.tables = torch.nn.ParameterList(table.clone() for table in tables)
        self.post_init()

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, input_ids: Any = None, attention_mask: Any = None, logits_to_keep: int = 0, **unused: Any) -> Any:
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            state, seen, positions = 0, -1, []
            for token, present in zip(ids.tolist(), mask.tolist(), strict=True):
                seen += present
                if seen > 0 and present:
                    state = state * ACTIONS + token - FIRST_WORD
                logits = torch.full((12,), -torch.inf, dtype=torch.float64)
                here = slice(FIRST_WORD, FIRST_WORD + ACTIONS)
                known = 0 <= seen < HORIZON
                logits = (
                    torch.cat([logits[: here.start], self.tables[seen][state], logits[here.stop :]])
                    if known
                    else logits
                )
                positions.append(logits if known else torch.zeros(12, dtype=torch.float64))
            rows.append(torch.stack(positions)[-logits_to_keep:])
        return CausalLMOutput(logits=torch.stack(rows))


@pytest.fixture(scope="module")
def problem() -> tuple[tt.RegularizedMDP, list[Tensor]]:
    mdp = tt.make("token-tree", seed=3, horizon=HORIZON, vocabulary=ACTIONS, beta=0.5, reference="dirichlet")
    generator = torch.Generator().manual_seed(5)
    shapes = [table.shape for table in mdp.reward]
    return mdp, [2 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def all_rows(mdp: tt.RegularizedMDP) -> tuple[dict[str, Tensor], list[rf.Trajectory]]:
    """Every response of the tree as a row, with the table's reference and returns; prompts padded on the left."""
    problem = plain(mdp)
    trajectories = list(rf.trajectories(problem))
    actions = torch.tensor([[a for _, a in trajectory] for trajectory in trajectories])
    log_reference = [[math.log(problem.reference[h][s][a]) for h, (s, a) in enumerate(t)] for t in trajectories]
    returns = [rf.table_sum(problem.reward, t) for t in trajectories]
    number = len(trajectories)
    return {
        "prompt_ids": torch.tensor([[0, 7]]).expand(number, 2),
        "prompt_mask": torch.tensor([[0, 1]]).expand(number, 2),
        "completion_ids": actions + FIRST_WORD,
        "completion_mask": torch.ones_like(actions),
        "log_reference": torch.tensor(log_reference, dtype=torch.float64),
        "reference_initial_value": torch.full((number,), 0.3, dtype=torch.float64),
        "trajectory_return": torch.tensor(returns, dtype=torch.float64),
        "reference_version": torch.zeros(number, dtype=torch.int64),
        "sampled_at": torch.zeros(number, dtype=torch.int64),
    }, trajectories


def naive_residual(name: str, mdp: rf.PlainMDP, logits: rf.Table, trajectory: rf.Trajectory) -> list[float]:
    """The residuals that the loss squares and adds, by the definitions of theory.md §5."""
    if name == "brm":
        return rf.step_residuals(mdp, logits, trajectory)
    # The iterative variant differs in the gradient only, while the frozen value is the current one.
    return [rf.residual(mdp, logits, trajectory) - (0.3 if name == "reval" else 0.0)]


@pytest.mark.parametrize("name", ["tbrm", "tbrm-first-logit", "reval", "brm", "tbrm-iterative"])
def test_a_transformer_that_is_a_table_has_the_tables_residual_and_gradient(
    name: str, problem: tuple[tt.RegularizedMDP, list[Tensor]], tmp_path: Path
) -> None:
    mdp, tables = problem
    model = TableModel(tables)
    run = trainer(tmp_path, model, kind=Watched, loss=name)
    assert isinstance(run, Watched)
    inputs, trajectories = all_rows(mdp)
    loss = run._compute_loss(run.model, inputs)
    loss.backward()

    plain_mdp, plain_logits = plain(mdp), [table.tolist() for table in tables]
    naive = [naive_residual(name, plain_mdp, plain_logits, trajectory) for trajectory in trajectories]
    residual = RESIDUALS[name](run.scores[0], beta=0.5).detach().flatten()
    assert residual.abs().min() > 1e-3
    torch.testing.assert_close(residual, torch.tensor(naive, dtype=torch.float64).flatten(), rtol=0, atol=1e-12)

    # The gradient by the table's own route: the toy problems' scores of the same trajectories under the same loss.
    leaves = tuple(table.clone().requires_grad_() for table in tables)
    states = torch.tensor([[s for s, _ in trajectory] for trajectory in trajectories])
    actions = inputs["completion_ids"] - FIRST_WORD
    batch = TrajectoryBatch(states=states, actions=actions, mask=torch.ones_like(actions, dtype=torch.bool))
    scores = table_scores(leaves, mdp.log_reference, mdp.reward, batch)
    scores = dataclasses.replace(
        scores,
        reference_initial_value=inputs["reference_initial_value"],
        frozen_initial_value=scores.initial_value.detach(),
    )
    LOSSES[name].function(scores, beta=0.5).backward()
    for mine, table in zip(model.tables, leaves, strict=True):
        assert table.grad is not None
        assert mine.grad is not None
        assert table.grad.abs().max() > 1e-3
        torch.testing.assert_close(mine.grad, table.grad, rtol=0, atol=1e-12)


def test_the_trainers_loss_is_the_value_that_the_losses_return(
    problem: tuple[tt.RegularizedMDP, list[Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, _ = all_rows(problem[0])
    run = trainer(tmp_path, TableModel(problem[1]), kind=Watched, loss="tbrm")
    before = run._compute_loss(run.model, inputs)
    own = LOSSES["tbrm"]

    def changed(scores: Any, **options: Any) -> Tensor:
        return own.function(scores, **options) + 1.0

    monkeypatch.setitem(LOSSES, "tbrm", dataclasses.replace(own, function=changed))
    torch.testing.assert_close(run._compute_loss(run.model, inputs), before + 1.0, rtol=0, atol=1e-12)


def test_a_loss_whose_scores_this_trainer_does_not_have_is_refused(tmp_path: Path) -> None:
    for name, missing in (("ppo", "critic"), ("trajectory-balance", "log_partition")):
        with pytest.raises(InvalidInputError, match=missing):
            trainer(tmp_path, loss=name)
