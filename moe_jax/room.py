"""A full disk: which checkpoint is whole, how much room a step takes, and how much is left."""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from moe_jax.files import is_disk_full
from moe_jax.manifest import present_steps, step_bytes, step_problem


class DiskFull(OSError):
    """There is no room for what was to be written; what is whole stays whole."""

    def __init__(self, message: str):
        super().__init__(message)
        self.errno = errno.ENOSPC


@contextlib.contextmanager
def room_told(checkpoints: Path, step: int | None = None, needed: int = 0) -> Iterator[None]:
    """Turns the error of a full disk into DiskFull, which says what is whole in this directory of checkpoints.

    step: the one that was to be saved. needed: bytes of a step, where no whole one tells.
    """
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise DiskFull(describe_room(checkpoints, step, needed)) from error


def describe_room(checkpoints: Path, step: int | None = None, needed: int = 0) -> str:
    """One line for a disk that is full, see `room_told`."""
    whole = [n for n in present_steps(checkpoints) if step_problem(checkpoints / str(n), hashes=False) is None]
    needed = step_bytes(checkpoints / str(whole[-1])) if whole else needed
    place = next(path for path in (checkpoints, *checkpoints.absolute().parents) if path.is_dir())
    what = "no space left on device" + ("" if step is None else f" for step {step}")
    takes = f"a step takes {megabytes(needed)}, and " if needed else ""
    free = f"{megabytes(shutil.disk_usage(place).free)} are free in {checkpoints}"
    kept = f"step {whole[-1]} is whole" if whole else "no checkpoint is whole yet"
    return f"{what}: {takes}{free}; {kept}; make room, and the same command goes on from there"


def megabytes(n: int) -> str:
    """1234567 bytes as "1.2 MB"."""
    return f"{n / 1e6:,.1f} MB"
