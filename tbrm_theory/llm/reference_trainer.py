"""A ``GRPOTrainer`` that owns its reference model and computes its own log-probabilities, at temperature 1.

The reference is the weights as given. A model handed over as a name or path is loaded twice by TRL; one handed over as an
instance is copied before anything touches it, and refused under ZeRO-3, where the copy would have no weights; an adapter's
reference is its base model, or a copy of the adapter that came with it (both TRL's doing).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.training_args import ParallelMode
from trl.models.utils import prepare_deepspeed, prepare_fsdp
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import use_adapter

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.llm.config import TBRMConfig
from tbrm_theory.llm.fused_head import add_start_logits, fused_token_scores
from tbrm_theory.llm.language_scores import TokenScores, position_ids, token_scores
from tbrm_theory.llm.model_copies import base_model, frozen_copy, takes_position_ids, without_dropout
from tbrm_theory.llm.part_timer import PartTimer
from tbrm_theory.losses import LOSSES

__all__ = ["ReferenceTrainer", "StepSeconds"]


class ReferenceTrainer(GRPOTrainer):
    """Models, log-probabilities and the seconds that each part of a step takes; no loss yet."""

    args: TBRMConfig
    model: Any
    ref_model: Any
    num_generations: int
    num_generations_eval: int
    _buffered_inputs: Any

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: TBRMConfig | None = None,
        train_dataset: Any = None,
        **kwargs: Any,
    ) -> None:
        args = TBRMConfig() if args is None else args
        own_reference = None
        if isinstance(model, PreTrainedModel) and kwargs.get("peft_config") is None:
            if args.cast_lm_head_to_fp32:
                raise InvalidInputError("cast_lm_head_to_fp32", "needs a model given by name or path, not an instance")
            if is_deepspeed_zero3_enabled():
                raise InvalidInputError(
                    "model", "under ZeRO-3 a copy of an instance has no weights; pass the name or path"
                )
            own_reference = frozen_copy(model)
        _check_size(train_dataset, args)
        if isinstance(model, str) and args.parallel_mode is ParallelMode.DISTRIBUTED:
            # TRL sees to it for the policy; under FSDP, each process would spread its reference over all devices.
            given: Any = args.model_init_kwargs or {}
            args.model_init_kwargs = {"device_map": None} | given
        beta = args.beta
        # With beta = 0 TRL makes no reference. Its own would be loaded from the instance's name, if it has one.
        args.beta = 0.0 if own_reference is not None else beta
        try:
            super().__init__(model, reward_funcs, args=args, train_dataset=train_dataset, **kwargs)
        finally:
            args.beta = beta
        self.beta = beta
        self._check_model()
        self._fitted(self.model)
        if own_reference is not None:
            self.ref_model = self._placed(self._fitted(own_reference))
        elif self.ref_model is not None:
            self._fitted(self.accelerator.unwrap_model(self.ref_model))
        if args.reference_reset_steps and self.ref_model is None:
            raise InvalidInputError("reference_reset_steps", "an adapter's reference is its base model and stays")
        self._takes_position_ids = takes_position_ids(self.model)
        self._reference_version = 0
        self._collected: dict[str, Tensor] = {}
        self.timer = PartTimer()
        self.add_callback(StepSeconds(self.timer, self._metrics["train"]))
        if args.reference_reset_steps:
            self.add_callback(_ReferenceReset(self, args.reference_reset_steps))

    @property
    def _needs_entropy(self) -> bool:
        return "entropy" in LOSSES[self.args.loss].fields

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
            # accelerate would round what a model returns to bf16; with a fused head that is log-probabilities.
            plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, output_dtype=None)

    def _check_model(self) -> None:
        if self._is_vlm:
            raise InvalidInputError("processing_class", "expected a tokenizer; rows of images are not kept")
        if self.aux_loss_enabled:
            raise InvalidInputError("router_aux_loss_coef", "expected 0: the router's loss is not added to this one")

    def _fitted(self, model: Any) -> Any:
        """The model without dropout, and with the head that the settings ask for."""
        if self.args.disable_dropout:
            without_dropout(model)
        if self.args.fused_lm_head:
            add_start_logits(base_model(model), entropy=self._needs_entropy)
        return model

    def _placed(self, reference: PreTrainedModel) -> Any:
        """The copy where TRL would have put its own."""
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(reference, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(reference, self.accelerator)
        return self.accelerator.prepare_model(reference, evaluation_mode=True)

    @contextmanager
    def _reference(self) -> Iterator[Any]:
        """The reference, for as long as the context lasts: with adapters it is the model itself."""
        if self.ref_model is not None:
            yield self.ref_model
        else:
            model = self.accelerator.unwrap_model(self.model)
            with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
                yield self.model

    def _is_reference(self, model: Any) -> bool:
        if self.ref_model is not None:
            return model is self.ref_model
        status = self.accelerator.unwrap_model(model).get_model_status()
        return status.enabled is False or "ref" in status.active_adapters

    # -- log-probabilities -------------------------------------------------------------------------------

    def _forward(self, model: Any, ids: Tensor, attention_mask: Tensor, steps: int) -> tuple[TokenScores, Tensor]:
        """The scores of the last ``steps`` tokens, and their log-probabilities at the temperature that sampled, a constant."""
        positions = {"position_ids": position_ids(attention_mask)} if self._takes_position_ids else {}
        with self.accelerator.autocast():
            if self.args.fused_lm_head:
                scores = fused_token_scores(model, ids, attention_mask, steps, **positions)
                return scores, scores.log_policy.detach()  # at temperature 1, for it samples at no other
            logits = model(
                input_ids=ids, attention_mask=attention_mask, logits_to_keep=steps + 1, use_cache=False, **positions
            ).logits
        before, tokens = logits[:, -steps - 1 : -1], ids[:, -steps:]
        scores = token_scores(before, tokens, entropy=self._needs_entropy)
        if self.temperature == 1.0:
            return scores, scores.log_policy.detach()
        return scores, token_scores(before.detach(), tokens, temperature=float(self.temperature)).log_policy

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None, None]:
        """What TRL calls on generated rows for the reference and, where the data may be off-policy, for the policy.

        TRL's own divides the logits by the sampling temperature, sends no position ids and drops the values.
        """
        part = "reference" if self._is_reference(model) else "old_log_probs"
        with self.timer.part(part):
            pieces = [
                self._forward(model, ids, mask, logits_to_keep)
                for ids, mask in zip(
                    input_ids.split(batch_size or len(input_ids)),
                    attention_mask.split(batch_size or len(input_ids)),
                    strict=True,
                )
            ]
        log_policy = torch.cat([scores.log_policy for scores, _ in pieces])
        self._collected[f"{part}_log_policy"] = log_policy
        self._collected[f"{part}_initial_value"] = torch.cat([scores.initial_value for scores, _ in pieces])
        self._collected[f"{part}_as_sampled"] = torch.cat([sampled for _, sampled in pieces])
        values = [scores.value for scores, _ in pieces if scores.value is not None]
        if values:
            self._collected[f"{part}_value"] = torch.cat(values)
        return log_policy, None, None

    # -- generation and time -----------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Tensor]:
        with self.timer.part("other"):  # rewards, tokens, padding; what it samples and scores has parts of its own
            batch: dict[str, Tensor] = super()._prepare_inputs(generation_batch)
        return batch

    def _generate(self, prompts: list[Any]) -> Any:
        with self.timer.part("rollout"):
            return super()._generate(prompts)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.behaviour == "policy":
            return super()._generate_single_turn(*args, **kwargs)
        with self._reference():
            wrapped = self.model_wrapped
            self.model_wrapped = wrapped if self.ref_model is None else self.ref_model
            try:
                return super()._generate_single_turn(*args, **kwargs)
            finally:
                self.model_wrapped = wrapped

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.timer.part("update"):
            return super().training_step(*args, **kwargs)


def _check_size(train_dataset: Any, args: TBRMConfig) -> None:
    """TRL drops a last batch that is not full, so a data set smaller than one batch trains nothing and says nothing."""
    needed = args.generation_rows // args.rollouts
    if isinstance(train_dataset, Dataset) and len(train_dataset) < needed:
        raise InvalidInputError(
            "train_dataset",
            f"expected at least the {needed} prompts of one generation batch, found {len(train_dataset)}",
        )


class StepSeconds(TrainerCallback):
    """Logs the seconds of every optimizer step by part."""

    def __init__(self, timer: PartTimer, metrics: dict[str, list[float]]) -> None:
        self.timer, self.metrics = timer, metrics

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.timer.lap()  # saving and evaluating between steps belong to no step

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.timer.start("update")

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.timer.stop()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        for part, seconds in self.timer.lap().items():
            self.metrics[f"seconds/{part}"].append(seconds)


class _ReferenceReset(TrainerCallback):
    """The policy becomes the reference every ``steps`` steps ([R])."""

    def __init__(self, trainer: ReferenceTrainer, steps: int) -> None:
        self.trainer, self.steps = trainer, steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0:
            policy, reference = self.trainer.accelerator.unwrap_model(kwargs["model"]), self.trainer.ref_model
            if isinstance(reference, FSDPModule):
                reference.reshard()  # FSDP 2 can be told to keep weights gathered after a forward pass
            SyncRefModelCallback.sync_target_model(policy, reference, 1.0)
            self.trainer._reference_version += 1
