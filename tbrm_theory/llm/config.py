"""Settings of a TBRM run: TRL's own, with the paper's defaults, and the few that TBRM adds.

Names and meanings that TRL has already are used as they are: ``num_generations`` is n, ``beta`` the KL temperature,
``num_iterations`` K, the updates on each generation batch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import no_type_check

from trl.trainer.grpo_config import GRPOConfig

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.losses import LOSSES

__all__ = ["TBRMConfig"]


_OF_GRPO_ALONE = (
    *("loss_type", "epsilon", "epsilon_high", "delta", "importance_sampling_level", "off_policy_mask_threshold"),
    *("entropy_coef", "use_adaptive_entropy", "top_entropy_quantile", "multi_objective_aggregation"),
)


@no_type_check  # not for beartype: the fields that TRL and transformers declare are not held to their annotations
@dataclass
class TBRMConfig(GRPOConfig):
    """Settings of :class:`~tbrm_theory.llm.trainer.TBRMTrainer`; command lines and YAML files fill it through ``TrlParser``."""

    loss: str = field(default="tbrm", metadata={"help": "a loss of tbrm_theory.losses, by name"})
    beta: float = field(default=0.002, metadata={"help": "KL temperature, in reward units ([Y] §4: 0.002)"})
    num_generations: int | None = field(default=1, metadata={"help": "rollouts for each prompt ([Y] §4: 1 or 4)"})
    group_mean_reward: bool = field(
        default=False, metadata={"help": "subtract the mean reward of a prompt's rollouts, as ReVal does"}
    )
    replay_capacity: int = field(
        default=0,
        metadata={
            "help": "rows kept, first in first out, over all processes; of the num_iterations updates on each generation "
            "batch the first uses the batch, the others draw from here. 0: they use the batch again"
        },
    )
    reference_reset_steps: int = field(
        default=0, metadata={"help": "make the policy the reference every so many steps; 0: never"}
    )
    behaviour: str = field(
        default="policy", metadata={"help": "who generates: policy, or reference (off-policy from the first step on)"}
    )
    fused_lm_head: bool = field(
        default=False, metadata={"help": "log-probabilities by TRL's fused head, without the logits in memory"}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "in both models, functional attention dropout too"})
    scale_rewards: str = field(default="none", metadata={"help": "of TRL's advantages, which TBRM does not use"})
    vllm_importance_sampling_correction: bool = field(
        default=False, metadata={"help": "must stay off: it costs a forward pass, and TBRM needs no ratio"}
    )

    @property
    def rollouts(self) -> int:
        """n, the completions of each prompt."""
        assert self.num_generations is not None
        return self.num_generations

    @property
    def generation_rows(self) -> int:
        """Rows of one generation batch, all processes together."""
        assert self.generation_batch_size is not None
        return self.generation_batch_size

    @property
    def generation_steps(self) -> int:
        """Micro-batches that one generation batch is cut into."""
        assert self.steps_per_generation is not None
        return self.steps_per_generation

    def __post_init__(self) -> None:
        rollouts = self.num_generations
        if rollouts == 1:
            # GRPOConfig refuses 1 and nothing else about it; it is shown a number that passes.
            self.num_generations = self._planned_generation_batch()
            self.num_generations_eval = self.num_generations_eval or 1
        try:
            super().__post_init__()
        finally:
            self.num_generations = rollouts
        self._check()

    def _planned_generation_batch(self) -> int:
        processes = max(1, int(os.environ.get("WORLD_SIZE", "1")))
        steps = self.steps_per_generation or self.gradient_accumulation_steps
        rows = self.generation_batch_size or self.per_device_train_batch_size * processes * steps
        if rows < 2:
            raise InvalidInputError(
                "generation_batch_size", f"expected at least 2 rows with one rollout for each prompt, found {rows}"
            )
        return rows

    def _check(self) -> None:
        if self.loss not in LOSSES:
            raise InvalidInputError("loss", f"expected one of {', '.join(LOSSES)}, found {self.loss!r}")
        if not self.beta > 0:
            raise InvalidInputError("beta", f"expected a positive temperature, found {self.beta}")
        if self.behaviour not in ("policy", "reference"):
            raise InvalidInputError("behaviour", f"expected policy or reference, found {self.behaviour!r}")
        if self.behaviour == "reference" and self.use_vllm:
            raise InvalidInputError("behaviour", "vLLM holds the policy's weights; the reference generates without it")
        if self.fused_lm_head and self.temperature != 1.0:
            raise InvalidInputError(
                "fused_lm_head", "scores at temperature 1 only, which would be wrong of the policy that sampled"
            )
        if self.vllm_importance_sampling_correction:
            raise InvalidInputError(
                "vllm_importance_sampling_correction", "costs a forward pass, and no loss here has a use for it"
            )
        if self.mask_truncated_completions:
            raise InvalidInputError(
                "mask_truncated_completions",
                "a completion cut at max_completion_length is a whole trajectory of that horizon, and counts",
            )
        for name in _OF_GRPO_ALONE:
            if getattr(self, name) != GRPOConfig.__dataclass_fields__[name].default:
                raise InvalidInputError(name, "belongs to GRPO's own loss and would change nothing here")
        if self.sync_ref_model:
            raise InvalidInputError("sync_ref_model", "use reference_reset_steps; replayed rows follow it")
        if self.reference_reset_steps < 0:
            raise InvalidInputError("reference_reset_steps", f"expected 0 or more, found {self.reference_reset_steps}")
        if (LOSSES[self.loss].needs_group or self.group_mean_reward) and self.rollouts < 2:
            raise InvalidInputError("num_generations", "expected at least 2 rollouts for each prompt, found 1")
        if LOSSES[self.loss].needs_group and self.per_device_train_batch_size % self.rollouts:
            raise InvalidInputError(
                "per_device_train_batch_size",
                f"expected a multiple of num_generations = {self.rollouts}: {self.loss} compares the rollouts of"
                " a prompt with each other",
            )
        self._check_replay()

    def _check_replay(self) -> None:
        if self.replay_capacity == 0:
            return
        if self.num_iterations < 2:
            raise InvalidInputError("num_iterations", "expected at least 2: replay fills the updates after the first")
        if self.replay_capacity < self.generation_rows:
            raise InvalidInputError(
                "replay_capacity",
                f"expected at least the generation batch of {self.generation_rows}, found {self.replay_capacity}",
            )


# HfArgumentParser reads the annotations that the mark hides.
del TBRMConfig.__no_type_check__  # type: ignore[attr-defined]
