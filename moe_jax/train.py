"""The training loop: batches, steps, records, evaluations, checkpoints."""

import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from moe_jax import costs, transfer
from moe_jax.checkpoint import Checkpoints, NotFinite, check_path
from moe_jax.config import Experiment
from moe_jax.continuation import Change, check_config, check_data
from moe_jax.core.stats import Stats
from moe_jax.costs import chips
from moe_jax.costs.energy import run_energy
from moe_jax.data import (
    batches,
    data_identity,
    default_directory,
    evaluation_batches,
    keep_tokenizers,
    with_kept_tokenizers,
)
from moe_jax.evaluate import bits_per_byte, drop_rate, evaluate, per_layer
from moe_jax.files import json_digest
from moe_jax.health import Health
from moe_jax.lock import WorkdirLock
from moe_jax.moe import Aux
from moe_jax.reporting.metrics import log_difference, log_state
from moe_jax.step import Metrics, Program, State


class TrainingDiverged(RuntimeError):
    """Too many steps in a row were not finite, or the parameters are not."""


def train(
    exp: Experiment,
    workdir: pathlib.Path | None = None,
    data_dir: pathlib.Path | None = None,
    init_from: transfer.RunCheckpoint | None = None,
    stop: Callable[[int], bool] = lambda step: False,
    lock: WorkdirLock | None = None,
) -> Iterator[dict[str, Any]]:
    """Trains, and yields a record when it starts, every `log_every` steps, at every evaluation, and at the end.

    With a workdir, checkpoints are kept there, and training goes on from the newest valid one, with the same data and
    a config that differs in what `continuation.MAY_CHANGE` names alone (ValueError); the first record has what has
    `changed`. One process at a time trains in a workdir (ValueError).
    init_from: a new run begins with those parameters of this checkpoint that fit, see `transfer.begin_from`. They are
        saved as its step 0, so that a continuation does not need that checkpoint.
    stop: is asked after every step, which it is given; where it says so, this step is logged and saved, and the last
        record is "interrupted". Several processes must be told to stop at the same step.
    lock: of the workdir, where the caller holds it; else it is taken here, by process 0.
    TrainingDiverged after `max_bad_steps` steps in a row without a finite loss and gradient, and where a state is to be
    saved that is not finite; the last record says so too, with `diverged`. The checkpoints are then those of steps that
    are known to be good (see `Health`). The log may differ from what the checkpoint has kept of it: the first record
    then says how, in `log`.
    """
    if workdir is not None and lock is None and jax.process_index() == 0:
        with WorkdirLock(workdir) as lock:
            yield from train(exp, workdir, data_dir, init_from, stop, lock)
        return
    run, data = exp.run, exp.data
    checkpoints = Checkpoints(workdir / "checkpoints", run.keep_last, run.keep_best) if workdir else None
    if workdir is not None:
        check_path(workdir)
    newest, _ = (checkpoints and checkpoints.newest_meta()) or ({}, None)
    config_changes(newest, exp, workdir)  # before data is prepared, and arrays are read
    windows, held_out = prepare_data(exp, workdir, data_dir)
    check_data(newest.get("data", {}), identity := data_identity(windows, held_out), workdir)
    program = Program(exp, len(windows.domains))
    state, meta = restore(checkpoints, program, init_from)
    seconds, origin, changed = meta.get("seconds", 0.0), meta.get("origin"), config_changes(meta, exp, workdir)
    step, tally = int(state.step), Tally(exp, windows.bytes_per_token, seconds)
    health = Health(step, int(state.skipped_in_a_row))
    log_differs = log_difference(workdir, meta.get("log")) if workdir else None
    if workdir is not None and jax.process_index() == 0:
        keep_tokenizers(windows, workdir)

    def evaluation() -> dict[str, Any]:
        began, B = time.monotonic(), data.B // data.microbatches
        chosen = evaluation_batches(held_out, B, run.eval_sequences, **program.data_slice)
        record = evaluate(partial(program.evaluate, state), chosen, held_out.domains)
        for name in ("", "_capacity"):
            if "loss" + name in record and held_out.bytes_per_token:
                record["bits_per_byte" + name] = bits_per_byte(record["loss" + name], held_out.bytes_per_token)
        if "moe" in record:
            record["moe"] = {"layer": tally.layers, **record["moe"]}
        tally.since += time.monotonic() - began  # not training
        return {"kind": "eval", "step": step, "seconds": tally.seconds(), **record}

    def save(loss: float | None = None) -> str | None:
        """Starts saving this step; returns why that cannot be."""
        if checkpoints is not None and workdir is not None and step not in checkpoints.steps():
            meta = {"seconds": tally.seconds(), "experiment": exp.to_json(), "data": identity}
            meta |= {"log": log_state(workdir)} | ({"origin": origin} if origin else {})
            try:
                checkpoints.save(step, state, meta, loss)
            except NotFinite as error:
                return str(error)
        return None

    def add(metrics: Metrics) -> None:
        loss = tally.add(metrics)
        health.add(step, loss, tally.skipped_in_a_row == 0)

    try:
        if origin and step == 0 and checkpoints is not None:
            if refused := save():
                raise ValueError(f"{refused}: begin from another checkpoint than {init_from}.")
            checkpoints.wait()
        start = {"kind": "start", "step": step, "seconds": seconds, **identity, "data": windows.fingerprint}
        start |= {"config": json_digest(json.loads(exp.to_json()))} | ({"log": log_differs} if log_differs else {})
        start |= {"changed": {change.path: [change.old, change.new] for change in changed}} if changed else {}
        yield start | ({"origin": origin} if origin else {})
        pending: Metrics | None = None  # fetched while the next step runs
        owed = False  # a save that was due among steps in trouble
        for batch in batches(windows, data.B, exp.seed, step, **program.data_slice):
            if step >= run.steps:
                break
            state, metrics = program.step(state, batch)
            if pending is not None:
                add(pending)
            step, pending = step + 1, metrics
            due = {what for what, n in run.intervals.items() if step % n == 0 or step == run.steps}
            stopping = stop(step) and step < run.steps
            due |= {"log", "save"} if stopping else {"save"} if owed else set()
            if due:
                add(pending)
                pending = None
                if lock is not None:
                    lock.check()
            if "log" in due:
                yield tally.record(step) | {"spikes": health.take_spikes()}
            held_out_record = evaluation() if "eval" in due else None
            healthy = math.isfinite(held_out_record["loss"]) if held_out_record else health.trouble_since is None
            owed = "save" in due and not (healthy or stopping)
            refused = None
            try:
                if held_out_record:
                    yield held_out_record
            finally:  # the record first: a kill after the commit would lose it; and whoever stops here has this step
                if "save" in due and not owed:
                    refused = save(held_out_record["loss"] if held_out_record else None)
            if tally.skipped_in_a_row >= run.max_bad_steps:
                refused = f"{tally.skipped_in_a_row} steps in a row had no finite loss or gradient"
            elif owed and step == run.steps:
                refused = "the held-out loss after the last step is not finite"
            if refused:
                good = checkpoints.discard_after(health.last_good) if checkpoints else None
                yield {"kind": "end", "step": step, "seconds": tally.seconds(), "diverged": True, "good": good}
                raise TrainingDiverged(f"{refused}; stopped at step {step}. {way_on(good, workdir)}")
            if stopping:
                if checkpoints is not None:
                    checkpoints.wait()
                yield {"kind": "interrupted", "step": step, "seconds": tally.seconds()}
                return
        if checkpoints is not None:
            checkpoints.wait()  # a save that fails has not ended the run
        yield {
            "kind": "end",
            "step": step,
            "seconds": (seconds := tally.seconds()),
            "energy": energy_record(exp, seconds),
        }
    finally:
        if checkpoints is not None:
            checkpoints.close()


