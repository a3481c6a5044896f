"""Rows over time: replay, resets of the reference, and runs that are cut and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.llm.replay import Replay, batch_of, rows_of
from tbrm_theory.llm.trainer_state import TrainerState, load_state, save_state
from tests.tiny_language_models import (
    completions_of,
    language_model,
    language_model_test,
    naive_scores,
    own_randomness,  # noqa: F401
    settings,
    watched,
)

pytestmark = language_model_test


def test_rows_and_batches_are_each_others_inverse() -> None:
    batch = {
        "prompt_ids": torch.tensor([[0, 3, 4], [5, 6, 7]]),
        "prompt_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "completion_ids": torch.tensor([[8, 1], [9, 0]]),
        "completion_mask": torch.tensor([[1, 1], [1, 0]]),
        "log_reference": torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]),
        "trajectory_return": torch.tensor([0.5, float("nan")]),
    }
    rows = rows_of(batch)
    assert [row["prompt_ids"].tolist() for row in rows] == [[3, 4], [5, 6, 7]]
    assert [row["log_reference"].tolist() for row in rows] == [[-1.0, -2.0], [-3.0]]
    again = batch_of(rows, pad_token_id=0)
    assert again.keys() == batch.keys()
    assert all(torch.equal(again[name].nan_to_num(7), table.nan_to_num(7)) for name, table in batch.items())
    alone = batch_of(rows[1:], pad_token_id=0)
    assert alone["completion_ids"].shape == (1, 1)  # padded to its own length only
    with pytest.raises(InvalidInputError, match="rows"):
        batch_of([rows[0], {"prompt_ids": rows[1]["prompt_ids"]}], pad_token_id=0)


def test_the_oldest_groups_leave_first_and_a_draw_has_no_repeats() -> None:
    def group(i: int) -> list[dict[str, torch.Tensor]]:
        return [{"trajectory_return": torch.tensor(float(i))}] * 2

    buffer = Replay(7, seed=1)
    for i in range(6):
        buffer.add([group(i)])
    assert len(buffer) == 6  # three whole groups fit in seven rows
    draws = [[group[0]["trajectory_return"].item() for group in buffer.draw(3)] for _ in range(20)]
    assert all(sorted(draw) == [3.0, 4.0, 5.0] for draw in draws)
    assert len({tuple(draw) for draw in draws}) > 1
    with pytest.raises(InvalidInputError, match="at most 3"):
        buffer.draw(4)
    with pytest.raises(InvalidInputError, match="capacity"):
        Replay(0, seed=0)


def test_17_later_updates_draw_from_the_last_rows_and_the_first_is_fresh(tmp_path: Path) -> None:
    run = watched(
        tmp_path, num_iterations=3, replay_capacity=12, max_steps=9, gradient_accumulation_steps=2, learning_rate=0.1
    )
    run.train()
    initial = language_model()
    ever: list[Any] = []
    for window in range(3):
        steps = [completions_of(micro) for micro in run.inputs[6 * window : 6 * window + 6]]
        fresh, drawn = steps[0] + steps[1], [steps[2] + steps[3], steps[4] + steps[5]]
        ever += fresh
        for update in drawn:
            kept = ever[-12:]
            assert all(row in kept for row in update)
            assert len(update) == 8
    assert run._replay is not None
    assert drawn[0] != fresh
    assert any(row not in ever[-8:] for update in drawn for row in update)  # older than the window
    assert [
        completions_of(batch_of([row], pad_token_id=0))[0] for group in run._replay.groups for row in group
    ] == ever[-12:]
    lengths = {len(completion) for _, completion in ever}
    assert len(lengths) > 2  # rows of different lengths shared batches
    for inputs, scores in zip(run.inputs, run.scores, strict=True):
        for i, (prompt, completion) in enumerate(completions_of(inputs)):
            naive, value = naive_scores(initial, prompt, completion)
            own = slice(0, len(completion))
            torch.testing.assert_close(
                scores.log_reference[i, own].double(), torch.tensor(naive).double(), atol=2e-5, rtol=0
            )
            assert abs(inputs["reference_initial_value"][i].item() - value[0]) < 2e-5
            assert int(scores.mask[i].sum()) == len(completion)
    replayed = run.state.log_history[4]["replay/log_one_plus_chi_squared"]
    assert replayed != 0.0
    assert run.state.log_history[4]["replay/age"] >= 1.0
    assert "batch/log_one_plus_chi_squared" in run.state.log_history[0]


def test_old_log_probabilities_stay_with_a_row(tmp_path: Path) -> None:
    """The behaviour of a replayed row is the policy that sampled it, not the one that is training."""
    model = language_model()
    run = watched(tmp_path, model, num_iterations=2, replay_capacity=4, max_steps=4, learning_rate=0.1)
    run.train()
    sampler = language_model()
    sampler.load_state_dict(run.samplers[1])
    inputs = run.inputs[3]  # the second update of the second window, capacity one window
    for i, (prompt, completion) in enumerate(completions_of(inputs)):
        found = inputs["behaviour_log_policy"][i, : len(completion)]
        naive = torch.tensor(naive_scores(sampler, prompt, completion)[0]).double()
        torch.testing.assert_close(found.double(), naive, atol=2e-5, rtol=0)
    behaviour = run.scores[3].behaviour_log_policy
    assert behaviour is not None
    assert (run.scores[3].log_policy - behaviour).abs().max() > 0.01


def test_a_reset_makes_the_policy_the_reference_and_replayed_rows_follow(tmp_path: Path) -> None:
    model = language_model()
    run = watched(
        tmp_path,
        model,
        loss="reval",
        num_iterations=2,
        replay_capacity=8,
        reference_reset_steps=3,
        max_steps=4,
        learning_rate=0.1,
    )
    run.train()
    reference = language_model()
    reference.load_state_dict(run.policies[3])  # the policy after step 3
    assert all(torch.equal(table, run.policies[3][name]) for name, table in run.ref_model.state_dict().items())
    assert set(run.inputs[3]["reference_version"].tolist()) == {0}  # sampled before the reset
    for i, (prompt, completion) in enumerate(completions_of(run.inputs[3])):
        naive, value = naive_scores(reference, prompt, completion)
        found = run.scores[3].log_reference[i, : len(completion)]
        torch.testing.assert_close(found.double(), torch.tensor(naive).double(), atol=2e-5, rtol=0)
        assert abs(run.scores[3].reference_initial_value[i].item() - value[0]) < 2e-5  # type: ignore[index]
    assert run.state.log_history[3]["tbrm/log_ratio"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("stop", [2, 3])  # before a draw, and between the two updates that share one
def test_4_a_run_resumed_inside_a_window_ends_at_the_same_bits(stop: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "loss": "reval",
        "num_iterations": 2,
        "replay_capacity": 16,
        "steps_per_generation": 4,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "reference_reset_steps": 2,
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": stop,
        "learning_rate": 0.05,
    }
    through = watched(tmp_path / "one", **options)
    through.train()
    resumed = watched(tmp_path / "one", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "one" / f"checkpoint-{stop}"))
    assert len(resumed.inputs) == 2 * (7 - stop)
    for mine, other in zip(resumed.inputs, through.inputs[2 * stop :], strict=True):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    for name, table in through.model.state_dict().items():
        assert torch.equal(table, resumed.model.state_dict()[name])
        assert torch.equal(through.ref_model.state_dict()[name], resumed.ref_model.state_dict()[name])
    assert not list((tmp_path / "one" / f"checkpoint-{stop}").glob("tbrm*.p*t*"))
    (tmp_path / "one" / f"checkpoint-{stop}" / "tbrm_state_0.safetensors").unlink()
    with pytest.raises(InvalidInputError, match="tbrm_state_0"):
        watched(tmp_path / "one", **options).train(resume_from_checkpoint=str(tmp_path / "one" / f"checkpoint-{stop}"))


def test_a_checkpoint_of_more_processes_is_refused(tmp_path: Path) -> None:
    state = TrainerState(step=1, reference_version=0, replaying=False, window=[])
    for process in (0, 1):
        save_state(state, tmp_path, process)
    assert load_state(tmp_path, 1, processes=2).step == 1
    with pytest.raises(InvalidInputError, match=r"tbrm_state_1\.safetensors belongs to no process; resume with"):
        load_state(tmp_path, 0, processes=1)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"replay_capacity": 8}, "num_iterations"),
        ({"replay_capacity": 3, "num_iterations": 2}, "replay_capacity"),
        ({"sync_ref_model": True}, "sync_ref_model"),
        ({"reference_reset_steps": -1}, "reference_reset_steps"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(options: dict[str, Any], field: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=field):
        settings(tmp_path, **options)
