import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from moe_jax.core import routing as r
from moe_jax.core import rows
from moe_jax.core.capacity import capacity, check_capacity
from moe_jax.core.groups import OneByOne, Padded
from moe_jax.core.ranges import PositiveFloat
from moe_jax.core.shard import Shard


@dataclasses.dataclass(frozen=True)
class Scatter:
    """Capacity without masks: every slot fetches its token, every token its slots.

    capacity_factor, convention: see `core.capacity`. None drops nothing: the smallest of a few capacities, each
    twice the last, that holds every token on every shard is chosen at run time.
    """

    capacity_factor: PositiveFloat | None = 1.25
    priority: str = "token-major"
    convention: str = "exact"
    accepts: ClassVar = (r.TokenChoice,)
    layout: ClassVar = Padded

    def __post_init__(self):
        check_capacity(self)

    def slots(self, S: int, K: int, E: int) -> int:
        """Slots of an expert for a group of S tokens with K choices each; without a limit the most: S."""
        return capacity(S, K, E, self.capacity_factor, self.convention)

    def __call__(
        self,
        x_GSD: Float[Array, "G S D"],
        routing: r.TokenChoice,
        experts: Callable,
        params: Mapping[str, Array],
        shard: Shard = Shard(),
    ) -> tuple[Float[Array, "G S O"], Bool[Array, "G S K"]]:
        S, K, E = x_GSD.shape[1], routing.expert_GSK.shape[-1], routing.E
        position_GSK, real_GSK = r.position_in_expert(routing, self.priority), routing.expert_GSK < E
        C = self.slots(S, K, E)
        kept_GSK = real_GSK & (position_GSK < C)
        weighted = routing._replace(weight_GSK=shard.tensor_enter(routing.weight_GSK))
        run = partial(_padded, experts=experts, shard=shard, C=None if self.capacity_factor is None else C)
        args = (x_GSD, weighted, position_GSK, kept_GSK, params)
        if shard.experts:
            return run(*args), kept_GSK
        occupied = partial(_occupied, experts=experts, shard=shard)
        return lax.platform_dependent(*args, cpu=occupied, default=run), kept_GSK


def capacities(S: int, K: int, E: int) -> tuple[int, ...]:
    """Slots per expert from the balanced number up to S, which holds everything."""
    counts = [capacity(S, K, E, 1.0)]
    while counts[-1] < S:
        counts.append(min(S, 2 * counts[-1]))
    return tuple(counts)


def _padded(
    x_GSD: Float[Array, "G S D"],
    routing: r.TokenChoice,
    position_GSK: Int[Array, "G S K"],
    kept_GSK: Bool[Array, "G S K"],
    params: Mapping[str, Array],
    *,
    experts: Callable,
    shard: Shard,
    C: int | None,
) -> Float[Array, "G S O"]:
    """Computes C slots per expert and group, or enough for all tokens (C=None), empty ones included."""
    (G, S, D), K, E = x_GSD.shape, position_GSK.shape[-1], routing.E

    def with_slots(C: int, x_GSD, weight_GSK, params):
        row_GSK = (routing.expert_GSK * G + jnp.arange(G)[:, None, None]) * C + position_GSK
        row_map = rows.row_map(jnp.where(kept_GSK, row_GSK, E * G * C), E * G * C)
        x_ECD = rows.send(x_GSD, row_map).rows.reshape(E, G * C, D)
        y_ECO, _ = shard.apply_experts(experts, params, x_ECD, Padded())
        return rows.weighted_sum(y_ECO.reshape(E * G * C, -1), weight_GSK, row_map)

    if C is not None:
        return with_slots(C, x_GSD, routing.weight_GSK, params)
    needed, counts = shard.max(jnp.max(jnp.where(kept_GSK, position_GSK + 1, 0))), capacities(S, K, E)
    index = jnp.searchsorted(np.array(counts), needed)
    return lax.switch(index, [partial(with_slots, C) for C in counts], x_GSD, routing.weight_GSK, params)


def _occupied(
    x_GSD, routing, position_GSK, kept_GSK, params, *, experts: Callable, shard: Shard
) -> Float[Array, "G S O"]:
    """Computes only occupied slots, with the same result, on a platform that takes any number of rows per expert."""
    row_GSK, sizes_E = rows.ragged_rows(routing, position_GSK, kept_GSK)
    row_map = rows.row_map(row_GSK, row_GSK.size)
    y_RO, _ = shard.apply_experts(experts, params, rows.send(x_GSD, row_map), OneByOne(sizes_E))
    return rows.weighted_sum(y_RO, routing.weight_GSK, row_map)
