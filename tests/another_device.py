"""A device that is not the CPU, simulated: its tensors keep their numbers in CPU tensors, and refuse what those of a GPU refuse.

An operation between a tensor there and one here raises, unless the one here is a single number that a pointwise operation reads; so
do ``numpy()`` without ``cpu()``, a generator of the other device and products of integer matrices. Every kernel is the CPU's, so a
computation gives the very bits that it gives here. torch's ``meta`` lends its name, since autograd treats that device like the CPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "meta"
MOVES = ("_to_copy", "copy_")
TAKES_A_NUMBER = ("where", "index_put", "index_put_", "masked_fill", "masked_fill_")  # besides what is pointwise
FLOATS_ALONE = ("mm", "bmm", "mv", "dot", "addmm", "addmv", "baddbmm")
OPERATIONS: set[str] = set()
"""All that were carried out there, as torch's own list of its kernels writes them."""


class Elsewhere(Tensor):
    """A tensor of the other device; ``here`` has its numbers."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> Elsewhere:
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        made: Elsewhere = Tensor._make_wrapper_subclass(cls, here.shape, **layout, device=torch.device(NAME))
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operation, args, kwargs or {})


class _OfAnyPlace(type(torch.Generator)):
    """What was annotated ``torch.Generator`` while the simulation lasted takes any, then and later."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, torch._C.Generator)


class Generator(torch.Generator, metaclass=_OfAnyPlace):
    """``torch.Generator`` with a place; only the CPU's can be made on a machine without a GPU."""

    def __new__(cls, device: torch.device | str = "cpu") -> Generator:
        made = super().__new__(cls, "cpu")
        made.place = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        return self.place


@contextmanager
def another_device() -> Iterator[str]:
    """Gives the name of the device, to which tensors can be moved and on which they can be made while the block lasts."""
    with mock.patch.object(torch, "Generator", Generator), _Kernels(), _Methods():
        yield NAME


class _Kernels(TorchDispatchMode):
    """Sees the operations that make a tensor there from nothing, or from one that is here."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(operation, args, kwargs or {})


class _Methods(TorchFunctionMode):
    """What never becomes an operation, because torch looks into the tensor's memory at once."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and _is_there(kwargs.get("device")):
            return function(*args, **kwargs | {"device": "cpu"}).to(NAME)
        if function is Tensor.new_tensor and isinstance(args[0], Elsewhere):
            return args[0].here.new_tensor(*args[1:], **kwargs).to(NAME)
        if kwargs.get("generator") is not None:
            places = (leaf.device for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
            place = kwargs.get("device") or next(places, "cpu")
            if _is_there(place) != _is_there(kwargs["generator"].device):
                raise RuntimeError(f"expected a generator on {place}, found one on {kwargs['generator'].device}")
        if isinstance(args[0] if args else None, Elsewhere):
            if function is Tensor.numpy and not kwargs.get("force"):
                raise TypeError(f"can't convert {NAME} tensor to numpy: its memory is elsewhere")
            if function in (Tensor.numpy, Tensor.tolist):
                return function(args[0].detach().cpu())
        return function(*args, **kwargs)


def without_a_kernel_for(backend: str) -> set[str]:
    """The operations so far that torch implements for some kinds of device, this one not among them."""
    listed = resources.files("torchgen") / "packaged" / "ATen" / "native" / "native_functions.yaml"
    entries = {entry[: entry.index("(")]: entry for entry in listed.read_text().split("\n- func: ")[1:]}

    def implemented(name: str) -> bool:
        delegate = re.search(r"^  structured_delegate: (\S+)$", entries[name], re.MULTILINE)
        if delegate is not None:
            return implemented(delegate[1])
        kernels = re.findall(r"^    ([\w, ]+): ", entries[name].partition("\n  dispatch:\n")[2], re.MULTILINE)
        kinds = {kind for line in kernels for kind in line.split(", ")}
        if "\n  ufunc_inner_loop:" in entries[name]:  # from which torch makes both
            kinds |= {"CPU", "CUDA"}
        return not kinds or backend in kinds or any(kind.startswith("Composite") for kind in kinds)

    return {name for name in OPERATIONS if not implemented(name)}


def _is_there(device: torch.device | str | None) -> bool:
    return device is not None and torch.device(device).type == NAME


def _run(operation: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """The operation on the numbers of its arguments. Its results are where it is told, or else where an argument is."""
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = {id(tensor.here): tensor for tensor in given if isinstance(tensor, Elsewhere)}
    here = {id(tensor): tensor for tensor in given if not isinstance(tensor, Elsewhere)}
    assert not any(tensor.is_meta for tensor in here.values()), "a tensor without numbers came into being"
    name = operation.overloadpacket.__name__
    if there and here and name not in MOVES:
        slots = zip(args, operation._schema.arguments, strict=False)
        written = {id(arg) for arg, slot in slots if slot.alias_info is not None and slot.alias_info.is_write}
        reads_one = torch.Tag.pointwise in operation.tags or name in TAKES_A_NUMBER
        numbers_alone = len(here) == 1 and not any(tensor.dim() or id(tensor) in written for tensor in here.values())
        if not (reads_one and numbers_alone):
            raise RuntimeError(f"{name}: expected all tensors on one device, found {NAME} and cpu")
    if there and name in FLOATS_ALONE and not given[0].is_floating_point():
        raise RuntimeError(f"{name}: expected floating-point numbers on {NAME}, found {given[0].dtype}")
    if kwargs.get("device") is not None:
        lands_there, kwargs = _is_there(kwargs["device"]), {**kwargs, "device": torch.device("cpu")}
    else:
        lands_there = isinstance(args[0], Elsewhere) if name == "copy_" else bool(there)
    if there or lands_there:
        OPERATIONS.add(operation.name().removeprefix("aten::"))

    def numbers(leaf: Any) -> Any:
        return leaf.here if isinstance(leaf, Elsewhere) else leaf

    def placed(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in there or id(leaf) in here:  # changed in place
            return there.get(id(leaf), leaf)
        return Elsewhere(leaf) if lands_there else leaf

    result = tree_map(placed, operation(*tree_map(numbers, args), **tree_map(numbers, kwargs)))
    if torch.Tag.inplace_view in operation.tags and there:  # of its own shape and strides
        with no_dispatch():
            operation(*args, **kwargs)
    return result
