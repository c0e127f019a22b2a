import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
from jaxtyping import Array, Bool, Float

from moe_jax.core.context import Context
from moe_jax.core.gate import linear
from moe_jax.core.ranges import PositiveInt
from moe_jax.core.routing import TokenChoice, token_choice
from moe_jax.core.scores import check_choices, softmax_at, take_experts


@dataclasses.dataclass(frozen=True)
class TaskTopK:
    """A gate over a token and its task (or domain), one of M.

    logits = x @ gate_DE + task_ME[task]. token=False: only the task decides, so that a task's experts can be
    served without the others (Task-MoE, arXiv:2110.03742, sec. 3).
    """

    K: PositiveInt = 2
    M: PositiveInt = 8
    token: bool = True  # whether the token is seen besides its task
    normalize: bool = True
    needs: ClassVar = ("task",)
    random: ClassVar[bool] = False
    distinct: ClassVar[bool] = True

    def __post_init__(self):
        check_choices(self)

    @property
    def params(self) -> tuple[str, ...]:
        return ("gate_DE", "task_ME") if self.token else ("task_ME",)

    def __call__(
        self,
        params: Mapping[str, Array],
        x_GSD: Float[Array, "G S D"],
        mask_GS: Bool[Array, "G S"],
        ctx: Context = Context(),
    ) -> TokenChoice:
        task_GSM = jax.nn.one_hot(ctx.ids("task", self), self.M)
        logits_GSE = linear(task_GSM, params["task_ME"])
        if self.token:
            logits_GSE += linear(ctx.input(x_GSD), params["gate_DE"])
        logits_GSE = ctx.logits(logits_GSE)
        probs_GSE = jax.nn.softmax(logits_GSE)
        expert_GSK = ctx.top_k(logits_GSE, self.K)
        weight_GSK = softmax_at(logits_GSE, expert_GSK) if self.normalize else take_experts(probs_GSE, expert_GSK)
        return token_choice(expert_GSK, weight_GSK, logits_GSE, probs_GSE, mask_GS)
