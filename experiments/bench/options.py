"""Flags that several programs here have, and what they mean."""

import math
import pathlib
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from absl import flags

from experiments import cli
from experiments.bench.layers import Place
from moe_jax.core.shard import AXES, make_mesh


def option(define: Callable, name: str, default: Any, text: str) -> flags.FlagHolder:
    """A flag that is everybody's, of programs that are imported together, whichever of them comes first."""
    return cli.flag(partial(define, allow_override=True), name, default, text)


def sizes_of(mesh: str) -> dict[str, int]:
    """`data=2,expert=4` in numbers."""
    sizes: dict[str, int] = {}
    for part in mesh.split(","):
        found = re.fullmatch(r"\s*(\w+)=([1-9]\d*)\s*", part)
        if not found or found[1] not in AXES or found[1] in sizes:
            raise ValueError(
                f"--mesh={mesh}: {part!r} is no size of an axis; write data=2,expert=4, of {', '.join(AXES)}."
            )
        sizes[found[1]] = int(found[2])
    return sizes


def simulate(n: int) -> None:
    """Simulates n devices where the platform is the CPU."""
    if n != jax.config.jax_num_cpu_devices:  # type: ignore[attr-defined]
        jax.config.update("jax_num_cpu_devices", n)


def place_of(mesh: str | None) -> Place:
    """Placement that --mesh asks for: one device without it."""
    if not mesh:
        return Place()
    sizes = sizes_of(mesh)
    simulate(math.prod(sizes.values()))
    return Place(make_mesh(**sizes))


def out(flag: str, value: str | None, kinds: tuple[str, ...] = ()) -> pathlib.Path | None:
    """A file to write, of one of these kinds, in a folder that is there."""
    if not value:
        return None
    path = pathlib.Path(value)
    if not path.parent.is_dir():
        raise ValueError(f"--{flag}={path}: there is no folder {path.parent}; make it, or give another file.")
    if path.is_dir():
        raise ValueError(f"--{flag}={path} is a folder; give a file.")
    if kinds and path.suffix not in kinds:
        raise ValueError(f"--{flag}={path} is of no kind that can be drawn; end it in {' or '.join(kinds)}.")
    return path


def at_least_one(flag: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"--{flag}={value} must be at least 1.")
    return value
