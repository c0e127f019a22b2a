"""Keeps the processes of a run going: it sees one die or hang, kills all, and starts all of them again."""

import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

LOOK = 0.2  # seconds between two looks
STARTING = 60.0  # seconds until the first sign of life: a program imports before it beats
MISTAKE = 2  # the exit code of a user's mistake
OVERWRITE = ("--overwrite", "-overwrite", "--overwrite=true", "--overwrite=True", "--overwrite=1")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Plan of a supervisor: what to run, and its time limits in seconds.

    timeout: without a sign of life from a process. patience: without a line in the log of the run.
    restarts: at most. shrink: on half as many processes each time.
    """

    command: tuple[str, ...]
    workdir: pathlib.Path
    processes: int
    devices: int | None = None
    restarts: int = 3
    timeout: float = 10.0
    patience: float = 600.0
    shrink: bool = False

    @property
    def folder(self) -> pathlib.Path:
        """Folder of the processes' output and of the events."""
        return self.workdir / "processes"

    def step(self) -> int:
        """The newest checkpoint's."""
        found = (self.workdir / "checkpoints").glob("*/manifest.json")
        return max((int(path.parent.name) for path in found if path.parent.name.isdecimal()), default=0)

    def claim(self) -> tuple[int, int] | None:
        """Marker that changes when the run claims its workdir."""
        return _stamp(self.workdir / "config.json")


class Trouble(NamedTuple):
    """Cause that ended an attempt: the process (None: all), "died" or "hung", and details."""

    event: str
    how: str
    process: int | None = None
    code: int | None = None


