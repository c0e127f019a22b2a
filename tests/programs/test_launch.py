"""Several processes: they end together, and a supervisor brings them through kills and hangs without a seam."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from absl.testing import flagsaver

from experiments import cli, train
from experiments.launch import __main__ as launch
from experiments.launch import join
from experiments.launch.supervisor import Group, free_port
from moe_jax.config import Experiment
from moe_jax.lock import WorkdirLock
from moe_jax.reporting import metrics
from tests.laws.test_training_step import EXP

ROOT = pathlib.Path(__file__).parents[2]
LONG = 300  # seconds that nothing here takes, however slow the machine
WORKER = """
import os, pathlib, signal, subprocess, sys, time
from experiments.launch.pulse import beat

flags = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:] if "=" in word)
if "--print_config" in sys.argv:
    print(flags["config"])
    sys.exit()
workdir, i, n = pathlib.Path(flags["workdir"]), int(flags["process"]), int(flags["processes"])
beat(pathlib.Path(flags["heartbeat"]))
with open(workdir / f"{i}.tries", "a") as file:
    file.write(" ".join(sys.argv).replace("\\n", " ") + "\\n")
tries = len((workdir / f"{i}.tries").read_text().splitlines())
print(f"process {i} of {n}, try {tries}", file=sys.stderr, flush=True)
exec(flags.get("act", ""))
"""
TINY = """
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict()
    config.mesh = {{"data": 2, "expert": 4}}
    config.model = {{"D": 16, "N": 2, "attention": "MHA(2, 8)", "ffn": "MLP(F=16)"}}
    config.model["moe"] = {{"E": 8, "router": "TopK(K=2)", "experts": "MLP(F=16)", "S": 32}}
    config.data = {{"source": "Folder(path={text!r})", "L": 32, "B": 16}}
    config.run = {{"steps": 12, "log_every": 1, "eval_every": 12, "save_every": 4, "eval_sequences": 16}}
    return config
"""


@pytest.fixture
def worker(tmp_path) -> pathlib.Path:
    """A program that is quick to start, and does what --act says."""
    file = tmp_path / "worker.py"
    file.write_text(WORKER)
    return file


def start(program: object, workdir: pathlib.Path, *own: str, rest: tuple[str, ...] = (), **environment: str):
    """The supervisor, as a program of its own."""
    command = [sys.executable, "-m", "experiments.launch", f"--program={program}", *own, "--"]
    return subprocess.Popen(
        [*command, f"--workdir={workdir}", *rest],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(workdir.parent), **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def launched(worker, workdir, act, *own, rest=()) -> tuple[int, str, list[dict]]:
    """Exit code, standard error and events of workers that act so."""
    program = start(worker, workdir, "--timeout=3", *own, rest=(f"--act={act}", *rest))
    try:
        _, said = program.communicate(timeout=LONG)
    finally:
        program.kill()
    return program.returncode, said, events(workdir)


def events(workdir: pathlib.Path) -> list[dict]:
    with contextlib.suppress(FileNotFoundError):
        return [json.loads(line) for line in (workdir / "processes" / "events.jsonl").read_text().splitlines()]
    return []


def names(found: list[dict]) -> list[str]:
    return [event["event"] for event in found]


def wait(condition, seconds=LONG):
    """Waits until a condition returns something, and returns it."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return value


def alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        stat = pathlib.Path(f"/proc/{pid}/stat")
        return not stat.is_file() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
    return False


# ---- the supervisor, with workers that only act


def test_all_finish_and_one_is_heard(worker, tmp_path):
    code, said, found = launched(worker, tmp_path / "run", "", "--processes=3")
    assert code == 0
    assert names(found) == ["started", "finished"]
    assert "process 0 of 3, try 1" in said
    assert "process 1" not in said
    for i in range(3):
        assert (tmp_path / "run" / "processes" / f"{i}.log").read_text() == f"process {i} of 3, try 1\n"


