"""Ranges of numeric fields: declared in a field's type, checked wherever a component is made, shown in docs/config.md.

    b1: Annotated[float, Range(0, 1, "[)")] = 0.9
    window: PositiveInt | None = None

    def __post_init__(self):
        check_ranges(self)

Whole numbers are int32 on devices, and numbers float32: one that is outside of its range there is refused too, as a
b1 that rounds to 1.
"""

import dataclasses
import functools
import math
import numbers
import types
import typing
from typing import Annotated, Any

import numpy as np

from moe_jax.core.quoted import quoted

WORDS = {int: "a whole number", float: "a number", str: "a string", bool: "True or False", types.NoneType: "None"}
NUMBERS = {int: numbers.Integral, float: numbers.Real}  # NumPy's are some of them
UNIONS = (typing.Union, types.UnionType)
LARGEST, SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)  # as float32


@dataclasses.dataclass(frozen=True)
class Range:
    """An interval from `low` to `high`; ends: "[)" contains low and not high, as in mathematics."""

    low: int | float
    high: int | float
    ends: str = "[]"

    def __contains__(self, value: Any) -> bool:
        above = self.low <= value if self.ends[0] == "[" else self.low < value
        return bool(above and (value <= self.high if self.ends[1] == "]" else value < self.high))

    def __str__(self) -> str:
        return f"{self.ends[0]}{_end(self.low)}, {_end(self.high)}{self.ends[1]}"


PositiveInt = Annotated[int, Range(1, 2**31, "[)")]
NonNegativeInt = Annotated[int, Range(0, 2**31, "[)")]
PositiveFloat = Annotated[float, Range(0, math.inf, "()")]
NonNegativeFloat = Annotated[float, Range(0, math.inf, "[)")]


def check_ranges(component: Any) -> None:
    """ValueError where a field of a dataclass that has a range is no such number: what is given, what is allowed."""
    cls: Any = type(component)
    for name, hint in ranged_fields(cls).items():
        check_value(f"{cls.__name__}({name}=#)", getattr(component, name), hint)


def check_value(field: str, value: Any, hint: Any) -> None:
    """ValueError where a value has another type, or is out of range; field: how it was given, with # for the value."""
    if fits(value, hint):
        return
    given = field.replace("#", quoted(value))
    rounded = _float32(value) if isinstance(value, float) and _finite(value) else value
    if rounded != value and rounded in (0, 1, math.inf):  # where ranges end
        given += f" is {rounded:g} in float32, and"
    raise ValueError(f"{given} must be {in_words(hint)}.")


@functools.cache
def ranged_fields(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields that have a range."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if _has_range(hints[f.name])}


def fits(value: Any, hint: Any) -> bool:
    """Tells whether a value has the annotated type and lies in its range; lists and dicts are not looked into."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in UNIONS:
        return any(fits(value, h) for h in args)
    if origin is Annotated:
        return fits(value, args[0]) and all(_within(value, args[0], r) for r in args[1:] if isinstance(r, Range))
    if origin is tuple and isinstance(value, tuple):
        each = args[:1] * len(value) if args[-1] is ... else args
        return len(each) == len(value) and all(map(fits, value, each))
    kind = origin or hint
    if kind in NUMBERS:
        return isinstance(value, NUMBERS[kind]) and not isinstance(value, bool) and _finite(value)
    return isinstance(value, kind)


def without_range(hint: Any) -> Any:
    """The type of a number, without the range that it may have."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def in_words(hint: Any) -> str:
    """A type and its range, in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in UNIONS:
        return " or ".join(map(in_words, args))
    if origin is Annotated:
        return " in ".join([in_words(args[0]), *(str(r) for r in args[1:] if isinstance(r, Range))])
    if origin is tuple and args[-1] is ... and args[0] is not Any:
        return f"a tuple, each entry {in_words(args[0])}"
    kind = origin or hint
    return WORDS.get(kind, f"a {kind.__name__.lower()}")


def _within(value: Any, kind: type, allowed: Range) -> bool:
    on_device = Range(_float32(allowed.low), _float32(allowed.high), allowed.ends)
    return value in allowed and (kind is int or _float32(value) in on_device)


def _float32(value: Any) -> float:
    """A number as a device computes with it: too small is 0, too large infinite."""
    if abs(value) > LARGEST:
        return math.inf if value > 0 else -math.inf
    return float(np.float32(value)) if abs(value) >= SMALLEST else 0.0


def _finite(value: Any) -> bool:
    return isinstance(value, numbers.Rational) or math.isfinite(value)


def _has_range(hint: Any) -> bool:
    if typing.get_origin(hint) is Annotated:
        return any(isinstance(extra, Range) for extra in typing.get_args(hint))
    return any(map(_has_range, typing.get_args(hint)))


def _end(number: int | float) -> str:
    if isinstance(number, int) and number >= 2**16 and number.bit_count() == 1:
        return f"2**{number.bit_length() - 1}"
    return str(number) if isinstance(number, int) else f"{number:g}"
