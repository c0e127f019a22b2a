"""Finds where configs differ, field by field, into components."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from moe_jax.config import COMPONENTS, parse

ABSENT = "-"  # the value of a field that a config does not have


def differences(configs: Sequence[dict[str, Any]], path: str = "config") -> dict[str, list[str]]:
    """The fields in which configs differ: {"config.optim.schedule.peak": ["0.004", "0.008"]}, a value for each config.

    Components of one class are compared by their fields, lists of components of the same classes entry by entry.
    """
    return {name: list(map(shown, values)) for name, values in _differing(path, list(configs)).items()}


def shown(value: Any) -> str:
    """A value as it is written after `--config.PATH=`."""
    return value if isinstance(value, str) else json.dumps(value) if isinstance(value, dict) else repr(value)


def _differing(path: str, values: list[Any]) -> dict[str, list[Any]]:
    values = [_opened(value) for value in values]
    if all(value == values[0] for value in values):
        return {}
    kinds = {type(value) for value in values}
    if kinds == {dict}:
        names = dict.fromkeys(name for value in values for name in value)
        parts = {f"{path}.{name}": [value.get(name, ABSENT) for value in values] for name in names}
    elif len(kinds) == 1 and dataclasses.is_dataclass(values[0]):
        names = [f.name for f in dataclasses.fields(values[0])]
        parts = {f"{path}.{name}": [getattr(value, name) for value in values] for name in names}
    elif kinds == {tuple} and (entries := _entries(values)):
        parts = {f"{path}.{entry}".rstrip("."): [value[i] for value in values] for i, entry in enumerate(entries)}
    else:
        return {path: values}
    return {name: found for part, several in parts.items() for name, found in _differing(part, several).items()}


def _entries(values: Sequence[tuple]) -> list[str]:
    """Names the entries of lists in a path: by classes, a single one by nothing; [] where lists differ in these."""
    classes = {tuple(type(_opened(entry)).__name__ for entry in value) for value in values}
    names = list(classes.pop())
    if classes or len(set(names)) < len(names) or not set(names) <= set(COMPONENTS):
        return []
    return names if len(names) > 1 else [""]


def _opened(value: Any) -> Any:
    """A component for the string of its constructor call, a tuple for a list."""
    if isinstance(value, str) and value.partition("(")[0].strip() in COMPONENTS:
        try:
            return parse(value)
        except ValueError:
            return value
    return tuple(value) if isinstance(value, list) else value
