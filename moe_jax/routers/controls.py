"""Controls: routing that is not learned."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from moe_jax.core.context import Context, draw_by_group
from moe_jax.core.ranges import PositiveInt
from moe_jax.core.routing import TokenChoice
from moe_jax.core.scores import check_choices
from moe_jax.routers.hashed import mix, unlearned


@dataclasses.dataclass(frozen=True)
class Random:
    """K different experts at random for every token and step, each of weight 1/K (THOR's, arXiv:2110.04260).

    Without keys (evaluation) the draw is a hash of the token's position in its group, and always the same.
    """

    K: PositiveInt = 2
    params: ClassVar = ()
    distinct: ClassVar[bool] = True
    random: ClassVar[bool] = True
    grouped: ClassVar[bool] = True

    def __post_init__(self):
        check_choices(self)

    def __call__(
        self,
        params: Mapping[str, Array],
        x_GSD: Float[Array, "G S D"],
        mask_GS: Bool[Array, "G S"],
        ctx: Context = Context(),
    ) -> TokenChoice:
        G, S = mask_GS.shape
        if ctx.keys_G is not None:
            score_GSE = draw_by_group(ctx.keys_G, jax.random.uniform, (S, ctx.E))
        else:
            bits_SE = mix(jnp.arange(S * ctx.E).reshape(S, ctx.E), seed=1)
            score_GSE = jnp.broadcast_to((bits_SE >> 8).astype(jnp.float32), (G, S, ctx.E))
        return unlearned(lax.top_k(score_GSE, self.K)[1], mask_GS, ctx)


@dataclasses.dataclass(frozen=True)
class RoundRobin:
    """Perfect balance: a group's i-th real token goes to experts iK, iK + 1, ... (mod E), each of weight 1/K."""

    K: PositiveInt = 2
    params: ClassVar = ()
    distinct: ClassVar[bool] = True
    random: ClassVar[bool] = False
    grouped: ClassVar[bool] = True

    def __post_init__(self):
        check_choices(self)

    def __call__(
        self,
        params: Mapping[str, Array],
        x_GSD: Float[Array, "G S D"],
        mask_GS: Bool[Array, "G S"],
        ctx: Context = Context(),
    ) -> TokenChoice:
        place_GS = jnp.cumsum(mask_GS, axis=1) - mask_GS
        return unlearned((place_GS[..., None] * self.K + jnp.arange(self.K)[None, None]) % ctx.E, mask_GS, ctx)
