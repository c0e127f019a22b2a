"""Flags that several programs here share."""

import math
import re

import jax

from experiments.bench.layers import Placement
from moe_jax.core.shard import AXES, make_mesh


def sizes_of(mesh: str) -> dict[str, int]:
    """Parses `data=2,expert=4`."""
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


def placement_of(mesh: str | None) -> Placement:
    """Placement on the mesh of --mesh; by default on one device."""
    if not mesh:
        return Placement()
    sizes = sizes_of(mesh)
    simulate(math.prod(sizes.values()))
    return Placement(make_mesh(**sizes))


def at_least_one(flag: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"--{flag}={value} must be at least 1.")
    return value
