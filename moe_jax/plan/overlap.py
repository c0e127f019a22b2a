"""Overlap of computation and communication in a compiled TPU program."""

from collections.abc import Iterator
from typing import NamedTuple

from moe_jax.audit import hlo
from moe_jax.audit.hlo import OPCODES, Computation, Instruction
from moe_jax.plan.schedule import Schedule, cycles

# Clock rates of the compiler's estimates (libtpu 0.0.52), in cycles a second; the chips' may differ.
CLOCKS = {
    "TPU v3": 940e6,
    "TPU v4": 920e6,
    "TPU v5 lite": 1.5e9,
    "TPU v5": 1.5e9,
    "TPU v6 lite": 1.75e9,
    "TPU7x": 1.9e9,
}


class Overlap(NamedTuple):
    """Collectives of one kind in a step, by how they overlap with computation."""

    op: str
    how: str  # "synchronous"; "asynchronous", started and waited for later; "fused" with a computation
    count: int  # type: ignore[assignment] # executions
    bytes: int  # of results, all executions together
    seconds: float | None  # estimated for what is computed between start and end; None where no clock is known


def overlaps(schedule: Schedule, clock: float | None) -> list[Overlap]:
    """Sums over the collectives of a step; seconds are None where the clock is not known."""
    sums: dict[tuple[str, str], list[int]] = {}
    for op, how, *numbers in each_overlap(schedule):
        total = sums.setdefault((op, how), [0, 0, 0])
        for k, n in enumerate(numbers):
            total[k] += n
    seconds = lambda cycles: None if clock is None else cycles / clock  # noqa: E731
    return [Overlap(op, how, n, moved, seconds(m)) for (op, how), (n, moved, m) in sorted(sums.items())]


def each_overlap(schedule: Schedule) -> Iterator[tuple[str, str, int, int, int]]:
    """Yields every collective in the text: what, how, executions, bytes, and cycles of what is computed meanwhile."""
    for name, n in schedule.times.items():
        around = schedule.computations[name]
        for i in around.values():
            for c, how in begun(i, schedule.computations):
                meanwhile = hidden_cycles(i, around) if how == "asynchronous" else cycles(i) if how == "fused" else 0
                size = hlo.total(moved(c))
                yield c.op.removesuffix("-start"), how, n, n * size, n * meanwhile


def begun(i: Instruction, computations: dict[str, Computation]) -> list[tuple[Instruction, str]]:
    """Collectives that an instruction is, starts, or fuses, each with how it overlaps."""
    if i.op in OPCODES:
        return [(i, "synchronous")]
    if i.op.removesuffix("-start") in OPCODES:
        return [(i, "asynchronous")]
    if i.op not in ("fusion", "async-start", "call-start"):
        return []
    inner = [c for name in hlo.called(i) for j in computations[name].values() for c, _ in begun(j, computations)]
    if i.op != "fusion":
        return [(c, "asynchronous") for c in inner]
    return [(c, "fused" if hlo.CHAIN.search(c.rest) else "synchronous") for c in inner]


def moved(c: Instruction) -> int | tuple:
    """Bytes of a collective's results; a start lists operands before them."""
    result = hlo.byte_sizes(c.result)
    started = c.op.endswith("-start") and c.op != "all-reduce-start"
    return result[1] if started and isinstance(result, tuple) else result


def hidden_cycles(start: Instruction, around: Computation) -> int:
    """Estimated cycles between a start and the instruction that waits for it."""
    between, total = False, 0
    for i in around.values():
        if between and i.op.endswith("-done") and start.name in hlo.operands(i):
            return total
        total += cycles(i) if between else 0
        between = between or i.name == start.name
    return 0  # waited for elsewhere
