"""One shard's view of the mesh: the only file with collectives. Code below it sees local arrays.

slice    over the data-centre network        tokens
data     nothing: everything is replicated   tokens
fsdp     parameters, gathered when used      tokens
expert   experts                             tokens
tensor   hidden units and heads              all its shards see the same tokens
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int

from moe_jax.core import dims
from moe_jax.core.linear import linear_map
from moe_jax.core.rows import LazyRows, materialize

AXES = ("slice", "data", "fsdp", "expert", "tensor")
TOKEN_AXES = AXES[:-1]  # axes that the batch is sharded over
# Dimension letter -> mesh axes; what has no rule is replicated.
RULES: dims.Rules = {
    "B": TOKEN_AXES,
    "E": ("expert",),
    **{letter: ("fsdp",) for letter in dims.WIDTHS},
    **{letter: ("tensor",) for letter in "FHJ"},
}
COLLECTIVES = "collectives"  # rematerialisation name of results of collectives
UNSPECIFIED = 0.0  # rows of an emulated buffer that nothing is written to; a TPU leaves there what was in memory
Tree = TypeVar("Tree")


def make_mesh(devices: Sequence[Any] | None = None, **sizes: int) -> Mesh:
    """A mesh over all devices (or these), `make_mesh(data=2, expert=4)`; one size may be -1, inferred from the others.

    The axis types of the project are set here.
    """
    if unknown := sorted(set(sizes) - set(AXES)):
        raise ValueError(f"mesh has no axis {unknown[0]!r}; there are {', '.join(AXES)}.")
    n = jax.device_count() if devices is None else len(devices)
    all_sizes = [sizes.get(axis, 1) for axis in AXES]
    if all_sizes.count(-1) == 1 and n % (known := -math.prod(all_sizes)) == 0:
        all_sizes = [n // known if s == -1 else s for s in all_sizes]
    if math.prod(all_sizes) != n or min(all_sizes) < 1:
        given = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "of one device"
        raise ValueError(
            f"mesh {given} does not multiply to the {n} devices there are; change a size "
            "(-1 is inferred), or simulate devices with JAX_PLATFORMS=cpu."
        )
    types, used = (AxisType.Auto,) * len(AXES), devices or jax.devices()
    if len({getattr(d, "slice_index", 0) for d in used}) > 1:
        return Mesh(hybrid_device_mesh(used, tuple(all_sizes)), AXES, axis_types=types)
    # A mesh axis may be part of a side of the torus.
    mesh_devices = create_device_mesh(all_sizes, used, allow_split_physical_axes=True)
    return Mesh(mesh_devices, AXES, axis_types=types)


def hybrid_device_mesh(devices: Sequence[Any], sizes: tuple[int, ...]) -> np.ndarray:
    """Devices in the shape of a mesh whose first axis alone crosses slices."""
    slices = len({d.slice_index for d in devices})
    if sizes[0] != slices:
        raise ValueError(f"mesh.slice={sizes[0]}, but the devices are in {slices} slices; set mesh.slice={slices}.")
    across = (slices, *[1] * (len(sizes) - 1))
    return create_hybrid_device_mesh((1, *sizes[1:]), across, devices, allow_split_physical_axes=True)


def rules_for(exchange: Any = None, sizes: Mapping[str, int] | None = None) -> dims.Rules:
    """The rules of a model whose experts are sharded by this exchange, and with `sizes` only axes larger than 1."""
    rules = {**RULES, "E": tuple(exchange.over)} if exchange is not None else RULES
    if sizes is None:
        return rules
    return {letter: tuple(a for a in axes if sizes.get(a, 1) > 1) for letter, axes in rules.items()}


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard's mesh axes larger than 1, and its collectives. All empty: no mesh."""

    tokens: tuple[str, ...] = ()  # that tokens are sharded over
    experts: tuple[str, ...] = ()  # that experts are sharded over
    fsdp: tuple[str, ...] = ()  # that parameters are sharded over until they are gathered for use
    tensor: tuple[str, ...] = ()  # that hidden units and heads are sharded over
    exchange: Any = None  # how rows and experts meet
    distinct: int = 1  # choices of a token that are known to be different experts

    @property
    def alone(self) -> bool:
        return not (self.tokens or self.tensor)

    @property
    def rules(self) -> dims.Rules:
        """Dimension letter -> axes."""
        widths = {letter: self.fsdp for letter in dims.WIDTHS}
        return {"B": self.tokens, "E": self.experts, **widths, **{letter: self.tensor for letter in "FHJ"}}

    @property
    def batch_shard_index(self) -> int | Int[Array, ""]:
        """Index of this shard among those that the batch is sharded over, in token order."""
        return lax.axis_index(self.tokens) if self.tokens else 0

    # ---- totals

    def sum(self, tree: Tree) -> Tree:
        """Sums of a tree of arrays of one type over all batch shards, in one all-reduce."""
        if not self.tokens:
            return tree
        leaves, treedef = jax.tree.flatten(tree)
        flat = jnp.concatenate([jnp.ravel(x) for x in leaves])
        total = checkpoint_name(lax.psum(flat, self.tokens), COLLECTIVES)
        parts = jnp.split(total, np.cumsum([x.size for x in leaves])[:-1])
        return jax.tree.unflatten(treedef, [p.reshape(x.shape) for p, x in zip(parts, leaves, strict=True)])

    def max(self, x: Array) -> Array:
        """Maximum over all batch shards."""
        return checkpoint_name(lax.pmax(x, self.tokens), COLLECTIVES) if self.tokens else x

    # ---- parameters

    def unshard(self, name: str, w: Array, dtype: Any = None) -> Array:
        """Gathers a parameter over fsdp, in the type it is used in; its gradient is reduce-scattered."""
        letters = dims.dims_of(name)
        cut = dims.fsdp_dim(letters)
        if not self.fsdp or not cut:
            return w
        w = w if dtype is None else w.astype(dtype)  # cast before the gather: half the bytes in bfloat16
        return lax.all_gather(w, self.fsdp, axis=w.ndim - len(letters) + letters.index(cut), tiled=True)

    def pvary(self, params: Tree) -> Tree:
        """Marks parameters as varying over the token axes (`lax.pcast`), so that AD leaves their gradients unreduced.

        `reduce` sums them once.
        """
        return jax.tree.map(lambda w: _varying(w, self.tokens), params)

    def reduce(self, gradients: Any, old: Any, new: Any) -> Any:
        """Sums gradients over the batch shards, from the sharding `old` to the sharding `new`.

        Axes that only `new` shards over are reduce-scattered, the others all-reduced.
        """

        def total(g: Array, old: P, new: P) -> Array:
            left = set(self.tokens)
            for i, (before, after) in enumerate(zip(dims.axes(old, g.ndim), dims.axes(new, g.ndim), strict=True)):
                if more := after[len(before) :]:
                    g = lax.psum_scatter(g, more, scatter_dimension=i, tiled=True)
                left -= set(after)
            return lax.psum(g, tuple(a for a in self.tokens if a in left)) if left else g

        return jax.tree.map(total, gradients, old, new)

    # ---- tensor parallelism (Megatron-LM, arXiv:1909.08053, sec. 3): between `tensor_enter` and
    # `tensor_exit` a shard has some of the hidden units or heads

    def tensor_enter(self, x: Tree) -> Tree:
        """Enters the tensor-parallel part: the identity, whose gradients are summed over the tensor axis."""
        return jax.tree.map(lambda a: _varying(a, self.tensor), x)

    def tensor_exit(self, y: Array) -> Array:
        """Leaves the tensor-parallel part: sums the partial outputs over the tensor axis."""
        return checkpoint_name(lax.psum(y, self.tensor), COLLECTIVES) if self.tensor else y

    def bias_once(self, name: str, w: Array) -> Array:
        """A bias of the summed output (`down_ED`): zero on every tensor shard but the first."""
        if not self.tensor or "F" in dims.dims_of(name):
            return w
        return jnp.where(lax.axis_index(self.tensor) == 0, w, 0)

    # ---- experts

    def apply_experts(
        self, experts: Callable, params: Any, x: Array | LazyRows, groups: Any
    ) -> tuple[Array, Bool[Array, "..."]]:
        """Applies the experts to rows grouped by all E experts, over the exchange where experts are sharded.

        Also returns which rows have reached an expert.
        """
        apply = lambda params, x, groups: groups.apply(experts, params, x)  # noqa: E731
        if not self.experts:
            return apply(params, x, groups), jnp.ones((), bool)
        return self.exchange(self, apply, params, materialize(x), groups)

    def axis_size(self, axes: tuple[str, ...]) -> int:
        """Number of shards along these axes."""
        return lax.axis_size(axes) if axes else 1

    def axis_index(self, axes: tuple[str, ...]) -> Int[Array, ""]:
        """Index of this shard along these axes."""
        return lax.axis_index(axes)

    def all_to_all(self, x: Array, axes: tuple[str, ...], split: int, concat: int) -> Array:
        """All-to-all: part i along `split` goes to shard i; arriving parts are concatenated along `concat`."""
        if not axes:
            return x
        return checkpoint_name(lax.all_to_all(x, axes, split_axis=split, concat_axis=concat, tiled=True), COLLECTIVES)

    def gather(self, x: Array, axes: tuple[str, ...], tiled: bool = True) -> Array:
        """Gathers x from all shards, along the first axis (tiled) or a new one in front of it."""
        return lax.all_gather(x, axes, tiled=tiled) if axes else (x if tiled else x[None])

    def send_slices(self, x: Array, slices: "Slices", rows: int) -> Array:
        """[R, ...] -> [rows, ...]: slices of rows travel between the shards of the experts; others are unspecified."""
        return checkpoint_name(_send_slices(x, slices, rows, self.experts), COLLECTIVES)


