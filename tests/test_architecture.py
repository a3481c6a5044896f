"""The layout of design.md, enforced: who may import whom, and what no module may contain.

Every check is a function from a package's source to a list of violations, so that each is also tried on a small
package with one planted violation: a check that finds nothing anywhere proves nothing.
"""

from __future__ import annotations

import ast
import graphlib
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "tbrm_theory"
ROOT = Path(__file__).parents[1] / PACKAGE

# A module may import from its own floor and from those below it. A subpackage has one floor for all its modules.
FLOORS = {
    "errors": 0,
    "json_fields": 0,
    "shapes": 0,
    "tables": 1,
    "transitions": 1,
    "mdp": 1,
    "mdp_checks": 1,
    "mdp_format": 1,
    "losses": 1,
    "statistics": 1,
    "instance": 2,
    "families": 2,
    "registry": 2,
    "random_tables": 2,
    "gymnasium_import": 2,
    "token_tasks": 2,
    "dynamic_programming": 2,
    "occupancy": 2,
    "behaviours": 2,
    "named_behaviours": 2,
    "trajectories": 2,
    "trajectory_files": 2,
    "endings": 2,
    "feasibility": 2,
    "sampling": 2,
    "random_families": 2,
    "verifiable_tasks": 2,
    "aggregates": 2,
    "consumption": 2,
    "laid_out": 3,
    "scores": 3,
    "population": 3,
    "coverage": 3,
    "rigor": 3,
    "moments": 3,
    "policy_class": 3,
    "feature_coverage": 3,
    "bounds": 3,
    "sample_bounds": 3,
    "control_variate": 3,
    "conditioning": 3,
    "parametrisations": 3,
    "objectives": 4,
    "expected_updates": 4,
    "fixed_points": 4,
    "optimisers": 4,
    "training": 4,
    "noise_cost": 4,
    "family_training": 4,
    "program": 1,
    "results": 4,
    "execution": 4,
    "experiment": 5,
    "claims": 5,
    "llm": 5,
    "evaluate": 6,
    "evaluation": 6,
    "cli": 6,
    "__main__": 6,
}

# The loss functions see tensors only, so that the toy problems and a language model provably share them.
PROBLEM_MODULES = {"mdp", "families", "dynamic_programming"}
PLAIN_TENSOR_MODULES = ("losses", "scores")

VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
LONGEST_FILE = 400

# Loading one runs whatever it says; checkpoints are safetensors and JSON.
CODE_CARRYING_FORMATS = {"pickle", "dill", "cloudpickle", "shelve", "marshal"}
# NumPy's ways to make an explicit generator; everything else in numpy.random draws from the global one.
NUMPY_GENERATORS = {"default_rng", "Generator", "BitGenerator", "SeedSequence", "PCG64", "Philox"}
TORCH_DRAWS = {"rand", "randn", "randint", "randperm", "normal", "multinomial", "bernoulli", "poisson"}
TORCH_DRAWS |= {"rand_like", "randn_like", "randint_like", "manual_seed", "seed"}
TENSOR_DRAWS = {"normal_", "uniform_", "exponential_", "bernoulli_", "random_", "cauchy_", "geometric_"}


@dataclass(frozen=True)
class Source:
    """A package's modules by dotted name within it: ``mdp``, ``claims``, ``claims.identities``; itself is ``""``."""

    text: dict[str, str]
    packages: frozenset[str]

    @classmethod
    def read(cls, root: Path) -> Source:
        text, packages = {}, set()
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            text[name] = path.read_text(encoding="utf-8")
            if parts[-1] == "__init__":
                packages.add(name)
        return cls(text, frozenset(packages))

    def nodes(self, module: str) -> Iterator[ast.AST]:
        return ast.walk(ast.parse(self.text[module], filename=module))

    def imports(self, module: str) -> set[str]:
        """The package's modules that a module imports anywhere: inside functions and for type checking too."""
        found: set[str] = set()
        for node in self.nodes(module):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = self._absolute(module, node)
                # What follows `import` may be a module or something that the module before it defines.
                names = [
                    full if full.removeprefix(f"{PACKAGE}.") in self.text else base
                    for full in (f"{base}.{alias.name}" for alias in node.names)
                ]
            else:
                continue
            inside = [name for name in names if f"{name}.".startswith(f"{PACKAGE}.")]
            found.update(name[len(PACKAGE) + 1 :] for name in inside)
        return found

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if node.level == 0:
            return node.module or ""
        here = [PACKAGE, *module.split(".")] if module else [PACKAGE]
        drop = node.level - (module in self.packages)
        return ".".join(here[: len(here) - drop] + ([node.module] if node.module else []))

    def graph(self) -> dict[str, set[str]]:
        """Imports of every module but the ``__init__`` files, which only gather the public names."""
        return {module: self.imports(module) for module in self.text if module not in self.packages}


def floor(module: str) -> int | None:
    return FLOORS.get(module.split(".")[0])


