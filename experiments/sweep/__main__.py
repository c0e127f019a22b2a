r"""Trains one experiment with all combinations of some values of its config, and compares the runs.

    python -m experiments.sweep --config=configs/glam_nano.py --workdir=runs/sweep \
        --grid optim.schedule.peak=0.004,0.008 --grid model.moe.router="Switch();TopK(K=2)" --seeds=3
    python -m experiments.sweep --config=configs/glam_nano.py --workdir=runs/sweep --grid data.B=32,64 --dry_run

--grid PATH=VALUE,VALUE takes the paths and values of --config.PATH=VALUE. Values are separated by ";", or by "," where
there is no ";"; neither separates within brackets or quotes, so that "TopK(K=2, normalize=False),Switch()" are two.
--config.PATH=VALUE holds for all runs.

Every combination is built before the first is trained. The runs are trained one after another by experiments.train, in
a process each, in a folder of the workdir that is named by what differs: peak=0.004,router=Switch,seed=0. The same
command goes on where it was interrupted; a grid with more values adds runs. A run that fails is noted, the others go
on, and the exit code is 1. In the workdir afterwards: comparison.html and comparison.json, see experiments.compare.
"""

import contextlib
import dataclasses
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from absl import flags

from experiments import cli
from experiments.compare.__main__ import compare
from experiments.sweep.grid import Point, points
from moe_jax.checkpoint import check_path
from moe_jax.config import Experiment
from moe_jax.continuation import ELSEWHERE, check_config
from moe_jax.reporting.metrics import FILE, duration, last, read
from moe_jax.workdir import CONFIG, confirmed_config, confirmed_experiment

cli.define_config()
FLAGS = flags.FLAGS
WORKDIR = cli.workdir()
DATA_DIR = cli.data_dir()
DEVICES = cli.devices()
GRID = flags.DEFINE_multi_string("grid", [], "PATH=VALUE,VALUE or PATH=VALUE;VALUE, once for each path.")
SEEDS = cli.flag(flags.DEFINE_integer, "seeds", 1, "How many seeds.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the runs and their commands, and stop.")


@dataclasses.dataclass(frozen=True)
class Job:
    """A run of the sweep and its folder. step: its last log record's, None where there is none."""

    point: Point
    folder: pathlib.Path
    command: tuple[str, ...]
    step: int | None
    finished: bool

    @property
    def state(self) -> str:
        return "finished" if self.finished else "new" if self.step is None else f"interrupted at step {self.step:,}"


def main() -> None:
    if not FLAGS["config"].value:
        raise ValueError("No experiment was given; say --config=configs/glam_nano.py, for instance.")
    if not WORKDIR.value:
        raise ValueError("No place for the runs was given; say --workdir=runs/sweep, for instance.")
    if SEEDS.value < 1:
        raise ValueError(f"--seeds={SEEDS.value} must be at least 1.")
    if not GRID.value and SEEDS.value == 1:
        raise ValueError("There is one run only; say --grid optim.clip=0.5,1.0, for instance, or --seeds=3.")
    workdir = cli.folder("workdir", WORKDIR.value)
    check_path(workdir)
    if (workdir / "config.json").is_file():
        raise ValueError(f"{workdir} holds a run; choose another --workdir for the runs of a sweep.")
    common = cli.split(sys.argv)[1]
    made = points(cli.load(FLAGS["config"].value), common, GRID.value, SEEDS.value)
    there = runs_in(workdir)
    jobs = [job(point, there.get(point.exp, workdir / point.name), common) for point in made]
    if DRY_RUN.value:
        for i, one in enumerate(jobs, 1):
            print(f"# {i} of {len(jobs)}: {one.point.name}: {one.state}\n{shlex.join(one.command)}")
        return
    workdir.mkdir(parents=True, exist_ok=True)
    failures = run(jobs)
    notes = [f"{name}: failed, {why}" for name, why in failures.items()]
    if logged := [one.folder for one in jobs if (one.folder / FILE).is_file()]:
        compare(logged, notes, workdir / "comparison.html", workdir / "comparison.json")
    else:
        say("\n".join(notes))
    say(f"{len(jobs) - len(failures)} of {len(jobs)} runs have finished")
    sys.exit(1 if failures else 0)


def runs_in(workdir: pathlib.Path) -> dict[Experiment, pathlib.Path]:
    """The runs in a workdir: one of another grid is not trained again under another name."""
    found = {}
    for saved in sorted(workdir.glob("*/config.json")):
        with contextlib.suppress(ValueError):
            found[confirmed_experiment(saved.parent)] = saved.parent
    return found


def job(point: Point, folder: pathlib.Path, common: Sequence[str]) -> Job:
    """Plans a run in its folder; ValueError where that holds another one."""
    data = [f"--data_dir={DATA_DIR.value}"] if DATA_DIR.value else []
    devices = [f"--devices={DEVICES.value}"] if DEVICES.value else []
    own = [f"--config={FLAGS['config'].value}", *common, *point.overrides, f"--workdir={folder}", *data, *devices]
    command = (sys.executable, "-m", "experiments.train", *own)
    if (folder / CONFIG).is_file():
        check_config(confirmed_config(folder), point.exp, folder, ELSEWHERE)
    records = read(folder) if (folder / FILE).is_file() else []
    step = max((record["step"] for record in records), default=None)
    finished = bool(last(records, "end")) and step is not None and step >= point.exp.run.steps
    return Job(point, folder, command, step, finished)


def run(jobs: Sequence[Job]) -> dict[str, str]:
    """Trains what is not finished, one after another; returns why which of them failed."""
    failures, took = dict[str, str](), list[float]()
    left = sum(not one.finished for one in jobs)
    for i, one in enumerate(jobs, 1):
        place = f"[{i}/{len(jobs)}] {one.point.name}"
        if one.finished:
            say(f"{place}: finished before")
            continue
        say(f"{place}: {'training' if one.step is None else 'going on'}")
        began = time.monotonic()
        if why := train(one.command):
            failures[one.point.name] = why
        took.append(time.monotonic() - began)
        left -= 1
        time_left = f"; {duration(left * sum(took) / len(took))} left" if left else ""
        say(f"{place}: {'failed, ' + why if why else outcome(one)} after {duration(took[-1])}{time_left}")
    return failures


def outcome(one: Job) -> str:
    loss = last(read(one.folder), "eval").get("loss")
    return "finished" if loss is None else f"held-out loss {loss:.4f}"


def train(command: Sequence[str]) -> str | None:
    """Runs a training to its end and passes on what it prints; returns why it failed, None if it did not."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches the sweep alone, which passes it on once
    ) as process:
        try:
            line = passed_on(process)
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)  # it saves its step
            passed_on(process)
            raise
        finally:
            process.kill()  # where it still runs; what it has saved is whole
    if process.returncode == 0:
        return None
    if process.returncode < 0:
        return f"killed by signal {-process.returncode}"
    return line.removeprefix("error: ") or f"exit code {process.returncode}"


def passed_on(process: subprocess.Popen) -> str:
    """Prints what a process prints, until it ends; returns the last line."""
    line = ""
    assert process.stdout is not None
    for printed in process.stdout:
        if printed.strip():
            line = printed.strip()
            print(f"  {printed.rstrip()}", file=sys.stderr, flush=True)
    process.wait()
    return line


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
