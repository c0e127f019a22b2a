import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.core.context import Context, draw_by_group
from moe_jax.core.gate import gate
from moe_jax.core.ranges import Range, check_ranges
from moe_jax.core.routing import TokenChoice, token_choice
from moe_jax.core.scores import normalize_weights, take_experts


@dataclasses.dataclass(frozen=True)
class Top2:
    """GShard's gate: two experts, weights renormalised to sum to 1 (arXiv:2006.16668, algorithm 1).

    second "random": while training, the second expert is used with probability min(1, its weight / threshold), and
    the first keeps its weight where it is not; "always": always. Without keys (evaluation) it always is.
    threshold: 0.5 is GShard's; Mesh TensorFlow's and ST-MoE's is 0.2 (arXiv:2202.08906, appendix C).
    """

    second: str = "random"  # "random" or "always"
    threshold: Annotated[float, Range(0, 1, "(]")] = 0.5
    K: ClassVar[int] = 2
    params: ClassVar = ("gate_DE",)
    distinct: ClassVar[bool] = True

    def __post_init__(self):
        check_ranges(self)
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
        ctx: Context = Context(),
    ) -> TokenChoice:
        logits_GSE = gate(x_GSD, params["gate_DE"], ctx)
        probs_GSE, E = jax.nn.softmax(logits_GSE), logits_GSE.shape[-1]
        named_GSK = expert_GSK = ctx.top_k(probs_GSE, 2)
        if ctx.replay_GSK is not None:  # a second that was not used still divides the first's weight
            first_GSE = jax.nn.one_hot(expert_GSK[..., 0], E, dtype=bool)
            other_GS = jnp.where(first_GSE, -1, probs_GSE).argmax(-1)
            named_GSK = expert_GSK.at[..., 1].set(jnp.where(expert_GSK[..., 1] < E, expert_GSK[..., 1], other_GS))
        weight_GSK = normalize_weights(take_experts(probs_GSE, named_GSK))
        if self.random and ctx.keys_G is not None and ctx.replay_GSK is None:
            draw_GS = draw_by_group(ctx.keys_G, jax.random.uniform, mask_GS.shape[1:])
            used_GS = weight_GSK[..., 1] > self.threshold * draw_GS
            used_GSK = jnp.stack([jnp.ones_like(used_GS), used_GS], axis=-1)
            expert_GSK = jnp.where(used_GSK, expert_GSK, E)
        return token_choice(expert_GSK, weight_GSK, logits_GSE, probs_GSE, mask_GS)
