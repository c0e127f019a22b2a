import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from moe_jax.core.context import Context
from moe_jax.core.gate import gate
from moe_jax.core.ranges import NonNegativeFloat, PositiveFloat, PositiveInt
from moe_jax.core.routing import TokenChoice, token_choice
from moe_jax.core.scores import SCORES, check_choices, check_score, normalize_weights, take_experts
from moe_jax.core.stats import Stats


@dataclasses.dataclass(frozen=True)
class LossFree:
    """Balance without an auxiliary loss (arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437, eqs. 13-16).

    A bias, which is state and not a parameter, is added to the scores for the selection only. After every step it
    rises by `rate` where an expert had less than the mean load of the whole batch, and falls where it had more.

    normalize, scale: weights are score / sum of the chosen * scale (V3: "sigmoid", scale 2.5).
    groups, limit, best: experts are chosen within the `limit` best of `groups` equal groups; a group's score is the
    sum of its `best` largest (V3: 8 groups, limit 4, best 2; V2, with rate 0 and "softmax": best 1).
    """

    K: PositiveInt = 2
    score: str = "sigmoid"
    normalize: bool = True
    scale: PositiveFloat = 1.0
    rate: NonNegativeFloat = 0.001  # of the bias, in each step
    groups: PositiveInt = 1
    limit: PositiveInt = 1
    best: PositiveInt = 2
    params: ClassVar = ("gate_DE",)
    distinct: ClassVar[bool] = True
    state: ClassVar = ("bias_E",)
    random: ClassVar[bool] = False

    def __post_init__(self):
        check_choices(self)
        check_score(self)
        if self.limit > self.groups:
            raise ValueError(f"LossFree(groups={self.groups}, limit={self.limit}) must keep 1 to {self.groups} groups.")

    def check(self, E: int) -> None:
        if E % self.groups or self.limit * (E // self.groups) < self.K:
            raise ValueError(
                f"LossFree(groups={self.groups}, limit={self.limit}) needs E={E} experts in equal groups, "
                f"K={self.K} of them in the {self.limit} kept; change groups, limit or E."
            )

    def __call__(
        self,
        params: Mapping[str, Array],
        x_GSD: Float[Array, "G S D"],
        mask_GS: Bool[Array, "G S"],
        ctx: Context = Context(),
    ) -> TokenChoice:
        logits_GSE = gate(x_GSD, params["gate_DE"], ctx)
        score_GSE = SCORES[self.score](logits_GSE)
        biased_GSE = score_GSE + ctx.get_state("bias_E", self)[None, None]
        expert_GSK = ctx.top_k(self._kept(ctx.mask_dropped(biased_GSE)), self.K)
        weight_GSK = take_experts(score_GSE, expert_GSK)
        weight_GSK = self.scale * (normalize_weights(weight_GSK) if self.normalize else weight_GSK)
        return token_choice(expert_GSK, weight_GSK, logits_GSE, normalize_weights(score_GSE), mask_GS)

    def _kept(self, biased_GSE: Array) -> Array:
        """Scores of experts in the best groups, minus infinity for the others."""
        if self.groups == 1:
            return biased_GSE
        G, S, E = biased_GSE.shape
        by_group_GSMI = biased_GSE.reshape(G, S, self.groups, E // self.groups)
        score_GSM = lax.top_k(by_group_GSMI, min(self.best, E // self.groups))[0].sum(-1)
        best_GSK = lax.top_k(score_GSM, self.limit)[1]
        kept_GSM = (best_GSK[..., None] == jnp.arange(self.groups)[None, None, None]).any(2)
        return jnp.where(kept_GSM[..., None], by_group_GSMI, -jnp.inf).reshape(G, S, E)

    def update(self, state: Mapping[str, Array], s: Stats) -> dict[str, Array]:
        """The state after a step with these (global) sums; layers may be stacked in front."""
        mean = s.choices_E.mean(-1, keepdims=True)
        return {"bias_E": state["bias_E"] + self.rate * jnp.sign(mean - s.choices_E)}
