"""The grouped matmul by plain matmuls, E times the work: `lax.ragged_dot` has no second derivatives in reverse mode."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


def dense_matmul(
    x_RI: Float[Array, "R I"], w_EIO: Float[Array, "E I O"], sizes_E: Int[Array, "E"]
) -> Float[Array, "R O"]:
    """Every row times its expert's matrix, 0 for rows past sum(sizes_E); with derivatives of every kind and order."""
    end_E = jnp.cumsum(sizes_E)
    row_1R = jnp.arange(len(x_RI), dtype=sizes_E.dtype)[None]
    own_ER = (row_1R >= (end_E - sizes_E)[:, None]) & (row_1R < end_E[:, None])

    @jax.checkpoint
    def one(w_IO: Array, own_R: Array) -> Array:
        return jnp.where(own_R[:, None], x_RI, 0) @ w_IO

    first_RO = one(w_EIO[0], own_ER[0])
    return lax.scan(lambda y_RO, e: (y_RO + one(*e), None), first_RO, (w_EIO[1:], own_ER[1:]))[0]