def supervise(plan: Plan) -> int:
    """Runs until the processes have finished (0), a mistake is the user's (2), or there were too many restarts (1).

    KeyboardInterrupt or SystemExit in it ends the processes after a step that they save (130, or the exit's code).
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    n, before = plan.processes, plan.claim()
    for attempt in range(plan.restarts + 1):
        claimed = plan.claim() not in (None, before)
        with Group(plan, n, claimed) as group:
            what = "restarted" if attempt else "started"
            say(plan, what, f"on {n} from step {plan.step()}", processes=n, step=plan.step(), pids=group.pids)
            try:
                trouble = group.watch()
            except (KeyboardInterrupt, SystemExit) as end:
                group.interrupt()
                words = f"without --overwrite, the same command goes on from step {plan.step()}"
                say(plan, "interrupted", words, step=plan.step())
                return 130 if isinstance(end, KeyboardInterrupt) else int(end.code or 0)
        if trouble is None:
            say(plan, "finished", f"at step {plan.step()}", step=plan.step())
            return 0
        say(plan, **trouble._asdict())
        if trouble.code == MISTAKE:
            return MISTAKE
        if attempt < plan.restarts:
            n = max(1, n // 2) if plan.shrink else n
            time.sleep(min(2.0**attempt, 30))
    say(plan, "gave up", f"after {plan.restarts} restarts")
    return 1


def say(plan: Plan, event: str, how: str, process: int | None = None, **facts: Any) -> None:
    """One line for the terminal, and one in events.jsonl."""
    now = datetime.datetime.now().astimezone()
    who = "" if process is None else f"process {process} "
    print(f"{now:%H:%M:%S} {who}{event} {how}", file=sys.stderr, flush=True)
    known = {"process": process, **facts}
    record = {"time": now.isoformat(), "event": event, "how": how, **{k: v for k, v in known.items() if v is not None}}
    with open(plan.folder / "events.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


class Group:
    """The processes of one attempt. A context manager: none of them outlives it."""

    def __init__(self, plan: Plan, n: int, claimed: bool):
        self.plan, self.beats = plan, tempfile.TemporaryDirectory(prefix="moe_jax_")
        self.logs = [plan.folder / f"{i}.log" for i in range(n)]
        self.shown = _size(self.logs[0])
        self.processes: list[subprocess.Popen] = []
        address = f"127.0.0.1:{free_port()}"
        try:
            for i in range(n):
                self.processes.append(self._start(i, n, address, claimed))
        except BaseException:
            self.kill()
            raise
        self.started = self.awake = self.moved = time.time()
        self.progress = self._progress()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    def _start(self, i: int, n: int, address: str, claimed: bool) -> subprocess.Popen:
        (heart := self._heart(i)).write_text(str(os.getpid()))
        os.utime(heart, (0, 0))
        flags = [f"--coordinator={address}", f"--processes={n}", f"--process={i}", f"--heartbeat={heart}"]
        flags += [f"--devices={self.plan.devices}"] * (self.plan.devices is not None)
        # the first attempt deletes an older run; no later one may delete this one
        command = [word for word in self.plan.command if not (claimed and word in OVERWRITE)]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_BIND_ADDRESS": address}
        with open(self.logs[i], "ab") as log:
            # its own session: Ctrl-C reaches the supervisor alone, and a kill reaches what the process has started
            return subprocess.Popen(
                [*command, *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def watch(self) -> Trouble | None:
        """Waits until all have finished (None) or something is wrong."""
        while True:
            self._show()
            codes = self._codes()
            if not any(code is None or code for code in codes):
                return None
            if trouble := self._dead(codes) or self._hung(codes):
                return trouble
            time.sleep(LOOK)

    def _codes(self) -> list[int | None]:
        return [process.poll() for process in self.processes]

    def _dead(self, codes: list[int | None]) -> Trouble | None:
        """The process that has failed; of several the one that is least likely to have failed because of another."""
        if not any(codes):
            return None
        codes = self._codes()  # the cause may lie before the failure that was seen, in a process asked before it
        _, i, code = min((_consequence(code), i, code) for i, code in enumerate(codes) if code)
        if code == MISTAKE:
            self._last_words(i)
        how = f"of {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return Trouble("died", how, i, code)

    def _last_words(self, i: int) -> None:
        """Lets process 0 say what the mistake was; another's last line where it does not."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.processes[0].wait(timeout=self.plan.timeout)
        if self.processes[0].poll() != MISTAKE:
            lines = self.logs[i].read_text(errors="replace").splitlines()
            print(*lines[-1:], file=sys.stderr, flush=True)

    def _hung(self, codes: list[int | None]) -> Trouble | None:
        """The process whose heart has stopped, or all of them where the log of the run does not grow."""
        now = time.time()
        if now - self.looked > self.plan.timeout / 2:  # the machine was asleep, or this process stopped
            self.awake = self.moved = now
        self.looked = now
        for i, code in enumerate(codes):
            beat = self._heart(i).stat().st_mtime
            limit = self.plan.timeout if beat else max(STARTING, self.plan.timeout)
            silent = now - max(beat or self.started, self.awake)
            if code is None and silent > limit:
                return Trouble("hung", f"without a sign of life for {silent:.0f} s", i)
        if (progress := self._progress()) != self.progress:
            self.progress, self.moved = progress, now
        if now - self.moved > self.plan.patience:
            return Trouble("hung", f"without progress for {now - self.moved:.0f} s")
        return None

    def _progress(self) -> tuple[int, int] | None:
        return _stamp(self.plan.workdir / "metrics.jsonl")

    def _heart(self, i: int) -> pathlib.Path:
        return pathlib.Path(self.beats.name) / f"{i}.heartbeat"

    def _show(self) -> None:
        """Copies what process 0 has printed to the terminal."""
        with open(self.logs[0], "rb") as log:
            log.seek(self.shown)
            text = log.read()
        self.shown += len(text)
        sys.stderr.write(text.decode(errors="replace"))
        sys.stderr.flush()

    def interrupt(self) -> None:
        """Has all save their step and end, and waits for it, at most the plan's patience."""
        print("finishing this step and saving it; a second signal leaves at once", file=sys.stderr, flush=True)
        for process in self.processes:
            process.send_signal(signal.SIGINT)
        end = time.monotonic() + self.plan.patience
        while None in self._codes() and time.monotonic() < end:
            self._show()
            time.sleep(LOOK)

    def kill(self) -> None:
        """SIGKILL for all and what they have started: jax catches anything milder, and stopped ones ignore it."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def __enter__(self) -> "Group":
        self.looked = time.time()
        return self

    def __exit__(self, *exception) -> None:
        self.kill()
        self._show()
        self.beats.cleanup()


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _consequence(code: int) -> int:
    """Orders exit codes by how likely it is that another process's end brought them about.

    A process that loses its peers ends with an exit code, or by jax's SIGABRT; with that of a mistake where another
    says that it was one.
    """
    return 2 if code == MISTAKE else int(code > 0 or code == -signal.SIGABRT)


def _stamp(path: pathlib.Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        return (path.stat().st_mtime_ns, path.stat().st_size)
    return None


def _size(path: pathlib.Path) -> int:
    return path.stat().st_size if path.is_file() else 0
