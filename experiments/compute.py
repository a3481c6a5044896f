"""What one update of each method costs, measured while it runs on a small transformer (torch.nn, float32, on the CPU).

Every method of `LOSSES` makes one update on the same number of tokens: prompts with `n` = 1 and with 4 responses each, trajectories
equal in number. What a loss reads is found by changing its scores one at a time; what gives those scores is its definition:

* `policy` (trained): log-probabilities, values and entropies of one pass; the sampler's log-probabilities are those of the same pass,
  held constant (one update per batch; a trainer that recomputes them pays one more evaluation without gradient);
* `reference` (frozen copy), for `log_reference` and V_ref(s_1): a pass; `target` (frozen copy), for frozen values: a pass over
  everything (soft Q-learning) or over the prompts (iterative TBRM);
* `critic` (trained, PCL and PPO): a transformer of the policy's size with one output, over everything; `partition` and `baseline`
  (trained; trajectory balance, DRO): the same over each prompt once. A*-PO's baseline is a number computed before training.

Counted, not declared: evaluations and tokens of each model by forward hooks, backward passes by hooks on its output, floating-point
operations of matrix products by `torch.utils.flop_counter`, bytes kept for the backward pass by `saved_tensors_hooks` (each storage
once, parameters left out; the peak), bytes of parameters, gradients and Adam's moments. Generation is left out: it costs the same for
all per token. Two peaks: `saved`, when one backward pass goes through all trained models, and `saved_in_turn`, when they are updated
one after another.

summary.json: `cost` (by method, at the smallest `n` for which it is defined: that `n`, evaluations, backward passes, models beside
policy and reference, and relative to TBRM: operations, memory, memory in turn), `table2` (by method, as `tbrm_theory.consumption`
measures it: single rollout, single model, trajectory reward; [Y] Table 2; A*-PO's baseline needs rollouts of the reference, so it is
no single model), `undefined_at_one` (methods that refuse n = 1), `cheaper_than_tbrm` (fewer operations), `ppo_operations` (PPO over
TBRM, n = 1; [Y] measures 1.3 for the time of a step, generation included), `ppo_held`, `ppo_saved`, `ppo_saved_in_turn` (shares by
which TBRM's bytes lie below PPO's), `ppo_memory`, `ppo_memory_in_turn` (the same of the sum; [Y] measures 0.333 of all GPU memory),
`grpo_same_prompts` (operations of GRPO with four responses over TBRM with one, same prompts; [Y] measures 3.1 for time),
`unexpected`, `verdict`, `seconds`. Exit status 1 if a loss reads other scores than `LOSSES` says, the policy is not evaluated once
and differentiated once, TBRM needs a model beside policy and reference, a method without groups refuses n = 1 or one
with groups does not, PPO needs less than 3/2 or more than 7/4 of TBRM's operations (7/4 if a critic had a head as large as the
vocabulary), or TBRM does not save a third of the bytes that PPO holds.
"""

from __future__ import annotations

import os
import signal
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # Ctrl-C while packages load, which some of them do not survive
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import torch
import tyro
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import tbrm_theory as tt
from tbrm_theory.consumption import consumed, consumption
from tbrm_theory.execution import Execution
from tbrm_theory.experiment import run_experiment
from tbrm_theory.losses import LOSSES, Loss, TrajectoryScores
from tbrm_theory.program import run_program
from tbrm_theory.random_tables import seeded

BETA = 0.5
FROZEN = ("reference", "target")
PAPER_MEMORY_SAVING = 1 / 3


@dataclass(frozen=True)
class Config:
    """Sizes of the transformer and of a batch."""

    vocabulary: int = 512
    width: int = 128
    heads: int = 4
    blocks: int = 4
    prompt: int = 32
    """Tokens of a prompt."""
    response: int = 96
    """Tokens of a response."""
    trajectories: int = 8
    """Responses of an update."""
    rollouts: tuple[int, ...] = (1, 4)
    """Responses to one prompt."""
    seed: int = 0
    results: Path = Path("results")
    execution: tyro.conf.OmitArgPrefixes[Execution] = field(default_factory=Execution)


# -- the model -------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Causal self-attention and a perceptron, each behind a norm and around a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mixed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.mixed(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        score = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(later, -torch.inf)
        x = x + self.out((score.softmax(-1) @ value).transpose(1, 2).flatten(-2))
        return x + self.perceptron(self.norms[1](x))


