"""One process at a time trains in a workdir: a lock that outlives no owner and needs no clock of another machine."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from moe_jax import lock
from moe_jax.lock import FILE, Owner, WorkdirLock, check_free

# A process that holds the lock without importing jax, until it is killed.
HOLD = f"""
import importlib.util, pathlib, sys, time
spec = importlib.util.spec_from_file_location("lock", {lock.__file__!r})
sys.modules["lock"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
with module.WorkdirLock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(300)
"""


@pytest.fixture
def other(tmp_path):
    """A process of its own that holds the lock on tmp_path / "run"."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def foreign(workdir: pathlib.Path, **changes) -> Owner:
    """Locks a workdir as a process of another machine has it."""
    owner = dataclasses.replace(lock._this_process(), host="tpu-7", **changes)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / FILE).write_text(json.dumps(dataclasses.asdict(owner)))
    return owner


def test_a_lock_leaves_nothing_behind(tmp_path):
    run = tmp_path / "run"
    with WorkdirLock(run) as held:
        held.check()
        assert [path.name for path in run.iterdir()] == [FILE]
    assert not run.exists(), "it was made for the lock"
    run.mkdir()
    with WorkdirLock(run):
        (run / "config.json").touch()
    assert [path.name for path in run.iterdir()] == ["config.json"]


def test_a_second_run_is_refused_while_the_first_one_lives(tmp_path, other):
    """In another process, and in this one; stopped is not gone."""
    run = tmp_path / "run"
    words = rf"{run} is in use by process {other.pid} on .*, since 20.*; wait .* --workdir \(.*delete {run / FILE}\)"
    os.kill(other.pid, signal.SIGSTOP)
    for use in (lambda: WorkdirLock(run).__enter__(), lambda: check_free(run)):
        with pytest.raises(ValueError, match=words):
            use()
    with WorkdirLock(tmp_path / "own"), pytest.raises(ValueError, match=f"in use by process {os.getpid()} on"):
        WorkdirLock(tmp_path / "own").__enter__()


def test_a_killed_owner_is_succeeded_at_once(tmp_path, other):
    """By SIGKILL, seen as soon as it is gone, even before its parent has asked for it."""
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # what remains of it is still there
    began = time.monotonic()
    check_free(tmp_path / "run")
    with WorkdirLock(tmp_path / "run") as held:
        held.check()
    assert time.monotonic() - began < 5


def test_another_process_of_the_same_number_is_not_the_owner(tmp_path):
    """After a reboot, or when process ids have come round."""
    mine = lock._this_process()
    for changes in ({"began": "1"}, {"pid": 2**22 + 1}):
        (tmp_path / FILE).write_text(json.dumps(dataclasses.asdict(dataclasses.replace(mine, **changes))))
        with WorkdirLock(tmp_path):
            pass


@pytest.mark.parametrize("changes", [{}, {"host": "this one", "machine": "another boot"}, None])
def test_an_owner_that_cannot_be_seen_is_watched(tmp_path, changes, caplog):
    """On another machine, or a lock that is not whole: taken over after silence, refused at a sign of life."""
    run = tmp_path / "run"
    foreign(run) if changes is not None else (run.mkdir(), (run / FILE).write_text('{"host": "tpu'))
    check_free(run)  # waits for nothing
    with WorkdirLock(run, silence=0.5) as held:
        held.check()
    assert "waiting up to 0.5 s" in caplog.text

    owner = foreign(run)
    touching = threading.Timer(0.3, os.utime, [run / FILE])
    touching.start()
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"in use by process .* on tpu-7"):
        WorkdirLock(run, silence=60.0).__enter__()
    assert time.monotonic() - began < 30
    assert json.loads((run / FILE).read_text()) == dataclasses.asdict(owner), "it is still the other's"


def test_an_owner_shows_that_it_lives(tmp_path):
    with WorkdirLock(tmp_path, beat=0.05):
        os.utime(tmp_path / FILE, (0, 0))
        end = time.monotonic() + 20
        while (tmp_path / FILE).stat().st_mtime == 0 and time.monotonic() < end:
            time.sleep(0.02)
        assert (tmp_path / FILE).stat().st_mtime > 0


def test_an_owner_that_lost_its_lock_writes_nothing_more(tmp_path):
    """Stopped for too long, it leaves the successor's lock alone. One that was deleted by hand is made again."""
    with WorkdirLock(tmp_path) as held:
        (tmp_path / FILE).unlink()
        held.check()
        held.check()
        successor = foreign(tmp_path)
        with pytest.raises(ValueError, match=f"taken over by process {os.getpid()} on tpu-7"):
            held.check()
    assert json.loads((tmp_path / FILE).read_text()) == dataclasses.asdict(successor)


def test_a_lock_of_the_last_moment_is_put_back(tmp_path):
    """Two processes find the same stale lock; the slower one must not remove the lock of the faster one."""
    slow = WorkdirLock(tmp_path)
    with WorkdirLock(tmp_path) as held:
        stale = b"what the slow one has read"
        slow._take_away(stale)
        held.check()
        read = pathlib.Path.read_bytes
        with pytest.MonkeyPatch.context() as patch:  # as if it had read it just before
            patch.setattr(pathlib.Path, "read_bytes", lambda path: stale if path.name == FILE else read(path))
            slow._take_away(stale)
        held.check()
        assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_of_many_one_gets_it(tmp_path):
    """Eight threads at a stale lock: never two owners at a time."""
    foreign(tmp_path)
    holders, worst, refused = [], [0], []

    def enter():
        try:
            with WorkdirLock(tmp_path, silence=0.3) as held:
                holders.append(1)
                worst[0] = max(worst[0], len(holders))
                time.sleep(0.2)
                held.check()
                holders.pop()
        except ValueError:
            refused.append(1)

    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worst == [1]
    assert len(refused) < 8
