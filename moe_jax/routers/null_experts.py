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
from moe_jax.core.scores import check_choices, normalize_weights, take_experts


@dataclasses.dataclass(frozen=True)
class NullExperts:
    """Top-K among E experts and M that do nothing and cost nothing (AdaMoE, arXiv:2406.13233, sec. 3).

    A token that picks nulls visits fewer experts. Its weights are the probabilities among all E + M, or, with
    `normalize`, among the chosen true experts only, as in the paper: the task loss then gives nulls no gradient, and
    only a `LoadBalance` loss trains them.
    """

    K: PositiveInt = 4
    M: PositiveInt = 8
    normalize: bool = False  # weights are shares of the true experts alone
    params: ClassVar = ("gate_DE", "null_DM")
    distinct: ClassVar[bool] = True
    random: ClassVar[bool] = False

    def __post_init__(self):
        check_choices(self)

    @property
    def nulls(self) -> int:
        return self.M

    @property
    def untrained(self) -> tuple[str, ...]:
        """Parameters that the task loss does not reach."""
        return ("null_DM",) if self.normalize else ()

    def __call__(
        self,
        params: Mapping[str, Array],
        x_GSD: Float[Array, "G S D"],
        mask_GS: Bool[Array, "G S"],
        ctx: Context = Context(),
    ) -> TokenChoice:
        x_GSD, E = ctx.input(x_GSD), params["gate_DE"].shape[-1]
        logits_GSE = ctx.logits(linear(x_GSD, params["gate_DE"]))
        every = jnp.concatenate([logits_GSE, ctx.transform(linear(x_GSD, params["null_DM"]))], -1)
        probs_GSE = jax.nn.softmax(every)[..., :E]
        expert_GSK = jnp.minimum(ctx.top_k(every, self.K), E)  # null experts get the padding id
        weight_GSK = take_experts(probs_GSE, expert_GSK)
        return token_choice(
            expert_GSK, normalize_weights(weight_GSK) if self.normalize else weight_GSK, logits_GSE, probs_GSE, mask_GS
        )
