import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from moe_jax.core.context import Context
from moe_jax.core.ranges import PositiveFloat, check_ranges


@dataclasses.dataclass(frozen=True)
class SoftCap:
    """cap * tanh(logits / cap): no logit beyond the cap (Gemma 2, arXiv:2408.00118, sec. 2; Grok-1 caps at 30)."""

    cap: PositiveFloat = 30.0
    on: ClassVar[str] = "logits"
    random: ClassVar[bool] = False

    def __post_init__(self):
        check_ranges(self)

    def __call__(
        self, logits: Float[Array, "G S I"], ctx: Context, keys_G: Key[Array, "G"] | None = None
    ) -> Float[Array, "G S I"]:
        return self.cap * jnp.tanh(logits / self.cap)
