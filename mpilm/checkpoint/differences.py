"""What two nested dictionaries disagree about, in words: why a checkpoint does not fit a run."""

from __future__ import annotations

from typing import Any

MISSING = "nothing"


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """One line for each key whose values differ, such as `model.layers: expected 6, found 4`; empty if none do.

    Tuples and lists are the same thing (JSON has only one of them), and so are 1 and 1.0.
    """
    one, other = _flat(expected), _flat(found)
    return [f"{key}: expected {_shown(one, key)}, found {_shown(other, key)}"
            for key in {**one, **other} if key not in one or key not in other or one[key] != other[key]]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _shown(values: dict[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else MISSING
