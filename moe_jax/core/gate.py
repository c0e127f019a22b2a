import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from moe_jax.core.context import Context
from moe_jax.core.linear import linear_map


def linear(x_GSD: Float[Array, "G S I"], gate_DE: Float[Array, "I O"]) -> Float[Array, "G S O"]:
    """Logits, in full float32 for any compute type (arXiv:2101.03961, sec. 2.4).

    By default, an accelerator multiplies float32 matrices at a lower precision.
    """
    if x_GSD.dtype == jnp.bfloat16:
        return _of_bfloat16(x_GSD, gate_DE.astype(jnp.float32))
    return _linear(x_GSD, gate_DE)


def gate(x_GSD: Float[Array, "G S D"], gate_DE: Float[Array, "D E"], ctx: Context = Context()) -> Float[Array, "G S E"]:
    """The logits of a linear gate, with the context's transforms of its input and of the logits."""
    return ctx.logits(linear(ctx.input(x_GSD), gate_DE))


def _linear(x_GSD: Array, gate_DE: Array) -> Array:
    x_GSD, gate_DE = x_GSD.astype(jnp.float32), gate_DE.astype(jnp.float32)
    return jnp.einsum("gsd,de->gse", x_GSD, gate_DE, precision=lax.Precision.HIGHEST)


# ---------------------------------------------------------------- on the matrix units of a GPU


@jax.custom_jvp
def _of_bfloat16(x_GSD: Array, gate_DE: Array) -> Array:
    return lax.platform_dependent(x_GSD, gate_DE, cuda=matmul_bf16x3, default=_linear)


@_of_bfloat16.defjvp
def _of_bfloat16_jvp(primals, tangents):
    return _of_bfloat16(*primals), linear_map(_of_bfloat16_tangent, _of_bfloat16_grad, primals, tangents)


def _of_bfloat16_tangent(fixed: tuple[Array, Array], tangents: tuple[Array, Array]) -> Array:
    return jax.jvp(_linear, fixed, tangents)[1]


def _of_bfloat16_grad(fixed: tuple[Array, Array], g_GSE: Array) -> tuple[Array, Array]:
    default_vjp = lambda x, gate, g: jax.vjp(_linear, x, gate)[1](g)  # noqa: E731
    return lax.platform_dependent(*fixed, g_GSE, cuda=matmul_bf16x3_grad, default=default_vjp)


def matmul_bf16x3(x_GSD: Array, gate_DE: Array) -> Array:
    """x @ gate in float32 accuracy, from bfloat16 products: three bfloat16 add up to a float32."""
    y_GSE3 = jnp.dot(x_GSD, jnp.concatenate(split_bf16(gate_DE, 3), 1), preferred_element_type=jnp.float32)
    first, second, third = jnp.split(y_GSE3, 3, axis=-1)
    return third + second + first


def matmul_bf16x3_grad(x_GSD: Array, gate_DE: Array, g_GSE: Array) -> tuple[Array, Array]:
    (g1, g2, g3), (w1, w2) = split_bf16(g_GSE, 3), split_bf16(gate_DE, 2)
    in_float32 = {"preferred_element_type": jnp.float32}
    # The result is rounded to bfloat16, so products of two small parts are left out.
    g_GSE3, w_DE3 = jnp.concatenate([g2, g1, g1], -1), jnp.concatenate([w1, w2, w1], -1)
    dx_GSD = jnp.einsum("gse,de->gsd", g_GSE3, w_DE3, **in_float32)
    dgate_DE3 = jnp.einsum("gsd,gse->de", x_GSD, jnp.concatenate([g3, g2, g1], -1), **in_float32)
    third, second, first = jnp.split(dgate_DE3, 3, axis=1)
    return dx_GSD.astype(x_GSD.dtype), third + second + first


def split_bf16(x: Float[Array, "..."], n: int) -> list[Float[Array, "..."]]:
    """n bfloat16 arrays, the largest first, that add up to a float32 array; three hold all of its 24 bits."""
    found = []
    for _ in range(n):
        part = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)  # XLA may remove a pair of conversions
        found.append(part.astype(jnp.bfloat16))
        x = x - part
    return found
