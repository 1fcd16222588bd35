"""The parameters that differ between candidates."""

from __future__ import annotations

import torch
from torch import nn

from .._optimizers import Optimizers

__all__ = ["candidate_parameters"]


def candidate_parameters(model: nn.Module, optimizers: Optimizers) -> dict[nn.Parameter, str]:
    """Return the parameters the optimizers move, each with its (first) name in the model.

    Args:
        model: holds every parameter of the optimizers. Its other parameters need none.
        optimizers: hold each parameter once.

    Returns:
        Parameter -> name, in the order of the param groups.

    Raises:
        ValueError: if the two do not belong together; names the first parameter that shows it.
        TypeError: if the model is none, or a parameter is complex or not strided.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model={model!r}: expected the nn.Module whose parameters the optimizer trains, "
            "as in AutoLR(optimizer, model)"
        )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters: dict[nn.Parameter, str] = {}
    for index, group in enumerate(optimizers.param_groups):
        for position, parameter in enumerate(group["params"]):
            name = names.get(id(parameter))
            if name is None:
                raise ValueError(
                    f"{optimizers.group_name(index)}['params'][{position}] (shape {list(parameter.shape)}) is "
                    f"not a parameter of the model ({type(model).__name__}): build the optimizer from this "
                    "model's parameters, after anything that replaces them; if it trains several modules, pass "
                    "nn.ModuleList([...]) of them as the model"
                )
            if parameter in parameters:
                raise ValueError(
                    f"parameter {name!r} is in two of the optimizers, and would move twice a step: give it to one"
                )
            if parameter.is_complex() or parameter.layout != torch.strided:
                raise TypeError(
                    f"parameter {name!r} is {parameter.dtype}, {parameter.layout}: only real, strided "
                    "parameters have candidates; keep a complex one as its real view (torch.view_as_real)"
                )
            parameters[parameter] = name
    return parameters
