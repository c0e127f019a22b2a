import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.core.context import Context
from moe_jax.core.ranges import PositiveInt, Range
from moe_jax.core.routing import TokenChoice, token_choice
from moe_jax.core.scores import check_choices


@dataclasses.dataclass(frozen=True)
class Hash:
    """Experts by a hash of the token's id, with weight 1/K: nothing to learn, nothing to collapse (arXiv:2106.04426).

    The hash is MurmurHash3's finaliser of id XOR seed * 0x9E3779B9; a token's K experts are neighbours.
    """

    K: PositiveInt = 1
    seed: Annotated[int, Range(0, 2**32, "[)")] = 0  # of the hash
    params: ClassVar = ()
    distinct: ClassVar[bool] = True
    needs: ClassVar = ("token",)
    random: ClassVar[bool] = False

    def __post_init__(self):
        check_choices(self)

    def __call__(
        self,
        params: Mapping[str, Array],
        x_GSD: Float[Array, "G S D"],
        mask_GS: Bool[Array, "G S"],
        ctx: Context = Context(),
    ) -> TokenChoice:
        first_GS = (mix(ctx.ids("token", self), self.seed) % ctx.E).astype(jnp.int32)
        return unlearned((first_GS[..., None] + jnp.arange(self.K)[None, None]) % ctx.E, mask_GS, ctx)


def mix(ids: Int[Array, "..."], seed: int) -> Array:
    """32 well-mixed bits of each id (MurmurHash3's finaliser, public domain)."""
    h = ids.astype(jnp.uint32) ^ jnp.uint32(seed * 0x9E3779B9 % 2**32)
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def unlearned(expert_GSK: Int[Array, "G S K"], mask_GS: Bool[Array, "G S"], ctx: Context) -> TokenChoice:
    """Routing without a gate: choices of weight 1/K each, with a uniform distribution over experts."""
    G, S, K = expert_GSK.shape
    expert_GSK = ctx.override(expert_GSK)
    flat_GSE = jnp.zeros((G, S, ctx.E), jnp.float32)
    return token_choice(expert_GSK, jnp.full((G, S, K), 1 / K, jnp.float32), flat_GSE, flat_GSE + 1 / ctx.E, mask_GS)
