"""PPO on this project's trainer: per-token advantages from a critic, a model of its own ([Y] App. G; TRL 1.16 has no PPO).

The critic is the policy's own network without its head, as it was before training, and a linear map to one number that starts
at 0. Its output is a value in reward units, so that it need not grow with 1/β; the loss gets it in units of β.

It has its own learning rate and is not part of the policy's gradient clipping. Under FSDP 2 it is sharded as the policy is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import PreTrainedModel, TrainerCallback

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.llm.language_scores import position_ids
from tbrm_theory.llm.model_copies import base_model, frozen_copy, without_dropout
from tbrm_theory.llm.trainer import TBRMTrainer

__all__ = ["Critic", "PPOTrainer"]

_WEIGHTS = "critic.safetensors"


class Critic(torch.nn.Module):
    """``V_φ(s_h)`` before every completion token, ``(B, C)``, in reward units; 0 until trained."""

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        copied = frozen_copy(policy).requires_grad_(True)
        if copied.base_model is copied:
            raise InvalidInputError("model", "expected a language model with a network below its head, for the critic")
        self.network = without_dropout(copied.base_model.train())
        # What FSDP gathers at a time, where the launch file names no layer.
        self._no_split_modules = policy._no_split_modules
        width = policy.get_output_embeddings().weight.shape[1]
        self.head = torch.nn.Linear(width, 1, dtype=policy.dtype, device=policy.device)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, ids: Tensor, attention_mask: Tensor, steps: int, **positions: Tensor) -> Tensor:
        hidden = self.network(input_ids=ids, attention_mask=attention_mask, use_cache=False, **positions)[0]
        values: Tensor = self.head(hidden[:, -steps - 1 : -1]).squeeze(-1)
        return values if values.dtype == torch.float64 else values.float()


class PPOTrainer(TBRMTrainer):
    """PPO with the loss ``ppo`` of :mod:`tbrm_theory.losses`: clipped ratio, GAE, KL penalty in the reward, entropy bonus."""

    _tag_names = ["trl", "ppo"]  # noqa: RUF012
    _name = "PPO"

    provides: ClassVar[frozenset[str]] = TBRMTrainer.provides | {"critic"}

    def __init__(
        self,
        *args: Any,
        critic_learning_rate: float = 1e-5,
        gae_lambda: float = 1.0,
        entropy_coefficient: float = 0.001,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.is_deepspeed_enabled or (self.is_fsdp_enabled and not self.accelerator.is_fsdp2):
            kind = "deepspeed" if self.is_deepspeed_enabled else "fsdp_version 1"
            raise InvalidInputError(
                kind, "trains one model, and PPO has two, policy and critic: launch it under FSDP 2 or DDP"
            )
        if not critic_learning_rate > 0:
            raise InvalidInputError("critic_learning_rate", f"expected a positive number, found {critic_learning_rate}")
        self._critic_learning_rate = critic_learning_rate
        self._options = {"gae_lambda": gae_lambda, "entropy_coefficient": entropy_coefficient}
        critic: Any = Critic(base_model(self.model))
        if self.args.activation_checkpointing:  # in the policy transformers does it, when training begins
            critic.network.activation_checkpointing_enable(self.args.activation_checkpointing_kwargs)
        if self.accelerator.is_fsdp2:  # for which accelerate's `prepare` takes no second model
            self.critic: Any = fsdp2_prepare_model(self.accelerator, critic)
        else:
            self.critic = self.accelerator.prepare_model(critic)
        self._values: Tensor | None = None
        self._values_given: Tensor | None = None
        self.add_callback(_ClearGradients(self.critic))

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Where the optimiser is prepared already: for FSDP 2 it had to hold the parameters of one model until then."""
        assert self.optimizer is not None
        own = list(self.critic.parameters())
        if all(parameter is not own[0] for group in self.optimizer.param_groups for parameter in group["params"]):
            group = {"params": own, "lr": self._critic_learning_rate, "weight_decay": 0.0}
            self.optimizer.add_param_group(group)
        return super().create_scheduler(*args, **kwargs)

    def _loss_options(self) -> dict[str, Any]:
        return self._options

    def _further_scores(self, model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The critic's values as a leaf, so that the seconds of its backward pass are its own."""
        ids, mask = (torch.cat([inputs[f"prompt_{kind}"], inputs[f"completion_{kind}"]], 1) for kind in ("ids", "mask"))
        positions = {"position_ids": position_ids(mask)} if self._takes_position_ids else {}
        with self.timer.part("critic"), self.accelerator.autocast():
            self._values = self.critic(ids, mask, inputs["completion_ids"].shape[1], **positions)
        self._values_given = self._values.detach().requires_grad_(self.model.training)
        return {"critic": self._values_given / self.beta}

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        assert self._values is not None
        assert self._values_given is not None
        with self.timer.part("critic"):
            self._values.backward(self._values_given.grad)
        return loss

    def _save_further(self, folder: Path) -> None:
        weights = self.accelerator.get_state_dict(self.critic)
        if self.accelerator.is_main_process:
            save_file({name: table.contiguous().clone() for name, table in weights.items()}, folder / _WEIGHTS)

    @contextmanager
    def _critic_in_model(self) -> Iterator[None]:
        """FSDP saves and loads an optimiser's state by the names that its parameters have in one model."""
        self.model.critic = _Unsaved([self.critic])
        try:
            yield
        finally:
            del self.model.critic

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._critic_in_model():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        with self._critic_in_model():
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            critic = self.accelerator.unwrap_model(self.critic)
            weights: dict[str, Any] = load_file(Path(checkpoint) / _WEIGHTS)
            set_model_state_dict(critic, weights, options=StateDictOptions(full_state_dict=True))


class _Unsaved(torch.nn.ModuleList):
    """Modules whose parameters have names in the model that they are put in, and no place in its weights."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return kwargs["destination"]


class _ClearGradients(TrainerCallback):
    """The engine clears the gradients of the policy alone."""

    def __init__(self, critic: torch.nn.Module) -> None:
        self.critic = critic

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.critic.zero_grad()
