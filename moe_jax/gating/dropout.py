import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Key

from moe_jax.core.context import Context
from moe_jax.core.ranges import NonNegativeInt, Range, check_ranges

Rate = Annotated[float, Range(0, 1, "()")]


@dataclasses.dataclass(frozen=True)
class ExpertDropout:
    """Masks each expert for a whole training step with this probability; never all of them.

    One draw holds for all tokens on all devices, so that others learn to replace a popular expert.
    """

    rate: Rate = 0.1  # probability that an expert is out of reach
    on: ClassVar[str] = "experts"
    random: ClassVar[bool] = True

    def __post_init__(self):
        check_ranges(self)

    def __call__(self, ctx: Context, key: Key[Array, ""]) -> Bool[Array, "G E"]:
        draw_E = jax.random.uniform(key, (ctx.E,), jnp.float32)
        dropped_E = (draw_E < self.rate) & (draw_E < draw_E.max())
        return jnp.broadcast_to(dropped_E, (_groups(ctx), ctx.E))


@dataclasses.dataclass(frozen=True)
class GatingDropout:
    """Keeps tokens on their device for a whole training step with this probability (arXiv:2205.14336).

    islands=0: routed experts are skipped, shared experts and the residual are not (Gate-Expert-Drop, 0.2 in the paper).
    islands=n: the experts are in n equal islands, routing group g reaches only island g mod n (Gate-Drop, 0.3 in the
    paper, where an island is a device; here it is a number, so that a model does not depend on its mesh).
    """

    rate: Rate = 0.2  # probability that tokens do not travel in a step
    islands: NonNegativeInt = 0  # equal islands of experts; 0 skips the experts
    on: ClassVar[str] = "experts"
    random: ClassVar[bool] = True

    def __post_init__(self):
        check_ranges(self)
        if self.islands == 1:
            raise ValueError(f"GatingDropout(islands={self.islands}) must be 0 or at least 2.")

    def check(self, E: int) -> None:
        if self.islands and E % self.islands:
            raise ValueError(f"GatingDropout(islands={self.islands}) does not divide E={E} experts; change one.")

    def __call__(self, ctx: Context, key: Key[Array, ""]) -> Bool[Array, "G E"]:
        dropped_GE = jnp.ones((_groups(ctx), ctx.E), bool)
        if self.islands:
            assert ctx.group_G is not None
            island_E = jnp.arange(ctx.E) // (ctx.E // self.islands)
            dropped_GE = island_E[None] != (ctx.group_G % self.islands)[:, None]
        return dropped_GE & (jax.random.uniform(key, (), jnp.float32) < self.rate)


def _groups(ctx: Context) -> int:
    assert ctx.keys_G is not None
    return len(ctx.keys_G)
