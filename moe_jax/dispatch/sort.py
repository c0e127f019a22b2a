import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.core.groups import Ragged
from moe_jax.core.routing import TokenChoice
from moe_jax.core.shard import Shard


@dataclasses.dataclass(frozen=True)
class Sort:
    """Dropless on one shard: rows sorted by expert, grouped matmuls, rows back (MegaBlocks, arXiv:2211.15841).

    Experts spread over shards are refused: every shard holds all of them.
    """

    capacity_factor: ClassVar[None] = None
    accepts: ClassVar = (TokenChoice,)
    parallel: ClassVar[bool] = False

    def __call__(
        self,
        x_GSD: Float[Array, "G S D"],
        routing: TokenChoice,
        experts: Callable,
        params: Mapping[str, Array],
        shard: Shard = Shard(),
    ) -> tuple[Float[Array, "G S D"], Bool[Array, "G S K"]]:
        (G, S, D), K, E = x_GSD.shape, routing.expert_GSK.shape[-1], routing.E
        expert_R = routing.expert_GSK.reshape(-1)
        order_R = jnp.argsort(expert_R, stable=True)  # nowhere sorts last
        real_R1 = (expert_R[order_R] < E)[:, None]
        sizes_E = jnp.bincount(expert_R, length=E)
        x_RD = jnp.where(real_R1, x_GSD.reshape(G * S, D)[order_R // K], 0)
        y_RD = jnp.where(real_R1, experts(params, x_RD, Ragged(sizes_E)), 0)
        y_GSKD = y_RD[jnp.argsort(order_R)].reshape(G, S, K, D)
        y_GSD = jnp.einsum("gsk,gskd->gsd", routing.weight_GSK.astype(y_GSKD.dtype), y_GSKD)
        return y_GSD, routing.expert_GSK < E
