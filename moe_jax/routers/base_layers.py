import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from moe_jax.core.context import Context
from moe_jax.core.gate import gate
from moe_jax.core.ranges import Range, check_ranges
from moe_jax.core.routing import TokenChoice, token_choice
from moe_jax.core.scores import take_experts


@dataclasses.dataclass(frozen=True)
class BASELayer:
    """BASE layers: while training, the balanced assignment of the largest total score (arXiv:2103.16716, sec. 3).

    Each expert takes at most ceil(n / E) of a group's n tokens; without keys (evaluation) every token goes to its best
    one. The weight is sigmoid(logit). Assigning needs the whole group, so that training is not causal.

    epsilon: the total may fall short of the best by n * epsilon times the range of the logits; the auction
    (Bertsekas 1992) takes about 1 / epsilon rounds.
    """

    epsilon: Annotated[float, Range(1e-4, 1)] = 0.05
    K: ClassVar[int] = 1
    params: ClassVar = ("gate_DE",)
    random: ClassVar[bool] = True
    causal: ClassVar[bool] = False

    def __post_init__(self):
        check_ranges(self)

    def __call__(
        self,
        params: Mapping[str, Array],
        x_GSD: Float[Array, "G S D"],
        mask_GS: Bool[Array, "G S"],
        ctx: Context = Context(),
    ) -> TokenChoice:
        logits_GSE = gate(x_GSD, params["gate_DE"], ctx)
        if ctx.training and ctx.replay_GSK is None:
            score_GSE = lax.stop_gradient(logits_GSE)
            expert_GSK = ctx.override(jax.vmap(self._auction)(score_GSE, mask_GS)[..., None])
        else:
            expert_GSK = ctx.top_k(logits_GSE, 1)
        weight_GSK = take_experts(jax.nn.sigmoid(logits_GSE), expert_GSK)
        return token_choice(expert_GSK, weight_GSK, logits_GSE, jax.nn.softmax(logits_GSE), mask_GS)

    def _auction(self, score_SE: Float[Array, "S E"], mask_S: Bool[Array, "S"]) -> Int[Array, "S"]:
        """Assigns experts by auction: tokens without one bid for their best until all have one; E for padding."""
        S, E = score_SE.shape
        slots = -(-mask_S.sum(dtype=jnp.int32) // E)
        step = self.epsilon * jnp.maximum(jnp.ptp(jnp.where(mask_S[:, None], score_SE, score_SE[:1])), 1e-6)

        def unfinished(held):
            return ((held[0] == E) & mask_S).any()

        def bid(held):
            expert_S, offer_S = held
            full_E = jnp.bincount(expert_S, length=E) >= slots
            lowest_E = jnp.full_like(score_SE[0], jnp.inf).at[expert_S].min(offer_S, mode="drop")
            worth_SE = score_SE - jnp.where(full_E, lowest_E, 0)[None]  # an expert with room is free
            wish_S = worth_SE.argmax(-1).astype(expert_S.dtype)
            first_S = worth_SE.max(-1)
            second_S = jnp.where(jax.nn.one_hot(wish_S, E, dtype=bool), -jnp.inf, worth_SE).max(-1)
            bids_S = (expert_S == E) & mask_S
            paid_S = jnp.take_along_axis(score_SE, wish_S[:, None], axis=1)[:, 0] - first_S
            offer_S = jnp.where(bids_S, paid_S + first_S - second_S + step, offer_S)
            expert_S = jnp.where(bids_S, wish_S, expert_S)
            order_S = jnp.lexsort((-offer_S, expert_S))  # by expert, the best offers first
            count_E = jnp.bincount(expert_S, length=E)
            start_S = jnp.append(jnp.cumsum(count_E) - count_E, 0)[expert_S[order_S]]
            rank_S = jnp.zeros_like(expert_S).at[order_S].set((jnp.arange(S) - start_S).astype(expert_S.dtype))
            return jnp.where(rank_S >= slots, E, expert_S), offer_S

        unassigned_S = lax.full_like(score_SE, E, shape=(S,), dtype=jnp.int32)
        return lax.while_loop(unfinished, bid, (unassigned_S, lax.full_like(score_SE, 0, shape=(S,))))[0]
