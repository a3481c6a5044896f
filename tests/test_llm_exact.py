"""The exact oracle of a language model against plain sums over whole sequences, each run alone and without a cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from another_device import another_device, without_a_kernel_for
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

import tbrm_theory as tt
from tbrm_theory.behaviours import FixedDataset
from tbrm_theory.bounds import theorem2
from tbrm_theory.coverage import change_of_measure, kappa, kappa_linear_solve
from tbrm_theory.dynamic_programming import objective, regret, solve
from tbrm_theory.endings import finished
from tbrm_theory.llm.exact import TokenTree
from tbrm_theory.llm.language_scores import completion_scores, token_scores
from tbrm_theory.losses import tbrm_residual
from tbrm_theory.scores import table_scores

BETA = 0.3
PROMPTS = ((3, 1, 0), (2,), (0, 4, 4), (1, 2))
TREE = TokenTree(PROMPTS, horizon=3, vocabulary=5, end=(4, 1))
KINDS = ("llama", "gpt2", "gemma2")


def language_model(kind: str, seed: int, *, vocabulary: int = 5, positions: int = 16) -> PreTrainedModel:
    """A tiny model in float64 with weights large enough that every prefix matters; it trains with dropout."""
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
    }
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": positions}
    wide: dict[str, Any] = {"initializer_range": 0.5, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel
        match kind:
            case "llama":
                model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **wide, attention_dropout=0.3))
            case "gpt2":
                shape: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": positions}
                model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **shape, **wide))
            case "gemma2":  # soft-capped logits, and a window shorter than prompt and response
                window: dict[str, Any] = {"sliding_window": 3, "head_dim": 8, "final_logit_softcapping": 2.0}
                model = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, **wide, **window))
            case _:
                model = MambaForCausalLM(MambaConfig(vocab_size=vocabulary, hidden_size=16, num_hidden_layers=1))
    return model.double()


def reward(prompt: Tensor, tokens: Tensor) -> Tensor:
    """Something that no two responses share, negative for truncated ones."""
    place = torch.tensor([0.17, 0.05, 0.011], dtype=torch.float64)[: tokens.shape[-1]]
    ended = torch.isin(tokens[:, -1], torch.tensor(TREE.end))
    return (tokens * place).sum(-1) + 0.1 * prompt - 0.4 * (~ended)


# -- the brute-force route: no cache, no batch, no tables -----------------------------------------------------------


def responses(tree: TokenTree) -> Iterator[tuple[int, ...]]:
    """Every finished or truncated response."""
    for length in range(1, tree.horizon + 1):
        for tokens in product(range(tree.vocabulary), repeat=length):
            early = any(token in tree.end for token in tokens[:-1])
            if not early and (tokens[-1] in tree.end or length == tree.horizon):
                yield tokens


def log_probability(model: PreTrainedModel, prompt: tuple[int, ...], response: tuple[int, ...]) -> float:
    """``log π(response | prompt)``, from one forward pass over the whole sequence."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0]
    rows = torch.log_softmax(logits, dim=-1).tolist()
    return sum(rows[len(prompt) - 1 + i][token] for i, token in enumerate(response))


def laws(model: PreTrainedModel, tree: TokenTree = TREE) -> list[dict[tuple[int, ...], float]]:
    """For every prompt, the log-probability of every response."""
    model.eval()
    return [{y: log_probability(model, prompt, y) for y in responses(tree)} for prompt in tree.prompts]


def rewards(tree: TokenTree = TREE) -> list[dict[tuple[int, ...], float]]:
    return [
        {y: reward(torch.tensor([i]), torch.tensor([y])).item() for y in responses(tree)}
        for i in range(len(tree.prompts))
    ]


@dataclass(frozen=True)
class Pair:
    """A reference model and another one, each with its law of whole responses."""

    reference: PreTrainedModel
    other: PreTrainedModel
    log_reference: list[dict[tuple[int, ...], float]]
    log_other: list[dict[tuple[int, ...], float]]


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest) -> Pair:
    reference, other = language_model(request.param, 0), language_model(request.param, 1)
    return Pair(reference, other, laws(reference), laws(other))


