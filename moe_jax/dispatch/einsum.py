import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.core import routing as r
from moe_jax.core.capacity import capacity, check_capacity
from moe_jax.core.groups import Padded
from moe_jax.core.ranges import PositiveFloat
from moe_jax.core.shard import Shard


@dataclasses.dataclass(frozen=True)
class Einsum:
    """The definition: dispatch and combine as einsums over dense masks (GShard, arXiv:2006.16668, sec. 3.2).

    capacity_factor, convention: see `core.capacity`; None drops nothing, with S slots per expert and group. A routing
    that brings its own slots (expert choice, Soft MoE) needs None.
    """

    capacity_factor: PositiveFloat | None = 1.25
    priority: str = "token-major"  # who gets a slot first where there are too few
    convention: str = "exact"
    layout: ClassVar = Padded

    def __post_init__(self):
        check_capacity(self)

    @property
    def accepts(self) -> tuple[type, ...]:
        own_slots = (r.SlotChoice, r.SoftSlots) if self.capacity_factor is None else ()
        return (r.TokenChoice, *own_slots)

    def slots(self, S: int, K: int, E: int) -> int:
        """Slots of an expert for a group of S tokens with K choices each; all S without a limit."""
        return capacity(S, K, E, self.capacity_factor, self.convention)

    def __call__(
        self,
        x_GSD: Float[Array, "G S D"],
        routing: r.Routing,
        experts: Callable,
        params: Mapping[str, Array],
        shard: Shard = Shard(),
    ) -> tuple[Float[Array, "G S O"], Bool[Array, "G _ _"]]:
        (G, S, D), E = x_GSD.shape, routing.E
        (dispatch_GSEC, combine_GSEC), kept = self._masks(routing, S, shard)
        C = dispatch_GSEC.shape[-1]
        x_EGCD = jnp.einsum("gsec,gsd->egcd", dispatch_GSEC.astype(x_GSD.dtype), x_GSD)
        y_ECO, _ = shard.apply_experts(experts, params, x_EGCD.reshape(E, G * C, D), Padded())
        y_EGCO = y_ECO.reshape(E, G, C, -1)
        return jnp.einsum("gsec,egco->gso", combine_GSEC.astype(y_EGCO.dtype), y_EGCO), kept

    def _masks(self, routing: r.Routing, S: int, shard: Shard) -> tuple[r.Masks, Bool[Array, "G _ _"]]:
        """The two masks, and which choices or slots reach an expert."""
        if isinstance(routing, r.SoftSlots):
            some_G11 = routing.mask_GS.any(-1)[:, None, None]
            kept_GEC = jnp.broadcast_to(some_G11, routing.dispatch_GSEC.shape[:1] + routing.dispatch_GSEC.shape[2:])
            return r.Masks(*shard.tensor_enter((routing.dispatch_GSEC, routing.combine_GSEC))), kept_GEC
        if isinstance(routing, r.SlotChoice):
            entered = routing._replace(weight_GEC=shard.tensor_enter(routing.weight_GEC))
            return r.slot_masks(entered), routing.token_GEC < S
        C = self.slots(S, routing.expert_GSK.shape[-1], routing.E)
        position_GSK = r.position_in_expert(routing, self.priority)
        weighted = routing._replace(weight_GSK=shard.tensor_enter(routing.weight_GSK))
        return r.masks(weighted, position_GSK, C), position_GSK < C
