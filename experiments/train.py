"""Trains one experiment, and continues it where it was interrupted.

    python -m experiments.train --config=configs/glam_nano.py --workdir=runs/glam_nano
    python -m experiments.train --config=configs/glam_nano.py --config.model.moe.E=32 --print_config

--init_from=RUN or RUN@STEP begins a new run with the parameters of another one's checkpoint, the newest or that of a
step: all that have the same place and shape in the model, on any mesh. Optimizer and routers begin anew. Which
parameters were taken is said, and recorded in the first record of the log and in the checkpoints; to continue the run,
the other one is not needed any more.

In the workdir: config.json, metrics.jsonl, tensorboard/, checkpoints/, report.html. Ctrl-C and SIGTERM end it after the
step and its checkpoint; a second one ends it at once. For several processes see experiments/launch.
"""

import contextlib
import dataclasses
import fnmatch
import json
import pathlib
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import rich.console
from absl import flags

from experiments import cli
from experiments.launch import join
from experiments.launch.interruption import Interrupted, Interruption
from moe_jax import transfer
from moe_jax.checkpoint import Checkpoints, check_path
from moe_jax.config import Experiment
from moe_jax.continuation import Change, check_config
from moe_jax.core.shard import make_mesh
from moe_jax.costs import flops, parameters
from moe_jax.costs.fit import check_fits, device_memory
from moe_jax.costs.headline import headline, mesh_words
from moe_jax.data.identity import TOKENIZERS, kept_file
from moe_jax.files import unfinished_of, write_file
from moe_jax.lock import FILE as LOCK
from moe_jax.lock import WorkdirLock
from moe_jax.reporting.metrics import FILE, KEPT, Logger, read, summary_table
from moe_jax.reporting.report import write_report
from moe_jax.room import room_told
from moe_jax.train import TrainingDiverged, prepare_data, train
from moe_jax.workdir import CONFIG, checked_config

cli.define_config()
cli.define_processes()
WORKDIR = cli.workdir()
DATA_DIR = cli.data_dir()
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Delete the run in workdir and begin anew.")
FORCE = flags.DEFINE_bool("force", False, "Try a model that cannot fit into the devices' memory, by arithmetic.")
PRINT_CONFIG = flags.DEFINE_bool("print_config", False, "Print the resolved config as JSON and stop.")
COMPARE = cli.compare()
INIT_FROM = flags.DEFINE_string("init_from", None, "RUN or RUN@STEP whose parameters a new run begins with.")

BEGUN = (FILE, "checkpoints")  # what a run has once it has begun
FOLDERS, SINGLE = ("checkpoints", "tensorboard"), (FILE, "report.html", LOCK)  # SINGLE: files
PROCESSES = "processes"  # what the processes under a supervisor print; it may be there before the run
TOKENIZER_FILES = [kept_file(pathlib.Path(), name).name for name in TOKENIZERS]
FILES = (*BEGUN, KEPT, "tensorboard", "report.html", PROCESSES, *TOKENIZER_FILES, CONFIG)  # or patterns of their names


def main() -> None:
    if not PRINT_CONFIG.value:
        cli.connect()
    exp = cli.experiment(any_size=True)
    if PRINT_CONFIG.value:
        print(exp.to_json())
        return
    if not WORKDIR.value:
        raise ValueError("No place for the run was given; say --workdir=runs/my_run, for instance.")
    workdir = cli.folder("workdir", WORKDIR.value)
    data_dir = cli.folder("data_dir", DATA_DIR.value) if DATA_DIR.value else None
    others = compared(COMPARE.value)
    exp = on_devices(exp)
    if not FORCE.value:
        check_fits(exp, dict(exp.mesh), device_memory())
    source = cli.checkpoint("init_from", INIT_FROM.value) if INIT_FROM.value else None
    run(exp, workdir, data_dir, others, OVERWRITE.value, source)


def on_devices(exp: Experiment) -> Experiment:
    """The experiment with its mesh as it is on the devices there are; ValueError if it does not fit them."""
    cli.simulate(exp)
    return dataclasses.replace(exp, mesh=tuple(make_mesh(**dict(exp.mesh)).shape.items()))


