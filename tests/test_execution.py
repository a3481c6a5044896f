"""Cells in processes and on a Dask cluster: the same rows, nothing lost to a killed worker, and Ctrl-C is 130 wherever it falls."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.execution import Execution, in_a_process
from tbrm_theory.experiment import run_experiment

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))

import frozen_value  # noqa: E402

# An experiment as those of the project: its cells, and the class of its settings, are those of a script.
SCRIPT = """
import os, signal, sys, time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import tyro

from tbrm_theory.execution import Execution, in_a_process
from tbrm_theory.experiment import run_experiment
from tbrm_theory.program import run_program


@dataclass(frozen=True)
class Config:
    size: int = 40
    seconds: float = 0.05
    kill: int = -1
    results: Path = Path("results")
    execution: tyro.conf.OmitArgPrefixes[Execution] = field(default_factory=Execution)


def cell(i, config):
    time.sleep(config.seconds)
    marker = config.results / "killed"
    if i == config.kill and not marker.exists():
        marker.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)
    return {"x": i, "threads": torch.get_num_threads(), "worker": os.getpid()}


def summarise(rows, seconds):
    return {"sum": sum(row["x"] for row in rows), "unexpected": []}


def main(config):
    cells = {f"cell {i}": partial(cell, i, config) for i in range(config.size)}
    return run_experiment("grid", config, cells, summarise, lambda *_: [], execution=config.execution)


if __name__ == "__main__":
    sys.exit(run_program("grid", lambda: main(tyro.cli(Config))))
"""


def eventually(what: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


def rows_of(results: Path, experiment: str = "grid") -> list[dict[str, Any]]:
    metrics = results / experiment / "latest" / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command as a terminal starts it: leader of a group of its own, SIGINT not ignored. It is gone when the block ends."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("script") / "grid.py"
    path.write_text(SCRIPT)
    return str(path)


# -- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    results: Path
    execution: Execution


def attempt(cells: dict[str, Any], config: Config) -> int:
    def summarise(rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
        return {"order": [row["x"] for row in rows], "unexpected": []}

    return run_experiment("demo", config, cells, summarise, lambda *_: [], execution=config.execution)


@pytest.mark.slow
def test_two_workers_leave_the_folder_that_one_process_leaves(tmp_path: Path) -> None:
    config = frozen_value.Config(advantages=(1.0, 10.0), steps=(1, 8, 64))
    for name, execution in (("one", Execution()), ("two", Execution(workers=2))):
        assert frozen_value.main(replace(config, results=tmp_path / name, execution=execution)) == 0
    one, two = (tmp_path / name / "frozen_value" / "latest" for name in ("one", "two"))
    assert (two / "metrics.jsonl").read_bytes() == (one / "metrics.jsonl").read_bytes()
    assert (two / "config.json").read_bytes() == (one / "config.json").read_bytes()
    assert "execution" not in json.loads((two / "config.json").read_text())


@pytest.mark.slow
def test_a_killed_worker_costs_one_line_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """Two workers: the cell that dies waits until three others are recorded."""
    made = tmp_path / "made"
    made.mkdir()

    def cell(i: int) -> dict[str, Any]:
        if i == 1 and not (made / "1").exists():
            while len(list(made.iterdir())) < 3:
                time.sleep(0.01)
            time.sleep(0.5)
            (made / "1").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        (made / str(i)).touch()
        if i > 3 and not (made / "1").exists():
            time.sleep(60)  # in the way of the fourth: killed with the worker
        return {"x": i, "worker": os.getpid()}

    cells = {str(i): partial(cell, i) for i in range(6)}
    config = Config(tmp_path, Execution(workers=2))
    with pytest.raises(InvalidInputError, match=r"workers: one was killed.*the same command goes on"):
        attempt(cells, config)
    kept = rows_of(tmp_path, "demo")
    assert sorted(row["x"] for row in kept) == [0, 2, 3]
    assert attempt(cells, config) == 0
    rows = rows_of(tmp_path, "demo")
    assert [row["x"] for row in rows] == list(range(6))
    assert [row for row in rows if row["x"] in (0, 2, 3)] == sorted(kept, key=lambda row: row["x"])  # not made again


def test_rows_are_put_in_order_before_they_are_summed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def backwards(self: Execution, cells: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        return ((name, make()) for name, make in reversed(cells.items()))

    monkeypatch.setattr(Execution, "rows", backwards)
    assert attempt({"a": lambda: {"x": 1}, "b": lambda: {"x": 2}}, Config(tmp_path, Execution())) == 0
    folder = tmp_path / "demo" / "latest"
    assert json.loads((folder / "summary.json").read_text())["order"] == [1, 2]
    assert [row["cell"] for row in rows_of(tmp_path, "demo")] == ["a", "b"]


def test_a_cell_that_fails_is_not_taken_for_a_worker(tmp_path: Path) -> None:
    def fails() -> dict[str, Any]:
        raise ZeroDivisionError("its own")

    with pytest.raises(ZeroDivisionError, match="its own"):
        attempt({"a": lambda: {"x": 1}, "b": fails}, Config(tmp_path, Execution()))
    assert [row["x"] for row in rows_of(tmp_path, "demo")] == [1]


@pytest.mark.parametrize(
    ("execution", "message"),
    [
        (Execution(workers=0), "workers: expected at least 1"),
        (Execution(scheduler="tcp://127.0.0.1:8786"), "scheduler: expected --backend dask"),
        (Execution(backend="dask", scheduler="nowhere"), "scheduler: none answers at nowhere"),
        (Execution(backend="dask", scheduler="tcp://127.0.0.1:1"), "scheduler: none answers at tcp://127.0.0.1:1"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    execution: Execution, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributed = pytest.importorskip("distributed", reason="the extra cluster is not installed")
    client = distributed.Client
    monkeypatch.setattr(distributed, "Client", lambda address, timeout: client(address, timeout="1s"))
    state = random.getstate()
    with pytest.raises(InvalidInputError, match=message):
        list(execution.rows({"a": dict}))
    random.setstate(state)  # distributed draws from it how long it waits between attempts


def test_a_client_that_failed_is_gone_before_another_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collected while another starts, it would ask for the lock that the other holds."""
    distributed = pytest.importorskip("distributed", reason="the extra cluster is not installed")
    alive: list[weakref.ref[Any]] = []

    class Fails:
        def __init__(self, *_: Any, **__: Any) -> None:
            assert [failed for failed in alive if failed() is not None] == []
            self.itself = self
            alive.append(weakref.ref(self))
            raise OSError

    monkeypatch.setattr(distributed, "Client", Fails)
    for _ in range(3):
        with pytest.raises(InvalidInputError, match="scheduler: none answers"):
            list(Execution(backend="dask", scheduler="tcp://127.0.0.1:1").rows({"a": dict}))
    assert len(alive) == 3


