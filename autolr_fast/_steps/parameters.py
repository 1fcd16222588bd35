"""The parameters that differ between candidates."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["candidate_parameters"]


def candidate_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, str]:
    """Return the parameters the optimizer moves, each with its (first) name in the model.

    Args:
        model: holds every parameter of the optimizer. Its frozen parameters need no optimizer.
        optimizer: holds every parameter of the model that requires a gradient.

    Returns:
        Parameter -> name, in the order of ``optimizer.param_groups``.

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
    for index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            name = names.pop(id(parameter), None)
            if name is None:
                raise ValueError(
                    f"optimizer.param_groups[{index}]['params'][{position}] (shape {list(parameter.shape)}) is "
                    f"not a parameter of the model ({type(model).__name__}): build the optimizer from this "
                    "model's parameters, after anything that replaces them; if it trains several modules, pass "
                    "nn.ModuleList([...]) of them as the model"
                )
            if parameter.is_complex() or parameter.layout != torch.strided:
                raise TypeError(
                    f"parameter {name!r} is {parameter.dtype}, {parameter.layout}: only real, strided "
                    "parameters have candidates; keep a complex one as its real view (torch.view_as_real)"
                )
            parameters[parameter] = name
    missing = [name for name in names.values() if model.get_parameter(name).requires_grad]
    if missing:
        raise ValueError(
            f"model parameter {missing[0]!r} (and {len(missing) - 1} more) requires a gradient but is not in the "
            "optimizer: add it to the optimizer, freeze it with requires_grad_(False), or pass as the model the "
            "module that this optimizer trains"
        )
    return parameters
