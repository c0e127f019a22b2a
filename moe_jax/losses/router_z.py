import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Array, Float

from moe_jax.core.ranges import NonNegativeFloat, check_ranges
from moe_jax.core.stats import Stats, ratio


@dataclasses.dataclass(frozen=True)
class RouterZ:
    """Router z-loss, the mean squared log-partition of the logits (arXiv:2202.08906, eq. 5): keeps them small."""

    weight: NonNegativeFloat = 0.001
    additive: ClassVar[bool] = True  # a mean over tokens

    def __post_init__(self):
        check_ranges(self)

    def __call__(self, s: Stats, state: Mapping[str, Array], router: Any) -> Float[Array, "*N"]:
        return ratio(s.z_squared, s.tokens)
