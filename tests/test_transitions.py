"""The three kernels, batched and not, against naive loops and each other; adjointness, variance, gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tbrm_theory.transitions import DenseTransition, DeterministicTransition, SparseTransition, Transition

STATES, ACTIONS, NEXT, LISTED = 4, 3, 5, 2
KINDS = ["deterministic", "sparse", "dense"]
BATCHES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((), ()),
    ((), (6,)),
    ((6,), ()),
    ((6,), (6,)),
    ((2, 1), (3,)),
    ((2, 3), (2, 3)),
]  # of the kernel and of its argument


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def draw(kind: str, batch: tuple[int, ...], generator: torch.Generator) -> Transition:
    if kind == "dense":
        weights = uniform(generator, *batch, STATES, ACTIONS, NEXT)
        return DenseTransition(weights / weights.sum(-1, keepdim=True))
    shape = (*batch, STATES, ACTIONS)
    if kind == "deterministic":
        return DeterministicTransition(torch.randint(NEXT, shape, generator=generator), NEXT)
    # Two draws may agree: a repeated successor counts twice.
    next_state = torch.randint(NEXT, (*shape, LISTED), generator=generator)
    weights = uniform(generator, *shape, LISTED)
    return SparseTransition(next_state, weights / weights.sum(-1, keepdim=True), NEXT)


def as_dense(kernel: Transition) -> Tensor:
    """``P[…, s, a, s']`` filled in cell by cell."""
    successors, probability = kernel.edges()
    full = torch.zeros(*probability.shape[:-1], NEXT, dtype=torch.float64)
    for index in itertools.product(*(range(size) for size in probability.shape)):
        full[index[:-1]][int(successors[index])] += probability[index]
    return full


def with_batches(test: Callable[..., None]) -> Callable[..., None]:
    batches = pytest.mark.parametrize(("of_kernel", "of_argument"), BATCHES, ids=str)
    return pytest.mark.parametrize("kind", KINDS)(batches(test))


@with_batches
def test_expectation_is_the_sum_over_successors(
    kind: str, of_kernel: tuple[int, ...], of_argument: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(1)
    kernel, value = draw(kind, of_kernel, generator), uniform(generator, *of_argument, NEXT)
    expected = (as_dense(kernel) * value[..., None, None, :]).sum(-1)
    found = kernel.expect(value)
    assert found.shape == (*torch.broadcast_shapes(of_kernel, of_argument), STATES, ACTIONS)
    assert torch.allclose(found, expected, rtol=1e-14, atol=0)


@with_batches
def test_push_moves_every_mass_to_its_successors(
    kind: str, of_kernel: tuple[int, ...], of_argument: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(2)
    kernel, mass = draw(kind, of_kernel, generator), uniform(generator, *of_argument, STATES, ACTIONS)
    expected = (as_dense(kernel) * mass[..., None]).sum((-3, -2))
    found = kernel.push(mass)
    assert found.shape == (*torch.broadcast_shapes(of_kernel, of_argument), NEXT)
    assert torch.allclose(found, expected, rtol=1e-14, atol=0)


@with_batches
def test_push_is_the_adjoint_of_expect(kind: str, of_kernel: tuple[int, ...], of_argument: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    kernel = draw(kind, of_kernel, generator)
    value, mass = (
        uniform(generator, *of_argument, NEXT) - 0.5,
        uniform(generator, *of_argument, STATES, ACTIONS),
    )
    forward = (kernel.push(mass) * value).sum(-1)
    backward = (mass * kernel.expect(value)).sum((-2, -1))
    assert torch.allclose(forward, backward, rtol=1e-13, atol=1e-14)


@with_batches
def test_variance_is_the_second_moment_less_the_squared_mean(
    kind: str, of_kernel: tuple[int, ...], of_argument: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(4)
    kernel, value = draw(kind, of_kernel, generator), uniform(generator, *of_argument, NEXT)
    full = as_dense(kernel)
    moments = [(full * power[..., None, None, :]).sum(-1) for power in (value, value.square())]
    found = kernel.variance(value)
    assert torch.allclose(found, moments[1] - moments[0].square(), rtol=1e-12, atol=1e-15)
    assert bool((found >= 0).all())
    assert bool((found > 1e-3).any()) == (kind != "deterministic")


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_variance_does_not_cancel_under_a_large_mean(kind: str) -> None:
    generator = torch.Generator().manual_seed(5)
    kernel, value = draw(kind, (), generator), uniform(generator, NEXT)
    shift = 2.0**26  # whose square leaves no digit of a variance of order 1
    near, far = kernel.variance(value), kernel.variance(value + shift)
    assert torch.allclose(near, far, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_a_dense_kernel_with_the_same_edges_does_the_same(kind: str, batch: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(6)
    kernel = draw(kind, batch, generator)
    dense = DenseTransition(as_dense(kernel))
    value, mass = uniform(generator, NEXT), uniform(generator, STATES, ACTIONS)
    assert kernel.shape == dense.shape == (STATES, ACTIONS, NEXT)
    assert torch.allclose(kernel.expect(value), dense.expect(value), rtol=1e-14, atol=0)
    assert torch.allclose(kernel.variance(value), dense.variance(value), rtol=1e-12, atol=1e-16)
    assert torch.allclose(kernel.push(mass), dense.push(mass), rtol=1e-14, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_successors_of_probability_zero_adds_nothing(kind: str) -> None:
    generator = torch.Generator().manual_seed(7)
    kernel = draw(kind, (), generator)
    successors, probability = kernel.edges()
    padding = torch.randint(NEXT, (STATES, ACTIONS, 3), generator=generator)
    padded = SparseTransition(
        torch.cat([padding, successors], -1),
        torch.cat([torch.zeros(STATES, ACTIONS, 3, dtype=torch.float64), probability], -1),
        NEXT,
    )
    value, mass = uniform(generator, NEXT), uniform(generator, STATES, ACTIONS)
    assert torch.allclose(padded.expect(value), kernel.expect(value), rtol=1e-14, atol=0)
    assert torch.allclose(padded.variance(value), kernel.variance(value), rtol=1e-12, atol=1e-16)
    assert torch.allclose(padded.push(mass), kernel.push(mass), rtol=1e-14, atol=0)


@with_batches
def test_behind_batch_serves_one_more_dimension(
    kind: str, of_kernel: tuple[int, ...], of_argument: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(8)
    kernel = draw(kind, of_kernel, generator)
    masses = uniform(generator, *of_argument, 7, STATES, ACTIONS)
    together = kernel.behind_batch().push(masses)
    one_by_one = [kernel.push(masses[..., i, :, :]) for i in range(7)]
    assert torch.allclose(together, torch.stack(one_by_one, dim=-2), rtol=1e-14, atol=0)


@with_batches
def test_gradients_are_those_of_finite_differences(
    kind: str, of_kernel: tuple[int, ...], of_argument: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(9)
    kernel = draw(kind, of_kernel, generator)
    value = uniform(generator, *of_argument, NEXT).requires_grad_()
    mass = uniform(generator, *of_argument, STATES, ACTIONS).requires_grad_()
    fast = {"fast_mode": True}  # one random projection; with its own seed, so that global state is left alone
    with torch.random.fork_rng(devices=[]):
        assert torch.autograd.gradcheck(kernel.expect, (value,), **fast)
        assert torch.autograd.gradcheck(kernel.push, (mass,), **fast)
        if kind != "deterministic":
            assert torch.autograd.gradcheck(kernel.variance, (value,), **fast)


def test_gradients_reach_the_probabilities() -> None:
    generator = torch.Generator().manual_seed(10)
    value, mass = uniform(generator, NEXT), uniform(generator, STATES, ACTIONS)
    index = torch.randint(NEXT, (STATES, ACTIONS, LISTED), generator=generator)
    kernels: dict[int, Callable[[Tensor], Transition]] = {
        LISTED: lambda probability: SparseTransition(index, probability, NEXT),
        NEXT: DenseTransition,
    }
    for width, build in kernels.items():
        probability = uniform(generator, STATES, ACTIONS, width).requires_grad_()

        def all_three(p: Tensor, build: Callable[[Tensor], Transition] = build) -> tuple[Tensor, Tensor, Tensor]:
            kernel = build(p)
            return kernel.expect(value), kernel.variance(value), kernel.push(mass)

        with torch.random.fork_rng(devices=[]):
            assert torch.autograd.gradcheck(all_three, (probability,), fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_edges_list_probabilities_that_sum_to_one(kind: str) -> None:
    kernel = draw(kind, (2,), torch.Generator().manual_seed(11))
    successors, probability = kernel.edges()
    assert successors.shape == probability.shape
    assert torch.allclose(probability.sum(-1), torch.ones(2, STATES, ACTIONS, dtype=torch.float64), rtol=1e-15)
    assert kernel.to("cpu").edges()[0].tolist() == successors.tolist()
