"""Collectives as data, and what an exchange needs to predict its own: arithmetic on shapes, nothing is sent.

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
    """Collectives of one kind over the same axes: how many run, and what they move, on one device."""

    op: str  # HLO's opcode: all-to-all, all-reduce, all-gather, reduce-scatter, collective-permute, ragged-all-to-all
    axes: tuple[str, ...]  # of the mesh, in its order, along which its groups reach; () if no device needs another
    size: int  # devices in a group
    count: int  # type: ignore[assignment] # executions
    bytes: int  # of results, all executions together
    where: str = ""  # what it belongs to

    @property
    def wire(self) -> float:
        """Bytes that a device sends, by the ring or pairwise algorithm; at most, of a ragged all-to-all."""
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
        """Bytes of a number of this type when it travels."""
        return max(jnp.dtype(dtype).itemsize, 4 if self.platform == "cpu" else 0)

    def one(self, op: str, axes: tuple[str, ...], n: int, where: str, of: str = "", count: int = 1) -> list[Collective]:
        """`count` collectives with n numbers as their results, of the type that is computed in or another."""
        if not axes or not n:
            return []
        axes = tuple(a for a in AXES if a in axes)
        return [Collective(op, axes, self.devices(axes), count, n * self.width(of or self.dtype), where)]

    def local(self, params: Any, laid: Any) -> Any:
        """Shapes of a shard's part of a tree of parameters; without the axis of layers."""

        def leaf(path, x, layout):
            rank = len(dims.dims_of(str(path[-1].key)))
            return dims.local_shape(x.shape, layout, self.sizes)[x.ndim - rank if rank else x.ndim :]

        return jax.tree.map_with_path(leaf, params, laid)


class Scheduled(NamedTuple):
    """A collective, and when it runs."""

    what: Collective
    again: tuple[str, ...] = ()  # under these rematerialisations, in the backward pass once more
    of: str = "activations"  # what it depends on; "weights" or "ids": on nothing else
    backward: bool = False  # in the backward pass alone


# Rematerialisations that compute once more what "save_collectives" keeps, and what neither keeps.
FULL, BOTH = ("full",), ("full", "save_collectives")


def scheduled(
    collectives: list[Collective], again: tuple[str, ...] = (), of="activations", backward=False
) -> list[Scheduled]:
    """Returns several that run at the same times."""
    return [Scheduled(c, again, of, backward) for c in collectives]


EXCHANGE = "exchange of MoE layers"


class ExchangedRows(NamedTuple):
    """Rows that a shard's tokens make of themselves for experts that lie on several shards."""

    rows: int
    E: int
    slots: int  # of an expert
    needed: tuple[str, ...]  # rematerialisations that compute again what experts have made of them
    ladder: bool  # it is one of several branches
    of: str  # what it depends on who goes where
    O: int  # width of a row on its way back


def round_trip(
    there: list[Collective], back: list[Collective], rows: ExchangedRows, gradients: list[Collective] | None = None
) -> list[Scheduled]:
    """Schedules rows that travel and come back; their gradients are as large where nothing else is given."""
    again = rows.needed and FULL
    gradients = there + back if gradients is None else gradients
    return scheduled(there, FULL) + scheduled(back, again) + scheduled(gradients, backward=True)
