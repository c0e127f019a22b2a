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

BUCKETS = 32  # of relative positions
FURTHEST = 128  # distance of which T5 still tells apart


class RMSNorm(nn.Module):
    """x / rms(x) * scale, in float32 (arXiv:1910.07467)."""

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        scale_D = parameter(self, "scale_D", {"D": x_BLD.shape[-1]}, nn.initializers.ones)
        return normalised(x_BLD, (-1,), scale_D)


class LayerNorm(nn.Module):
    """(x - mean(x)) / std(x) * scale + bias, in float32 (arXiv:1607.06450)."""

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        sizes = {"D": x_BLD.shape[-1]}
        scale_D = parameter(self, "scale_D", sizes, nn.initializers.ones)
        bias_D = parameter(self, "bias_D", sizes, nn.initializers.zeros)
        x = x_BLD.astype(jnp.float32)
        x = normalised(x - jnp.mean(x, axis=-1, keepdims=True), (-1,), scale_D)
        return (x + bias_D[None, None]).astype(x_BLD.dtype)


def heads(x_BLD: Float[Array, "B L D"], w_DHA: Float[Array, "D H A"]) -> Float[Array, "B L H A"]:
    """Every token's queries, keys or values."""
    return Dense().matmul(x_BLD, w_DHA.reshape(len(w_DHA), -1)).reshape(*x_BLD.shape[:2], *w_DHA.shape[1:])


def normalised(
    x: Float[Array, "B L ..."], axes: tuple[int, ...], scale: Float[Array, "..."]
) -> Float[Array, "B L ..."]:
    """Divided by the root of the mean of squares over these axes, and scaled, in float32."""
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(y**2, axis=axes, keepdims=True) + 1e-6)
    return (y * scale.reshape((1,) * (y.ndim - scale.ndim) + scale.shape)).astype(x.dtype)


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
    """Attention of x to itself, or to a `memory`, where the mask allows it.

    J: heads of keys and values, each for H / J heads of queries (grouped-query attention, arXiv:2305.13245).
    rope: base of rotary positions (arXiv:2104.09864), None without. relative: a table of T5's relative positions
    (arXiv:1910.10683, sec. 2.1) of this layer's own, for a causal stack. qk_norm: queries and keys divided by their
    root mean square, by "head" (Qwen3) or over all heads together ("all", OLMoE). bias: of all four projections.
    """

    H: int
    A: int
    J: int
    rope: float | None = 10000.0
    relative: bool = False
    qk_norm: str = "none"
    bias: bool = False
    init_scale: float = 1.0

    @nn.compact
    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        mask_BLM: Bool[Array, "B L M"],
        position_BL: Int[Array, "B L"],
        bias_1HLM: Float[Array, "1 H L M"] | None = None,
        memory_BMD: Float[Array, "B M D"] | None = None,
    ) -> Float[Array, "B L D"]:
        (_, L, D), dtype = x_BLD.shape, x_BLD.dtype
        sizes = {"D": D, "H": self.H, "J": self.J, "A": self.A, "P": BUCKETS}
        here = shard.here()

        def matrix(name: str) -> Array:
            return weight(self, name, sizes, dims.kernel_init(dims.dims_of(name), self.init_scale), dtype)

        def vector(name: str) -> Array:
            zero_or_one = nn.initializers.ones if name.startswith("scale") else nn.initializers.zeros
            return parameter(self, name, sizes, zero_or_one)

        x_BLD = here.enter(x_BLD)
        memory_BMD = x_BLD if memory_BMD is None else here.enter(memory_BMD)
        q_BLHA = heads(x_BLD, matrix("query_DHA"))
        k_BMJA, v_BMJA = heads(memory_BMD, matrix("key_DJA")), heads(memory_BMD, matrix("value_DJA"))
        if self.bias:
            names = ("query_HA", "key_JA", "value_JA")
            q_BLHA, k_BMJA, v_BMJA = (
                x + vector(n).astype(dtype)[None, None] for x, n in zip((q_BLHA, k_BMJA, v_BMJA), names, strict=True)
            )
        if self.qk_norm != "none":
            letters, axes = ("A", (-1,)) if self.qk_norm == "head" else ("HA", (-2, -1))
            q_BLHA = normalised(q_BLHA, axes, vector("scale_query_" + letters))
            k_BMJA = normalised(k_BMJA, axes, vector("scale_key_" + letters.replace("H", "J")))
        if self.rope is not None:
            q_BLHA, k_BMJA = rotary(q_BLHA, position_BL, self.rope), rotary(k_BMJA, position_BL, self.rope)
        if self.relative:
            table_PH = parameter(self, "bias_PH", sizes, nn.initializers.zeros)
            bias_1HLM = table_PH[relative_buckets(L)].transpose(2, 0, 1)[None]
        bias_1HLM = None if bias_1HLM is None else bias_1HLM.astype(dtype)
        y_BLHA = jax.nn.dot_product_attention(q_BLHA, k_BMJA, v_BMJA, bias=bias_1HLM, mask=mask_BLM[:, None])
        out_HAD = matrix("out_HAD")
        y_BLD = Dense().matmul(y_BLHA.reshape(*y_BLHA.shape[:2], -1), out_HAD.reshape(-1, out_HAD.shape[-1]))
        if self.bias:
            y_BLD += here.once("out_D", vector("out_D")).astype(dtype)[None, None]
        return here.leave(y_BLD)


