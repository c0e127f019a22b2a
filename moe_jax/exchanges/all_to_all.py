import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.core.groups import Padded
from moe_jax.core.ranges import PositiveInt, check_ranges
from moe_jax.core.shard import Shard, check_expert_axes
from moe_jax.core.traffic import EXCHANGE, ExchangedRows, Scheduled, Shapes, ShardBatch, round_trip


@dataclasses.dataclass(frozen=True)
class AllToAll:
    """Slots travel to their experts and back: two all-to-alls (GShard, arXiv:2006.16668, sec. 3.2).

    chunks: number of parts that the slots of every expert are sent in, so that one part can travel while another
        is computed (Tutel, arXiv:2206.03382, sec. 3.2); on TPU with xla_tpu_enable_async_all_to_all=true.
    """

    chunks: PositiveInt = 1
    over: tuple[str, ...] = ("expert",)  # mesh axes that experts lie over
    layouts: ClassVar = (Padded,)

    def __post_init__(self):
        check_ranges(self)
        check_expert_axes(self)

    def __call__(
        self, shard: Shard, experts: Callable, params: Any, x_ECD: Float[Array, "E C D"], groups: Padded
    ) -> tuple[Float[Array, "E C O"], Bool[Array, ""]]:
        C = x_ECD.shape[1]
        cuts = [C * i // self.chunks for i in range(1, self.chunks)]
        parts = [part for part in jnp.split(x_ECD, cuts, axis=1) if part.shape[1]]
        sent = [shard.all_to_all(part, shard.experts, split=0, concat=1) for part in parts]
        done = [experts(params, part, groups) for part in sent]
        back = [shard.all_to_all(part, shard.experts, split=1, concat=0) for part in done]
        return jnp.concatenate(back, axis=1), jnp.ones((), bool)

    def traffic(self, part: ShardBatch, rows: ExchangedRows, experts: Shapes) -> list[Scheduled]:
        """Predicts rows [E, G*C, D] there and back, in chunks."""
        chunks = min(self.chunks, rows.slots)
        there, back = (
            part.one("all-to-all", part.here.experts, rows.rows * width, EXCHANGE, count=chunks)
            for width in (part.D, rows.O)
        )
        return round_trip(there, back, rows)
