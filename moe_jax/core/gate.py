import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moe_jax.core.context import Context


def linear(x_GSD: Float[Array, "G S I"], gate_DE: Float[Array, "I O"]) -> Float[Array, "G S O"]:
    """Logits, in full float32 whatever the compute type is (arXiv:2101.03961, sec. 2.4).

    A TPU would otherwise multiply float32 matrices in bfloat16.
    """
    return jnp.einsum(
        "gsd,de->gse",
        x_GSD.astype(jnp.float32),
        gate_DE.astype(jnp.float32),
        precision=lax.Precision.HIGHEST,
    )


def gate(x_GSD: Float[Array, "G S D"], gate_DE: Float[Array, "D E"], ctx: Context = Context()) -> Float[Array, "G S E"]:
    """The logits of a linear gate, with what the context does to its input and to them."""
    return ctx.logits(linear(ctx.input(x_GSD), gate_DE))
