import dataclasses
from typing import Annotated, ClassVar

import jax
from jaxtyping import Array, Float, Key

from moe_jax.core.context import Context, draw_by_group
from moe_jax.core.ranges import PositiveFloat, Range, check_ranges


@dataclasses.dataclass(frozen=True)
class Jitter:
    """Multiplies the router's input with U(1 - size, 1 + size) while training (arXiv:2101.03961 has 0.01)."""

    size: Annotated[float, Range(0, 1, "()")] = 0.01
    on: ClassVar[str] = "input"
    random: ClassVar[bool] = True

    def __post_init__(self):
        check_ranges(self)

    def __call__(
        self, x_GSD: Float[Array, "G S D"], ctx: Context, keys_G: Key[Array, "G"] | None = None
    ) -> Float[Array, "G S D"]:
        if keys_G is None:
            return x_GSD
        low, high = 1 - self.size, 1 + self.size
        return x_GSD * draw_by_group(keys_G, jax.random.uniform, x_GSD.shape[1:], minval=low, maxval=high)


@dataclasses.dataclass(frozen=True)
class Noise:
    """Adds Gaussian noise of this standard deviation to the router's "logits" or "input" while training."""

    std: PositiveFloat = 0.1  # standard deviation
    on: str = "logits"  # "logits", or the router\'s "input"
    random: ClassVar[bool] = True

    def __post_init__(self):
        check_ranges(self)
        if self.on not in ("input", "logits"):
            raise ValueError(f"Noise(on={self.on!r}) is unknown; use 'input' or 'logits'.")

    def __call__(
        self, a: Float[Array, "G S I"], ctx: Context, keys_G: Key[Array, "G"] | None = None
    ) -> Float[Array, "G S I"]:
        if keys_G is None:
            return a
        return a + self.std * draw_by_group(keys_G, jax.random.normal, a.shape[1:])
