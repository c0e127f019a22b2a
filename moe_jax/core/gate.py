import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def gate(x_GSD: Float[Array, "G S D"], gate_DE: Float[Array, "D E"]) -> Float[Array, "G S E"]:
    """A router's logits, in full float32 whatever the compute type is (arXiv:2101.03961, sec. 2.4).

    A TPU would otherwise multiply float32 matrices in bfloat16.
    """
    return jnp.einsum(
        "gsd,de->gse",
        x_GSD.astype(jnp.float32),
        gate_DE.astype(jnp.float32),
        precision=lax.Precision.HIGHEST,
    )
