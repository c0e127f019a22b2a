import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_jax.core import groups as g
from moe_jax.core.ranges import PositiveFloat, check_ranges
from moe_jax.core.shard import Shard, Slices, check_expert_axes
from moe_jax.core.traffic import (
    BOTH,
    EXCHANGE,
    Collective,
    ExchangedRows,
    Scheduled,
    Shapes,
    ShardBatch,
    round_trip,
    scheduled,
)


@dataclasses.dataclass(frozen=True)
class RaggedAllToAll:
    """Dropless: exactly the rows that experts have been given travel, in slices of any size.

    `ragged_all_to_all` on TPU; elsewhere an exact emulation, in which every shard receives all rows. There is a slice
    per expert and source, so that rows arrive sorted by expert (MegaBlocks, arXiv:2211.15841, leaves this open).

    buffer: room to receive, in multiples of the balanced number of rows. None is room for all that can come (`room`).
        Rows beyond it are dropped and counted: the last rows of every slice, in the same proportion. Later tokens and
        other sequences share the room, so a bound is not causal.
    """

    buffer: PositiveFloat | None = None
    over: tuple[str, ...] = ("expert",)
    layouts: ClassVar = (g.Ragged,)

    def __post_init__(self):
        check_ranges(self)
        check_expert_axes(self)

    def __call__(
        self, shard: Shard, experts: Callable, params: Any, x_RD: Float[Array, "R D"], groups: g.Ragged
    ) -> tuple[Float[Array, "R O"], Bool[Array, "R"]]:
        (E,), R, X = groups.sizes_E.shape, len(x_RD), shard.axis_size(shard.experts)
        rows, me = self.room(R, X, E, shard.distinct), shard.axis_index(shard.experts)
        asked_XE = shard.gather(groups.sizes_E, shard.experts, tiled=False)
        asked_XXe = asked_XE.reshape(X, X, E // X)
        sizes_XXe = asked_XXe if rows == X * R else fit_to_buffer(asked_XXe, rows)
        begin_XE = jnp.cumsum(asked_XE, axis=1) - asked_XE
        expert_R = jnp.repeat(jnp.arange(E), groups.sizes_E, total_repeat_length=R)
        rank_R = jnp.arange(R) - begin_XE[me][expert_R]
        reached_R = rank_R < sizes_XXe[me].reshape(E)[expert_R]
        if rows < X * R:  # a row that stays here has no gradient
            x_RD = jnp.where(reached_R[:, None], x_RD, 0)
        slices = Slices(sizes_XXe, begin_XE.reshape(X, X, E // X), slice_offsets(sizes_XXe))
        x_rD = shard.send_slices(x_RD, slices, rows)
        y_rO = experts(params, x_rD, g.Ragged(sizes_XXe[:, me].sum(0)))
        return shard.send_slices(y_rO, slices.reverse(), R), reached_R

    def room(self, R: int, X: int, E: int, distinct: int = 1) -> int:
        """Rows that a shard has room for, where each of X shards has R rows for E experts.

        distinct: choices of a token that are known to be different experts. Then no expert is chosen by more than R /
        distinct of a shard's rows.
        """
        return math.ceil(R * self.relative_room(X, E, distinct))

    def relative_room(self, X: int, E: int, distinct: int = 1) -> Fraction:
        """Room in multiples of the balanced number of rows, see `room`."""
        most = min(Fraction(X), Fraction(E, distinct))
        return most if self.buffer is None else min(most, Fraction(str(self.buffer)))

    def traffic(self, part: ShardBatch, rows: ExchangedRows, experts: Shapes) -> list[Scheduled]:
        """Predicts an exchange of row counts, then of rows: on TPU those sent, elsewhere all rows of all shards."""
        axes, R = part.here.experts, rows.rows
        X = part.devices(axes)
        room = self.room(R, X, rows.E, rows.distinct)
        asked = part.one("all-gather", axes, X * rows.E, EXCHANGE, dtype="int32")

        def exchanged(before: int, after: int, width: int) -> list[Collective]:
            if part.platform == "tpu":
                return part.one("ragged-all-to-all", axes, after * width, EXCHANGE)
            return part.one("all-gather", axes, X * before * width, EXCHANGE)

        there, back = exchanged(R, room, part.D), exchanged(room, R, rows.O)
        gradients = exchanged(R, room, rows.O) + exchanged(room, R, part.D)
        return scheduled(asked, BOTH, rows.depends_on) + round_trip(there, back, rows, gradients)


def slice_offsets(sizes_XXe: Int[Array, "X X e"]) -> Int[Array, "X X e"]:
    """Offsets of slices at their destination, which orders them by expert, then by source."""
    by_expert_XeX = jnp.transpose(sizes_XXe, (1, 2, 0))
    X, e, _ = by_expert_XeX.shape
    ends_XR = jnp.cumsum(by_expert_XeX.reshape(X, e * X), axis=1)
    return jnp.transpose((ends_XR - by_expert_XeX.reshape(X, e * X)).reshape(X, e, X), (2, 0, 1))


def fit_to_buffer(asked_XXe: Int[Array, "X X e"], rows: int) -> Int[Array, "X X e"]:
    """Cuts slices to the room of their destination, all by the same fraction."""
    total_1X1 = asked_XXe.sum((0, 2), keepdims=True)
    part_1X1 = rows / jnp.maximum(total_1X1, 1) * (1 - 2**-20)  # rounding never adds up to a row too many
    part_XXe = jnp.floor(asked_XXe * part_1X1).astype(asked_XXe.dtype)
    return jnp.where(total_1X1 <= rows, asked_XXe, part_XXe)
