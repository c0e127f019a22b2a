import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.core.context import Context
from moe_jax.core.gate import gate
from moe_jax.core.ranges import PositiveInt
from moe_jax.core.routing import TokenChoice, token_choice
from moe_jax.core.scores import SCORES, check_choices, check_score, normalize_weights, softmax_at, take_experts


@dataclasses.dataclass(frozen=True)
class TopK:
    """The K experts with the largest scores.

    score: "softmax", "sigmoid", or, with exact zeros, "sparsemax" and "entmax15": a choice of score 0 gets the
    padding id, so that a token has at most K experts.
    normalize: divide by the sum over the chosen, so that a token's weights sum to 1 (Mixtral, arXiv:2401.04088,
    sec. 2.1: a softmax over the K selected logits is the same). Without, they sum to less (V-MoE, OLMoE).
    """

    K: PositiveInt = 2  # experts per token, at most
    score: str = "softmax"
    normalize: bool = True
    params: ClassVar = ("gate_DE",)
    distinct: ClassVar[bool] = True
    random: ClassVar[bool] = False

    def __post_init__(self):
        check_choices(self)
        check_score(self)

    def __call__(
        self,
        params: Mapping[str, Array],
        x_GSD: Float[Array, "G S D"],
        mask_GS: Bool[Array, "G S"],
        ctx: Context = Context(),
    ) -> TokenChoice:
        logits_GSE = gate(x_GSD, params["gate_DE"], ctx)
        score_GSE = SCORES[self.score](logits_GSE)
        expert_GSK = ctx.top_k(logits_GSE, self.K)
        weight_GSK = take_experts(score_GSE, expert_GSK)
        if self.score in ("sparsemax", "entmax15") and ctx.replay_GSK is None:
            expert_GSK = jnp.where(weight_GSK > 0, expert_GSK, logits_GSE.shape[-1])
        if self.normalize:
            weight_GSK = (
                softmax_at(logits_GSE, expert_GSK) if self.score == "softmax" else normalize_weights(weight_GSK)
            )
        return token_choice(expert_GSK, weight_GSK, logits_GSE, normalize_weights(score_GSE), mask_GS)
