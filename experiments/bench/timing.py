"""Programs compiled ahead, and their times in turn."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from moe_jax.xla import compiler_options

PATIENCE = 20.0  # seconds for a pair of programs
LEAST = 3  # repeats, however slow
IN_A_ROW = 10  # calls on an accelerator


class Program(NamedTuple):
    """A compiled function: its compile time, and its temporary memory in bytes."""

    run: Callable
    seconds: float
    temp_bytes: int | None

    def bind(self, *args: Any) -> Callable[[], Any]:
        """Returns a call with these arguments."""
        return lambda: self.run(*args)


def compiled(f: Any, *args: Any) -> Program:
    """Compiles a function, or an object with `lower`, with these arrays as arguments: constants would be folded."""
    jitted, began = f if hasattr(f, "lower") else jax.jit(f), time.perf_counter()
    program = jitted.lower(*args).compile(compiler_options=compiler_options(jax.devices()[0]) or None)
    seconds, memory = time.perf_counter() - began, program.memory_analysis()
    return Program(program, seconds, getattr(memory, "temp_size_in_bytes", None))


def in_a_row() -> int:
    """Number of calls per wait: several on an accelerator, as in training."""
    return 1 if jax.default_backend() == "cpu" else IN_A_ROW


def in_turn(calls: Sequence[Callable[[], Any]], repeats: int, patience: float = PATIENCE, row: int = 1) -> np.ndarray:
    """Milliseconds [repeats, calls] until all results of a call are ready, after one round of warm-up.

    Calls alternate, and their order too, so that all see the same machine. Slow ones are repeated less often.
    row: number of calls before a wait; the time is per call.
    """
    start, times = time.perf_counter(), np.zeros((repeats + 1, len(calls)))
    for number in range(repeats + 1):
        if number > LEAST and time.perf_counter() - start > patience:
            times = times[:number]
            break
        order = list(range(len(calls)))
        for i in order[:: -1 if number % 2 else 1]:
            began = time.perf_counter()
            for _ in range(row):
                made = calls[i]()
            jax.block_until_ready(made)
            times[number, i] = (time.perf_counter() - began) / row
    return 1e3 * times[1:]


def quartiles(sample: np.ndarray) -> list[float]:
    """First quartile, median, third quartile."""
    return [float(q) for q in np.percentile(sample, (25, 50, 75))]


def compare(times: np.ndarray) -> dict[str, Any]:
    """Quartiles of times [repeats, 2] of layer and dense baseline, and of the pairs' ratios, whose median is tau."""
    layer, dense = (quartiles(times[:, i]) for i in range(2))
    low, tau, high = quartiles(times[:, 0] / times[:, 1])
    return {"layer_ms": layer, "dense_ms": dense, "tau": tau, "tau_spread": [low, high]}
