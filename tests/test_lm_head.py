"""`experiments/lm_head.py`, small: the three ways give the loss and gradients known by hand, and one that is off is seen."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from torch import Tensor

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.llm import fused_head
from tests.tiny_language_models import language_model_test, own_randomness  # noqa: F401

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))
sys.path.insert(0, str(ROOT / "paper_figs"))

import fig_lm_head  # noqa: E402
import lm_head  # noqa: E402
from table_figure import Options  # noqa: E402

pytestmark = language_model_test

# One position of the larger vocabulary at a time, and several of the smaller one with a remainder.
SMALL = lm_head.Config(
    vocabularies=(140, 600), width=8, rows=3, prompt=2, completion=4, chunk=700, repeats=1, dtype="float32"
)
WAYS = list(lm_head.WAYS)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("results")
    assert lm_head.main(replace(SMALL, results=results)) == 0
    return results / "lm_head" / "latest"


def summary_of(results: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((results / "lm_head" / "latest" / "summary.json").read_text())
    return summary


def committed() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((ROOT / "paper_figs" / "data" / "lm_head.json").read_text())
    return rows


# -- the loss and its gradients --------------------------------------------------------------------------------------


def by_hand(problem: Any) -> tuple[Tensor, Tensor, Tensor]:
    """With the model as its reference f = V(s_1) - r/β, and df/dlogits is e_a at the first step and e_a - π at the others (I5)."""
    tokens, (rows, steps) = problem.texts.tokens, problem.texts.actions.shape
    with torch.no_grad():
        hidden = problem.model.model(input_ids=tokens).last_hidden_state.double()
    weight = problem.model.lm_head.weight.detach().double()
    logits = hidden[:, -steps - 1 : -1] @ weight.T
    residual = logits[:, 0].exp().sum(-1).log() - torch.linspace(0, 1, rows) / lm_head.BETA
    slope = torch.nn.functional.one_hot(tokens[:, -steps:], len(weight)).double()
    slope[:, 1:] -= logits[:, 1:].exp() / logits[:, 1:].exp().sum(-1, keepdim=True)
    slope *= (2 * residual / rows)[:, None, None]
    of_hidden = torch.zeros_like(hidden)
    of_hidden[:, -steps - 1 : -1] = slope @ weight
    return residual.square().mean(), of_hidden, torch.einsum("bhw,bhd->wd", slope, hidden[:, -steps - 1 : -1])


@pytest.mark.parametrize("vocabulary", SMALL.vocabularies)
@pytest.mark.parametrize("way", WAYS)
def test_the_loss_and_its_gradients_are_those_by_hand(way: str, vocabulary: int) -> None:
    problem = lm_head.Problem(vocabulary, SMALL)
    for found, expected in zip(problem.evaluate(way), by_hand(problem), strict=True):
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def too_hot(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That way at temperature 1.1."""
    if way == "fused":
        add = fused_head.add_fused_lm_head
        monkeypatch.setattr(
            fused_head, "add_fused_lm_head", lambda model, **given: add(model, **given | {"temperature": 1.1})
        )
    else:
        given, logits = lm_head.WAYS[way], lm_head.completion_logits

        def heated(*arguments: Any) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(lm_head, "completion_logits", lambda *of: logits(*of) / 1.1)
                return given(*arguments)

        monkeypatch.setitem(lm_head.WAYS, way, heated)


