import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.core.capacity import capacity
from moe_jax.core.context import Context
from moe_jax.core.gate import gate
from moe_jax.core.ranges import Range, check_ranges
from moe_jax.core.routing import SlotChoice
from moe_jax.routers.expert_choice import slot_choice


@dataclasses.dataclass(frozen=True)
class MixtureOfDepths:
    """A fraction of the tokens passes through the one expert, the others skip it (arXiv:2404.02258, sec. 3.4).

    The weight of a token's output is its raw score r = x @ gate. It needs E=1, and skips the feed-forward part of a
    layer alone (the paper skips attention too). As choices depend on later tokens, a causal model refuses it.
    """

    fraction: Annotated[float, Range(0, 1, "(]")] = 0.125
    K: ClassVar[int] = 1
    params: ClassVar = ("gate_DE",)
    random: ClassVar[bool] = False
    causal: ClassVar[bool] = False
    routing: ClassVar = SlotChoice

    def __post_init__(self):
        check_ranges(self)

    def check(self, E: int) -> None:
        if E != 1:
            raise ValueError(f"MixtureOfDepths() passes tokens through one expert or none, but E={E}; set E=1.")

    def slots(self, S: int, E: int) -> int:
        """Tokens of a group of S that pass through the expert."""
        return capacity(S, 1, 1, self.fraction)

    def __call__(
        self,
        params: Mapping[str, Array],
        x_GSD: Float[Array, "G S D"],
        mask_GS: Bool[Array, "G S"],
        ctx: Context = Context(),
    ) -> SlotChoice:
        logits_GSE = gate(x_GSD, params["gate_DE"], ctx)
        C = self.slots(x_GSD.shape[1], 1)
        return slot_choice(logits_GSE, C, logits_GSE, jnp.ones_like(logits_GSE), mask_GS, ctx)
