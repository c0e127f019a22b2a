import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from moe_jax.core.capacity import capacity
from moe_jax.core.context import Context
from moe_jax.core.gate import gate
from moe_jax.core.ranges import PositiveFloat, check_ranges
from moe_jax.core.routing import SlotChoice


@dataclasses.dataclass(frozen=True)
class ExpertChoice:
    """Each expert takes its ceil(capacity_factor * S / E) best tokens (arXiv:2202.09368, sec. 3.2).

    Balanced by construction; a token may have many experts or none. Choices depend on later tokens, so that a causal
    model refuses it.
    """

    capacity_factor: PositiveFloat = 2.0
    params: ClassVar = ("gate_DE",)
    random: ClassVar[bool] = False
    causal: ClassVar[bool] = False
    routing: ClassVar = SlotChoice

    def __post_init__(self):
        check_ranges(self)

    @property
    def K(self) -> int:
        """Experts per token on average, rounded up."""
        return math.ceil(self.capacity_factor)

    def slots(self, S: int, E: int) -> int:
        """Tokens that each of E experts takes of a group of S."""
        return capacity(S, 1, E, self.capacity_factor)

    def __call__(
        self,
        params: Mapping[str, Array],
        x_GSD: Float[Array, "G S D"],
        mask_GS: Bool[Array, "G S"],
        ctx: Context = Context(),
    ) -> SlotChoice:
        logits_GSE = gate(x_GSD, params["gate_DE"], ctx)
        probs_GSE = jax.nn.softmax(logits_GSE)
        C = self.slots(x_GSD.shape[1], logits_GSE.shape[-1])
        return slot_choice(probs_GSE, C, logits_GSE, probs_GSE, mask_GS, ctx)


def slot_choice(
    score_GSE: Float[Array, "G S E"],
    C: int,
    logits_GSE: Float[Array, "G S E"],
    probs_GSE: Float[Array, "G S E"],
    mask_GS: Bool[Array, "G S"],
    ctx: Context,
) -> SlotChoice:
    """Each expert's C real tokens of the largest scores, which are their weights."""
    S = mask_GS.shape[1]
    rank_GES = jnp.where(mask_GS[..., None], ctx.mask_dropped(score_GSE), -jnp.inf).swapaxes(1, 2)
    best_GEC, token_GEC = lax.top_k(lax.stop_gradient(rank_GES), C)
    real_GEC = best_GEC > -jnp.inf
    weight_GEC = jnp.take_along_axis(score_GSE.swapaxes(1, 2), token_GEC, axis=-1)
    return SlotChoice(
        jnp.where(real_GEC, token_GEC, S).astype(jnp.int32),
        jnp.where(real_GEC, weight_GEC, 0),
        logits_GSE,
        probs_GSE,
        mask_GS,
    )
