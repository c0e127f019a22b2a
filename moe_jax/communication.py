"""What devices send to one another, as a list of collectives."""

from collections.abc import Iterable
from typing import NamedTuple


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


def merged(collectives: Iterable[Collective], where: bool = False) -> list[Collective]:
    """Sums of count and bytes, one per op, axes and size, and per place if asked for; sorted."""
    sums: dict[tuple[str, tuple[str, ...], int, str], tuple[int, int]] = {}
    for c in collectives:
        key = c.op, c.axes, c.size, c.where if where else ""
        count, moved = sums.get(key, (0, 0))
        sums[key] = count + c.count, moved + c.bytes
    return [Collective(op, axes, n, *sums[op, axes, n, place], place) for op, axes, n, place in sorted(sums)]
