"""Sharding of every parameter on a mesh, and the bytes of a device."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P

from moe_jax import step
from moe_jax.config import Experiment
from moe_jax.core import dims
from moe_jax.optim import names_of


class ParamPlacement(NamedTuple):
    """Sharding of one parameter, with the bytes of its optimizer state."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[tuple[str, ...], ...]  # mesh axes that each axis is sharded over
    device_bytes: int  # of the parameter, on one device
    optimizer_bytes: int  # of its optimizer state, on one device

    @property
    def words(self) -> tuple[str, str, str]:
        """Describes a parameter: name, shape, and the axes it is sharded over."""
        return self.name, "x".join(map(str, self.shape)), ", ".join("x".join(axes) or "-" for axes in self.axes)


def placement(exp: Experiment) -> list[ParamPlacement]:
    """Placement of every parameter of an experiment on its mesh, inferred axes (-1) counting as 1; creates no array."""
    tx, _ = exp.optim.build(exp.run.steps)
    sizes = {axis: max(n, 1) for axis, n in exp.mesh}
    state = jax.eval_shape(partial(step.init, exp, tx))
    specs = step.state_specs(exp, state, sizes)
    state_bytes: dict[tuple[str, ...], int] = {}
    for (path, leaf), spec in with_specs(state.opt_state, specs.state.opt_state):
        state_bytes[names_of(path)] = state_bytes.get(names_of(path), 0) + local_bytes(leaf, spec, sizes)
    return [
        ParamPlacement(
            "/".join(names := names_of(path)),
            leaf.shape,
            tuple(dims.axes(spec, leaf.ndim)),
            local_bytes(leaf, spec, sizes),
            state_bytes.get(names, 0),
        )
        for (path, leaf), spec in with_specs(state.params, specs.params)
    ]


def with_specs(tree: Any, specs: Any) -> Iterator[tuple[tuple[Any, Any], P]]:
    """Leaves with their paths and PartitionSpecs."""
    return zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(specs), strict=True)


def local_bytes(leaf: Any, spec: P, sizes: dict[str, int]) -> int:
    """Bytes of the local part of an array."""
    return math.prod(dims.local_shape(leaf.shape, spec, sizes)) * leaf.dtype.itemsize