def way_on(good: int | None, workdir: pathlib.Path | None) -> str:
    """The way to go on after a divergence. good: the newest checkpoint that is known to be good, if there is one."""
    how = "a lower config.optim.schedule.peak or config.optim.clip"
    if workdir is None:
        return f"Train again with {how}, or look at the data."
    if good is None:
        return f"No checkpoint is known to be good: the same command begins anew; give it {how}, or look at the data."
    return (
        f"Step {good} is the newest checkpoint that is known to be good: the same command goes on from there, and may "
        f"have {how}."
    )


def energy_record(exp: Experiment, seconds: float) -> dict[str, Any]:
    """Energy and emissions of these seconds of a run, estimated as `config.run` says."""
    run, kind = exp.run, jax.devices()[0].device_kind
    return dict(run_energy(seconds, kind, jax.device_count(), run.watts, run.pue, run.carbon))


def prepare_data(exp: Experiment, workdir: pathlib.Path | None, data_dir: pathlib.Path | None) -> tuple[Any, Any]:
    """The training and the held-out examples; with the tokenizers of the run in the workdir, if it has checkpoints."""
    data = exp.data
    if workdir is not None and any(path.name.isdecimal() for path in (workdir / "checkpoints").glob("*")):
        data = with_kept_tokenizers(data, workdir)
    return data.prepare(data_dir or default_directory())