def _varying(x: Array, axes: tuple[str, ...]) -> Array:
    """Marks floating-point arrays as varying along these axes, where they are not yet."""
    new = [a for a in axes if a not in jax.typeof(x).manual_axis_type.varying]
    return lax.pcast(x, tuple(new), to="varying") if new and jnp.issubdtype(x.dtype, jnp.floating) else x


class Slices(NamedTuple):
    """Slices of rows sent between X shards, e for every pair: offsets and sizes.

    Every shard has those of all pairs, so that rows can be sent back.
    """

    sizes_XXe: Int[Array, "X X e"]  # source, destination, slice
    at_source_XXe: Int[Array, "X X e"]
    at_destination_XXe: Int[Array, "X X e"]

    def reverse(self) -> "Slices":
        """Slices that send the same rows back."""
        sizes, source, destination = (a.swapaxes(0, 1) for a in self)
        return Slices(sizes, destination, source)


def _send_slices(x: Array, slices: Slices, rows: int, axes: tuple[str, ...]) -> Array:
    """`ragged_all_to_all` on TPU; elsewhere all rows are gathered, and each shard selects its own.

    Rows that are in no slice are unspecified, in the gradient too.
    """

    def sent(slices: Slices, x: Array, rows: int) -> Array:
        ways = {"tpu": partial(_ragged, rows=rows, axes=axes), "default": partial(_emulated, rows=rows, axes=axes)}
        return lax.platform_dependent(x, slices, **ways)

    forward, n = partial(sent, rows=rows), len(x)
    return linear_map(forward, lambda slices, g: sent(slices.reverse(), g, n), slices, x)


