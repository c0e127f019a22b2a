"""Time of a collective on a torus: its group's part of each side, and the bytes on each link.

JAX itself places the mesh, on stand-ins for the devices, so these are the positions of the program's groups.
"""

import dataclasses
import itertools
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jax.experimental.mesh_utils import create_device_mesh


@dataclasses.dataclass(frozen=True)
class TorusDevice:
    """Device of a torus, with the attributes that JAX's mesh construction reads."""

    id: int
    device_kind: str
    coords: tuple[int, int, int]
    core_on_chip: int
    platform: str = "tpu"
    process_index: int = 0
    slice_index: int = 0


class Ring(NamedTuple):
    """Chips of a group along one side of the torus: every `stride`-th; closed if the last is next to the first."""

    chips: int
    stride: int
    closed: bool

    @property
    def links(self) -> float:
        """Links that a chip sends over at once, in a ring or a line; interleaved groups share them."""
        return (2 if self.closed else 1) / self.stride

    @property
    def carried(self) -> float:
        """Bytes over the busiest link, one way, for each byte that a chip sends evenly to all the others.

        A ring of n: n/4 hops on average, two links per chip. A line: n/2 chips send half over the middle.
        """
        return self.chips * self.stride / (8 if self.closed else 4)


@lru_cache(maxsize=4096)
def mesh_coordinates(shape: tuple[int, int, int], kind: str, devices: int, mesh: tuple[int, ...]) -> np.ndarray:
    """Devices of a slice, with coordinates, in the shape of a mesh."""
    sides = itertools.product(*map(range, reversed(shape)))
    coordinates = [((x, y, z), core) for z, y, x in sides for core in range(devices)]
    stand_ins = [TorusDevice(i, kind, coords, core) for i, (coords, core) in enumerate(coordinates)]
    return create_device_mesh(mesh, stand_ins, allow_split_physical_axes=True)


@lru_cache(maxsize=65536)
def ring(
    shape: tuple[int, int, int],
    closed: tuple[bool, ...],
    kind: str,
    devices: int,
    mesh: tuple[int, ...],
    axes: tuple[int, ...],
) -> tuple[Ring, ...]:
    """A ring for every side of the torus that a group along these axes of the mesh reaches along; () inside a chip."""
    corner = tuple(slice(None) if axis in axes else 0 for axis in range(len(mesh)))
    group = [device.coords for device in mesh_coordinates(shape, kind, devices, mesh)[corner].flat]
    found = []
    for side, (n, ends) in enumerate(zip(shape, closed, strict=True)):
        positions = sorted({coords[side] for coords in group})
        if len(positions) > 1:
            stride = min(b - a for a, b in itertools.pairwise(positions))
            found.append(Ring(len(positions), stride, ends and len(positions) * stride == n))
    return tuple(found)


def collective_seconds(op: str, wire: float, rings: Iterable[Ring], link: float) -> float:
    """Seconds of a collective in which a chip sends `wire` bytes, over links of `link` bytes a second, one way.

    All-to-alls are limited by the busiest link, the others by the links that a chip can use at once. 0 inside a chip.
    """
    rings = list(rings)
    if not rings:
        return 0.0
    if op.endswith("all-to-all"):
        return wire * max(r.carried for r in rings) / link
    return wire / (link * sum(r.links for r in rings))
