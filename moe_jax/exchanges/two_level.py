import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_jax.core.groups import Padded
from moe_jax.core.shard import Shard, check_expert_axes
from moe_jax.core.traffic import EXCHANGE, ExchangedRows, Scheduled, Shapes, ShardBatch, round_trip


@dataclasses.dataclass(frozen=True)
class TwoLevel:
    """Experts over slices too: all-to-all inside a slice, then across (HetuMoE, arXiv:2203.14685, sec. 3.2).

    Between slices it sends the same bytes as one all-to-all over both axes, in messages fewer and larger by the number
    of expert shards in a slice; inside a slice the bytes are sent in addition.
    """

    over: tuple[str, ...] = ("slice", "expert")
    layouts: ClassVar = (Padded,)

    def __post_init__(self):
        check_expert_axes(self)

    def __call__(
        self, shard: Shard, experts: Callable, params: Any, x_ECD: Float[Array, "E C D"], groups: Padded
    ) -> tuple[Float[Array, "E C O"], Bool[Array, ""]]:
        inner, outer = shard.experts[-1:], shard.experts[:-1]
        (E, C, D), X, Y = x_ECD.shape, shard.axis_size(inner), shard.axis_size(outer)
        e = E // (X * Y)
        x_YXeCD = x_ECD.reshape(Y, X, e, C, D)  # by destination
        x_YXeCD = shard.all_to_all(x_YXeCD, inner, split=1, concat=1)
        x_YXeCD = shard.all_to_all(x_YXeCD, outer, split=0, concat=0)  # by source
        rows_eRD = jnp.moveaxis(x_YXeCD, 2, 0).reshape(e, Y * X * C, D)
        y_eRO = experts(params, rows_eRD, groups)
        y_YXeCO = jnp.moveaxis(y_eRO.reshape(e, Y, X, C, -1), 0, 2)
        y_YXeCO = shard.all_to_all(y_YXeCO, outer, split=0, concat=0)
        y_YXeCO = shard.all_to_all(y_YXeCO, inner, split=1, concat=1)
        return y_YXeCO.reshape(E, C, -1), jnp.ones((), bool)

    def traffic(self, part: ShardBatch, rows: ExchangedRows, experts: Shapes) -> list[Scheduled]:
        """Predicts rows [E, G*C, D] there and back, inside a slice and across."""
        inner, outer = part.here.experts[-1:], part.here.experts[:-1]
        there, back = (
            [c for axes in (inner, outer) for c in part.one("all-to-all", axes, rows.rows * width, EXCHANGE)]
            for width in (part.D, rows.O)
        )
        return round_trip(there, back, rows)
