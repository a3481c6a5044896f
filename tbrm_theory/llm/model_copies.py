"""The reference: the weights as given, with no dropout anywhere.

A model handed over as an instance may differ from whatever its name or path would load (it was just trained, it was made in
code), so its reference is a copy of the instance and never a second load.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, TypeVar

import torch
from accelerate.utils import is_peft_model

__all__ = ["base_model", "frozen_copy", "takes_position_ids", "without_dropout"]

Model = TypeVar("Model", bound=torch.nn.Module)


def frozen_copy(model: Model) -> Model:
    """A copy that shares nothing with ``model``, in evaluation mode and without gradients.

    A trainer replaces ``model.forward`` by a closure over the model it was made for; a copy that kept it would run the
    original's weights, so the copy goes back to its class's own forward.
    """
    copied = copy.deepcopy(model)
    copied.__dict__.pop("forward", None)
    return copied.eval().requires_grad_(False)


def without_dropout(model: Model) -> Model:
    """``model``, with every dropout probability at 0.

    Attention often takes its probability as a number and calls the functional form, which no search for ``Dropout`` modules
    finds; any float attribute with "dropout" in its name is one.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


def takes_position_ids(model: torch.nn.Module) -> bool:
    """Whether the model can be told where its tokens stand; some (ALiBi) have no positions to tell."""
    return "position_ids" in inspect.signature(type(base_model(model)).forward).parameters


def base_model(model: torch.nn.Module) -> Any:
    """The model under its adapters, if it has any."""
    return model.get_base_model() if is_peft_model(model) else model  # type: ignore[operator]