def test_one_is_killed(worker, tmp_path):
    """All go, with what they have started, and come again."""
    child = "subprocess.Popen(['sleep', '60']).pid"
    act = (
        f"pathlib.Path(workdir, 'child').write_text(str({child})) if (i, tries) == (0, 1) else None\n"
        "while not pathlib.Path(workdir, 'child').exists(): time.sleep(0.01)\n"
        "os.kill(os.getpid(), signal.SIGKILL) if (i, tries) == (1, 1) else None\n"
        "time.sleep(60 if tries == 1 else 0)"
    )
    code, said, found = launched(worker, tmp_path / "run", act)
    assert code == 0
    assert names(found) == ["started", "died", "restarted", "finished"]
    assert (found[1]["process"], found[1]["how"]) == (1, "of SIGKILL")
    assert "process 1 died of SIGKILL" in said
    assert found[2]["processes"] == 2
    assert not any(alive(pid) for pid in found[0]["pids"])
    assert not alive(int((tmp_path / "run" / "child").read_text()))


def test_one_is_stopped(worker, tmp_path):
    act = "os.kill(os.getpid(), signal.SIGSTOP) if i == 1 and tries == 1 else time.sleep(60 if tries == 1 else 0)"
    code, _, found = launched(worker, tmp_path / "run", act)
    assert code == 0
    assert names(found) == ["started", "hung", "restarted", "finished"]
    assert found[1]["process"] == 1
    assert "without a sign of life" in found[1]["how"]


def test_all_wait_for_each_other(worker, tmp_path):
    """Hearts beat, but the log does not grow; as long as it grows, nothing is wrong."""
    act = (
        "for step in range(20 if i == 0 and tries == 1 else 0):\n"
        "    time.sleep(0.1); open(workdir / 'metrics.jsonl', 'a').write('.')\n"
        "time.sleep(60 if tries == 1 else 0)"
    )
    began = time.monotonic()
    code, _, found = launched(worker, tmp_path / "run", act, "--patience=1")
    assert code == 0
    assert names(found) == ["started", "hung", "restarted", "finished"]
    assert "without progress" in found[1]["how"]
    assert time.monotonic() - began > 3


@pytest.mark.parametrize(("who", "heard"), [("i == 0", 1), ("i == 1", 1), ("True", 1)])
def test_a_mistake_is_not_tried_again(worker, tmp_path, who, heard):
    """One line says what it was, whoever made it."""
    act = f"({who}) and (print('error: give more', file=sys.stderr), sys.exit(2)); time.sleep(60)"
    code, said, found = launched(worker, tmp_path / "run", act)
    assert code == 2
    assert names(found) == ["started", "died"]
    assert said.count("error: give more") == heard


def test_a_kill_is_no_mistake(worker, tmp_path):
    """The outcome of the killed process counts, not the others' errors after it."""
    act = (
        "while not pathlib.Path(workdir, 'go').exists(): time.sleep(0.01)\n"
        "tries == 1 and (os.kill(os.getpid(), signal.SIGKILL) if i == 1 else sys.exit(2))"
    )
    program = start(worker, tmp_path / "run", rest=(f"--act={act}",))
    pids = wait(lambda: events(tmp_path / "run"))[0]["pids"]
    program.send_signal(signal.SIGSTOP)
    os.waitpid(program.pid, os.WUNTRACED)  # it sees nothing until both are dead
    (tmp_path / "run" / "go").touch()
    wait(lambda: not any(alive(pid) for pid in pids))
    program.send_signal(signal.SIGCONT)
    program.communicate(timeout=LONG)
    assert names(events(tmp_path / "run")) == ["started", "died", "restarted", "finished"]


@pytest.mark.parametrize(
    ("looks", "blamed"),
    [
        ([(None, 2), (-9, 2)], 0),  # killed after it was asked, and the other has ended since because of that
        ([(1, -9)] * 2, 1),
        ([(-6, -9)] * 2, 1),  # jax aborts those that lose their coordinator
        ([(2, 1)] * 2, 1),
        ([(2, 75)] * 2, 1),
        ([(0, 2)] * 2, 1),
        ([(-11, -9)] * 2, 0),
    ],
)
def test_whose_end_it_was(monkeypatch, looks, blamed):
    """The process to blame, of several that ended between two looks, is one that did not end because of another."""
    group = object.__new__(Group)
    group.processes = [types.SimpleNamespace(poll=iter(codes).__next__) for codes in zip(*looks, strict=True)]
    monkeypatch.setattr(group, "_last_words", lambda i: None)
    trouble = group._dead(group._codes())
    assert (trouble.event, trouble.process, trouble.code) == ("died", blamed, looks[-1][blamed])


