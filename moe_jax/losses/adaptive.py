import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.core.quoted import quoted
from moe_jax.core.ranges import PositiveFloat, Range, check_ranges
from moe_jax.core.stats import Stats, ratio


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """A loss whose weight reacts to over-capacity: it grows while experts overflow, and shrinks while they do not.

    After every step the weight is multiplied by 1 + rate where more than `target` of all choices exceeded `capacity`
    times the mean load (of the whole batch, dropped or not), divided by it where fewer did, and stays within a
    factor of `most` of its start. The factor is state: `log_weight_`.
    """

    loss: Any
    target: Annotated[float, Range(0, 1, "[)")] = 0.01  # fraction of choices over capacity that keeps the weight
    capacity: Annotated[float, Range(1, math.inf, "[)")] = 1.25  # in multiples of the mean load
    rate: PositiveFloat = 0.05  # of the weight, in each step
    most: Annotated[float, Range(1, math.inf, "()")] = 100.0  # largest factor of the weight, up and down
    state: ClassVar = ("log_weight_",)

    def __post_init__(self):
        check_ranges(self)
        other = callable(self.loss) and hasattr(self.loss, "weight") and not isinstance(self.loss, type | Adaptive)
        if not other:
            raise ValueError(
                f"Adaptive(loss={quoted(self.loss)}) wraps another loss, like Adaptive(LoadBalance(0.01))."
            )

    @property
    def weight(self) -> float:
        return self.loss.weight

    @property
    def additive(self) -> bool:
        """As the loss that it wraps."""
        return getattr(self.loss, "additive", False)

    def check(self, router: Any) -> None:
        if hasattr(self.loss, "check"):
            self.loss.check(router)

    def __call__(self, s: Stats, state: Mapping[str, Array], router: Any) -> Float[Array, "*N"]:
        return self.loss(s, state, router) * jnp.exp(state["log_weight_"])

    def update(self, state: Mapping[str, Array], s: Stats) -> dict[str, Array]:
        """The state after a step with these (global) sums; layers may be stacked in front."""
        room = self.capacity * s.choices_E.mean(-1, keepdims=True)
        over = ratio(jnp.maximum(s.choices_E - room, 0).sum(-1), s.choices_E.sum(-1))
        step, limit = jnp.log1p(self.rate), jnp.log(self.most)
        moved = state["log_weight_"] + jnp.where(over > self.target, step, -step)
        return {"log_weight_": jnp.clip(moved, -limit, limit)}
