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
    """One parameter, with what the optimizer remembers of it."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[tuple[str, ...], ...]  # mesh axes that each of its own is spread over
    device_bytes: int  # of the parameter, on one device
    optimizer_bytes: int  # beside it

    @property
    def words(self) -> tuple[str, str, str]:
        """Describes a parameter: name, shape, and the axes it is sharded over."""
        return self.name, "x".join(map(str, self.shape)), ", ".join("x".join(axes) or "-" for axes in self.axes)


def placement(exp: Experiment) -> list[ParamPlacement]:
    """Every parameter of an experiment on its mesh, "the rest" being one; nothing is made."""
    tx, _ = exp.optim.build(exp.run.steps)
    sizes = {axis: max(n, 1) for axis, n in exp.mesh}
    state = jax.eval_shape(partial(step.init, exp, tx))
    layouts = step.state_specs(exp, state, sizes)
    remembered: dict[tuple[str, ...], int] = {}
    for (path, leaf), layout in with_specs(state.opt_state, layouts.state.opt_state):
        remembered[names_of(path)] = remembered.get(names_of(path), 0) + local_bytes(leaf, layout, sizes)
    return [
        ParamPlacement(
            "/".join(names := names_of(path)),
            leaf.shape,
            tuple(dims.axes(layout, leaf.ndim)),
            local_bytes(leaf, layout, sizes),
            remembered.get(names, 0),
        )
        for (path, leaf), layout in with_specs(state.params, layouts.params)
    ]


def with_specs(tree: Any, layouts: Any) -> Iterator[tuple[tuple[Any, Any], P]]:
    """Leaves with their paths, and how they lie."""
    return zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(layouts), strict=True)


def local_bytes(leaf: Any, layout: P, sizes: dict[str, int]) -> int:
    """Bytes of a device's part."""
    return math.prod(dims.local_shape(leaf.shape, layout, sizes)) * leaf.dtype.itemsize
