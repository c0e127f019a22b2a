"""Functions that attentions share: projections to heads, their norms, and the cache of a decoder."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.attention.sees import Sees
from moe_jax.core.groups import Dense

Cache = dict[str, Array]  # of one layer: names end in their dimensions, B sequences and M entries first


def project(x_BLD: Float[Array, "B L D"], w_DHA: Float[Array, "D *H"]) -> Float[Array, "B L *H"]:
    """Projects every token by a matrix: queries, keys or values of all heads where it has heads."""
    return Dense().matmul(x_BLD, w_DHA.reshape(len(w_DHA), -1)).reshape(*x_BLD.shape[:2], *w_DHA.shape[1:])


def merge_heads(y_BLHA: Float[Array, "B L H A"], w_HAD: Float[Array, "H A D"]) -> Float[Array, "B L D"]:
    """Sums the projected outputs of all heads."""
    return Dense().matmul(y_BLHA.reshape(*y_BLHA.shape[:2], -1), w_HAD.reshape(-1, w_HAD.shape[-1]))


def rms_norm(x: Float[Array, "B L ..."], axes: tuple[int, ...], scale: Float[Array, "..."]) -> Float[Array, "B L ..."]:
    """x / sqrt(mean of x^2 over these axes) * scale, in float32 (arXiv:1910.07467)."""
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(y**2, axis=axes, keepdims=True) + 1e-6)
    return (y * scale.reshape((1,) * (y.ndim - scale.ndim) + scale.shape)).astype(x.dtype)


def init_cache(B: int, M: int, sizes: dict[str, tuple[int, ...]], dtype: Any) -> Cache:
    """An empty cache of M entries for B sequences: arrays [B, M, ...] by name, all entries free (segment 0)."""
    if B < 1 or M < 1:
        raise ValueError(f"A cache of {M} entries for {B} sequences holds nothing; both must be positive.")
    empty = {name: jnp.zeros((B, M, *shape), dtype) for name, shape in sizes.items()}
    return {"segment_BM": jnp.zeros((B, M), jnp.int32), "position_BM": jnp.zeros((B, M), jnp.int32), **empty}


def extend(cache: Cache, new: dict[str, Array], sees: Sees, window: int | None) -> tuple[dict[str, Array], Sees, Cache]:
    """Keys of the cache and new ones together, their visibility, and the updated cache.

    A token is stored at entry `position % M`, so that a cache of a window's size is a ring; padding is not stored.
    ValueError for more tokens than a cache that is no ring can hold.
    """
    (B, L), M = sees.segment_BL.shape, cache["segment_BM"].shape[1]
    if L > M and not is_ring(M, window):
        raise ValueError(
            f"{L} tokens do not fit into a cache of {M} entries; make it larger: init_cache(B, M={L}, ...)."
        )
    new = {"segment_BM": sees.segment_BL, "position_BM": sees.position_BL, **new}
    both = {name: jnp.concatenate([cache[name], a.astype(cache[name].dtype)], axis=1) for name, a in new.items()}
    both_sees = sees._replace(key_segment_BM=both["segment_BM"], key_position_BM=both["position_BM"])
    last_B1 = jnp.max(jnp.where(sees.segment_BL > 0, sees.position_BL, -1), axis=1, keepdims=True)
    stored_BL = (sees.segment_BL > 0) & (sees.position_BL > last_B1 - M)
    if not is_ring(M, window):
        stored_BL &= sees.position_BL < M
    entry_BL = jnp.where(stored_BL, sees.position_BL % M, M)
    row_B1 = jnp.arange(B)[:, None]
    updated = {
        name: cache[name].at[row_B1, entry_BL].set(a.astype(cache[name].dtype), mode="drop") for name, a in new.items()
    }
    return both, both_sees, updated


def is_ring(M: int, window: int | None) -> bool:
    """Tells whether M entries hold all that a window sees, so that later tokens may overwrite earlier ones."""
    return window is not None and M >= window


def mask_overflow(y_BLD: Float[Array, "B L D"], cache: Cache, sees: Sees, window: int | None) -> Float[Array, "B L D"]:
    """Outputs, NaN for a token whose position is beyond a cache that is no ring: never a wrong number."""
    M = cache["segment_BM"].shape[1]
    if is_ring(M, window):
        return y_BLD
    return jnp.where((sees.position_BL < M)[:, :, None], y_BLD, jnp.nan)