def run(
    exp: Experiment,
    workdir: pathlib.Path,
    data_dir: pathlib.Path | None = None,
    others: Sequence[str] = (),
    overwrite: bool = False,
    init_from: transfer.RunCheckpoint | None = None,
) -> None:
    """Trains, logging into the workdir, and ends with a table and a report; goes on with what is there.

    TrainingDiverged of `train`, after the report; Interrupted by a signal, after the step and its checkpoint.
    ValueError where another process trains there.
    """
    if init_from is not None:
        check_source(exp, workdir, overwrite, init_from)
    join.agree("config", exp.to_json())
    again = partial(goes_on, workdir, overwrite)
    room = room_told(workdir / "checkpoints")
    with room, held(workdir, exp, overwrite) as lock, Interruption(again) as interruption:
        before = claim(workdir, exp, overwrite) if lock else None
        if lock and jax.process_count() > 1:  # the others find it made, where they see the same disk
            prepare_data(exp, workdir, data_dir)
        join.meet("claimed")
        say(describe(exp))
        # closed here: of an error in between, a save under way has its end, and its error, before this one is told
        with contextlib.closing(train(exp, workdir, data_dir, init_from, interruption, lock)) as records:
            try:
                first = next(records)
            except ValueError:
                if before is not None:  # the run that is there is another
                    write_file(workdir / CONFIG, before)
                raise
            join.agree("data", json.dumps([first.get(name) for name in ("data", "held_out", *TOKENIZERS)]))
            for line in beginning(first, exp.run.steps):
                say(line)
            last, diverged = logged(records, first, workdir, exp.run.steps)
    if last["kind"] == "interrupted":
        number = interruption.heard or signal.SIGTERM  # which another process has got
        where = f"{signal.Signals(number).name} at step {last['step']} of {exp.run.steps}"
        raise Interrupted(number, f"{where}, which is saved; {again()}", together=True)
    if jax.process_index() == 0:
        rich.console.Console(stderr=True).print(summary_table(read(workdir)))
        with room_told(workdir / "checkpoints"):
            path = write_report(workdir, exp.to_json(), others, about=headline(exp), steps=exp.run.steps)
        say(f"report: {path}")
    if diverged is not None:
        raise diverged


@contextlib.contextmanager
def held(workdir: pathlib.Path, exp: Experiment, overwrite: bool) -> Iterator[WorkdirLock | None]:
    """The lock on the workdir, for process 0; ValueError where it cannot be this experiment's."""
    if jax.process_index() != 0:
        yield None
        return
    check_claim(workdir, exp, overwrite)
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(WorkdirLock(workdir))
        except OSError as error:
            raise not_writable(workdir, error) from error
        yield lock


def logged(
    records: Iterator[dict[str, Any]], first: dict[str, Any], workdir: pathlib.Path, steps: int
) -> tuple[dict[str, Any], TrainingDiverged | None]:
    """Writes all records to the log; returns the last one, and the error of a run that diverged."""
    last = first
    with Logger(workdir, steps, first["step"] or None) as log:
        log.write(first | cli.told())
        try:
            for last in records:
                log.write(last)
        except TrainingDiverged as error:
            return last, error
    return last, None


def beginning(first: dict[str, Any], steps: int) -> Iterator[str]:
    """Lines about a run's first record, for the terminal."""
    if first["step"] == 0 and "origin" in first:
        yield transfer.describe_origin(first["origin"])
    yield f"data {first['data'][:16]}, beginning at step {first['step']} of {steps}"
    if "log" in first:
        yield f"warning: {first['log']}"
    changed = [str(Change(path, *values)) for path, values in first.get("changed", {}).items()]
    if changed:
        yield f"changed: {'; '.join(changed)}"


def goes_on(workdir: pathlib.Path, overwrite: bool) -> str:
    """Says from which step the same command goes on after an interruption, by what is whole on disk."""
    steps = Checkpoints(workdir / "checkpoints").steps()
    command = "without --overwrite, the same command" if overwrite else "the same command"
    return f"{command} goes on from step {steps[-1]}" if steps else "no step has been saved: it begins anew"


