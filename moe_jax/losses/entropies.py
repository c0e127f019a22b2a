"""Losses of the entropies of routing, in nats; by task or modality as LIMoE's, or over all tokens."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_jax.core.ranges import NonNegativeFloat, PositiveFloat, check_ranges
from moe_jax.core.stats import Stats, entropy, ratio


@dataclasses.dataclass(frozen=True)
class TokenEntropy:
    """Mean entropy of the tokens' distributions over experts: small is decided (arXiv:2403.07652, eq. 6).

    by_task: the mean over tasks of their means (LIMoE's local loss, arXiv:2206.02770, eq. 2); set `tasks` of the layer.
    """

    weight: NonNegativeFloat = 1e-4
    by_task: bool = False

    def __post_init__(self):
        check_ranges(self)

    @property
    def additive(self) -> bool:
        """Tells whether it is a mean over tokens."""
        return not self.by_task

    def __call__(self, s: Stats, state: Mapping[str, Array], router: Any) -> Float[Array, "*N"]:
        if not self.by_task:
            return ratio(s.entropy, s.tokens)
        return _over_tasks(ratio(s.entropy_M, s.tokens_M), s)


@dataclasses.dataclass(frozen=True)
class LoadEntropy:
    """Minus the entropy of the mean distribution over experts: small is balanced.

    threshold: max(0, threshold - entropy) instead, satisfied by exp(threshold) experts. by_task: the mean over tasks
    (LIMoE's global loss, arXiv:2206.02770, eq. 3 and sec. 3.3); set `tasks` of the layer.
    """

    weight: NonNegativeFloat = 0.01
    threshold: PositiveFloat | None = None
    by_task: bool = False

    def __post_init__(self):
        check_ranges(self)

    def __call__(self, s: Stats, state: Mapping[str, Array], router: Any) -> Float[Array, "*N"]:
        def loss(p_E: Array) -> Array:
            return -entropy(p_E) if self.threshold is None else jnp.maximum(0, self.threshold - entropy(p_E))

        if not self.by_task:
            return loss(ratio(s.probs_E, s.tokens[..., None]))
        return _over_tasks(loss(ratio(s.probs_ME, s.tokens_M[..., None])), s)


@dataclasses.dataclass(frozen=True)
class UniformKL:
    """KL divergence between the mean distribution P over experts and the uniform one U.

    direction "forward": KL(P || U) = log E - H(P). "reverse": KL(U || P), which grows without bound as an expert dies.
    """

    weight: NonNegativeFloat = 0.01
    direction: str = "reverse"  # "forward" or "reverse"

    def __post_init__(self):
        check_ranges(self)
        if self.direction not in ("forward", "reverse"):
            raise ValueError(f"UniformKL(direction={self.direction!r}) is unknown; use 'forward' or 'reverse'.")

    def __call__(self, s: Stats, state: Mapping[str, Array], router: Any) -> Float[Array, "*N"]:
        total = s.probs_E.sum(-1, keepdims=True)  # null experts have a part of the probability
        P_E = s.probs_E / jnp.where(total > 0, total, 1)
        surprise_E = jnp.log(jnp.maximum(P_E, 1e-30) * P_E.shape[-1])
        kl = (P_E * surprise_E).sum(-1) if self.direction == "forward" else -surprise_E.mean(-1)
        return jnp.where(s.tokens > 0, kl, 0)


def _over_tasks(value_M: Float[Array, "*N M"], s: Stats) -> Float[Array, "*N"]:
    """The mean over the tasks that have tokens."""
    there_M = s.tokens_M > 0
    return ratio((value_M * there_M).sum(-1), there_M.sum(-1))