def test_enough_is_enough(worker, tmp_path):
    """As of a disk that is full: it is tried again, for there may be room by then, and not for ever."""
    code, said, found = launched(worker, tmp_path / "run", f"sys.exit({cli.TRY_AGAIN})", "--restarts=1")
    assert code == 1
    assert names(found) == ["started", "died", "restarted", "died", "gave up"]
    assert "process 0 died with exit code 75" in said


def test_a_shrunk_job_goes_on_with_fewer_processes(worker, tmp_path):
    mesh = '--config={"mesh": {"data": -1, "expert": 2}}'
    code, _, found = launched(worker, tmp_path / "run", "sys.exit(n > 1)", "--processes=3", "--shrink", rest=(mesh,))
    assert code == 0
    assert [event["processes"] for event in found if "processes" in event] == [3, 1]
    fixed = '--config={"mesh": {"data": 4, "expert": 2}}'
    code, said, found = launched(worker, tmp_path / "other", "", "--shrink", rest=(fixed,))
    assert code == 2
    assert said.startswith(
        "error: --shrink needs a mesh that fits fewer devices, and config.mesh has data=4, expert=2;"
    )
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("sent", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_it_takes_all_with_it(worker, tmp_path, sent, expected):
    """After each has saved its step; then it says from where the run goes on."""
    run = tmp_path / "run"
    act = (
        "try:\n  (workdir / f'{i}.ready').touch(); time.sleep(60)\n"
        "except KeyboardInterrupt:\n  time.sleep(0.5)\n"
        "  (workdir / 'checkpoints' / '7').mkdir(parents=True, exist_ok=True)\n"
        "  (workdir / 'checkpoints' / '7' / 'manifest.json').touch(); (workdir / f'{i}.saved').touch(); sys.exit(130)"
    )
    program = start(worker, run, rest=(f"--act={act}",))
    pids = wait(lambda: events(run))[0]["pids"]
    wait(lambda: len(list(run.glob("*.ready"))) == 2)
    program.send_signal(sent)
    _, said = program.communicate(timeout=LONG)
    assert program.returncode == expected
    assert not any(alive(pid) for pid in pids)
    assert {path.name for path in run.glob("*.saved")} == {"0.saved", "1.saved"}
    assert events(run)[-1]["event"] == "interrupted"
    assert "interrupted without --overwrite, the same command goes on from step 7" in said


def test_a_second_signal_waits_for_nobody(worker, tmp_path):
    act = "signal.signal(signal.SIGINT, signal.SIG_IGN); (workdir / f'{i}.ready').touch(); time.sleep(60)"
    program = start(worker, tmp_path / "run", rest=(f"--act={act}",))
    wait(lambda: len(list((tmp_path / "run").glob("*.ready"))) == 2)
    program.send_signal(signal.SIGINT)
    time.sleep(0.5)
    program.send_signal(signal.SIGINT)
    program.communicate(timeout=30)
    assert program.returncode == 130


def test_a_workdir_in_use_is_left_alone(tmp_path):
    """The other supervisor's logs too, with --overwrite."""
    run = tmp_path / "run"
    (run / "processes").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    with WorkdirLock(run), pytest.raises(ValueError, match=f"{run} is in use by process {os.getpid()} on"):
        launch.planned(launch.arguments([]), [f"--workdir={run}", "--overwrite"])
    assert (run / "processes").is_dir()


def test_none_outlives_it(worker, tmp_path):
    program = start(worker, tmp_path / "run", rest=("--act=time.sleep(60)",))
    pids = wait(lambda: events(tmp_path / "run"))[0]["pids"]
    wait(lambda: len(list((tmp_path / "run").glob("*.tries"))) == 2)
    time.sleep(0.3)
    assert all(alive(pid) for pid in pids)
    program.kill()
    program.communicate()
    wait(lambda: not any(alive(pid) for pid in pids), seconds=20)


def test_overwriting_is_done_once(worker, tmp_path):
    """Asked for again until the run has its folder, and not after that."""
    run = tmp_path / "run"
    (run / "processes").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    (run / "processes" / "old.log").write_text("")
    act = "tries == 2 and (workdir / 'config.json').write_text('{1: 2}')\nsys.exit(3 if tries < 3 else 0)"
    code, _, _ = launched(worker, run, act, "--processes=1", rest=("--overwrite",))
    assert code == 0
    words = (run / "0.tries").read_text().splitlines()
    tries = [word for word in (" ".join(words)).split() if word in ("--overwrite", "--process=0")]
    assert tries == ["--overwrite", "--process=0", "--overwrite", "--process=0", "--process=0"]
    assert not (run / "processes" / "old.log").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "No place for the run was given"),
        (["--workdir="], "No place for the run was given"),
        (["--workdir=gs://bucket/run"], "is a URL; mount the bucket"),
        (["--workdir", "x", "--process=1"], "--process is given to each process by the supervisor"),
        (["--workdir={tmp}"], "holds files that are not a run's (thesis.tex)"),
        (["--workdir={tmp}/thesis.tex"], "is a file; give a folder"),
    ],
)
def test_a_wrong_command_line(tmp_path, argv, words):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=words.replace("(", r"\(").replace(")", r"\)")):
        launch.planned(launch.arguments([]), [word.format(tmp=tmp_path) for word in argv])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_too_little_time():
    with pytest.raises(ValueError, match="--timeout=1 is too short"):
        launch.planned(launch.arguments(["--timeout=1"]), ["--workdir=x"])