def check_source(exp: Experiment, workdir: pathlib.Path, overwrite: bool, init_from: transfer.RunCheckpoint) -> None:
    """Refuses parameters that a new run cannot begin with, before anything is written or deleted."""
    if init_from.workdir.resolve() == workdir.resolve():
        raise ValueError(
            f"--init_from={init_from} is the --workdir itself; a run goes on from its checkpoints by itself."
        )
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        begun = not checkpoints.empty()
    if overwrite or not begun:
        transfer.check_fit(exp, init_from)


def check_claim(workdir: pathlib.Path, exp: Experiment, overwrite: bool = False) -> None:
    """ValueError where a workdir is another experiment's, or holds files that are not a run's. Writes nothing."""
    check_path(workdir)
    if (workdir / CONFIG).is_file():
        if not overwrite and any((workdir / name).exists() for name in BEGUN):
            check_kinds(workdir)
            check_config(checked_config(workdir), exp, workdir)
    elif workdir.is_dir() and (others := sorted(strange(workdir))):
        raise ValueError(
            f"{workdir} holds files that are not a run's ({', '.join(others[:3])}); choose an empty or a new --workdir."
        )


def strange(workdir: pathlib.Path) -> set[str]:
    """Names of what is in a workdir without a run, and is not of one that was killed as it began."""
    there = {path.name for path in workdir.iterdir()} - {PROCESSES}
    return {name for name in there if not name.startswith(LOCK)} - {path.name for path in remains(workdir)}


def remains(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Files of a run that a process was killed over while it wrote them; they belong to whoever holds the lock."""
    there = [(path, unfinished_of(path)) for path in workdir.iterdir()]
    return [path for path, name in there if name and any(fnmatch.fnmatch(name, known) for known in FILES)]


def check_kinds(workdir: pathlib.Path) -> None:
    """ValueError where a run has a file for a folder, or a folder for a file."""
    for name in (*FOLDERS, *SINGLE):
        path = workdir / name
        if path.exists() and path.is_dir() != (name in FOLDERS):
            found, wanted = ("file", "folder") if name in FOLDERS else ("folder", "file")
            raise ValueError(f"{path} is a {found}, and of a run it is a {wanted}; move it away, or restore it.")


def claim(workdir: pathlib.Path, exp: Experiment, overwrite: bool = False) -> str | None:
    """Makes the workdir this experiment's, and returns the config of the run that goes on, None of a new one.

    ValueError if it is another's: a run may change as `continuation` says.
    """
    check_claim(workdir, exp, overwrite)
    saved = workdir / CONFIG
    before = saved.read_text() if saved.is_file() and not overwrite else None
    try:
        if overwrite and saved.is_file():
            delete_run(workdir)
        for path in remains(workdir):
            path.unlink(missing_ok=True)
        write_file(saved, exp.to_json())
    except OSError as error:
        raise not_writable(workdir, error) from error
    return before


def delete_run(workdir: pathlib.Path) -> None:
    """Deletes the run in a workdir, and no file of anybody else's."""
    for name in FILES:  # config.json last: it says that all this is a run's
        if name == PROCESSES and cli.supervised():  # which writes there at this moment
            continue
        for path in workdir.glob(name) if "*" in name else [workdir / name]:
            delete(path)


def delete(path: pathlib.Path) -> None:
    """Deletes a file or a folder; a symbolic link stays, and what it leads to is emptied."""
    target = path.resolve()
    if not target.is_dir():
        target.unlink(missing_ok=True)
        return
    shutil.rmtree(target)
    if path.is_symlink():
        target.mkdir()


def not_writable(workdir: pathlib.Path, error: OSError) -> ValueError:
    return ValueError(f"Nothing can be written to {workdir} ({error.strerror}); choose another --workdir.")


def compared(workdirs: list[str]) -> list[str]:
    """Runs to compare with; ValueError where one of them has no log, before anything is trained."""
    for workdir in workdirs:
        read(workdir)
    return workdirs


def describe(exp: Experiment) -> str:
    """Describes the experiment in a line."""
    count, cost = parameters(exp.model), flops(exp.model, exp.data.shapes(1))
    flop = f"{cost.training / cost.tokens / 1e6:.2f} MFLOP per trained token"
    return (
        f"{count.total:,} parameters, {count.active:,} active, {flop}"
        f"; {mesh_words(exp.mesh)} on {jax.device_count()} {jax.devices()[0].platform} device(s)"
    )


def say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
