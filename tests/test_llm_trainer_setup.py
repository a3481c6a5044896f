"""How a trainer is set up: references under adapters, off-policy data, groups, fused heads, settings files, and TRL underneath."""

from __future__ import annotations

import ast
import copy
import inspect
import math
import textwrap
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
import transformers
import trl
from trl.scripts.utils import TrlParser
from trl.trainer.callbacks import SyncRefModelCallback
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head, use_adapter

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.llm import critic, diagnostics, part_timer, reference_trainer, timed
from tbrm_theory.llm import trainer as trainer_module
from tbrm_theory.llm.config import TBRMConfig
from tbrm_theory.llm.language_scores import TokenScores, completion_scores, token_scores
from tbrm_theory.losses import LOSSES, brm_residual
from tests.tiny_language_models import (
    completions_of,
    language_model,
    language_model_test,
    letters,
    naive_scores,
    own_randomness,  # noqa: F401
    prompts,
    settings,
    trainer,
    watched,
)

pytestmark = language_model_test

GREEDY = {"generation_kwargs": {"do_sample": False}}


# -- references --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pretrained", [False, True])
def test_16_an_adapters_reference_is_what_it_was_given_on(pretrained: bool, tmp_path: Path) -> None:
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"], lora_dropout=0.3, task_type="CAUSAL_LM")
    model = language_model()
    given = copy.deepcopy(model)
    options: dict[str, Any] = {"trainer_options": {"peft_config": lora}}
    if pretrained:
        model = peft.get_peft_model(model, lora)
        for name, table in model.named_parameters():
            if "lora_B" in name:
                table.data.fill_(0.3)
        given = copy.deepcopy(model).merge_and_unload()
        options = {}
    run = watched(tmp_path, model, learning_rate=0.3, max_steps=3, **options)
    run.train()
    assert run.ref_model is None
    for step in (0, 2):
        inputs, scores = run.inputs[step], run.scores[step]
        for i, (prompt, completion) in enumerate(completions_of(inputs)):
            naive, value = naive_scores(given, prompt, completion)
            found = inputs["log_reference"][i, : len(completion)]
            torch.testing.assert_close(found.double(), torch.tensor(naive).double(), atol=2e-5, rtol=0)
            assert abs(inputs["reference_initial_value"][i].item() - value[0]) < 2e-5
        ratio = (scores.log_policy - scores.log_reference)[scores.mask].abs().max()
        assert ratio < 1e-5 if step == 0 else ratio > 0.01
    seconds = run.state.log_history[0]
    assert seconds["seconds/reference"] > 0
    assert seconds["seconds/old_log_probs"] == 0
    with pytest.raises(InvalidInputError, match="reference_reset_steps"):
        trainer(tmp_path, language_model(), reference_reset_steps=1, trainer_options={"peft_config": lora})


@pytest.mark.parametrize("adapter", [False, True])
def test_off_policy_data_never_come_from_the_policy(adapter: bool, tmp_path: Path) -> None:
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    options: dict[str, Any] = {"trainer_options": {"peft_config": lora}} if adapter else {}
    model = language_model()
    initial = copy.deepcopy(model)
    run = watched(
        tmp_path,
        model,
        behaviour="reference",
        learning_rate=0.3,
        max_steps=4,
        per_device_train_batch_size=8,
        **GREEDY,
        **options,
    )
    run.train()
    first, last = completions_of(run.inputs[0]), completions_of(run.inputs[-1])
    assert first == last  # greedy answers of a model that does not change
    ids = torch.tensor([first[0][0]])
    run.model.eval()
    answers = [
        m.generate(ids, max_new_tokens=5, do_sample=False)[0, len(first[0][0]) :].tolist() for m in (initial, run.model)
    ]
    assert answers[0] == first[0][1]
    assert answers[1] != answers[0]
    assert torch.equal(run.inputs[-1]["behaviour_log_policy"], run.inputs[-1]["log_reference"])
    assert run.state.log_history[-2]["batch/log_one_plus_chi_squared"] != 0.0
    with pytest.raises(InvalidInputError, match="vLLM"):
        settings(tmp_path, behaviour="reference", use_vllm=True)