def _ragged(x: Array, slices: Slices, rows: int, axes: tuple[str, ...]) -> Array:
    me = lax.axis_index(axes)
    bounds = (slices.at_source_XXe[me], slices.sizes_XXe[me], slices.at_destination_XXe[me], slices.sizes_XXe[:, me])
    empty = _varying(lax.empty((rows, *x.shape[1:]), x.dtype), tuple(jax.typeof(x).manual_axis_type.varying))
    y = lax.ragged_all_to_all(x, empty, *(a.reshape(-1) for a in bounds), axis_name=axes[0] if len(axes) == 1 else axes)
    return _varying(y, tuple(jax.typeof(x).manual_axis_type.varying))


def _emulated(x: Array, slices: Slices, rows: int, axes: tuple[str, ...]) -> Array:
    """Emulates `ragged_all_to_all`: a row is of the last slice that starts at or before it; empty slices sort first."""
    me, n = lax.axis_index(axes), x.shape[0]
    starts = slices.at_destination_XXe[:, me].reshape(-1)
    sizes = slices.sizes_XXe[:, me].reshape(-1)
    order = jnp.lexsort((sizes, starts))
    row_R = jnp.arange(rows)
    slice_R = order[jnp.maximum(jnp.searchsorted(starts[order], row_R, side="right") - 1, 0)]
    offset_R = row_R - starts[slice_R]
    first = (n * jnp.arange(slices.sizes_XXe.shape[0])[:, None] + slices.at_source_XXe[:, me]).reshape(-1)
    there_R = (offset_R >= 0) & (offset_R < sizes[slice_R])
    source_R = jnp.where(there_R, first[slice_R] + offset_R, -1)
    everything = lax.all_gather(x, axes, tiled=True)
    rows_of = everything[jnp.maximum(source_R, 0)]
    return jnp.where(there_R.reshape(-1, *[1] * (x.ndim - 1)), rows_of, UNSPECIFIED)


def check_expert_axes(exchange: Any) -> None:
    """Refuses to shard experts over axes that do not exist or have another use."""
    allowed = ("slice", "expert")
    if not exchange.over or [a for a in allowed if a in exchange.over] != list(exchange.over):
        raise ValueError(
            f"{exchange}: experts are sharded over the mesh axes ('expert',) or ('slice', 'expert'), in this order."
        )


# ---------------------------------------------------------------- where code runs


