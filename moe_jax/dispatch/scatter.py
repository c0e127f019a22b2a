import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from moe_jax.core import routing as r
from moe_jax.core.capacity import capacity, check_capacity
from moe_jax.core.groups import Padded
from moe_jax.core.shard import Shard


@dataclasses.dataclass(frozen=True)
class Scatter:
    """Capacity without masks: every slot fetches its token, every token its slots.

    capacity_factor, convention: see `core.capacity`. None drops nothing: the smallest of a few capacities, each
    twice the last, that holds every token on every shard is chosen at run time.
    """

    capacity_factor: float | None = 1.25
    priority: str = "token-major"
    convention: str = "exact"
    accepts: ClassVar = (r.TokenChoice,)
    rows: ClassVar = Padded

    def __post_init__(self):
        check_capacity(self)

    def __call__(
        self,
        x_GSD: Float[Array, "G S D"],
        routing: r.TokenChoice,
        experts: Callable,
        params: Mapping[str, Array],
        shard: Shard = Shard(),
    ) -> tuple[Float[Array, "G S D"], Bool[Array, "G S K"]]:
        S, K, E = x_GSD.shape[1], routing.expert_GSK.shape[-1], routing.E
        queue_GSK = r.queue(routing, self.priority)
        exchange = partial(_exchange, experts=experts, shard=shard)
        if self.capacity_factor is not None:
            C = capacity(S, K, E, self.capacity_factor, self.convention)
            return exchange(x_GSD, routing, queue_GSK, params, C=C), queue_GSK < C
        real_GSK = routing.expert_GSK < E
        needed = shard.max(jnp.max(jnp.where(real_GSK, queue_GSK + 1, 0)))
        ladder = capacities(S, K, E)
        rungs = [partial(exchange, C=C) for C in ladder]
        rung = jnp.searchsorted(np.array(ladder), needed)
        return lax.switch(rung, rungs, x_GSD, routing, queue_GSK, params), real_GSK


def capacities(S: int, K: int, E: int) -> tuple[int, ...]:
    """Slots per expert from the balanced number up to S, which holds everything."""
    ladder = [capacity(S, K, E, 1.0)]
    while ladder[-1] < S:
        ladder.append(min(S, 2 * ladder[-1]))
    return tuple(ladder)


def _exchange(
    x_GSD: Float[Array, "G S D"],
    routing: r.TokenChoice,
    queue_GSK: Int[Array, "G S K"],
    params: Mapping[str, Array],
    *,
    experts: Callable,
    shard: Shard,
    C: int,
) -> Float[Array, "G S D"]:
    (G, S, D), E = x_GSD.shape, routing.E
    group_G11 = jnp.arange(G)[:, None, None]
    slot_GSK = (routing.expert_GSK * G + group_G11) * C + queue_GSK  # row of the [E*G*C, D] buffer
    slot_GSK = jnp.where((queue_GSK < C) & (routing.expert_GSK < E), slot_GSK, E * G * C)
    token_GSK = jnp.broadcast_to(group_G11 * S + jnp.arange(S)[None, :, None], slot_GSK.shape)
    token_R = jnp.full((E * G * C,), G * S).at[slot_GSK].set(token_GSK, mode="drop")
    x_RD = x_GSD.reshape(G * S, D).at[token_R].get(mode="fill", fill_value=0)
    y_ECD, _ = shard.visit(experts, params, x_RD.reshape(E, G * C, D), Padded())
    y_GSKD = y_ECD.reshape(E * G * C, D).at[slot_GSK].get(mode="fill", fill_value=0)
    return jnp.einsum("gsk,gskd->gsd", shard.enter(routing.weight_GSK).astype(y_GSKD.dtype), y_GSKD)
