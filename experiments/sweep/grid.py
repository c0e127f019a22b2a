"""Reads grids, and makes the runs that they span."""

import dataclasses
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import cli
from moe_jax.config import Experiment, build

PAIRS = {"(": ")", "[": "]", "{": "}"}
LONGEST = 48  # characters of a value in a name


@dataclasses.dataclass(frozen=True)
class Point:
    """A run of a grid: its name, its config as flags over the base, and what these make."""

    name: str
    overrides: tuple[str, ...]
    exp: Experiment


def parse_axis(text: str) -> tuple[str, list[str]]:
    """Path and values of PATH=VALUE;VALUE or PATH=VALUE,VALUE; commas in brackets and quotes separate nothing."""
    path, equals, values = text.partition("=")
    path = path.strip().removeprefix(cli.PREFIX)
    if not (equals and path):
        raise ValueError(f"--grid={text} is no PATH=VALUE,VALUE; say --grid optim.clip=0.5,1.0, for instance.")
    found = split(values, ";")
    found = found if len(found) > 1 else split(values, ",")
    if "" in found:
        raise ValueError(f"--grid={text} has an empty value; give each a value, or leave out its separator.")
    if twice := [value for value, n in Counter(found).items() if n > 1]:
        raise ValueError(f"--grid={text} has {twice[0]} twice; give it once.")
    return path, found


def split(text: str, separator: str) -> list[str]:
    """The parts between separators that are in no brackets and no quotes."""
    parts, closing, quote = [""], list[str](), ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        elif c in PAIRS:
            closing.append(PAIRS[c])
        elif closing and c == closing[-1]:
            closing.pop()
        elif c == separator and not closing:
            parts.append("")
            continue
        parts[-1] += c
    return [part.strip() for part in parts]


def points(base: Mapping[str, Any], common: Sequence[str], grid: Sequence[str], seeds: int) -> list[Point]:
    """The product of all axes of a grid and the seeds, each run built; ValueError for the first that cannot be.

    base, common: the values of the config file, and overrides that all runs share. Seeds count up from the config's.
    """
    axes = dict[str, list[str]]()
    for path, values in map(parse_axis, grid):
        if path in axes:
            raise ValueError(f"--grid gives {path} twice; put all its values into one.")
        axes[path] = values
    if "seed" not in axes:
        first = build(cli.overridden(base, list(common)) if common else base).seed
        axes["seed"] = [str(first + i) for i in range(seeds)]
    elif seeds > 1:
        raise ValueError(f"--seeds={seeds} and --grid seed=... both give seeds; leave one of them out.")
    made = [_point(base, common, dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())]
    for what, key in (("name", lambda p: p.name), ("config", lambda p: p.exp)):
        first_of: dict[Any, Point] = {}
        for point in made:
            if (other := first_of.setdefault(key(point), point)) is not point:
                raise ValueError(
                    f"The runs {' '.join(other.overrides)} and {' '.join(point.overrides)} have the same {what}; "
                    "leave one of the values out, or write it in another way."
                )
    return made


def _point(base: Mapping[str, Any], common: Sequence[str], values: Mapping[str, str]) -> Point:
    overrides = tuple(f"--{cli.PREFIX}{path}={value}" for path, value in values.items())
    try:
        exp = build(cli.overridden(base, [*common, *overrides]))
    except ValueError as error:
        raise ValueError(f"{' '.join(overrides)}: {error}") from None
    return Point(run_name(values), overrides, exp)


def run_name(values: Mapping[str, str]) -> str:
    """The name of a run, by the last part of each path, or the whole path where two end alike: "peak=0.004,seed=0"."""
    ends = Counter(path.rpartition(".")[2] for path in values)
    parts = []
    for path, value in values.items():
        end = path.rpartition(".")[2]
        parts.append(f"{end if ends[end] == 1 else path}={_plain_name(value)}")
    return ",".join(parts)


def _plain_name(value: str) -> str:
    """A value in letters that any file system and shell takes; a long one is cut, and ends with its checksum."""
    name = re.sub(r"[^\w.+=-]+", "-", value, flags=re.ASCII).replace("=-", "=").strip("-") or "empty"
    name = f"-{name}" if value.startswith("-") else name
    if len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST - 9]}-{hashlib.sha256(value.encode()).hexdigest()[:8]}"
