"""What a run takes, before it takes it: bytes on each device, and tokens and operations in all.

Memory (``P`` parameters, each of ``w`` bytes): weights ``P·w``, gradients ``P·w``, AdamW's two moments ``2·P·w``, the frozen
reference ``P·w``, PPO's critic as much as the policy with its gradients and moments. Fully sharded (FSDP, ZeRO-3), each device
holds its share of all of that, and gathers one layer at a time, but a reference whole under FSDP 2; ZeRO-2 shards gradients and
moments alone.

Activations are counted for a decoder with gated feed-forward layers, whose attention matrix is not stored: for each token and
layer what :func:`layer_bytes` says; with activation checkpointing the input of every layer, and one layer in full. The logits
of the completion stand beside them with their gradient, in fp32. Judging, between updates, holds keys and values. What fragments,
buffers and the libraries take is not counted.

Operations: 2 for each parameter and token in a forward pass, 4 in a backward pass ([Kaplan et al. 2020], §2.1); attention over
the sequence is left out, and so is what comes before and between updates: A*-PO's estimates of the value, judging.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from transformers import PreTrainedConfig

from tbrm_theory.llm.launch_files import Launch
from tbrm_theory.llm.methods import METHODS
from tbrm_theory.llm.run_arguments import RunArguments
from tbrm_theory.llm.run_files import Run
from tbrm_theory.llm.run_parts import build_model, model_configuration, parameter_count

__all__ = ["Memory", "Work", "layer_bytes", "memory_estimate", "work_estimate"]

_GIB = 2**30
Precision = Literal["float32", "mixed", "bfloat16"]
_WIDTH_BYTES: dict[Precision, int] = {"float32": 24, "mixed": 26, "bfloat16": 16}


@dataclass(frozen=True)
class Memory:
    """Bytes on each device."""

    weights: int
    gradients: int
    optimiser: int
    reference: int
    critic: int
    gathered: int
    """The largest part that is not sharded while it is used."""
    activations: int
    logits: int
    generation: int
    """Keys and values of the responses being sampled, or what vLLM claims on the same device."""
    judging: int
    """Keys and values of the responses that are judged at once; never with vLLM."""
    scoring: int
    """Under FSDP 2, where TRL shards the reference as one unit: all of it while it scores what was sampled, and its logits."""
    generation_stays: bool
    """Whether vLLM keeps its claim during an update (no sleep mode)."""

    @property
    def peak(self) -> int:
        """What lies there always, and the largest of an update, sampling, scoring and judging; with vLLM's claim, if it stays."""
        lasting = self.weights + self.gradients + self.optimiser + self.reference + self.critic
        update = max(self.gathered + max(self.activations + self.logits, self.judging), self.scoring)
        if self.generation_stays:
            return lasting + update + self.generation
        return lasting + max(update, self.gathered + self.generation)


@dataclass(frozen=True)
class Work:
    """Counts over all devices, at most: no response ends before its longest length."""

    parameters: int
    updates: int
    problems: int
    """In one update; with repetition over the run: ``problems · updates``."""
    rollouts: int
    """In one update."""
    generated_tokens: int
    """In one update."""
    operations: float
    """In the whole run."""
    models_held: int


def layer_bytes(configuration: PreTrainedConfig, precision: Precision) -> int:
    """What one layer keeps for the backward pass, for each token.

    In full precision six times the width (input of each norm, normalised, input of what follows it), queries and attention result,
    keys and values, four times the inner width (gate before and after its nonlinearity, up, their product), and one number for
    each head and norm. In mixed precision the norms stay in fp32 and their results are kept in both.
    """
    width, heads = configuration.hidden_size, configuration.num_attention_heads
    head = getattr(configuration, "head_dim", None) or width // heads
    queries, pairs = heads * head, _pairs(configuration) * head
    each = 4 if precision == "float32" else 2
    inner = getattr(configuration, "intermediate_size", None) or 4 * width  # GPT-2's
    multiplied = 2 * queries + 2 * pairs + 4 * inner
    return _WIDTH_BYTES[precision] * width + each * multiplied + 4 * (heads + 2)


def _parameters(arguments: RunArguments) -> int:
    return _parameters_of(json.dumps(arguments.sizes), arguments.alphabet, arguments.model)


@lru_cache(maxsize=64)
def _parameters_of(sizes: str, alphabet: str | None, model: str | None) -> int:
    """The same for every method and seed of a file."""
    arguments = RunArguments(architecture=json.loads(sizes), alphabet=alphabet, model=model)
    return parameter_count(build_model(arguments, device="meta"))