def test_the_optimum_and_any_regret_are_those_of_plain_sums(pair: Pair) -> None:
    reference, other = pair.reference, pair.other
    mdp = TREE.mdp(TREE.logits(reference), reward, beta=BETA)
    solution = solve(mdp)
    log_theta = TREE.log_policy(other)
    r, ref, theta = rewards(), pair.log_reference, pair.log_other
    partition = [sum(math.exp(p[y] + r[i][y] / BETA) for y in p) for i, p in enumerate(ref)]
    optimum = sum(BETA * math.log(z) for z in partition) / len(PROMPTS)
    achieved = sum(
        sum(math.exp(p[y]) * (r[i][y] - BETA * (p[y] - ref[i][y])) for y in p) for i, p in enumerate(theta)
    ) / len(PROMPTS)
    assert solution.objective.item() == pytest.approx(optimum, rel=1e-12)
    assert objective(mdp, log_theta).item() == pytest.approx(achieved, rel=1e-12)
    assert regret(mdp, log_theta, solution=solution).item() == pytest.approx(optimum - achieved, rel=1e-11)
    assert optimum - achieved > 0.1  # there is something to find
    assert regret(mdp, TREE.log_policy(reference), solution=solution).item() == pytest.approx(
        optimum - sum(sum(math.exp(p[y]) * r[i][y] for y in p) for i, p in enumerate(ref)) / len(PROMPTS), rel=1e-11
    )


def test_every_response_has_the_models_own_probability_and_its_reward(
    pair: Pair,
) -> None:
    """Also through ``trajectories``: indices of states, and masks after an early end."""
    reference, other = pair.reference, pair.other
    mdp = TREE.mdp(TREE.logits(reference), reward, beta=BETA)
    r, ref, theta = rewards(), pair.log_reference, pair.log_other
    listed = [(i, y) for i in range(len(PROMPTS)) for y in responses(TREE)]
    batch = TREE.trajectories([PROMPTS[i] for i, _ in listed], [y for _, y in listed])
    assert sorted(set(batch.mask.sum(-1).tolist())) == [1, 2, 3]
    scores = table_scores(TREE.logits(other), mdp.log_reference, mdp.reward, batch)
    for own, law in ((scores.log_policy, theta), (scores.log_reference, ref)):
        total = torch.where(batch.mask, own, 0.0).sum(-1)
        expected = torch.tensor([law[i][y] for i, y in listed], dtype=torch.float64)
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    expected = torch.tensor([r[i][y] for i, y in listed], dtype=torch.float64)
    torch.testing.assert_close(scores.trajectory_return, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for i, prompt in enumerate(PROMPTS):
            value = torch.logsumexp(other(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1], dim=-1)
            mine = scores.initial_value[[j for j, (k, _) in enumerate(listed) if k == i]]
            torch.testing.assert_close(mine, value.expand_as(mine), rtol=1e-12, atol=1e-12)
    optimal = table_scores(solve(mdp).q, mdp.log_reference, mdp.reward, batch)
    assert tbrm_residual(optimal, beta=BETA).abs().max() < 1e-12  # I7


def test_the_coefficients_of_the_data_are_those_of_whole_responses(
    pair: Pair,
) -> None:
    """I13, ``κ = 1 + χ²(P_π ‖ P_μ)``: the absorbing state takes nothing away; and B5 holds, with room on one side only."""
    reference, other = pair.reference, pair.other
    mdp = TREE.mdp(TREE.logits(reference), reward, beta=BETA)
    solution, log_mu = solve(mdp), TREE.log_policy(reference)
    p, q = pair.log_other, pair.log_reference
    expected = sum(math.exp(2 * p[i][y] - q[i][y]) for i in range(len(PROMPTS)) for y in p[i]) / len(PROMPTS)
    largest = max(math.exp(p[i][y] - q[i][y]) for i in range(len(PROMPTS)) for y in p[i])
    found = change_of_measure(mdp, TREE.log_policy(other), log_mu)
    assert found.kappa.item() == pytest.approx(expected, rel=1e-11)
    assert found.c_inf.item() == pytest.approx(largest, rel=1e-11)
    assert found.second_moment.item() == pytest.approx(largest, rel=1e-7)
    bound = theorem2(mdp, TREE.logits(other), log_mu, solution=solution).item()
    own = regret(mdp, TREE.log_policy(other), solution=solution).item()
    assert 0 < own < bound < math.inf


def test_data_that_miss_a_response_do_not_cover_the_optimum() -> None:
    reference = language_model("llama", 0)
    mdp = TREE.mdp(TREE.logits(reference), reward, beta=BETA)
    everything = [(prompt, y) for prompt in PROMPTS for y in responses(TREE)]
    optimal = solve(mdp).log_policy
    for listed, finite in ((everything, True), (everything[:-1], False)):
        data = FixedDataset(TREE.trajectories([x for x, _ in listed], [y for _, y in listed]))
        assert bool(kappa(mdp, optimal, data) < math.inf) == finite
    listed_law = kappa_linear_solve(mdp, optimal, FixedDataset(TREE.trajectories(*zip(*everything, strict=True))))
    weight = 1 / len(everything)
    probability = [
        math.exp(log) for log in _gibbs(laws(reference), rewards())
    ]  # of whole responses, from the Gibbs form (I2)
    expected = sum((p / len(PROMPTS)) ** 2 / weight for p in probability)
    assert listed_law.item() == pytest.approx(expected, rel=1e-8)


def _gibbs(law: list[dict[tuple[int, ...], float]], r: list[dict[tuple[int, ...], float]]) -> Iterator[float]:
    for p, value in zip(law, r, strict=True):
        log_z = math.log(sum(math.exp(p[y] + value[y] / BETA) for y in p))
        yield from (p[y] + value[y] / BETA - log_z for y in p)


# -- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 7, 4096])
def test_every_prefix_costs_one_token_of_compute(block: int) -> None:
    model = language_model("llama", 0)
    seen: list[int] = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _, inputs, output: seen.append(inputs[0].numel())
    )
    logits = TREE.logits(model, block=block)
    handle.remove()
    prefixes = sum(len(PROMPTS) * 3**length for length in (1, 2))  # three tokens go on
    assert sum(seen) == sum(map(len, PROMPTS)) + prefixes
    assert max(seen) <= max(block * max(map(len, PROMPTS)), block)
    for table, whole in zip(logits, TREE.logits(model), strict=True):
        torch.testing.assert_close(table, whole, rtol=1e-13, atol=1e-13)


