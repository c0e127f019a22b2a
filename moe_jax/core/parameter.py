"""Parameters of Linen modules: creation, and gathering where they are used."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.core import dims, shard
from moe_jax.core.shardings import constrain


def parameter(
    module: nn.Module, name: str, sizes: Mapping[str, int], init: Callable, exchange: Any = None
) -> jax.Array:
    """The parameter `name` of a Linen module, in float32; the name's suffix is its shape.

    exchange: how experts are sharded, where the parameter is one of theirs.

    In a model that is sharded over a mesh it is the local part, smaller than `sizes`.
    """
    if shard.in_shard_map():
        return module.get_variable("params", name)  # Linen would compare its shape with the global one
    return module.param(name, lambda key: draw(key, name, sizes, init, exchange))


def draw(key: jax.Array, name: str, sizes: Mapping[str, int], init: Callable, exchange: Any = None) -> jax.Array:
    """A new parameter in float32, sharded over the current mesh."""
    return constrain(name, init(key, dims.shape_of(dims.dims_of(name), sizes), jnp.float32), exchange)


def weight(module: nn.Module, name: str, sizes: Mapping[str, int], init: Callable, dtype: Any = None) -> jax.Array:
    """A parameter to multiply with: gathered where it is sharded over fsdp, and in this type."""
    w = shard.local().unshard(name, parameter(module, name, sizes, init), dtype)
    return w if dtype is None else w.astype(dtype)
