import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Key

from moe_jax.core.gate import gate
from moe_jax.core.routing import TokenChoice, token_choice


@dataclasses.dataclass(frozen=True)
class Switch:
    """One expert per token, weighted by its probability (arXiv:2101.03961, eqs. 1-2).

    jitter: while training, the router's input is multiplied with U(1 - jitter, 1 + jitter); Switch uses 0.01.
    """

    jitter: float = 0.0
    K: ClassVar[int] = 1
    params: ClassVar = ("gate_DE",)

    def __post_init__(self):
        if not 0 <= self.jitter < 1:
            raise ValueError(f"Switch(jitter={self.jitter}) must lie in [0, 1); use 0.01, or 0 for none.")

    @property
    def random(self) -> bool:
        return self.jitter > 0

    def __call__(
        self,
        params: Mapping[str, Array],
        x_GSD: Float[Array, "G S D"],
        mask_GS: Bool[Array, "G S"],
        keys_G: Key[Array, "G"] | None = None,
    ) -> TokenChoice:
        x_GSD = x_GSD.astype(jnp.float32)
        if self.jitter and keys_G is not None:
            shape, low, high = x_GSD.shape[1:], 1 - self.jitter, 1 + self.jitter
            x_GSD *= jax.vmap(lambda key: jax.random.uniform(key, shape, minval=low, maxval=high))(keys_G)
        logits_GSE = gate(x_GSD, params["gate_DE"])
        probs_GSE = jax.nn.softmax(logits_GSE)
        weight_GSK, expert_GSK = lax.top_k(probs_GSE, 1)
        return token_choice(expert_GSK, weight_GSK, logits_GSE, probs_GSE, mask_GS)
