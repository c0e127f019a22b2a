"""What models are built from: normalisation, attention with its positions, dense feed-forward."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from moe_jax.core import dims, shard
from moe_jax.core.groups import Dense
from moe_jax.core.parameter import parameter, weight
from moe_jax.moe import dense_params, usable

POSITIONS = ("rotary", "relative")
BUCKETS = 32  # of relative positions


class RMSNorm(nn.Module):
    """x / rms(x) * scale, in float32 (arXiv:1910.07467)."""

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        scale_D = parameter(self, "scale_D", {"D": x_BLD.shape[-1]}, nn.initializers.ones)
        x = x_BLD.astype(jnp.float32)
        x *= jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
        return (x * scale_D[None, None]).astype(x_BLD.dtype)


class FeedForward(nn.Module):
    """A dense layer: one expert for every token."""

    expert: Any
    init_scale: float = 1.0

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        here = shard.here()
        params = dense_params(self, self.expert, "{}", x_BLD.shape[-1], self.init_scale)
        params = usable(here, params, x_BLD.dtype)
        return here.leave(self.expert(params, here.enter(x_BLD), Dense()))


class Attention(nn.Module):
    """Causal self-attention inside segments, with rotary (arXiv:2104.09864) or T5's relative positions."""

    H: int
    A: int
    position: str = "rotary"
    init_scale: float = 1.0

    @nn.compact
    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        mask_BLL: Bool[Array, "B L L"],
        position_BL: Int[Array, "B L"],
    ) -> Float[Array, "B L D"]:
        (_, L, D), dtype = x_BLD.shape, x_BLD.dtype
        sizes = {"D": D, "H": self.H, "A": self.A, "P": BUCKETS}

        def matrix(name: str) -> Array:
            return weight(self, name, sizes, dims.kernel_init(dims.dims_of(name), self.init_scale), dtype)

        here = shard.here()
        x_BLD = here.enter(x_BLD)
        names = ("query_DHA", "key_DHA", "value_DHA")
        q_BLHA, k_BLHA, v_BLHA = (jnp.einsum("bld,dha->blha", x_BLD, matrix(n)) for n in names)
        bias_1HLL = None
        if self.position == "rotary":
            q_BLHA, k_BLHA = rotary(q_BLHA, position_BL), rotary(k_BLHA, position_BL)
        else:
            table_PH = parameter(self, "bias_PH", sizes, nn.initializers.zeros)
            bias_1HLL = table_PH[relative_buckets(L)].transpose(2, 0, 1)[None].astype(dtype)
        y_BLHA = jax.nn.dot_product_attention(q_BLHA, k_BLHA, v_BLHA, bias=bias_1HLL, mask=mask_BLL[:, None])
        return here.leave(jnp.einsum("blha,had->bld", y_BLHA, matrix("out_HAD")))


def attention_mask(segment_BL: Int[Array, "B L"]) -> Bool[Array, "B L L"]:
    """Position l sees m if m <= l, in the same segment; padding (segment 0) sees padding only."""
    L = segment_BL.shape[1]
    return jnp.tri(L, dtype=bool)[None] & (segment_BL[:, :, None] == segment_BL[:, None, :])


def rotary(x_BLHA: Float[Array, "B L H A"], position_BL: Int[Array, "B L"]) -> Float[Array, "B L H A"]:
    """Rotates pairs (a, a + A/2) of every head by position / 10000^(2a/A), in float32."""
    half = x_BLHA.shape[-1] // 2
    frequency = jnp.asarray(10000.0 ** (-np.arange(half) / half), jnp.float32)
    angle = position_BL[:, :, None, None].astype(jnp.float32) * frequency[None, None, None]
    x1, x2 = jnp.split(x_BLHA.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x_BLHA.dtype)


def relative_buckets(L: int, furthest: int = 128) -> np.ndarray:
    """T5's causal buckets of the distance from query to key [L, L]: exact at first, then logarithmic."""
    distance = np.maximum(np.arange(L)[:, None] - np.arange(L)[None, :], 0)
    exact = BUCKETS // 2
    scale = (BUCKETS - exact) / math.log(furthest / exact)
    far = exact + (np.log(np.maximum(distance, 1) / exact) * scale).astype(int)
    return np.where(distance < exact, distance, np.minimum(far, BUCKETS - 1))
