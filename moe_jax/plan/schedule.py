"""Schedule of a compiled TPU program: how often each computation runs, and the cycles that the compiler estimates."""

import itertools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from moe_jax.audit import hlo
from moe_jax.audit.hlo import Computation, Instruction

UNKNOWN = 2**63 - 1
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
WINDOW = re.compile(r"\bwindow=\{([^}]*)\}")


class Schedule(NamedTuple):
    """Computations with sequential schedules; a fusion runs as one instruction."""

    computations: dict[str, Computation]
    times: dict[str, int]  # runs per step of each scheduled computation

    @classmethod
    def of(cls, text: str) -> "Schedule":
        """Parses `compiled.as_text()`; a conditional counts as its longest branch."""
        entry, computations = hlo.parse_module(text)
        times: dict[str, int] = {}
        todo = [(entry, 1)]
        while todo:
            name, n = todo.pop()
            times[name] = times.get(name, 0) + n
            for i in computations[name].values():
                todo += [(inner, n * m) for inner, m in runs(i, computations[name], computations)]
        return cls(computations, times)

    @property
    def instructions(self) -> Iterator[tuple[Instruction, Computation, int]]:
        """Yields every scheduled instruction, its computation, and how often it runs."""
        return (
            (i, self.computations[name], n) for name, n in self.times.items() for i in self.computations[name].values()
        )

    @property
    def cycles(self) -> int:
        """Cycles that the compiler estimates for the program: compute and HBM, no communication."""
        return sum(n * cycles(i) for i, _, n in self.instructions)

    @property
    def flops(self) -> int:
        """FLOPs of matrix multiplications, twice their multiply-adds."""
        return sum(n * self.multiplied(i, around) for i, around, n in self.instructions)

    def multiplied(self, i: Instruction, around: Computation) -> int:
        """FLOPs of one instruction, fused computations included."""
        if i.op == "convolution":
            return convolution(i, around)
        if i.op != "fusion":
            return 0
        inner = [self.computations[name] for name in hlo.called(i)]
        return sum(self.multiplied(j, fused) for fused in inner for j in fused.values())


def runs(i: Instruction, around: Computation, computations: dict[str, Computation]) -> list[tuple[str, int]]:
    """Computations that an instruction runs, and how often."""
    if i.op == "while":
        body, condition = hlo.attribute(i, "body"), hlo.attribute(i, "condition")
        try:
            n = hlo.trips(i, around, computations[body], computations[condition])
        except ValueError:  # unknown trip count; such loops search or sort
            n = 1
        return [(body, n), (condition, n + 1)]
    if i.op == "conditional":
        return [(max(hlo.called(i), key=lambda name: sum(map(cycles, computations[name].values()))), 1)]
    return [(name, 1) for name in hlo.called(i)] if i.op == "call" else []


def cycles(i: Instruction) -> int:
    """Cycles that the compiler estimates for an instruction; 0 where it gives none (some scatters)."""
    found = CYCLES.search(i.rest)
    return int(found[1]) if found and int(found[1]) < UNKNOWN else 0


# ---------------------------------------------------------------- matrix multiplications, as convolutions


def convolution(i: Instruction, around: Computation) -> int:
    """FLOPs of a convolution. A batch of matmuls is a spatial dimension in which every output has one input."""
    labels = LABELS.search(i.rest)
    assert labels is not None
    left, right = (result_shape(around[name]) for name in hlo.operands(i)[:2])
    given, kernel, result = (
        dict(zip(names, sizes, strict=True))
        for names, sizes in zip(labels.groups(), (left, right, result_shape(i)), strict=True)
    )
    taps = math.prod(n_taps(given[d], kernel[d], result[d], window) for d, window in conv_windows(i) if d in kernel)
    return 2 * taps * result["b"] * result["f"] * kernel["i"]


def result_shape(i: Instruction) -> list[int]:
    """Shape of an instruction's result, an array."""
    return hlo.numbers(i.result[i.result.index("[") : i.result.index("]")])


def conv_windows(i: Instruction) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields each spatial dimension with its window as written."""
    found = WINDOW.search(i.rest)
    fields = dict(part.split("=") for part in found[1].split()) if found else {}
    for d in range(len(fields.get("size", "").split("x")) if fields else 0):
        yield str(d), {name: value.split("x")[d] for name, value in fields.items()}


def n_taps(n: int, size: int, out: int, window: dict[str, str]) -> int:
    """Number of pairs of an output and an input in its window, along one spatial dimension."""
    step, gap, apart = (int(window.get(name, 1)) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    before = int(window.get("pad", "0_0").split("_")[0])
    inputs = (o * step + k * apart - before for o, k in itertools.product(range(out), range(size)))
    return sum(0 <= at <= (n - 1) * gap and at % gap == 0 for at in inputs)
