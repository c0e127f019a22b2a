import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.core.context import Context
from moe_jax.core.gate import gate
from moe_jax.core.ranges import PositiveInt, Range
from moe_jax.core.routing import TokenChoice, token_choice
from moe_jax.core.scores import check_choices, take_experts


@dataclasses.dataclass(frozen=True)
class TopP:
    """Top-p routing: the fewest experts that together reach probability p, at most K (arXiv:2403.07652, eq. 3).

    Weights are the probabilities themselves. The paper has p = 0.4, no limit (K = E), and adds the loss
    `TokenEntropy(1e-4)`, without which tokens use more and more experts.
    """

    p: Annotated[float, Range(0, 1, "(]")] = 0.4
    K: PositiveInt = 4
    params: ClassVar = ("gate_DE",)
    distinct: ClassVar[bool] = True
    random: ClassVar[bool] = False

    def __post_init__(self):
        check_choices(self)

    def __call__(
        self,
        params: Mapping[str, Array],
        x_GSD: Float[Array, "G S D"],
        mask_GS: Bool[Array, "G S"],
        ctx: Context = Context(),
    ) -> TokenChoice:
        logits_GSE = gate(x_GSD, params["gate_DE"], ctx)
        probs_GSE = jax.nn.softmax(logits_GSE)
        expert_GSK = ctx.top_k(probs_GSE, self.K)
        weight_GSK = take_experts(probs_GSE, expert_GSK)
        if ctx.replay_GSK is None:
            before_GSK = jnp.cumsum(weight_GSK, -1) - weight_GSK
            used_GSK = (before_GSK < self.p) | (jnp.arange(self.K) == 0)[None, None]
            expert_GSK = jnp.where(used_GSK, expert_GSK, logits_GSE.shape[-1])
        return token_choice(expert_GSK, weight_GSK, logits_GSE, probs_GSE, mask_GS)
