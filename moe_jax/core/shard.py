"""One shard's view of the mesh: the only file with collectives. Code below it sees local arrays."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

AXES = ("data", "expert")  # tokens are sharded over both, experts over the second
# Dimension letter -> mesh axes; what has no rule is replicated.
RULES: dict[str, str | tuple[str, ...]] = {"B": AXES, "E": "expert"}
Tree = TypeVar("Tree")


def make_mesh(data: int = 1, expert: int = 1) -> Mesh:
    """A mesh over all devices; one size may be -1, "the rest". The axis types of the project are set here."""
    n, sizes = jax.device_count(), [data, expert]
    if sizes.count(-1) == 1 and n % (known := -math.prod(sizes)) == 0:
        sizes = [n // known if s == -1 else s for s in sizes]
    if math.prod(sizes) != n or min(sizes) < 1:
        raise ValueError(
            f"mesh data={data} x expert={expert} does not multiply to the {n} devices there are; "
            "change mesh.data or mesh.expert (-1 means the rest), or simulate devices with JAX_PLATFORMS=cpu."
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


@dataclasses.dataclass(frozen=True)
class Shard:
    """The mesh axes a function may communicate over. Both empty: alone."""

    tokens: tuple[str, ...] = ()  # axes that tokens are sharded over
    experts: str | None = None  # axis that experts are sharded over

    @property
    def index(self) -> int | Int[Array, ""]:
        """Position of this shard among those that tokens are sharded over, in the order of the tokens."""
        return lax.axis_index(self.tokens) if self.tokens else 0

    def sum(self, tree: Tree) -> Tree:
        """Sums of a tree of arrays of one type over all shards, in one all-reduce."""
        if not self.tokens:
            return tree
        leaves, treedef = jax.tree.flatten(tree)
        flat = jnp.concatenate([jnp.ravel(x) for x in leaves])
        parts = jnp.split(lax.psum(flat, self.tokens), np.cumsum([x.size for x in leaves])[:-1])
        return jax.tree.unflatten(treedef, [p.reshape(x.shape) for p, x in zip(parts, leaves, strict=True)])

    def max(self, x: Array) -> Array:
        """Maximum over all shards."""
        return lax.pmax(x, self.tokens) if self.tokens else x

    def vary(self, experts: Tree) -> Tree:
        """Marks expert parameters as this shard's own along the axes they are replicated over.

        Their gradients are then summed over those axes here, whatever custom derivatives are used below.
        """
        axes = tuple(a for a in self.tokens if a != self.experts)
        return jax.tree.map(lambda w: lax.pcast(w, axes, to="varying"), experts) if axes else experts

    def send(self, x_ECD: Array) -> Array:
        """[E, C, D] -> [E/X, X*C, D]: every slot travels to its expert's shard."""
        if not self.experts:
            return x_ECD
        return lax.all_to_all(x_ECD, self.experts, split_axis=0, concat_axis=1, tiled=True)

    def receive(self, y_eCD: Array) -> Array:
        """[E/X, X*C, D] -> [E, C, D]: the inverse of `send`."""
        if not self.experts:
            return y_eCD
        return lax.all_to_all(y_eCD, self.experts, split_axis=1, concat_axis=0, tiled=True)


def current() -> Shard:
    """The shard that the current mesh (`jax.set_mesh`) implies; alone when there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or all(mesh.shape.get(a, 1) == 1 for a in AXES):
        return Shard()
    tokens = tuple(a for a in AXES if a in mesh.shape)
    return Shard(tokens, "expert" if mesh.shape.get("expert", 1) > 1 else None)


def per_shard(f: Callable, shard: Shard, in_specs: Any, out_specs: Any) -> Callable:
    """f on every shard of the current mesh; f itself when there is none."""
    if not shard.tokens:
        return f
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=True)


def token_spec(shard: Shard) -> P:
    """Layout of arrays whose first axis is the batch."""
    return P(shard.tokens or None)


def expert_spec(shard: Shard) -> P:
    """Layout of arrays whose first axis is the experts."""
    return P(shard.experts)
