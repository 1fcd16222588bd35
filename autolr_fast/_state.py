"""What a ``state_dict`` says of itself, and what is said of one that does not fit.

Parts of a state that differ in form from step to step are tuples: ``torch.distributed.checkpoint`` takes a tuple as
one value, and looks for the entries of dicts and lists one by one in what it has saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ._version import __version__

__all__ = ["HEADER", "complete"]

HEADER: Mapping[str, Any] = {"version": 2, "saved_by": f"autolr_fast {__version__}"}
"""Of every state: the version of its form, and who saved it. A new key gets a default in who reads it."""


def complete(
    state: object,
    expected: Mapping[str, Any],
    defaults: Mapping[str, Any],
    owner: str,
    since: int = 1,
) -> dict[str, Any]:
    """Return a state with a default for each key that an earlier version had not.

    Args:
        state: what the user gives.
        expected: a state of the one that reads; its keys count, and those of dicts inside of it that are not empty.
        defaults: for keys that came later than version ``since``.
        owner: the class, for errors.
        since: the earliest version that can be gone on from: the rule was another before.

    Raises:
        TypeError: if the state is not a dict.
        ValueError: if it is of a version before ``since``, if a key is missing that has no default, or one is not
            known; says which version saved it.
    """
    if not isinstance(state, dict):
        raise TypeError(f"state_dict={state!r}: pass what {owner}.state_dict() returned")
    if "version" not in state or "saved_by" not in state:
        raise ValueError(
            f"state_dict is none of {owner}, but of something else, such as another scheduler (it has "
            f"{', '.join(map(repr, list(state)[:3])) or 'nothing'}): load the states of model and optimizer alone, "
            f"and begin with a new {owner}"
        )
    saved_by = f"{state.get('saved_by', 'something else')}, version {state.get('version', 'unknown')}"
    if state.get("version") in range(since):
        raise ValueError(
            f"state_dict was saved by {saved_by}, and the rule of {owner} is another since version {since}: no "
            "training goes on from it. Load it by the version that saved it, or load the states of model and "
            f"optimizer alone and give these to a new {owner}, which starts from the learning rate that it finds"
        )
    filled = {**defaults, **state}
    if fault := _fault(filled, expected):
        raise ValueError(
            f"state_dict {fault}: it was saved by {saved_by}, and this is {HEADER['saved_by']}, version "
            f"{HEADER['version']}. Give {owner} the arguments that it was saved with, or load it by the version "
            "that saved it"
        )
    return filled


def _fault(state: Mapping[str, Any], expected: Mapping[str, Any], path: str = "") -> str:
    """Return what is wrong with the keys of a state; nothing if they fit."""
    if missing := sorted(set(expected) - set(state)):
        return f"has no {path + missing[0]!r}"
    if unknown := sorted(set(state) - set(expected)):
        return f"has {path + unknown[0]!r}, which is not known here"
    for key, value in expected.items():
        if isinstance(value, dict) and value:
            if not isinstance(state[key], dict):
                return f"has {state[key]!r} as {path + key!r}"
            if fault := _fault(state[key], value, f"{path}{key}."):
                return fault
    return ""
