"""What goes wrong silently when a policy-gradient trainer is given a value-based loss; one test each, by the traps' numbers.

The other side is ``naive_scores``: one row at a time, no padding, through the class's own forward.
"""

from __future__ import annotations

import copy
import queue
from pathlib import Path
from typing import Any

import huggingface_hub.utils._telemetry as telemetry
import pytest
import torch
from datasets import Dataset
from huggingface_hub import constants
from torch import Tensor

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.llm import reference_trainer
from tbrm_theory.llm.language_scores import token_scores
from tests.tiny_language_models import (
    EOS,
    STOP,
    Watched,
    completions_of,
    language_model,
    language_model_test,
    letters,
    naive_scores,
    own_randomness,  # noqa: F401
    prompts,
    settings,
    tokenizer,
    trainer,
    watched,
)

pytestmark = language_model_test


def naive_residuals(policy: Any, reference: Any, inputs: dict[str, Tensor], *, beta: float = 0.5) -> list[float]:
    """``V_θ(s_1) + Σ_h log π_θ/π_ref - r/β`` of every row, with the reward computed from the ids again."""
    found = []
    for prompt, completion in completions_of(inputs):
        log_policy, value = naive_scores(policy, prompt, completion)
        log_reference, _ = naive_scores(reference, prompt, completion)
        text = tokenizer().decode(completion, skip_special_tokens=True)
        found.append(value[0] + sum(log_policy) - sum(log_reference) - letters([str(text)])[0] / beta)
    return found


