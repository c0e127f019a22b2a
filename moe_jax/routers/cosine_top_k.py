import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.core.context import Context
from moe_jax.core.gate import linear
from moe_jax.core.ranges import PositiveInt
from moe_jax.core.routing import TokenChoice, token_choice
from moe_jax.core.scores import check_choices, l2_normalize, softmax_at, take_experts


@dataclasses.dataclass(frozen=True)
class CosineTopK:
    """Cosine of a token and an expert in A dimensions, over a learned temperature (X-MoE, arXiv:2204.09179, sec. 3).

    logits = cos(x @ project, embed) * exp(scale) / 0.07, with scale starting at 0. Low-dimensional directions
    resist the collapse of tokens onto expert vectors.
    """

    K: PositiveInt = 2
    A: PositiveInt = 8
    normalize: bool = False
    params: ClassVar = ("project_DA", "embed_AE", "scale_")
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
        x_GSA = l2_normalize(linear(ctx.input(x_GSD), params["project_DA"]), axis=-1)
        logits_GSE = ctx.logits(
            linear(x_GSA, l2_normalize(params["embed_AE"], axis=0)) * jnp.exp(params["scale_"]) / 0.07
        )
        probs_GSE = jax.nn.softmax(logits_GSE)
        expert_GSK = ctx.top_k(logits_GSE, self.K)
        weight_GSK = softmax_at(logits_GSE, expert_GSK) if self.normalize else take_experts(probs_GSE, expert_GSK)
        return token_choice(expert_GSK, weight_GSK, logits_GSE, probs_GSE, mask_GS)