def test_the_model_is_left_as_it_was() -> None:
    """In training, with one part frozen on purpose, and dropout that was off while it was judged."""
    model = language_model("gpt2", 0).train()
    frozen = next(module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)).eval()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = TREE.logits(model), TREE.logits(model)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert [module for module in model.modules() if not module.training] == [frozen]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_on_another_device_is_asked_and_trained_there(kind: str) -> None:
    """Simulated, and to rounding, for the CPU has attention of its own; the tables come back to it."""
    tokens = torch.tensor([[3, 1, 0, 2], [2, 2, 4, 1]])
    mask = torch.tensor([[True, True, True], [True, True, False]])

    def update(model: PreTrainedModel, device: str) -> list[Tensor]:
        taken, actions = tokens.to(device), mask.to(device)
        found = token_scores(model(input_ids=taken).logits[:, :-1], taken[:, 1:], chunk=10)
        zeros = torch.zeros(2, 3, dtype=torch.float64, device=device)
        scores = completion_scores(found, log_reference=zeros, actions=actions, trajectory_return=zeros[:, 0] + 1)
        loss = tt.tbrm_loss(scores, beta=BETA)
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)]

    model = language_model(kind, 0).eval()
    expected = [*TREE.logits(model), *update(model, "cpu")]
    with another_device() as device:
        there = model.to(device)
        there.tie_weights()  # a parameter that occurs twice is moved twice by the simulation
        tables, numbers = TREE.logits(there), update(there, device)
        assert {table.device.type for table in tables} == {"cpu"}
        assert {number.device.type for number in numbers} == {device}
        found = [*tables, *(number.cpu() for number in numbers)]
        assert without_a_kernel_for("CUDA") == set()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# -- shapes of trees ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("horizon", "end"), [(1, (4,)), (1, ()), (3, ()), (2, (0, 1, 2, 3)), (3, (0,))])
def test_trees_of_every_shape(horizon: int, end: tuple[int, ...]) -> None:
    """One token; no ending token; one token that goes on. The optimum is the Gibbs form's."""
    tree = TokenTree(PROMPTS[:2], horizon=horizon, vocabulary=5, end=end)
    model = language_model("llama", 0)
    mdp = tree.mdp(tree.logits(model), reward, beta=BETA)
    r, ref = rewards(tree), laws(model, tree)
    total = [sum(math.exp(p[y] + r[i][y] / BETA) for y in p) for i, p in enumerate(ref)]
    assert solve(mdp).objective.item() == pytest.approx(sum(BETA * math.log(z) for z in total) / 2, rel=1e-12)
    assert [sum(over.tolist()) for over in finished(mdp)] == [0] + [int(bool(end))] * (horizon - 1)
    assert [table.shape[0] for table in mdp.reference] == [tree.states(h) for h in range(horizon)]


