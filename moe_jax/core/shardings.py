"""Shardings of any tree of arrays on a mesh, by the names of its leaves; others' leaves are replicated."""

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from moe_jax.core import dims
from moe_jax.core.shard import rules_for

SUMS = ("v_row", "v_col")  # Adafactor's, which lack an axis of the parameter whose name they have


def shardings(tree: Any, mesh: Mesh, exchange: Any = None) -> Any:
    """Returns a NamedSharding for every leaf of a tree: Linen or NNX parameters, a TrainState, an optimizer's state.

    A leaf goes by the last name on its path, so an optimizer's moments are sharded as their parameters. `up_EDF` is
    sharded along E, D and F by the rules of `core.shard`, over the axes that the mesh has; further axes in front (of
    nn.scan or nn.vmap) are not sharded. Vectors and routers are replicated, and so is a leaf whose name says no
    dimensions (`kernel`, `count`) or more than it has.

    tree: of arrays, or of what has a shape (`jax.eval_shape`).
    exchange: that of the layers' MoEConfig, where it is not over the mesh axis `expert` alone (`TwoLevel()`).
    Raises ValueError where a size is not a multiple of the mesh axes it is sharded over.
    """
    rules = rules_for(exchange, dict(mesh.shape))

    def leaf(path: tuple, x: Any) -> NamedSharding:
        shape = tuple(getattr(x, "shape", ()))
        spec = spec_of(path_names(path), len(shape), rules)
        for axis, over in uneven(shape, spec, mesh.shape):
            raise ValueError(
                f"{jax.tree_util.keystr(path)} has shape {shape}, and axis {axis} does not divide evenly over "
                f"{' x '.join(f'mesh.{a}={mesh.shape[a]}' for a in over)}; make it a multiple, or change the mesh."
            )
        return NamedSharding(mesh, spec)

    return jax.tree.map_with_path(leaf, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays whose first axis is the batch: over all mesh axes that tokens are sharded over."""
    return NamedSharding(mesh, P(rules_for(None, dict(mesh.shape))["B"] or None))


def path_names(path: tuple) -> list[str]:
    """Returns the names on the way to a leaf, without that of the box around it (nnx.Variable, nn.Partitioned)."""
    keys = [getattr(key, "key", getattr(key, "name", None)) for key in path]
    names = [key for key in keys if isinstance(key, str)]
    return names[:-1] if names[-1:] == ["value"] else names


def spec_of(names: list[str], rank: int, rules: dims.Rules) -> P:
    """Returns how a leaf with these names is sharded, as `shardings` says."""
    name = names[-1] if names else ""
    letters = dims.suffix(name) if "_" in name else ""
    if name.startswith("router") or not 1 < len(letters) <= rank or set(names) & set(SUMS):
        return P()
    try:
        return dims.spec(letters, rules, rank)
    except ValueError:  # two dimensions over one mesh axis: no parameter of ours
        return P()


def uneven(shape: tuple[int, ...], spec: P, sizes: Mapping[str, int]) -> list[tuple[int, tuple[str, ...]]]:
    """Returns the axes of an array that do not divide evenly over their mesh axes, and these."""
    over = enumerate(dims.axes(spec, len(shape)))
    return [(axis, names) for axis, names in over if shape[axis] % math.prod(sizes[a] for a in names)]


def constrain(name: str, w: Array, exchange: Any = None) -> Array:
    """A new parameter, sharded over the current mesh as `shardings` says, so that no device ever holds all of it.

    It is unchanged where there is no mesh, where a size does not divide evenly (a call of the layer refuses it), and
    along axes that are part of its type (`AxisType.Explicit`).
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {axis: mesh.shape[axis] for axis in mesh.auto_axes}
    spec = spec_of([name], w.ndim, rules_for(exchange, sizes))
    if not any(spec) or uneven(w.shape, spec, sizes):
        return w
    return jax.lax.with_sharding_constraint(w, spec)
