import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Key

from moe_jax.core.context import Context


@dataclasses.dataclass(frozen=True)
class Masked:
    """Experts that the layer's state says are shut, `shut_E`, are out of reach, in evaluation too.

    An instrument, not a choice of a config: the mask comes with the state, so that one compiled program serves every
    mask of every layer. Without `shut_E` nobody is shut.
    """

    on: ClassVar[str] = "experts"
    random: ClassVar[bool] = False

    def __call__(self, ctx: Context, key: Key[Array, ""] | None = None) -> Bool[Array, "G E"]:
        groups = 1 if ctx.group_G is None else len(ctx.group_G)
        shut_E = ctx.state.get("shut_E", jnp.zeros(ctx.E, bool))
        return jnp.broadcast_to(shut_E, (groups, ctx.E))
