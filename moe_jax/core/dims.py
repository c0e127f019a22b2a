"""One alphabet: a letter names an array axis, a size, and what the axis is sharded over.

    B batch   L length   T tokens   G routing groups on a shard   S tokens in a group
    D width   F hidden width   V vocabulary   N layers   H heads   J heads of keys and values   A width of a head
    E experts   K choices per token   C slots per expert and group   R rows   P relative positions
    M a router's own: groups of experts, null experts, tasks   I, O generic in and out (O an expert's output width)
    Q, W rank of latent queries, of latent keys and values   of a head U rotated part, I = A + U, O values

The parameter `up_EDF` has shape [E, D, F], and is sharded over a mesh by the rules of these letters: the name is
the only declaration. A name that ends in _ is a scalar.
A stack of layers (`nn.scan`) adds one axis in front, which is never sharded.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import PartitionSpec as P

Rules = Mapping[str, tuple[str, ...]]  # dimension letter -> mesh axes
WIDTHS = "DQW"  # widths of token representations; fsdp shards a matrix along the first one it has


def dims_of(name: str) -> str:
    """The dimensions of a named array: `up_EDF` -> `EDF`."""
    if not (letters := suffix(name)) and not name.endswith("_"):
        raise ValueError(f"Parameter {name!r} does not say its dimensions; name it like 'up_EDF'.")
    return letters


def suffix(name: str) -> str:
    """The letters that a name ends with, `up_EDF` -> `EDF`; "" for a name without dimensions."""
    end = name.rpartition("_")[2]
    return end if end.isalpha() and end.isupper() else ""


def shape_of(dims: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape that `dims` have under `sizes`."""
    if missing := sorted(set(dims) - set(sizes)):
        raise ValueError(f"Dimensions {missing} of {dims!r} have no size; have {dict(sizes)}.")
    return tuple(sizes[d] for d in dims)


def fsdp_dim(dims: str) -> str:
    """The dimension along which fsdp shards a parameter; "" for vectors, and for matrices without a width."""
    return next((d for d in WIDTHS if d in dims), "") if len(dims) > 1 else ""


def kernel_init(dims: str, scale: float = 1.0) -> Callable:
    """Truncated normal with std sqrt(scale / fan_in), Switch's initialiser (arXiv:2101.03961, sec. 2.4).

    E in front is a batch of matrices. D in front is the input (`up_DF`, `query_DHA`); D at the end is the output, and
    all before it the input (`down_FD`, `out_HAD`). Without D the first is the input (`key_WHA`, `down_EFO`).
    """
    batch = int(dims.startswith("E") and len(dims) > 2)
    one = dims[batch] == "D" or ("D" not in dims and len(dims) > 1)
    n_in = 1 if one else len(dims) - batch - 1
    return nn.initializers.variance_scaling(
        scale,
        "fan_in",
        "truncated_normal",
        in_axis=tuple(range(batch, batch + n_in)),
        out_axis=tuple(range(batch + n_in, len(dims))),
        batch_axis=tuple(range(batch)),
    )


def spec(dims: str, rules: Rules, rank: int | None = None) -> P:
    """PartitionSpec of an array with these dimensions; axes in front of them (layers) are not sharded.

    If an array has several widths (`WIDTHS`), only the first is sharded.
    ValueError where two dimensions would be sharded over the same mesh axis.
    """
    axes = [tuple(rules.get(d, ())) if d not in WIDTHS or d == fsdp_dim(dims) else () for d in dims]
    flat = [a for entry in axes for a in entry]
    if twice := sorted({a for a in flat if flat.count(a) > 1}):
        raise ValueError(
            f"An array [{', '.join(dims)}] would be sharded over mesh axis {twice[0]!r} twice, by the rules "
            f"{dict(rules)}; give its dimensions different axes."
        )
    return P(*[None] * (0 if rank is None else rank - len(dims)), *(entry or None for entry in axes))


def specs(tree: Any, rules: Rules) -> Any:
    """PartitionSpecs of a tree of parameters, by their names.

    Vectors of a width (D, Q, W) are replicated, and so are the router's parameters (`router_gate_DE`): every shard
    routes its own tokens.
    """

    def leaf(path, x):
        name = str(path[-1].key)
        letters = dims_of(name)
        replicated = name.startswith("router") or letters in ("", *WIDTHS)
        return P() if replicated else spec(letters, rules, x.ndim)

    return jax.tree.map_with_path(leaf, tree)


def axes(spec: P, rank: int) -> list[tuple[str, ...]]:
    """The mesh axes that each axis of an array is sharded over, [rank]."""
    entries = [*spec, *[None] * (rank - len(spec))]
    return [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in entries]


def local_shape(shape: tuple[int, ...], spec: P, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A shard's part of an array of this shape, on a mesh of these sizes."""
    cuts = (math.prod(sizes[a] for a in entry) for entry in axes(spec, len(shape)))
    return tuple(n // cut for n, cut in zip(shape, cuts, strict=True))


def add_axes(tree: Any, param_specs: Any, over: tuple[str, ...], sizes: Mapping[str, int]) -> Any:
    """PartitionSpecs of parameters, sharded over these mesh axes too where they are not yet.

    The axes shard the longest axis of the local shape that they divide. Vectors and routers are not sharded further.
    """

    def leaf(path, x, old):
        name, used = str(path[-1].key), {a for entry in axes(old, x.ndim) for a in entry}
        more = tuple(a for a in over if sizes.get(a, 1) > 1 and a not in used)
        local, shards = local_shape(x.shape, old, sizes), math.prod(sizes[a] for a in more)
        fits = [i for i, n in enumerate(local) if n % shards == 0]
        if not more or not fits or name.startswith("router") or len(dims_of(name)) < 2:
            return old
        longest = max(fits, key=lambda i: local[i])
        entries = [entry + more * (i == longest) for i, entry in enumerate(axes(old, x.ndim))]
        return P(*(entry or None for entry in entries))

    return jax.tree.map_with_path(leaf, tree, param_specs)
