"""PPO on the trainer: the critic's values stand where they should, its gradient is the loss's, and it resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.llm import trainer as trainer_module
from tbrm_theory.llm.critic import Critic, PPOTrainer
from tbrm_theory.llm.trainer import TBRMTrainer
from tbrm_theory.llm.trainer_state import last_checkpoint
from tbrm_theory.losses import TrajectoryScores, ppo_loss
from tests.tiny_language_models import (
    completions_of,
    language_model,
    language_model_test,
    own_randomness,  # noqa: F401
    trainer,
)

pytestmark = language_model_test

OPTIONS = {"critic_learning_rate": 0.03, "gae_lambda": 0.9, "entropy_coefficient": 0.01}


class WatchedPPO(PPOTrainer):
    """Keeps each micro-batch, its scores, and what the critic's gradient was before the optimizer used it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.rows: list[dict[str, Tensor]] = []
        self.seen: list[TrajectoryScores] = []
        self.gradients: list[list[Tensor]] = []
        super().__init__(*args, **kwargs)

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        self.rows.append(inputs)
        before = len(self.seen)
        loss = super()._compute_loss(model, inputs)
        del self.seen[before + 1 :]  # what diagnostics asked for
        return loss

    def _loss(self, scores: TrajectoryScores) -> Tensor:
        self.seen.append(scores)
        return super()._loss(scores)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.gradients.append([parameter.grad.clone() for parameter in self.critic.parameters()])
        return loss


def ppo(folder: Path, model: Any = None, **options: Any) -> Any:
    return trainer(
        folder, model, kind=WatchedPPO, trainer_options=OPTIONS, loss="ppo", **{"logging_steps": 1} | options
    )


def trained_head(critic: Critic, *, seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        critic.head.weight.copy_(torch.randn(critic.head.weight.shape, generator=generator))
        critic.head.bias.fill_(0.5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_values_are_read_before_each_token_whatever_the_padding(architecture: str, tmp_path: Path) -> None:
    run = ppo(tmp_path, language_model(architecture))
    trained_head(run.critic)
    run.train()
    fresh = ppo(tmp_path, language_model(architecture))
    fresh.current_gradient_accumulation_steps = 1  # the training loop sets it
    trained_head(fresh.critic)
    fresh._compute_loss(fresh.model, run.rows[0])
    network, head = fresh.critic.network, fresh.critic.head
    for i, (prompt, completion) in enumerate(completions_of(run.rows[0])):
        with torch.no_grad():
            hidden = network(input_ids=torch.tensor([prompt + completion]))[0][0]
        expected = [float(head(hidden[len(prompt) - 1 + h])) / fresh.beta for h in range(len(completion))]
        assert fresh.seen[0].critic[i, : len(completion)].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_untrained_critic_says_zero_and_does_not_share_the_policys_weights(tmp_path: Path) -> None:
    run = ppo(tmp_path)
    before = [parameter.clone() for parameter in run.ref_model.parameters()]
    run.train()
    assert not run.seen[0].critic.any()
    own = {id(parameter) for parameter in run.critic.parameters()}
    assert not own & {id(parameter) for parameter in run.model.parameters()}
    assert all(torch.equal(x, y) for x, y in zip(before, run.ref_model.parameters(), strict=True))
    assert any(bool(parameter.any()) for parameter in run.critic.head.parameters())  # it learned


@pytest.mark.parametrize("size", [8, 4])
def test_the_critics_gradient_is_that_of_the_loss_over_all_micro_batches(size: int, tmp_path: Path) -> None:
    """The values are a leaf of the loss: their gradient is carried on, summed over micro-batches and cleared after the step."""
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
    run = ppo(tmp_path, max_steps=2, **options)
    start = {name: table.clone() for name, table in run.critic.state_dict().items()}
    run.train()
    critic = Critic(language_model())
    critic.load_state_dict(start)
    total = torch.zeros(())
    count = 8 // size
    for inputs, scores in zip(run.rows[:count], run.seen[:count], strict=True):
        ids, mask = (torch.cat([inputs[f"prompt_{kind}"], inputs[f"completion_{kind}"]], 1) for kind in ("ids", "mask"))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        values = critic(ids, mask, inputs["completion_ids"].shape[1], position_ids=positions) / run.beta
        fields = {name: table.detach() for name, table in scores.given().items()} | {"critic": values}
        loss = ppo_loss(TrajectoryScores(**fields), beta=run.beta, gae_lambda=0.9, entropy_coefficient=0.01)
        total = total + loss / count
    expected = torch.autograd.grad(total, list(critic.parameters()))
    for found, wanted in zip(run.gradients[count - 1], expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    # The second update's gradient holds nothing of the first: with the values' leaves it would be of both.
    assert all(parameter.grad is None for parameter in run.critic.parameters())


def test_the_critic_has_a_learning_rate_of_its_own(tmp_path: Path) -> None:
    run = ppo(tmp_path)
    run.train()
    rates = {id(p): group["initial_lr"] for group in run.optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in run.critic.parameters()} == {0.03}
    assert {rates[id(p)] for p in run.model.parameters()} == {0.01}


def test_the_critic_learns_a_constant_return(tmp_path: Path) -> None:
    def always(completions: list[str], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    run = ppo(tmp_path, reward=always, max_steps=60, beta=0.01, learning_rate=1e-6)
    run.train()
    first, last = (scores.critic[scores.mask].mean().item() * run.beta for scores in (run.seen[0], run.seen[-1]))
    assert first == 0
    assert last == pytest.approx(1.0, abs=0.15)


def test_a_resumed_run_ends_at_the_same_critic(tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = ppo(tmp_path / "whole", **options)
    whole.train()
    resumed = ppo(tmp_path / "whole", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for x, y in zip(whole.critic.parameters(), resumed.critic.parameters(), strict=True):
        assert torch.equal(x, y)


def test_a_checkpoint_has_the_critic_before_the_state_that_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer_module, "save_state", killed)
    with pytest.raises(KeyboardInterrupt):
        ppo(tmp_path, save_strategy="steps", save_steps=1).train()
    assert (tmp_path / "checkpoint-1" / "critic.safetensors").exists()
    assert (tmp_path / "checkpoint-1" / "trainer_state.json").exists()
    assert last_checkpoint(tmp_path, before=9) is None


@pytest.mark.parametrize("asked", [False, True])
def test_the_critic_recomputes_its_activations_if_the_settings_say_so(asked: bool, tmp_path: Path) -> None:
    run = ppo(tmp_path, activation_checkpointing=asked)
    assert run.critic.network.is_activation_checkpointing == asked
    run.train()
    assert any(bool(parameter.any()) for parameter in run.critic.head.parameters())


@pytest.mark.parametrize(("kind", "named"), [("fsdp", "fsdp_version 1"), ("deepspeed", "deepspeed")])
def test_engines_that_train_one_model_are_refused(
    kind: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = TBRMTrainer.__init__

    def sharded(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        setattr(self, f"is_{kind}_enabled", True)

    monkeypatch.setattr(TBRMTrainer, "__init__", sharded)
    with pytest.raises(InvalidInputError, match=f"^{named}: trains one model.*FSDP 2"):
        ppo(tmp_path)


def test_a_loss_with_a_critic_is_refused_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="ppo reads critic"):
        trainer(tmp_path, loss="ppo")


def test_a_learning_rate_of_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="critic_learning_rate"):
        trainer(tmp_path, kind=PPOTrainer, trainer_options={"critic_learning_rate": 0.0}, loss="ppo")
