"""Throughput of the parts that everything waits for, as ratios within one run where there is something to compare with.

* solve: small problems (H=4, S=6, A=3, dense) solved per second, in one batch; beside one at a time in a Python loop;
* backup: one soft Bellman backup of a dense layer, beside quantecon's hard one (ratio of medians, alternating);
* sample: trajectory steps drawn per second on FrozenLake 4×4 and on a token tree, and whole trajectories of a binary tree of depth 11
  in batches of 1,024;
* minimise: one Levenberg-Marquardt run on 4,096 trajectories;
* language model: a small Llama with 16 tokens and responses of up to 6 asked at each of 0.8 million prefixes, on the GPU if there is
  one, and the tree of 13 million state-action pairs built and solved.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import quantecon
import torch
import tyro
from rich.console import Console
from rich.table import Table
from timing import seconds
from transformers import LlamaConfig, LlamaForCausalLM

import tbrm_theory as tt
from tbrm_theory.dynamic_programming import soft_value
from tbrm_theory.llm.exact import TokenTree
from tbrm_theory.objectives import SampleObjective
from tbrm_theory.optimisers import levenberg_marquardt
from tbrm_theory.parametrisations import Tabular
from tbrm_theory.program import run_program
from tbrm_theory.trajectories import sample_trajectories
from tbrm_theory.transitions import DenseTransition


def solve_rows() -> list[tuple[str, str]]:
    batch, single = tt.make("dense-random", batch=20_000), tt.make("dense-random")
    together, alone = seconds(lambda: tt.solve(batch), lambda: tt.solve(single))
    return [
        ("problems solved per second, one batch of 20,000", f"{20_000 / together:,.0f}"),
        ("the same, one at a time", f"{1 / alone:,.0f}"),
        ("ratio", f"{20_000 * alone / together:,.0f}"),
    ]


def backup_rows() -> list[tuple[str, str]]:
    states, actions = 400, 4
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(states, actions, states, generator=generator, dtype=torch.float64)
    kernel = weight / weight.sum(-1, keepdim=True)
    reward = torch.rand(states, actions, generator=generator, dtype=torch.float64)
    layer = DenseTransition(kernel)
    problem = quantecon.markov.DiscreteDP(reward.numpy(), kernel.numpy(), 1.0 - 1e-12)
    v, v_hard = torch.zeros(states, dtype=torch.float64), np.zeros(states)
    soft, hard = seconds(
        lambda: [soft_value(reward + layer.expect(v)) for _ in range(100)],
        lambda: [problem.bellman_operator(v_hard) for _ in range(100)],
    )
    return [
        (f"soft backup of {states}×{actions} dense, beside quantecon's hard one", f"{soft / hard:.2f} times its time")
    ]


def sample_rows() -> list[tuple[str, str]]:
    rows = []
    for family, count in (("frozen-lake", 50_000), ("token-tree", 50_000)):
        mdp, generator = tt.make(family), torch.Generator().manual_seed(0)

        def draw(mdp: tt.RegularizedMDP = mdp, generator: torch.Generator = generator, count: int = count) -> object:
            return sample_trajectories(mdp, mdp.log_reference, count, generator)

        (taken,) = seconds(draw)
        rows.append((f"steps sampled per second, {family}", f"{count * mdp.horizon / taken:,.0f}"))
    tree = tt.make("token-tree", horizon=11, vocabulary=2, prompts=1)
    generator = torch.Generator().manual_seed(0)
    (taken,) = seconds(lambda: sample_trajectories(tree, tree.log_reference, 1024, generator), repeats=21)
    rows.append(("trajectories per second, binary tree of depth 11, 1,024 at once", f"{1024 / taken:,.0f}"))
    return rows


def minimise_rows() -> list[tuple[str, str]]:
    mdp = tt.make("deterministic-dag", horizon=8, states=10, actions=3)
    batch = sample_trajectories(mdp, mdp.log_reference, 4096, torch.Generator().manual_seed(0))
    objective, tabular = SampleObjective(mdp, batch), Tabular(mdp)
    start = tabular.initial(1, torch.Generator().manual_seed(0))
    iterations = levenberg_marquardt(objective, tabular, start).iterations
    (taken,) = seconds(lambda: levenberg_marquardt(objective, tabular, start))
    what = f"Levenberg-Marquardt, 4,096 trajectories × {tabular.size} logits, {iterations} steps"
    return [(what, f"{1000 * taken:.0f} ms")]


def language_model_rows() -> list[tuple[str, str]]:
    tree = TokenTree(((2, 3),), horizon=6, vocabulary=16, end=(1,))
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=tree.vocabulary, initializer_range=0.1, **shape))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = time.perf_counter()
    logits = tree.logits(model.to(device))
    asked = time.perf_counter()
    mdp = tree.mdp(logits, lambda prompt, tokens: (tokens[:, -1] == 1).double(), beta=0.35)
    solution = tt.solve(mdp)
    taken = time.perf_counter() - asked
    prefixes, pairs = sum(map(tree.unfinished, range(tree.horizon))), sum(table.numel() for table in logits)
    return [
        (f"prefixes of a Llama asked per second, {prefixes:,} of them, {device}", f"{prefixes / (asked - start):,.0f}"),
        (f"its tree of {pairs:,} pairs built and solved", f"{taken:.1f} s, certified: {solution.certified}"),
    ]


def main() -> int:
    """Measure all, which takes half a minute, and print a table."""
    table = Table("what", "measured", title=f"{torch.get_num_threads()} threads")
    for rows in (solve_rows, backup_rows, sample_rows, minimise_rows, language_model_rows):
        for row in rows():
            table.add_row(*row)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(run_program("bench", lambda: tyro.cli(main, description=__doc__)))
