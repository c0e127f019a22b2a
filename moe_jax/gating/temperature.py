import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from moe_jax.core.context import Context
from moe_jax.core.ranges import NonNegativeInt, PositiveFloat, check_ranges

SHAPES = ("linear", "exponential", "cosine")


@dataclasses.dataclass(frozen=True)
class Temperature:
    """Logits over a temperature that goes from `start` to `end` in `steps` updates, and stays there.

    High is soft, low is hard. shape: "linear" and "exponential" are EvoMoE's (arXiv:2112.14397, sec. 3.3; 2.0 to 0.3 or
    1.0 to 0.5), "cosine" half a cosine. Without `steps` the temperature is `start`. It holds in evaluation too.
    """

    start: PositiveFloat = 1.0
    end: PositiveFloat = 1.0
    steps: NonNegativeInt = 0
    shape: str = "linear"
    on: ClassVar[str] = "logits"
    random: ClassVar[bool] = False

    def __post_init__(self):
        check_ranges(self)
        if self.shape not in SHAPES:
            raise ValueError(f"Temperature(shape={self.shape!r}) is unknown; use one of {', '.join(SHAPES)}.")

    @property
    def scheduled(self) -> bool:
        return self.steps > 0

    def at(self, step: Array | int) -> Array:
        """The temperature after `step` updates."""
        if not self.steps:
            return jnp.asarray(self.start, jnp.float32)
        done = jnp.clip(jnp.asarray(step, jnp.float32) / self.steps, 0, 1)
        if self.shape == "exponential":
            return self.start * (self.end / self.start) ** done
        if self.shape == "cosine":
            done = (1 - jnp.cos(jnp.pi * done)) / 2
        return self.start + (self.end - self.start) * done

    def __call__(
        self, logits: Float[Array, "G S I"], ctx: Context, keys_G: Key[Array, "G"] | None = None
    ) -> Float[Array, "G S I"]:
        return logits / self.at(ctx.get_state("step_", self) if self.scheduled else 0)