@pytest.mark.parametrize("name", ["tbrm", "reval"])
def test_at_the_reference_the_residual_is_the_value_less_the_reward(name: str, tmp_path: Path) -> None:
    run = watched(tmp_path, loss=name, learning_rate=0.0)
    run.train()
    scores = run.scores[0]
    start = scores.initial_value if name == "tbrm" else torch.zeros_like(scores.initial_value)
    expected = start - scores.trajectory_return / 0.5
    assert expected.abs().min() > 0 or name == "reval"
    assert torch.equal(LOSSES[name].function(scores, beta=0.5), expected.square().mean())
    calibration = run.state.log_history[0]["calibration/loss_without_reward"]
    assert calibration == pytest.approx(start.square().mean().item(), rel=1e-6, abs=0)
    assert (calibration == 0.0) == (name == "reval")


# -- rows and groups ---------------------------------------------------------------------------------------


def test_a_prompts_rollouts_stay_side_by_side(tmp_path: Path) -> None:
    run = watched(
        tmp_path, loss="vargrad", num_generations=4, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    run.train()
    gap = []
    for inputs, scores in zip(run.inputs, run.scores, strict=True):
        assert len({tuple(prompt) for prompt, _ in completions_of(inputs)}) == 1
        ratio = torch.where(scores.mask, scores.log_policy - scores.log_reference, 0.0).sum(-1)
        gap.append((ratio - scores.trajectory_return / 0.5).detach())
    for loss, group in zip(run.losses, gap, strict=True):
        assert loss == pytest.approx(group.var().item() / 2, rel=1e-5)
        assert loss > 0


def test_a_group_with_an_unpaid_member_is_left_out_whole(tmp_path: Path) -> None:
    def sometimes(completions: list[str], **unused: Any) -> list[float | None]:
        return [None if i == 2 else letters([text])[0] for i, text in enumerate(completions)]

    run = watched(tmp_path, reward=sometimes, loss="vargrad", num_generations=2, per_device_train_batch_size=6)
    run.train()
    assert len(run.scores[0].initial_value) == 4
    assert run.losses[0] == pytest.approx(run.values[0].item() * 4 / 6, rel=1e-6)


def test_rewards_less_their_groups_mean(tmp_path: Path) -> None:
    def some(completions: list[str], **unused: Any) -> list[float | None]:
        return [None if i == 0 else float(i * i) for i in range(len(completions))]

    run = watched(tmp_path, reward=some, num_generations=4, group_mean_reward=True, per_device_train_batch_size=8)
    run.train()
    found = run.inputs[0]["trajectory_return"]
    assert found[0].isnan()
    expected = [1 - 14 / 3, 4 - 14 / 3, 9 - 14 / 3] + [i * i - (16 + 25 + 36 + 49) / 4 for i in range(4, 8)]
    torch.testing.assert_close(found[1:], torch.tensor(expected), rtol=1e-6, atol=1e-5)


def test_infinite_rewards_are_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, reward=lambda completions, **unused: [math.inf] * len(completions))
    with pytest.raises(InvalidInputError, match="reward_funcs"):
        run.train()


