import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from moe_jax.core.context import Context
from moe_jax.core.gate import linear
from moe_jax.core.ranges import PositiveInt, check_ranges
from moe_jax.core.routing import TokenChoice, token_choice
from moe_jax.core.scores import softmax_at, take_experts


@dataclasses.dataclass(frozen=True)
class Hierarchical:
    """A gate over M equal groups of experts, then a gate inside: the `inner` best experts of the `outer` best groups.

    A weight is the product of the group's and the expert's. normalize: each level's softmax is over the chosen
    (arXiv:1701.06538, appendix B); otherwise over all, which with outer=M and inner=E/M is the hierarchical
    mixture of experts (Jordan and Jacobs 1994, eqs. 1-5).
    """

    M: PositiveInt = 2
    outer: PositiveInt = 1
    inner: PositiveInt = 2
    normalize: bool = False
    params: ClassVar = ("group_DM", "gate_DE")
    distinct: ClassVar[bool] = True
    random: ClassVar[bool] = False

    def __post_init__(self):
        check_ranges(self)
        if self.outer > self.M:
            raise ValueError(f"Hierarchical(M={self.M}, outer={self.outer}) must choose 1 to M={self.M} groups.")
        if self.normalize and 1 in (self.outer, self.inner):
            raise ValueError(
                f"Hierarchical(outer={self.outer}, inner={self.inner}, normalize=True) has a constant weight 1 at one "
                "level and never trains its gate; choose 2 or more at both, or set normalize=False."
            )

    @property
    def K(self) -> int:
        return self.outer * self.inner

    def check(self, E: int) -> None:
        if E % self.M or self.inner > E // self.M:
            raise ValueError(
                f"Hierarchical(M={self.M}, inner={self.inner}) needs E={E} experts in equal groups of at least "
                f"{self.inner}; change M, inner or E."
            )

    def __call__(
        self,
        params: Mapping[str, Array],
        x_GSD: Float[Array, "G S D"],
        mask_GS: Bool[Array, "G S"],
        ctx: Context = Context(),
    ) -> TokenChoice:
        x_GSD = ctx.input(x_GSD)
        group_GSM = ctx.transform(linear(x_GSD, params["group_DM"]))
        logits_GSE = ctx.logits(linear(x_GSD, params["gate_DE"]))
        G, S, E = logits_GSE.shape
        each_GSMI = logits_GSE.reshape(G, S, self.M, E // self.M)
        expert_GSK = self._choose(group_GSM, each_GSMI, ctx)
        chosen_GSK = jnp.where(expert_GSK < E, expert_GSK // (E // self.M), self.M)
        group_of_E = jnp.arange(E) // (E // self.M)
        probs_GSE = jax.nn.softmax(group_GSM)[..., group_of_E] * jax.nn.softmax(each_GSMI).reshape(G, S, E)
        if self.normalize:
            lead_GSK = chosen_GSK.reshape(G, S, self.outer, self.inner)[..., 0]
            outer_GSK = jnp.repeat(softmax_at(group_GSM, lead_GSK), self.inner, axis=-1)
            by_group = expert_GSK.reshape(G, S * self.outer, self.inner)
            inner = softmax_at(jnp.repeat(logits_GSE, self.outer, axis=1), by_group)
            weight_GSK = outer_GSK * inner.reshape(G, S, self.K)
        else:
            weight_GSK = take_experts(probs_GSE, expert_GSK)
        return token_choice(expert_GSK, weight_GSK, group_GSM[..., group_of_E] + logits_GSE, probs_GSE, mask_GS)

    def _choose(self, group_GSM: Array, each_GSMI: Array, ctx: Context) -> Array:
        """Chooses the best groups in order, and the best experts of each in order."""
        G, S, _, n = each_GSMI.shape
        best_GSK = lax.top_k(group_GSM, self.outer)[1]
        inside_GSKI = jnp.take_along_axis(each_GSMI, best_GSK[..., None], axis=2)
        expert_GSKI = best_GSK[..., None] * n + lax.top_k(inside_GSKI, self.inner)[1]
        return ctx.override(expert_GSKI.reshape(G, S, self.K))