def from_mesh(exchange: Any = None) -> Shard:
    """The shard that the current mesh (`jax.set_mesh`) implies; Shard() when there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {} if mesh.empty else dict(mesh.shape)
    rules = rules_for(exchange, sizes)
    return Shard(rules["B"], rules["E"], rules["D"], rules["F"], exchange)


def with_batch_axes(shard: Shard, tokens: Any, params: Any) -> Shard:
    """The shard of a caller's shard_map: tokens are also sharded over axes of other names along which they vary alone.

    Axes along which parameters vary too belong to other layers (stages of a pipeline, an ensemble): nothing is summed.
    With check_vma=False types do not say along which axes arrays vary, and a warning says what is not summed.
    """
    mesh = jax.sharding.get_abstract_mesh()
    foreign = [a for a in mesh.axis_names if a in mesh.manual_axes and a not in AXES and mesh.shape[a] > 1]
    if foreign and not varies_along(lax.axis_index(foreign[0])):
        warnings.warn(
            f"This shard_map over the mesh axes {foreign} has check_vma=False, which hides whether tokens are sharded "
            "over them: auxiliary losses, statistics and noise are those of one shard; leave out check_vma, or name "
            f"the axes as moe_jax.make_mesh does ({', '.join(TOKEN_AXES)}).",
            stacklevel=4,
        )
    alone = set(varies_along(tokens)) - set(varies_along(params))
    return dataclasses.replace(shard, tokens=(*(a for a in foreign if a in alone), *shard.tokens))


def vary_alike(shard: Shard, tree: Tree) -> Tree:
    """Marks all arrays, inside a shard_map, as varying over the token axes and the foreign axes of any of them.

    Custom derivatives ask for gradients of the same type as their arguments.
    """
    if not in_shard_map():
        return tree
    axes = (*shard.tokens, *(a for a in varies_along(tree) if a not in AXES))
    return jax.tree.map(lambda a: _varying(a, axes), tree)


def varies_along(tree: Any) -> set[str]:
    """Names of the manual mesh axes along which any array of a tree varies; none outside of a shard_map."""
    return {axis for leaf in jax.tree.leaves(tree) for axis in jax.typeof(leaf).manual_axis_type.varying}


def in_shard_map() -> bool:
    """Tells whether the caller is traced inside a shard_map, where arrays are local."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def local() -> Shard:
    """The shard that the caller is traced for; Shard() outside of `per_shard`."""
    return from_mesh() if in_shard_map() else Shard()


def per_shard(f: Callable, shard: Shard, in_specs: Any, out_specs: Any) -> Callable:
    """f on every shard of the current mesh; f itself without a mesh, or inside a shard_map."""
    if shard.alone or in_shard_map():
        return f
    run = jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=True)
    return lambda *args: run(*_reshard(args, in_specs))


def replicate(x: Array) -> Array:
    """x on every device, where the axes of the current mesh are part of its type (`AxisType.Explicit`)."""
    return _reshard(x, P())


def _reshard(tree: Any, specs: Any) -> Any:
    """Reshards arrays to `specs`, on those axes of the current mesh that are part of types (`AxisType.Explicit`)."""
    explicit = set(jax.sharding.get_abstract_mesh().explicit_axes)
    if not explicit:
        return tree

    def reshard(spec: P, part: Any) -> Any:
        entries = (tuple(a for a in entry if a in explicit) or None for entry in dims.axes(spec, len(spec)))
        return jax.tree.map(partial(jax.sharding.reshard, out_shardings=P(*entries)), part)

    return jax.tree.map(reshard, specs, tree, is_leaf=lambda s: isinstance(s, P))


def check_axes(shard: Shard, x: Array) -> None:
    """Refuses a mesh on which a shard's function of tokens x can neither be sharded nor left to the partitioner."""
    mesh = jax.sharding.get_abstract_mesh()
    foreign = {a for axes in dims.axes(jax.typeof(x).sharding.spec, x.ndim) for a in axes} - set(AXES)
    if shard.alone and foreign:
        raise ValueError(
            f"Tokens are sharded over the Explicit mesh axes {sorted(foreign)}, which have no meaning here; name axes "
            f"{', '.join(AXES)}, as moe_jax.make_mesh does, or make them with axis_types=(AxisType.Auto,) * n."
        )
    if in_shard_map() and (missing := {*shard.tokens, *shard.tensor} - set(mesh.manual_axes)):
        raise ValueError(
            f"This shard_map is over the mesh axes {sorted(mesh.manual_axes)} only, but the layer communicates over "
            f"{sorted(missing)} too; leave out axis_names, which makes it one over all axes, or call the layer outside."
        )
    if differ := sorted(varies_along(x) & set(shard.tensor)):
        raise ValueError(
            f"In this shard_map tokens vary along the mesh axis {differ[0]!r}, whose shards must all have the same "
            f"tokens; give tokens in_specs over {', '.join(TOKEN_AXES)}, or call the layer outside."
        )


def token_spec(shard: Shard) -> P:
    """PartitionSpec of arrays whose first axis is the batch."""
    return P(shard.tokens or None)
