import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
from jax import lax
from jaxtyping import Array, Bool, Float, Key

from moe_jax.core.gate import gate
from moe_jax.core.routing import TokenChoice, token_choice


@dataclasses.dataclass(frozen=True)
class TopK:
    """The K most probable experts.

    softmax "selected": over the K selected logits, so that a token's weights sum to 1 (Mixtral,
    arXiv:2401.04088, sec. 2.1; the same as renormalising the K probabilities). "all": over all experts
    before the selection, so that they sum to less (V-MoE, OLMoE).
    """

    K: int = 2
    softmax: str = "selected"
    params: ClassVar = ("gate_DE",)
    random: ClassVar[bool] = False

    def __post_init__(self):
        if self.K < 1:
            raise ValueError(f"TopK(K={self.K}) needs at least one choice; set K >= 1.")
        if self.softmax not in ("selected", "all"):
            raise ValueError(f"TopK(softmax={self.softmax!r}) is unknown; use 'selected' or 'all'.")
        if self.K == 1 and self.softmax == "selected":
            raise ValueError(
                "TopK(K=1, softmax='selected') has the constant weight 1 and never trains its router; "
                "use TopK(K=1, softmax='all') or Switch()."
            )

    def __call__(
        self,
        params: Mapping[str, Array],
        x_GSD: Float[Array, "G S D"],
        mask_GS: Bool[Array, "G S"],
        keys_G: Key[Array, "G"] | None = None,
    ) -> TokenChoice:
        logits_GSE = gate(x_GSD, params["gate_DE"])
        probs_GSE = jax.nn.softmax(logits_GSE)
        best_GSK, expert_GSK = lax.top_k(logits_GSE if self.softmax == "selected" else probs_GSE, self.K)
        weight_GSK = jax.nn.softmax(best_GSK) if self.softmax == "selected" else best_GSK
        return token_choice(expert_GSK, weight_GSK, logits_GSE, probs_GSE, mask_GS)
