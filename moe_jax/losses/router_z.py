import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.core.routing import Stats


def router_z(s: Stats) -> Float[Array, "*N"]:
    """Router z-loss, the mean squared log-partition of the logits (arXiv:2202.08906, eq. 5): keeps them small."""
    return s.z_squared / jnp.maximum(s.tokens, 1)
