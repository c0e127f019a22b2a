"""Which parameter lies where on a mesh, and what a device holds."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P

from moe_jax import train
from moe_jax.config import Experiment
from moe_jax.core import dims


class Placed(NamedTuple):
    """One parameter, with what the optimizer remembers of it."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[tuple[str, ...], ...]  # mesh axes that each of its own is spread over
    device_bytes: int  # of the parameter, on one device
    optimizer_bytes: int  # beside it


def placement(exp: Experiment) -> list[Placed]:
    """Every parameter of an experiment on its mesh, "the rest" being one; nothing is made."""
    tx, _ = exp.optim.build(exp.run.steps)
    sizes = {axis: max(n, 1) for axis, n in exp.mesh}
    state = jax.eval_shape(partial(train.init, exp, tx))
    layouts = train.layouts_of(exp, state, sizes)
    remembered: dict[tuple[str, ...], int] = {}
    for path, leaf in jax.tree.leaves_with_path(state.opt_state):
        layout = at(layouts.state.opt_state, path)
        remembered[names(path)] = remembered.get(names(path), 0) + local_bytes(leaf, layout, sizes)
    placed = []
    for path, leaf in jax.tree.leaves_with_path(state.params):
        layout = at(layouts.params, path)
        axes = tuple(dims.axes(layout, leaf.ndim))
        mine, beside = local_bytes(leaf, layout, sizes), remembered.get(names(path), 0)
        placed.append(Placed("/".join(names(path)), leaf.shape, axes, mine, beside))
    return placed


def at(tree: Any, path: Any) -> P:
    """The leaf of a tree of layouts at the path of another tree's leaf."""
    found = dict(jax.tree.leaves_with_path(tree, is_leaf=lambda x: isinstance(x, P)))
    return found[path]


def names(path: Any) -> tuple[str, ...]:
    return tuple(str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey))


def local_bytes(leaf: Any, layout: P, sizes: dict[str, int]) -> int:
    """Bytes of a device's part."""
    return math.prod(dims.local(leaf.shape, layout, sizes)) * leaf.dtype.itemsize
