import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from moe_jax.core.context import Context
from moe_jax.core.gate import gate
from moe_jax.core.ranges import PositiveInt, Range
from moe_jax.core.routing import TokenChoice, token_choice
from moe_jax.core.scores import check_choices, take_experts
from moe_jax.core.stats import Stats, ratio


@dataclasses.dataclass(frozen=True)
class Sinkhorn:
    """Balanced selection by entropy-regularised optimal transport (S-BASE, arXiv:2202.01169; arXiv:1306.0895).

    While training, every group's logits are balanced by `iterations` of Sinkhorn's algorithm, and the K experts of
    the largest logit + potential are chosen; weights are the unbalanced probabilities. The experts' potentials are
    averaged over the batch and kept as state: each step starts from them, and evaluation, which is causal, uses
    them unchanged. Balancing needs the whole group, so that training is not causal.
    """

    K: PositiveInt = 1
    iterations: Annotated[int, Range(1, 10_000)] = 8  # of Sinkhorn's algorithm
    params: ClassVar = ("gate_DE",)
    distinct: ClassVar[bool] = True
    state: ClassVar = ("potential_E",)
    random: ClassVar[bool] = True
    causal: ClassVar[bool] = False

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
        free_GSE, v_G1E = lax.stop_gradient(logits_GSE), ctx.get_state("potential_E", self)[None, None]
        if ctx.training:
            v_G1E = self._balance(free_GSE, mask_GS, v_G1E)
        expert_GSK = ctx.top_k(free_GSE + v_G1E, self.K)
        tokens_G11 = mask_GS.sum(-1, dtype=jnp.float32)[:, None, None]
        sums = {"potential_E": ((v_G1E - v_G1E.mean(-1, keepdims=True)) * tokens_G11).sum((0, 1))}
        return token_choice(
            expert_GSK, take_experts(probs_GSE, expert_GSK), logits_GSE, probs_GSE, mask_GS, load_GSE=None, sums=sums
        )

    def _balance(self, logits_GSE: Array, mask_GS: Array, v_G1E: Array) -> Array:
        """Potentials under which every expert gets an equal part of each group's real tokens."""
        real_GS1, E = mask_GS[..., None], logits_GSE.shape[-1]
        share_G11 = jnp.log(jnp.maximum(real_GS1.sum(1, keepdims=True, dtype=jnp.float32), 1) / E)
        for _ in range(self.iterations):
            u_GS1 = -jax.nn.logsumexp(logits_GSE + v_G1E, axis=-1, keepdims=True)
            full_GSE = jnp.where(real_GS1, logits_GSE + u_GS1, -1e30)
            v_G1E = share_G11 - jax.nn.logsumexp(full_GSE, axis=1, keepdims=True)
        return jnp.where(mask_GS.any(-1)[:, None, None], v_G1E, 0)

    def update(self, state: Mapping[str, Array], s: Stats) -> dict[str, Array]:
        """The mean of all groups' potentials, weighted by their tokens."""
        assert s.sums is not None
        return {"potential_E": ratio(s.sums["potential_E"], s.tokens[..., None])}
