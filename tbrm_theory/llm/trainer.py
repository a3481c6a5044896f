"""Trajectory Bellman Residual Minimization in TRL's manner: :class:`TBRMTrainer` is a ``GRPOTrainer`` with another loss.

TRL generates, tokenizes, scores rewards, distributes, logs and checkpoints; this class keeps the rows that come out of it
(token ids, the reference's log-probabilities, raw returns), turns a model's logits on them into
:class:`~tbrm_theory.losses.TrajectoryScores` and calls ``tbrm_theory.losses``. It adds no mathematics of its own: at
``θ = θ_ref`` the residual is exactly ``V_θ(s_1) - r/β``, and the loss is the value that the registry's function returns.

Log-probabilities are those of temperature 1 for the policy and the reference alike, whatever temperature sampled. A row whose
reward is missing (every reward function returned None) contributes 0 to the mean over all rows. With losses that are means over
rows, a batch may so be cut into micro-batches and spread over processes in any way.

Another method on the same base adds to ``provides`` the scores that it brings and overrides ``_further_scores`` (more fields of
the scores), ``_further_columns`` (more columns of every generated row), ``_loss_options`` or ``_save_further`` (more files of a
checkpoint).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.llm import diagnostics
from tbrm_theory.llm.config import TBRMConfig
from tbrm_theory.llm.language_scores import TokenScores, completion_scores
from tbrm_theory.llm.reference_trainer import ReferenceTrainer
from tbrm_theory.llm.replay import Replay, Row, batch_of, rows_of
from tbrm_theory.llm.trainer_state import TrainerState, load_state, save_state
from tbrm_theory.losses import LOSSES, TrajectoryScores

__all__ = ["TBRMConfig", "TBRMTrainer"]

Batch = dict[str, Tensor]

_FROM_TRL = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask")
_REFERENCE_WEIGHTS = "tbrm_reference.safetensors"


class TBRMTrainer(ReferenceTrainer):
    """Trains a causal language model with a residual loss; options in :class:`TBRMConfig`, arguments as in ``GRPOTrainer``."""

    _tag_names = ["trl", "tbrm"]  # noqa: RUF012
    _name = "TBRM"
    _paper = {  # noqa: RUF012  (of the model card, which would name GRPO's)
        "title": "Trajectory Bellman Residual Minimization: A Simple Value-Based Method for LLM Reasoning",
        "id": "2505.15311",
    }

    provides: ClassVar[frozenset[str]] = frozenset(
        {"log_policy", "log_reference", "mask", "initial_value", "trajectory_return", "first_logit", "value", "reward"}
        | {"reference_initial_value", "frozen_initial_value", "frozen_value", "behaviour_log_policy", "entropy"}
    )
    """The fields of the scores that this trainer fills; a loss that reads others needs a trainer that has them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        missing = set(LOSSES[self.args.loss].fields) - self.provides
        if self.args.fused_lm_head:
            missing |= set(LOSSES[self.args.loss].fields) & {"value", "frozen_value"}
        if missing:
            raise InvalidInputError("loss", f"{self.args.loss} reads {', '.join(sorted(missing))}, not at hand here")
        self._fresh: list[Row] = []
        self._replaying = False
        self._replay = None
        if self.args.replay_capacity:
            share = self.args.replay_capacity // self.accelerator.num_processes
            self._replay = Replay(share, seed=self.args.seed + self.accelerator.process_index)

    # -- rows --------------------------------------------------------------------------------------------

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @property
    def _rollouts(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        by_function: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        returns = (by_function * self.reward_weights.to(by_function)).nansum(1)
        returns[by_function.isnan().all(1)] = torch.nan
        if bool(returns.isinf().any()):
            raise InvalidInputError("reward_funcs", "expected finite rewards or None, found an infinite one")
        if self.args.group_mean_reward:
            groups = returns.view(-1, self._rollouts)
            returns = (groups - groups.nanmean(1, keepdim=True)).flatten()
        first = self.accelerator.process_index * len(prompts)
        self._collected["returns"] = returns[first : first + len(prompts)]
        return by_function

    def _generate_and_score_completions(self, inputs: Any) -> Batch:
        self._collected = {}
        output = super()._generate_and_score_completions(inputs)
        batch = {name: output[name] for name in _FROM_TRL if name in output}
        batch |= self._sampled_columns() | self._further_columns(batch)
        self._collected = {}
        if self._mode == "train":
            self._fresh = rows_of(batch)
        return batch

    def _sampled_columns(self) -> Batch:
        """What stays with a generated row, for as long as it is kept."""
        found = self._collected
        returns = found["returns"]
        whole = torch.ones_like(returns, dtype=torch.int64)
        columns = {
            "trajectory_return": returns,
            "log_reference": found["reference_log_policy"],
            "reference_initial_value": found["reference_initial_value"],
            "reference_version": self._reference_version * whole,
            "sampled_at": self.state.global_step * whole,
        }
        for field in ("initial_value", "value"):
            if f"old_log_probs_{field}" in found:
                columns[f"frozen_{field}"] = found[f"old_log_probs_{field}"]
        sampler = "reference" if self.args.behaviour == "reference" else "old_log_probs"
        if f"{sampler}_as_sampled" in found:
            columns["behaviour_log_policy"] = found[f"{sampler}_as_sampled"]
        return columns

    def _further_columns(self, batch: Batch) -> Batch:
        """More columns of generated rows, ``(B,)`` or ``(B, C)``; for a subclass."""
        return {}

    def _prepare_inputs(self, generation_batch: Any) -> Batch:
        micro_steps = self.args.generation_steps
        place = self._step % micro_steps
        inputs: Batch = super()._prepare_inputs(generation_batch)
        if self._mode == "eval" or place > 0:
            return inputs
        if self._step % (micro_steps * self.num_iterations) == 0:
            # TRL shuffled the rows; a prompt's rollouts are laid side by side again, for losses that compare them.
            rows, self._replaying = self._fresh, False
            if self._replay is not None:
                self._replay.add(self._groups(rows))
        elif self._replay is not None:
            rows, self._replaying = self._drawn(self._replay), True
        else:
            return inputs
        self._buffered_inputs = self._micro_batches(rows)
        return self._buffered_inputs[place]

    def _group_rows(self) -> int:
        """Rows that stay together: a prompt's rollouts, or one where processes share them."""
        return self.num_generations if self._local_rows() % self.num_generations == 0 else 1

    def _local_rows(self) -> int:
        return self.args.generation_rows // self.accelerator.num_processes

    def _groups(self, rows: list[Row]) -> list[list[Row]]:
        size = self._group_rows()
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def _drawn(self, replay: Replay) -> list[Row]:
        return [row for group in replay.draw(self._local_rows() // self._group_rows()) for row in group]

    def _micro_batches(self, rows: list[Row]) -> list[Batch]:
        size = len(rows) // self.args.generation_steps
        device, pad = self.accelerator.device, self._tokenizer.pad_token_id
        return [batch_of(rows[i : i + size], pad_token_id=pad, device=device) for i in range(0, len(rows), size)]

    def _with_current_reference(self, inputs: Batch) -> Batch:
        """Rows scored by a reference that has been reset since are scored again, by all processes or by none."""
        if not self.args.reference_reset_steps:
            return inputs
        stale = (inputs["reference_version"] != self._reference_version).any()
        if not bool(self.accelerator.gather(stale).any()):
            return inputs
        with self._reference() as reference, torch.no_grad(), self.timer.part("reference"):
            scores, _ = self._forward(reference, *_text(inputs))
        return inputs | {"log_reference": scores.log_policy, "reference_initial_value": scores.initial_value}

    # -- the loss ----------------------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: Batch) -> Tensor:
        """The loss of ``tbrm_theory.losses`` on these rows, divided by the micro-batches of an optimizer step."""
        inputs = self._with_current_reference(inputs)
        tokens, sampled = self._forward(model, *_text(inputs))
        fields = self._fields(tokens, sampled, inputs) | self._further_scores(model, inputs)
        counted = self._counted(inputs)
        actions = inputs["completion_mask"].bool() & inputs.get("tool_mask", inputs["completion_mask"]).bool()
        if bool(counted.any()):
            chosen = {name: table[counted] for name, table in fields.items()}
            scores = completion_scores(tokens.rows(counted), actions=actions[counted], **chosen)
            loss = self._loss(scores) * counted.to(tokens.log_policy.dtype).mean()
        else:  # a zero that every process can differentiate
            scores = None
            trained = [tokens.log_policy, tokens.initial_value, *fields.values()]
            zeros = [table.sum() * 0.0 for table in trained if table.requires_grad]
            loss = sum(zeros, start=tokens.log_policy.new_zeros(()))
        self._log_diagnostics(scores, counted, age=self.state.global_step - inputs["sampled_at"])
        return loss / (self.current_gradient_accumulation_steps if self._mode == "train" else 1)

    def _loss(self, scores: TrajectoryScores) -> Tensor:
        loss = LOSSES[self.args.loss]
        group = {"group_size": self._rollouts} if loss.needs_group else {}
        return loss.function(scores, beta=self.beta, **group, **self._loss_options())

    def _loss_options(self) -> dict[str, Any]:
        """Options of the loss by name, where the registry's defaults will not do; for a subclass."""
        return {}

    def _fields(self, tokens: TokenScores, sampled: Tensor, inputs: Batch) -> Batch:
        """The fields of the scores that come from the rows; data that is on-policy was sampled by the policy as it is.

        ``sampled``: its log-probabilities at the temperature that sampled.
        """
        fields = {name: inputs[name] for name in ("trajectory_return", "log_reference", "reference_initial_value")}
        now = {
            "behaviour_log_policy": sampled,
            "frozen_initial_value": tokens.initial_value,
            "frozen_value": tokens.value,
        }
        for name, table in now.items():
            if name in inputs:
                fields[name] = inputs[name]
            elif table is not None:
                fields[name] = table.detach()
        return fields

    def _further_scores(self, model: Any, inputs: Batch) -> Batch:
        """More fields of the scores, ``(B,)`` or ``(B, C)`` by completion position; for a subclass."""
        return {}

    def _counted(self, inputs: Batch) -> Tensor:
        """Rows with a reward; a loss that compares the rollouts of a prompt needs all of theirs."""
        counted = inputs["trajectory_return"].isfinite()
        if LOSSES[self.args.loss].needs_group:
            groups = counted.view(-1, self._rollouts)
            counted = groups.all(1, keepdim=True).expand_as(groups).flatten()
        return counted

    # -- diagnostics -------------------------------------------------------------------------------------

    def _log_diagnostics(self, scores: TrajectoryScores | None, counted: Tensor, *, age: Tensor) -> None:
        """Means over the counted rows of all processes, and what theory.md makes of them; ``age`` in steps since sampling."""
        names = (*diagnostics.ROW_DIAGNOSTICS, "age")
        table = torch.full((len(counted), len(names)), torch.nan, device=counted.device)
        if scores is not None:
            fixed = TrajectoryScores(**{name: field.detach() for name, field in scores.given().items()})
            table[counted, :-1] = diagnostics.row_diagnostics(fixed, beta=self.beta).to(table)
            table[counted, -1] = age[counted].to(table)
            if self._mode == "train" and self._step == 0:
                self._log_calibration(fixed)
        table = self.accelerator.gather(table)
        table = table[~table.isnan().any(1)]
        if len(table) == 0:
            return
        metrics = self._metrics[self._mode]
        column = dict(zip(names, table.T, strict=True))
        for name in diagnostics.ROW_DIAGNOSTICS:
            metrics[f"tbrm/{name}"].append(column[name].mean().item())
        log_weight = column["log_weight"]
        bound, log_kappa = diagnostics.on_policy_bound(column["residual"] / self.beta, log_weight, beta=self.beta)
        metrics["tbrm/theorem2_estimate"].append(bound)
        metrics["tbrm/log_kappa_optimal_estimate"].append(log_kappa)
        kind = "replay" if self._replaying and self._mode == "train" else "batch"
        metrics[f"{kind}/log_one_plus_chi_squared"].append(diagnostics.log_second_moment(log_weight))
        metrics[f"{kind}/age"].append(column["age"].mean().item())

    def _log_calibration(self, scores: TrajectoryScores) -> None:
        """[R] Prop. 1 at the first step: with no reward a calibrated loss is 0; TBRM's is ``E V_ref(s_1)²`` (theory.md X6)."""
        assert scores.reward is not None
        unpaid = dataclasses.replace(
            scores,
            trajectory_return=torch.zeros_like(scores.trajectory_return),
            reward=torch.zeros_like(scores.reward),
        )
        ratio = torch.where(scores.mask, scores.log_policy - scores.log_reference, 0.0)
        metrics = self._metrics["train"]
        metrics["calibration/loss_without_reward"].append(self._loss(unpaid).item())
        metrics["calibration/largest_log_ratio"].append(ratio.abs().max().item())

    # -- checkpoints -------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self._reference_version:
            weights = self.accelerator.get_state_dict(self.ref_model)
            if self.accelerator.is_main_process:
                save_file({name: table.clone() for name, table in weights.items()}, folder / _REFERENCE_WEIGHTS)
        self._save_further(folder)
        state = TrainerState(
            step=self._step,
            reference_version=self._reference_version,
            replaying=self._replaying,
            window=self._buffered_inputs,
            replay=() if self._replay is None else self._replay.groups,
            generator=None if self._replay is None else self._replay.generator.get_state(),
        )
        save_state(state, folder, self.accelerator.process_index)  # last: a checkpoint that has it is whole

    def _save_further(self, folder: Path) -> None:
        """More files of a checkpoint, written before the state that ends it; for a subclass."""

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        here = self.accelerator
        state = load_state(checkpoint, here.process_index, processes=here.num_processes, device=here.device)
        self._step, self._buffered_inputs, self._replaying = state.step, list(state.window), state.replaying
        self._reference_version = state.reference_version
        if self._replay is not None and state.generator is not None:
            self._replay.groups = list(state.replay)
            self._replay.generator.set_state(state.generator)
        if self._reference_version:
            reference = self.accelerator.unwrap_model(self.ref_model)
            weights: dict[str, Any] = load_file(Path(checkpoint) / _REFERENCE_WEIGHTS)
            # Where the model is sharded, each process keeps its share of the whole weights.
            set_model_state_dict(reference, weights, options=StateDictOptions(full_state_dict=True))


def _text(inputs: Batch) -> tuple[Tensor, Tensor, int]:
    """Token ids and attention mask of prompts and completions, and how many positions are the completion's."""
    ids, mask = (torch.cat([inputs[f"prompt_{kind}"], inputs[f"completion_{kind}"]], 1) for kind in ("ids", "mask"))
    return ids, mask, inputs["completion_ids"].shape[1]
