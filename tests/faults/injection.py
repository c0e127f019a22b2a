"""Faults in a process that trains, at a moment that a number names.

The moments of a run are counted: every file or folder of its workdir that is opened for writing, made, moved or
deleted by Python, in whatever thread, and every record of its log. A delay in milliseconds after one leads to what
Python does not see, steps and the arrays that are written in C++.
"""

import dataclasses
import errno
import os
import pathlib
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from moe_jax.reporting.metrics import Logger

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
DELAYS = (0, 0, 1, 3, 10, 30)  # ms


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault of a kind of `KINDS`, at a moment (from 1), so many milliseconds later."""

    kind: str
    moment: int
    delay: int = 0


def moments(kind: str, count: int, last: int) -> list[Fault]:
    """So many faults over a run of `last` moments: fault i is drawn by i, and lies in the i-th part of the run.

    The parts are visited in an order by which the first few faults lie far apart.
    """
    order = sorted(range(count), key=lambda i: (i * 0.6180339887) % 1)
    drawn = []
    for i in range(count):
        rng = random.Random(f"{kind} {i}")
        moment = 1 + int((order[i] + rng.random()) / count * last)
        drawn.append(Fault(kind, moment, rng.choice(DELAYS) if moment < last - 10 else 0))  # or it has ended before
    return drawn


class Moments:
    """Counts the moments of a run in a workdir, and has `act` called at one, with the number of the moment."""

    def __init__(self, workdir: pathlib.Path, act: Callable[[int], None] = lambda moment: None):
        self.count = 0
        self.workdir, self.act = os.fsencode(workdir.absolute()), act
        sys.addaudithook(self._heard)
        write = Logger.write

        def written(log: Logger, record: dict) -> None:
            self._next()
            write(log, record)

        Logger.write = written  # type: ignore[method-assign]

    def _next(self) -> None:
        self.count += 1
        self.act(self.count)

    def _heard(self, event: str, given: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and isinstance(given[2], int) and given[2] & WRITES):
            if isinstance(given[0], str | bytes | os.PathLike) and self._inside(given[0]):
                self._next()

    def _inside(self, path: str | bytes | os.PathLike) -> bool:
        return os.path.abspath(os.fsencode(path)).startswith(self.workdir)


def inject(fault: Fault | None, workdir: pathlib.Path) -> Moments:
    """From now on this process has a fault, which cannot be taken back."""
    return Moments(workdir, KINDS[fault.kind](fault, workdir) if fault else lambda moment: None)


def later(delay: int, act: Callable[[], None]) -> None:
    """Acts now, or from a thread in so many milliseconds."""
    if not delay:
        act()
        return
    threading.Timer(delay / 1000, act).start()


def signals(*numbers: int) -> Callable[[Fault, pathlib.Path], Callable[[int], None]]:
    """A kind of fault: these signals, one after another."""

    def send() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.05)

    def kind(fault: Fault, workdir: pathlib.Path) -> Callable[[int], None]:
        return lambda moment: later(fault.delay, send) if moment == fault.moment else None

    return kind


def full(fault: Fault, workdir: pathlib.Path) -> Callable[[int], None]:
    """A kind of fault: from the moment on there is no room, for anything that Python opens or makes."""

    def act(moment: int) -> None:
        if moment >= fault.moment:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return act


def hold(fault: Fault, workdir: pathlib.Path) -> Callable[[int], None]:
    """A kind of fault: the process stands still until a file `go` is beside its workdir, and makes `held` there."""

    def act(moment: int) -> None:
        if moment == fault.moment:
            (workdir.parent / "held").touch()
            while not (workdir.parent / "go").exists():
                time.sleep(0.01)

    return act


KINDS = {
    "kill": signals(signal.SIGKILL),
    "term": signals(signal.SIGTERM),
    "term twice": signals(signal.SIGTERM, signal.SIGTERM),
    "full": full,
    "hold": hold,
}