@pytest.mark.parametrize("dtype", list(lm_head.TOLERANCE))
@pytest.mark.parametrize("way", WAYS)
def test_a_way_at_another_temperature_is_seen(
    way: str, dtype: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    too_hot(way, monkeypatch)
    assert lm_head.main(replace(SMALL, vocabularies=(140,), dtype=dtype, results=tmp_path)) == 1
    summary = summary_of(tmp_path)
    off = ["chunked", "fused"] if way == "naive" else [way]
    seen = [line.split(" differs")[0] for line in summary["unexpected"]]
    assert seen == [f"140: {each}'s {name}" for each in off for name in ("loss", "hidden", "head")]
    assert summary["verdict"] == "NOT as predicted"


def test_bfloat16_agrees_within_what_it_resolves(tmp_path: Path) -> None:
    assert lm_head.main(replace(SMALL, dtype="bfloat16", results=tmp_path)) == 0
    apart = summary_of(tmp_path)["largest_difference"]
    assert 1e-5 < max(apart.values()) <= lm_head.TOLERANCE["bfloat16"]


def test_a_difference_that_is_no_number_is_unexpected() -> None:
    row = {"cell": "9", "dtype": "float32", "differences": {"fused": {"loss": float("nan"), "head": 0.0}}}
    assert lm_head.unexpected([row]) == ["9: fused's loss differs by nan"]


# -- seconds and bytes -----------------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_worst_moment() -> None:
    def function() -> None:
        gone = torch.ones(2**20)
        del gone
        kept = torch.ones(2**18), torch.ones(2**19)
        del kept

    assert lm_head.peak_bytes(function, torch.device("cpu")) == 4 * 2**20


def test_what_each_way_holds_grows_with_the_vocabulary_as_its_tables_do(run: Path) -> None:
    """Tables of all logits: three of the naive way, at least; of the chunked way, the logits and their gradient."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["vocabulary"] for row in rows] == list(SMALL.vocabularies)
    words = SMALL.vocabularies[1] - SMALL.vocabularies[0]
    tables = {way: (rows[1]["bytes"][way] - rows[0]["bytes"][way]) / (4 * 12 * words) for way in WAYS}
    assert tables["naive"] > 3
    assert 2 < tables["chunked"] < 2.5  # 2.8 with a copy of the logits, or gradients of chunks as large as all
    assert all(row["logits_bytes"] == 4 * 12 * row["vocabulary"] for row in rows)
    assert all(0 < taken < 10 for row in rows for taken in row["seconds"].values())


def test_every_key_is_explained(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["unexpected"] == []
    assert summary["vocabulary"] == 600
    assert summary["bytes_ratio"]["naive"] == summary["seconds_ratio"]["naive"] == 1
    for key in summary:
        assert f"`{key}`" in (lm_head.__doc__ or ""), key


@pytest.mark.parametrize(
    ("field", "value"),
    [("repeats", 0), ("completion", 0), ("width", 6), ("vocabularies", ()), ("vocabularies", (1, 9))],
)
def test_sizes_that_make_no_sense_are_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidInputError, match=f"^{field}: expected"):
        lm_head.Config(**{field: value})


# -- the figure ------------------------------------------------------------------------------------------------------


def test_the_table_is_extracted_from_a_run(run: Path, tmp_path: Path) -> None:
    fig_lm_head.main(Options(results=run, data=tmp_path, out=tmp_path))
    assert (tmp_path / "lm_head.png").exists()
    assert [row["vocabulary"] for row in json.loads((tmp_path / "lm_head.json").read_text())] == [140, 600]


def test_the_figure_plots_the_committed_table(tmp_path: Path) -> None:
    opened = plt.get_fignums()
    fig_lm_head.main(Options(out=tmp_path))
    assert (tmp_path / "lm_head.pdf").stat().st_size > 10_000
    assert plt.get_fignums() == opened
    rows = committed()
    assert [row["vocabulary"] for row in rows] == list(lm_head.Config().vocabularies)
    drawn = fig_lm_head.draw(rows)
    for axis, kind, unit in zip(drawn.axes, ("seconds", "bytes"), (1, 2**20), strict=True):
        lines = {str(line.get_label()): list(line.get_ydata()) for line in axis.lines}
        for way, (_, label) in fig_lm_head.WAYS.items():
            assert lines[label] == [row[kind][way] / unit for row in rows]
    plt.close(drawn)


def test_at_qwen_s_vocabulary_the_logits_and_their_gradient_are_most_of_what_chunks_hold() -> None:
    largest = committed()[-1]
    assert largest["dtype"] == "bfloat16"
    assert 2 < largest["bytes"]["chunked"] / largest["logits_bytes"] < 3
    assert largest["bytes"]["chunked"] < largest["bytes"]["naive"] / 2