class Transformer(nn.Module):
    """Tokens ``(N, T)`` to ``outputs`` numbers for each, ``(N, T, outputs)``."""

    def __init__(self, config: Config, outputs: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Parameter(torch.empty(config.prompt + config.response, config.width))
        self.blocks = nn.Sequential(*(Block(config.width, config.heads) for _ in range(config.blocks)))
        self.head = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, outputs, bias=False))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.tokens(tokens) + self.positions[: tokens.shape[1]]))


def transformer(config: Config, outputs: int, *, trained: bool) -> Transformer:
    """One with random parameters; equal arguments, equal parameters."""
    with torch.device("meta"):  # no draw from the global generator
        model = Transformer(config, outputs)
    model.to_empty(device="cpu")
    generator = seeded(config.seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05, generator=generator)
        parameter.requires_grad_(trained)
    return model


# -- the instruments -------------------------------------------------------------------------------------------------


@dataclass
class Meter:
    """Counts what goes through the models that it watches, and what is kept for their backward passes."""

    evaluations: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    backward: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    """Bytes kept at the worst moment, for all models together."""
    peaks: Counter[str] = field(default_factory=Counter)
    """The same of each model alone."""
    _kept: Counter[int] = field(default_factory=Counter)
    _now: Counter[str] = field(default_factory=Counter)
    _model: str = ""

    def watch(self, name: str, model: nn.Module) -> None:
        def before(*_: Any) -> None:
            self._model = name  # and what is computed from its output is its own, too

        def after(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            self.evaluations[name] += 1
            self.tokens[name] += arguments[0].numel()
            if output.requires_grad:
                output.register_hook(lambda _: self.backward.update([name]))

        model.register_forward_pre_hook(before)
        model.register_forward_hook(after)

    @contextmanager
    def keeping(self, models: dict[str, Transformer]) -> Iterator[None]:
        """Counts the bytes of tensors kept for backward passes, but parameters, which are there anyway."""
        parameters = {p.untyped_storage().data_ptr() for model in models.values() for p in model.parameters()}

        def pack(tensor: Tensor) -> Kept:
            storage = tensor.untyped_storage()
            kept = Kept(tensor.detach())
            if storage.data_ptr() not in parameters:
                self._keep(storage.data_ptr(), storage.nbytes(), kept)
            return kept

        with saved_tensors_hooks(pack, lambda kept: kept.tensor):
            yield

    def _keep(self, address: int, size: int, kept: Kept) -> None:
        model = self._model

        def let_go() -> None:
            self._kept[address] -= 1
            if self._kept[address] == 0:
                self._now[model] -= size

        if self._kept[address] == 0:
            self._now[model] += size
        self._kept[address] += 1
        weakref.finalize(kept, let_go)
        self.peak = max(self.peak, self._now.total())
        self.peaks[model] = max(self.peaks[model], self._now[model])


@dataclass(eq=False)
class Kept:
    """A tensor in the hands of autograd."""

    tensor: Tensor


# -- one update ------------------------------------------------------------------------------------------------------


class Update:
    """The models of one method, and one update of them."""

    def __init__(self, loss: Loss, reads: list[str], rollouts: int, config: Config) -> None:
        self.loss, self.reads, self.rollouts, self.config = loss, set(reads), rollouts, config
        needed = {"policy"}
        needed |= {"reference"} if self.reads & {"log_reference", "reference_initial_value"} else set()
        needed |= {"target"} if self.reads & {"frozen_value", "frozen_initial_value"} else set()
        needed |= {"critic"} & self.reads
        needed |= {"partition"} if "log_partition" in self.reads else set()
        needed |= {"baseline"} & self.reads if loss.name == "dro" else set()
        outputs = {name: config.vocabulary if name in ("policy", *FROZEN) else 1 for name in sorted(needed)}
        self.models = {name: transformer(config, size, trained=name not in FROZEN) for name, size in outputs.items()}

    def loss_of(self, prompts: Tensor, responses: Tensor) -> Tensor:
        """``prompts`` ``(P, prompt)`` and ``responses`` ``(P n, response)`` to the loss."""
        repeated = prompts.repeat_interleave(self.rollouts, 0)
        tokens, first = torch.cat([repeated, responses], 1)[:, :-1], prompts.shape[1] - 1
        outcome = torch.linspace(0, 1, len(responses))
        given: dict[str, Tensor] = {
            "trajectory_return": outcome,
            "reward": torch.nn.functional.pad(outcome.unsqueeze(-1), (responses.shape[1] - 1, 0)),
            "log_reference": torch.zeros(responses.shape),
            "initial_value": torch.zeros(len(responses)),
            "mask": torch.ones(responses.shape, dtype=torch.bool),
        }

        def taken(logits: Tensor) -> Tensor:
            return logits.log_softmax(-1).gather(-1, responses.unsqueeze(-1)).squeeze(-1)

        def of_prompts(name: str) -> Tensor:
            return self.models[name](prompts)[:, -1].repeat_interleave(self.rollouts, 0)

        for name, score in (("partition", "log_partition"), ("baseline", "baseline")):
            if name in self.models:
                given[score] = of_prompts(name).squeeze(-1)
        if "critic" in self.models:
            given["critic"] = self.models["critic"](tokens)[:, first:].squeeze(-1)
        with torch.no_grad():
            if "reference" in self.models:
                logits = self.models["reference"](tokens)[:, first:]
                given |= {"log_reference": taken(logits), "reference_initial_value": logits[:, 0].logsumexp(-1)}
            if "frozen_value" in self.reads:
                given["frozen_value"] = self.models["target"](tokens)[:, first:].logsumexp(-1)
            if "frozen_initial_value" in self.reads:
                given["frozen_initial_value"] = of_prompts("target").logsumexp(-1)
            if "baseline" in self.reads:
                given.setdefault("baseline", torch.zeros(len(responses)))
        logits = self.models["policy"](tokens)[:, first:]
        given["log_policy"] = taken(logits)
        given["behaviour_log_policy"] = given["log_policy"].detach()
        if self.reads & {"initial_value", "first_logit"}:
            first_logits = logits[:, 0].clone()  # a view would be kept with all of the logits
            given["initial_value"] = first_logits.logsumexp(-1)
            given["first_logit"] = first_logits.gather(-1, responses[:, :1]).squeeze(-1)
        if "value" in self.reads:
            given["value"] = logits.logsumexp(-1)
        if "entropy" in self.reads:
            log_policy = logits.log_softmax(-1)
            given["entropy"] = -(log_policy.exp() * log_policy).sum(-1)
        options = {"group_size": self.rollouts} if self.loss.needs_group else {}
        return self.loss.function(TrajectoryScores(**given), beta=BETA, **options)


def run_cell(name: str, rollouts: int, config: Config) -> dict[str, Any]:
    """Everything measured of one update."""
    loss = LOSSES[name]
    reads = sorted(consumed(loss))
    row = {"method": name, "rollouts": rollouts, "consumed": reads}
    update, meter = Update(loss, reads, rollouts, config), Meter()
    for role, model in update.models.items():
        meter.watch(role, model)
    trained = [p for model in update.models.values() for p in model.parameters() if p.requires_grad]
    optimiser, generator = torch.optim.Adam(trained), seeded(config.seed)
    prompts, responses = (
        torch.randint(config.vocabulary, size, generator=generator)
        for size in ((config.trajectories // rollouts, config.prompt), (config.trajectories, config.response))
    )
    with FlopCounterMode(display=False) as operations:
        try:
            with meter.keeping(update.models):
                value = update.loss_of(prompts, responses)
        except tt.InvalidInputError as error:
            return row | {"refused": str(error)}
        value.backward()
        optimiser.step()
    parameters = [p for model in update.models.values() for p in model.parameters()]
    moments = [t for state in optimiser.state.values() for t in state.values() if t.dim() > 0]
    gradients = [p.grad for p in trained if p.grad is not None]
    return row | {
        "evaluations": dict(meter.evaluations),
        "tokens": dict(meter.tokens),
        "backward": dict(meter.backward),
        "operations": operations.get_total_flops(),
        "saved": meter.peak,
        "saved_in_turn": max(meter.peaks.values()),
        "held": sum(t.nbytes for t in (*parameters, *gradients, *moments)),
    }


# -- what it says ----------------------------------------------------------------------------------------------------


def extra_models(row: dict[str, Any]) -> list[str]:
    return sorted(set(row["evaluations"]) - {"policy", "reference"})


def memory(row: dict[str, Any], *, in_turn: bool = False) -> int:
    return row["held"] + row["saved_in_turn" if in_turn else "saved"]


def unexpected(rows: list[dict[str, Any]]) -> list[str]:
    """What contradicts the predictions."""
    found = []
    for row in rows:
        loss = LOSSES[row["method"]]
        if set(row["consumed"]) != set(loss.fields):
            found.append(f"{row['cell']}: reads {row['consumed']}")
        if "refused" in row:
            if row["rollouts"] > 1 or not loss.needs_group:
                found.append(f"{row['cell']}: {row['refused']}")
        elif row["rollouts"] == 1 and loss.needs_group:
            found.append(f"{row['cell']}: a group of one")
        elif (row["evaluations"]["policy"], row["backward"]["policy"]) != (1, 1):
            found.append(f"{row['cell']}: passes of the policy")
        elif row["method"] == "tbrm" and row["evaluations"] != {"policy": 1, "reference": 1}:
            found.append(f"{row['cell']}: {row['evaluations']}")
    return found


def summarise(rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The headline numbers; keys are explained in ``--help``."""
    defined = {(row["method"], row["rollouts"]): row for row in rows if "refused" not in row}
    smallest = {method: defined[method, min(n for m, n in defined if m == method)] for method, _ in defined}
    tbrm, ppo = smallest["tbrm"], smallest["ppo"]
    cost = {
        method: {
            "rollouts": row["rollouts"],
            "evaluations": sum(row["evaluations"].values()),
            "backward": sum(row["backward"].values()),
            "extra_models": extra_models(row),
            "operations": round(row["operations"] / tbrm["operations"], 4),
            "memory": round(memory(row) / memory(tbrm), 4),
            "memory_in_turn": round(memory(row, in_turn=True) / memory(tbrm, in_turn=True), 4),
        }
        for method, row in smallest.items()
    }
    table2 = {
        method: {
            "single_rollout": measured.single_rollout,
            "single_model": measured.single_model,
            "trajectory_reward": measured.trajectory_reward,
        }
        for method, measured in ((method, consumption(method)) for method in smallest)
    }
    bad = unexpected(rows)
    if not 1.5 <= cost["ppo"]["operations"] <= 1.75:
        bad.append(f"operations of PPO: {cost['ppo']['operations']}")
    if 1 - tbrm["held"] / ppo["held"] < PAPER_MEMORY_SAVING:
        bad.append("bytes held")
    many = max(row["rollouts"] for row in rows)
    grpo = defined["grpo", many]["operations"] * many / tbrm["operations"]
    return {
        "cost": cost,
        "table2": table2,
        "undefined_at_one": sorted({row["method"] for row in rows if "refused" in row and row["rollouts"] == 1}),
        "cheaper_than_tbrm": sorted(method for method, entry in cost.items() if entry["operations"] < 1),
        "ppo_operations": cost["ppo"]["operations"],
        **{f"ppo_{key}": round(1 - tbrm[key] / ppo[key], 4) for key in ("held", "saved", "saved_in_turn")},
        "ppo_memory": round(1 - memory(tbrm) / memory(ppo), 4),
        "ppo_memory_in_turn": round(1 - memory(tbrm, in_turn=True) / memory(ppo, in_turn=True), 4),
        "grpo_same_prompts": round(grpo, 4),
        "unexpected": bad,
        "verdict": "as predicted" if not bad else "NOT as predicted",
        "seconds": round(seconds, 1),
    }


def table(summary: dict[str, Any]) -> Table:
    """One row for each method."""
    view = Table(
        "method", "n", "evaluations", "backward", "extra models", "operations / TBRM", "memory / TBRM", "in turn"
    )
    for method, cost in summary["cost"].items():
        numbers = (cost["rollouts"], cost["evaluations"], cost["backward"], ", ".join(cost["extra_models"]) or "none")
        ratios = (cost["operations"], cost["memory"], cost["memory_in_turn"])
        view.add_row(method, *map(str, numbers), *(f"{ratio:.2f}" for ratio in ratios))
    return view


def main(config: Config) -> int:
    if 1 not in config.rollouts or any(n < 1 or config.trajectories % n for n in config.rollouts):
        raise tt.InvalidInputError(
            "rollouts", f"expected 1 and divisors of {config.trajectories}, found {config.rollouts}"
        )
    cells = {f"{m}/{n}": partial(run_cell, m, n, config) for m, n in product(LOSSES, config.rollouts)}
    tables = ("cost", "table2")
    return run_experiment(
        "compute",
        config,
        cells,
        summarise,
        lambda _, summary: [table(summary)],
        in_tables=tables,
        execution=config.execution,
    )


if __name__ == "__main__":
    sys.exit(run_program("compute", lambda: main(tyro.cli(Config, description=__doc__))))
