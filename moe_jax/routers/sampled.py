import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
from jaxtyping import Array, Bool, Float

from moe_jax.core.context import Context, draw_by_group
from moe_jax.core.gate import gate
from moe_jax.core.ranges import PositiveFloat, PositiveInt
from moe_jax.core.routing import TokenChoice, token_choice
from moe_jax.core.scores import check_choices, softmax_at, take_experts


@dataclasses.dataclass(frozen=True)
class Sampled:
    """K experts drawn without replacement from softmax(logits / temperature): Gumbel top-k (arXiv:1903.06059).

    While training only; without keys, the K best. Weights are those of the deterministic router.
    """

    K: PositiveInt = 2
    temperature: PositiveFloat = 1.0
    normalize: bool = True
    params: ClassVar = ("gate_DE",)
    distinct: ClassVar[bool] = True
    random: ClassVar[bool] = True

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
        drawn_GSE = logits_GSE
        if ctx.keys_G is not None:
            drawn_GSE = logits_GSE / self.temperature + draw_by_group(
                ctx.keys_G, jax.random.gumbel, logits_GSE.shape[1:]
            )
        expert_GSK = ctx.top_k(drawn_GSE, self.K)
        weight_GSK = softmax_at(logits_GSE, expert_GSK) if self.normalize else take_experts(probs_GSE, expert_GSK)
        return token_choice(expert_GSK, weight_GSK, logits_GSE, probs_GSE, mask_GS)
