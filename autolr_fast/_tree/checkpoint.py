"""What is in the state of a search, looked at before any of it is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from .._state import complete
from .epoch import EpochInProgress

__all__ = ["check_same_shapes", "check_state"]


def check_state(given: object, own: Mapping[str, Any], rank: list[int]) -> dict[str, Any]:
    """Return a state that can be loaded into a tree, given the tree's own; the stack checks its part.

    Raises:
        TypeError: if it is not a dict.
        ValueError: if it is of another version, or another model, or of an epoch with other factors or ranks.
    """
    inside: dict[str, Iterable[str]] = {  # keys that are the same in every tree's
        "trainer": own["trainer"],
        "stack": ("steps_taken", "tensors"),
        "epoch": [field.name for field in fields(EpochInProgress)],
    }
    seen = given if isinstance(given, dict) else {}
    expected = {key: dict.fromkeys(inside[key]) if key in inside and seen.get(key) else None for key in own}
    state = complete(given, expected, {}, "ALRTree")
    check_same_shapes(own["model"], state["model"])
    if state["epoch"] is None:
        return state
    if state["factors"] != own["factors"]:
        raise ValueError(
            f"state_dict is of an epoch with the factors {state['factors']}, and this tree has {own['factors']}: "
            "give ALRTree the same, or a state saved between two epochs"
        )
    if state["epoch"]["rank"] != rank:
        (one, count), (other, other_count) = state["epoch"]["rank"], rank
        raise ValueError(
            f"state_dict is of rank {one} of {count} within an epoch, and this is rank {other} of {other_count}: "
            "give each rank its own, or one that was saved between two epochs"
        )
    return state


def check_same_shapes(own: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """See that a state can be loaded, before any of it is.

    Args:
        own: tensors by name, or dicts of them.
        given: what shall be loaded into them.

    Raises:
        ValueError: if it has other names or shapes.
    """
    for name in sorted(set(own) ^ set(given)):
        raise ValueError(f"state_dict and this tree differ in {name!r}: {_REMEDY}")
    for name, value in own.items():
        if isinstance(value, dict):
            check_same_shapes(value, given[name])
        elif isinstance(value, Tensor) and value.shape != given[name].shape:
            raise ValueError(
                f"state_dict has {name!r} of shape {list(given[name].shape)} and this tree {list(value.shape)}: "
                f"{_REMEDY}"
            )


_REMEDY = "give ALRTree the model, optimizer, beams and factors that it is of"