def attention_mask(segment_BL: Int[Array, "B L"], window: int | None = None) -> Bool[Array, "B L L"]:
    """Position l sees m if m <= l, in the same segment; padding (segment 0) sees padding only.

    window: and only the last so many positions, its own among them (arXiv:2004.05150).
    """
    L = segment_BL.shape[1]
    seen_LL = jnp.tri(L, dtype=bool)
    if window is not None:
        seen_LL &= ~jnp.tri(L, k=-window, dtype=bool)
    return seen_LL[None] & same_segment(segment_BL, segment_BL)


def same_segment(segment_BL: Int[Array, "B L"], segment_BM: Int[Array, "B M"]) -> Bool[Array, "B L M"]:
    """Whether two positions are of the same segment."""
    return segment_BL[:, :, None] == segment_BM[:, None, :]


def rotary(
    x_BLHA: Float[Array, "B L H A"], position_BL: Int[Array, "B L"], base: float = 10000.0
) -> Float[Array, "B L H A"]:
    """Rotates pairs (a, a + A/2) of every head by position / base^(2a/A), in float32."""
    half = x_BLHA.shape[-1] // 2
    frequency = jnp.asarray(base ** (-np.arange(half) / half), jnp.float32)
    angle = position_BL[:, :, None, None].astype(jnp.float32) * frequency[None, None, None]
    x1, x2 = jnp.split(x_BLHA.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x_BLHA.dtype)


def sinusoids(position_BL: Int[Array, "B L"], D: int) -> Float[Array, "B L D"]:
    """Sines, then cosines, of position / 10000^(2d/D) (arXiv:1706.03762, sec. 3.5)."""
    half = D // 2
    frequency = jnp.asarray(10000.0 ** (-np.arange(half) / half), jnp.float32)
    angle = position_BL[:, :, None].astype(jnp.float32) * frequency[None, None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def relative_buckets(L: int, both: bool = False) -> np.ndarray:
    """T5's buckets of the distance from query to key [L, L]: exact at first, then logarithmic.

    both: keys after the query have buckets of their own, half of them (an encoder's).
    """
    distance = np.arange(L)[:, None] - np.arange(L)[None, :]
    buckets = BUCKETS // 2 if both else BUCKETS
    after = buckets * (distance < 0) if both else 0
    distance = abs(distance) if both else np.maximum(distance, 0)
    exact = buckets // 2
    scale = (buckets - exact) / math.log(FURTHEST / exact)
    far = exact + (np.log(np.maximum(distance, 1) / exact) * scale).astype(int)
    return after + np.where(distance < exact, distance, np.minimum(far, buckets - 1))
