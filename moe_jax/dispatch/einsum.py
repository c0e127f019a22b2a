import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.core import routing as r
from moe_jax.core.groups import Padded
from moe_jax.core.shard import Shard


@dataclasses.dataclass(frozen=True)
class Einsum:
    """The definition: dispatch and combine as einsums over dense masks (GShard, arXiv:2006.16668, sec. 3.2).

    capacity_factor: see `core.routing.capacity`; None drops nothing, with S slots per expert and group.
    """

    capacity_factor: float | None = 1.25
    priority: str = "token-major"
    accepts: ClassVar = (r.TokenChoice,)
    parallel: ClassVar[bool] = True

    def __post_init__(self):
        r.check_capacity(self)

    def __call__(
        self,
        x_GSD: Float[Array, "G S D"],
        routing: r.TokenChoice,
        experts: Callable,
        params: Mapping[str, Array],
        shard: Shard = Shard(),
    ) -> tuple[Float[Array, "G S D"], Bool[Array, "G S K"]]:
        (G, S, D), K, E = x_GSD.shape, routing.expert_GSK.shape[-1], routing.E
        C = S if self.capacity_factor is None else r.capacity(S, K, E, self.capacity_factor)
        queue_GSK = r.queue(routing, self.priority)
        dispatch_GSEC, combine_GSEC = r.masks(routing, queue_GSK, C)
        x_EGCD = jnp.einsum("gsec,gsd->egcd", dispatch_GSEC.astype(x_GSD.dtype), x_GSD)
        y_ECD = shard.receive(experts(params, shard.send(x_EGCD.reshape(E, G * C, D)), Padded()))
        y_EGCD = y_ECD.reshape(E, G, C, D)
        return jnp.einsum("gsec,egcd->gsd", combine_GSEC.astype(y_EGCD.dtype), y_EGCD), queue_GSK < C
