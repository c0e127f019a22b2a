"""Whole programs, each in a fork of one process that has imported them: a restart costs no import and no compilation.

    python -m tests.faults.server

reads a job from each line, as JSON, and starts it. JAX starts its devices in the fork: a process that has started them
cannot be forked.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import pathlib
import resource
import subprocess
import sys
import time
from typing import Any

from tests.forked import leave

ROOT = pathlib.Path(__file__).parents[2]
LIMIT = 60  # CPU seconds of a job
WAIT = 240  # seconds for one, on a machine that does much else


@dataclasses.dataclass(frozen=True)
class Ended:
    """End of a program. code: of its exit; negative: the signal that ended it. moments: how many it has counted."""

    code: int
    said: str
    seconds: float
    moments: int


class Server:
    """The process that forks; a context manager. folder: for what jobs leave, and for compiled programs."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.jobs = folder, 0
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "Server":
        settings = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled")}
        settings |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        command = [sys.executable, "-m", "tests.faults.server"]
        self.process = subprocess.Popen(command, cwd=ROOT, env=os.environ | settings, stdin=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *exception: object) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()

    def start(self, workdir: pathlib.Path, *flags: str, **job: Any) -> pathlib.Path:
        """Starts training in a workdir, from the folder above it; gives the folder of the job. job: `work`'s."""
        self.jobs += 1
        files = self.folder / str(self.jobs)
        files.mkdir()
        line = {"workdir": os.fsencode(workdir).hex(), "flags": flags, "files": str(files), **job}
        assert self.process.stdin
        print(json.dumps(line), file=self.process.stdin, flush=True)
        return files

    def end(self, files: pathlib.Path) -> Ended:
        """Waits for the end of a job."""
        end = time.monotonic() + WAIT
        while not (files / "end").exists():
            assert time.monotonic() < end, f"no end after {WAIT} s: {read(files / 'said')}"
            assert self.process.poll() is None, "the server has ended"
            time.sleep(0.01)
        code, seconds = json.loads((files / "end").read_text())
        return Ended(code, read(files / "said"), seconds, int(read(files / "moments") or 0))

    def train(self, workdir: pathlib.Path, *flags: str, **job: Any) -> Ended:
        """Trains in a workdir to whatever end."""
        return self.end(self.start(workdir, *flags, **job))


def read(file: pathlib.Path) -> str:
    return file.read_text(errors="replace") if file.exists() else ""


def serve() -> None:
    """Starts a job for every line of stdin, each minded by a process of its own."""
    for name in ("tensorboardX", "experiments.train", "tests.faults.injection"):
        importlib.import_module(name)

    for line in sys.stdin:
        if not os.fork():
            mind(json.loads(line))
            os._exit(0)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def mind(job: dict[str, Any]) -> None:
    """Does a job in a fork, and writes down how it has ended."""
    files = pathlib.Path(job.pop("files"))
    process = os.fork()
    if not process:
        os.dup2(os.open(files / "said", os.O_WRONLY | os.O_CREAT, 0o644), 2)
        os.dup2(2, 1)
        leave(lambda: work(files, **job))
    _, status, used = os.wait4(process, 0)
    code = os.waitstatus_to_exitcode(status)
    (files / "writing").write_text(json.dumps([code, used.ru_utime + used.ru_stime]))
    (files / "writing").rename(files / "end")


def work(
    files: pathlib.Path,
    workdir: str,
    flags: list[str],
    fault: list[Any] | None = None,
    silence: float | None = None,
) -> int:
    """Trains the tiny experiment in this process, which may have a fault; returns the exit code."""
    from experiments import cli, train
    from moe_jax.lock import WorkdirLock
    from tests.faults.injection import Fault, inject

    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 5))
    train.write_report = plain_report
    place = pathlib.Path(os.fsdecode(bytes.fromhex(workdir)))
    os.chdir(files.parent)  # where the text is
    if silence is not None:
        WorkdirLock.__init__.__defaults__ = (silence, silence / 10)  # type: ignore[misc]
    moments = inject(Fault(*fault) if fault else None, place)
    config = pathlib.Path(__file__).with_name("tiny.py")
    sys.argv = ["train", f"--config={config}", f"--workdir={place}", "--data_dir=data", *flags]
    try:
        cli.run(train.main)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        (files / "moments").write_text(str(moments.count))
    return 0


def plain_report(workdir: pathlib.Path, *_: Any, **__: Any) -> pathlib.Path:
    """In place of the report, whose figures take longer than all else."""
    from moe_jax.files import write_file

    return write_file(workdir / "report.html", "a report")


if __name__ == "__main__":
    serve()
