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
    """Dropless: rows sorted by expert, grouped matmuls, rows back (MegaBlocks, arXiv:2211.15841).

    Experts that are spread over shards are reached by the exchange Ragged(), or AllGather().
    """

    capacity_factor: ClassVar[None] = None
    accepts: ClassVar = (TokenChoice,)
    rows: ClassVar = Ragged

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
        y_RD, reached = shard.visit(experts, params, x_RD, Ragged(sizes_E))
        back_R = jnp.argsort(order_R)
        y_GSKD = jnp.where(real_R1, y_RD, 0)[back_R].reshape(G, S, K, D)
        y_GSD = jnp.einsum("gsk,gskd->gsd", shard.enter(routing.weight_GSK).astype(y_GSKD.dtype), y_GSKD)
        reached_R = jnp.broadcast_to(reached, order_R.shape)[back_R]
        return y_GSD, (routing.expert_GSK < E) & reached_R.reshape(G, S, K)
