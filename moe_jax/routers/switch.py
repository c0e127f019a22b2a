import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
from jaxtyping import Array, Bool, Float

from moe_jax.core.context import Context
from moe_jax.core.gate import gate
from moe_jax.core.routing import TokenChoice, token_choice
from moe_jax.core.scores import take_experts


@dataclasses.dataclass(frozen=True)
class Switch:
    """One expert per token, weighted by its probability (arXiv:2101.03961, eqs. 1-2). Switch adds `Jitter(0.01)`."""

    K: ClassVar[int] = 1
    params: ClassVar = ("gate_DE",)
    random: ClassVar[bool] = False

    def __call__(
        self,
        params: Mapping[str, Array],
        x_GSD: Float[Array, "G S D"],
        mask_GS: Bool[Array, "G S"],
        ctx: Context = Context(),
    ) -> TokenChoice:
        logits_GSE = gate(x_GSD, params["gate_DE"], ctx)
        probs_GSE = jax.nn.softmax(logits_GSE)
        expert_GSK = ctx.top_k(probs_GSE, 1)
        return token_choice(expert_GSK, take_experts(probs_GSE, expert_GSK), logits_GSE, probs_GSE, mask_GS)
