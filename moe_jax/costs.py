"""What a config costs, by arithmetic on shapes: parameters and matrix-multiplication FLOPs."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.core import dims
from moe_jax.models import LM, LMConfig
from moe_jax.moe import MoEConfig


class Parameters(NamedTuple):
    """Parameter counts; `active` counts K of E experts per token (at most), and embeddings in both."""

    total: int
    active: int
    router: int  # of the multiplied ones, the routers'
    multiplied: int  # of the active ones, those in matrices that a token is multiplied with


def parameters(cfg: LMConfig) -> Parameters:
    """Counts the parameters of a language model without making them."""
    tree = jax.eval_shape(LM(cfg).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    total = active = router = multiplied = 0
    for path, x in jax.tree.leaves_with_path(tree):
        name, used = str(path[-1].key), math.prod(x.shape)
        total += used
        letters = dims.dims_of(name)
        if isinstance(cfg.moe, MoEConfig) and letters.startswith("E"):
            used, letters = used * cfg.moe.router.K // cfg.moe.E, letters[1:]
        active += used
        looked_up = letters in ("PH", "ME") or (letters == "VD" and not cfg.tied)
        used = used if len(letters) > 1 and not looked_up else 0
        multiplied += used
        router += used if name.startswith("router_") else 0
    return Parameters(total, active, router, multiplied)


def flops_per_token(cfg: LMConfig, L: int, router: bool = True) -> int:
    """Multiply-adds of matrices, times two, of one token's forward pass in a sequence of L; training is three times.

    Attention is counted over the whole length, as it is computed; embedding look-ups are free.
    """
    count, scores = parameters(cfg), 2 * cfg.N * L * cfg.H * cfg.A
    return 2 * (count.multiplied + scores - (0 if router else count.router))
