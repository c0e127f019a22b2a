"""Programs and tests on mutated code, each in a fork of one process that has imported what the code imports.

The code itself is imported in the fork, with the edit in it; nothing on disk changes. JAX starts its devices in the
fork too: a process that has started them cannot be forked.
"""

import importlib
import importlib.machinery
import os
import pathlib
import resource
import runpy
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tests.forked import leave
from tests.museum.mutant import ROOT, Mutant

LIMIT = 240  # CPU seconds of one job, and a quarter of its seconds
LIBRARIES = (
    *("jax", "jax.numpy", "jaxtyping", "numpy", "optax", "flax.linen", "flax.nnx", "orbax.checkpoint", "grain"),
    *("tensorflow_datasets", "ml_collections", "absl.flags", "pytest", "hypothesis"),
)
PYTEST = ("-x", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short")


class Job(NamedTuple):
    """A module that is run as a program, with its command line, and the edit of the code."""

    module: str
    argv: tuple[str, ...]
    mutant: Mutant | None = None


class Done(NamedTuple):
    """End of a job: exit code (negative: the signal that ended it), output, and CPU seconds."""

    code: int
    out: str
    err: str
    seconds: float


def pytest_job(nodes: Sequence[str], mutant: Mutant | None = None) -> Job:
    """Tests by their node ids."""
    return Job("pytest", (*PYTEST, *nodes), mutant)


def run(jobs: Sequence[Job], at_once: int = 2, cache: pathlib.Path | None = None) -> Iterator[Done]:
    """Runs jobs, some at once, and yields their ends in order. cache: a folder where compiled programs are kept."""
    prepare(cache)
    with tempfile.TemporaryDirectory() as folder:
        files = [pathlib.Path(folder) / str(i) for i in range(len(jobs))]
        ended: dict[int, Done] = {}
        running: dict[int, int] = {}  # process -> job
        waiting = iter(range(len(jobs)))
        for i in range(len(jobs)):
            while i not in ended:
                while len(running) < at_once and (new := next(waiting, None)) is not None:
                    running[start(jobs[new], files[new])] = new
                process, status, used = os.wait4(-1, 0)
                if (job := running.pop(process, None)) is not None:
                    code = os.waitstatus_to_exitcode(status)
                    ended[job] = Done(code, *read(files[job]), used.ru_utime + used.ru_stime)
            yield ended.pop(i)


def prepare(cache: pathlib.Path | None) -> None:
    """Imports what the code imports, on CPUs, without starting them."""
    if any(name.split(".")[0] in ("moe_jax", "experiments") for name in sys.modules):
        raise RuntimeError("The code was imported before it could be mutated.")
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": str(cache)} if cache else {}
    for name in LIBRARIES:
        importlib.import_module(name)


def start(job: Job, file: pathlib.Path) -> int:
    """The number of a process that does a job."""
    sys.stdout.flush()
    if process := os.fork():
        return process
    leave(lambda: work(job, file))


def work(job: Job, file: pathlib.Path) -> int:
    """Does a job in this process; returns its exit code."""
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(f"{file}{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 5))
    signal.alarm(4 * LIMIT)
    os.chdir(ROOT)
    if job.mutant is not None:
        plant(job.mutant)
    sys.argv = [job.module, *job.argv]
    try:
        runpy.run_module(job.module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def plant(mutant: Mutant) -> None:
    """From now on an import of the mutant's file gets its text, and nothing compiled before."""
    loader, path, text = importlib.machinery.SourceFileLoader, str(mutant.path), mutant.text().encode()
    get_data = loader.get_data

    def mutated(self: Any, wanted: str) -> bytes:
        if self.path != path:
            return get_data(self, wanted)
        if wanted != path:
            raise OSError("compiled without the edit")
        return text

    loader.get_data = mutated  # type: ignore[method-assign]
    sys.dont_write_bytecode = True


def read(file: pathlib.Path) -> tuple[str, str]:
    """Output and errors of a job."""
    texts = (pathlib.Path(f"{file}{suffix}") for suffix in (".out", ".err"))
    out, err = (text.read_text(encoding="utf-8", errors="replace") if text.exists() else "" for text in texts)
    return out, err
