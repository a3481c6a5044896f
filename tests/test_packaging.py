"""The wheel holds the typed package and nothing else, works from elsewhere, and what is pinned is what is asked for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPOSITORY = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run(command: Sequence[str | Path], cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed, run where the repository is out of sight."""
    # Neither the coverage of a copy that is about to vanish, nor paths that would lead back to the repository.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("COV", "PYTHON"))}
    done = subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since a build leaves its products beside the source; with the installed setuptools, so offline."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    # With the neighbours that must stay out of the wheel.
    for name in ("tbrm_theory", "tests", "experiments", "paper_figs"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "out", "data"))
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source], cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_the_whole_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata_name,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(metadata_name).decode("utf-8"))
    assert {name.split("/")[0] for name in names} == {"tbrm_theory", metadata_name.split("/")[0]}
    files = {name for name in names if name.startswith("tbrm_theory/")}
    assert files == {
        path.relative_to(REPOSITORY).as_posix()
        for path in (REPOSITORY / "tbrm_theory").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "tbrm_theory/py.typed" in files
    assert metadata["Name"] == "tbrm-theory"
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.11"


@pytest.mark.slow
def test_the_installed_wheel_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip: list[str | Path] = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    run([*pip, "--target", site, wheel], cwd=elsewhere)
    program = """
import importlib.metadata, tbrm_theory
(script,) = importlib.metadata.distribution("tbrm-theory").entry_points.select(group="console_scripts")
print(tbrm_theory.__file__, importlib.metadata.version("tbrm-theory"), script.name, callable(script.load()), sep="\\n")
"""
    printed = run([sys.executable, "-W", "error", "-c", program], cwd=elsewhere, PYTHONPATH=str(site))
    where, version, script, loads = printed.splitlines()
    assert Path(where) == site / "tbrm_theory" / "__init__.py"
    assert (version, script, loads) == (PROJECT["version"], "tbrm", "True")


def pins() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    exact = [re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9a-z.]*)", line) for line in lines if not line.startswith("#")]
    assert all(exact), "constraints.txt: expected name==version on every line: no range, no local version, no address"
    return {canonicalize_name(match[1]): match[2] for match in exact if match}


def test_every_requirement_is_pinned_inside_its_range() -> None:
    pinned = pins()
    asked = PROJECT["dependencies"] + [r for extra in PROJECT["optional-dependencies"].values() for r in extra]
    assert len(asked) > 10
    for requirement in map(Requirement, asked):
        version = pinned[canonicalize_name(requirement.name)]
        assert Version(version) in requirement.specifier, f"{requirement} excludes the pinned {version}"


def test_torch_is_pinned_to_the_version_whose_default_build_is_known() -> None:
    assert pins()["torch"] == "2.13.0"


def test_the_citation_names_this_version() -> None:
    citation = (REPOSITORY / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.*)$", citation, re.MULTILINE) == [PROJECT["version"]]
