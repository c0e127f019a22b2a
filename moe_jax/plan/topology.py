"""Slices of TPU pods by name, `v4:8x8x16` or `2*v5e:16x16`, and the rings of mesh axes on their torus."""

import itertools
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from moe_jax.config import suggestion
from moe_jax.core.shard import AXES
from moe_jax.costs.chips import CHIPS, Chip, chip
from moe_jax.plan.torus import Ring, ring

TPUS = {c.name: c for c in CHIPS if c.dims}
CUBE = 4  # a 3D slice of more chips than a cube is made of cubes, and closes to a torus
SMALL = {  # shapes that are not made of cubes; all shapes of 2D chips
    2: ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16), (16, 32), (32, 32)),
    3: ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)),
}


class Topology(NamedTuple):
    """`slices` slices of chips in this shape; inside a slice chips talk over links, between them over the network."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        many = f"{self.slices}*" if self.slices > 1 else ""
        return f"{many}{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def devices(self) -> int:
        """Number of devices that JAX sees."""
        return self.chips * self.chip.devices

    @property
    def closed(self) -> tuple[bool, ...]:
        """Tells for each side whether its ends are connected: in 2D if it is a pod's side, in 3D from a cube on."""
        if len(self.shape) == 2:
            side = math.isqrt(self.chip.largest)
            return tuple(n == side for n in self.shape)
        return (all(n % CUBE == 0 for n in self.shape),) * 3


def topology(name: str) -> Topology:
    """Parses a topology's name; ValueError with the nearest one that exists."""
    many, star, remainder = name.rpartition("*")
    kind, colon, sides = remainder.partition(":")
    if not colon or (star and not (many.isdecimal() and int(many))):
        raise ValueError(f"Topology {name!r} is not a name; write CHIP:SHAPE like v4:8x8x16, or 2*v5e:16x16.")
    if kind not in TPUS:
        raise ValueError(f"Topology {name!r}: no TPU is called {kind!r}{suggestion(kind, list(TPUS))}")
    parts, found = sides.split("x"), slice_shapes(chip(kind))
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ValueError(
            f"Topology {name!r}: {sides!r} is not a shape; write its sides like {format_shape(found[-1])}."
        )
    shape, slices = tuple(map(int, parts)), int(many or 1)
    if shape not in found:
        best = min(found, key=lambda other: far(shape, other))
        near = Topology(chip(kind), best, slices)
        raise ValueError(
            f"Topology {name!r}: no slice of {kind} is {sides}; the nearest is {near.name} with {near.chips} chips."
        )
    return Topology(chip(kind), shape, slices)


def format_shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def far(shape: tuple[int, ...], other: tuple[int, ...]) -> float:
    """Distance of two shapes, by number of chips and side by side."""
    sides = itertools.zip_longest(sorted(shape), sorted(other), fillvalue=1)
    chips = abs(math.log(math.prod(shape) / math.prod(other)))
    return 2 * chips + sum(abs(math.log(a / b)) for a, b in sides)


@lru_cache
def slice_shapes(chip: Chip) -> tuple[tuple[int, ...], ...]:
    """All slices of a generation, the smallest first; their sides ascend."""
    small = [s for s in SMALL[chip.dims] if math.prod(s) <= chip.largest]
    if chip.dims == 2:
        return tuple(small)
    most = chip.largest // CUBE**3  # cubes
    cubes = [
        (a * CUBE, b * CUBE, c * CUBE)
        for a in range(1, most + 1)
        for b in range(a, most // a + 1)
        for c in range(b, most // (a * b) + 1)
    ]
    return tuple(small + sorted(cubes, key=math.prod))


# ---------------------------------------------------------------- meshes


def side_lengths(mesh: Mapping[str, int], on: Topology) -> dict[str, int]:
    """Devices along every axis of a mesh, -1 inferred; ValueError with the nearest that fills the topology."""
    given = {axis: mesh.get(axis, 1) for axis in AXES}
    if given["slice"] == -1:
        given["slice"] = on.slices
    if given["slice"] != on.slices:
        raise ValueError(
            f"config.mesh.slice={given['slice']}, but {on.name} has {on.slices} slice(s); set mesh.slice={on.slices}, "
            f"or say --topology={on._replace(slices=given['slice']).name}."
        )
    known = math.prod(n for n in given.values() if n != -1)
    inferred = [axis for axis, n in given.items() if n == -1]
    if inferred and on.devices % known == 0:
        return {**given, inferred[0]: on.devices // known}
    if not inferred and known == on.devices:
        return given
    product = " x ".join(f"{axis}={n}" for axis, n in given.items() if n != 1) or "of one device"
    near = ", ".join(
        f"mesh.{axis}={n}" for axis, n in nearest_topology(given, on).items() if given[axis] not in (n, -1)
    )
    raise ValueError(f"Mesh {product} does not fill the {on.devices} devices of {on.name}; set {near}.")


def nearest_topology(given: Mapping[str, int], on: Topology) -> dict[str, int]:
    """The mesh that fills a topology with the fewest and smallest changes; an axis of -1 may have any size."""

    def change(new: dict[str, int]) -> float:
        moved = [abs(math.log(new[axis] / n)) for axis, n in given.items() if n != -1]
        return sum(1 + m for m in moved if m)

    return min(factorizations(on.devices, on.slices), key=change)


def factorizations(devices: int, slices: int = 1) -> list[dict[str, int]]:
    """Every mesh over `devices` devices in `slices` slices."""
    inside = devices // slices

    def divisors(n: int) -> list[int]:
        return [d for d in range(1, n + 1) if n % d == 0]

    found = []
    for tensor in divisors(inside):
        for expert in divisors(inside // tensor):
            for fsdp in divisors(inside // tensor // expert):
                data = inside // tensor // expert // fsdp
                found.append(dict(zip(AXES, (slices, data, fsdp, expert, tensor), strict=True)))
    return found


def rings(on: Topology, mesh: Mapping[str, int], axes: tuple[str, ...]) -> tuple[Ring, ...]:
    """Rings of a group along these axes on each side of a slice, for a mesh that fills the topology."""
    inside = tuple(1 if axis == "slice" else mesh[axis] for axis in AXES)
    shape = (*on.shape, *[1] * (3 - len(on.shape)))
    closed = (*on.closed, *[False] * (3 - len(on.shape)))
    return ring(shape, closed, on.chip.kind, on.chip.devices, inside, tuple(AXES.index(a) for a in axes))
