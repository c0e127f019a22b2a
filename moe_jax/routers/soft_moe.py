import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from moe_jax.core.context import FAR, Context
from moe_jax.core.ranges import PositiveInt, check_ranges
from moe_jax.core.routing import SoftSlots
from moe_jax.core.scores import l2_normalize


@dataclasses.dataclass(frozen=True)
class SoftMoE:
    """Every slot is a weighted mean of all tokens, every token gets a weighted mean of all slots (arXiv:2308.00951).

    C: slots per expert and group. logits = unit(x) . exp(scale) unit(phi); dispatch is their softmax over tokens,
    combine the one over all E * C slots. Fully differentiable, nothing is dropped, and nothing is causal.
    """

    C: PositiveInt = 1
    K: ClassVar[int] = 1
    params: ClassVar = ("phi_DEC", "scale_")
    random: ClassVar[bool] = False
    causal: ClassVar[bool] = False
    routing: ClassVar = SoftSlots

    def __post_init__(self):
        check_ranges(self)

    def slots(self, S: int, E: int) -> int:
        """Slots of each of E experts for a group of S tokens."""
        return self.C

    def __call__(
        self,
        params: Mapping[str, Array],
        x_GSD: Float[Array, "G S D"],
        mask_GS: Bool[Array, "G S"],
        ctx: Context = Context(),
    ) -> SoftSlots:
        (D, E, C), (G, S, _) = params["phi_DEC"].shape, x_GSD.shape
        phi_DR = l2_normalize(params["phi_DEC"].reshape(D, E * C), axis=0) * jnp.exp(params["scale_"])
        x_GSD = l2_normalize(ctx.input(x_GSD).astype(jnp.float32), axis=-1)
        logits_GSR = ctx.transform(jnp.einsum("gsd,dr->gsr", x_GSD, phi_DR, precision=lax.Precision.HIGHEST))
        used_GSR = jnp.broadcast_to(mask_GS[..., None], logits_GSR.shape)
        if (dropped_GE := ctx.dropped()) is not None:
            used_GSR &= ~jnp.repeat(dropped_GE, C, axis=-1)[:, None]
        dispatch_GSR = jax.nn.softmax(jnp.where(used_GSR, logits_GSR, FAR), axis=1) * used_GSR
        combine_GSR = jax.nn.softmax(jnp.where(used_GSR, logits_GSR, FAR), axis=-1) * used_GSR
        slots = lambda a_GSR: a_GSR.reshape(G, S, E, C)  # noqa: E731
        logits_GSE = jax.nn.logsumexp(slots(logits_GSR), axis=-1)
        return SoftSlots(slots(dispatch_GSR), slots(combine_GSR), logits_GSE, jax.nn.softmax(logits_GSE), mask_GS)
