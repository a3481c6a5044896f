"""What holds for every test: shapes are checked, Hypothesis is deterministic, global state is left alone.

Tests ask for float64 explicitly and draw from explicit generators, as the package does; the fixture at the end
fails one that does not. ``HYPOTHESIS_PROFILE=thorough`` searches longer, differently each time, and checks all shapes.
"""

from __future__ import annotations

import functools
import gc
import inspect
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import hypothesis
import jaxtyping
import numpy as np
import pytest
import torch

# Numba, which quantecon imports, sets OpenMP's number of threads for the whole process, torch's too: to as many as there are cores
# unless it is told otherwise.
if "OMP_NUM_THREADS" in os.environ:
    os.environ.setdefault("NUMBA_NUM_THREADS", os.environ["OMP_NUM_THREADS"])

if "tbrm_theory" in sys.modules:
    raise RuntimeError("tbrm_theory was imported before conftest.py could have its shapes checked")

# beartype checks one element of a tuple, picked with Python's global generator. It gets one of its own: then the
# pick can be repeated, and the fixture below sees only what the package draws.
_picks = random.Random(0)
_global_getrandbits = random.getrandbits
random.getrandbits = _picks.getrandbits
try:
    import beartype

    beartype.beartype(lambda layers: layers)  # whatever it imports late, it imports now
finally:
    random.getrandbits = _global_getrandbits

# From here on every function and dataclass of the package checks arguments and results against its annotations, in its first calls of
# each test. To check all would take two thirds of the suite's time, and a wrong shape seldom waits. The thorough profile checks all.
_THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
_CHECKED_CALLS, _CHECKED_INNER_CALLS = (sys.maxsize, sys.maxsize) if _THOROUGH else (3, 1)
_calls: Counter[int] = Counter()
_always_checked = jaxtyping.jaxtyped


def _checked_at_first(function: Any = None, **options: Any) -> Any:
    """What the import hook decorates with, in place of ``jaxtyping.jaxtyped``."""
    if function is None:
        return functools.partial(_checked_at_first, **options)
    if not inspect.isfunction(function):  # a class, a property and the like, whose functions come here by themselves
        return _always_checked(function, **options)
    # Only when it is called: this is dear, and functions in functions are made again and again.
    checked = functools.cache(lambda: _always_checked(function, **options))
    key = id(function.__code__)
    most = _CHECKED_INNER_CALLS if "<locals>" in function.__qualname__ else _CHECKED_CALLS

    @functools.wraps(function)
    def maybe_checked(*args: Any, **kwargs: Any) -> Any:
        if _calls[key] >= most:
            return function(*args, **kwargs)
        result = checked()(*args, **kwargs)
        _calls[key] += 1  # a call that was refused is refused again
        return result

    return maybe_checked


jaxtyping.jaxtyped = jaxtyping._decorator.jaxtyped = _checked_at_first
jaxtyping.install_import_hook("tbrm_theory", "beartype.beartype")

# Time says nothing on a machine that others use: no deadline, and no complaint about slow generation.
_settings: dict[str, Any] = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow],
}
hypothesis.settings.register_profile("default", max_examples=50, derandomize=True, **_settings)
hypothesis.settings.register_profile("thorough", max_examples=2000, derandomize=False, **_settings)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests come first, so that no worker is left with one at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_collection_finish() -> None:
    """What was imported stays; to look through all of it for garbage again and again takes a sixth of the time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """A test's checks and picks depend on the test and its fixtures alone, not on what ran before."""
    _picks.seed(0)
    _calls.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Measuring coverage doubles the time of a test, so slow ones, their fixtures and their processes go without.

    The others reach what is asked. pytest-cov's own ``no_cover`` knows nothing of the second measurement that coverage starts in every
    process of a measured one, pytest-xdist's workers included.
    """
    tracer = sys.gettrace()
    if item.get_closest_marker("slow") is None or not type(tracer).__module__.startswith("coverage"):
        return (yield)
    with mock.patch.dict(os.environ):
        os.environ.pop("COVERAGE_PROCESS_CONFIG", None)
        sys.settrace(None)
        try:
            return (yield)
        finally:
            sys.settrace(tracer)


@pytest.fixture(autouse=True)
def _global_state_untouched() -> Iterator[None]:
    """Fails a test that drew from a global random state, seeded one, or changed a global setting of torch.

    Hypothesis reseeds and restores Python's and NumPy's states around each example, so inside ``@given`` only
    torch's state is guarded here; ``test_architecture.py`` finds the other two in the package's source.
    """
    dtype, gradients, threads = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    torch_state = torch.random.get_rng_state()
    numpy_state, python_state = _numpy_state(), random.getstate()
    yield
    touched = []
    if torch.get_default_dtype() != dtype:
        torch.set_default_dtype(dtype)
        touched.append("changed torch's default dtype")
    if torch.is_grad_enabled() != gradients:
        torch.set_grad_enabled(gradients)
        touched.append("switched autograd off or on")
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
        touched.append("changed torch's number of threads")
    if not torch.equal(torch.random.get_rng_state(), torch_state):
        touched.append("used torch's global random state")
    if _numpy_state() != numpy_state:
        touched.append("used NumPy's global random state")
    if random.getstate() != python_state:
        touched.append("used Python's global random state")
    if touched:
        message = f"the test {' and '.join(touched)}: pass an explicit generator or dtype"
        pytest.fail(message, pytrace=False)


def _numpy_state() -> tuple[bytes, int, int, float]:
    state: dict[str, Any] = np.random.get_state(legacy=False)  # noqa: NPY002  (read, not used)
    return state["state"]["key"].tobytes(), state["state"]["pos"], state["has_gauss"], state["gauss"]
