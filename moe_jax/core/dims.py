"""One alphabet: a letter names an array axis, a size, and what the axis is sharded over.

    B batch   L length   T tokens   G routing groups on a shard   S tokens in a group
    D width   F hidden width   V vocabulary   N layers   H heads   A width of a head
    E experts   K choices per token   C slots per expert and group   R rows   P relative positions
    M a router's own: groups of experts, null experts, tasks   I, O generic in and out

The parameter `up_EDF` has shape [E, D, F] and is sharded along E; its name says so, and nothing else does. A name
that ends in _ is a scalar's.
A stack of layers (`nn.scan`) puts one more axis in front, which is never sharded.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Rules = Mapping[str, str | tuple[str, ...]]  # dimension letter -> mesh axes


def dims_of(name: str) -> str:
    """The dimensions of a named array: `up_EDF` -> `EDF`."""
    suffix = name.rpartition("_")[2]
    if not name.endswith("_") and not (suffix.isalpha() and suffix.isupper()):
        raise ValueError(f"Parameter {name!r} does not say its dimensions; name it like 'up_EDF'.")
    return suffix


def shape(dims: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape that `dims` have under `sizes`."""
    if missing := sorted(set(dims) - set(sizes)):
        raise ValueError(f"Dimensions {missing} of {dims!r} have no size; have {dict(sizes)}.")
    return tuple(sizes[d] for d in dims)


def param(module: nn.Module, name: str, sizes: Mapping[str, int], init: Callable) -> jax.Array:
    """Declares the parameter `name` of a Linen module, in float32; the name's suffix is its shape."""
    return module.param(name, init, shape(dims_of(name), sizes))


def kernel_init(dims: str, scale: float = 1.0) -> Callable:
    """Truncated normal with std sqrt(scale / fan_in), Switch's initialiser (arXiv:2101.03961, sec. 2.4).

    E in front is a batch of matrices. D in front is the input (`up_DF`, `query_DHA`); otherwise D at the
    end is the output and all before it the input (`down_FD`, `out_HAD`).
    """
    batch = int(dims.startswith("E") and len(dims) > 2)
    n_in = 1 if dims[batch] == "D" else len(dims) - batch - 1
    return nn.initializers.variance_scaling(
        scale,
        "fan_in",
        "truncated_normal",
        in_axis=tuple(range(batch, batch + n_in)),
        out_axis=tuple(range(batch + n_in, len(dims))),
        batch_axis=tuple(range(batch)),
    )


def spec(dims: str, rules: Rules, rank: int | None = None) -> P:
    """How an array of these dimensions is laid out; axes in front of them (layers) are not sharded."""
    front = 0 if rank is None else rank - len(dims)
    return P(*[None] * front, *(rules.get(d) for d in dims))


def shardings(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """Shardings of a tree of arrays by the names of its leaves; what has no dimensions is replicated.

    So is what belongs to a router (`router_gate_DE`, the field `router` of a training state). Works for
    parameters and for anything that mirrors them (optimizer moments, gradients).
    """

    def leaf(path, x):
        names = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
        suffix = str(names[-1]).rpartition("_")[2] if names else ""
        of_router = any(jax.tree_util.keystr((k,), simple=True).startswith("router") for k in path)
        if suffix.isupper() and x.ndim >= len(suffix) and not of_router:
            return NamedSharding(mesh, spec(suffix, rules, x.ndim))
        return NamedSharding(mesh, P())

    return jax.tree.map_with_path(leaf, tree)