def test_states_are_numbered_as_itertools_product_does() -> None:
    prompt, written = TREE.responses(2)
    expected = [(i, *y) for i in range(len(PROMPTS)) for y in product((0, 2, 3), repeat=2)]
    assert torch.cat([prompt.unsqueeze(-1), written], dim=-1).tolist() == [list(row) for row in expected]


def test_a_token_that_the_model_excludes_does_not_exist() -> None:
    model = language_model("llama", 0)
    table = [logits.clone() for logits in TREE.logits(model)]
    for logits in table:
        logits[: -1 or None, 3] = -torch.inf
    mdp = TREE.mdp(tuple(table), reward, beta=BETA)
    assert not any(bool(valid[:, 3].any()) for valid in mdp.valid[1:])
    assert not bool((solve(mdp).log_policy[1][:, 3] > -torch.inf).any())


# -- what it refuses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ()}, "prompts: expected at least one"),
        ({"prompts": ((1,), (1,))}, "prompts: expected at least one, and no two alike"),
        ({"prompts": ((1,), ())}, r"prompts\[1\]: expected tokens from 0 to 4, at least one"),
        ({"prompts": ((1,), (5,))}, r"prompts\[1\]: expected tokens from 0 to 4"),
        ({"horizon": 0}, "horizon: expected at least 1"),
        ({"vocabulary": 0}, "vocabulary: expected at least 1"),
        ({"end": (5,)}, "end: expected distinct tokens below 5"),
        ({"end": (1, 1)}, "end: expected distinct tokens below 5"),
        ({"end": (0, 1, 2, 3, 4)}, "end: expected at least one token that does not end"),
        ({"horizon": 16}, "horizon: expected a tree of at most 100000000 pairs, found"),
    ],
)
def test_a_malformed_tree_is_refused(change: dict[str, object], message: str) -> None:
    arguments = {"prompts": PROMPTS, "horizon": 3, "vocabulary": 5, "end": (4, 1)} | change
    with pytest.raises(tt.InvalidInputError, match=f"^{message}"):
        TokenTree(**arguments)  # type: ignore[arg-type]


def _broken(value: float) -> PreTrainedModel:
    model = language_model("llama", 0)
    with torch.no_grad():
        model.get_output_embeddings().weight[2] = value
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: language_model("llama", 0, vocabulary=6), "model: expected 5 logits, found 6"),
        (
            lambda: language_model("gpt2", 0, positions=4),
            "horizon: expected at most 4 positions, as the model has, found 5",
        ),
        (lambda: language_model("mamba", 0), "model: expected one that returns past_key_values"),
        (lambda: _broken(math.nan), "model: expected logits that are numbers"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(model, message: str) -> None:
    with pytest.raises(tt.InvalidInputError, match=f"^{message}"):
        TREE.logits(model())


def test_a_malformed_reward_or_reference_is_refused() -> None:
    logits = TREE.logits(language_model("llama", 0))
    with pytest.raises(tt.InvalidInputError, match=r"^reward: expected one number for each of 4 responses"):
        TREE.mdp(logits, lambda prompt, tokens: tokens.double(), beta=BETA)
    with pytest.raises(tt.InvalidInputError, match=r"^layers\[0\].reward\[0\]\[1\]: expected a finite number"):
        TREE.mdp(logits, lambda prompt, tokens: prompt * math.nan, beta=BETA)
    with pytest.raises(tt.InvalidInputError, match=r"^reference: expected logits of this tree"):
        TREE.mdp(logits[:2], reward, beta=BETA)


@pytest.mark.parametrize(
    ("prompts", "found", "message"),
    [
        ([], [], "responses: expected one for each of 0 prompts, at least one"),
        ([(2,)], [], "responses: expected one for each of 1 prompts"),
        ([(4,)], [(4,)], r"prompts\[0\]: expected one of the tree's, found \(4,\)"),
        ([(2,)], [()], r"responses\[0\]: expected 1 to 3 tokens"),
        ([(2,)], [(0, 0, 0, 0)], r"responses\[0\]: expected 1 to 3 tokens"),
        ([(2,)], [(0, 5)], r"responses\[0\]: expected 1 to 3 tokens from 0 to 4"),
        ([(2,), (2,)], [(4,), (4, 4)], r"responses\[1\]: expected an ending token at the end alone, found \(4, 4\)"),
        ([(2,)], [(0, 2)], r"responses\[0\]: expected an ending token at the end alone, found \(0, 2\)"),
    ],
)
def test_a_response_that_the_tree_does_not_hold_is_refused(prompts, found, message: str) -> None:
    with pytest.raises(tt.InvalidInputError, match=f"^{message}"):
        TREE.trajectories(prompts, found)
