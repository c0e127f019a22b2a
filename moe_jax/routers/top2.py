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
class Top2:
    """GShard's gate: two experts, weights renormalised to sum to 1 (arXiv:2006.16668, algorithm 1).

    second "random": while training, the second expert is used with probability min(1, 2 * its weight), and
    the first keeps its weight where it is not; "always": always. Without keys (evaluation) it always is.
    """

    second: str = "random"
    K: ClassVar[int] = 2
    params: ClassVar = ("gate_DE",)

    def __post_init__(self):
        if self.second not in ("random", "always"):
            raise ValueError(f"Top2(second={self.second!r}) is unknown; use 'random' or 'always'.")

    @property
    def random(self) -> bool:
        return self.second == "random"

    def __call__(
        self,
        params: Mapping[str, Array],
        x_GSD: Float[Array, "G S D"],
        mask_GS: Bool[Array, "G S"],
        keys_G: Key[Array, "G"] | None = None,
    ) -> TokenChoice:
        logits_GSE = gate(x_GSD, params["gate_DE"])
        probs_GSE = jax.nn.softmax(logits_GSE)
        weight_GSK, expert_GSK = lax.top_k(probs_GSE, 2)
        weight_GSK /= weight_GSK.sum(-1, keepdims=True)
        if self.random and keys_G is not None:
            draw_GS = jax.vmap(lambda key: jax.random.uniform(key, mask_GS.shape[1:]))(keys_G)
            used_GS = 2 * weight_GSK[..., 1] > draw_GS
            expert_GSK = expert_GSK.at[..., 1].set(jnp.where(used_GS, expert_GSK[..., 1], logits_GSE.shape[-1]))
        return token_choice(expert_GSK, weight_GSK, logits_GSE, probs_GSE, mask_GS)