def modules_without_a_floor(source: Source) -> list[str]:
    return [
        f"{module}: not in FLOORS; add it to the table in tests/test_architecture.py, on the lowest floor that its"
        " subject belongs to"
        for module in source.text
        if module and floor(module) is None
    ]


def upward_imports(source: Source) -> list[str]:
    found = []
    for module, imported in source.graph().items():
        for other in sorted(imported):
            here, there = floor(module), floor(other)
            if other == "":
                found.append(f"{module} imports from the package itself; name the module that defines it")
            elif here is not None and there is not None and there > here:
                found.append(f"{module} (floor {here}) imports {other} (floor {there}): upwards")
    return found


def import_cycles(source: Source) -> list[str]:
    try:
        graphlib.TopologicalSorter(source.graph()).prepare()
    except graphlib.CycleError as error:
        return [" imports ".join(reversed(error.args[1]))]
    return []


def losses_that_know_the_problem(source: Source) -> list[str]:
    graph = {module: source.imports(module) for module in source.text if module}
    found = [
        f"{module} imports {other}"
        for module in graph
        if module.split(".")[0] in PLAIN_TENSOR_MODULES
        for other in sorted(graph[module] & PROBLEM_MODULES)
    ]
    reached: set[str] = set()
    frontier = [module for module in graph if module.split(".")[0] == "losses"]
    while frontier:
        new = graph.get(frontier.pop(), set()) - reached
        reached |= new
        frontier += new
    return found + [f"losses reaches {other} through its imports" for other in sorted(reached & PROBLEM_MODULES)]


def imports_of_the_language_model(source: Source) -> list[str]:
    return [
        f"{module} imports {other}; llm is optional, and nothing depends on it"
        for module in source.text
        if module.split(".")[0] != "llm"
        for other in sorted(source.imports(module))
        if other.split(".")[0] == "llm"
    ]


def vague_names(source: Source) -> list[str]:
    return [f"{module}: name it after its subject" for module in source.text if VAGUE_NAMES & {*module.split(".")}]


def long_files(source: Source) -> list[str]:
    lengths = {module: len(text.splitlines()) for module, text in source.text.items()}
    return [f"{module}: {n} lines, more than {LONGEST_FILE}" for module, n in lengths.items() if n > LONGEST_FILE]


def unsafe_loading(source: Source) -> list[str]:
    found = []
    for module in source.text:
        for node in source.nodes(module):
            found += [
                f"{module}: imports {name}, which runs code on loading"
                for name in outside_imports(node)
                if name.split(".")[0] in CODE_CARRYING_FORMATS
            ]
            if isinstance(node, ast.Call):
                options = {option.arg: ast.unparse(option.value) for option in node.keywords}
                if ast.unparse(node.func) == "joblib.load":
                    found.append(f"{module}:{node.lineno}: joblib.load runs code on loading")
                if ast.unparse(node.func) == "torch.load" and options.get("weights_only") != "True":
                    found.append(f"{module}:{node.lineno}: torch.load without weights_only=True")
                if options.get("allow_pickle", "False") != "False":
                    found.append(f"{module}:{node.lineno}: allow_pickle")
    return found


def global_randomness(source: Source) -> list[str]:
    found = []
    for module in source.text:
        for node in source.nodes(module):
            found += [f"{module}: imports random" for name in outside_imports(node) if name == "random"]
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in {"np.random", "numpy.random"}:
                if node.attr not in NUMPY_GENERATORS:
                    found.append(f"{module}:{node.lineno}: {ast.unparse(node)} uses NumPy's global state")
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                drawn = node.func.attr
                draws = drawn in TENSOR_DRAWS or (
                    drawn in TORCH_DRAWS and ast.unparse(node.func.value) in {"torch", "torch.random"}
                )
                if draws and "generator" not in {option.arg for option in node.keywords}:
                    found.append(f"{module}:{node.lineno}: {drawn} without a generator")
    return found


