import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.core.groups import Padded
from moe_jax.core.routing import SlotChoice
from moe_jax.core.shard import Shard


@dataclasses.dataclass(frozen=True)
class Gather:
    """Dispatcher for experts that choose their tokens: every slot fetches its token, and adds its output there."""

    capacity_factor: ClassVar[None] = None  # the router sets the number of slots
    accepts: ClassVar = (SlotChoice,)
    layout: ClassVar = Padded

    def slots(self, S: int, K: int, E: int) -> int:
        """The most tokens of a group of S that an expert can take; the router decides how many it takes."""
        return S

    def __call__(
        self,
        x_GSD: Float[Array, "G S D"],
        routing: SlotChoice,
        experts: Callable,
        params: Mapping[str, Array],
        shard: Shard = Shard(),
    ) -> tuple[Float[Array, "G S O"], Bool[Array, "G E C"]]:
        (G, S, D), (_, E, C) = x_GSD.shape, routing.token_GEC.shape
        real_GEC = routing.token_GEC < S
        row_GEC = jnp.where(real_GEC, routing.token_GEC + S * jnp.arange(G)[:, None, None], G * S)
        row_EGC = row_GEC.swapaxes(0, 1)
        x_EGCD = x_GSD.reshape(G * S, D).at[row_EGC].get(mode="fill", fill_value=0)
        y_ECO, _ = shard.apply_experts(experts, params, x_EGCD.reshape(E, G * C, D), Padded())
        weight_EGC1 = shard.tensor_enter(routing.weight_GEC).swapaxes(0, 1)[..., None]
        y_EGCO = y_ECO.reshape(E, G, C, -1) * weight_EGC1.astype(y_ECO.dtype)
        y_RO = jnp.zeros((G * S, y_EGCO.shape[-1]), y_EGCO.dtype).at[row_EGC].add(y_EGCO, mode="drop")
        return y_RO.reshape(G, S, -1), real_GEC
