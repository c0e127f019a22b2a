"""Collectives as data, and the inputs an exchange needs to predict its own: arithmetic on shapes, nothing is sent.

`exchange.traffic(part, rows, experts)` lists what one exchange of one MoE layer sends, on one device, forward and
backward. `costs/communication.py` adds up a whole train step.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.core import dims
from moe_jax.core.shard import AXES, Shard, rules_for

Sizes = Mapping[str, int]  # mesh axis -> devices
Shapes = Mapping[str, tuple[int, ...]]  # a shard's part of the parameters of a module, by name


class Collective(NamedTuple):
    """Collectives of one kind over the same axes: their number and bytes on one device."""

    op: str  # HLO's opcode: all-to-all, all-reduce, all-gather, reduce-scatter, collective-permute, ragged-all-to-all
    axes: tuple[str, ...]  # mesh axes that the groups span, in mesh order; () if none
    size: int  # devices in a group
    count: int  # type: ignore[assignment] # executions
    bytes: int  # of results, all executions together
    where: str = ""  # origin in the model

    @property
    def wire(self) -> float:
        """Bytes that a device sends, by the ring or pairwise algorithm; an upper bound for a ragged all-to-all."""
        n = self.size
        if n == 1:
            return 0.0
        times = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}
        return float(self.bytes * times.get(self.op, (n - 1) / n))


class ShardBatch(NamedTuple):
    """A shard's part of a batch, and the mesh it is on."""

    sizes: Sizes
    here: Shard
    B: int  # of this shard
    L: int
    D: int
    dtype: str
    platform: str

    @classmethod
    def of(cls, exchange: Any, sizes: Sizes, B: int, *rest: Any) -> "ShardBatch":
        rules, sizes = rules_for(exchange, sizes), {a: sizes.get(a, 1) for a in AXES}
        here = Shard(rules["B"], rules["E"], rules["D"], rules["F"], exchange)
        return cls(sizes, here, B // math.prod(sizes[a] for a in here.tokens), *rest)

    def devices(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.sizes[a] for a in axes)

    def width(self, dtype: str) -> int:
        """Bytes of a number of this type when it is sent."""
        return max(jnp.dtype(dtype).itemsize, 4 if self.platform == "cpu" else 0)

    def one(
        self, op: str, axes: tuple[str, ...], n: int, where: str, dtype: str = "", count: int = 1
    ) -> list[Collective]:
        """`count` collectives with n numbers as their results, in the compute type or in `dtype`."""
        if not axes or not n:
            return []
        axes = tuple(a for a in AXES if a in axes)
        return [Collective(op, axes, self.devices(axes), count, n * self.width(dtype or self.dtype), where)]

    def local(self, params: Any, specs: Any) -> Any:
        """Local shapes of a tree of parameters, without the axis of layers."""

        def leaf(path, x, spec):
            rank = len(dims.dims_of(str(path[-1].key)))
            return dims.local_shape(x.shape, spec, self.sizes)[x.ndim - rank if rank else x.ndim :]

        return jax.tree.map_with_path(leaf, params, specs)


class Scheduled(NamedTuple):
    """A collective, and when it runs."""

    what: Collective
    again: tuple[str, ...] = ()  # rematerialisations that repeat it in the backward pass
    depends_on: str = "activations"  # or "weights" or "ids": nothing else
    backward: bool = False  # in the backward pass only


# Rematerialisations that recompute what "save_collectives" saves, and what neither saves.
FULL, BOTH = ("full",), ("full", "save_collectives")


def scheduled(
    collectives: list[Collective], again: tuple[str, ...] = (), depends_on="activations", backward=False
) -> list[Scheduled]:
    """Schedules several collectives alike."""
    return [Scheduled(c, again, depends_on, backward) for c in collectives]


EXCHANGE = "exchange of MoE layers"


class ExchangedRows(NamedTuple):
    """Rows that one shard hands to the exchange."""

    rows: int
    E: int
    slots: int  # of an expert
    needed: tuple[str, ...]  # rematerialisations that recompute the experts' outputs
    bucketed: bool  # the capacity is one of several, chosen at run time
    depends_on: str  # what the assignments depend on
    O: int  # width of an output row
    distinct: int = 1  # choices of a token that are known to be different experts


def round_trip(
    there: list[Collective], back: list[Collective], rows: ExchangedRows, gradients: list[Collective] | None = None
) -> list[Scheduled]:
    """Schedules rows sent and returned; without `gradients`, the backward pass sends the same."""
    again = rows.needed and FULL
    gradients = there + back if gradients is None else gradients
    return scheduled(there, FULL) + scheduled(back, again) + scheduled(gradients, backward=True)