def close(found: Tensor, naive: Any, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(found.detach().double(), torch.tensor(naive).double(), rtol=tolerance, atol=tolerance)


def own_residual(run: Watched, i: int = -1) -> Tensor:
    scores = run.scores[i]
    ratio = torch.where(scores.mask, scores.log_policy - scores.log_reference, 0.0).sum(-1)
    return scores.initial_value + ratio - scores.trajectory_return / 0.5


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gpt2"])
def test_every_row_has_the_residual_of_its_definition_after_training(architecture: str, tmp_path: Path) -> None:
    """Traps 6, 13 and 15: soft-caps, absolute positions behind left padding, and the place of V(s_1)."""
    caps: dict[str, Any] = {"final_logit_softcapping": 3.0} if architecture == "gemma2" else {}
    model = language_model(architecture, **caps)
    before = copy.deepcopy(model)
    run = watched(tmp_path, model, max_steps=2)
    run.train()
    policy = copy.deepcopy(before)
    policy.load_state_dict(run.policies[-1])
    inputs = run.inputs[-1]
    assert (inputs["prompt_mask"][:, 0] == 0).any()  # some prompt is padded
    naive = naive_residuals(policy, before, inputs)
    log_ratio = own_residual(run) - run.scores[-1].initial_value + run.scores[-1].trajectory_return / 0.5
    assert log_ratio.abs().max() > 1e-3  # the policy has moved
    close(own_residual(run), naive)


@pytest.mark.parametrize("iterations", [1, 2])
def test_1_log_probabilities_are_at_temperature_one_whatever_samples(iterations: int, tmp_path: Path) -> None:
    """Those of the sampler are at its own, whether it is the policy of this very update or an older one."""
    model = language_model()
    before = copy.deepcopy(model)
    run = watched(tmp_path, model, temperature=0.4, max_steps=2, num_iterations=iterations, learning_rate=0.0)
    run.train()
    assert ("behaviour_log_policy" in run.inputs[1]) == (iterations > 1)
    behaviour = run.scores[1].behaviour_log_policy
    assert behaviour is not None
    assert not behaviour.requires_grad
    for prompt, completion, log_policy, sampled in zip(
        *zip(*completions_of(run.inputs[1]), strict=True), run.scores[1].log_policy, behaviour, strict=True
    ):
        naive, _ = naive_scores(before, list(prompt), list(completion))
        close(log_policy[: len(completion)], naive)
        at_temperature = torch.tensor(naive_scores_at(before, list(prompt), list(completion), 0.4))
        close(sampled[: len(completion)], at_temperature.tolist())
        assert (at_temperature - torch.tensor(naive)).abs().max() > 0.05


def naive_scores_at(model: Any, prompt: list[int], completion: list[int], temperature: float) -> list[float]:
    with torch.no_grad():
        logits = type(model).forward(model, input_ids=torch.tensor([prompt + completion])).logits[0]
    here = (logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1)
    return here.gather(-1, torch.tensor(completion).unsqueeze(-1)).squeeze(-1).tolist()


def test_2_attention_dropout_is_off_in_both_models(tmp_path: Path) -> None:
    run = watched(tmp_path, language_model(attention_dropout=0.5), learning_rate=0.0, max_steps=2)
    run.train()
    assert run.model.training
    for scores in run.scores:
        assert torch.equal(scores.log_policy[scores.mask], scores.log_reference[scores.mask])
    assert run.state.log_history[0]["calibration/largest_log_ratio"] == 0.0


def test_3_the_reference_of_an_instance_is_the_weights_as_given(tmp_path: Path) -> None:
    language_model(seed=1).save_pretrained(tmp_path / "elsewhere")
    model = language_model()
    model.config._name_or_path = str(tmp_path / "elsewhere")  # what loading by name would bring
    trainer(tmp_path, model, max_steps=1).train()  # leaves another trainer's forward on the instance
    given = copy.deepcopy(model.state_dict())
    run = watched(tmp_path, model, max_steps=3)
    run.train()
    assert all(torch.equal(table, given[name]) for name, table in run.ref_model.state_dict().items())
    assert not torch.equal(model.lm_head.weight, given["lm_head.weight"])
    reference = language_model()
    reference.load_state_dict(given)
    prompt, completion = completions_of(run.inputs[-1])[0]
    close(run.inputs[-1]["log_reference"][0, : len(completion)], naive_scores(reference, prompt, completion)[0])


def test_3_under_zero_3_an_instance_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_trainer, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(InvalidInputError, match=r"^model: under ZeRO-3 .* pass the name"):
        trainer(tmp_path)


def test_3_a_model_given_by_path_is_its_own_reference(tmp_path: Path) -> None:
    language_model().save_pretrained(tmp_path / "model")
    run = watched(tmp_path, str(tmp_path / "model"), learning_rate=0.0)
    run.train()
    close(own_residual(run), naive_residuals(language_model(), language_model(), run.inputs[0]))
    mask = run.scores[0].mask
    assert torch.equal(run.scores[0].log_policy[mask], run.scores[0].log_reference[mask])


def test_5_fields_that_the_model_returns_survive_a_wrapper_that_rebuilds_them(tmp_path: Path) -> None:
    """Mixed precision wraps the forward and rebuilds its output field by field, as distributed wrappers do."""
    run = watched(tmp_path, fused_lm_head=True, bf16=True, learning_rate=0.0)
    run.train()
    assert hasattr(run.model, "_original_forward")  # the wrapper is there
    close(own_residual(run), naive_residuals(language_model(), language_model(), run.inputs[0]), tolerance=0.1)


@pytest.mark.parametrize("fused", [False, True])
def test_6_the_starts_value_comes_from_the_logits_that_the_model_returns(fused: bool, tmp_path: Path) -> None:
    model = language_model("gemma2", final_logit_softcapping=1.5, scale=40.0)
    before = copy.deepcopy(model)
    run = watched(tmp_path, model, fused_lm_head=fused, learning_rate=0.0)
    run.train()
    rows = completions_of(run.inputs[0])
    naive = [naive_scores(before, prompt, completion)[1][0] for prompt, completion in rows]
    close(run.scores[0].initial_value, naive)
    with torch.no_grad():
        uncapped = [before.lm_head(before.model(torch.tensor([prompt])).last_hidden_state[0, -1]) for prompt, _ in rows]
    assert (torch.stack(uncapped).logsumexp(-1) - torch.tensor(naive)).abs().max() > 0.1


def test_7_sums_are_taken_in_float32_when_logits_are_bfloat16(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 3, 5000, generator=generator)).bfloat16()
    tokens = torch.randint(5000, (2, 3), generator=generator)
    exact = logits.double().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    found = token_scores(logits, tokens)
    close(found.log_policy, exact.tolist(), tolerance=1e-6)
    assert found.value is not None
    close(found.value, logits.double().logsumexp(-1).tolist(), tolerance=1e-6)
    run = watched(tmp_path, language_model().bfloat16(), learning_rate=0.0)
    run.train()
    assert run.scores[0].log_policy.dtype == run.inputs[0]["log_reference"].dtype == torch.float32


def test_8_generation_costs_one_forward_of_the_reference_and_none_of_the_policy(tmp_path: Path) -> None:
    run = watched(tmp_path, gradient_accumulation_steps=2, max_steps=2)
    run.train()
    assert run.forwards == 2 * ["reference", "reference", "policy", "policy"]  # two micro-batches in each of two steps
    with pytest.raises(InvalidInputError, match="vllm_importance_sampling_correction"):
        settings(tmp_path, vllm_importance_sampling_correction=True)


