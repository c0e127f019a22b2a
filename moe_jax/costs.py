"""What a config costs, by arithmetic on shapes: parameters and matrix-multiplication FLOPs."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.core import dims
from moe_jax.models import LM, LMConfig
from moe_jax.moe import MoEConfig


class Parameters(NamedTuple):
    """Parameter counts; `active` counts K of E experts per token, and embeddings in both."""

    total: int
    active: int
    router: int


def parameters(cfg: LMConfig) -> Parameters:
    """Counts the parameters of a language model without making them."""
    tree = jax.eval_shape(LM(cfg).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    total = active = router = 0
    for path, x in jax.tree.leaves_with_path(tree):
        name, size = str(path[-1].key), math.prod(x.shape)
        total += size
        router += size if name.startswith("router_") else 0
        is_expert = isinstance(cfg.moe, MoEConfig) and dims.dims_of(name).startswith("E")
        active += size * cfg.moe.router.K // cfg.moe.E if is_expert else size
    return Parameters(total, active, router)


def flops_per_token(cfg: LMConfig, L: int, router: bool = True) -> int:
    """Multiply-adds of matrices, times two, of one token's forward pass in a sequence of L; training is three times.

    Attention is counted over the whole length, as it is computed; embedding look-ups are free.
    """
    count = parameters(cfg)
    look_up = 0 if cfg.tied else cfg.V * cfg.D
    scores = 2 * cfg.N * L * cfg.H * cfg.A
    small = cfg.D * (2 * cfg.N + 1)  # norm scales multiply no matrix
    return 2 * (count.active - look_up - small + scores - (0 if router else count.router))