# ---- the flags of a process


@pytest.fixture
def flag():
    cli.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver():
        yield lambda **values: [setattr(cli.FLAGS, name, value) for name, value in values.items()]


@pytest.fixture
def simulated(monkeypatch):
    """Number of devices that were asked for."""
    asked = []
    monkeypatch.setattr(cli.jax.config, "update", lambda _, n: asked.append(n))
    return asked


def test_all_three_or_none(flag):
    assert cli.place() == join.Place(0, 1)
    flag(processes=2, process=1)
    with pytest.raises(ValueError, match=r"--coordinator must be given too, or none"):
        cli.place()
    flag(coordinator="localhost:1234")
    assert cli.place() == join.Place(1, 2)
    flag(process=2)
    with pytest.raises(ValueError, match=r"--process=2 of --processes=2; number them from 0"):
        cli.place()
    with pytest.raises(ValueError, match=r"--coordinator=localhost is no address"):
        join.connect("localhost", join.Place(0, 2), 10)


def test_alone_nothing_is_connected(monkeypatch):
    monkeypatch.setattr(join.jax.distributed, "initialize", lambda **_: pytest.fail("connected"))
    cli.connect()


def test_each_simulates_its_share(flag, simulated):
    exp = Experiment(model=EXP.model, data=EXP.data, mesh=(("data", 2), ("expert", 2)))
    flag(processes=4)
    cli.simulate(exp)
    flag(devices=3)
    cli.simulate(exp)
    assert simulated == [1, 3]
    flag(processes=3, devices=None)
    with pytest.raises(ValueError, match=r"takes 4 devices, which --processes=3 cannot share evenly"):
        cli.simulate(exp)


@pytest.fixture
def slice_of(monkeypatch):
    """An environment like that of a Cloud TPU host in a cluster, with the place that it was connected as."""
    join.tpu_place.cache_clear()
    monkeypatch.setattr(join.jax, "config", types.SimpleNamespace(jax_platforms="tpu,cpu"))
    monkeypatch.setattr(join.cloud_tpu_init, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)

    def environment(**values: str) -> list[dict]:
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        connected: list[dict] = []
        monkeypatch.setattr(join.jax.distributed, "initialize", lambda **how: connected.append(how))
        monkeypatch.setattr(join, "_watch", lambda: None)
        monkeypatch.setattr(join, "MET", join.threading.Event())
        cli.connect()
        return connected

    yield environment
    join.tpu_place.cache_clear()


