"""A signal ends a run after its step, which is saved; a second one at once; and what is said of it is true."""

import contextlib
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from experiments import train
from experiments.launch import interruption, join
from experiments.launch.interruption import Interrupted, Interruption
from experiments.sweep import __main__ as sweep
from moe_jax.checkpoint import Checkpoints
from moe_jax.reporting.metrics import read
from tests import programs


def signalled(number: int, when) -> threading.Thread:
    """A thread that signals this process once a condition holds."""

    def wait() -> None:
        end = time.monotonic() + 200
        while not when() and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def endless(exp, workdir, data_dir, init_from, stop, lock) -> Iterator[dict]:
    """`moe_jax.train.train` for a run without an end, whose steps take no time; it saves where it is stopped."""
    lock.check()
    yield {"kind": "start", "step": 0, "seconds": 0.0, "data": "d" * 64}
    for step in itertools.count(1):
        time.sleep(0.01)
        if stop(step):
            with Checkpoints(workdir / "checkpoints") as checkpoints:
                checkpoints.save(step, {"step": np.array([step])}, {})
            yield {"kind": "interrupted", "step": step, "seconds": 1.0}
            return
        yield {"kind": "train", "step": step, "seconds": 1.0, "loss": 1.0}


def test_a_run_that_is_terminated_says_from_where_it_goes_on(tmp_path, monkeypatch):
    """SIGTERM: exit code 143; the step that is named is on disk, and is the last one of the log."""
    run = tmp_path / "run"

    def midway() -> bool:
        with contextlib.suppress(ValueError, IndexError):
            return read(run)[-1]["step"] >= 3
        return False

    monkeypatch.setattr(train, "train", endless)
    before = [signal.getsignal(number) for number in interruption.SIGNALS]
    thread = signalled(signal.SIGTERM, midway)
    outcome = programs.call(train, "--config=configs/dense_nano.py", f"--workdir={run}")
    thread.join()
    assert outcome.code == 128 + signal.SIGTERM
    assert [signal.getsignal(number) for number in interruption.SIGNALS] == before
    step = read(run)[-1]["step"]
    assert [record["kind"] for record in read(run)[-2:]] == ["train", "interrupted"]
    lines = outcome.err.strip().splitlines()
    assert lines[-1] == f"SIGTERM at step {step} of 1200, which is saved; the same command goes on from step {step}"
    assert "SIGTERM: finishing this step and saving it; a second signal leaves at once" in lines
    assert Checkpoints(run / "checkpoints").steps() == [step]
    assert not (run / "workdir.lock").exists()
    assert train.goes_on(run, True) == f"without --overwrite, the same command goes on from step {step}"


def test_before_the_first_step_it_ends_at_once(tmp_path):
    assert train.goes_on(tmp_path, False) == "no step has been saved: it begins anew"
    with (
        pytest.raises(Interrupted, match=r"SIGINT before the first step; nothing is lost") as caught,
        Interruption(lambda: "nothing is lost"),
    ):
        signal.raise_signal(signal.SIGINT)
    assert (caught.value.code, caught.value.together) == (130, False)


def test_a_second_signal_leaves_at_once(monkeypatch, capsys):
    """In a computation that hears nothing too: a thread of its own ends the process."""
    left = threading.Event()
    codes = []
    monkeypatch.setattr(interruption.os, "_exit", lambda code: (codes.append(code), left.set()))
    with Interruption(lambda: "the same command goes on from step 7") as stop:
        assert not stop(1)
        os.kill(os.getpid(), signal.SIGINT)
        while not stop(2):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        assert left.wait(60)
    assert codes == [143]
    assert "SIGTERM again, leaving at once; the same command goes on from step 7" in capsys.readouterr().err


def test_without_the_main_thread_nothing_is_heard():
    heard = []

    def body() -> None:
        with Interruption(lambda: "") as stop:
            heard.append(stop(1))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert heard == [False]


@pytest.mark.parametrize("signalled_ones", [(0,), (1,), (0, 1)])
def test_processes_stop_at_the_same_step(signalled_ones, monkeypatch):
    """Whoever is signalled, whenever, and whichever of them is ahead: by one step at most, as they wait for each other.

    A process that asks after step n has begun n and ended n - 1, which the others had to begin.
    """
    monkeypatch.setattr(join, "connected", lambda: True)
    for order in itertools.product((0, 1), repeat=10):
        values: dict[str, str] = {}
        monkeypatch.setattr(join, "propose", values.setdefault)
        monkeypatch.setattr(join, "proposed", values.get)
        processes = [Interruption(str), Interruption(str)]
        begun, stopped = [0, 0], [None, None]
        turns = itertools.chain(order, itertools.cycle((0, 1)))
        for turn, i in enumerate(turns):
            if None not in stopped:
                break
            assert turn < 60, order
            if stopped[i] is not None or begun[i] > begun[1 - i]:
                continue  # it waits for the other
            if turn >= 4 and i in signalled_ones:
                processes[i].heard = signal.SIGTERM
            begun[i] += 1
            if processes[i](begun[i]):
                stopped[i] = begun[i]
        assert stopped[0] == stopped[1], order


def test_an_interruption_before_anything_promises_nothing(monkeypatch):
    def interrupted(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "on_devices", interrupted)
    outcome = programs.call(train, "--config=configs/glam_nano.py", "--workdir=unused")
    assert (outcome.code, outcome.err) == (130, "\nInterrupted.\n")


def test_a_sweep_lets_its_run_save(tmp_path):
    """The signal is passed on, once, and the sweep waits for the run that it has started."""
    child = (
        "import pathlib, sys, time\n"
        "try:\n  pathlib.Path(sys.argv[1], 'ready').touch(); time.sleep(60)\n"
        "except KeyboardInterrupt:\n  time.sleep(0.3); pathlib.Path(sys.argv[1], 'saved').touch()\n"
    )
    thread = signalled(signal.SIGINT, (tmp_path / "ready").exists)
    with pytest.raises(KeyboardInterrupt):
        sweep.train([sys.executable, "-c", child, str(tmp_path)])
    thread.join()
    assert (tmp_path / "saved").exists()
