"""Does TBRMTrainer bring a real transformer to its exact optimum: on-policy, off-policy, with replay?

A small Llama made in code answers short prompts. Its whole tree of responses is solved (`tbrm_theory/llm/exact.py`), so the exact
optimum against this very reference is known, and every policy on the way is judged by its exact `J_β`. Training sees sampled
responses and their rewards, one for each prompt (n = 1), and nothing of the tree. The task: write digits, as many as you like, and
stop; the answer is the last digit before the end, and right if it is even or odd as the prompt's last digit is. Only the finished
response is paid, 1 or 0; one that runs into the horizon gets 0. A prompt is digits and `=`: without that mark "1" answered by "3"
and "13" not answered yet are one text, and with rotary positions "1" and "11" are alike too, attention averaging equal values;
such states share their logits, and an optimum that tells them apart is out of reach.

Parts, each recorded when it is complete, and taken up again inside from the trainer's checkpoint:

* `tree`: the tree of the initial model, its optimum, the coverage of its own samples;
* `on-policy`, `off-policy` (all samples are the initial model's, none the trained one's), `replay` (K = 2: every second update draws
  from the last rollouts, first in first out): three runs of `TBRMTrainer`, each from the initial model;
* `table/…`: the same with one logit for each pair of the same tree in place of the transformer, from the same start, with the same
  loss function (off-policy: the exact expectation over the initial model's responses).

summary.json: `vocabulary`, `horizon`, `prompts`, `parameters`, `pairs` (state-action pairs of the tree), `optimum` (`J_β*`),
`initial_regret` (`J_β* - J_β(π_ref)`, reward units; the reward's range is 1), `early_end` (probability of ending before the horizon,
under the reference and the optimum), `samples` (responses drawn in the three runs together), `regret_fraction_on_policy`,
`regret_fraction_off_policy`, `regret_fraction_replay` (final exact regret over `initial_regret`), `table_fraction` (the same of the
tables), `kappa` (of the optimum under the reference's samples), `certificate` (B5 of each final model with the reference's samples
as the data, over `initial_regret`), `unexpected`, `verdict`, `seconds` (of all parts; a part that was interrupted counts since it was
taken up again). Exit status 1 if a fraction exceeds `target`, the gap is below 20 % of the reward's range, no response ends early, or
a certificate is below the regret that it bounds.
"""

from __future__ import annotations

import sys
import time
import warnings
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from datasets import Dataset
from exact_task import Config, Problem
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar

import tbrm_theory as tt
from tbrm_theory.behaviours import MarkovBehaviour
from tbrm_theory.bounds import theorem2
from tbrm_theory.coverage import kappa
from tbrm_theory.experiment import run_experiment
from tbrm_theory.llm.trainer import TBRMConfig, TBRMTrainer
from tbrm_theory.llm.trainer_state import last_checkpoint
from tbrm_theory.mdp import RegularizedMDP
from tbrm_theory.objectives import PopulationObjective
from tbrm_theory.occupancy import occupancy
from tbrm_theory.parametrisations import Tabular
from tbrm_theory.program import run_program
from tbrm_theory.results import Run
from tbrm_theory.shapes import PerLayerStateAction
from tbrm_theory.training import FitConfig, fit

PHASES = ("on-policy", "off-policy", "replay")
LEAST_GAP = 0.2


# -- the parts -----------------------------------------------------------------------------------------------------


def timed(part: Any) -> dict[str, Any]:
    started = time.perf_counter()
    return part() | {"seconds": round(time.perf_counter() - started, 2)}


def solve_tree(problem: Problem) -> dict[str, Any]:
    """What is known exactly before any training."""
    mdp, solution = problem.mdp, problem.solution

    def early_end(log_policy: PerLayerStateAction) -> float:
        """The mass of the absorbing state of the last layer."""
        return occupancy(mdp, log_policy).state[-1][-1].item()

    return {
        "vocabulary": problem.tree.vocabulary,
        "horizon": mdp.horizon,
        "prompts": len(problem.tree.prompts),
        "parameters": problem.model().num_parameters(),
        "pairs": sum(table.numel() for table in mdp.reference),
        "optimum": solution.objective.item(),
        "certified": solution.certified,
        "initial_regret": tt.regret(mdp, mdp.log_reference, solution=solution).item(),
        "early_end": [early_end(mdp.log_reference), early_end(solution.log_policy)],
        "kappa": kappa(mdp, solution.log_policy, mdp.log_reference).item(),
    }


