import dataclasses
from typing import ClassVar

import jax
from jaxtyping import Array, Float, Key

from moe_jax.core.context import Context, draw_by_group


@dataclasses.dataclass(frozen=True)
class Jitter:
    """Multiplies the router's input with U(1 - size, 1 + size) while training (arXiv:2101.03961 has 0.01)."""

    size: float = 0.01
    on: ClassVar[str] = "input"
    random: ClassVar[bool] = True

    def __post_init__(self):
        if not 0 < self.size < 1:
            raise ValueError(f"Jitter(size={self.size}) must lie in (0, 1); use 0.01, or leave it out.")

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

    std: float = 0.1  # standard deviation
    on: str = "logits"  # "logits", or the router\'s "input"
    random: ClassVar[bool] = True

    def __post_init__(self):
        if not self.std > 0:
            raise ValueError(f"Noise(std={self.std}) must be positive; use 0.1, or leave it out.")
        if self.on not in ("input", "logits"):
            raise ValueError(f"Noise(on={self.on!r}) is unknown; use 'input' or 'logits'.")

    def __call__(
        self, a: Float[Array, "G S I"], ctx: Context, keys_G: Key[Array, "G"] | None = None
    ) -> Float[Array, "G S I"]:
        if keys_G is None:
            return a
        return a + self.std * draw_by_group(keys_G, jax.random.normal, a.shape[1:])
