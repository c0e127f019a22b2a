import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.core.routing import Stats


def load_balance(s: Stats) -> Float[Array, "*N"]:
    """Load-balancing loss E * sum_e f_e * P_e (arXiv:2101.03961, eqs. 4-6): 1 when balanced, E when collapsed.

    f is the fraction of all K choices that fell on an expert (before any is dropped; no gradient), P the
    mean router probability, both over the whole batch.
    """
    f_E = s.choices_E / jnp.maximum(s.choices_E.sum(-1, keepdims=True), 1)
    P_E = s.probs_E / jnp.maximum(s.tokens, 1)[..., None]
    return f_E.shape[-1] * (f_E * P_E).sum(-1)