class ExactRegret(TrainerCallback):
    """Writes the exact regret into the trainer's log, which its checkpoints keep; the model is only looked at."""

    def __init__(self, problem: Problem, every: int) -> None:
        self.problem, self.every = problem, every

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._write(state, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._write(state, kwargs["model"])

    def _write(self, state: Any, model: PreTrainedModel) -> None:
        state.log_history.append({"step": state.global_step, "exact_regret": self.problem.regret(model)})


def train(problem: Problem, phase: str, folder: Path) -> dict[str, Any]:
    """One run of the trainer from the initial model, or from its last checkpoint in ``folder``."""
    config = problem.config
    every = max(1, config.steps // config.evaluations)
    replay: dict[str, Any] = (
        {"replay_capacity": config.replay_capacity, "num_iterations": 2} if phase == "replay" else {}
    )
    settings = TBRMConfig(
        output_dir=str(folder),
        beta=config.beta,
        behaviour="reference" if phase == "off-policy" else "policy",
        num_generations=1,
        max_completion_length=config.horizon,
        per_device_train_batch_size=config.batch_size,
        max_steps=config.steps,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        lr_scheduler_type="linear",
        adam_beta2=config.adam_beta2,
        max_grad_norm=0.0,
        shuffle_dataset=False,
        seed=config.seed,
        logging_steps=every,
        save_steps=config.checkpoint_every,
        save_total_limit=2,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        report_to="none",
        **replay,
    )
    batches = config.steps // settings.num_iterations + 1
    prompts = [problem.texts[i % len(problem.texts)] for i in range(batches * config.batch_size)]
    trainer = TBRMTrainer(
        problem.model(),
        problem.score,
        settings,
        Dataset.from_dict({"prompt": prompts}),
        processing_class=problem.tokenizer,
        callbacks=[ExactRegret(problem, every)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder, before=config.steps))
    log = trainer.state.log_history
    regrets = [row for row in log if "exact_regret" in row]
    losses = [row for row in log if "loss" in row]
    logits = problem.tree.logits(trainer.model)
    return {
        "step": [row["step"] for row in regrets],
        "regret": [row["exact_regret"] for row in regrets],
        "loss_step": [row["step"] for row in losses],
        "loss": [row["loss"] for row in losses],
        "samples": config.batch_size * -(-config.steps // settings.num_iterations),
        "kappa": kappa(problem.mdp, problem.tree.log_policy_of(logits), problem.mdp.log_reference).item(),
        "certificate": theorem2(problem.mdp, logits, problem.mdp.log_reference, solution=problem.solution).item(),
    }


class TabularFromModel(Tabular):
    """One logit for each pair, beginning with those of the initial model."""

    def __init__(self, mdp: RegularizedMDP, logits: PerLayerStateAction) -> None:
        super().__init__(mdp)
        self._start = self.parameters(logits)

    def initial(self, seeds: int, generator: torch.Generator, *, scale: float = 1.0) -> Tensor:
        return self._start.expand(seeds, -1).clone()


def train_table(problem: Problem, phase: str) -> dict[str, Any]:
    """The tabular result beside it: as many steps and responses, the same loss function, the same start."""
    config, mdp = problem.config, problem.mdp
    settings = FitConfig(
        mode={"on-policy": "online", "off-policy": "population", "replay": "replay"}[phase],  # type: ignore[arg-type]
        steps=config.steps,
        learning_rate=config.table_learning_rate,
        seeds=1,
        seed=config.seed,
        batch_size=config.batch_size,
        replay_capacity=config.replay_capacity,
        evaluations=config.evaluations,
    )
    objective = PopulationObjective(mdp, MarkovBehaviour(mdp.log_reference)) if phase == "off-policy" else None
    _, history = fit(mdp, TabularFromModel(mdp, problem.initial_logits), settings, objective=objective)
    return {
        "step": history.step,
        "regret": [row[0] for row in history.regret],
        "loss": [row[0] for row in history.loss],
    }


# -- the summary ---------------------------------------------------------------------------------------------------


def summarise(target: float, rows: list[dict[str, Any]], _: float) -> dict[str, Any]:
    """The headline numbers; keys are explained in ``--help``."""
    by_part = {row["cell"]: row for row in rows}
    tree = by_part["tree"]
    initial = tree["initial_regret"]
    fraction = {phase: by_part[phase]["regret"][-1] / initial for phase in PHASES}
    certificate = {phase: by_part[phase]["certificate"] / initial for phase in PHASES}
    bad = [f"{phase}: {value:.2%} of the regret left" for phase, value in fraction.items() if not value <= target]
    bad += [f"{phase}: certificate below the regret" for phase in PHASES if certificate[phase] < fraction[phase]]
    if not tree["certified"]:
        bad.append("the solution of the tree is not certified")
    if initial < LEAST_GAP:
        bad.append(f"the initial regret is {initial:.1%} of the reward's range")
    if not min(tree["early_end"]) > 0:
        bad.append("no response ends early")
    described = (
        "vocabulary",
        "horizon",
        "prompts",
        "parameters",
        "pairs",
        "optimum",
        "initial_regret",
        "early_end",
        "kappa",
    )
    return {
        **{name: tree[name] for name in described},
        "samples": sum(by_part[phase]["samples"] for phase in PHASES),
        **{f"regret_fraction_{phase.replace('-', '_')}": value for phase, value in fraction.items()},
        "table_fraction": {phase: by_part[f"table/{phase}"]["regret"][-1] / initial for phase in PHASES},
        "certificate": certificate,
        "unexpected": bad,
        "verdict": "as predicted" if not bad else "NOT as predicted",
        "seconds": round(sum(row["seconds"] for row in rows), 1),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """One line a run; regrets in reward units."""
    view = Table("run", "initial regret", "final regret", "share left", "seconds")
    for row in rows:
        if "regret" in row:
            first, last = row["regret"][0], row["regret"][-1]
            view.add_row(row["cell"], f"{first:.4f}", f"{last:.6f}", f"{last / first:.2%}", f"{row['seconds']:.1f}")
    return view


def main(config: Config) -> int:
    disable_progress_bar()  # type: ignore[no-untyped-call]  # of transformers' own files; the parts have theirs
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # what TRL asks of it
    problem = Problem(config)
    settings = {key: value for key, value in asdict(config).items() if key != "results"}
    folder = Run.open("exact_cpu", settings, root=config.results).folder  # the very run that is recorded below
    parts: dict[str, Any] = {"tree": partial(solve_tree, problem)}
    parts |= {phase: partial(train, problem, phase, folder / "checkpoints" / phase) for phase in PHASES}
    parts |= {f"table/{phase}": partial(train_table, problem, phase) for phase in PHASES}
    return run_experiment(
        "exact_cpu",
        config,
        {name: partial(timed, part) for name, part in parts.items()},
        partial(summarise, config.target),
        lambda rows, _: [table(rows)],
    )


if __name__ == "__main__":
    sys.exit(run_program("exact_transformer", lambda: main(tyro.cli(Config, description=__doc__))))
