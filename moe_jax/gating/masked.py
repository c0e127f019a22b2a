import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Key

from moe_jax.core.context import Context


@dataclasses.dataclass(frozen=True)
class Masked:
    """Masks the experts that `masked_E` in the layer's state names, in evaluation too.

    For experiments, not for configs: the mask is part of the state, so that one compiled program serves every mask of
    every layer. Without `masked_E` no expert is masked.
    """

    on: ClassVar[str] = "experts"
    random: ClassVar[bool] = False

    def __call__(self, ctx: Context, key: Key[Array, ""] | None = None) -> Bool[Array, "G E"]:
        groups = 1 if ctx.group_G is None else len(ctx.group_G)
        masked_E = ctx.state.get("masked_E", jnp.zeros(ctx.E, bool))
        return jnp.broadcast_to(masked_E, (groups, ctx.E))
