"""Time of what the TPU compiler prices wrongly or not at all: kernels, and fills of memory.

Kernels (Pallas, and XLA's own grouped matmuls) have no estimate in a compiled program. They are priced here by the
larger of FLOPs and bytes at stated rates. A fill is estimated at a fortieth of the memory's bandwidth.
"""

import itertools
import math
from typing import NamedTuple

from moe_jax.audit import hlo
from moe_jax.audit.hlo import Instruction
from moe_jax.costs.chips import Chip
from moe_jax.plan.schedule import Schedule, cycles

REACHED = 0.86  # of a chip's peak: what the compiler's estimates give its own large matmuls (394 of 459 TFLOP/s, v5p)
ODD = 4  # a fill that is estimated to take this many times its bytes at the memory's bandwidth is flagged
FLOATS = ("bf", "f")


class Kernels(NamedTuple):
    """Kernels of one kind in a step, without an estimate of the compiler's."""

    name: str  # what it computes, of which shapes
    where: str  # module
    count: int  # type: ignore[assignment] # executions
    flops: float  # of all executions, on rows that are used
    bytes: float  # read and written, on rows that are used
    seconds: float  # at REACHED of the peak, or at the memory's bandwidth, whichever is longer


class Fills(NamedTuple):
    """Fills of memory whose estimate is odd."""

    count: int  # type: ignore[assignment] # executions
    bytes: int  # written, all executions together
    seconds: float  # as the compiler estimates
    at_bandwidth: float  # seconds at the memory's bandwidth


def kernels(schedule: Schedule, chip: Chip, used: float = 1.0) -> list[Kernels]:
    """Kernels of a schedule, the longest first.

    used: fraction of the rows of MoE layers that hold a token, where their buffers have room for more.
    """
    sums: dict[tuple[str, str], list[float]] = {}
    for i, around, n in schedule.instructions:
        if i.op == "custom-call" and 'custom_call_target="tpu_custom_call"' in i.rest and not cycles(i):
            operands = [around[name].result for name in hlo.operands(i) if name in around]
            where = hlo.location(i)
            part = used if "moe" in where else 1.0
            kind, flops, moved = kernel_work(float_shapes(" ".join(operands)), float_shapes(i.result), part)
            total = sums.setdefault((kind, where), [0, 0.0, 0.0])
            for k, value in enumerate((1, flops, moved)):
                total[k] += n * value
    rate, hbm = REACHED * chip.flops / chip.devices, chip.hbm_rate / chip.devices
    found = [
        Kernels(kind, where, int(n), flops, moved, max(flops / rate, moved / hbm))
        for (kind, where), (n, flops, moved) in sums.items()
    ]
    return sorted(found, key=lambda k: -k.seconds)


class FloatArray(NamedTuple):
    """Shape of an array of floating-point numbers, and its bytes."""

    shape: tuple[int, ...]
    bytes: int


def float_shapes(text: str) -> list[FloatArray]:
    """Arrays of floating-point numbers in a type, or in several."""
    found = [(kind, bits, hlo.numbers(f"[{sides}")) for kind, bits, sides in hlo.SHAPE.findall(text) if kind in FLOATS]
    return [FloatArray(tuple(shape), math.prod(shape) * int(bits) // 8) for _, bits, shape in found]


def kernel_work(operands: list[FloatArray], results: list[FloatArray], used: float = 1.0) -> tuple[str, float, float]:
    """Names what a kernel computes, and counts its FLOPs and the bytes that it reads and writes.

    FLOPs are known of grouped matmuls, [R, I] x [E, I, O] -> [R, O] with matrices transposed or not, and of their
    gradients, [R, I] x [R, O] -> [E, I, O]; other kernels count as none. used: fraction of R that is used.
    """
    moved = sum(((used if len(a.shape) == 2 else 1.0) * a.bytes for a in (*operands, *results)), 0.0)
    for a, b in itertools.permutations((x.shape for x in operands), 2):
        for out in (x.shape for x in results):
            if len(a) == 2 and len(b) == 3 and sorted((a[1], out[-1])) == sorted(b[1:]) and out[:-1] == a[:1]:
                return f"grouped matmul {words(a)} x {words(b)}", 2.0 * used * math.prod(a) * out[-1], moved
            if len(a) == len(b) == 2 and a[0] == b[0] and out[1:] == (a[1], b[1]):
                return f"gradient of matrices {words(a)} x {words(b)}", 2.0 * used * math.prod(a) * b[1], moved
    largest = max(results, key=lambda x: x.bytes, default=FloatArray((), 0))
    return f"kernel for {words(largest.shape)}" if results else "kernel for indices", 0.0, moved


def words(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def odd_fills(schedule: Schedule, chip: Chip, clock: float) -> Fills:
    """Fills of memory that the compiler prices at less than 1 / ODD of the memory's bandwidth."""
    hbm, count, moved, took = chip.hbm_rate / chip.devices, 0, 0, 0.0
    for i, _, n in schedule.instructions:
        size = fill_bytes(i)
        if size and cycles(i) / clock > ODD * size / hbm:
            count, moved, took = count + n, moved + n * size, took + n * cycles(i) / clock
    return Fills(count, moved, took, moved / hbm)


def fill_bytes(i: Instruction) -> int:
    """Bytes that an instruction fills with one number; 0 for others."""
    return hlo.total(hlo.byte_sizes(i.result)) if i.op == "broadcast" else 0