def test_tokens_that_a_tool_wrote_are_no_actions() -> None:
    """The actions move together: brute force over the positions of each row, for a residual that needs every value."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64)
    tokens = torch.randint(7, (3, 5), generator=generator)
    actions = torch.tensor([[1, 0, 0, 1, 1], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0]]).bool()
    reference = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    returns = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    scores = completion_scores(
        token_scores(logits, tokens), log_reference=reference, actions=actions, trajectory_return=returns
    )
    found = brm_residual(scores, beta=0.5)
    assert found.shape == (3, 3)
    for i in range(3):
        places = actions[i].nonzero().flatten().tolist()
        values = [math.log(sum(math.exp(x) for x in logits[i, h].tolist())) for h in places] + [0.0]
        for k, h in enumerate(places):
            paid = returns[i].item() / 0.5 if k == len(places) - 1 else 0.0
            naive = logits[i, h, tokens[i, h]].item() - reference[i, h].item() - paid - values[k + 1]
            assert found[i, k].item() == pytest.approx(naive, abs=1e-12)
    with pytest.raises(InvalidInputError, match=r"actions\[1\]"):
        completion_scores(
            token_scores(logits, tokens),
            log_reference=reference,
            actions=actions & (actions.sum(1) > 2)[:, None],
            trajectory_return=returns,
        )
    with pytest.raises(InvalidInputError, match=r"actions\[1, 0\]: expected an action first"):
        completion_scores(
            token_scores(logits, tokens), log_reference=reference, actions=actions.flip(1), trajectory_return=returns
        )


def test_scores_and_gradients_do_not_depend_on_the_chunk() -> None:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(9, (3, 4), generator=generator)
    found = []
    for chunk in (9, 30, 80, 1000):  # one position, three, two rows, all
        logits = torch.randn(3, 4, 9, generator=generator.manual_seed(4), dtype=torch.float64).requires_grad_()
        scores = token_scores(logits, tokens, chunk=chunk, entropy=True)
        assert scores.value is not None
        assert scores.entropy is not None
        (scores.log_policy.sin().sum() + scores.value.cos().sum() + scores.entropy.square().sum()).backward()
        assert logits.grad is not None
        found.append(torch.cat([logits.grad.flatten(), scores.log_policy.flatten(), scores.entropy.flatten()]).detach())
    plain = torch.distributions.Categorical(logits=logits.detach(), validate_args=False)
    expected = torch.cat([plain.log_prob(tokens).flatten(), plain.entropy().flatten()])
    torch.testing.assert_close(found[0][-len(expected) :], expected)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-14)


class WithEntropy(trainer_module.TBRMTrainer):
    _needs_entropy = True  # as for a loss that reads it


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "gpt2"])
def test_the_fused_head_agrees_with_the_logits(architecture: str, tmp_path: Path) -> None:
    found: list[tuple[TokenScores, list[torch.Tensor]]] = []
    ids = torch.tensor([[0, 0, 3, 4, 5, 1, 0], [6, 7, 8, 9, 10, 11, 1]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 1]])
    caps: dict[str, Any] = {"final_logit_softcapping": 2.0} if architecture == "gemma2" else {}
    for fused in (False, True):
        run = trainer(tmp_path, language_model(architecture, **caps), fused_lm_head=fused, kind=WithEntropy)
        scores, _ = run._forward(run.model, ids, mask, 3)
        kept = mask[:, -3:].bool()
        (scores.log_policy[kept].square().sum() + scores.initial_value.sin().sum()).backward()
        grads = [table.grad for table in run.model.parameters() if table.grad is not None]
        assert scores.entropy is not None
        found.append((scores._replace(log_policy=scores.log_policy[kept], entropy=scores.entropy[kept]), grads))
    (plain, plain_grads), (fused_scores, fused_grads) = found
    assert fused_scores.value is None
    for name in ("log_policy", "initial_value", "entropy"):
        torch.testing.assert_close(getattr(fused_scores, name), getattr(plain, name), rtol=1e-4, atol=1e-5)
    assert len(plain_grads) == len(fused_grads) > 5
    for mine, other in zip(plain_grads, fused_grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(InvalidInputError, match="value"):
        trainer(tmp_path, fused_lm_head=True, loss="brm")


# -- settings and TRL --------------------------------------------------------------------------------------


def test_a_settings_file_fills_the_config(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "loss: reval\nbeta: 0.25\nnum_generations: 1\nreplay_capacity: 64\nnum_iterations: 2\nuse_cpu: true\nbf16: false\n"
        f"output_dir: {tmp_path}\nbehaviour: reference\n"
    )
    (config,) = TrlParser(cast(Any, TBRMConfig)).parse_args_and_config(
        ["--config", str(path), "--reference_reset_steps", "200"]
    )
    assert isinstance(config, TBRMConfig)
    assert (config.loss, config.beta, config.replay_capacity, config.behaviour) == ("reval", 0.25, 64, "reference")
    assert (config.reference_reset_steps, config.num_generations) == (200, 1)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"loss": "tbrn"}, "loss"),
        ({"beta": 0.0}, "beta"),
        ({"behaviour": "teacher"}, "behaviour"),
        ({"loss": "vargrad"}, "num_generations"),
        ({"group_mean_reward": True}, "num_generations"),
        ({"loss": "vargrad", "num_generations": 8, "gradient_accumulation_steps": 2}, "per_device_train_batch_size"),
        ({"per_device_train_batch_size": 1}, "generation_batch_size"),
        ({"epsilon": 0.3}, "epsilon"),
        ({"fused_lm_head": True, "temperature": 0.7}, "fused_lm_head"),
        ({"loss_type": "grpo"}, "loss_type"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], field: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=f"^{field}"):
        settings(tmp_path, **options)


def test_a_data_set_smaller_than_a_generation_batch_is_refused(tmp_path: Path) -> None:
    """TRL would train no step and say nothing."""
    with pytest.raises(InvalidInputError, match="at least the 4 prompts of one generation batch, found 3"):
        trainer(tmp_path, data=prompts(3))
    run = trainer(tmp_path, data=prompts(4), num_train_epochs=1, max_steps=-1)
    run.train()
    assert run.state.global_step == 1


def test_evaluation_uses_the_same_rows_and_losses(tmp_path: Path) -> None:
    run = watched(tmp_path, trainer_options={"eval_dataset": prompts(6)}, per_device_eval_batch_size=6)
    found = run.evaluate()
    assert found["eval_loss"] == pytest.approx(run.values[0].item(), rel=1e-6)
    assert "eval_tbrm/residual" in found


KINDS = (trainer_module.TBRMTrainer, reference_trainer.ReferenceTrainer, critic.PPOTrainer, timed.timed(GRPOTrainer))
RELIED_ON = {
    "_buffered_inputs", "_calculate_rewards", "_compute_loss", "_generate", "_generate_and_score_completions",
    "_generate_single_turn", "_get_output_dir", "_get_per_token_logps_and_entropies", "_is_vlm", "_load_optimizer_and_scheduler",
    "_metrics", "_name", "_paper", "_prepare_inputs", "_save_checkpoint", "_save_optimizer_and_scheduler", "_step", "_tag_names",
    "_tokenizer",
}  # fmt: skip
"""What the trainers touch inside TRL's (and transformers') trainer."""


def test_the_internals_of_trl_that_the_trainer_relies_on(tmp_path: Path) -> None:
    """A new minor version of TRL must be read against this list before the pin moves."""
    assert trl.__version__.startswith("1.16.")
    assert transformers.__version__.startswith("5.")
    upstream = set(dir(trainer(tmp_path)))
    own = {name for kind in KINDS for name in vars(kind)}
    touched = set()
    for module in (trainer_module, reference_trainer, critic, timed):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                touched.add(node.attr)
    grpo = set(dir(GRPOTrainer))
    state = upstream - own  # made in __init__
    made_here = {"_collected", "_fresh", "_reference_version", "_replay", "_replaying", "_takes_position_ids"}
    overridden = {name for name in own & grpo if name.startswith("_") and not name.startswith("__")}
    found = ((touched & (grpo | state)) - made_here) | (overridden - {"_abc_impl"})
    assert found == RELIED_ON

    def parameters(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert parameters(GRPOTrainer._compute_loss) == ["self", "model", "inputs"]
    assert parameters(GRPOTrainer._generate) == ["self", "prompts"]
    assert parameters(GRPOTrainer._get_per_token_logps_and_entropies)[:6] == [
        "self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size",
    ]  # fmt: skip
    assert parameters(GRPOTrainer._calculate_rewards) == [
        "self",
        "inputs",
        "prompts",
        "completions",
        "completion_ids_list",
    ]
    assert parameters(SyncRefModelCallback.sync_target_model) == ["model", "target_model", "alpha"]
    assert parameters(add_fused_lm_head)[:2] == ["model", "temperature"]
    assert parameters(use_adapter) == ["model", "adapter_name"]
    assert {"loss", "log_probs", "entropy"} <= set(FusedCausalLMOutput.__dataclass_fields__)


def source_tree(function: Any) -> ast.Module:
    return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))


def test_no_method_of_trl_is_copied() -> None:
    """Every override of a TRL method of the same name calls it, but for the log-probabilities and the loss, which replace it."""
    replaced = set()
    for kind in KINDS:
        for name, method in vars(kind).items():
            if inspect.isfunction(method) and getattr(GRPOTrainer, name, None) not in (
                None,
                getattr(object, name, None),
            ):
                calls = {ast.unparse(n.func) for n in ast.walk(source_tree(method)) if isinstance(n, ast.Call)}
                if f"super().{name}" not in calls:
                    replaced.add(name)
    assert replaced == {"_compute_loss", "_get_per_token_logps_and_entropies"}


# -- diagnostics -------------------------------------------------------------------------------------------


def test_the_bounds_estimate_is_the_bound_when_the_sample_is_the_law() -> None:
    """A bandit whose policy has probabilities in eighths, sampled in exactly these shares; κ by definition."""
    policy = [1 / 8, 2 / 8, 5 / 8]
    optimal = [0.5, 0.3, 0.2]
    offset, beta = 0.7, 0.4
    residual = [offset + math.log(p / o) for p, o in zip(policy, optimal, strict=True)]
    rows = torch.tensor([residual[0]] + 2 * [residual[1]] + 5 * [residual[2]], dtype=torch.float64)
    bound, log_kappa = diagnostics.on_policy_bound(rows, torch.zeros(8, dtype=torch.float64), beta=beta)
    kappa = sum(o * o / p for p, o in zip(policy, optimal, strict=True))
    loss = sum(p * f * f for p, f in zip(policy, residual, strict=True))
    assert log_kappa == pytest.approx(math.log(kappa), abs=1e-12)
    assert bound == pytest.approx(beta * (math.sqrt(kappa) + 1) * math.sqrt(loss), rel=1e-12)
    # Off-policy: the same rows drawn from μ = uniform over two answers that π takes with probabilities 1/4 and 3/4.
    weights = torch.tensor([0.5, 1.5], dtype=torch.float64)
    assert diagnostics.log_second_moment(weights.log()) == pytest.approx(math.log((0.25 + 2.25) / 2), abs=1e-12)
    assert math.isfinite(diagnostics.on_policy_bound(torch.tensor([1e4, -1e4]), torch.zeros(2), beta=beta)[0])


def test_the_bounds_estimate_does_not_divide_out_a_factor_for_each_prompt() -> None:
    """Two prompts at the optimal policy: ``f = V_θ - V*`` and κ = 1, but one mean serves both."""

    def estimate(*offsets: float) -> float:
        rows = torch.tensor(offsets, dtype=torch.float64).repeat_interleave(4)
        return diagnostics.on_policy_bound(rows, torch.zeros(len(rows), dtype=torch.float64), beta=0.4)[1]

    assert estimate(3.0, 3.0) == pytest.approx(0.0, abs=1e-12)
    assert estimate(3.0, -3.0) == pytest.approx(math.log(math.cosh(6) / math.cosh(3) ** 2), abs=1e-12)


def test_the_parts_of_a_step_are_exclusive_and_sum_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(2**i) for i in range(20))
    monkeypatch.setattr(part_timer, "_now", lambda: next(clock))
    timer = part_timer.PartTimer()  # at 1
    with timer.part("update"):  # 2
        with timer.part("rollout"):  # 4
            pass  # until 8
        with timer.part("reference"):  # 16
            pass  # until 32
    # until 64; the lap is taken at 128
    assert timer.lap() == {
        "rollout": 4.0, "reference": 16.0, "old_log_probs": 0.0, "update": 2.0 + 8.0 + 32.0, "critic": 0.0, "other": 1.0 + 64.0,
    }  # fmt: skip
    assert timer.lap()["other"] == 128.0


def test_every_step_logs_its_seconds_and_the_theorys_quantities(tmp_path: Path) -> None:
    run = watched(tmp_path, num_iterations=2, max_steps=2, gradient_accumulation_steps=2)
    run.train()
    first, second = run.state.log_history[:2]
    for part in part_timer.PARTS:
        assert first[f"seconds/{part}"] >= 0
    assert first["seconds/rollout"] > 0 < first["seconds/reference"]
    assert first["seconds/old_log_probs"] > 0
    assert second["seconds/rollout"] == second["seconds/reference"] == 0
    assert first["batch/age"] == 0.0
    assert second["batch/age"] == 1.0
    assert first["seconds/update"] > 0 < second["seconds/update"]
    scores = run.scores[2:]
    f = torch.cat(
        [
            s.initial_value + (s.log_policy - s.log_reference).mul(s.mask).sum(-1) - s.trajectory_return / 0.5
            for s in scores
        ]
    )
    drift = torch.cat([s.initial_value - s.reference_initial_value for s in scores])  # type: ignore[operator]
    assert second["tbrm/residual"] == pytest.approx(0.5 * f.mean().item(), rel=1e-4)
    assert second["tbrm/squared_residual"] == pytest.approx(0.25 * f.square().mean().item(), rel=1e-4)
    assert second["tbrm/initial_value_drift"] == pytest.approx(0.5 * drift.mean().item(), rel=1e-3, abs=1e-6)
    assert second["tbrm/initial_value_drift"] != 0.0
    assert second["tbrm/theorem2_estimate"] > 0


def test_every_loss_that_needs_no_further_model_trains(tmp_path: Path) -> None:
    names = [name for name, loss in LOSSES.items() if set(loss.fields) <= trainer_module.TBRMTrainer.provides]
    assert {"tbrm", "tbrm-first-logit", "tbrm-iterative", "reval", "brm", "vargrad"} <= set(names)
    run = watched(tmp_path, num_generations=2, learning_rate=0.1, num_iterations=2, max_steps=2)
    run.train()
    inputs = run.inputs[1]
    for name in names:
        run.args.loss = name
        run.model.zero_grad()
        run._compute_loss(run.model, inputs).backward()
        gradient = run.model.lm_head.weight.grad
        assert torch.isfinite(gradient).all(), name
        assert gradient.abs().max() > 0, name
