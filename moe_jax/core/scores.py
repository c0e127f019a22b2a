"""Score functions of logits, and combine weights of the chosen experts."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moe_jax.core.ranges import check_ranges
from moe_jax.core.traits import traits


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _entmax(z: Float[Array, "... E"], alpha: float) -> Float[Array, "... E"]:
    """Sparse softmax of alpha 2 or 1.5, exactly, by sorting."""
    z = (z - z.max(-1, keepdims=True)) * (alpha - 1)
    sorted_z = -jnp.sort(-z, axis=-1)
    n = jnp.arange(1, z.shape[-1] + 1, dtype=z.dtype).reshape((1,) * (z.ndim - 1) + (-1,))
    if alpha == 2:
        tau = (jnp.cumsum(sorted_z, -1) - 1) / n
    else:
        mean, square = jnp.cumsum(sorted_z, -1) / n, jnp.cumsum(sorted_z**2, -1) / n
        tau = mean - jnp.sqrt(jnp.maximum((1 - n * (square - mean**2)) / n, 0))
    support = (tau <= sorted_z).sum(-1, keepdims=True)  # number of nonzero entries
    tau = jnp.take_along_axis(tau, support - 1, axis=-1)
    return jnp.maximum(z - tau, 0) ** (1 / (alpha - 1))


@_entmax.defjvp
def _entmax_jvp(alpha, primals, tangents):
    p = _entmax(*primals, alpha)
    s = jnp.where(p > 0, p ** (2 - alpha), 0)
    dz = tangents[0]
    return p, s * (dz - (s * dz).sum(-1, keepdims=True) / s.sum(-1, keepdims=True))


def sparsemax(z: Float[Array, "... E"]) -> Float[Array, "... E"]:
    """Euclidean projection onto the simplex: sums to 1, with exact zeros (arXiv:1602.02068)."""
    return _entmax(z, 2.0)


def entmax15(z: Float[Array, "... E"]) -> Float[Array, "... E"]:
    """1.5-entmax, between softmax and sparsemax (arXiv:1905.05702)."""
    return _entmax(z, 1.5)


# All rise with their logit, so the largest logits are the largest scores.
SCORES: dict[str, Callable] = {
    "softmax": jax.nn.softmax,
    "sigmoid": jax.nn.sigmoid,
    "sparsemax": sparsemax,
    "entmax15": entmax15,
}


def check_score(router) -> None:
    """Refuses a router whose score function has no such name."""
    if router.score not in SCORES:
        name = type(router).__name__
        raise ValueError(f"{name}(score={router.score!r}) is unknown; use one of {', '.join(SCORES)}.")


def check_choices(router) -> None:
    """Refuses a router with a number out of range, or whose weights are constant and train nothing (law 3)."""
    check_ranges(router)
    if router.K == 1 and traits(router).normalize:
        raise ValueError(
            f"{type(router).__name__}(K=1, normalize=True) has the constant weight 1 and never trains its router; "
            "set normalize=False."
        )


def take_experts(value_GSE: Float[Array, "G S E"], expert_GSK: Int[Array, "G S K"]) -> Float[Array, "G S K"]:
    """Values of each token at its experts; 0 at the padding id."""
    return jnp.take_along_axis(value_GSE, expert_GSK, axis=-1, mode="fill", fill_value=0)


def normalize_weights(weight_GSK: Float[Array, "G S K"]) -> Float[Array, "G S K"]:
    """Weights divided by their sum; zeros stay zeros, without NaN in their gradient."""
    total_GS1 = weight_GSK.sum(-1, keepdims=True)
    return weight_GSK / jnp.where(total_GS1 > 0, total_GS1, 1)


def softmax_at(logits_GSE: Float[Array, "G S E"], expert_GSK: Int[Array, "G S K"]) -> Float[Array, "G S K"]:
    """Softmax over the logits of the chosen experts only, 0 at the padding id."""
    used_GSK = expert_GSK < logits_GSE.shape[-1]
    chosen_GSK = jnp.where(used_GSK, take_experts(logits_GSE, expert_GSK), -jnp.inf)
    top_GS1 = jax.lax.stop_gradient(jnp.maximum(chosen_GSK.max(-1, keepdims=True), -1e30))
    return normalize_weights(jnp.where(used_GSK, jnp.exp(jnp.where(used_GSK, chosen_GSK - top_GS1, 0)), 0))


def l2_normalize(x: Array, axis: int) -> Array:
    """x of length 1 along an axis; a zero vector (padding) stays zero, without NaN in its gradient."""
    return x * jax.lax.rsqrt(jnp.maximum((x**2).sum(axis, keepdims=True), 1e-12))