def memory_estimate(run: Run, launch: Launch | None = None) -> Memory:
    """Bytes on each device, from the architecture on the meta device and the run's arguments."""
    arguments, training, method = run.arguments, run.training, METHODS[run.arguments.method]
    configuration = model_configuration(arguments)
    parameters = _parameters(arguments)
    vllm = _vllm(run)
    wide = 4 if arguments.dtype == "float32" else 2
    narrow = 2 if training.bf16 or wide == 2 else 4
    processes, stage = (launch.processes, launch.stage) if launch else (arguments.processes, 0)
    whole = parameters * wide
    kept, trained = (whole // processes if stage == 3 else whole), (whole // processes if stage >= 2 else whole)
    prompt, completion = arguments.prompt_tokens, _completion(run)
    rows = training.per_device_train_batch_size
    layers, width, vocabulary = configuration.num_hidden_layers, configuration.hidden_size, configuration.vocab_size
    tokens = rows * (prompt + completion)
    one_layer = layer_bytes(configuration, "bfloat16" if wide == 2 else "mixed" if training.bf16 else "float32")
    stored = narrow * layers * width + one_layer if training.activation_checkpointing else layers * one_layer
    layer = (parameters - vocabulary * width * (1 if configuration.tie_word_embeddings else 2)) // layers
    read = 0 if getattr(training, "fused_lm_head", False) else rows * completion * vocabulary
    gathered_whole = method.reference and stage == 3 and launch is not None and launch.fsdp == 2
    return Memory(
        weights=kept,
        gradients=trained,
        optimiser=2 * trained,
        reference=kept if method.reference else 0,
        critic=kept + 3 * trained if method.critic else 0,
        # The policy's head and the critic's embedding stay gathered until their backward passes.
        gathered=max(layer, vocabulary * width) * narrow * (2 if method.critic else 1) if stage == 3 else 0,
        activations=tokens * stored * (2 if method.critic else 1),
        logits=read * (narrow + 4 + 4),
        generation=_generation_bytes(run, configuration, narrow),
        judging=arguments.evaluation_rows * (prompt + completion) * _cached_bytes(configuration, narrow),
        scoring=parameters * narrow + read * (narrow + 4) if gathered_whole else 0,
        generation_stays=vllm is not None and not vllm.vllm_enable_sleep_mode,
    )


def _completion(run: Run) -> int:
    length: Any = getattr(run.training, "max_completion_length", None)
    return int(length) if length else run.arguments.prompt_tokens


def _vllm(run: Run) -> Any:
    """The run's settings if vLLM generates, else ``None``."""
    return run.training if getattr(run.training, "use_vllm", False) else None


def _generation_bytes(run: Run, configuration: PreTrainedConfig, narrow: int) -> int:
    arguments, training = run.arguments, run.training
    if vllm := _vllm(run):
        return 0 if vllm.vllm_mode == "server" else int(vllm.vllm_gpu_memory_utilization * arguments.device_gib * _GIB)
    at_once = training.per_device_train_batch_size * training.gradient_accumulation_steps
    return at_once * (arguments.prompt_tokens + _completion(run)) * _cached_bytes(configuration, narrow)


def _cached_bytes(configuration: PreTrainedConfig, narrow: int) -> int:
    """Keys and values of one token."""
    head = getattr(configuration, "head_dim", None) or configuration.hidden_size // configuration.num_attention_heads
    return int(2 * configuration.num_hidden_layers * _pairs(configuration) * head * narrow)


def _pairs(configuration: PreTrainedConfig) -> int:
    """Heads of keys and values: as many as of queries, where nothing else is said."""
    return int(getattr(configuration, "num_key_value_heads", None) or configuration.num_attention_heads)


def work_estimate(run: Run) -> Work:
    """Tokens and operations, at most."""
    arguments, training, method = run.arguments, run.training, METHODS[run.arguments.method]
    parameters = _parameters(arguments)
    group = getattr(training, "num_generations", 1)
    rollouts = arguments.prompts_per_step * group
    batches = math.ceil(training.max_steps / getattr(training, "num_iterations", 1))
    generated = rollouts * _completion(run)
    read = rollouts * (arguments.prompt_tokens + _completion(run))
    update = 6 * (2 if method.critic else 1) + (2 if training.activation_checkpointing else 0)
    per_batch = 2.0 * read * (1 + method.reference)
    return Work(
        parameters=parameters,
        updates=training.max_steps,
        problems=arguments.prompts_per_step,
        rollouts=rollouts,
        generated_tokens=generated,
        operations=parameters * (batches * per_batch + training.max_steps * update * read),
        models_held=1 + method.reference + method.critic,
    )