def outside_imports(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module and node.level == 0 else []


Check = Callable[[Source], list[str]]
CHECKS: list[Check] = [
    modules_without_a_floor,
    upward_imports,
    import_cycles,
    losses_that_know_the_problem,
    imports_of_the_language_model,
    vague_names,
    long_files,
    unsafe_loading,
    global_randomness,
]


@pytest.mark.parametrize("check", CHECKS)
def test_the_package_keeps_to_its_layout(check: Check) -> None:
    source = Source.read(ROOT)
    assert {"mdp", "losses", "scores"} <= source.text.keys()  # the checks have something to look at
    violations = check(source)
    assert not violations, "\n" + "\n".join(violations)


# One violation each, planted in a package that is clean otherwise: the check, the module, its text, part of the message.
PLANTED: list[tuple[Check, str, str, str]] = [
    (modules_without_a_floor, "novelty.py", "", "novelty: not in FLOORS"),
    (modules_without_a_floor, "extra/parts.py", "", "extra.parts: not in FLOORS"),
    (
        upward_imports,
        "mdp.py",
        "from tbrm_theory.training import fit",
        "mdp (floor 1) imports training (floor 4)",
    ),
    (upward_imports, "mdp.py", "import tbrm_theory.training", "imports training"),
    (upward_imports, "mdp.py", "from tbrm_theory import training", "imports training"),
    (upward_imports, "mdp.py", "from . import training", "imports training"),
    (upward_imports, "mdp.py", "from .training import fit", "imports training"),
    (upward_imports, "mdp.py", "def late():\n    from tbrm_theory.training import fit", "imports training"),
    (upward_imports, "mdp.py", "from tbrm_theory.claims.one import x", "imports claims.one (floor 5)"),
    (upward_imports, "claims/one.py", "from ..cli import main", "claims.one (floor 5) imports cli (floor 6)"),
    (upward_imports, "cli.py", "from tbrm_theory import solve", "imports from the package itself"),
    (upward_imports, "cli.py", "import tbrm_theory as tt", "imports from the package itself"),
    (import_cycles, "tables.py", "from tbrm_theory.mdp import load", "tables"),
    (losses_that_know_the_problem, "losses/group.py", "from tbrm_theory.mdp import load", "losses.group imports mdp"),
    (losses_that_know_the_problem, "losses/group.py", "from tbrm_theory.occupancy import x", "losses reaches mdp"),
    (losses_that_know_the_problem, "losses/__init__.py", "from tbrm_theory.occupancy import x", "losses reaches mdp"),
    (
        losses_that_know_the_problem,
        "scores.py",
        "from tbrm_theory import families",
        "scores imports families",
    ),
    (
        imports_of_the_language_model,
        "cli.py",
        "from tbrm_theory.llm.trainer import t",
        "cli imports llm.trainer",
    ),
    (imports_of_the_language_model, "__init__.py", "from tbrm_theory import llm", "imports llm"),
    (vague_names, "claims/helpers.py", "", "claims.helpers: name it"),
    (long_files, "mdp.py", "x = 0\n" * 401, "mdp: 401 lines"),
    (unsafe_loading, "training.py", "import pickle", "imports pickle"),
    (unsafe_loading, "training.py", "from pickle import loads", "imports pickle"),
    (unsafe_loading, "training.py", "joblib.load('x')", "training:1: joblib.load"),
    (unsafe_loading, "training.py", "import torch\ntorch.load('x')", "training:2: torch.load without"),
    (unsafe_loading, "training.py", "torch.load('x', weights_only=False)", "torch.load without"),
    (unsafe_loading, "training.py", "np.load('x', allow_pickle=True)", "allow_pickle"),
    (global_randomness, "training.py", "import random", "imports random"),
    (global_randomness, "training.py", "np.random.normal()", "np.random.normal uses"),
    (global_randomness, "training.py", "torch.manual_seed(0)", "manual_seed without"),
    (global_randomness, "training.py", "torch.randn(3)", "randn without"),
    (global_randomness, "training.py", "weights.uniform_(0, 1)", "uniform_ without"),
]

CLEAN = {
    "__init__.py": "from tbrm_theory.training import fit",
    "errors.py": "",
    "tables.py": "from tbrm_theory.errors import Wrong",
    "mdp.py": "from tbrm_theory.tables import rows",
    "losses/__init__.py": "from tbrm_theory.losses.group import x",
    "losses/group.py": "from tbrm_theory.errors import Wrong",
    "families.py": "from tbrm_theory.mdp import load",
    "occupancy.py": "from tbrm_theory.mdp import load",
    "scores.py": "from tbrm_theory import losses",
    "training.py": """
        import numpy as np, torch
        from . import scores
        rng = np.random.default_rng(0)
        torch.randn(3, generator=torch.Generator().manual_seed(0))
        torch.load("x", weights_only=True)
    """,
    "claims/__init__.py": "from tbrm_theory.claims.one import x",
    "claims/one.py": "from ..training import fit",
    "llm/__init__.py": "",
    "llm/trainer.py": "from tbrm_theory.llm import trainer_state",
    "llm/trainer_state.py": "",
    "cli.py": "from tbrm_theory.claims import one",
}


def written(root: Path, files: dict[str, str]) -> Source:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
    return Source.read(root)


@pytest.mark.parametrize("check", CHECKS)
def test_a_clean_package_passes(check: Check, tmp_path: Path) -> None:
    assert check(written(tmp_path, CLEAN)) == []


@pytest.mark.parametrize(("check", "name", "text", "message"), PLANTED)
def test_a_planted_violation_is_found(check: Check, name: str, text: str, message: str, tmp_path: Path) -> None:
    violations = check(written(tmp_path, CLEAN | {name: text}))
    assert len(violations) >= 1
    assert message in "\n".join(violations)


def test_every_check_is_tried_on_a_planted_violation() -> None:
    assert {check for check, *_ in PLANTED} == set(CHECKS)