def test_without_dask_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(
        InvalidInputError, match=r"backend: dask is not installed; pip install 'tbrm-theory\[cluster\]'"
    ):
        list(Execution(backend="dask").rows({"a": dict}))


# -- a process for one thing -----------------------------------------------------------------------------------------

ALONE = """
import os, sys, time
from pathlib import Path

from tbrm_theory.execution import in_a_process
from tbrm_theory.program import run_program


def works(path):
    Path(path).write_text(f"{os.getpid()}.")
    time.sleep(600)


if __name__ == "__main__":
    sys.exit(run_program("alone", lambda: in_a_process("cell", works, sys.argv[1])))
"""


@pytest.mark.slow
def test_a_process_for_one_thing_returns_or_was_killed() -> None:
    assert in_a_process("cell", dict, [("pid", 1)]) == {"pid": 1}
    with pytest.raises(InvalidInputError, match=r"^cell: its process was killed.*the same command goes on"):
        in_a_process("cell", os._exit, 9)


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_it_does_not_outlive_what_started_it(end: signal.Signals, tmp_path: Path) -> None:
    """Else it would go on writing where the same command, started again, writes."""

    def runs(process: int) -> bool:
        stat = Path(f"/proc/{process}/stat")
        return stat.exists() and stat.read_text().rpartition(") ")[2][0] not in "ZX"

    script, path = tmp_path / "alone.py", tmp_path / "worker"
    script.write_text(ALONE)
    with started(str(script), str(path)) as process:
        eventually(lambda: path.exists() and path.read_text().endswith("."), process)
        worker = int(path.read_text()[:-1])
        assert runs(worker)
        os.kill(process.pid, end)  # this one alone, not its group
        process.wait(timeout=60)
        assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130}[end]
        deadline = time.monotonic() + 30
        while runs(worker):
            assert time.monotonic() < deadline
            time.sleep(0.01)


