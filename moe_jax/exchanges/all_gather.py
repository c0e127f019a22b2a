import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.core import dims
from moe_jax.core.groups import Groups, Padded, Ragged
from moe_jax.core.shard import Shard, check_expert_axes
from moe_jax.core.traffic import BOTH, EXCHANGE, ExchangedRows, Scheduled, Shapes, ShardBatch, scheduled


@dataclasses.dataclass(frozen=True)
class AllGather:
    """Tokens stay where they are, and the weights of all experts travel to them (Janus, SIGCOMM 2023).

    Cheaper than an all-to-all where a shard has more bytes of rows than of experts; gradients are reduce-scattered.
    """

    over: tuple[str, ...] = ("expert",)
    layouts: ClassVar = (Padded, Ragged)

    def __post_init__(self):
        check_expert_axes(self)

    def __call__(
        self, shard: Shard, experts: Callable, params: Any, x: Float[Array, "... D"], groups: Groups
    ) -> tuple[Float[Array, "... O"], Bool[Array, ""]]:
        cast = jax.tree.map(lambda w: w.astype(x.dtype), params)
        gathered = jax.tree.map(partial(shard.gather, axes=shard.experts), cast)
        return experts(gathered, x, groups), jnp.ones((), bool)

    def traffic(self, part: ShardBatch, rows: ExchangedRows, experts: Shapes) -> list[Scheduled]:
        """Predicts the weights of all experts, and their gradients on the way back."""
        found, axes = [], part.here.experts
        for name, shape in experts.items():
            n = math.prod(shape) * (part.devices(part.here.fsdp) if dims.fsdp_dim(dims.dims_of(name)) else 1)
            again = rows.needed if name == "down_ED" else BOTH
            gathered = part.one("all-gather", axes, n * part.devices(axes), EXCHANGE)
            found += scheduled(gathered, again, "activations" if rows.bucketed else "weights")
            found += scheduled(part.one("reduce-scatter", axes, n, EXCHANGE), backward=True)
        return found
