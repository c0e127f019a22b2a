import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Key

from moe_jax.core.context import Context


@dataclasses.dataclass(frozen=True)
class ExpertDropout:
    """Masks each expert for a whole training step with this probability; never all of them.

    One draw holds for all tokens on all devices, so that others learn to replace a popular expert.
    """

    rate: float = 0.1  # probability that an expert is out of reach
    on: ClassVar[str] = "experts"
    random: ClassVar[bool] = True

    def __post_init__(self):
        _check_rate(self)

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

    rate: float = 0.2  # probability that tokens do not travel in a step
    islands: int = 0  # equal islands of experts; 0 skips the experts
    on: ClassVar[str] = "experts"
    random: ClassVar[bool] = True

    def __post_init__(self):
        _check_rate(self)
        if self.islands < 0 or self.islands == 1:
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


def _check_rate(dropout) -> None:
    if not 0 < dropout.rate < 1:
        raise ValueError(f"{type(dropout).__name__}(rate={dropout.rate}) must lie in (0, 1); use 0.1, or leave it out.")