# -- a Dask cluster --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_worker_of_a_cluster_killed_half_way_loses_nothing(tmp_path: Path, script: str) -> None:
    pytest.importorskip("distributed", reason="the extra cluster is not installed")
    address = tmp_path / "scheduler.json"
    schedule = ("-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
    work = ("-m", "distributed.cli.dask_worker", "--nthreads", "1", "--no-nanny", "--no-dashboard")
    file = ("--scheduler-file", str(address))
    with started(*schedule, *file) as scheduler:
        eventually(lambda: address.exists() and address.read_text().rstrip().endswith("}"), scheduler)
        options = ("--backend", "dask", "--scheduler", json.loads(address.read_text())["address"])
        settings = ("--size", "30", "--kill", "15", "--results", str(tmp_path))
        with started(*work, *file), started(*work, *file), started(script, *settings, *options) as client:
            output, errors = client.communicate(timeout=200)
            assert client.returncode == 0, errors
    rows = rows_of(tmp_path)
    assert [row["x"] for row in rows] == list(range(30))  # each once, in order
    assert {row["threads"] for row in rows} == {1}
    killed, workers = int((tmp_path / "killed").read_text()), {row["worker"] for row in rows}
    assert killed in workers  # its rows are kept
    assert len(workers) == 2
    assert rows[15]["worker"] != killed
    assert "sum: 435" in output


# -- Ctrl-C ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "recorded"), [((), 2), (("--workers", "2"), 0), (("--workers", "2"), 4)], ids=["one", "starting", "two"]
)
def test_the_interrupt_key_is_130_and_rows_are_kept(
    options: tuple[str, ...], recorded: int, tmp_path: Path, script: str
) -> None:
    """The signal goes to the whole group, workers included, some time after so many rows."""
    with started(script, "--size", "2000", "--results", str(tmp_path), *options) as process:
        eventually(lambda: (tmp_path / "grid" / "latest").exists() and len(rows_of(tmp_path)) >= recorded, process)
        time.sleep(random.Random(recorded).uniform(0, 0.3))
        before = len(rows_of(tmp_path))
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors == ""  # no worker says anything
    (line,) = output.strip().splitlines()
    assert line.startswith("interrupted; the same command goes on from")
    assert recorded <= before <= len(rows_of(tmp_path)) < 2000
    assert not (tmp_path / "grid" / "latest" / "summary.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("package", ["numpy", "torch"])
def test_ctrl_c_is_130_while_packages_load(package: str) -> None:
    """Some of them do not survive it: numpy ends in an endless recursion, and Python with status 1."""
    with started("-X", "importtime", str(ROOT / "experiments" / "frozen_value.py"), "--help") as process:
        assert process.stderr is not None
        assert any(f"| {' ' * 2}" in line and f" {package}." in line for line in process.stderr)
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130


WAYS = {
    "raised": "time.sleep(9)",
    "changed": """
try:
    time.sleep(9)
except BaseException:
    raise RuntimeError("what became of it")
""",
    "answered": """
try:
    time.sleep(9)
except BaseException:
    pass
""",
    "dropped": """
class Dropping:
    def __del__(self):
        time.sleep(9)
Dropping()
time.sleep(9)
""",
    "the reader gone": """
try:
    time.sleep(9)
finally:
    print("x" * 10 ** 6)
""",
    "the reader gone, a little left": """
try:
    time.sleep(9)
finally:
    print("x")
""",
    "on the way out": """
try:
    time.sleep(9)
except BaseException:
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(9)
    except BaseException:
        time.sleep(9)
""",
}


@pytest.mark.parametrize("way", WAYS)
def test_whatever_becomes_of_a_ctrl_c_the_status_is_130(way: str) -> None:
    lines = [
        "import os, signal, sys, time, types",
        f"package = types.ModuleType('tbrm_theory'); package.__path__ = [{str(ROOT / 'tbrm_theory')!r}]",
        "sys.modules['tbrm_theory'] = package  # its modules without all that it gathers",
        "from tbrm_theory.program import run_program",
        "def function():",
        "    print('ready', flush=True)",
        *(f"    {line}" for line in WAYS[way].splitlines()),
        "    return 0",
        "sys.exit(run_program('p', function))",
    ]
    with started("-c", "\n".join(lines)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if way.startswith("the reader gone"):
            process.stdout.close()
        time.sleep(0.1)
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        errors = process.stderr.read()
        process.wait(timeout=60)
    assert process.returncode == 130, errors
    assert errors == ""
    assert time.monotonic() - begun < 8  # it did not sleep on
