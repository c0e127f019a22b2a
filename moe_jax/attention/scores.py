"""Weighted sums of values by scores of queries and keys: several back-ends of one definition."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.attention.sees import Sees, mask

LOW = -1e30  # the score of a masked key; finite, so that a query with no visible key gives no NaN


class Scores(NamedTuple):
    """Queries, keys and values of attention, with visibility. J heads of keys serve H / J heads of queries each."""

    q_BLHA: Float[Array, "B L H A"]
    k_BMJA: Float[Array, "B M J A"]
    v_BMJO: Float[Array, "B M J O"]
    sees: Sees
    window: int | None = None
    bias: Float[Array, "... H L M"] | None = None  # added to scores, [1, H, L, M] or [B, H, L, M]
    scale: float | None = None  # of scores; None is 1 / sqrt(A)
    sink_H: Float[Array, "H"] | None = None  # score of a key without value that every query sees


def einsum(s: Scores) -> Float[Array, "B L H O"]:
    """The definition: softmax over visible keys, in float32, then weighted values."""
    (B, L, H, A), J = s.q_BLHA.shape, s.k_BMJA.shape[2]
    q_BLJGA = s.q_BLHA.reshape(B, L, J, H // J, A)
    scores = jnp.einsum("bljga,bmja->bjglm", q_BLJGA, s.k_BMJA, preferred_element_type=jnp.float32)
    scores = scores.reshape(B, H, L, -1) * (A**-0.5 if s.scale is None else s.scale)
    if s.bias is not None:
        scores += s.bias.astype(jnp.float32)
    scores = jnp.where(mask(s.sees, s.window)[:, None], scores, LOW)
    if s.sink_H is not None:
        sink = jnp.broadcast_to(s.sink_H.astype(jnp.float32)[None, :, None, None], (B, H, L, 1))
        scores = jnp.concatenate([scores, sink], axis=-1)
    weight = jax.nn.softmax(scores, axis=-1)
    weight = weight if s.sink_H is None else weight[..., :-1]
    weight = weight.astype(s.v_BMJO.dtype).reshape(B, J, H // J, L, -1)
    y_BLJGO = jnp.einsum("bjglm,bmjo->bljgo", weight, s.v_BMJO)
    return y_BLJGO.reshape(B, L, H, -1)


def xla(s: Scores) -> Float[Array, "B L H O"]:
    """`jax.nn.dot_product_attention`, as XLA lowers it on any platform."""
    bias = None if s.bias is None else s.bias.astype(s.q_BLHA.dtype)
    visible_B1LM = mask(s.sees, s.window)[:, None]
    return jax.nn.dot_product_attention(s.q_BLHA, s.k_BMJA, s.v_BMJO, bias=bias, mask=visible_B1LM, scale=s.scale)


class Backend(NamedTuple):
    """Function that computes scores, and a test of the scores that it supports."""

    run: Callable[[Scores], Array]
    supports: Callable[[Scores], bool]


# In order of preference: the first back-end that supports the scores computes them.
BACKENDS: dict[str, Backend] = {
    "xla": Backend(xla, lambda s: s.sink_H is None and s.v_BMJO.shape[-1] == s.k_BMJA.shape[-1]),
    "einsum": Backend(einsum, lambda s: True),
}


def attend(s: Scores) -> Float[Array, "B L H O"]:
    """Weighted sums of values, by the first back-end that supports these scores."""
    return next(backend for backend in BACKENDS.values() if backend.supports(s)).run(s)