def test_a_slice_with_several_hosts_connects_by_itself(slice_of):
    several = slice_of(TPU_WORKER_HOSTNAMES="a,b", TPU_WORKER_ID="1", MEGASCALE_NUM_SLICES="3", MEGASCALE_SLICE_ID="2")
    assert several == [{"heartbeat_timeout_seconds": 100}]
    assert cli.place() == join.Place(5, 6)


def test_a_slice_with_one_host_does_not(slice_of):
    assert slice_of(TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0", MEGASCALE_NUM_SLICES="1") == []


# ---- real processes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[str, ...]:
    """The flags of a small experiment on eight devices."""
    root = tmp_path_factory.mktemp("tiny")
    (root / "text").mkdir()
    for i in range(60):  # always the same: of other text, a token may lie between two experts
        (root / "text" / f"{i}.txt").write_text(" ".join(str((i * 7 + j) % 50) for j in range(60)))
    (root / "tiny.py").write_text(TINY.format(text=str(root / "text")))
    return f"--config={root / 'tiny.py'}", f"--data_dir={root / 'data'}"


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (
            "--data_dir=/dev/null/data",
            "Prepared data cannot be kept in /dev/null/data (a file is in its place); choose",
        ),
        ("--config.seed=1", "The config of process 1 is not that of process 0"),
    ],
)
def test_a_mistake_of_one_ends_both_in_one_line(tiny, tmp_path, bad, words):
    """Only process 1 fails: process 0 says so, and both end."""
    command = [sys.executable, "-m", "experiments.train", *tiny, f"--workdir={tmp_path / 'run'}", "--processes=2"]
    command += [f"--coordinator=127.0.0.1:{free_port()}"]
    both = [
        subprocess.Popen([*command, f"--process={i}", *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for i, flags in enumerate([[], [bad]])
    ]
    said = [process.communicate(timeout=LONG)[1] for process in both]
    assert [process.returncode for process in both] == [2, 2]
    (line,) = [line for text in said for line in text.splitlines() if line.startswith("error")]
    assert line.startswith(f"error: process 1: {words}")
    assert line in said[0]


@pytest.mark.law(9)
def test_two_processes_train_as_one_through_a_kill_and_a_stop(tiny, tmp_path, monkeypatch):
    """The losses are those of one process with all devices, every step is there once."""
    one, run = tmp_path / "one", tmp_path / "run"
    with flagsaver.flagsaver():
        monkeypatch.setattr(sys, "argv", ["train", *tiny, f"--workdir={one}"])
        cli.run(train.main)
    environment = {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),  # a restart need not compile again
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    program = start("experiments.train", run, "--timeout=6", rest=tiny, **environment)
    interrupt(run, attempt=1, after=4, process=1, by=signal.SIGKILL)
    interrupt(run, attempt=2, after=8, process=0, by=signal.SIGSTOP)
    said = program.communicate(timeout=LONG)[1]
    assert program.returncode == 0, said
    found = events(run)
    assert names(found) == ["started", "died", "restarted", "hung", "restarted", "finished"], said
    assert (found[1]["process"], found[1]["how"], found[3]["process"]) == (1, "of SIGKILL", 0)
    assert found[2]["step"] >= 4
    assert found[4]["step"] >= 8

    expected, records = metrics.read(one), metrics.read(run)
    for kind, key in (("train", "loss"), ("train", "grad_norm"), ("eval", "loss")):
        steps, values = metrics.curve(records, key, kind)
        assert list(steps) == list(range(1, 13) if kind == "train" else [12])
        np.testing.assert_allclose(values, metrics.curve(expected, key, kind)[1], rtol=1e-5)
    assert (run / "report.html").is_file()


def interrupt(run: pathlib.Path, attempt: int, after: int, process: int, by: signal.Signals) -> None:
    """Sends a signal to a process in the middle of its steps, once the run has left that checkpoint behind."""

    def midway() -> bool:
        with contextlib.suppress(ValueError):
            records = metrics.read(run)
            begun = [record["kind"] for record in records].count("start") == attempt
            return begun and records[-1]["step"] > after and (run / "checkpoints" / str(after)).is_dir()
        return False

    wait(midway)
    pids = [event["pids"] for event in events(run) if "pids" in event]
    os.kill(pids[-1][process], by)