def test_9_rows_without_any_reward_count_for_nothing(tmp_path: Path) -> None:
    def sometimes(completions: list[str], **unused: Any) -> list[float | None]:
        return [None if i % 4 == 1 else letters([text])[0] for i, text in enumerate(completions)]

    model = language_model()
    run = watched(tmp_path, model, reward=sometimes, per_device_train_batch_size=8)
    run.train()
    naive = naive_residuals(language_model(), language_model(), run.inputs[0])
    rewarded = [naive[i] for i in range(8) if i % 4 != 1]
    close(own_residual(run), rewarded)
    close(run.losses[0], sum(residual**2 for residual in rewarded) / 8)

    model = language_model()
    unpaid = watched(tmp_path, model, reward=lambda completions, **unused: [None] * len(completions))
    unpaid.train()
    assert unpaid.scores == []
    assert unpaid.evaluate(prompts())["eval_loss"] == 0.0
    assert unpaid.losses[0] == 0.0
    for mine, initial in zip(model.parameters(), language_model().parameters(), strict=True):
        assert torch.equal(mine, initial)


@pytest.mark.parametrize("listening", [False, True])
def test_10_tests_send_no_telemetry(listening: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: queue.Queue[Any] = queue.Queue()
    monkeypatch.setattr(telemetry, "_TELEMETRY_QUEUE", sent)
    monkeypatch.setattr(telemetry, "_start_telemetry_thread", lambda: None)
    if listening:  # without what the tests set, a trainer reports itself
        monkeypatch.delenv("CI")
        monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    trainer(tmp_path)
    assert sent.empty() != listening


def test_11_the_token_that_ends_a_completion_is_an_action_and_padding_never_is(tmp_path: Path) -> None:
    model = language_model(scale=4.0)
    model.generation_config.eos_token_id = [EOS, STOP]
    before = copy.deepcopy(model)
    run = watched(
        tmp_path,
        model,
        words=tokenizer(pad="<eos>"),
        data=Dataset.from_dict({"prompt": [*prompts(60)["prompt"], *4 * ["a<eos>b"]]}),
        per_device_train_batch_size=64,
        learning_rate=0.0,
    )
    run.train()
    assert run._tokenizer.pad_token_id == EOS
    inputs, scores = run.inputs[0], run.scores[0]
    last = []
    for i, (prompt, completion) in enumerate(completions_of(inputs)):
        ends = [h for h, token in enumerate(completion) if token in (EOS, STOP)]
        assert ends in ([], [len(completion) - 1])
        assert int(scores.mask[i].sum()) == len(completion)
        close(scores.log_policy[i, : len(completion)], naive_scores(before, prompt, completion)[0])
        last.append(completion[-1])
        if len(completion) < 5:
            assert ends
    assert {EOS, STOP} <= set(last)
    assert any(EOS in prompt for prompt, _ in completions_of(inputs))  # as between the turns of a chat
    assert len(set(scores.mask.sum(-1).tolist())) > 2


def test_12_a_completion_that_was_cut_off_counts_whole(tmp_path: Path) -> None:
    run = watched(tmp_path, max_completion_length=3, per_device_train_batch_size=8, learning_rate=0.0)
    run.train()
    ends = [completion[-1] for _, completion in completions_of(run.inputs[0])]
    assert any(token != EOS for token in ends)
    assert len(run.scores[0].initial_value) == 8
    close(own_residual(run), naive_residuals(language_model(), language_model(), run.inputs[0]))
    with pytest.raises(InvalidInputError, match="mask_truncated_completions"):
        settings(tmp_path, mask_truncated_completions=True)


def test_18_ids_are_kept_as_they_were_sampled(tmp_path: Path) -> None:
    """``<stop>`` is dropped from the text that rewards read, so a text tokenised again would be another completion."""
    run = watched(tmp_path, per_device_train_batch_size=8, num_iterations=2, replay_capacity=8, max_steps=2)
    run.train()
    words = tokenizer()
    again = [words(words.decode(ids, skip_special_tokens=True)).input_ids for ids in run.sampled]
    assert again != run.sampled
    assert [completion for _, completion in completions_of(run.inputs[0])] == run.sampled
    assert sorted(completion for _, completion in completions_of(run.inputs[1])) == sorted(run.sampled)
