"""A lock on the workdir of a run: one run at a time writes there, from this machine or from another that sees it.

<workdir>/workdir.lock is made with O_EXCL, says whose it is, and is touched every `BEAT` seconds. Who finds one

- of a process of this machine is refused while that process lives, and takes the lock over when it is gone, by
  whatever end (SIGKILL, a reboot);
- of a process that cannot be seen from here (another machine or container) watches the file for `SILENCE` seconds,
  is refused once it is touched, and takes it over if it is not.

An owner that was stopped for so long that its lock was taken over finds out before it writes again (`check`). Neither
locks of the operating system are needed (fcntl), which network file systems often lack, nor clocks that agree.
"""

import contextlib
import dataclasses
import datetime
import functools
import json
import logging
import os
import pathlib
import socket
import threading
import time
import uuid

FILE = "workdir.lock"
BEAT = 10.0  # seconds between two signs of life
SILENCE = 90.0  # seconds without one, of a process that cannot be seen: above what network file systems cache
LOOK = 0.2  # seconds between two looks
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Owner:
    """Process that holds a lock. machine: its boot and process namespace. began: start of the process, by its clock."""

    host: str
    machine: str
    pid: int
    began: str
    since: str
    token: str

    @property
    def alive(self) -> bool | None:
        """Tells whether the process lives; None where that cannot be seen from here."""
        if (self.host, self.machine) != (socket.gethostname(), _machine()):
            return None
        return _began(self.pid) == self.began

    def __str__(self) -> str:
        if self == UNKNOWN:
            return "a process that is not known (the lock is not whole)"
        return f"process {self.pid} on {self.host}, since {self.since}"


UNKNOWN = Owner("", "", 0, "", "", "")


class WorkdirLock:
    """The lock on a workdir, which is made if need be; a context manager.

    silence, beat: as `SILENCE` and `BEAT`. ValueError where another process holds it, OSError where it cannot be made.
    """

    def __init__(self, workdir: pathlib.Path, silence: float = SILENCE, beat: float = BEAT):
        self.workdir, self.path = workdir, workdir / FILE
        self.silence, self.beat = silence, beat
        self._ended = threading.Event()
        self._content = b""

    def __enter__(self) -> "WorkdirLock":
        self._made = not self.workdir.exists()
        self.workdir.mkdir(parents=True, exist_ok=True)
        self._content = json.dumps(dataclasses.asdict(_this_process())).encode()
        while not self._create():
            self._remove_stale()
        threading.Thread(target=self._touch, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        """Gives the lock back, and removes a workdir that was made for it and stayed empty."""
        self._ended.set()
        with contextlib.suppress(OSError):
            if self.path.read_bytes() == self._content:
                self.path.unlink()
            if self._made:
                self.workdir.rmdir()

    def check(self) -> None:
        """ValueError where the lock has been taken over; to be called before anything is written."""
        try:
            found = self.path.read_bytes()
        except FileNotFoundError:  # deleted by hand
            if self._create():
                return
            found = self.path.read_bytes()
        if found != self._content:
            raise ValueError(
                f"{self.workdir} has been taken over by {_owner(found)}, after this process gave no sign of life for "
                f"{self.silence:g} s; it ends here, and what it has saved is whole."
            )

    def _create(self) -> bool:
        """Makes the file; False where there is one."""
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with open(descriptor, "wb") as file:
            file.write(self._content)
            file.flush()
            os.fsync(descriptor)
        return True

    def _remove_stale(self) -> None:
        """Removes the lock of a process that is gone; ValueError where it is not."""
        if (stamp := _stamp(self.path)) is None:
            return
        owner = _owner(content := stamp[0])
        alive = owner.alive
        if alive is None:
            log.warning("%s is locked by %s: waiting up to %g s for a sign of it", self.workdir, owner, self.silence)
            alive = self._touched(stamp)
        if alive:
            raise _in_use(self.workdir, owner)
        self._take_away(content)

    def _touched(self, stamp: tuple[bytes, int]) -> bool:
        """Watches the file; True as soon as somebody touches it."""
        end = time.monotonic() + self.silence
        while time.monotonic() < end:
            time.sleep(LOOK)
            if (now := _stamp(self.path)) != stamp:
                return now is not None
        return False

    def _take_away(self, stale: bytes) -> None:
        """Removes a stale lock. One that another process has made in the meantime is put back."""
        aside = self.path.with_name(f"{FILE}.{uuid.uuid4().hex}")
        with contextlib.suppress(FileNotFoundError):
            if self.path.read_bytes() != stale:
                return
            self.path.rename(aside)
            if aside.read_bytes() == stale:
                aside.unlink()
            else:
                aside.rename(self.path)

    def _touch(self) -> None:
        while not self._ended.wait(self.beat):
            with contextlib.suppress(OSError):
                if self.path.read_bytes() == self._content:
                    os.utime(self.path)


def check_free(workdir: pathlib.Path) -> None:
    """ValueError where a process that can be seen from here holds a workdir; waits for nothing."""
    if (stamp := _stamp(workdir / FILE)) is not None and _owner(stamp[0]).alive:
        raise _in_use(workdir, _owner(stamp[0]))


def _in_use(workdir: pathlib.Path, owner: Owner) -> ValueError:
    return ValueError(
        f"{workdir} is in use by {owner}; wait until it has ended, stop it, or choose another --workdir "
        f"(if it is certainly gone: delete {workdir / FILE})."
    )


def _stamp(path: pathlib.Path) -> tuple[bytes, int] | None:
    """Content of a lock and when it was touched, read through an open file, as NFS has them current; None without."""
    try:
        with path.open("rb") as file:
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _owner(content: bytes) -> Owner:
    """The owner that a lock names; `UNKNOWN` of one that is not whole."""
    try:
        owner = Owner(**json.loads(content))
    except (ValueError, TypeError):
        return UNKNOWN
    return owner if isinstance(owner.pid, int) and owner.pid > 0 else UNKNOWN


def _this_process() -> Owner:
    now, pid = datetime.datetime.now().astimezone().isoformat(timespec="seconds"), os.getpid()
    return Owner(socket.gethostname(), _machine(), pid, _began(pid) or "", now, uuid.uuid4().hex)


@functools.cache
def _machine() -> str:
    """This boot of this machine, and the namespace that process ids count in; "" where neither can be told."""
    found = []
    with contextlib.suppress(OSError):
        found.append(pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        found.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(found)


def _began(pid: int) -> str | None:
    """When a process of this machine began, in its own units; None where there is none, or only its remains."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # somebody else's
    try:
        state, *fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "unknown"  # no /proc: that there is such a process must do
    return None if state in "ZX" else fields[18]  # proc(5): field 22, of which the first three are gone
