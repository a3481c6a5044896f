"""Where the cells of an experiment are computed: in this process, in several of this machine, or on a Dask cluster.

A cell is a function without arguments that returns a row. It travels to a worker by cloudpickle, so it may come from a script;
the package itself must be importable there, in the same version. Rows come back in the order in which they are finished.

Workers never see a Ctrl-C. The interrupt key of a terminal reaches every process of a command, and a worker that dies of it is
mistaken for a failure; so they are started with the signal blocked, and this process, which gets it, ends them.

:func:`in_a_process` is for work that wants a process of its own, one after the other.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from types import ModuleType
from typing import Any, Literal

import joblib
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError

from tbrm_theory.errors import InvalidInputError

__all__ = ["Execution", "in_a_process"]

Row = dict[str, Any]
Cells = Mapping[str, Callable[[], Row]]

_GOES_ON = "finished rows are kept, and the same command goes on with the others"


@dataclass(frozen=True)
class Execution:
    """How many cells are computed at a time, and where. No part of what identifies a run."""

    workers: int = 1
    """Processes to start, each with one torch thread; 1 with loky: this process, with all its threads."""
    backend: Literal["loky", "dask"] = "loky"
    """Processes of this machine, or a Dask cluster."""
    scheduler: str | None = None
    """With dask: the address of a running scheduler, whose workers are used; none: a cluster of ``workers`` on this machine."""

    def rows(self, cells: Cells) -> Generator[tuple[str, Row], None, None]:
        """Each cell's name and row, as they are finished. Close the iterator to give the rest up.

        Raises:
            InvalidInputError: an option that does not fit; no dask; a scheduler that does not answer or goes away; a worker that
                was killed (Dask first tries the cell elsewhere, three times).
            Exception: whatever a cell raises.
        """
        if self.workers < 1:
            raise InvalidInputError("workers", f"expected at least 1, found {self.workers}")
        if self.scheduler is not None and self.backend != "dask":
            raise InvalidInputError("scheduler", "expected --backend dask with it")
        if self.backend == "dask":
            return _on_dask(cells, self.scheduler, self.workers)
        return _in_processes(cells, self.workers) if self.workers > 1 else _here(cells)


def _here(cells: Cells) -> Generator[tuple[str, Row], None, None]:
    for name, make in cells.items():
        yield name, make()


def _named_row(name: str, make: Callable[[], Row]) -> tuple[str, Row]:
    """What a worker does."""
    torch.set_num_threads(1)  # as many processes as cores leave one to each
    return name, make()


def _in_processes(cells: Cells, workers: int) -> Generator[tuple[str, Row], None, None]:
    with joblib.parallel_config(backend="loky", inner_max_num_threads=1):
        # One cell a task: a batch would hold finished rows back, and lose them with its process.
        parallel = joblib.Parallel(workers, return_as="generator_unordered", batch_size=1, max_nbytes=None)
    with _interrupt_deferred():
        finished = parallel(joblib.delayed(_named_row)(name, make) for name, make in cells.items())
    try:
        for row in finished:  # noqa: UP028 - to give it up here, and not where "yield from" would
            yield row
    except TerminatedWorkerError as error:
        raise InvalidInputError("workers", f"one was killed, perhaps for want of memory; {_GOES_ON}") from error
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # joblib's, of tasks given up
            finished.close()


def _on_dask(cells: Cells, scheduler: str | None, workers: int) -> Generator[tuple[str, Row], None, None]:
    """Through ``distributed`` itself: joblib's backend for it waits forever for a cell whose workers were all killed."""
    try:
        import dask
        import distributed
    except ImportError as error:
        raise InvalidInputError("backend", "dask is not installed; pip install 'tbrm-theory[cluster]'") from error
    for name in ("distributed", "distributed.client", "tornado.application"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what goes wrong is raised here, in one line
    # A client that found no scheduler closes itself when it is collected; if that happens while another starts, both wait forever.
    gc.collect()
    with contextlib.ExitStack() as opened:
        with _interrupt_deferred():
            if scheduler is None:
                # A killed worker comes back; where packages load slowly, later than the cluster waits for it before it gives it up.
                opened.enter_context(dask.config.set({"distributed.deploy.lost-worker-timeout": "10m"}))
                local = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": ":0"}
                cluster = opened.enter_context(distributed.LocalCluster(**local, silence_logs=logging.CRITICAL))
            try:
                client = opened.enter_context(distributed.Client(scheduler or cluster, timeout="5s"))
            except (OSError, TimeoutError, ValueError) as error:
                raise InvalidInputError("scheduler", f"none answers at {scheduler}") from error
        futures = [client.submit(_named_row, name, make, pure=False) for name, make in cells.items()]
        try:
            for future in distributed.as_completed(futures):
                yield _result(future, distributed)
        finally:
            client.cancel(futures)


def _result(future: Any, distributed: ModuleType) -> tuple[str, Row]:
    try:
        return future.result()
    except distributed.KilledWorker as error:
        what = f"several were killed over one cell, perhaps for want of memory; {_GOES_ON}"
        raise InvalidInputError("workers", what) from error
    except (distributed.CancelledError, OSError) as error:
        if future.status == "error":  # the cell's own
            raise
        raise InvalidInputError("scheduler", f"it went away; {_GOES_ON}") from error


def in_a_process(name: str, function: Callable[..., Row], *arguments: Any) -> Row:
    """What ``function`` returns in a new process, which is gone when this one is, however that ended.

    Raises:
        InvalidInputError: that process, called ``name``, was killed.
        Exception: whatever the function raises.
    """
    spawn = multiprocessing.get_context("spawn")  # a fork inherits locks, and what a GPU library holds
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_end_with_the_parent) as pool:
        try:
            with _interrupt_deferred():
                future = pool.submit(function, *arguments)
            return future.result()
        except BrokenProcessPool:
            raise InvalidInputError(
                name, "its process was killed (too little memory?); the same command goes on"
            ) from None
        except KeyboardInterrupt:
            for child in multiprocessing.active_children():
                child.kill()
            raise


def _end_with_the_parent() -> None:
    """A process that outlived its parent would write where the same command, started again, goes on."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _interrupt_deferred() -> Iterator[None]:
    """The first Ctrl-C waits for the end of the block. Processes and threads started within never get one: they inherit the mask."""
    resource_tracker.ensure_running()  # else multiprocessing starts it within the block, and unblocks the signal after it
    came: list[int] = []

    def comes(number: int, _: object) -> None:
        came.append(number)
        signal.signal(signal.SIGINT, handler)

    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    handler = signal.getsignal(signal.SIGINT) or signal.SIG_DFL
    ours = threading.current_thread() is threading.main_thread()  # no other may set a handler
    if ours:
        signal.signal(signal.SIGINT, comes)  # by way of another thread
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number in came:
            signal.raise_signal(number)
