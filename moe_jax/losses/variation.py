"""Squared coefficients of variation over experts (Shazeer 2017)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.core.ranges import NonNegativeFloat, check_ranges
from moe_jax.core.stats import Stats
from moe_jax.core.traits import traits


def cv_squared(x_E: Float[Array, "*N E"]) -> Float[Array, "*N"]:
    """(standard deviation / mean)^2 over experts, 0 where there is nothing."""
    mean = jnp.maximum(x_E.mean(-1, keepdims=True), 1e-10)
    return ((x_E / mean - (x_E.sum(-1, keepdims=True) > 0)) ** 2).mean(-1)


@dataclasses.dataclass(frozen=True)
class Importance:
    """CV^2 of the experts' summed weights (arXiv:1701.06538, eqs. 6-7), or summed probabilities (V-MoE).

    of: "weights" (Shazeer's sparse gates) or "probs" (all of the softmax, noise-free; arXiv:2106.05974, appendix A).
    """

    weight: NonNegativeFloat = 0.1
    of: str = "weights"

    def __post_init__(self):
        check_ranges(self)
        if self.of not in ("weights", "probs"):
            raise ValueError(f"Importance(of={self.of!r}) is unknown; use 'weights' or 'probs'.")

    def __call__(self, s: Stats, state: Mapping[str, Array], router: Any) -> Float[Array, "*N"]:
        return cv_squared(s.combine_E if self.of == "weights" else s.probs_E)


@dataclasses.dataclass(frozen=True)
class Load:
    """CV^2 of the experts' smooth load (arXiv:1701.06538, eqs. 8-11; V-MoE, arXiv:2106.05974, appendix A).

    The probability that an expert is chosen under another draw of its noise has a gradient, which needs a router that
    gives one (`NoisyTopK`).
    """

    weight: NonNegativeFloat = 0.1

    def __post_init__(self):
        check_ranges(self)

    def check(self, router: Any) -> None:
        if "load" not in traits(router).gives:
            raise ValueError(
                f"Load() needs the load that a noisy router estimates, and {type(router).__name__}() has none; use "
                "NoisyTopK(), or another loss."
            )

    def __call__(self, s: Stats, state: Mapping[str, Array], router: Any) -> Float[Array, "*N"]:
        return cv_squared(s.load_E)
