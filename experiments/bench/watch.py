"""Measures the time of a training run by cause, from outside: `train` itself is unchanged."""

import contextlib
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax

from moe_jax import train as loop
from moe_jax.checkpoint import Checkpoints
from moe_jax.config import Experiment
from moe_jax.data import AnyBatch
from moe_jax.reporting.metrics import Logger


class Outside(NamedTuple):
    """Milliseconds per step: of computing it, and of idle devices, by cause."""

    step: float
    data: float  # waiting for a batch
    logging: float
    checkpoint: float  # at the config's interval
    other: float  # batches to devices, metrics from them, ...

    @property
    def share(self) -> float:
        """Fraction of the time in which no step is computed."""
        return 1 - self.step / sum(self)


class Clock:
    """Times at which steps were dispatched and done, and intervals that the loop spent on other work.

    warm: number of first steps to leave out, which include compilation.
    """

    def __init__(self, warm: int) -> None:
        self.warm = warm
        self.given: list[float] = []
        self.done: list[float] = []
        self.spent: dict[str, list[tuple[float, float]]] = {}
        self._threads: list[threading.Thread] = []

    def step(self, run: Callable[[], Any]) -> Any:
        """Runs a step; another thread waits for it, so that the loop continues as usual."""
        number = len(self.given)
        self.given.append(time.perf_counter())
        self.done.append(0.0)
        made = run()
        self._threads.append(threading.Thread(target=self._wait, args=(number, made[1]), daemon=True))
        self._threads[-1].start()
        return made

    def _wait(self, number: int, metrics: Any) -> None:
        jax.block_until_ready(metrics)
        self.done[number] = time.perf_counter()

    @contextlib.contextmanager
    def record(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.spent.setdefault(what, []).append((began, time.perf_counter()))

    def wrap(self, what: str, f: Callable) -> Callable:
        def timed(*args, **named):
            with self.record(what):
                return f(*args, **named)

        return timed

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    @property
    def idle(self) -> list[tuple[float, float]]:
        """Intervals from the end of warm-up to the end of the last step in which no step is computed."""
        ends = [max(self.done[: i + 1]) for i in range(len(self.done))]
        return [
            (end, max(end, given)) for end, given in zip(ends[self.warm - 1 :], self.given[self.warm :], strict=False)
        ]

    def idle_in(self, what: str) -> float:
        """Seconds of idle intervals that are spent on `what`."""
        pairs = ((a, b) for a in self.idle for b in self.spent.get(what, ()))
        return sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a, b in pairs)


def watched(exp: Experiment, workdir: pathlib.Path, data_dir: pathlib.Path, save_every: int) -> Outside:
    """Trains, with a log and checkpoints; checkpoints are counted as if one were made every `save_every` steps.

    The first record is left out: it compiles functions.
    """
    clock = Clock(exp.run.log_every + 1)

    class Watched(loop.Program):
        compiled: Any = None

        def step(self, state: loop.State, batch: AnyBatch) -> Any:
            global_batch = self.to_global(batch)
            if self.compiled is None:
                self.compiled = self.lower(global_batch).compile()
            return clock.step(lambda: self.compiled(state, global_batch))

    def batches(*args: Any, **named: Any) -> Iterator[Any]:
        stream = make_batches(*args, **named)
        while True:
            with clock.record("data"):
                batch = next(stream)
            yield batch

    make_batches = loop.batches
    patches = (
        mock.patch.multiple(loop, Program=Watched, batches=batches),
        mock.patch.object(Checkpoints, "save", clock.wrap("checkpoint", Checkpoints.save)),
    )
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # waiting threads should notice the end of a step in time
    with patches[0], patches[1], Logger(workdir, exp.run.steps, quiet=True) as log:
        for record in loop.train(exp, workdir, data_dir):
            with clock.record("logging"):
                log.write(record)
    clock.join()
    sys.setswitchinterval(interval)
    return summary(clock, save_every)


def summary(clock: Clock, save_every: int) -> Outside:
    """Milliseconds per step, from the end of warm-up to the end of the last step."""
    steps = len(clock.given) - clock.warm
    idle = sum(end - begin for begin, end in clock.idle)
    total = max(clock.done) - max(clock.done[: clock.warm])
    spent = {what: clock.idle_in(what) for what in ("data", "logging", "checkpoint")}
    saves = clock.spent.get("checkpoint", [])
    each = sum(end - begin for begin, end in saves) / len(saves) if saves else 0.0
    other = idle - sum(spent.values())
    per_step = [seconds / steps for seconds in (total - idle, spent["data"], spent["logging"])]
    return Outside(*(1e3 * s for s in (*per_step, each / save_every, max(0.0, other / steps))))
