"""Trains one experiment, and continues it where it was interrupted.

    python -m experiments.train --config=configs/glam_nano.py --workdir=runs/glam_nano
    python -m experiments.train --config=configs/glam_nano.py --config.model.moe.E=32 --print_config

--init_from=RUN or RUN@STEP begins a new run with the parameters of another one's checkpoint, the newest or that of a
step: all that have the same place and shape in the model, on any mesh. Optimizer and routers begin anew. Which
parameters were taken is said, and recorded in the first record of the log and in the checkpoints; to continue the run,
the other one is not needed any more.

In the workdir: config.json, metrics.jsonl, tensorboard/, checkpoints/, report.html. For several processes see
experiments/launch.
"""

import dataclasses
import json
import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import jax
import rich.console
from absl import flags

from experiments import cli
from experiments.launch import join
from moe_jax import transfer
from moe_jax.checkpoint import Checkpoints
from moe_jax.config import Experiment, check_version
from moe_jax.core.shard import make_mesh
from moe_jax.costs import flops, parameters
from moe_jax.costs.headline import headline, mesh_words
from moe_jax.data import default_directory
from moe_jax.files import parse_json, write_file
from moe_jax.reporting.metrics import FILE, Logger, read, summary_table
from moe_jax.reporting.report import write_report
from moe_jax.train import TrainingDiverged, train

cli.define_config()
cli.define_processes()
WORKDIR = cli.workdir()
DATA_DIR = cli.data_dir()
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Delete the run in workdir and begin anew.")
PRINT_CONFIG = flags.DEFINE_bool("print_config", False, "Print the resolved config as JSON and stop.")
COMPARE = cli.compare()
INIT_FROM = flags.DEFINE_string("init_from", None, "RUN or RUN@STEP whose parameters a new run begins with.")

BEGUN = (FILE, "checkpoints")  # what a run has once it has begun
PROCESSES = "processes"  # what the processes under a supervisor print; it may be there before the run
FILES = (*BEGUN, "tensorboard", "report.html", PROCESSES, "config.json")
# Between a run and its continuation: how long, and where it is computed.
MAY_CHANGE = ("run", "mesh", "model.remat", "model.moe.exchange", "optim.zero1")


def main() -> None:
    if not PRINT_CONFIG.value:
        cli.connect()
    exp = cli.experiment()
    if PRINT_CONFIG.value:
        print(exp.to_json())
        return
    if not WORKDIR.value:
        raise ValueError("No place for the run was given; say --workdir=runs/my_run, for instance.")
    workdir = cli.folder("workdir", WORKDIR.value)
    data_dir = cli.folder("data_dir", DATA_DIR.value) if DATA_DIR.value else None
    others = compared(COMPARE.value)
    exp = on_devices(exp)
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

    TrainingDiverged of `train`, after the report.
    """
    if init_from is not None:
        check_source(exp, workdir, overwrite, init_from)
    join.agree("config", exp.to_json())
    if jax.process_index() == 0:
        claim(workdir, exp, overwrite)
        if jax.process_count() > 1:  # the others find it made, where they see the same disk
            exp.data.prepare(data_dir or default_directory())
    join.meet("claimed")
    say(describe(exp))
    records = train(exp, workdir, data_dir, init_from)
    first = next(records)
    join.agree("data", first["data"])
    if first["step"] == 0 and "origin" in first:
        say(transfer.describe_origin(first["origin"]))
    say(f"data {first['data'][:16]}, beginning at step {first['step']} of {exp.run.steps}")
    diverged: TrainingDiverged | None = None
    with Logger(workdir, exp.run.steps, first["step"] or None) as log:
        log.write(first | cli.told())
        try:
            for record in records:
                log.write(record)
        except TrainingDiverged as error:
            diverged = error
    if jax.process_index() == 0:
        rich.console.Console(stderr=True).print(summary_table(read(workdir)))
        path = write_report(workdir, exp.to_json(), others, about=headline(exp), steps=exp.run.steps)
        say(f"report: {path}")
    if diverged is not None:
        raise diverged


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


def claim(workdir: pathlib.Path, exp: Experiment, overwrite: bool = False) -> None:
    """Makes the workdir this experiment's; ValueError if it is another's.

    A run may go on for longer, or on another mesh, with another exchange.
    """
    saved = workdir / "config.json"
    if overwrite and saved.is_file():
        for name in FILES:  # config.json last: it says that all this is a run's
            path = workdir / name
            if name == PROCESSES and cli.supervised():  # which writes there at this moment
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    elif saved.is_file():
        begun = any((workdir / name).exists() for name in BEGUN)
        if begun:
            check_version(saved_config(saved))
        if begun and (changed := differences(saved_config(saved), json.loads(exp.to_json()))):
            raise ValueError(
                f"{workdir} holds another run ({'; '.join(changed[:3])}); choose another --workdir, "
                "or delete that run with --overwrite."
            )
    elif workdir.is_dir() and (others := sorted({path.name for path in workdir.iterdir()} - {PROCESSES})):
        raise ValueError(
            f"{workdir} holds files that are not a run's ({', '.join(others[:3])}); choose an empty or a new --workdir."
        )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_file(saved, exp.to_json())
    except OSError as error:
        raise ValueError(
            f"Nothing can be written to {workdir} ({error.strerror}); choose another --workdir."
        ) from error


def saved_config(path: pathlib.Path) -> dict[str, Any]:
    """Values of a run's config.json."""
    try:
        if isinstance(saved := parse_json(path.read_bytes()), dict):
            return saved
        raise ValueError
    except ValueError:
        raise ValueError(
            f"{path} is damaged, so that this run cannot be told from another; restore it "
            "(--print_config shows what is in it), or begin anew with --overwrite."
        ) from None


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Lists values that differ and may not differ in a continuation."""
    if isinstance(old, dict) and isinstance(new, dict):
        paths = {k: f"{path}.{k}".strip(".") for k in {**old, **new}}
        return [d for k, p in paths.items() if p not in MAY_CHANGE for d in differences(old.get(k), new.get(k), p)]
    return [] if old == new else [f"{path or 'config'} was {old!r}, is {new!r}"]


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