def restore(
    checkpoints: Checkpoints | None, program: Program, init_from: transfer.RunCheckpoint | None = None
) -> tuple[State, dict[str, Any]]:
    """The newest valid state and what is kept with it.

    Where there is no checkpoint, the initial state, with parameters of `init_from` if it is given, and the record of
    `transfer.begin_from` as `origin`.
    """
    if checkpoints is not None and not checkpoints.empty():
        state, meta, _ = checkpoints.restore(program.abstract_state())
        if init_from is not None:
            transfer.check_origin(meta.get("origin"), init_from)
        return state, meta
    if init_from is None:
        return program.init(), {}
    state, origin = transfer.begin_from(program, init_from)
    return state, {"origin": origin}


def config_changes(meta: Mapping[str, Any], exp: Experiment, workdir: pathlib.Path | None) -> list[Change]:
    """Changes of the config since a checkpoint with this meta; ValueError where they make it another run."""
    return check_config(json.loads(meta["experiment"]), exp, workdir) if "experiment" in meta else []


class Tally:
    """Adds up steps until they are logged: sums first, then ratios."""

    def __init__(self, exp: Experiment, bytes_per_token: float | None, seconds: float):
        self.bytes_per_token = bytes_per_token  # None for data other than text
        self.work = costs.flops(exp.model, exp.data.shapes(B=1)).training * exp.data.B  # FLOPs of a step
        peak = chips.peak(jax.devices()[0].device_kind)
        self.peak = peak and peak * jax.device_count()
        self.start = time.monotonic() - seconds
        self.skipped_in_a_row = 0
        self.layers = list(exp.model.routed_layers)
        self.auxiliary = exp.model.routed is not None and bool(exp.model.routed.losses)
        self.clear()

    def clear(self) -> None:
        self.last: Metrics | None = None
        self.nats = self.targets = 0.0
        self.others: dict[str, float] = {}
        self.steps = 0
        self.stats: Stats | None = None
        self.since = time.monotonic()

    def seconds(self) -> float:
        """Seconds since the run began, without interruptions."""
        return time.monotonic() - self.start

    def add(self, metrics: Metrics) -> float:
        """Waits for a step and adds it; returns its loss."""
        self.last = last = jax.device_get(metrics)
        self.steps += 1
        self.skipped_in_a_row = int(last.skipped_in_a_row)
        if self.skipped_in_a_row == 0:
            self.nats += float(last.loss * last.targets)
            self.targets += float(last.targets)
            for name, mean in last.others.items():
                self.others[name] = self.others.get(name, 0.0) + float(mean * last.targets)
            if last.stats is not None:
                self.stats = last.stats if self.stats is None else jax.tree.map(np.add, self.stats, last.stats)
        return float(last.loss)

    def record(self, step: int) -> dict[str, Any]:
        """Record of the steps since the last one."""
        assert self.last is not None
        elapsed = time.monotonic() - self.since
        loss, rate = self.nats / self.targets if self.targets else float("nan"), self.work * self.steps / elapsed
        record = {
            "kind": "train",
            "step": step,
            "seconds": self.seconds(),
            "loss": loss,
            "grad_norm": float(self.last.grad_norm),
            "learning_rate": float(self.last.learning_rate),
            "tokens_per_second": self.targets / elapsed,
            "flops_per_second": rate,
            "skipped": int(self.last.skipped),
        }
        if self.auxiliary:
            record["aux_loss"] = float(self.last.aux_loss)
        if self.others:
            record["terms"] = {name: total / self.targets for name, total in self.others.items()}
        if self.bytes_per_token:
            record["bits_per_byte"] = bits_per_byte(loss, self.bytes_per_token)
        if self.peak:
            record["mfu"] = rate / self.peak
        if self.stats is not None:
            moe = per_layer(Aux(self.last.aux_loss, self.stats).metrics)
            record |= {
                "drop_rate": drop_rate(self.stats),
                "load_max_over_mean": float(np.mean(moe["load_max_over_mean"])),
                "moe": {"layer": self.layers, **moe},
            }
        self.clear()
        return record
